"""Weights with a row for each class, found by the names of the classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def by_name(rows: Tensor, own: Sequence[str], names: Sequence[str], otherwise: Tensor) -> Tensor:
    """The rows of some classes.

    Args:
        rows: one for each of an adapter's own classes.
        own: names of these.
        names: of the classes that are asked for.
        otherwise: rows for all of them, from which those are taken that the adapter does not know.
    """
    if list(own) == list(names):
        return rows
    places = {name: index for index, name in enumerate(own)}
    index = torch.tensor([places.get(name, -1) for name in names], device=rows.device)
    known = (index >= 0).reshape(-1, *[1] * (rows.ndim - 1))
    return torch.where(known, rows[index.clamp(min=0)], otherwise.to(rows))
