"""The sites in the attention of a block: its logits, and keys and values that join its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from ..backbones.backbone import Block, VisionBackbone
from .attention import Pair
from .site import NO_TOKENS_IN_TEXTS, AttentionSite, joins_others, why_none_join


if TYPE_CHECKING:
    from .grid import TokenLayout


class LogitSite(AttentionSite):
    """The logits of a block's attention, before masks and position biases are added.

    The equation is called with them, (batch, heads, queries, keys), and a `TokenLayout`; it returns the same shape.
    """


@dataclass(frozen=True)
class KeyValueSite(AttentionSite):
    """Extra keys and values, which join those of a block's attention, in every window.

    They have no position, and no mask hides them. The equation is called with the number of images; it returns keys
    and values, (images, heads, tokens, channels of a head) each. `sites.forms.head_sizes` returns heads and channels.

    Attributes:
        compensated: whether their values are weighted by a softmax of their own: the weights of all keys sum up to 1,
            but what falls on these is divided by its sum. Changes of logits do not reach that softmax.
    """

    compensated: bool = False

    def exists_at(self, block: Block, whole: VisionBackbone) -> bool:
        """Not where nothing can join, beside blocks where it can."""
        return super().exists_at(block, whole) and not joins_others(block, whole)

    def why_no_text(self) -> str | None:
        """Positions and mask are those of words."""
        return NO_TOKENS_IN_TEXTS

    def why_not(self, block: Block | None, whole: VisionBackbone) -> str | None:
        """Attention may let no tokens join."""
        return why_none_join(block, whole)


class LogitEquation(Protocol):
    """What an equation at the logits is called with."""

    def __call__(self, logits: Tensor, layout: TokenLayout, *shared: nn.Module) -> Tensor:
        """The new logits, (batch, heads, queries, keys)."""
        ...


class KeyValueEquation(Protocol):
    """What an equation that returns keys and values is called with."""

    def __call__(self, images: int, *shared: nn.Module) -> Pair:
        """Keys and values, (images, heads, tokens, channels of a head) each."""
        ...
