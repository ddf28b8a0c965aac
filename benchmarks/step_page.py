"""The page and the plots of `step.py`, made from its results alone."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import Any

import accuracy
import gpu_page
import gpu_rows
import matplotlib as mpl
from matplotlib.figure import Figure
from step_rounds import ACTIVATIONS, FORWARD, FULL, TITLES, Setup

from hf_visual_peft.sharing.files import write_aside
from hf_visual_peft.tables import format_table


# what is aimed at: a training step of at most so many times the floor of activations
STEP_TARGETS = {
    **dict.fromkeys(("adaptformer", "pfeiffer", "adapterplus", "repadapter"), 1.06),
    "vpt": 1.09,
    **dict.fromkeys(("ssf", "fact", "hydra"), 1.12),
    "convpass": 1.15,
    "dtl": 0.80,
}
FORWARD_TARGETS = {"lst": 1.25, "restuning": 1.25}  # the same, times the floor of a forward pass
KEPT_TARGETS = {  # bytes of activations, times those of another method
    "ssf": ("bitfit", 1.05),
    **dict.fromkeys(("sidetuning", "lst", "last", "e3va", "restuning"), (FULL, 0.25)),
}
MERGED, BUILD_SECONDS, SWITCH_MS, IMPORT_SECONDS = 0.02, 1.0, 10.0, 0.3

MISSED = "**no**"

# where time and memory go in methods that miss a target
NOTES: dict[str, str] = {
    "ssf": """
behind a layer norm, scale and shift are part of the norm's own weight and bias; behind queries, keys, values and the
first linear of the MLP, the input is recovered from the output, which attention and GELU keep anyway. What attention
and the MLP add to the stream is kept by nothing else, and the gradient of its scale needs it: per block 12 tensors of
the stream's size where BitFit has 10. To do without these two, one has to compute the linears again (a twelfth and a
third of those of the block), or to take the difference of the stream before and after, which loses digits. The pair
folded into a linear's weight has the gradient of that weight, which costs what it costs in full fine-tuning. Where a
scale is near zero or a shift large, and in half precision, the inputs are kept.
""",
    "repadapter": """
two thin products before each sub-layer, and a pass over the stream more in the backward pass, where the gradients of
the shortcut and of the first product add up: 24 such passes. A function with a backward pass of its own could add
within the product; it would save less than 2 % of the step.
""",
    "fact": """
