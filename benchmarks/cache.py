"""What a cache of frozen features saves: an epoch on images against epochs on features, in one process.

    python benchmarks/cache.py

The encoder of the demonstration at 224 px, images as the recipe for image classification prepares them. Epochs on
images and on features take turns. Beside them stand their parts: reading features, and training with features that
are in memory already, which is the limit. The results file has one line a measurement; the page is written from it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from textwrap import fill
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoImageProcessor
from transformers.utils import logging as transformers_logging

import hf_visual_peft
from hf_visual_peft import CachedFeatures, FeatureCache
from hf_visual_peft.demo.digits import CLASSES, load_digits
from hf_visual_peft.demo.models import forward_options, load_classifier
from hf_visual_peft.demo.weights import DESCRIPTION, demo_checkpoint
from hf_visual_peft.features.storage import size
from hf_visual_peft.sharing.files import write_aside
from hf_visual_peft.tables import format_table


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

from image_data import Images  # noqa: E402


SIZE, BATCH = 224, 32
TARGETS = {"linearprobe": 50, "lst": 6}
CASES = (("linearprobe", "float32"), ("lst", "float32"), ("lst", "float16"))


def pictures(count: int) -> Dataset[Any]:
    """Digits as the recipe gives them to the model, without augmentation."""
    data = load_digits(train_size=count, validation_size=0, test_size=1)["train"]
    options = argparse.Namespace(seed=0, train_crop="none", horizontal_flip=0.0, clip_frames=None)
    encoded = data.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    processor = AutoImageProcessor.from_pretrained(demo_checkpoint())
    return Images(encoded, np.array(data["label"]), "train", processor, options)


def train(model: nn.Module, batches: Iterable[dict[str, Any]], arguments: dict[str, Any]) -> float:
    """Seconds that an epoch takes."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    started = time.perf_counter()
    for batch in batches:
        loss = torch.nn.functional.cross_entropy(model(**batch, **arguments).logits, batch["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that something takes, and what it returns."""
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def measure(method: str, dtype: str, images: Dataset[Any], folder: Path, rounds: int) -> dict[str, Any]:
    """Everything about one method and dtype."""
    torch.manual_seed(0)
    base = load_classifier(str(demo_checkpoint()), CLASSES)
    model = get_peft_model(base, hf_visual_peft.get_method(method).config_cls())
    arguments = forward_options(base, SIZE)
    order = torch.Generator().manual_seed(0)
    on_images = DataLoader(images, batch_size=BATCH, shuffle=True, generator=order)
    cache = FeatureCache(model, folder, dtype=dtype, arguments=arguments, batch_size=BATCH, progress=False)

    def open_cache() -> CachedFeatures:
        return cache.cached(images, key="digits", name=method)

    filling, cached = timed(open_cache)
    on_features = DataLoader(cached, batch_size=BATCH, shuffle=True, generator=order, collate_fn=cached.collate)
    first = filling + train(model, on_features, arguments)
    uncached, later, reading, alone, opening = [], [], [], [], []
    kept = next(iter(on_features))
    for _ in range(rounds):
        uncached.append(train(model, on_images, arguments))
        later.append(train(model, on_features, arguments))
        reading.append(timed(lambda: sum(len(batch["labels"]) for batch in on_features))[0])
        alone.append(train(model, (kept for _ in range(len(on_features))), arguments))
        opening.append(timed(open_cache)[0])
    return {
        "method": method,
        "dtype": dtype,
        "images": len(cached),
        "bytes_per_image": cached.bytes_per_image,
        "uncached": uncached,
        "filling": filling,
        "first": first,
        "later": later,
        "reading": reading,
        "alone": alone,
        "opening": opening,
    }


def compare_storage(numbers: int, count: int, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds to read a random batch: as we do, through a memory map of safetensors, and from Arrow."""
    from safetensors import safe_open

    from hf_visual_peft.features.storage import Layout, open_folder

    layout = Layout("0", {}, count, 1, "float32", {"features": [numbers]}, {})
    shards = open_folder(folder / "shards", layout, read_only=False)
    maps = []
    for shard in range(layout.shards):
        shards.write(shard, torch.randn(len(layout.rows_of(shard)), numbers), {})
        shards.check(shard)
        with safe_open(shards.path(shard), framework="pt") as file:
            maps.append(file.get_tensor("features"))

    def examples() -> Iterable[dict[str, Any]]:
        for part in maps:
            for row in part:
                yield {"features": row.numpy()}

    features = datasets.Features({"features": datasets.List(datasets.Value("float32"), length=numbers)})
    arrow = datasets.Dataset.from_generator(
        examples, features=features, cache_dir=str(folder / "arrow"), writer_batch_size=layout.rows_per_shard
    ).with_format("torch")

    def mapped(rows: list[int]) -> torch.Tensor:
        places = (divmod(row, layout.rows_per_shard) for row in rows)
        return torch.stack([maps[shard][index] for shard, index in places])

    readers: dict[str, Callable[[list[int]], Any]] = {
        "read": lambda rows: shards.read(rows)["features"],
        "map": mapped,
        "arrow": lambda rows: arrow[rows]["features"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    generator = np.random.default_rng(0)
    for _ in range(rounds):
        for name, reader in readers.items():
            rows = generator.permutation(count)[:BATCH].tolist()
            seconds[name].append(timed(lambda reader=reader, rows=rows: reader(rows))[0])
    return {"storage": numbers * 4, **seconds}


def report(lines: list[dict[str, Any]]) -> str:
    """`docs/cache.md`."""
    machine, *others = lines
    runs = [line for line in others if "method" in line]
    storage = [line for line in others if "storage" in line]
    rows, notes = [], []
    for run in runs:
        median = {name: statistics.median(run[name]) for name in ("uncached", "later", "reading", "alone", "opening")}
        count = run["images"]
        ratio = statistics.median(u / c for u, c in zip(run["uncached"], run["later"], strict=True))
        rows.append(
            (
                f"{run['method']}, {run['dtype']}",
                size(run["bytes_per_image"]),
                *(f"{1000 * s / count:.2f}" for s in (median["uncached"], run["first"], median["later"])),
                f"{ratio:.1f}",
                *(f"{1000 * median[name] / count:.2f}" for name in ("reading", "alone", "opening")),
            )
        )
        target = TARGETS[run["method"]]
        limit = median["uncached"] / median["alone"]
        told = "met" if ratio >= target else "missed"
        notes.append(
            f"{run['method']} in {run['dtype']}: {ratio:.1f} times as fast as on images (target {target}: {told}). "
            f"Were reading free, it would be {limit:.1f} times."
        )
    header = ("method", "an image", "images", "first", "later", "ratio", "reading", "alone", "opening")
    table = format_table(header, rows, right=header[1:])
    speeds = [
        (
            size(line["storage"]),
            *(f"{1000 * statistics.median(line[name]) / BATCH:.3f}" for name in ("read", "map", "arrow")),
        )
        for line in storage
    ]
    parts = [
        "# The cache of frozen features",
        "    python benchmarks/cache.py",
        fill(" ".join(TEXT.format(description=DESCRIPTION, size=SIZE, batch=BATCH, **machine).split()), 119),
        table,
        *(fill(note, 119) for note in notes),
        fill(" ".join(STORAGE.split()), 119),
        format_table(("an image", "read", "memory map", "Arrow"), speeds, right=("read", "memory map", "Arrow")),
    ]
    return "\n\n".join(parts) + "\n"


TEXT = """
wrote this page: {count} digits at {size} px, prepared by the recipe, {description}, batches of {batch}, {threads}
threads of a processor with {cores} cores ({processor}), load of the machine at the start {load:.1f}. All times are
milliseconds an image, medians of {rounds} rounds in which the kinds of epoch take turns. `images`: an epoch without
cache; `first`: filling and the epoch after it; `later`: every further epoch; `ratio`: images / later; `reading`: the
batches alone; `alone`: training with a batch that stays in memory, which is the limit; `opening`: checking every file
against its checksum, once a run.
"""
STORAGE = """
Reading random rows of 32 images from files that the system has in memory, milliseconds an image: the way taken, which
reads a row of a safetensors file into the batch; the same files through a memory map; `datasets` (Arrow).
"""


def main(argv: list[str] | None = None) -> None:
    """Measure everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="digits (default: 256)")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each kind (default: 3)")
    parser.add_argument("--folder", type=Path, help="for the features; default: a temporary one")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "cache.jsonl", help="the results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "cache.md", help="the page to write")
    arguments = parser.parse_args(argv)
    if arguments.images < BATCH or arguments.rounds < 1:
        parser.error(f"--images must be {BATCH} or more, --rounds 1 or more")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    lines: list[dict[str, Any]] = [
        {
            "processor": platform.processor() or platform.machine(),
            "cores": psutil.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "count": arguments.images,
            "rounds": arguments.rounds,
            "torch": torch.__version__,
        }
    ]
    images = pictures(arguments.images)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        for method, dtype in CASES:
            lines.append(measure(method, dtype, images, Path(scratch), arguments.rounds))
            print(json.dumps(lines[-1]), flush=True)
        for numbers, count in ((384, 4096), (13 * 197 * 384, 128)):
            lines.append(compare_storage(numbers, count, Path(scratch, str(numbers)), 3 * arguments.rounds))
            print(json.dumps(lines[-1]), flush=True)
    write_aside(arguments.results, "".join(json.dumps(line) + "\n" for line in lines))
    write_aside(arguments.page, report(lines))
    print(report(lines))


if __name__ == "__main__":
    main()
