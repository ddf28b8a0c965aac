"""The charts of a page, as specifications of Vega-Lite."""

from __future__ import annotations

from typing import Any

import numpy as np

from .reading import Result, Results
from .statistics import calibration, pareto


Spec = dict[str, Any]
COSTS = {
    "trained": "trained numbers",
    "step_bytes": "memory of a step, bytes",
    "step_seconds": "time of a step, seconds",
}
MOST_CLASSES = 30  # in a confusion matrix that one can read


def all_charts(results: Results) -> list[dict[str, Any]]:
    """Each chart with its title, a sentence that says what it shows, and its specification."""
    found = [chart for key, axis in COSTS.items() if (chart := cost_chart(results.results, key, axis))]
    best = max(results.results, key=lambda result: result.accuracy)
    made = (curves(results.results), reliability(results), *((per_class(results, best), confusion(results, best))))
    return [*found, *(chart for chart in made if chart)]


def cost_chart(results: list[Result], key: str, axis: str) -> dict[str, Any] | None:
    """Accuracy against a cost, with the front of methods that no other beats in both."""
    shown = [result for result in results if result.costs.get(key)]
    if len(shown) < 2:
        return None
    front = pareto([(result.costs[key], result.accuracy) for result in shown])
    rows = []
    for number, result in enumerate(shown):
        low, high = result.interval or (result.accuracy, result.accuracy)
        rows.append(
            {
                "method": result.name,
                "cost": result.costs[key],
                "accuracy": result.accuracy,
                "low": low,
                "high": high,
                "front": number in front,
            }
        )
    x = {"field": "cost", "type": "quantitative", "scale": {"type": "log"}, "title": axis}
    y = {"field": "accuracy", "type": "quantitative", "title": "accuracy", "scale": {"zero": False}}
    on_front = [{"filter": "datum.front"}]
    names = ", ".join(shown[index].name for index in front)
    without = ", ".join(result.name for result in results if not result.costs.get(key))
    layers = [
        {
            "mark": {"type": "rule", "opacity": 0.4},
            "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}},
        },
        {"transform": on_front, "mark": {"type": "line", "interpolate": "step-after"}, "encoding": {"x": x, "y": y}},
        {
            "mark": {"type": "point", "filled": True, "size": 80, "tooltip": True},
            "encoding": {"x": x, "y": y, "opacity": {"condition": {"test": "datum.front", "value": 1}, "value": 0.45}},
        },
        {"mark": {"type": "text", "dy": -10}, "encoding": {"x": x, "y": y, "text": {"field": "method"}}},
    ]
    return {
        "title": f"Accuracy and {axis.partition(',')[0]}",
        "text": f"No method shown is both cheaper and better than those on the line: {names}. Vertical lines are "
        f"intervals of 95 % over images.{f' Without this cost, so not shown: {without}.' if without else ''}",
        "spec": {"data": {"values": rows}, "layer": layers, "width": "container", "height": 300},
    }


def curves(results: list[Result]) -> dict[str, Any] | None:
    """Accuracy on validation against steps."""
    rows = [
        {"method": result.name, "steps": steps, "accuracy": accuracy}
        for result in results
        for steps, accuracy in result.curve
    ]
    if not rows:
        return None
    return {
        "title": "Rounds",
        "text": "Accuracy on validation after each round, whose runs begin anew with more steps for fewer methods.",
        "spec": {
            "data": {"values": rows},
            "mark": {"type": "line", "point": True, "tooltip": True},
            "encoding": {
                "x": {"field": "steps", "type": "quantitative", "title": "steps"},
                "y": {"field": "accuracy", "type": "quantitative", "scale": {"zero": False}},
                "color": {"field": "method", "type": "nominal"},
                "strokeDash": {"field": "method", "type": "nominal"},
            },
            "width": "container",
            "height": 300,
        },
    }


