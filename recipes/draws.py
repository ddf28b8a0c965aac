"""Which images a few-shot run is given: classes, their texts, and a few images of each."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from image_folders import some


def text_names(file: str, labels: Sequence[str]) -> list[str]:
    """The text of each class from a file.

    Args:
        file: lines in the order of the labels, or a JSON object from label to text (or a list).
        labels: the classes of the data set.

    Raises:
        ValueError: a class has no text, or a text no class.
    """
    path, flag = Path(file), f"--class_names {file}"
    if not path.is_file():
        raise ValueError(f"{flag}: there is no such file.")
    content = path.read_text(encoding="utf-8")
    if path.suffix.lower() == ".json":
        try:
            found = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(f"{flag} is no JSON: {error}") from None
    else:
        found = [line.strip() for line in content.splitlines()]
        while found and not found[-1]:
            found.pop()
    if isinstance(found, dict):
        missing, unknown = [name for name in labels if name not in found], sorted(set(found) - set(labels))
        if missing or unknown:
            told = f"has no text for {some(missing)}" if missing else f"names {some(unknown)}, which are not classes"
            raise ValueError(f"{flag} {told}. The classes are {some(list(labels))}.")
        return [found[name] for name in labels]
    if not isinstance(found, list) or len(found) != len(labels):
        count = len(found) if isinstance(found, list) else "no list of"
        raise ValueError(
            f"{flag} has {count} names, and the data set {len(labels)} classes: {some(list(labels))}. One line a "
            "class, in this order."
        )
    return list(found)


def halves(count: int, split: str) -> tuple[range, range | None]:
    """The classes to train on, and those that are tested apart.

    The first half is rounded up.

    Args:
        count: of classes.
        split: `base`, `new` or `all`.

    Raises:
        ValueError: a half would have fewer than two classes.
    """
    if split == "all":
        return range(count), None
    base = math.ceil(count / 2)
    if count - base < 2:
        raise ValueError(
            f"--split {split}: the data set has {count} classes, of which {count - base} would be new. Both halves "
            "need two or more: give --split all."
        )
    return (range(base), range(base, count)) if split == "base" else (range(base, count), None)


def draw(ids: np.ndarray, names: Sequence[str], classes: Sequence[int], shots: int, seed: int) -> np.ndarray:
    """The numbers of the images of one draw, class by class.

    Each class has its own random numbers, from seed and name. So the images of a class do not depend on the other
    classes, and those of fewer shots are among those of more.

    Args:
        ids: the class of each image.
        names: of the classes.
        classes: to draw from.
        shots: images of each.
        seed: of the draw.

    Raises:
        ValueError: a class has too few images.
    """
    members = {number: np.flatnonzero(ids == number) for number in classes}
    if poor := {names[number]: len(rows) for number, rows in members.items() if len(rows) < shots}:
        told = some([f"{name!r} ({count})" for name, count in poor.items()])
        least = min(poor.values())
        way = f"give --shots of at most {least}, or more images" if least else "add images, or take the class out"
        raise ValueError(f"--shots {shots}: these classes have fewer images to train on: {told}. Please {way}.")
    found = []
    for number, rows in members.items():
        order = rows.tolist()
        random.Random(f"{seed}/{names[number]}").shuffle(order)
        found += order[:shots]
    return np.array(found, dtype=np.int64)
