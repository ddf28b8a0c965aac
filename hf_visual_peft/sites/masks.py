"""Masks and biases on attention logits, for sequences with inserted tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def widen(mask: Any, name: str, at: int, length: int, count: int) -> Any:
    """Give a mask or bias on attention logits entries for inserted tokens.

    All tokens attend to them, and they attend to every key that any token attends to: a key that is hidden from all
    tokens is padding. They have no position, so they get no bias.

    Args:
        mask: (batch, keys), (..., queries, keys) or (..., 1, keys); boolean, or added to the logits; or None.
        name: name of the argument, for the error.
        at: token before which to insert.
        length: number of tokens, by which the dimensions of tokens are recognised.
        count: entries to insert.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ValueError(f"{name}: a {type(mask).__name__} cannot be extended to inserted tokens; pass a tensor.")

    def insert(new: Tensor, dim: int) -> Tensor:
        shape = list(mask.shape)
        shape[dim] = count
        return torch.cat([mask.narrow(dim, 0, at), new.expand(shape), mask.narrow(dim, at, length - at)], dim=dim)

    if mask.shape[-1] == length:
        mask = insert(mask.new_zeros(()) if mask.is_floating_point() else mask.new_ones(()), -1)
    if mask.ndim > 2 and mask.shape[-2] == length:
        if mask.is_floating_point():
            lowest = torch.finfo(mask.dtype).min
            hidden = (mask <= lowest / 2).all(dim=-2, keepdim=True)
            mask = insert(hidden.to(mask.dtype) * lowest, -2)
        else:
            mask = insert(mask.any(dim=-2, keepdim=True).to(mask.dtype), -2)
    return mask


def seen_tokens(mask: Any, name: str) -> Tensor | None:
    """Which tokens are not padding, (batch or 1, tokens), boolean: those that some token attends to; None if all are.

    Args:
        mask: as for `widen`; a bias that is added to the logits hides nothing.
        name: name of the argument, for the error.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ValueError(f"{name}: a {type(mask).__name__} does not say which tokens are padding; pass a tensor.")
    seen = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()
    return seen if seen.ndim == 2 else seen.flatten(1, -2).any(dim=1)


def for_queries(mask: Any, name: str) -> Any:
    """The mask or bias for extra queries: they attend to every key that any token attends to, without position bias.

    Args:
        mask: as for `widen`.
        name: name of the argument, for the error.
    """
    if not isinstance(mask, Tensor):
        raise ValueError(f"{name}: a {type(mask).__name__} cannot be extended to extra queries; pass a tensor.")
    if mask.ndim == 2 or mask.shape[-2] == 1:
        return mask
    if not mask.is_floating_point():
        return mask.any(dim=-2, keepdim=True).to(mask.dtype)
    lowest = torch.finfo(mask.dtype).min
    return (mask <= lowest / 2).all(dim=-2, keepdim=True).to(mask.dtype) * lowest


@contextmanager
def without_positions(biases: Iterable[PositionBias]) -> Iterator[None]:
    """Let modules give no bias while tokens run that are not part of the sequence."""
    for bias in biases:
        bias.asked = True
    try:
        yield
    finally:
        for bias in biases:
            bias.asked = False


class PositionBias:
    """Extends the output of a module that computes a bias for the grid to inserted tokens, which get no bias."""

    def __init__(self, module: nn.Module, prefix_tokens: int) -> None:
        self.module = module
        self.prefix_tokens = prefix_tokens
        self.asked = False  # whether extra queries run, which are not part of the sequence
        module.forward = self.forward

    def remove(self) -> None:
        """Undo it."""
        del self.module.forward

    def forward(
        self, window_size: tuple[int, int], interpolate_pos_encoding: bool = False, dim_size: int | None = None
    ) -> Tensor:
        """The module's bias, with rows and columns of zeros for inserted tokens."""
        own = window_size[0] * window_size[1] + self.prefix_tokens
        if self.asked:
            return next(self.module.parameters()).new_zeros(1, 1, 1, 1)  # for any number of keys
        inserted = 0 if dim_size is None else dim_size - own
        bias = type(self.module).forward(self.module, window_size, interpolate_pos_encoding, dim_size=own)
        return widen(bias, "bias", self.prefix_tokens, own, inserted) if inserted else bias
