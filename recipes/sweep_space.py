"""The trials of a sweep: what is searched, and what each trial is called and runs with."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any


# flags of the recipe that the sweep sets
OWN = (
    "method",
    "dataset_name",
    "seed",
    "output_dir",
    "overwrite_output_dir",
    "test_split",
    "resume_from_checkpoint",
    "do_predict",
    "eval_only",
    "progress",
    "push_to_hub",
)
DATA = ("dataset_name", *(f"{split}_{kind}" for split in ("train", "validation", "test") for kind in ("dir", "file")))


def space_of(values: Sequence[str], method: str, methods: Sequence[str]) -> dict[str, Any]:
    """The values of a method by flag: a list of texts, or a pair of numbers for a range.

    Raises:
        ValueError: a value is malformed, or for a method that is not searched.
    """
    found: dict[str, Any] = {}
    for text in values:
        name, equals, right = text.partition("=")
        owner, dot, flag = name.rpartition(".")
        if not equals or not right or not flag:
            raise ValueError(f"--values {text}: write FLAG=A,B, FLAG=A..B or METHOD.FLAG=A,B")
        if dot and owner not in methods:
            raise ValueError(f"--values {text}: {owner} is none of --methods {' '.join(methods)}")
        if flag in (*OWN, *DATA):
            raise ValueError(f"--values {text}: {flag} is set by the sweep")
        if dot and owner != method:
            continue
        read = range_of(text, right) if ".." in right else list(dict.fromkeys(right.split(",")))
        if flag in found:
            raise ValueError(f"--values {text}: {method} has values of {flag} already")
        found[flag] = read
    return found


def range_of(text: str, right: str) -> tuple[float, float]:
    """Both ends of a range, whole numbers if both are written so.

    Raises:
        ValueError: there are no two numbers, of which the second is larger.
    """
    ends = right.split("..")
    kind: Any = int if all(re.fullmatch(r"\d+", end) for end in ends) else float
    try:
        low, high = map(kind, ends)
    except ValueError:
        raise ValueError(f"--values {text}: a range is two numbers, as 1e-4..1e-1") from None
    if not 0 < low < high < math.inf:
        raise ValueError(f"--values {text}: a range goes from a number above 0 to a larger one")
    return low, high


def spaces_of(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The values of each method."""
    return {method: space_of(given.values, method, given.methods) for method in given.methods}


def planned(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The trials of a search that does not depend on results: the same for the same flags.

    Their order is random, so that a sweep that runs out of time has tried something of everything; but all trials of a
    data set and a seed come before the next, so that a worker keeps its backbone and a setting its seeds.
    """
    spaces, generator = spaces_of(given), random.Random(given.seeds[0])
    chosen: list[tuple[str, dict[str, str]]] = []
    most = settings_of(given)
    if given.search == "grid":
        for method, space in spaces.items():
            chosen += [(method, dict(zip(space, row, strict=True))) for row in itertools.product(*space.values())]
        generator.shuffle(chosen)
        chosen = chosen[:most]
    else:
        possible = sum(map(size_of, spaces.values()))
        drawn_already: set[str] = set()
        for number in itertools.count():
            if len(chosen) >= min(most or 0, possible):
                break
            method = given.methods[number % len(given.methods)]
            values = {flag: drawn(generator, found) for flag, found in spaces[method].items()}
            key = json.dumps([method, values])
            if key not in drawn_already:
                drawn_already.add(key)
                chosen.append((method, values))
    return [
        {"data": data, "method": method, "values": values, "seed": seed}
        for data in given.dataset_name
        for seed in given.seeds
        for method, values in chosen
    ]


def settings_of(given: argparse.Namespace) -> int | None:
    """How many settings fit into --num_trials: each trains once for each data set and seed."""
    return given.num_trials and given.num_trials // (len(given.dataset_name) * len(given.seeds))


def size_of(space: Mapping[str, Any]) -> float:
    """How many settings a method has; infinity with a range of real numbers."""
    sizes = [len(v) if isinstance(v, list) else v[1] - v[0] + 1 if isinstance(v[0], int) else math.inf
             for v in space.values()]  # fmt: skip
    return math.prod(sizes)


def drawn(generator: random.Random, values: Any) -> str:
    """One of the values, as the words of a flag."""
    if not isinstance(values, tuple):
        return str(generator.choice(values))
    low, high = values
    value = math.exp(generator.uniform(math.log(low), math.log(high)))
    return str(round(value)) if isinstance(low, int) else f"{value:.6g}"


def suggest(spaces: Mapping[str, Mapping[str, Any]], fixed: Mapping[str, Any], trial: Any) -> dict[str, Any]:
    """A trial that Optuna chooses: it learns the space by running this.

    Args:
        spaces: of each method.
        fixed: what it does not choose.
        trial: of Optuna.
    """
    method = trial.suggest_categorical("method", list(spaces))
    for flag, values in spaces[method].items():
        name = f"{method}.{flag}"
        if not isinstance(values, tuple):
            trial.suggest_categorical(name, values)
        elif isinstance(values[0], int):
            trial.suggest_int(name, *values, log=True)
        else:
            trial.suggest_float(name, *values, log=True)
    return dict(fixed)


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A trial of any search in one form."""
    if "trial" in config:
        return dict(config["trial"])
    values = {key.partition(".")[2]: written(value) for key, value in config.items() if "." in key}
    return {"data": config["data"], "method": config["method"], "values": values, "seed": config["seed"]}


def written(value: Any) -> str:
    """A value as the words of a flag, from which the same number is read."""
    return repr(value) if isinstance(value, float) else str(value)


def suggestion(trial: Mapping[str, Any], space: Mapping[str, Any]) -> dict[str, Any]:
    """A trial as the numbers that Optuna suggested: the opposite of `plain`."""
    kinds: dict[str, Any] = {flag: type(v[0]) if isinstance(v, tuple) else str for flag, v in space.items()}
    values = {f"{trial['method']}.{flag}": kinds[flag](value) for flag, value in trial["values"].items()}
    return {"method": trial["method"], **values}


def words_of(trial: Mapping[str, Any], others: Sequence[str]) -> list[str]:
    """The flags of a trial, without the output folder."""
    words = ["--dataset_name", trial["data"], "--method", trial["method"], "--seed", str(trial["seed"]), *others]
    for flag, value in trial["values"].items():
        words += [f"--{flag}", *value.split()]
    return words


def name_of(trial: Mapping[str, Any]) -> str:
    """The name of a trial: equal settings have the same."""
    digest = hashlib.sha256(json.dumps(trial, sort_keys=True).encode()).hexdigest()[:12]
    return f"{trial['method']}-{digest}"


def values_told(trial: Mapping[str, Any]) -> str:
    """The values of a trial in a few words."""
    return " ".join(f"{flag}={value.replace(' ', ',')}" for flag, value in trial["values"].items())
