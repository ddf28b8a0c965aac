"""Search on digits: is the found mixture of three methods as good as the best of them with as many parameters?

    python benchmarks/search.py

For each seed a supernet of prompts, low-rank updates and bottlenecks trains on the digits of `accuracy.py`, evolution
finds a subnet under the cap on validation digits, and the subnet trains anew, as an ordinary adapter. Beside it stand
the three methods alone, each with the largest size that the cap allows. Each run is a line in the results file: what
was killed goes on where it stopped. The page is written anew after every run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from accelerate.utils import set_seed
from accuracy import ROOT, Benchmark, Protocol
from lines import append_lines, read_lines
from peft import PeftConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers.utils import logging as transformers_logging

import hf_visual_peft
from hf_visual_peft import CompositeConfig
from hf_visual_peft.demo.models import forward_options, load_classifier
from hf_visual_peft.demo.training import TrainingOptions, count_correct, train
from hf_visual_peft.demo.weights import DESCRIPTION
from hf_visual_peft.search import Supernet, evolve, read_space
from hf_visual_peft.sharing.files import write_aside
from hf_visual_peft.tables import format_table


CAP = 36_864
DEPTHS = [0, 3, 6, 9, 12]
SPACE = {
    "method": "composite",
    "parts": [
        {"method": "vpt", "sizes": {"num_virtual_tokens": [1, 2, 4, 8]}, "depths": DEPTHS},
        {"method": "sharedlora", "sizes": {"r": [1, 2, 3, 4]}, "depths": DEPTHS},
        {"method": "pfeiffer", "sizes": {"r": [1, 2, 4, 8]}, "depths": DEPTHS},
    ],
}
# the largest that the cap allows, in all blocks
ALONE = {"vpt": {"num_virtual_tokens": 8}, "sharedlora": {"r": 2}, "pfeiffer": {"r": 3}}
FOUND, INHERITED = "found", "found, weights of the supernet"


@dataclass(frozen=True)
class Settings:
    """What all runs have in common, beside the protocol of `accuracy.py`."""

    cap: int = CAP
    rate: float = 3e-3  # the default of the three methods
    supernet_epochs: int = 12
    supernet_rate: float = 1e-3
    population: int = 16
    parents: int = 5
    mutations: int = 6
    crossovers: int = 6
    generations: int = 3


class Searching(Benchmark):
    """Model and digits, loaded once."""

    def __init__(self, protocol: Protocol, settings: Settings) -> None:
        super().__init__(protocol)
        self.settings = settings

    def accuracies(self, model: Any, extra: dict[str, Any]) -> dict[str, float]:
        """On validation and test digits."""
        size = self.protocol.batch_size
        return {
            split: count_correct(model, self.splits[split], size, self.accelerator, extra) / len(self.splits[split])
            for split in ("validation", "test")
        }

    def single(self, name: str, config: PeftConfig, lr: float, seed: int) -> dict[str, Any]:
        """Train an adapter from its start."""
        set_seed(seed)
        base = load_classifier(self.checkpoint, self.labels)
        extra = forward_options(base, self.protocol.image_size)
        heads = tuple(f"base_model.model.{path}." for path in hf_visual_peft.find_backbone(base).heads)
        model = get_peft_model(base, config)
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        options = TrainingOptions(self.protocol.epochs, self.protocol.batch_size, lr, seed)
        seconds = train(model, self.splits["train"], options, self.accelerator, f"{name} lr={lr:g}", extra)
        found = self.accuracies(model, extra)
        self.accelerator.free_memory()
        parameters = sum(count for key, count in trained.items() if not key.startswith(heads))
        return {"name": name, "lr": lr, "seed": seed, "parameters": parameters, "seconds": seconds, **found}

    def search(self, seed: int) -> dict[str, Any]:
        """Train a supernet, find a subnet, and evaluate it with the weights that it has there."""
        settings = self.settings
        set_seed(seed)
        base = load_classifier(self.checkpoint, self.labels)
        extra = forward_options(base, self.protocol.image_size)
        space = read_space(SPACE)
        supernet = Supernet(space.put_on(base), space, seed)
        options = TrainingOptions(settings.supernet_epochs, self.protocol.batch_size, settings.supernet_rate, seed)
        start = time.perf_counter()
        train(supernet, self.splits["train"], options, self.accelerator, f"supernet {seed}", extra)
        trained = time.perf_counter()
        batches = list(DataLoader(self.splits["validation"], batch_size=100))  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as folder:
            found = evolve(
                supernet.subnets,
                supernet.accuracy_on(batches, **extra),
                max_parameters=settings.cap,
                seed=seed,
                record=Path(folder, "search.json"),
                **{name: getattr(settings, name) for name in
                   ("population", "parents", "mutations", "crossovers", "generations")},
            )  # fmt: skip
        seconds = (trained - start, time.perf_counter() - trained)
        parts = supernet.subnets.describe(found.choice)["parts"]
        accuracies = self.accuracies(supernet.extract(found.choice), extra)
        self.accelerator.free_memory()
        return {"name": INHERITED, "lr": settings.supernet_rate, "seed": seed, "parameters": found.parameters,
                "seconds": sum(seconds), "supernet_seconds": seconds[0], "evaluated": found.evaluated,
                "history": found.history, "parts": parts, **accuracies}  # fmt: skip


def measure(benchmark: Searching, seeds: list[int], results: Path, page: Path) -> None:
    """All runs that are not done yet."""
    common = {"protocol": asdict(benchmark.protocol), "settings": asdict(benchmark.settings), "space": SPACE}
    common = json.loads(json.dumps(common))

    def known() -> list[dict[str, Any]]:
        return [line for line in read_lines(results) if all(line.get(key) == common[key] for key in common)]

    def keep(run: dict[str, Any]) -> dict[str, Any]:
        append_lines(results, [{**run, **common}])
        write_aside(page, report(known(), seeds, benchmark.protocol, benchmark.settings))
        return run

    def once(name: str, seed: int, make: Any) -> dict[str, Any]:
        same = [r for r in known() if r["name"] == name and r["seed"] == seed]
        return same[0] if same else keep(make())

    for seed in seeds:
        searched = once(INHERITED, seed, lambda: benchmark.search(seed))  # noqa: B023 - called now
        configs: dict[str, PeftConfig] = {FOUND: CompositeConfig(parts=searched["parts"])}
        for name, fields in ALONE.items():
            configs[name] = hf_visual_peft.get_method(name).config_cls(**fields)
        for name, config in configs.items():
            once(name, seed, lambda: benchmark.single(name, config, benchmark.settings.rate, seed))  # noqa: B023
    write_aside(page, report(known(), seeds, benchmark.protocol, benchmark.settings))


def done(runs: list[dict[str, Any]], seeds: list[int]) -> list[int]:
    """The seeds of which all runs are there."""
    names = {seed: {r["name"] for r in runs if r["seed"] == seed} for seed in seeds}
    return [seed for seed in seeds if names[seed] >= {FOUND, INHERITED, *ALONE}]


def chosen(runs: list[dict[str, Any]], name: str, seeds: list[int]) -> list[dict[str, Any]]:
    """The runs of one row, one a seed."""
    return [next(r for r in runs if r["name"] == name and r["seed"] == seed) for seed in seeds]


def report(runs: list[dict[str, Any]], seeds: list[int], protocol: Protocol, settings: Settings) -> str:
    """`docs/search.md`; only seeds count of which all runs are there."""
    wanted, seeds = seeds, done(runs, seeds)
    rows, means = [], {}
    for name in (FOUND, INHERITED, *ALONE):
        those = chosen(runs, name, seeds)
        if not those:
            break
        accuracies = [100 * r["test"] for r in those]
        means[name] = statistics.mean(accuracies)
        counts = sorted({r["parameters"] for r in those})
        rows.append((
            name,
            " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1]))),
            ", ".join(f"{value:.1f}" for value in accuracies),
            f"{means[name]:.1f}",
            f"{statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else "-",
            f"{100 * statistics.mean(r['validation'] for r in those):.1f}",
            f"{those[0]['lr']:g}",
        ))  # fmt: skip
    header = ("adapter", "parameters", "test, by seed", "mean", "deviation", "validation", "learning rate")
    parts = [
        "# Search on digits",
        "    python benchmarks/search.py",
        fill(" ".join(TEXT.format(description=DESCRIPTION, **asdict(protocol), **asdict(settings)).split()), 119),
        format_table(header, rows, right=header[1:]),
        fill(verdict(means, protocol, len(seeds), len(wanted)), 119),
    ]
    for run in chosen(runs, INHERITED, seeds):
        parts.append(f"Seed {run['seed']} found, of {run['evaluated']} subnets, in {run['supernet_seconds']:.0f} s of "
                     f"training and {run['seconds'] - run['supernet_seconds']:.0f} s of evolution:")  # fmt: skip
        parts.append("\n".join(f"- {described(part)}" for part in run["parts"]))
    return "\n\n".join(parts) + "\n"


def described(part: dict[str, Any]) -> str:
    """One part of a subnet in a line."""
    sizes = ", ".join(f"{k} {v}" for k, v in part.items() if k not in ("method", "layers_to_transform"))
    blocks = ", ".join(str(block) for block in part["layers_to_transform"])
    return f"{part['method']}: {sizes} in block{'s' * (len(part['layers_to_transform']) > 1)} {blocks}"


def verdict(means: dict[str, float], protocol: Protocol, seeds: int, wanted: int) -> str:
    """What the table says about the question."""
    if not seeds:
        return "No seed has all of its runs yet."
    best = max(ALONE, key=lambda name: means[name])
    difference = means[FOUND] - means[best]
    answer = "is at least as good as" if difference >= 0 else "is not as good as"
    subject = "On average the found subnet" if seeds > 1 else "The found subnet"
    text = (
        f"{subject}, trained anew, {answer} the best of its three parts alone, {best}: {means[FOUND]:.1f} against "
        f"{means[best]:.1f} percent."
    )
    if abs(difference) < 2:
        text += (
            f" On {protocol.test} digits, two adapters that differ by less than 2 points are not told apart, so this "
            "is a tie."
        )
    if seeds < wanted:
        text += f" That is of {seeds} of {wanted} seeds: the runs of the others are not done yet, so it may change."
    return text


TEXT = """
wrote this page. The question: is the subnet that a search finds at least as good as the best of the three methods in
its space alone, with as many parameters? The space has prompts (VPT), low-rank updates (SharedLoRA) and bottlenecks
(Pfeiffer), each with four sizes for every block and 0, 3, 6, 9 or 12 blocks. The cap is {cap:,} parameters without the
head; each method alone has the largest size in all blocks that the cap allows. Model, digits and training are those of
[accuracy](accuracy.md): {description}, {train} digits for training, {validation} for validation, {test} for test, at
{image_size} px, {epochs} epochs, batches of {batch_size}; the learning rate is {rate:g}, the default of the three
methods. The supernet trains for {supernet_epochs} epochs at
{supernet_rate:g}; evolution measures accuracy on validation digits: {population} subnets at random, then
{generations} generations of {mutations} mutations and {crossovers} crossovers of the {parents} best. The row "found"
trains the subnet anew from its start; the other one has the weights that the subnet has in the supernet. Test digits
decide nothing. Each seed has a supernet and a search of its own. Seconds are of one core
that much other work used, too.
"""


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="searches (default: 3)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "search.jsonl", help="one line a run")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "search.md", help="the page to write")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        parser.error("--seeds must be at least 1.")
    transformers_logging.disable_progress_bar()
    measure(Searching(Protocol(), Settings()), list(range(arguments.seeds)), arguments.results, arguments.page)


if __name__ == "__main__":
    main()
