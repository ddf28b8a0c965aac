"""Protocols: what a benchmark trains on, how, and what it may tune, read from YAML and checked against the disk."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from image_folders import some


FOLDER = Path(__file__).with_name("protocols")
LISTS = ("train", "test", "tune_train", "tune_validation")
ALL = "all"  # methods


@dataclass(frozen=True)
class Protocol:
    """A protocol; the fields are the keys of its file.

    Attributes:
        name: for people.
        tasks: number of classes and group of each.
        lists: names of the files with a line `path class` for each image, of paths below the folder `images`.
        flags: of the recipe.
        tune: for each method, or `all`, values of flags that are chosen on validation.
        seeds: each trains once.
        shots: images of each class; each of these numbers trains.
    """

    name: str
    tasks: Mapping[str, Mapping[str, Any]]
    lists: Mapping[str, str]
    flags: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    shots: Sequence[int | None] = (None,)

    def settings(self, method: str) -> list[dict[str, Any]]:
        """The combinations of values that a method may choose from."""
        space = {**self.tune.get(ALL, {}), **self.tune.get(method, {})}
        return [dict(zip(space, row, strict=True)) for row in itertools.product(*space.values())]


def read_protocol(name: str) -> Protocol:
    """A protocol of the folder `protocols`, or of a file.

    Raises:
        ValueError: there is none, or keys are unknown, missing or malformed.
    """
    path = Path(name)
    if path.suffix.lower() not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise ValueError(f"--protocol {name}: there is no such file, and the protocols here are {known}.")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable YAML: {error}") from error
    wrong = list(_wrong(found))
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong)}.")
    return Protocol(**found)


def _wrong(found: Any) -> Any:
    """All that is wrong with the content of a file."""
    if not isinstance(found, dict):
        yield "it holds no keys"
        return
    known = {one.name for one in fields(Protocol)}
    if unknown := sorted(set(map(str, found)) - known):
        yield f"unknown keys {', '.join(unknown)}; the keys are {', '.join(sorted(known))}"
    if missing := [name for name in ("name", "tasks", "lists") if not found.get(name)]:
        yield f"{', '.join(missing)} missing"
    for key in ("tasks", "lists", "flags", "tune"):
        if key in found and not isinstance(found[key], dict):
            yield f"{key} is not a mapping"
            return
    for task, about in (found.get("tasks") or {}).items():
        classes = about.get("classes") if isinstance(about, dict) else None
        if not isinstance(classes, int) or classes < 2 or set(about) - {"classes", "group"}:
            yield f"tasks.{task}: give classes (2 or more), and group if you want means of groups"
    lists = found.get("lists") or {}
    if unknown := sorted(set(map(str, lists)) - set(LISTS)):
        yield f"lists: unknown {', '.join(unknown)}; they are {', '.join(LISTS)}"
    if absent := [name for name in ("train", "test") if name not in lists]:
        yield f"lists: {', '.join(absent)} missing"
    tune = found.get("tune") or {}
    if tune and not {"tune_train", "tune_validation"} <= set(lists):
        yield "tune needs lists.tune_train and lists.tune_validation: nothing is tuned on the test split"
    for method, space in tune.items():
        if not isinstance(space, dict) or not all(isinstance(values, list) and values for values in space.values()):
            yield f"tune.{method}: give a list of values for each flag"
    for key, low in (("seeds", 0), ("shots", 1)):
        values = found.get(key, [low])
        if not isinstance(values, list) or not values or not all(type(v) is int and v >= low for v in values):
            yield f"{key}: give a list of whole numbers of at least {low}"


# --------------------------------------------------------------------------------------------------------------- data


def read_list(folder: Path, name: str) -> list[tuple[str, int]]:
    """The lines of a list: path below the folder of the task, and class.

    Raises:
        ValueError: it is malformed, or names images that are not there.
    """
    rows, wrong = [], []
    for number, line in enumerate((folder / name).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdecimal():
            raise ValueError(f"{folder / name}, line {number}: {line[:80]!r} is not 'path class'.")
        # lists of the community name paths below the task's folder, or below its folder `images`
        place = next((p for p in (folder / path, folder / "images" / path) if p.is_file()), None)
        if place is None:
            wrong.append(path)
        else:
            rows.append((str(place.resolve()), int(label)))
    if wrong:
        raise ValueError(f"{folder / name} names {len(wrong)} images that are not there: {some(wrong)}.")
    return rows


def check_data(protocol: Protocol, folder: Path, tasks: Sequence[str], tuned: bool) -> None:
    """Check all tasks on disk.

    Raises:
        ValueError: some are missing, malformed or have another number of classes; the message names all.
    """
    names = [name for key, name in protocol.lists.items() if tuned or not key.startswith("tune_")]
    wrong = []
    for task in tasks:
        absent = [name for name in names if not (folder / task / name).is_file()]
        if absent:
            wrong.append(f"{task} lacks {', '.join(absent)}")
            continue
        try:
            found = {name: {label for _, label in read_list(folder / task, name)} for name in names}
        except (ValueError, OSError) as error:
            wrong.append(str(error).rstrip("."))
            continue
        seen, wanted = found[protocol.lists["train"]], set(range(protocol.tasks[task]["classes"]))
        if seen - wanted or (seen != wanted and protocol.shots == (None,)):
            wrong.append(f"{task} has {len(seen)} classes in {protocol.lists['train']} and should have {len(wanted)}")
        elif missing := sorted(wanted - seen):
            wrong.append(f"{task}: no image of {some(list(map(str, missing)))} can be drawn")
        elif foreign := {label for labels in found.values() for label in labels} - seen:
            wrong.append(f"{task} has images of {some(sorted(map(str, foreign)))}, which are not classes of training")
    if wrong:
        raise ValueError(f"--data_dir {folder}: {'; '.join(wrong)}.")


def drawn(rows: Sequence[tuple[str, int]], shots: int, seed: int) -> list[tuple[str, int]]:
    """So many images of each class; all where there are fewer."""
    generator = np.random.default_rng(seed)
    by_class: dict[int, list[tuple[str, int]]] = {}
    for row in rows:
        by_class.setdefault(row[1], []).append(row)
    return [
        members[index]
        for _, members in sorted(by_class.items())
        for index in sorted(generator.permutation(len(members))[:shots])
    ]


def as_table(rows: Sequence[tuple[str, int]]) -> str:
    """Rows as the recipe reads them; names of classes sort as their numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "label"])
    writer.writerows([path, f"{label:04d}"] for path, label in rows)
    return text.getvalue()
