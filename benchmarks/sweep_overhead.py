"""What a sweep costs beside its trials: a trial on Ray against the same run of the recipe in one process.

    python benchmarks/sweep_overhead.py

One worker trains a few trials of a tiny model, one after the other; then this process runs the same commands. The
first of each is not counted: it waits for the worker to start and for imports, which a sweep does once. CPU time is
that of all processes, those of Ray included, so that other work on the machine does not change it; `idle` is the time
on the clock between the end of a trial and the end of the next in which the worker had none.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import image_classification
import sweep_ray
import sweep_space
import sweep_trials
from comparison import quiet
from sweep import parse


def prepare(folder: Path) -> tuple[Path, Path]:
    """A model with random weights and images of noise."""
    torch.manual_seed(0)
    model, data = folder / "vit", folder / "images"
    sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    ViTModel(ViTConfig(**sizes, image_size=96)).save_pretrained(model)
    ViTImageProcessor(size={"height": 96, "width": 96}).save_pretrained(model)
    generator = np.random.default_rng(0)
    for split, count in (("train", 32), ("validation", 8)):
        for name in ("a", "b"):
            for number in range(count):
                file = data / split / name / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(file)
    return model, data


def measure(folder: Path, trials: int, epochs: int) -> dict[str, Any]:
    """The seconds of each trial, with Ray and alone."""
    model, data = prepare(folder)
    rates = ",".join(f"{0.001 * (number + 1):g}" for number in range(trials + 1))
    words = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--methods", "ssf"]
    words += ["--values", f"learning_rate={rates}", "--num_train_epochs", str(epochs)]
    given, others = parse([*words, "--output_dir", str(folder / "sweep")])
    ends: list[tuple[float, float]] = []

    def show(trial: Any, state: str) -> None:
        if state == "ended":
            ends.append((time.perf_counter(), cpu_seconds()))

    with sweep_ray.connected(None, cpus=1):
        sweep_ray.search(given, others, [], None, show)
    records = {sweep_space.name_of(record["trial"]): record for record in sweep_trials.read_records(given.output_dir)}
    in_order = [records[sweep_space.name_of(trial)] for trial in sweep_space.planned(given)]
    alone = []
    for trial in sweep_space.planned(given):
        output = ["--output_dir", str(folder / "alone" / sweep_space.name_of(trial)), "--test_split", "none"]
        started = cpu_seconds()
        with quiet():
            image_classification.main([*sweep_space.words_of(trial, others), *output, "--progress", "none"])
        alone.append(cpu_seconds() - started)
    between = [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(ends)]
    return {
        "sweep_cpu": [cpu for _, cpu in between],
        "alone_cpu": alone[1:],
        "idle": [clock - record["seconds"] for (clock, _), record in zip(between, in_order[1:], strict=True)],
    }


def cpu_seconds() -> float:
    """CPU time of this process and of all that it started."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:2])
    return total


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=3, help="beside the first (3)")
    parser.add_argument("--epochs", type=int, default=20, help="of a trial (20)")
    parser.add_argument("--results", type=Path, help="a JSON of the seconds")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.trials, arguments.epochs)
    if arguments.results:
        arguments.results.write_text(json.dumps(found, indent=1))
    middle = {name: statistics.median(seconds) for name, seconds in found.items()}
    print(", ".join(f"{name} {value:.1f} s" for name, value in middle.items()))
    more = middle["sweep_cpu"] - middle["alone_cpu"]
    print(f"A trial in a sweep takes {more:+.1f} s of CPU time beside the recipe's, and waits {middle['idle']:.1f} s: "
          f"{100 * (more + middle['idle']) / 60:.1f} % of a trial of a minute.")  # fmt: skip


if __name__ == "__main__":
    main()
