"""Enhanced visual prompting."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from ...core.registry import Paper, register
from ...training.defaults import Training
from .common import Frame, UnitPixelPromptConfig, padded, part_of, require_size, resized


class ShrunkInFrame(nn.Module):
    """Shrunk images, with a learned frame where they were.

        pad(resize(x)) + P, P = 0 at first in a frame, and 0 inside it

    Args:
        channels: of the images.
        height: of the images.
        width: of the images.
        border: width of the frame.
    """

    def __init__(self, channels: int, height: int, width: int, border: int) -> None:
        super().__init__()
        self.frame = Frame(channels, height, width, border, random=False)
        self.size, self.border = (height, width), border

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to the same shape.

        Raises:
            ValueError: the images have another size.
        """
        height, width = self.size
        require_size(images, height, width)
        small = resized(images, height - 2 * self.border, width - 2 * self.border)
        return padded(small, height, width) + self.frame.whole()


@register(
    name="evppixel",
    paper=Paper("Unleashing the Power of Visual Prompting At the Pixel Level", "TMLR 2024", "2212.10556"),
    summary="images shrunk, in a learned frame",
    visual_tuning="prompt: vision-driven",
    equation="pad(resize(x)) + P, P a frame around the shrunk image from 0 to 1",
    counts=(({"width": 30}, 69_840),),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class EVPPixelConfig(UnitPixelPromptConfig):
    """Config of enhanced visual prompting (EVP) at the pixels, arXiv 2212.10556.

    The images are shrunk, and a learned frame stands around them, so that no pixel is lost under it. The frame starts
    at zero and acts on images from 0 to 1. The paper divides the gradient of a batch by its norm and augments the
    images; that is left to the training loop. It is not the explicit visual prompting that has the same initials.

    Args:
        width: of the frame in pixels. By default that of the paper as a part of the images: 30 of 224.
    """

    width: int | None = field(
        default=None, metadata={"help": "Width of the frame in pixels; default: 30 of 224.", "tiny": 3}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width is not None:
            self._require_integer("width", 1)

    def _check_size(self, height: int, width: int) -> None:
        self._require_fit("width", (min(height, width) - 1) // 2, f"for images of {height} x {width}")

    def _prompt(self, channels: int, height: int, width: int) -> nn.Module:
        return ShrunkInFrame(channels, height, width, self.width or part_of(height, width, 30))
