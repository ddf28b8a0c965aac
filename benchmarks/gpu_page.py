"""What `docs/performance.md` says of GPUs, made from the rows of `gpu.py` alone.

    python benchmarks/gpu_page.py

writes the page anew after a run on a card.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from gpu_rows import OK, Row, read_rows
from step_rounds import ACTIVATIONS, FORWARD, FULL, TITLES

from hf_visual_peft.tables import format_table


RESULTS = Path(__file__).with_name("gpu.jsonl")
# on ViT-B/16 in bfloat16, batch 64, eager: a step of at most so many times A
STEP_TARGETS = {
    **dict.fromkeys(("adaptformer", "adapterplus", "pfeiffer"), 1.10),
    "vpt": 1.12,
    **dict.fromkeys(("sharedlora", "fact", "efft", "kadaptation", "bilora"), 1.12),  # what is like LoRA
    "ssf": 1.20,
}
# side networks that no gradient crosses the backbone for: times F, and of what full fine-tuning allocates
SIDE_NETWORKS = ("lst", "restuning", "sidetuning", "last", "e3va")
FORWARD_TARGET, PEAK_TARGET = 1.25, 0.25
MODES = {"eager": "eager", "graph": "CUDA graph", "compile": "compiled", "compile-adapter": "adapters compiled"}
MISSED = "**no**"
PACE = 0.95  # share of a step's time from which launching, not computing, sets its pace

# torch's own notice that its watch is a prototype, at the first case of a process; older rows count it as a wait
NOTICE = "torch/cuda/__init__.py:"
# what became of what went wrong, by part and case
NOTES = {
    **dict.fromkeys(
        (("right", f"{model}/stadapter") for model in ("vit", "dinov2", "swin")),
        "compared with frames that meet behind the last norm, and ST-Adapter's meet before it; not run again since",
    ),
    ("right", "swin/attnscale"): "mended, not run again since",
}

NOT_YET = "Not yet measured on a GPU."
PROTOCOL = """
{device}, torch {torch}, CUDA {cuda}, transformers {transformers}, peft {peft}; transformers' ViT with random weights
in float32 under bfloat16 autocast, 224 px, a head of 10 classes, AdamW (fused). Each method takes turns with A and F;
a turn is three steps on end, timed by events of the card, and what is shown are medians over five rounds of the ratio
within a round. `ms` is the step, forward and backward pass, without the optimizer; `host` is how long the host needs
to launch it and the optimizer's: where it is no shorter than the two, launching sets the pace. `peak` is the most that
a step allocates beside the model and the optimizer's state, `held` is these two, both in MiB. `CPU` is step / A of the
tables above.
"""


def section(rows: Iterable[Row], cpu: Mapping[tuple[str, str], float]) -> list[str]:
    """The part of the page about GPUs, in paragraphs.

    Args:
        rows: of all cards.
        cpu: step / A on the CPU by model and method.
    """
    rows = [row for row in rows if row.card != "cpu"]
    parts = ["## On a GPU", "    bash benchmarks/gpu.sh"]
    if not rows:
        return [*parts, NOT_YET]
    for card in dict.fromkeys(row.card for row in rows):
        parts += _of_card([row for row in rows if row.card == card], card, cpu)
    return parts


def _of_card(rows: list[Row], card: str, cpu: Mapping[tuple[str, str], float]) -> list[str]:
    setup = next((row.values for row in rows if row.part == "setup"), {})
    known = {name: setup.get(name, "?") for name in ("torch", "cuda", "transformers", "peft")}
    parts = [f"### {card}", fill(" ".join(PROTOCOL.format(device=card, **known).split()), 119)]
    steps: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        names = row.case.split("/")
        if len(names) == 3 and row.status == OK:
            steps[(names[0], names[1], names[2])] = row.values
    for model in TITLES:
        mine = {name: values for (of, mode, name), values in steps.items() if (of, mode) == (model, "eager")}
        if mine:
            batch = next(iter(mine.values()))["batch"]
            parts += [f"#### {TITLES[model]}, batch {batch}", _table(mine, {n: cpu.get((model, n)) for n in mine})]
            parts += _paced_by_host(mine)
    base = {name: values for (of, mode, name), values in steps.items() if (of, mode) == ("vit_b", "eager")}
    graphs = {name: values for (of, mode, name), values in steps.items() if (of, mode) == ("vit_b", "graph")}
    if targets := _targets(base, graphs):
        parts += ["#### Targets, ViT-B/16", targets]
    parts += _modes(steps) + _limits(rows) + _cache(rows) + _right(rows) + _sync(rows) + _broken(rows)
    return parts


COLUMNS = ("method", "CPU", "step / A", "step / F", "optimizer / A", "ms", "host", "peak", "/ full's", "held")


def _table(results: Mapping[str, dict[str, Any]], cpu: Mapping[str, float | None]) -> str:
    full = results.get(FULL, {}).get("peak")
    floors = dict(results)
    any_result = next(iter(results.values()))
    rows = []
    if FORWARD not in floors:
        forward = any_result["forward_ms"]
        ratio = forward["step"] / any_result["activations_ms"]["step"]
        rows.append(
            ("*F*", _number(cpu.get(FORWARD)), f"{ratio:.2f}", "1.00", "0.00", *_milliseconds(forward), "", "", "")
        )
    for name, result in sorted(floors.items(), key=lambda item: item[1]["step"]):
        peak = result["peak"]
        rows.append(
            (
                {ACTIVATIONS: "*A*", FORWARD: "*F*"}.get(name, name),
                _number(cpu.get(name)),
                *(f"{result[field]:.2f}" for field in ("step", "step_to_forward", "optimizer")),
                *_milliseconds(result["ms"]),
                _number(None if peak is None else peak / 2**20, ",.0f"),
                _number(peak / full if peak is not None and full else None),
                f"{result['held'] / 2**20:,.0f}",
            )
        )
    return format_table(COLUMNS, rows, right=COLUMNS[1:])


def _milliseconds(of: Mapping[str, float]) -> tuple[str, str]:
    return f"{of['step']:.1f}", f"{of['host']:.1f}"


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _is_paced_by_host(result: Mapping[str, Any]) -> bool:
    return result["ms"]["host"] >= PACE * (result["ms"]["step"] + result["ms"]["optimizer"])


def _paced_by_host(results: Mapping[str, dict[str, Any]]) -> list[str]:
    slow = [name for name, result in sorted(results.items()) if _is_paced_by_host(result)]
    if not slow:
        return ["The card sets the pace of every step here, not the host."]
    return [fill(f"The host sets the pace, launching kernels, of: {', '.join(slow)}.", 119)]


def _targets(results: Mapping[str, dict[str, Any]], graphs: Mapping[str, dict[str, Any]]) -> str:
    rows: list[tuple[str, str, str, str, str]] = []

    def add(what: str, limit: float, value: float, recorded: float | None = None) -> None:
        met = "yes" if value <= limit else MISSED
        rows.append((what, f"at most {limit:.2f}", f"{value:.3f}", met, _number(recorded, ".3f")))

    for name, limit in STEP_TARGETS.items():
        if name in results:
            add(f"{name}: step / A", limit, results[name]["step"], graphs.get(name, {}).get("step"))
    full = results.get(FULL, {}).get("peak")
    for name in SIDE_NETWORKS:
        if name in results:
            recorded = graphs.get(name, {}).get("step_to_forward")
            add(f"{name}: step / F", FORWARD_TARGET, results[name]["step_to_forward"], recorded)
            if full:
                add(f"{name}: peak / full's", PEAK_TARGET, results[name]["peak"] / full)
    columns = ("what", "target", "measured", "met", "as CUDA graphs")
    return format_table(columns, rows, right=(columns[2], columns[4])) if rows else ""


def _modes(steps: Mapping[tuple[str, str, str], dict[str, Any]]) -> list[str]:
    others = {name for model, mode, name in steps if model == "vit_b" and mode in MODES and mode != "eager"}
    if not others:
        return []
    rows = []
    for name in sorted(others, key=lambda name: (name not in (FULL, ACTIVATIONS), name)):
        found = [steps.get(("vit_b", mode, name)) for mode in MODES]
        rows.append(
            (
                "*A*" if name == ACTIVATIONS else name,
                *(_number(None if value is None else value["ms"]["step"], ".1f") for value in found),
                *(_number(None if value is None else value["step"]) for value in found),
            )
        )
    titles = tuple(MODES.values())
    columns = ("method", *(f"{title} (ms)" for title in titles), *(f"{title} / its A" for title in titles))
    text = (
        "A step recorded once as a CUDA graph and replayed, the whole model compiled, and only what adapters compute "
        "compiled, in milliseconds and relative to A in the same mode (A is eager beside compiled adapters)."
    )
    return ["#### Graphs and compilers, ViT-B/16", fill(text, 119), format_table(columns, rows, right=columns[1:])]


def _limits(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if row.part == "limit" and row.status == OK]
    if not found:
        return []
    table = [
        (
            row.case.split("/")[-1],
            str(row.values["fits"]),
            str(row.values["fails"] or "-"),
            _number(row.values["peak"] and row.values["peak"] / 2**30, ".1f"),
        )
        for row in found
    ]
    columns = ("method", "fits", "does not fit", "GiB allocated at most")
    text = "Batches that a step was run with, and the smallest found that it ran out of memory with."
    return ["#### Largest batch, ViT-L/16", text, format_table(columns, table, right=columns[1:])]


CACHE_COLUMNS = {
    "filling": "filling",
    "plain": "loader",
    "pinned": "pinned",
    "workers": "workers",
    "workers_pinned": "workers, pinned",
    "limit": "limit",
    "images_on_card": "from images",
}


def _cache(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if row.part == "cache" and row.status == OK]
    if not found:
        return []
    table = [(row.case, *(f"{row.values[name]:,.0f}" for name in CACHE_COLUMNS)) for row in found]
    text = (
        "Images a second that train on ViT-B/16 from cached features in float16, by how a loader brings them to the "
        "card; `limit`: with a batch of features that stays on the card; `from images`: with a batch of images that "
        "stays there, through the whole backbone."
    )
    columns = ("method", *CACHE_COLUMNS.values())
    return ["#### The cache of features", fill(text, 119), format_table(columns, table, right=columns[1:])]


def _right(rows: Sequence[Row]) -> list[str]:
    mine = [row for row in rows if row.part == "right"]
    if not mine:
        return []
    table = []
    for model in dict.fromkeys(row.case.split("/")[0] for row in mine):
        those = [row for row in mine if row.case.startswith(f"{model}/")]
        numbers = [(row.values["numbers"], row.case.split("/")[1]) for row in those if row.values.get("numbers")]
        worst = [
            max((v[what], name) for v, name in numbers) if numbers else (0.0, "-") for what in ("output", "gradient")
        ]
        good = sum(row.status == OK for row in those)
        table.append((model, f"{good} of {len(those)}", *(f"{value:.1e} ({name})" for value, name in worst)))
    text = (
        "Every method on models of few blocks: logits and gradients in float32 against float64 on the CPU (TF32 off), "
        "bfloat16 and float16 with a scaler train without NaN, an adapter saved on either device loads on the other, "
        "switched off it leaves the base model bit for bit, merging, mixed batches, features cached on the card and "
        "read on the CPU. Shown are the furthest logits and gradients."
    )
    columns = ("model", "all right", "logits", "gradients")
    refused = [f"{row.case} {name}" for row in mine for name in row.values.get("refused", {})]
    told = [fill(f"Refused, with a reason: {', '.join(refused)}.", 119)] if refused else []
    return ["#### Right results", fill(text, 119), format_table(columns, table), *told]


def _sync(rows: Sequence[Row]) -> list[str]:
    mine = [row for row in rows if row.part == "sync"]
    if not mine:
        return []
    waiting = [row.case for row in mine if row.status != OK and not _is_notice(row)]
    told = f"In {len(mine) - len(waiting)} of {len(mine)} cases (method on model, float32 and bfloat16) a training "
    told += "step never makes the host wait for the card."
    if waiting:
        told += f" It does in: {', '.join(waiting)}."
    if notices := sum(map(_is_notice, mine)):
        told += f" Left out is torch's notice, once in each of {notices} processes, that its watch is a prototype."
    return ["#### Waiting", fill(told, 119)]


def _is_notice(row: Row) -> bool:
    places = [place for of_dtype in row.values.get("waits", {}).values() for place in of_dtype]
    return bool(places) and all(place.startswith(NOTICE) for place in places)


def _broken(rows: Sequence[Row]) -> list[str]:
    bad = [row for row in rows if row.status != OK and row.part != "sync"]
    if not bad:
        return []
    lines = []
    for row in bad:
        what = row.values.get("error") or "; ".join(f"{k}: {v}" for k, v in row.values.get("failed", {}).items())
        note = NOTES.get((row.part, row.case))
        lines.append(f"- {row.part}, {row.case}: {what[:200]}" + (f" ({note})" if note else ""))
    return ["#### What went wrong", "\n".join(lines)]


def main() -> None:
    """Write the page from the results of the CPU and those of cards."""
    import step
    from step_page import write_page

    lines = list(step.read_results(step.ROOT / "benchmarks" / "step.jsonl").values())
    setup = step.Setup(**lines[-1].setup)
    rows = list(read_rows(RESULTS).values())
    write_page(step.ROOT / "docs" / "performance.md", lines, setup, step.all_methods(), rows)


if __name__ == "__main__":
    main()
