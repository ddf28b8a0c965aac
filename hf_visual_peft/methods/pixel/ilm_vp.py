"""Visual prompting with iterative label maps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...core.registry import Paper, register
from ...training.defaults import Training
from .common import UnitPixelPromptConfig, padded, part_of, require_size, resized


class Canvas(nn.Module):
    """Small images in the middle of a learned canvas.

        pad(resize(x)) + sigmoid(P) outside the image, P = 0 at first

    Args:
        channels: of the images.
        height: of the canvas.
        width: of the canvas.
        inner: height and width of the images in it.
    """

    def __init__(self, channels: int, height: int, width: int, inner: int) -> None:
        super().__init__()
        self.program = nn.Parameter(torch.zeros(channels, height, width))
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to the same shape.

        Raises:
            ValueError: the images have another size.
        """
        height, width = self.program.shape[1:]
        require_size(images, height, width)
        small = resized(images, self.inner, self.inner)
        outside = 1 - padded(torch.ones_like(small[:1, :1]), height, width)
        return padded(small, height, width) + self.program.sigmoid() * outside


@register(
    name="ilmvp",
    paper=Paper(
        "Understanding and Improving Visual Prompting: A Label-Mapping Perspective", "CVPR 2023", "2211.11635"
    ),
    summary="small images on a learned canvas; a map of labels, or a trained head",
    visual_tuning="prompt: vision-driven",
    equation="pad(resize(x)) + sigmoid(P) outside the image; logits by a label map",
    counts=(({"inner_size": 128}, 150_528),),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class ILMVPConfig(UnitPixelPromptConfig):
    """Config of visual prompting with iterative label maps (ILM-VP), arXiv 2211.11635.

    The images are shrunk to the middle of a canvas, whose pixels outside them are learned: a sigmoid of parameters
    that start at zero, from 0 to 1. Those under the image have no effect. The paper keeps the head and gives each
    class one of the head's own (`label_map`), by how often the model takes images of the one for the other. It finds
    the map anew in every epoch, as `core.label_maps.IterativeLabelMap` does.

    Args:
        inner_size: height and width of the images on the canvas; by default 128 of 224.
    """

    inner_size: int | None = field(
        default=None,
        metadata={"help": "Height and width of the images on it; default: 128 of 224.", "tiny": 16},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner_size is not None:
            self._require_integer("inner_size", 1)

    def _check_size(self, height: int, width: int) -> None:
        least = min(height, width) - (height == width)
        self._require_fit("inner_size", least, f"for a canvas of {height} x {width}")

    def _prompt(self, channels: int, height: int, width: int) -> nn.Module:
        return Canvas(channels, height, width, self._inner(height, width))

    def _inner(self, height: int, width: int) -> int:
        return self.inner_size or part_of(height, width, 128)
