"""The additions of side networks to the logits of a model's task heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mixed import MixedBatch, index_of


class PassState(Protocol):
    """What a head reads of the `Exchange` of its model."""

    for_heads: dict[str, dict[str, HeadPart]]
    outside: Any
    frames: int | None
    mixed: MixedBatch | None


@dataclass(frozen=True)
class HeadUse:
    """How the state of a side network reaches the task heads.

    Attributes:
        outputs: logits of each head, by its name in the model; the state's columns in this order.
        normalised: whether the heads' own input is scaled to unit length.
    """

    outputs: tuple[tuple[str, int], ...]
    normalised: bool


@dataclass(frozen=True)
class HeadPart:
    """The result of an adapter for a head.

    Attributes:
        logits: (samples, classes), to be added to the head's.
        normalised: whether the head's own input is scaled to unit length.
        adapter: whose logits they are.
    """

    logits: Tensor
    normalised: bool
    adapter: str


@dataclass
class HeadHooks:
    """The hooks at a head, around all copies of it.

    Attributes:
        exchange: of the model that the head belongs to.
        path: name of the head in it.
    """

    exchange: PassState
    path: str

    def before(self, module: nn.Module, args: tuple) -> tuple | None:
        """Scale the head's input, (samples, ..., features), to unit length for the adapters that need it."""
        x = args[0]
        parts = self.exchange.for_heads.get(self.path, {})
        wanting = [part.adapter for part in parts.values() if part.normalised]
        if not wanting:
            return None
        normed = F.normalize(x, dim=-1).to(x.dtype)
        if self.exchange.mixed is not None:
            rows = torch.cat([self._rows(name, x, module) for name in wanting])
            normed = x.index_copy(0, rows, normed[rows])
        return (normed, *args[1:])

    def after(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Add the logits of the adapters, and let those at the head's output act."""
        parts = self.exchange.for_heads.pop(self.path, {})
        for part in parts.values():
            logits = part.logits.to(output.dtype)
            if self.exchange.frames:
                logits = logits.unflatten(0, (-1, self.exchange.frames)).mean(dim=1)
            logits = logits.view(logits.shape[0], *[1] * (output.ndim - 2), logits.shape[1])
            if self.exchange.mixed is None:
                output = output + logits
            else:
                output = output.index_add(0, self._rows(part.adapter, output, module), logits)
        outside = self.exchange.outside
        if outside is not None and outside.acts_at("logits"):
            return outside.run("logits", output, args[0])
        return output if parts else None

    def _rows(self, name: str, x: Tensor, module: nn.Module) -> Tensor:
        """The rows of an adapter, in a batch that mixes several."""
        assert self.exchange.mixed is not None
        names = self.exchange.mixed.of_rows(len(x), module)
        return index_of([row for row, owner in enumerate(names) if owner == name], x.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadHooks:
        # peft copies a head to train it: the copy belongs to the same model, as for `_FrameMean`
        return HeadHooks(memo.get(id(self.exchange), self.exchange), self.path)
