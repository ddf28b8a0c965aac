"""The site at the output of task heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..backbones.backbone import Block, VisionBackbone
from .heads import HeadUse
from .layer import call_equation
from .site import ModelSite


class HeadEquation(Protocol):
    """What an equation at a head is called with."""

    def __call__(self, logits: Tensor, *more: Any) -> Tensor:
        """The model's new logits, (samples, ..., classes), of as many classes or another number.

        Args:
            logits: of the head, (samples, ..., classes).
            more: the head's input, (samples, ..., features), if the site reads it; shared modules.
        """
        ...


@dataclass(frozen=True)
class HeadSite(ModelSite):
    """The logits of a model's task heads, before a loss or softmax sees them. The heads stay as they are.

    The equation is called with the logits of a head and returns new ones, of any number of classes. Placements are at
    the path of the backbone.

    Attributes:
        outputs: names of the heads in the model, with the number of their classes (`VisionBackbone.head_sizes`).
        classes: number of classes of the new logits; None if it does not change.
        reads: whether the equation is also called with the head's input.
    """

    outputs: tuple[tuple[str, int], ...]
    classes: int | None = None
    reads: bool = False
    point = "logits"

    @property
    def heads(self) -> HeadUse:
        """The heads that need hooks."""
        return HeadUse(self.outputs, normalised=False)

    def why_not(self, block: Block | None, whole: VisionBackbone) -> str | None:
        """It may have no head, or one with logits for every position."""
        if not self.outputs:
            return ": it has no linear head for the whole image, whose logits could change."
        return ": its heads have logits for positions in the image." if whole.dense else None

    def act(self, layer: Any, equation: Any, x: Tensor, *more: Tensor) -> Tensor:
        """The new logits."""
        return call_equation(layer, equation.module, x, *(more if self.reads else ()), *equation.shared)

    def describe(self, names: Mapping[str, str]) -> str:
        """Whose logits."""
        return "the logits of the head"
