"""What the runs of a protocol say together: means, PPT, deviations and paired tests."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_visual_peft.tables import format_table


PPT_SCALE = 1e7  # of trained parameters


def read_runs(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The runs of folders.

    Raises:
        ValueError: there is none, one is broken, or runs of a task were measured on different images.
    """
    runs = []
    for file in [file for folder in folders for file in sorted(folder.glob("*.json"))]:
        try:
            row = json.loads(file.read_text(encoding="utf-8"))
            keys = ("method", "task", "seed", "shots", "group", "protocol", "fingerprint", "classes")
            runs.append({key: row[key] for key in keys} | {"file": str(file)})
            runs[-1] |= {"accuracy": float(row["accuracy"]), "trained": float(row["trained"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is broken: {error}.") from error
    if not runs:
        raise ValueError(f"There are no runs in {', '.join(map(str, folders))}.")
    first: dict[str, dict[str, Any]] = {}
    for row in runs:
        other = first.setdefault(row["task"], row)
        if other["protocol"] != row["protocol"]:
            raise ValueError(f"{other['file']} and {row['file']} are of different protocols: sum up each by itself.")
        if other["fingerprint"] != row["fingerprint"]:
            raise ValueError(
                f"{other['file']} and {row['file']} were measured on different images of {row['task']}: they are not "
                "averaged."
            )
    return runs


def ppt(accuracy: float, trained: float) -> float:
    """Performance-parameter trade-off of V-PETL Bench: accuracy, less for more trained parameters.

    Args:
        accuracy: from 0 to 1.
        trained: parameters, without the head.
    """
    return accuracy * math.exp(-math.log10(trained / PPT_SCALE + 1))


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of each method, and of each pair of methods on the tasks that both have."""
    methods = list(dict.fromkeys(row["method"] for row in runs))
    by_task = {m: _by_task([row for row in runs if row["method"] == m]) for m in methods}
    rows = {}
    for method in methods:
        own = [row for row in runs if row["method"] == method]
        groups: dict[str, list[float]] = {}
        for row in own:
            groups.setdefault(str(row["group"]), [])
        for key, value in by_task[method].items():
            groups[next(str(row["group"]) for row in own if _key(row) == key)].append(value)
        means = {name: float(np.mean(values)) for name, values in groups.items()}
        seeds = {}
        for seed in sorted({row["seed"] for row in own}):
            seeds[seed] = float(np.mean(list(_by_task([row for row in own if row["seed"] == seed]).values())))
        mean = float(np.mean(list(by_task[method].values())))
        trained = float(np.mean([row["trained"] for row in own]))
        rows[method] = {
            "tasks": by_task[method],
            "mean_of_tasks": mean,
            "groups": means,
            "mean_of_groups": float(np.mean(list(means.values()))),
            "by_seed": seeds,
            "deviation": float(np.std(list(seeds.values()), ddof=1)) if len(seeds) > 1 else None,
            "trained": trained,
            "ppt": ppt(mean, trained),
        }
    pairs = []
    for one, other in itertools.combinations(methods, 2):
        common = [key for key in by_task[one] if key in by_task[other]]
        first, second = ([by_task[m][key] for key in common] for m in (one, other))
        pairs.append({"methods": [one, other], "tasks": len(common), **_tested(first, second)})
    return {"protocol": runs[0]["protocol"], "methods": rows, "pairs": pairs}


def table_of(found: dict[str, Any]) -> str:
    """The summary as text."""
    groups = list(dict.fromkeys(name for row in found["methods"].values() for name in row["groups"]))
    header = ("method", *groups, "mean of groups", "mean of tasks", "deviation", "trained", "PPT")
    cells = [
        (
            method,
            *(f"{row['groups'][name]:.4f}" if name in row["groups"] else "" for name in groups),
            f"{row['mean_of_groups']:.4f}",
            f"{row['mean_of_tasks']:.4f}",
            "" if row["deviation"] is None else f"{row['deviation']:.4f}",
            f"{row['trained']:,.0f}",
            f"{row['ppt']:.4f}",
        )
        for method, row in found["methods"].items()
    ]
    lines = [format_table(header, cells, right=header[1:])]
    for pair in found["pairs"]:
        if pair["t_test"] is not None:
            told = f"paired t test p={pair['t_test']:.3f}, Wilcoxon p={pair['wilcoxon']:.3f}"
            lines.append(f"{' and '.join(pair['methods'])}: difference {pair['difference']:+.4f} ({told}, "
                         f"{pair['tasks']} tasks)")  # fmt: skip
    return "\n".join(lines)


def _key(row: dict[str, Any]) -> str:
    return row["task"] + (f", {row['shots']} shots" if row["shots"] else "")


def _by_task(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean over seeds of each task, and of each number of shots."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(_key(row), []).append(row["accuracy"])
    return {key: float(np.mean(values)) for key, values in found.items()}


def _tested(first: Sequence[float], second: Sequence[float]) -> dict[str, float | None]:
    """The mean difference, and the probabilities of a paired t test and of Wilcoxon's; None for too few tasks."""
    from scipy import stats  # type: ignore[import-untyped]

    gaps = np.subtract(first, second)
    difference = float(gaps.mean()) if len(gaps) else None
    if len(gaps) < 3 or not gaps.any() or np.allclose(gaps, gaps[0]):
        return {"difference": difference, "t_test": None, "wilcoxon": None}
    return {
        "difference": difference,
        "t_test": float(stats.ttest_rel(first, second).pvalue),
        "wilcoxon": float(stats.wilcoxon(first, second).pvalue),
    }
