"""What grows, and how: cost of training against tokens, depth, batch, number of adapters and number of images.

    python benchmarks/scale.py

Sizes that were measured are lines in the results file: a run that was killed goes on where it stopped, and the page is
written anew after every size. `--quick` leaves the large sizes out, `--parts` chooses what is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from lines import append_lines, read_lines
from scale_page import page
from scale_parts import (
    LORA,
    METHODS,
    SIZES,
    Point,
    Setup,
    alone,
    image_path,
    many_adapters,
    model_memory,
    peak_memory,
    scratch,
    step_cost,
)
from step_rounds import IMAGE_SIZE
from transformers.utils import logging as transformers_logging

from hf_visual_peft.sharing.files import write_aside


ROOT = Path(__file__).parents[1]
SMALL = SIZES["vit_s"]
FOUR = replace(SMALL, blocks=4)  # of its blocks, where all of them would take too long
TOKENS, QUICK_TOKENS = (196, 576, 1024, 2304, 4096), (196, 576)
DEPTHS, QUICK_DEPTHS = (12, 24, 40), (12,)
BATCHES, QUICK_BATCHES = (1, 4, 16), (1, 4)
COUNTS, MORE, QUICK_COUNTS = (1, 10, 100), (1, 10, 100, 1000), (1, 10, 50)
IMAGES, QUICK_IMAGES = (1000, 30_000, 100_000), (1000, 3000)
MODELS, QUICK_MODELS = tuple(SIZES), ("vit_s", "vit_b")
PEAK_BATCHES = (2, 8)
PARTS = ("tokens", "depth", "batch", "adapters", "images", "models", "peak")

# of one process for all sizes of a part: case, sizes, and what finds the values of those
Task = tuple[str, str, tuple[int, ...], Callable[[], list[dict]]]


def tasks(parts: Iterable[str], quick: bool, setup: Setup) -> Iterator[Task]:
    """What there is to do, in order; sizes that one task measures are measured together."""
    threads = setup.threads

    def cost(part: str, size: int) -> list[dict]:
        if part == "tokens":
            sizes = (FOUR, round(size**0.5) * FOUR.patch, 1)
        elif part == "depth":
            sizes = (replace(SMALL, blocks=size), IMAGE_SIZE, 2)
        else:
            sizes = (SMALL, IMAGE_SIZE, size)
        return [alone(step_cost, *sizes, setup, threads=threads)]

    sizes_of = {
        "tokens": QUICK_TOKENS if quick else TOKENS,
        "depth": QUICK_DEPTHS if quick else DEPTHS,
        "batch": QUICK_BATCHES if quick else BATCHES,
    }
    for part in parts:
        for size in sizes_of.get(part, ()):
            yield part, "", (size,), lambda part=part, size=size: cost(part, size)
        if part == "adapters":
            for name in METHODS:
                counts = QUICK_COUNTS if quick else MORE if name == "vpt" else COUNTS
                yield (
                    part,
                    name,
                    counts,
                    lambda name=name, counts=counts: alone(
                        many_adapters, name, counts, FOUR, IMAGE_SIZE, setup, threads=threads
                    ),
                )
        if part == "images":
            for case in ("streamed", "mapped"):
                for size in QUICK_IMAGES if quick else IMAGES:
                    yield part, case, (size,), lambda case=case, size=size: [images(case, size, threads)]
        if part == "models":
            for name in QUICK_MODELS if quick else MODELS:
                yield (
                    part,
                    name,
                    (1,),
                    lambda name=name: [alone(model_memory, SIZES[name], IMAGE_SIZE, threads=threads)],
                )
        if part == "peak":
            for name in ("adaptformer", LORA):
                for batch in PEAK_BATCHES:
                    yield (
                        part,
                        name,
                        (batch,),
                        lambda name=name, batch=batch: [
                            alone(peak_memory, name, SIZES["vit_b"], IMAGE_SIZE, batch, threads=threads)
                        ],
                    )


def images(case: str, count: int, threads: int) -> dict:
    with scratch() as folder:
        return alone(image_path, case, count, folder, threads=threads)


def read_points(path: Path, setup: Setup) -> list[Point]:
    """Points of this setup; a truncated last line is skipped."""
    return [point for line in read_lines(path) if (point := Point(**line)).setup == asdict(setup)]


def append_points(path: Path, points: Iterable[Point]) -> None:
    """Append points, and flush them to the disk."""
    append_lines(path, map(asdict, points))


def measure(wanted: Iterable[Task], results: Path, setup: Setup, save: Callable[[], None]) -> None:
    """Do what is not done yet.

    Args:
        wanted: tasks.
        results: file of points.
        setup: of the points.
        save: called whenever there are new points.
    """
    done = {(point.part, point.case, point.size) for point in read_points(results, setup)}
    for part, case, sizes, find in wanted:
        missing = [size for size in sizes if (part, case, size) not in done]
        if not missing:
            continue
        print(part, case, *sizes, flush=True)
        found = zip(sizes, find(), strict=True)
        points = [Point(part, case, size, values, asdict(setup)) for size, values in found if size in missing]
        append_points(results, points)
        save()


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}, separated by commas")
    parser.add_argument("--quick", action="store_true", help="leave the large sizes out")
    parser.add_argument("--threads", type=int, default=Setup.threads, help="of torch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=Setup.rounds, help="in which all take turns (%(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "scale.jsonl", help="one line a size")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "scale.md", help="the page to write")
    arguments = parser.parse_args(argv)
    parts = arguments.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts {', '.join(unknown)}: choose from {', '.join(PARTS)}.")
    for name in ("threads", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: must be 1 or more.")
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    setup = Setup(arguments.threads, arguments.rounds)

    def save() -> None:
        write_aside(arguments.page, page(read_points(arguments.results, setup), setup))

    measure(tasks(parts, arguments.quick, setup), arguments.results, setup, save)
    save()


if __name__ == "__main__":
    main()
