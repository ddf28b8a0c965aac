"""What identifies the images of a split and their classes, wherever the files are and in whatever order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
import fsspec
import numpy as np
import xxhash


def fingerprint(data: datasets.Dataset, ids: np.ndarray, names: Sequence[str]) -> str:
    """A hash of the encoded images with the names of their classes.

    Args:
        data: one column of images, not decoded.
        ids: the class of each, or 0 and 1 for each class.
        names: of the classes.
    """
    (column,) = data.column_names
    found = []
    for row, label in zip(data, ids, strict=True):
        one = xxhash.xxh3_128()
        frames = row[column] if isinstance(row[column], list) else [row[column]]
        for value in frames:
            one.update(value["bytes"] if value["bytes"] is not None else _read(value["path"]))
        chosen = [int(label)] if ids.ndim == 1 else np.flatnonzero(label).tolist()
        one.update("\0".join(names[index] for index in chosen).encode())
        found.append(one.digest())
    return xxhash.xxh3_128(b"".join(sorted(found))).hexdigest()


def _read(path: str) -> bytes:
    """The bytes of a file, or of what fsspec knows by its path: a part of a zip file, a file on the Hub or the web."""
    if Path(path).is_file():  # its name may have any signs
        return Path(path).read_bytes()
    with fsspec.open(path, "rb") as file:
        return file.read()
