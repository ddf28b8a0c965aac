"""Batches whose samples go through different adapters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


BASE = "__base__"  # peft's name for no adapter at all

# Arguments of blocks, beside the first, with an entry for each sample or one for all; and arguments without.
_BY_SAMPLE = ("attention_mask",)
_SHARED = ("position_embeddings", "relative_position_bias", "rope")
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class MixedBatch:
    """The adapter of each sample of a batch.

    Attributes:
        names: one for each sample; `BASE` for no adapter.
    """

    names: tuple[str, ...]

    @property
    def adapters(self) -> tuple[str, ...]:
        """Each adapter once."""
        return tuple(name for name in dict.fromkeys(self.names) if name != BASE)

    def of_rows(self, count: int, where: nn.Module) -> list[str]:
        """The adapter of each row of a tensor, in which a sample may have several rows: windows, or cells of patches.

        Args:
            count: number of rows. The rows of a sample are consecutive.
            where: the module that gets the tensor.

        Raises:
            ValueError: it is not known which rows belong to which sample.
        """
        each, rest = divmod(count, len(self.names))
        if rest or not each:
            raise ValueError(
                f"adapter_names has {len(self.names)} names, but {type(where).__name__} gets {count} rows: which "
                "belong to which sample is not known. Use set_adapter and one batch for each adapter."
            )
        return [name for name in self.names for _ in range(each)]


def count_rows(module: nn.Module, args: tuple) -> int:
    """Number of rows of a module's first argument, a tensor or several with equally many rows.

    Raises:
        ValueError: the argument is something else.
    """
    counts = {len(leaf) if isinstance(leaf, Tensor) else None for leaf in tree_leaves(args[:1])}
    count = next(iter(counts), None)
    if len(counts) != 1 or count is None:
        raise ValueError(_unknown(module, "its first argument"))
    return count


def index_of(rows: list[int], device: torch.device) -> Tensor:
    """Indices of rows as a tensor on a device, without synchronisation."""
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)


def check_samples_first(module: nn.Module, x: Any) -> None:
    """Refuse a linear outside the blocks whose input may have another dimension before the samples.

    Args:
        module: a linear, or one that starts with it; any other module passes.
        x: its input.

    Raises:
        ValueError: it is one.
    """
    first = next(part for part in module.modules() if not any(part.children()))
    if isinstance(first, nn.Linear) and isinstance(x, Tensor) and x.ndim > 3:
        raise ValueError(_unknown(module, f"an input of {x.ndim} dimensions"))


@contextmanager
def instead_of_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward inside the context; its hooks stay.

    Args:
        module: the module.
        forward: the replacement.
    """
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def run_parts(
    module: nn.Module,
    parts: Mapping[str, list[int]],
    run: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """Run a module on parts of a batch and put the results together.

    Args:
        module: whose arguments these are.
        parts: rows by adapter; each row is in one part.
        run: called with the adapter, the index of its rows, and the part of all arguments.
        args: of the module; the first one has the rows.
        kwargs: of the module.

    Raises:
        ValueError: it is not known whether an argument has an entry for each row.
    """
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    count = count_rows(module, args)
    device = tree_leaves(args[0])[0].device
    order = [row for rows in parts.values() for row in rows]
    outputs = []
    for name, rows in parts.items():
        index = index_of(rows, device)
        rest = zip_longest(names[1 : len(args)], args[1:], fillvalue="")
        outputs.append(
            run(
                name,
                index,
                tree_map(lambda leaf, index=index: leaf[index], args[0]),
                *(_part(module, key, value, index, count) for key, value in rest),
                **{key: _part(module, key, value, index, count) for key, value in kwargs.items()},
            )
        )
    back = index_of(order, device).argsort()

    def together(*leaves: Any) -> Any:
        if any(leaf is None for leaf in leaves):  # an output of only some adapters, such as attention weights
            return None
        return torch.cat(leaves)[back] if isinstance(leaves[0], Tensor) else leaves[0]

    return tree_map(together, *outputs)


def _part(module: nn.Module, name: str, value: Any, index: Tensor, count: int) -> Any:
    if name in _SHARED or all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(value)):
        return value
    if name in _BY_SAMPLE and isinstance(value, Tensor) and len(value) in (1, count):
        return value if len(value) == 1 else value[index]
    raise ValueError(_unknown(module, f"the argument {name!r}"))


def _unknown(module: nn.Module, what: str) -> str:
    return (
        f"adapter_names: the layout of samples in {what} of {type(module).__name__} is not known, so the batch cannot "
        "be split. Use set_adapter and one batch for each adapter."
    )
