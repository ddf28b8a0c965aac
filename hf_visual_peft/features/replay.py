"""Run a model with stored features in place of its frozen modules."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers.modeling_layers import GradientCheckpointingLayer

from ..sites import Exchange, VisualTunerLayer
from ..sites.grid import Grid
from .calls import CallPoint, Forward, replaced


@dataclass(frozen=True)
class Scaled:
    """A tensor some of whose dimensions grow with the batch.

    Attributes:
        sizes: of each dimension: a fixed size, or None with the size for one sample.
        dtype: of the tensor.
        key: name under which the tensor is stored; None where nothing reads it.
    """

    sizes: tuple[tuple[bool, int], ...]
    dtype: torch.dtype
    key: str | None = None

    @classmethod
    def of(cls, key: str | None, many: Tensor, few: Tensor, rows: tuple[int, int]) -> Scaled | None:
        """Compare a tensor of two batches; None if it is the same for all batches.

        Args:
            key: name under which the tensor would be stored.
            many: of the larger batch.
            few: of the smaller batch.
            rows: samples in the two.

        Raises:
            ValueError: the sizes do not match the batch.
        """
        if many.shape == few.shape:
            return None
        sizes = []
        for long, short in zip(many.shape, few.shape, strict=True):
            if long * rows[1] != short * rows[0] and long != short:
                raise ValueError(f"{key} has the shapes {tuple(many.shape)} and {tuple(few.shape)} for {rows} images.")
            sizes.append((long != short, long if long == short else long // rows[0]))
        return cls(tuple(sizes), many.dtype, key)

    @property
    def sample(self) -> tuple[int, ...] | None:
        """The shape of one sample; None where samples do not lie along the first dimension only."""
        first, *others = self.sizes
        if first != (True, 1) or any(grows for grows, _ in others):
            return None
        return tuple(size for _, size in others)

    def dummy(self, rows: int, device: torch.device) -> Tensor:
        """A tensor of the right shape without memory, filled with NaN so that any use shows."""
        shape = [size * rows if grows else size for grows, size in self.sizes]
        value = float("nan") if self.dtype.is_floating_point else 0
        return torch.full((), value, dtype=self.dtype, device=device).expand(shape)


@dataclass(frozen=True)
class Output:
    """The output of one call of a cut module.

    Attributes:
        spec: the structure.
        leaves: its contents: tensors that grow with the batch, and all other values unchanged.
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]

    def build(self, features: Mapping[str, Tensor], rows: int, device: torch.device) -> Any:
        """Build the output for a batch, with features where they are stored."""
        leaves = [_fill(leaf, features, rows, device) if isinstance(leaf, Scaled) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.spec)


def _fill(leaf: Scaled, features: Mapping[str, Tensor], rows: int, device: torch.device) -> Tensor:
    feature = None if leaf.key is None else features.get(leaf.key)
    return leaf.dummy(rows, device) if feature is None else feature.to(leaf.dtype)


@dataclass
class Border:
    """Where the frozen part of a model ends.

    Attributes:
        cuts: modules that are skipped, with the output of each of their calls.
        readers: modules whose first argument is stored, with its description.
        inputs: placeholders for the model's image inputs, by name.
        shapes: of one sample of each feature, by name.
        live: modules that run as usual and return nothing frozen, such as heads and side networks.
        grid: of the images, for the adapter layers of this library.
        exchanges: the objects that these layers share.
    """

    cuts: dict[CallPoint, list[Output]]
    readers: dict[CallPoint, Scaled]
    inputs: dict[str, Scaled]
    live: Collection[nn.Module] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    grid: Grid | None = None
    exchanges: Sequence[Exchange] = ()

    def arguments(self, features: Mapping[str, Tensor], rows: int, device: torch.device) -> dict[str, Tensor]:
        """The model's inputs for a batch of features."""
        return {name: _fill(leaf, features, rows, device) for name, leaf in self.inputs.items()}

    def replay(
        self, features: Mapping[str, Tensor], arguments: Mapping[str, Tensor], rows: int, device: torch.device
    ) -> AbstractContextManager[None]:
        """Make the model take features in place of its frozen part, inside the context.

        Args:
            features: of a batch, by name.
            arguments: the result of `arguments` for them.
            rows: samples in the batch.
            device: of the model.
        """
        forwards: dict[CallPoint, Forward] = {}
        for point, outputs in self.cuts.items():
            calls = iter(outputs)
            forwards[point] = partial(_skipped, point, calls, features, rows, device)
        for point, leaf in self.readers.items():
            forwards[point] = partial(_reading, point.forward, _fill(leaf, features, rows, device))
        for exchange in self.exchanges:  # the hooks that set these are in skipped modules
            exchange.grid = self.grid
            if exchange.pixel_handles:
                exchange.pixels = next(iter(arguments.values()))
        return replaced(forwards)


def _skipped(
    point: CallPoint, calls: Any, features: Mapping[str, Tensor], rows: int, device: torch.device, *_: Any, **__: Any
) -> Any:
    output = next(calls, None)
    if output is None:
        raise RuntimeError(f"{point.path} is called more often than when its features were computed.")
    return point.shown(output.build(features, rows, device))


def _reading(forward: Forward, feature: Tensor, _: Any, *args: Any, **kwargs: Any) -> Any:
    return forward(feature, *args, **kwargs)


def exchanges_of(model: nn.Module) -> list[Exchange]:
    """The objects that this library's adapter layers share in a model; several if it has several tuners."""
    found = {id(m.exchange): m.exchange for m in model.modules() if isinstance(m, VisualTunerLayer)}
    return list(found.values())


def recomputing(model: nn.Module, border: Border) -> list[GradientCheckpointingLayer]:
    """The layers outside the skipped modules that may recompute their forward in the backward pass."""
    inside = {id(part) for point in border.cuts for part in point.module.modules() if part is not point.module}
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and id(m) not in inside]


def leaves_of(tree: Any) -> tuple[list[Any], TreeSpec]:
    """The leaves of nested lists, tuples, dictionaries and outputs of transformers, and the structure."""
    return tree_flatten(tree)
