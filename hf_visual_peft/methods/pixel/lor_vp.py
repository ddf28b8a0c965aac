"""Low-rank visual prompting."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...core.registry import Paper, register
from ...training.defaults import Training
from .common import Constant, UnitPixelPromptConfig


class LowRankPrompt(Constant):
    """A product of two matrices for each channel, added to images from 0 to 1.

        x + L R, L = 0 and R ~ N(0, 0.01^2) at first

    Args:
        channels: of the images.
        height: of the images.
        width: of the images.
        r: rank.
    """

    def __init__(self, channels: int, height: int, width: int, r: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.zeros(channels, height, r))
        self.right = nn.Parameter(torch.randn(channels, r, width) * 0.01)

    def addend(self) -> Tensor:
        """The product."""
        return self.left @ self.right


@register(
    name="lorvp",
    paper=Paper("LoR-VP: Low-Rank Visual Prompting for Efficient Vision Model Adaptation", "ICLR 2025", "2502.00896"),
    summary="a low-rank image, added to every image",
    visual_tuning="prompt: vision-driven",
    equation="x + L R for each channel of the image from 0 to 1",
    counts=(({"r": 4}, 5_376),),
    mergeable=True,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class LoRVPConfig(UnitPixelPromptConfig):
    """Config of low-rank visual prompting (LoR-VP), arXiv 2502.00896.

    A low-rank image, the same for every image, is added to the whole image from 0 to 1. It starts at zero. As it is
    constant, it merges exactly into the position embeddings of a backbone that adds such to its tokens, for images of
    this size. The paper trains the head with it, with SGD at 0.02.

    Args:
        r: rank of the image of each channel.
    """

    r: int = field(default=4, metadata={"help": "Rank of the image of each channel."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)

    def _check_size(self, height: int, width: int) -> None:
        self._require_fit("r", min(height, width), f"for images of {height} x {width}")

    def _prompt(self, channels: int, height: int, width: int) -> nn.Module:
        return LowRankPrompt(channels, height, width, self.r)
