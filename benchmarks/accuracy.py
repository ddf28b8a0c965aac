"""Accuracy of every method on one small task of real images, under one protocol.

    python benchmarks/accuracy.py

Every method starts from the same pretrained encoder and sees the same digits for the same number of epochs. Its
learning rate is the best of three on validation digits, with the first seed; the test digits decide nothing. Beside
the methods stand the linear probe, full fine-tuning and three methods of peft. Each training run is a line in the
results file: a run that was killed goes on where it stopped, and the page is written anew after every method.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from lines import append_lines, read_lines
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers.utils import logging as transformers_logging

import hf_visual_peft
from hf_visual_peft.demo.data import preprocess
from hf_visual_peft.demo.digits import load_digits
from hf_visual_peft.demo.models import default_config, forward_options, load_classifier, pixel_options
from hf_visual_peft.demo.training import TrainingOptions, count_correct, train
from hf_visual_peft.demo.weights import DESCRIPTION, demo_checkpoint
from hf_visual_peft.peft_methods.methods import PEFT_METHODS
from hf_visual_peft.sharing.files import write_aside
from hf_visual_peft.tables import format_table


ROOT = Path(__file__).parents[1]
RATES = (1e-3, 3e-3, 1e-2)
FULL_RATES = (3e-5, 1e-4, 3e-4)  # a pretrained backbone falls apart at the rates of the methods
PEFT_BASELINES = {"peft-lora": "lora", "peft-dora": "dora", "peft-ln-tuning": "ln_tuning"}
BASELINES = ("full", *PEFT_BASELINES)


@dataclass(frozen=True)
class Protocol:
    """What all runs have in common; results of another protocol are not mixed in."""

    train: int = 200
    validation: int = 200
    test: int = 500
    image_size: int = 42
    epochs: int = 8
    batch_size: int = 32
    data_seed: int = 0


LONGER = Protocol(epochs=40)  # for the methods that the shorter runs leave below the linear probe


@dataclass(frozen=True)
class Run:
    """One training run."""

    method: str
    lr: float
    seed: int
    parameters: int
    adapter_bytes: int
    validation: float
    test: float
    seconds: float
    protocol: dict[str, Any]


def config_of(name: str, base: nn.Module, image_size: int) -> PeftConfig | None:
    """The config of a method, with peft's own methods as the vision literature uses them; None for all weights."""
    if name == "full":
        return None
    if name in PEFT_BASELINES:
        return PEFT_METHODS[PEFT_BASELINES[name]].config(base)
    return default_config(hf_visual_peft.get_method(name), base, image_size)


