"""One self-contained page of results: no network, light and dark, for keyboards, screen readers and phones."""

from __future__ import annotations

import base64
import functools
import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from ..version import __version__
from .attention import Maps, attention_maps
from .charts import all_charts
from .reading import Result, Results


TEMPLATE = Path(__file__).with_name("page.html")
VEGA_LITE = "5.20"
HINT = 'pip install "hf-visual-peft[report]"'
MOST_PICTURES, SIDE = 12, 112
COLUMNS = {
    "accuracy": "accuracy, %",
    "interval": "95 % interval",
    "deviation": "± over seeds",
    "trained": "trained numbers",
    "bytes": "bytes",
    "step_seconds": "ms a step",
    "step_bytes": "MB a step",
    "inference_ratio": "prediction time",
}


def chart_library() -> str:
    """Vega, Vega-Lite and vega-embed as one script.

    Raises:
        ModuleNotFoundError: the package vl-convert-python, which carries them, or jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401
        import vl_convert
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"A page needs vl-convert-python and jinja2: {HINT}.", name=error.name) from error
    return _bundle(vl_convert)


@functools.cache
def _bundle(vl_convert: Any) -> str:
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE))


def page(results: Results, command: str) -> str:
    """The page as HTML.

    Args:
        results: what to show.
        command: that makes the page, for its figures.
    """
    library = chart_library()
    import jinja2
    import markupsafe

    text = TEMPLATE.read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(text)
    charts = all_charts(results)
    shown, maps = pictures(results)
    return template.render(
        title=f"Methods on {results.title}",
        command=command,
        version=__version__,
        split=results.results[0].split,
        images=results.results[0].images,
        classes=len(results.classes),
        columns=COLUMNS,
        rows=[row_of(result) for result in sorted(results.results, key=lambda one: -one.accuracy)],
        charts=charts,
        # neither can end the element that it stands in
        specs=markupsafe.Markup(json.dumps([chart["spec"] for chart in charts]).replace("<", "\\u003c")),
        library=markupsafe.Markup(library.replace("</script", "<\\/script").replace("<!--", "<\\!--")),
        pictures=shown,
        maps=maps,
    )


def row_of(result: Result) -> dict[str, Any]:
    """A row of the table: for each column the text and the number to sort by, which may be missing."""
    cells: dict[str, tuple[str, float | None]] = {
        "accuracy": (f"{100 * result.accuracy:.1f}", result.accuracy),
        "interval": ("-", None),
        "deviation": ("-", None),
    }
    if result.interval:
        low, high = result.interval
        cells["interval"] = (f"{100 * low:.1f} to {100 * high:.1f}", low)
    if result.deviation is not None:
        cells["deviation"] = (f"{100 * result.deviation:.2f} ({len(result.accuracies)})", result.deviation)
    forms = {
        "trained": lambda value: f"{value:,.0f}",
        "bytes": lambda value: f"{value:,.0f}",
        "step_seconds": lambda value: f"{1000 * value:,.0f}",
        "step_bytes": lambda value: f"{value / 2**20:,.1f}",
        "inference_ratio": lambda value: f"{value:.2f}x",
    }
    for key, form in forms.items():
        value = result.costs.get(key)
        cells[key] = ("-", None) if value is None else (form(value), value)
    return {"name": result.name, "command": result.command, "source": result.source, "cells": cells}


def pictures(results: Results) -> tuple[list[dict[str, Any]], Maps]:
    """Thumbnails of the images on which methods differ most, and of those that most of them get wrong.

    Each has the maps of attention, if there are any, as `maps`.
    """
    known = [result for result in results.results if result.predicted]
    if results.folder is None or not known or not results.labels:
        return [], Maps()
    guesses = np.array([result.predicted for result in known])
    wrong = guesses != np.array(results.labels)
    sure = np.array([result.confidence for result in known])
    kinds = np.array([len(set(column)) for column in guesses.T])
    order = np.lexsort((-(wrong * sure).sum(0), -kinds))
    chosen = [int(index) for index in order if wrong[:, index].any()][:MOST_PICTURES]
    data = datasets.load_from_disk(str(results.folder))["test"]
    images = [data[index]["image"] for index in chosen]
    maps = attention_maps(known, images, SIDE) if images else Maps()
    found = []
    for number, (index, image) in enumerate(zip(chosen, images, strict=True)):
        thumbnail = image.convert("RGB")
        thumbnail.thumbnail((SIDE, SIDE))
        said: dict[str, list[str]] = {}
        for result in known:
            said.setdefault(results.classes[result.predicted[index]], []).append(result.name)
        found.append(
            {
                "file": results.files[index],
                "label": results.classes[results.labels[index]],
                "said": said,
                "url": as_url(thumbnail),
                "maps": [as_url(drawn) for drawn in maps.pairs[number]] if maps.pairs else [],
            }
        )
    return found, maps


def as_url(image: Image.Image) -> str:
    """An image as a part of the page."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
