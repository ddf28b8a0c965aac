"""The table of a comparison and what it advises, for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..tables import format_columns
from .statistics import sign_test, wilson


def last_runs(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs of a method's last round that predicted the test part."""
    runs = [run for run in row.get("runs", []) if "predicted" in run]
    return [run for run in runs if run["round"] == max(other["round"] for other in runs)]


def predictions(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The predictions of a method for the test part, one for each seed."""
    return [row["neighbours"]] if "neighbours" in row else last_runs(row)


def right(row: Mapping[str, Any], labels: list[int]) -> np.ndarray:
    """The share of seeds that are right on each image, (N,)."""
    return np.mean([np.array(found["predicted"]) == labels for found in predictions(row)], axis=0)


def validation(row: Mapping[str, Any]) -> float:
    """The accuracy on validation, in the mean over seeds."""
    return float(np.mean([run["accuracy"] for run in predictions(row)]))


def shown_number(value: float) -> str:
    """A number in at most five characters: `950`, `1.19M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def accuracy_with_interval(row: Mapping[str, Any], labels: list[int]) -> tuple[float, float, float]:
    """Accuracy on the test part, and the ends of its interval of 95 % over images."""
    share = float(right(row, labels).mean())
    return share, *wilson(share, len(labels))


def ranked(state: Mapping[str, Any]) -> list[str]:
    """The methods with predictions, best on validation first, those of later rounds before those that stopped."""
    rows = state["rows"]
    last = len(state["plan"]) - 1

    def key(name: str) -> tuple[int, float, float]:
        runs = last_runs(rows[name])
        loss = -float(np.mean([run["loss"] for run in runs])) if runs else 0.0
        return runs[0]["round"] if runs else last, validation(rows[name]), loss

    return sorted((name for name, row in rows.items() if predictions(row)), key=key, reverse=True)


def comparison_table(state: Mapping[str, Any]) -> str:
    """A row for each method: accuracy, and what it costs."""
    labels, last = state["data"]["labels"], len(state["plan"]) - 1
    header = ("method", "accuracy", "trained", "bytes", "ms/step", "MB/step", "predict", "merge")
    cells, stopped = [], False
    for name in ranked(state):
        row = state["rows"][name]
        share, low, high = accuracy_with_interval(row, labels)
        accuracy = f"{100 * share:.1f} ({100 * low:.0f}-{100 * high:.0f})"
        if "neighbours" in row:
            cells.append((name, accuracy, "0", shown_number(row["neighbours"]["bytes"]), "-", "-", "1.00x", "-"))
            continue
        cost, runs = row["cost"], last_runs(row)
        early = runs[0]["round"] < last
        stopped |= early
        cells.append(
            (
                f"{name}{'*' if early else ''}",
                accuracy,
                shown_number(cost["trained"]),
                shown_number(runs[0]["bytes"]),
                f"{1000 * cost['step_seconds']:.0f}",
                f"{cost['step_bytes'] / 2**20:.1f}",
                f"{cost['inference_ratio']:.2f}x",
                "yes" if cost["merges"] else "no",
            )
        )
    lines = [format_columns(header, cells, right=header[2:-1])]
    lines.append(f"Accuracy: % of {len(labels)} test images, with its interval of 95 %; predict: time, if it")
    lines.append("merges when merged, relative to the backbone alone.")
    if stopped:
        lines.append("* stopped early, because it was in the worse half on validation.")
    for name, row in state["rows"].items():
        if "failed" in row:
            lines += textwrap.wrap(f"{name}: {row['failed']}", 80)
    return "\n".join(lines)


def advice(state: Mapping[str, Any]) -> str:
    """Which method to take and why, in two sentences."""
    labels, rows, choice = state["data"]["labels"], state["rows"], state["choice"]
    row = rows[choice]
    share, low, high = accuracy_with_interval(row, labels)
    cost = row["cost"]
    ratio = cost["inference_ratio"]
    merged = "merges into the backbone" if cost["merges"] else f"predicts in {ratio:.2f} times the backbone's time"
    merged = merged if cost["merges"] or ratio > 1.02 else "predicts as fast as the backbone"
    first = (
        f"I would take {choice}: it is best on validation ({100 * validation(row):.1f} %), has {100 * share:.1f} % "
        f"({100 * low:.0f} to {100 * high:.0f}) on the test part, trains {cost['trained']:,} numbers and {merged}."
    )
    cheaper = [
        name
        for name in ranked(state)
        if name != choice and "cost" in rows[name] and rows[name]["cost"]["step_seconds"] < cost["step_seconds"]
    ]
    own = right(row, labels) >= 0.5
    close = [name for name in cheaper if sign_test(own.tolist(), (right(rows[name], labels) >= 0.5).tolist()) > 0.05]
    if close:
        name = min(close, key=lambda one: rows[one]["cost"]["step_seconds"])
        times = cost["step_seconds"] / rows[name]["cost"]["step_seconds"]
        other = 100 * right(rows[name], labels).mean()
        second = (
            f"{name} ({other:.1f} %) cannot be told from it by {len(labels)} test images, and a step of it is "
            f"{times:.1f} times as fast."
        )
    elif cheaper:
        second = f"Those with cheaper steps ({', '.join(cheaper)}) are worse on the test part, beyond chance."
    else:
        second = "No other method has cheaper steps."
    return f"{first} {second}"