def reliability(results: Results, most: int = 4) -> dict[str, Any] | None:
    """Accuracy against confidence of the best methods."""
    known = sorted((r for r in results.results if r.predicted), key=lambda r: -r.accuracy)[:most]
    if not known or not results.labels:
        return None
    rows = [
        {"method": result.name, **one}
        for result in known
        for one in calibration(
            result.confidence, [a == b for a, b in zip(result.predicted, results.labels, strict=True)]
        )
    ]
    x = {"field": "confidence", "type": "quantitative", "scale": {"domain": [0, 1]}}
    y = {"field": "accuracy", "type": "quantitative", "scale": {"domain": [0, 1]}}
    diagonal = {"values": [{"confidence": 0, "accuracy": 0}, {"confidence": 1, "accuracy": 1}]}
    return {
        "title": "Calibration",
        "text": "Accuracy of images by the probability of the predicted class, in ten bins; on the dashed line "
        "probabilities are right.",
        "spec": {
            "layer": [
                {"data": diagonal, "mark": {"type": "line", "strokeDash": [4, 4]}, "encoding": {"x": x, "y": y}},
                {
                    "data": {"values": rows},
                    "mark": {"type": "line", "point": True, "tooltip": True},
                    "encoding": {"x": x, "y": y, "color": {"field": "method", "type": "nominal"}},
                },
            ],
            "width": "container",
            "height": 300,
        },
    }


def matrix(results: Results, result: Result) -> np.ndarray:
    """Numbers of images by true class (rows) and predicted class."""
    count = len(results.classes)
    found = np.zeros((count, count), dtype=int)
    np.add.at(found, (results.labels, result.predicted), 1)
    return found


def hardest(counts: np.ndarray) -> list[int]:
    """The classes with most errors, of them and for them, in their own order."""
    wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    return sorted(np.argsort(-wrong, kind="stable")[:MOST_CLASSES].tolist())


def _limited(results: Results) -> str:
    count = len(results.classes)
    return f" The {MOST_CLASSES} of {count} classes with most errors." if count > MOST_CLASSES else ""


def per_class(results: Results, result: Result) -> dict[str, Any] | None:
    """Accuracy of each class."""
    if not result.predicted or not results.labels:
        return None
    counts = matrix(results, result)
    rows = [
        {
            "class": results.classes[index],
            "accuracy": float(counts[index, index] / counts[index].sum()),
            "images": int(counts[index].sum()),
        }
        for index in hardest(counts)
        if counts[index].sum()
    ]
    return {
        "title": f"Accuracy of each class, {result.name}",
        "text": f"The share of the images of a class that get this class.{_limited(results)}",
        "spec": {
            "data": {"values": rows},
            "mark": {"type": "bar", "tooltip": True},
            "encoding": {
                "y": {"field": "class", "type": "nominal", "sort": None},
                "x": {"field": "accuracy", "type": "quantitative", "scale": {"domain": [0, 1]}},
            },
            "width": "container",
        },
    }


def confusion(results: Results, result: Result) -> dict[str, Any] | None:
    """Which classes are taken for which."""
    if not result.predicted or not results.labels:
        return None
    counts = matrix(results, result)
    chosen = hardest(counts)
    rows = [
        {"true": results.classes[row], "predicted": results.classes[column], "images": int(counts[row, column])}
        for row in chosen
        for column in chosen
    ]
    x = {"field": "predicted", "type": "nominal", "sort": None}
    y = {"field": "true", "type": "nominal", "sort": None}
    layers: list[Spec] = [
        {
            "mark": {"type": "rect", "tooltip": True},
            "encoding": {"x": x, "y": y, "color": {"field": "images", "type": "quantitative"}},
        }
    ]
    if len(chosen) <= 12:
        text = {"text": {"field": "images"}, "color": {"value": "#000"}}
        halo = {"type": "text", "stroke": "#fff", "strokeWidth": 3, "strokeOpacity": 0.8}
        layers += [{"mark": halo, "encoding": {"x": x, "y": y, **text}}]
        layers += [{"mark": {"type": "text", "fontWeight": "bold"}, "encoding": {"x": x, "y": y, **text}}]
    return {
        "title": f"Confusion matrix, {result.name}",
        "text": f"Numbers of images by true and predicted class.{_limited(results)}",
        "spec": {"data": {"values": rows}, "layer": layers, "width": "container", "height": {"step": 20}},
    }