class Benchmark:
    """Model and digits, loaded once."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.accelerator = Accelerator()
        self.checkpoint = str(demo_checkpoint())
        pixels = pixel_options(self.checkpoint, protocol.image_size)
        splits = load_digits(protocol.train, protocol.validation, protocol.test, protocol.data_seed)
        self.labels = tuple(splits["train"].features["label"].names)
        self.splits = {name: preprocess(split, **asdict(pixels)) for name, split in splits.items()}

    def run(self, name: str, lr: float, seed: int) -> Run:
        """Train once and count right answers on validation and test digits."""
        set_seed(seed)
        base = load_classifier(self.checkpoint, self.labels)
        extra = forward_options(base, self.protocol.image_size)
        heads = [f"{path}." for path in hf_visual_peft.find_backbone(base).heads]
        config = config_of(name, base, self.protocol.image_size)
        model = base if config is None else get_peft_model(base, config)
        method = hf_visual_peft.list_methods().get(name)
        if method is not None and method.calibrated:
            images = DataLoader(self.splits["train"], batch_size=self.protocol.batch_size)  # type: ignore[arg-type]
            hf_visual_peft.calibrate(model, images, seed=seed, progress=False)
        trained = {key: value.numel() for key, value in model.named_parameters() if value.requires_grad}
        options = TrainingOptions(self.protocol.epochs, self.protocol.batch_size, lr, seed)
        try:
            seconds = train(model, self.splits["train"], options, self.accelerator, f"{name} lr={lr:g}", extra)
        except FloatingPointError:  # too high a rate: nothing is right, and another one will be chosen
            seconds, accuracy = 0.0, {"validation": 0.0, "test": 0.0}
        else:
            accuracy = {
                split: count_correct(model, self.splits[split], self.protocol.batch_size, self.accelerator, extra)
                / len(self.splits[split])
                for split in ("validation", "test")
            }
        self.accelerator.free_memory()
        return Run(
            method=name,
            lr=lr,
            seed=seed,
            parameters=sum(size for key, size in trained.items() if not any(head in key for head in heads)),
            adapter_bytes=_saved_bytes(model),
            validation=accuracy["validation"],
            test=accuracy["test"],
            seconds=seconds,
            protocol=asdict(self.protocol),
        )


def _saved_bytes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        file = "adapter_model.safetensors" if isinstance(model, PeftModel) else "model.safetensors"
        return Path(folder, file).stat().st_size


def read_results(path: Path, protocol: Protocol) -> list[Run]:
    """Runs of this protocol; a truncated last line is skipped."""
    return [run for line in read_lines(path) if (run := Run(**line)).protocol == asdict(protocol)]


def append_result(path: Path, run: Run) -> None:
    """Append one run, and flush it to the disk."""
    append_lines(path, [asdict(run)])


def measure(
    name: str,
    seeds: Iterable[int],
    done: list[Run],
    run: Callable[[str, float, int], Run],
    save: Callable[[Run], None],
) -> None:
    """All runs of a method that are not done yet."""
    known = {(r.lr, r.seed): r for r in done if r.method == name}

    def get(lr: float, seed: int) -> Run:
        if (lr, seed) not in known:
            known[lr, seed] = run(name, lr, seed)
            save(known[lr, seed])
            done.append(known[lr, seed])
        return known[lr, seed]

    first, *others = seeds
    best = max((get(lr, first) for lr in rates_of(name)), key=lambda r: r.validation)
    for seed in others:
        get(best.lr, seed)


def rates_of(name: str) -> tuple[float, ...]:
    """The learning rates that a method chooses from."""
    return FULL_RATES if name == "full" else RATES


def chosen_runs(name: str, seeds: list[int], done: list[Run]) -> list[Run]:
    """The runs that count, one a seed, or none while some are missing."""
    runs = [r for r in done if r.method == name]
    first = [r for r in runs if r.seed == seeds[0]]
    if len(first) < len(rates_of(name)):
        return []
    lr = max(first, key=lambda r: r.validation).lr
    chosen = {r.seed: r for r in runs if r.lr == lr}
    return [chosen[seed] for seed in seeds] if set(seeds) <= set(chosen) else []


def below_probe(names: list[str], seeds: list[int], done: list[Run]) -> list[str]:
    """The methods whose mean accuracy is less than that of the linear probe."""
    means = {name: statistics.mean(r.test for r in runs) for name in names if (runs := chosen_runs(name, seeds, done))}
    return [name for name, mean in means.items() if mean < means.get("linearprobe", 0.0)]


def report(names: list[str], seeds: list[int], done: list[Run], protocol: Protocol, longer: list[Run]) -> str:
    """`docs/accuracy.md`.

    Args:
        names: of the methods.
        seeds: that count.
        done: runs of the protocol.
        protocol: what they have in common.
        longer: runs of `LONGER`, of one seed.
    """
    rows = []
    for name in names:
        runs = chosen_runs(name, seeds, done)
        if not runs:
            continue
        accuracies = [100 * r.test for r in runs]
        rows.append(
            (
                statistics.mean(accuracies),
                (
                    name,
                    f"{runs[0].parameters:,}",
                    f"{runs[0].adapter_bytes:,}",
                    f"{statistics.mean(accuracies):.1f}",
                    f"{statistics.stdev(accuracies):.1f}" if len(runs) > 1 else "-",
                    f"{runs[0].lr:g}",
                    f"{statistics.median(r.seconds for r in runs):.0f}",
                ),
            )
        )
    header = ("method", "parameters", "adapter bytes", "accuracy", "deviation", "learning rate", "seconds")
    table = format_table(header, [row for _, row in sorted(rows, key=lambda row: -row[0])], right=header[1:])
    below = below_probe(names, seeds, done)
    more = {name: runs[0] for name in ("linearprobe", *below) if (runs := chosen_runs(name, seeds[:1], longer))}
    missing = [name for name in names if not chosen_runs(name, seeds, done)]
    notes = [
        f"Below the linear probe: {', '.join(below) or 'none'}." if chosen_runs("linearprobe", seeds, done) else "",
        *(EXPLANATIONS[name] for name in below if name in EXPLANATIONS),
        f"With {LONGER.epochs} epochs and one seed, all else as above: "
        + ", ".join(f"{name} {100 * run.test:.1f} (at {run.lr:g})" for name, run in more.items())
        + "."
        if more
        else "",
        f"Not measured yet: {', '.join(missing)}." if missing else "",
    ]
    protocol_text = PROTOCOL.format(
        seeds=len(seeds),
        rates=", ".join(f"{lr:g}" for lr in RATES),
        full_rates=", ".join(f"{lr:g}" for lr in FULL_RATES),
        description=DESCRIPTION,
        **asdict(protocol),
    )
    parts = [
        "# Accuracy on digits",
        "    python benchmarks/accuracy.py",
        fill(" ".join(protocol_text.split()), 119),
        table,
        *(fill(note, 119) for note in notes if note),
    ]
    return "\n\n".join(parts) + "\n"


PROTOCOL = """
wrote this page. Each method adapts an encoder ({description}) to {train} digits of MNIST at {image_size} px, with its
own defaults, AdamW, weight decay 0.01 (`parameter_groups`), a cosine with 10 % warm-up, {epochs} epochs and batches of
{batch_size}. The learning rate is the best of {rates} (full fine-tuning: {full_rates}) on {validation} validation
digits with the first seed; accuracy is that of the last epoch on {test} test digits, in percent, mean and standard
deviation over {seeds} seeds. The images are the same for all seeds; head, adapter and order differ. `parameters`
leaves the head out, `adapter bytes` contains it. `seconds` is the median time of a training run on one core that other
programs used, too: read it as an order of magnitude. On {test} digits two methods that differ by less than 2 points
are not told apart, and the task says little about others.
"""


# of methods that are below the linear probe here
EXPLANATIONS = {
    "lst": (
        "LST's result takes the place of what the backbone returns: its side network has to learn from nothing what "
        "the others find in place, which takes it more steps."
    ),
    "mona": (
        "Mona starts with PyTorch's own initialisation, as its authors' code does: every adapter adds random numbers "
        "to the stream, as large as the stream is, and the few steps here do not undo that; lower rates (1e-4, 3e-4) "
        "are worse still. Its authors train for many thousand steps."
    ),
    "lorand": (
        "LoRand starts with random kernels, as its authors' code does, so that it, too, has to undo what it adds "
        "before it can gain."
    ),
}


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", help="names separated by commas (default: all methods for images, and baselines)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default: 3)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "accuracy.jsonl", help="one line a run")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "accuracy.md", help="the page to write")
    arguments = parser.parse_args(argv)
    everything = [name for name, method in hf_visual_peft.list_methods().items() if not method.video]
    everything += BASELINES
    names = arguments.methods.split(",") if arguments.methods else everything
    unknown = sorted(set(names) - set(everything))
    if unknown or arguments.seeds < 1:
        parser.error(
            f"--methods {', '.join(unknown)}: choose from {', '.join(everything)}." if unknown else "--seeds < 1"
        )
    transformers_logging.disable_progress_bar()
    protocol = Protocol()
    benchmark = Benchmark(protocol)
    done = read_results(arguments.results, protocol)
    seeds = list(range(arguments.seeds))
    for name in names:
        measure(name, seeds, done, benchmark.run, lambda run: append_result(arguments.results, run))
        done = read_results(arguments.results, protocol)  # other processes may measure other methods
        write_aside(arguments.page, report(everything, seeds, done, protocol, read_results(arguments.results, LONGER)))
    slow = Benchmark(LONGER)
    longer = read_results(arguments.results, LONGER)
    for name in ("linearprobe", *below_probe(names, seeds, done)):
        measure(name, seeds[:1], longer, slow.run, lambda run: append_result(arguments.results, run))
        write_aside(arguments.page, report(everything, seeds, done, protocol, longer))


if __name__ == "__main__":
    main()
