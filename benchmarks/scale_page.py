"""`docs/scale.md`, from what `scale.py` measured."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import Any

from scale_parts import BATCH, BUFFER, FULL, INPUT_SIDE, METHODS, SHARD, SIZES, SOURCE_SIDE, Point, Setup
from step_rounds import ACTIVATIONS, FORWARD, IMAGE_SIZE

from hf_visual_peft.tables import format_table


DEVICES = (8, 16, 24, 40, 80)  # GiB
USABLE = 0.9  # of a device's memory; the rest is for the libraries and what a step computes in passing
FIT = "adaptformer"  # the method of the table of batches
EXTRAPOLATED = 1_000_000
SECONDS = "seconds"


def page(points: list[Point], setup: Setup) -> str:
    """The whole page; parts that were not measured are left out."""
    of: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.size):
        of.setdefault(point.part, []).append(point)
    sections = [
        "# Scale",
        "    python benchmarks/scale.py",
        text(INTRODUCTION.format(threads=setup.threads, rounds=setup.rounds, torch=setup.torch)),
    ]
    steps = [*of.get("tokens", ()), *of.get("depth", ()), *of.get("batch", ())]
    sections += step_section(steps) if steps else []
    sections += adapter_section(of["adapters"]) if "adapters" in of else []
    sections += image_section(of["images"]) if "images" in of else []
    sections += machine_section(of["models"], of.get("peak", [])) if "models" in of else []
    return "\n\n".join(sections) + "\n"


def text(paragraph: str) -> str:
    return fill(" ".join(paragraph.split()), 119, break_long_words=False, break_on_hyphens=False)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    return format_table(header, rows, right=header[left:])


def step_section(points: list[Point]) -> list[str]:
    varied = {"tokens": "tokens", "depth": "blocks", "batch": "images"}
    times, memory = [], []
    for point in points:
        values = point.values
        what = (varied[point.part], f"{point.size:,}")
        times.append(
            (*what, f"{values[SECONDS]:.2f}", *(f"{values[name]['step']:.2f}" for name in (FORWARD, *METHODS)))
        )
        memory.append((*what, *(f"{values[name]['bytes'] / 1e6:,.0f}" for name in (ACTIVATIONS, *METHODS))))
    return [
        "## A training step",
        text(STEP),
        table(("varied", "value", "A, seconds", "forward", *METHODS), times),
        text(KEPT),
        table(("varied", "value", "A", *METHODS), memory),
        *growth(points),
    ]


def growth(points: list[Point]) -> list[str]:
    """What the largest size costs relative to the smallest."""
    lines = []
    for part, name in (("tokens", "tokens"), ("depth", "blocks"), ("batch", "images")):
        of = [point for point in points if point.part == part]
        if len(of) < 2:
            continue
        first, last = of[0], of[-1]
        bytes_ = [last.values[m]["bytes"] / first.values[m]["bytes"] for m in METHODS]
        lines.append(
            f"{last.size / first.size:.1f} times the {name} keep {min(bytes_):.1f} to {max(bytes_):.1f} times the "
            f"bytes and take {last.values[SECONDS] / first.values[SECONDS]:.1f} times the time of A."
        )
    return [text(" ".join(lines))] if lines else []


def adapter_section(points: list[Point]) -> list[str]:
    rows, modules, switching = [], [], []
    for name in METHODS:
        of = [point for point in points if point.case == name]
        for point in of:
            values = point.values
            beyond = beyond_parameters(of, point)
            rows.append(
                (
                    name,
                    f"{point.size:,}",
                    f"{values['parameters'] / 1e3:,.0f}",
                    "-" if beyond is None else f"{beyond / 1e3:,.0f}",
                    f"{values['modules']}",
                    f"{values['switch']:.1f}",
                    f"{values['forward'] / values['plain']:.2f}",
                    f"{values['add']:,.0f}" if point.size > 1 else "-",
                )
            )
        if of and (beyond := beyond_parameters(of, of[-1])) is not None:
            modules.append(f"{name} {beyond / of[-1].values['modules'] / 1e3:.1f}")
            times = of[-1].values["switch"] / of[0].values["switch"]
            switching.append(f"{name} {times:.1f} (at {of[-1].size:,})")
    header = ("method", "adapters", "parameters, kB", "beyond, kB", "modules", "switch, ms", "forward", "add, ms")
    found = [
        text(f"*beyond* for each module, kB, at the largest number: {', '.join(modules)}."),
        text(f"Time of a switch, times that with one adapter: {', '.join(switching)}."),
    ]
    return ["## Adapters on one backbone", text(ADAPTERS), table(header, rows), *(found if modules else [])]


def beyond_parameters(of: list[Point], point: Point) -> float | None:
    """Bytes that an adapter takes more than its parameters; None where too few were added to tell.

    Args:
        of: the points of one method, by size.
        point: one of them. The first adapters do not count: they bring in what all share.
    """
    base = next((p for p in of if 1 < p.size < point.size), None)
    if base is None:
        return None
    each = (point.values["memory"] - base.values["memory"]) / (point.size - base.size)
    return each - point.values["parameters"]


def image_section(points: list[Point]) -> list[str]:
    rows = []
    for case in ("streamed", "mapped"):
        of = [point for point in points if point.case == case]
        rows += [image_row(case, point.size, point.values, "") for point in of]
        if len(of) > 1 and of[-1].size < EXTRAPOLATED:
            rows.append(image_row(case, EXTRAPOLATED, extrapolated(of[-2], of[-1]), " (extrapolated)"))
    header = (
        "path",
        "images",
        "before the first, s",
        "then, ms an image",
        "memory, MB",
        "growth, MB",
        "Arrow, MB",
    )
    introduction = IMAGES.format(
        side=SOURCE_SIDE, input=INPUT_SIDE, batch=BATCH, buffer=f"{BUFFER:,}", shard=f"{SHARD:,}"
    )
    return ["## Images", text(introduction), table(header, rows, left=1), text(RECIPE)]


def extrapolated(first: Point, last: Point) -> dict[str, float]:
    """Values at `EXTRAPOLATED` images, along the line through two measured sizes."""

    def along(key: str) -> float:
        slope = (last.values[key] - first.values[key]) / (last.size - first.size)
        return last.values[key] + max(slope, 0.0) * (EXTRAPOLATED - last.size)

    return {key: along(key) for key in last.values}


def image_row(case: str, count: int, values: dict[str, Any], mark: str) -> tuple[str, ...]:
    return (
        case,
        f"{count:,}{mark}",
        f"{values['start']:,.1f}",
        f"{1e3 * values['rest'] / count:.2f}",
        f"{values['memory'] / 1e6:,.0f}",
        f"{values['growth'] / 1e6:,.1f}",
        f"{values['disk'] / 1e6:,.0f}",
    )


def machine_section(points: list[Point], peaks: list[Point]) -> list[str]:
    points = [point for name in SIZES for point in points if point.case == name]
    shown = (*METHODS, FULL)
    rows, constants, batches = [], [], []
    for point in points:
        size, values = SIZES[point.case], point.values
        numbers = ((IMAGE_SIZE // size.patch) ** 2 + 1) * size.blocks * size.width
        rows.append(
            (
                size.title,
                f"{values['parameters'] / 1e6:,.0f}",
                f"{4 * values['parameters'] / 1e6:,.0f}",
                *(f"{values[name]['bytes'] / 1e6:,.0f}" for name in shown),
            )
        )
        constants.append((size.title, *(f"{values[name]['bytes'] / 4 / numbers:.1f}" for name in shown)))
        for name in (FIT, FULL):
            fits = (largest_batch(values, name, gib) for gib in DEVICES)
            batches.append((size.title, name, *(f"{images:,}" if images else "-" for images in fits)))
    limits = ", ".join(f"{largest_backbone(points[-1], gib) / 1e9:.1f} G on {gib} GiB" for gib in DEVICES)
    return [
        "## What one machine holds",
        text(MEMORY),
        table(("backbone", "parameters, M", "weights, MB", *shown), rows),
        text(CONSTANT),
        table(("backbone", *shown), constants),
        *peak_lines(peaks),
        text(BATCHES.format(usable=f"{100 * USABLE:.0f}")),
        table(("backbone", "trains", *(f"{gib} GiB" for gib in DEVICES)), batches, left=2),
        "## From one device to several",
        text(
            DDP.format(bytes=4 * points[-1].values[FIT]["trained"] / 1e6, title=SIZES[points[-1].case].title, fit=FIT)
        ),
        text(FSDP.format(limits=limits, title=SIZES[points[-1].case].title)),
    ]


def peak_lines(peaks: list[Point]) -> list[str]:
    lines = []
    for name in dict.fromkeys(point.case for point in peaks):
        of = [point for point in peaks if point.case == name]
        if len(of) < 2:
            continue
        few, many = of[0], of[-1]
        images = many.size - few.size
        peak, kept = ((many.values[key] - few.values[key]) / images / 1e6 for key in ("peak", "kept"))
        known = sum(few.values[key] for key in ("weights", "training", "kept")) / 1e6
        lines.append(
            f"{name}: {peak:.0f} MB more for each further image between batches of {few.size} and {many.size}, where "
            f"the bytes kept are {kept:.0f} MB; at {few.size} images {few.values['peak'] / 1e6:,.0f} MB, where "
            f"weights, training and bytes kept are {known:,.0f} MB."
        )
    return [text(PEAK + " " + " ".join(lines))] if lines else []


def fixed_bytes(values: dict[str, Any], name: str) -> int:
    """Weights, and gradients and two moments of what trains."""
    trained = values[name]["trained"]
    frozen = values["parameters"] if name != FULL else 0
    return 4 * frozen + 16 * trained


def largest_batch(values: dict[str, Any], name: str, gib: int) -> int:
    """Images a step that a device holds; 0 if not even one."""
    room = USABLE * gib * 2**30 - fixed_bytes(values, name)
    return max(int(room // values[name]["bytes"]), 0)


def largest_backbone(point: Point, gib: int) -> float:
    """Parameters of the largest frozen backbone that a device holds with one image at work.

    What the image keeps, relative to the parameters, is taken from a measured backbone.
    """
    image = point.values[FIT]["bytes"] / point.values["parameters"]
    return USABLE * gib * 2**30 / (4 + image)


INTRODUCTION = """
wrote this page from `benchmarks/scale.jsonl`: a CPU with {threads} threads of torch {torch}, float32, random images.
All contestants of a line took turns, {rounds} rounds; ratios are medians over the rounds. VPT has 10 tokens a block,
LoRA is peft's with rank 8 on query and value, all else as by default.
"""
STEP = """
ViT-S/16: tokens are varied at 4 of its blocks and one image, blocks at 224 px and two images, images a step at 224 px
and 12 blocks. A is the floor *forward and backward of activations only*, in seconds; all else is relative to it.
"""
KEPT = """
What the forward pass keeps for the backward pass beside the model, counted by saved-tensor hooks, in MB:
"""
ADAPTERS = """
4 blocks of ViT-S/16 at 224 px, every adapter with a head of its own. *beyond* is what an adapter takes more than its
parameters, as the process grew from 10 adapters on: Python objects of its modules and what the allocator rounds up.
*switch* is `set_adapter`, *forward* a pass of one image relative to the plain backbone, *add* `add_adapter` with so
many there already. To switch, methods of this library look at the backbone and at the adapters concerned; peft's own
walk through all adapters. `add_adapter` of both walks through all modules and parameters several times, mostly in
peft's `BaseTuner.inject_adapter`: it grows with the number, and the time to add n adapters with its square.
"""
IMAGES = """
JPEG images of {side} px in parquet files of {shard} images each, to batches of {batch} at {input} px, in one process
without workers. *streamed* is `load_dataset(..., streaming=True)`, shuffled among {buffer}; *mapped* is what
`recipes/image_classification.py` does: `load_dataset` writes Arrow files once and maps them into memory, all images
are decoded once as a check, and samples come in random order over all. *memory* is the most that the process took
beyond what it had before, *growth* how much more of it in the second half of the images than in the first; pages of
mapped files do not count, as the kernel takes them back. `datasets` fills the buffer from ten files at a time
(`max_buffer_input_shards`), which Arrow reads ahead: what a stream holds follows the size of ten files, not their
number. Times of few images contain what happens once. Extrapolated lines follow the line through the two largest
sizes that were measured, and stay level where that one falls.
"""
RECIPE = """
The recipe maps files, and streams with `--streaming`: it then reads the labels of all samples once before the first
batch, as classes, their counts and the learning rate's schedule depend on them, and its evaluation counts every
sample once. Mapped, it pays the time before the first batch and disk space as above, once a data set.
"""
MEMORY = """
A step needs weights + 16 bytes for every number that trains (itself, gradient, two moments of AdamW) + images x bytes
that one image keeps. Measured at 224 px, one image, float32; the last columns are MB an image:
"""
CONSTANT = """
These bytes are tokens x blocks x width x a constant of the method x 4. The constant, numbers kept for each token,
block and channel, by backbone; where it is the same for all, the formula holds, also for other sizes:
"""
PEAK = """
Against the most memory that a process took for a training step of ViT-B/16, less what it had before (the libraries'
own pages and what a step computes in passing are the rest):
"""
BATCHES = """
Derived from these bytes, not measured: an upper bound of the batch at 224 px in float32, with {usable} % of a device's
memory used; what a step computes in passing comes on top, see above. bf16 (`mixed_precision` of all configurations
for GPUs) about halves what an image keeps and leaves the weights as they are; gradient checkpointing keeps the inputs
of blocks alone.
"""
DDP = """
As long as a backbone fits with one image, one device is enough, and `ddp.yaml` makes it faster: each process holds
all of it, and only the gradients of what trains are exchanged, {bytes:.0f} MB a step for {fit} on {title}.
"""
FSDP = """
Beyond that, `fsdp2.yaml` lays the frozen weights in shards over the devices. Derived: with one image at work, which
keeps as many bytes a parameter as on {title}, a frozen backbone in float32 fits up to {limits}. Under full
fine-tuning about a fourth of that is the limit; the recipe does not do that in shards. Several GPUs were not measured.
"""