U and V are 6 % of the multiplications of the blocks' linears with rank 16 and width 384, and the gradients of both and
of their inputs another 12 %, in products so thin that they take longer than their share; with twice the width it is
half of that. Factor and sum are part of the product with V already. What is left is U, which queries, keys and values
compute each for themselves, and its input's gradient, which is added to that of the linear.
""",
}

PROTOCOL = """
wrote this page. Step: forward pass, cross-entropy and backward pass of transformers' ViT with random weights, {batch}
images of 224 px, a head of 10 classes, float32, torch {torch}, {where}; methods with the setting of their first count
in [methods.md](methods.md), {vpt}. All times are relative to a contestant that had its turns in the same rounds, as
medians over {rounds} rounds; A is a forward and backward pass with gradients of activations only, F a forward pass
without gradients. `optimizer` is a step of AdamW on top, relative to A. `kept` is what {kept}, in MiB. `inference` is
a forward pass with the adapter at work, `merged` with the adapter folded in, both relative to F. `adapter bytes`
contain the head; `load` reads a second adapter into the model, `switch` goes from one adapter to another. Methods for
videos take the same images as one video.
"""


def write_page(
    path: Path, lines: Iterable[Any], setup: Setup, names: Sequence[str], card_rows: Sequence[gpu_rows.Row] = ()
) -> None:
    """Write the page, and its plots beside it in a folder of the page's name.

    Args:
        path: of the page.
        lines: results; only those of this setup count.
        setup: how they were measured.
        names: of all methods that can be measured.
        card_rows: results of `gpu.py`.
    """
    mine = [line for line in lines if line.setup == asdict(setup)]
    steps = [line for line in mine if line.kind == "step"]
    accuracies = read_accuracies(Path(accuracy.__file__).with_suffix(".jsonl"))
    plots = []
    for name, label, value in PLOTS:
        for model in TITLES:
            points = {s.method: (value(s), accuracies[s.method]) for s in steps if _is_plotted(s, model, accuracies)}
            if points:
                folder = path.with_suffix("")
                folder.mkdir(parents=True, exist_ok=True)
                plot(folder / f"{name}_{model}.svg", points, f"{label}, {TITLES[model]}")
                plots.append(f"![{label} against accuracy, {TITLES[model]}]({folder.name}/{name}_{model}.svg)")
    cpu = {(line.model, line.method): line.step for line in steps} if setup.device == "cpu" else {}
    write_aside(path, report(mine, setup, names, plots, gpu_page.section(card_rows, cpu)))


PLOTS = (
    ("time", "Training step (x A)", lambda s: s.step),
    ("memory", "Activations kept (MiB)", lambda s: s.kept / 2**20),
)


def _is_plotted(result: Any, model: str, accuracies: dict[str, float]) -> bool:
    return result.model == model and result.method in accuracies


def read_accuracies(path: Path) -> dict[str, float]:
    """Mean accuracy of each method in percent, from the results of `accuracy.py`."""
    runs = accuracy.read_results(path, accuracy.Protocol())
    seeds = sorted({run.seed for run in runs})
    chosen = {name: accuracy.chosen_runs(name, seeds, runs) for name in dict.fromkeys(run.method for run in runs)}
    return {name: 100 * statistics.mean(run.test for run in found) for name, found in chosen.items() if found}


def plot(path: Path, points: dict[str, tuple[float, float]], label: str) -> None:
    """Write a scatter plot of named points as SVG; the same points give the same file.

    Args:
        path: of the file.
        points: (x, accuracy in percent) by method.
        label: of the x axis.
    """
    with mpl.rc_context({"svg.hashsalt": "hf_visual_peft", "svg.fonttype": "none", "font.size": 7}):
        figure = Figure(figsize=(7.5, 5), layout="constrained")
        axes = figure.add_subplot()
        for name, point in points.items():
            axes.scatter(*point, s=9, color="tab:orange" if name in (FULL, *_peft(points)) else "tab:blue")
            axes.annotate(name, point, xytext=(3, 2), textcoords="offset points")
        axes.set_xlabel(label)
        axes.set_ylabel("Accuracy on digits (%)")
        axes.grid(alpha=0.3)
        aside = path.with_name(f"{path.name}.new")
        figure.savefig(aside, format="svg", metadata={"Date": None})
    os.replace(aside, path)


def _peft(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith("peft-")]


def report(
    lines: Sequence[Any], setup: Setup, names: Sequence[str], plots: Sequence[str], on_cards: Sequence[str] = ()
) -> str:
    """`docs/performance.md`.

    Args:
        lines: results of this setup.
        setup: how they were measured.
        names: of all methods that can be measured.
        plots: Markdown of the plots.
        on_cards: paragraphs on what was measured on GPUs.
    """
    steps = {(line.model, line.method): line for line in lines if line.kind == "step"}
    built = {line.method: line.seconds for line in lines if line.kind == "get_peft_model"}
    imported = [line for line in lines if line.kind == "import"]
    on_gpu = setup.device == "cuda"
    protocol = PROTOCOL.format(
        **asdict(setup),
        where="one GPU" if on_gpu else f"{setup.threads} threads on {setup.cores} cores",
        kept="a step allocates at most beside the model"
        if on_gpu
        else "the forward pass leaves for the backward pass",
        vpt="VPT with 10 tokens",
    )
    parts = ["# Time and memory", "    python benchmarks/step.py", fill(" ".join(protocol.split()), 119)]
    for model in TITLES:
        mine = [line for (of, _), line in steps.items() if of == model]
        if mine:
            parts += [f"## {TITLES[model]}", *_tables(mine)]
        missing = [name for name in names if name != ACTIVATIONS and (model, name) not in steps]
        if mine and missing:
            parts.append(fill(f"Not measured: {', '.join(missing)}.", 119))
    if plots:
        parts += ["## Against accuracy", fill(ACCURACY, 119), *plots]
    parts += ["## Putting adapters in"]
    if built:
        slowest = max(built, key=lambda name: built[name])
        parts.append(
            fill(
                f"`get_peft_model` on ViT-L/16 takes {statistics.median(built.values()):.2f} s (median of "
                f"{len(built)} methods), at most {built[slowest]:.2f} s ({slowest}).",
                119,
            )
        )
    if imported:
        parts.append(
            fill(
                f"`import hf_visual_peft` takes {imported[-1].hf_visual_peft:.2f} s after `import peft`, which takes "
                f"{imported[-1].peft:.2f} s (the least of several processes).",
                119,
            )
        )
    targets = _targets(steps, built, imported)
    missed = {line.split(",")[0].strip("| ") for line in targets.splitlines() if MISSED in line}
    parts += ["## Targets", targets]
    parts += [fill(" ".join(f"{name}: {note}".split()), 119) for name, note in NOTES.items() if name in missed]
    return "\n\n".join([*parts, *on_cards]) + "\n"


ACCURACY = (
    "Accuracies are those of [accuracy.md](accuracy.md), on another backbone and with each method's defaults; orange: "
    "full fine-tuning and peft's own methods."
)
STEP_COLUMNS = ("method", "parameters", "step / A", "step / F", "optimizer", "kept", "inference", "merged")
ADAPTER_COLUMNS = ("method", "adapter bytes", "load (ms)", "switch (ms)")


def _tables(results: list[Any]) -> list[str]:
    results = sorted(results, key=lambda r: r.step)
    rows = [
        (
            {ACTIVATIONS: "*A*", FORWARD: "*F*"}.get(r.method, r.method),
            f"{r.parameters:,}" if r.method not in (ACTIVATIONS, FORWARD) else "-",
            f"{r.step:.2f}",
            f"{r.step_to_forward:.2f}",
            f"{r.optimizer:.2f}",
            f"{r.kept / 2**20:.1f}",
            _number(r.inference, ".2f"),
            _number(r.merged, ".3f"),
        )
        for r in results
    ]
    adapters = [
        (r.method, f"{r.adapter_bytes:,}", f"{r.load_ms:.0f}", f"{r.switch_ms:.1f}")
        for r in results
        if r.adapter_bytes is not None
    ]
    floor = [r.seconds for r in results if r.method == ACTIVATIONS]
    tables = [format_table(STEP_COLUMNS, rows, right=STEP_COLUMNS[1:])]
    tables += [fill(f"A took {1e3 * value:.0f} ms, which is for orientation only.", 119) for value in floor]
    if adapters:
        tables.append(format_table(ADAPTER_COLUMNS, adapters, right=ADAPTER_COLUMNS[1:]))
    return tables


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _targets(steps: dict[tuple[str, str], Any], built: dict[str, float], imported: Sequence[Any]) -> str:
    """A table of what is aimed at and what was measured."""
    rows: list[tuple[str, str, str, str]] = []

    def add(what: str, target: str, measured: float, form: str, met: bool) -> None:
        rows.append((what, target, format(measured, form), "yes" if met else MISSED))

    for (model, method), r in steps.items():
        name = f"{method}, {TITLES[model]}"
        if method in STEP_TARGETS:
            limit = STEP_TARGETS[method]
            add(f"{name}: step / A", f"at most {limit:.2f}", r.step, ".3f", r.step <= limit)
        if method in FORWARD_TARGETS:
            limit = FORWARD_TARGETS[method]
            add(f"{name}: step / F", f"at most {limit:.2f}", r.step_to_forward, ".3f", r.step_to_forward <= limit)
        other, share = KEPT_TARGETS.get(method, ("", 0.0))
        if (model, other) in steps:
            kept = r.kept / steps[model, other].kept
            add(f"{name}: kept / {other}'s", f"at most {share:.2f}", kept, ".3f", kept <= share)
    for model in dict.fromkeys(model for model, _ in steps):
        mine = [r for (of, _), r in steps.items() if of == model]
        merged = {r.method: r.merged for r in mine if r.merged is not None}
        if merged:
            worst = max(merged, key=lambda name: abs(merged[name] - 1))
            met = abs(merged[worst] - 1) <= MERGED
            add(f"merged / F, {TITLES[model]}: furthest, {worst}", f"1 +- {MERGED}", merged[worst], ".3f", met)
        switches = {r.method: r.switch_ms for r in mine if r.switch_ms is not None}
        if switches:
            worst = max(switches, key=lambda name: switches[name])
            value = switches[worst]
            add(f"switch, {TITLES[model]}: {worst}", f"under {SWITCH_MS:.0f} ms", value, ".1f", value < SWITCH_MS)
    if built:
        worst = max(built, key=lambda name: built[name])
        value = built[worst]
        add(f"get_peft_model, ViT-L/16: {worst}", f"under {BUILD_SECONDS:.0f} s", value, ".2f", value < BUILD_SECONDS)
    if imported:
        value = imported[-1].hf_visual_peft
        add("import, beside peft's", f"at most {IMPORT_SECONDS} s", value, ".2f", value <= IMPORT_SECONDS)
    columns = ("what", "target", "measured", "met")
    return format_table(columns, rows, right=("measured",))
