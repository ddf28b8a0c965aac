"""Check some samples of a data set before the features of all are computed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset


_LOOKED_AT = 8  # samples that are read twice, to detect random augmentation


def views_of(data: Dataset[Any] | Sequence[Dataset[Any]]) -> list[Any]:
    """The data sets of each view.

    Raises:
        ValueError: they are not data sets, or differ in length.
    """
    views: list[Any] = list(data) if isinstance(data, list | tuple) else [data]
    for view in views:
        if isinstance(view, Mapping):
            raise ValueError("data is a list of samples, but a list means several views of the images: pass [data].")
        if isinstance(view, IterableDataset) or not hasattr(view, "__len__"):
            raise ValueError(f"data: a streaming data set cannot be cached: it has no length ({type(view).__name__}).")
    if not views or len({len(view) for view in views}) != 1 or len(views[0]) == 0:
        raise ValueError(f"data has views of {[len(view) for view in views]} samples: all must have the same number.")
    return views


def look_at(view: Any, targets: Sequence[str]) -> list[Mapping[str, Any]]:
    """The first samples of a data set.

    Raises:
        ValueError: they are not mappings with inputs of a model, or they are random.
    """
    return [_read(view, index, targets) for index in range(min(_LOOKED_AT, len(view)))]


def _read(view: Any, index: int, targets: Sequence[str]) -> Mapping[str, Any]:
    one = view[index]
    state = _random_state()
    other = view[index]
    if not isinstance(one, Mapping) or not set(one) - set(targets):
        raise ValueError(f"data: sample {index} must be a mapping with inputs of the model, got {one!r}.")
    changed = [n for n in one if not torch.equal(torch.as_tensor(one[n]), torch.as_tensor(other[n]))]
    # a transform that sets the seed itself leaves the same state each time
    if changed or _random_state() != state:
        what = f"{changed[0]} of sample {index} is another" if changed else f"sample {index} draws random numbers"
        raise ValueError(
            f"data: {what} each time it is read. Features of random augmentation cannot be cached: remove it, or "
            "pass several data sets with fixed augmentation, one for each view."
        )
    return one


def _random_state() -> tuple[Any, ...]:
    numpy_state: Any = np.random.get_state()
    name, keys, *others = numpy_state
    return random.getstate(), name, bytes(keys), others, bytes(torch.get_rng_state().numpy())
