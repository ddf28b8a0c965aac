"""Runs extra tokens through a block whose own tokens do not attend to them.

The block runs twice: on its own tokens, and then on the extra ones, with the keys and values of its own tokens. Norms,
layer scale, residual connections and the MLP are the block's own code. Keys and values are recorded, and reused, where
queries meet keys; see `attention`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Pair, attention_of
from .masks import PositionBias, for_queries, without_positions


Forward = Callable[..., Any]
_MASKS = ("attention_mask", "attn_mask")
_NOT_FOR_QUERIES = ("relative_position_bias", "rope")  # extra queries have no position
_ROTATION = "position_embeddings"  # and are not rotated


def takes_queries(block: nn.Module, query: str, prompts: str | None, grid: str | None) -> bool:
    """Whether extra queries can attend to all tokens of a block, by a plain softmax, as the block's own do.

    Args:
        block: the block.
        query: name of the query projection in the block; empty where it has none.
        prompts: of the architecture's table.
        grid: of the same.
    """
    # "halved": maps are unfolded into several sequences per image, each of which sees only its own tokens
    if not query or grid == "halved" or not (prompts == "sequence" or (prompts == "keys" and grid == "full")):
        return False
    try:
        attention_of(block, query)
    except ValueError:
        return False
    return True


class QueryPath:
    """Keeps keys and values of a block's own tokens, and lets extra tokens attend to them.

    Args:
        block: one for which `takes_queries` is true.
        biases: modules of the block that compute its bias on attention logits.
    """

    def __init__(self, block: nn.Module, biases: list[PositionBias]) -> None:
        self.biases = biases
        self.kept: list[Pair] | None = None  # while the block runs on its own tokens
        self.seen: Pair | None = None  # while it runs on the extra ones
        names = list(inspect.signature(type(block).forward).parameters)[2:]
        known = (*_MASKS, *_NOT_FOR_QUERIES, _ROTATION)
        self._positions = {name: position for position, name in enumerate(names) if name in known}

    def keep(self, key: Tensor, value: Tensor) -> None:
        """Keep keys and values of the block's own tokens while the block runs on these."""
        if self.kept is not None:
            self.kept.append((key, value))

    def run(self, forward: Forward, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Forward]:
        """Call the block with its own tokens.

        Args:
            forward: of the block.
            x: its own tokens.
            args: of the block, after these.
            kwargs: of the block.

        Returns:
            The block's output, and a function that maps extra tokens (batch, queries, width) to their output.
        """
        self.kept = []
        try:
            output = forward(x, *args, **kwargs)
            (seen,) = self.kept
        finally:
            self.kept = None
        return output, partial(self._ask, forward, seen, x.dtype, *self._for_queries(args, kwargs))

    def _ask(
        self,
        forward: Forward,
        seen: Pair,
        dtype: torch.dtype,
        args: tuple,
        kwargs: dict[str, Any],
        queries: Tensor,
    ) -> Tensor:
        self.seen = seen
        try:
            with without_positions(self.biases):
                output = forward(queries.to(dtype), *args, **kwargs)
        finally:
            self.seen = None
        return (output[0] if isinstance(output, tuple) else output).to(queries.dtype)

    def _for_queries(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The block's arguments, for extra tokens."""

        def change(name: str, value: Any) -> Any:
            if name in _NOT_FOR_QUERIES or value is None:
                return None
            if name == _ROTATION:
                return tuple(table[..., :0, :] for table in value)
            return for_queries(value, name)

        changed = list(args)
        kwargs = dict(kwargs)
        for name, position in self._positions.items():
            if position < len(args):
                changed[position] = change(name, args[position])
            elif name in kwargs:
                kwargs[name] = change(name, kwargs[name])
        return tuple(changed), kwargs
