"""Results of runs and comparisons, as they lie on disk."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .statistics import wilson
from .table import predictions, ranked, right


COMPARISON, RUN = "comparison.json", "all_results.json"


@dataclass
class Result:
    """A method on images: one run, or the mean of runs that differ in the seed only.

    Attributes:
        name: of the method.
        source: file that it is from.
        command: that trained it.
        fingerprint: of the images that the accuracy is measured on; None if it is not known.
        split: that these images are.
        images: their number; None if it is not known.
        accuracies: for each seed.
        interval: of 95 % over images, if their number is known.
        costs: trained numbers, bytes, seconds and bytes of a step, time of a prediction relative to the backbone.
        curve: steps and accuracy on validation.
        predicted: class of each image, from the first seed.
        confidence: probability of that class.
        folder: of the run, with its adapter or model; of the first seed.
        model: checkpoint that the run began with, if it is known.
    """

    name: str
    source: str
    command: str
    fingerprint: str | None
    split: str
    images: int | None
    accuracies: list[float]
    interval: tuple[float, float] | None = None
    costs: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    folder: Path | None = None
    model: str | None = None

    @property
    def accuracy(self) -> float:
        """The mean over seeds."""
        return float(np.mean(self.accuracies))

    @property
    def deviation(self) -> float | None:
        """The standard deviation over seeds; None for one."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else None


@dataclass
class Results:
    """All that a page shows.

    Attributes:
        title: name of the data.
        results: of the methods.
        classes: their names; empty if they are not known.
        labels: class of each image, as an index.
        files: names of the images.
        folder: data set of the images on disk, if it is there.
    """

    title: str
    results: list[Result]
    classes: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    folder: Path | None = None


def read_results(places: Sequence[str | Path]) -> Results:
    """Read runs and comparisons, which must be of the same images.

    Args:
        places: folders of runs or comparisons, folders that hold such folders, or their JSON files.

    Raises:
        ValueError: there is no run, a file is broken, or runs were measured on different images.
    """
    files = [file for place in places for file in _files(Path(place))]
    if not files:
        raise ValueError("There are no runs: name folders that hold comparison.json or all_results.json.")
    read = [_comparison(file) if file.name == COMPARISON else _run(file) for file in dict.fromkeys(files)]
    results = [result for one in read for result in one.results]
    if not results:
        raise ValueError(f"{files[0]} has no result yet: let it finish.")
    first = results[0]
    for other in results[1:]:
        if other.fingerprint is None or first.fingerprint is None:
            lacking = other if other.fingerprint is None else first
            raise ValueError(
                f"{lacking.source} does not say which images it was measured on, so it cannot stand beside others: "
                "run it again with this version, or make a page of it alone."
            )
        if other.fingerprint != first.fingerprint:
            raise ValueError(
                f"{first.source} and {other.source} were measured on different images (fingerprints "
                f"{first.fingerprint[:12]} and {other.fingerprint[:12]}): make a page of each."
            )
    whole = next((one for one in read if one.labels), read[0])
    whole.results = _averaged(results)
    return whole


def _files(place: Path) -> list[Path]:
    if place.is_file():
        if place.name not in (COMPARISON, RUN):
            raise ValueError(f"{place} is neither {COMPARISON} nor {RUN}.")
        return [place]
    if not place.is_dir():
        raise ValueError(f"There is no folder {place}.")
    for name in (COMPARISON, RUN):
        if (place / name).is_file():
            return [place / name]
    found = sorted(file for name in (COMPARISON, RUN) for file in place.glob(f"*/{name}"))
    if not found:
        raise ValueError(f"{place} holds no run: neither {COMPARISON} nor {RUN} is in it or in a folder of it.")
    return found


def _content(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}, not results")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is broken: {error}.") from error
    return found


