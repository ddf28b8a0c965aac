"""Protocols: what a benchmark trains on, how, and what it may tune, read from YAML."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml


FOLDER = Path(__file__).with_name("protocols")
PARTS = ("train", "test", "tune_train", "tune_validation")
SOURCES = ("hub", "folder")
TASK = {"classes", "group", "config", "image", "label", *SOURCES}
ALL = "all"  # methods


@dataclass(frozen=True)
class Protocol:
    """A protocol; the fields are the keys of its file.

    Attributes:
        name: for people.
        tasks: number of classes and group of each, and where its images are: `hub`, a data set of the Hub, or
            `folder`, with class folders or tables, below that of all data; `config`, `image` and `label` name the
            configuration and the columns. A task with neither has lists in the folder of its name.
        lists: names of the files with a line `path class` for each image, of paths below the folder `images`.
        splits: of tasks with `hub` or `folder`, such as `train[:80%]`.
        flags: of the recipe.
        tune: for each method, or `all`, values of flags that are chosen on validation.
        seeds: each trains once.
        shots: images of each class; each of these numbers trains.
    """

    name: str
    tasks: Mapping[str, Mapping[str, Any]]
    lists: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    shots: Sequence[int | None] = (None,)

    def settings(self, method: str) -> list[dict[str, Any]]:
        """The combinations of values that a method may choose from."""
        space = {**self.tune.get(ALL, {}), **self.tune.get(method, {})}
        return [dict(zip(space, row, strict=True)) for row in itertools.product(*space.values())]

    def parts(self, tuned: bool) -> tuple[str, ...]:
        """What each task must have."""
        return PARTS if tuned else PARTS[:2]


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
    if missing := [name for name in ("name", "tasks") if not found.get(name)]:
        yield f"{', '.join(missing)} missing"
    mappings = ("tasks", "lists", "splits", "flags", "tune")
    if wrong := [key for key in mappings if key in found and not isinstance(found[key], dict)]:
        yield f"{', '.join(wrong)}: give a mapping"
        return
    tasks = found.get("tasks") or {}
    for task, about in tasks.items():
        yield from _wrong_task(str(task), about)
    sourced = [isinstance(about, dict) and bool(set(SOURCES) & set(about)) for about in tasks.values()]
    for key, needed, whose in (
        ("lists", not all(sourced), "tasks without hub or folder"),
        ("splits", any(sourced), "tasks with hub or folder"),
    ):
        yield from _wrong_parts(key, found.get(key) or {}, needed, whose, bool(found.get("tune")))
    for method, space in (found.get("tune") or {}).items():
        if not isinstance(space, dict) or not all(isinstance(values, list) and values for values in space.values()):
            yield f"tune.{method}: give a list of values for each flag"
    for key, low in (("seeds", 0), ("shots", 1)):
        values = found.get(key, [low])
        if not isinstance(values, list) or not values or not all(type(v) is int and v >= low for v in values):
            yield f"{key}: give a list of whole numbers of at least {low}"


def _wrong_task(task: str, about: Any) -> Any:
    classes = about.get("classes") if isinstance(about, dict) else None
    if type(classes) is not int or classes < 2:
        yield f"tasks.{task}: give classes (2 or more), and group if you want means of groups"
        return
    if unknown := sorted(set(map(str, about)) - TASK):
        yield f"tasks.{task}: unknown keys {', '.join(unknown)}; the keys are {', '.join(sorted(TASK))}"
    if set(SOURCES) <= set(about):
        yield f"tasks.{task}: give hub or folder, not both"
    if wrong := sorted(key for key in set(about) & (TASK - {"classes"}) if not isinstance(about[key], str)):
        yield f"tasks.{task}: {', '.join(wrong)} must be text"
    if not set(SOURCES) & set(about) and (alone := sorted({"config", "image", "label"} & set(about))):
        yield f"tasks.{task}: {', '.join(alone)} needs hub or folder; lists have paths and classes only"


def _wrong_parts(key: str, given: Mapping[str, Any], needed: bool, whose: str, tuned: bool) -> Any:
    """What is wrong with `lists` or `splits`, which some tasks need."""
    if unknown := sorted(set(map(str, given)) - set(PARTS)):
        yield f"{key}: unknown {', '.join(unknown)}; they are {', '.join(PARTS)}"
    if wrong := sorted(part for part, value in given.items() if not isinstance(value, str) or not value):
        yield f"{key}: {', '.join(wrong)} must be text"
    if needed and (absent := [part for part in PARTS[:2] if part not in given]):
        yield f"{key}: {', '.join(absent)} missing, for {whose}"
    if needed and tuned and not set(PARTS[2:]) <= set(given):
        yield f"tune needs {key}.tune_train and {key}.tune_validation: nothing is tuned on the test split"