def _comparison(file: Path) -> Results:
    """Each method of a comparison, those that stopped early included."""
    state = _content(file)
    try:
        data, rows = state["data"], state["rows"]
        found = [_of_row(name, rows[name], state, file) for name in ranked(state)] if state["plan"] else []
        folder = file.parent / "data"
        return Results(
            title=data["source"],
            results=found,
            classes=data["classes"],
            labels=data["labels"],
            files=data["files"],
            folder=folder if folder.is_dir() else None,
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{file} is broken or not complete: it lacks {error}.") from error


def _of_row(name: str, row: Mapping[str, Any], state: Mapping[str, Any], file: Path) -> Result:
    data, cost = state["data"], row.get("cost", {})
    labels = np.array(data["labels"])
    seeds = [float((np.array(found["predicted"]) == labels).mean()) for found in predictions(row)]
    costs = {key: cost[key] for key in ("trained", "step_seconds", "step_bytes", "inference_ratio") if key in cost}
    first = predictions(row)[0]
    steps = sorted({run["steps"] for run in row.get("runs", [])})
    curve = [
        (count, float(np.mean([run["accuracy"] for run in row["runs"] if run["steps"] == count]))) for count in steps
    ]
    words = ["hf-visual-peft", "compare", str(data["source"]), "--methods", name]
    return Result(
        name=name,
        source=str(file),
        command=shlex.join(words),
        fingerprint=data["fingerprint"]["test"],
        split="test",
        images=len(labels),
        accuracies=seeds,
        interval=wilson(float(right(row, data["labels"]).mean()), len(labels)),
        costs=costs | {"bytes": first["bytes"]},
        curve=curve,
        predicted=first["predicted"],
        confidence=first["confidence"],
        folder=file.parent / first["folder"] if "folder" in first else None,
        model=state.get("model"),
    )


def _run(file: Path) -> Results:
    """A run of the recipe."""
    content = _content(file)
    split, prefix = ("test", "test_") if "test_accuracy" in content else ("validation", "eval_")
    try:
        command = content["command"]
        words = shlex.split(command)
        accuracy = float(content[f"{prefix}accuracy"])
        trained = float(content["trainable_parameters"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file} is broken, or no run with accuracy on a test or validation split: it lacks {error}."
        ) from error
    known = content.get("fingerprint") or {}
    images = (content.get("images") or {}).get(split)
    weights = [*file.parent.glob("adapter_model.safetensors"), *file.parent.glob("model.safetensors")]
    result = Result(
        name=_method(words, file),
        source=str(file),
        command=command,
        fingerprint=known.get(split),
        split=split,
        images=images,
        accuracies=[accuracy],
        interval=wilson(accuracy, images) if images else None,
        costs={"trained": trained} | ({"bytes": weights[0].stat().st_size} if weights else {}),
        folder=file.parent,
    )
    return Results(title=_data_of(words), results=[result])


def _method(words: list[str], file: Path) -> str:
    """The method of a command: its flag, or the configuration beside the result."""
    for index, word in enumerate(words):
        if word == "--method" and index + 1 < len(words):
            return words[index + 1]
        if word.startswith("--method="):
            return word.partition("=")[2]
    config = file.parent / "adapter_config.json"
    return str(_content(config).get("peft_type", "run")).lower() if config.is_file() else "full or linear"


def _data_of(words: list[str]) -> str:
    for flag in ("--dataset_name", "--test_dir", "--test_file", "--train_dir", "--train_file"):
        if flag in words[:-1]:
            return words[words.index(flag) + 1]
    return "images"


def _averaged(results: list[Result]) -> list[Result]:
    """One result for runs whose commands differ only in seed and output folder, in their order."""
    found: dict[str, Result] = {}
    for result in results:
        key = re.sub(r" --(seed|output_dir)[ =]\S+", "", result.command)
        key = key if Path(result.source).name == RUN else f"{result.source} {result.name}"
        if key not in found:
            found[key] = result
            continue
        kept = found[key]
        kept.accuracies += result.accuracies
        kept.interval = wilson(kept.accuracy, kept.images) if kept.images else None
    return list(found.values())
