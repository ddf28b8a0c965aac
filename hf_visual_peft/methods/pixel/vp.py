"""Visual prompting."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.registry import Paper, register
from ...training.defaults import Training
from .common import Constant, Frame, PixelPromptConfig, part_of


class FramePrompt(Constant):
    """A frame, added to normalised images.

        x + P, P ~ N(0, 1) in a frame, 0 inside it

    Args:
        channels: of the images.
        height: of the images.
        width: of the images.
        border: width of the frame.
    """

    def __init__(self, channels: int, height: int, width: int, border: int) -> None:
        super().__init__()
        self.frame = Frame(channels, height, width, border, random=True)

    def addend(self) -> Tensor:
        """The frame."""
        return self.frame.whole()


class PatchPrompt(Constant):
    """A patch in the upper left corner, added to normalised images.

    Args:
        channels: of the images.
        height: of the images.
        width: of the images.
        border: height and width of the patch.
    """

    def __init__(self, channels: int, height: int, width: int, border: int) -> None:
        super().__init__()
        self.patch = nn.Parameter(torch.randn(channels, border, border))
        self.size = (height, width)

    def addend(self) -> Tensor:
        """The patch on an image of zeros."""
        height, width = self.size
        return F.pad(self.patch, (0, width - self.patch.shape[-1], 0, height - self.patch.shape[-2]))


@register(
    name="vp",
    paper=Paper("Exploring Visual Prompts for Adapting Large-Scale Models", "arXiv 2022", "2203.17274"),
    summary="a frame or a patch, added to every image",
    visual_tuning="prompt: vision-driven",
    equation="x + P, P a frame around the normalised image",
    counts=(({"width": 30}, 69_840), ({"width": 50, "kind": "patch"}, 7_500)),
    mergeable=True,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class VPConfig(PixelPromptConfig):
    """Config of visual prompting (VP), arXiv 2203.17274.

    A frame of learned pixels, the same for every image, is added to the normalised images. It starts from N(0, 1). As
    it is constant, it merges exactly into the position embeddings of a backbone that adds such to its tokens, for
    images of this size. The paper trains it with SGD at a learning rate of 40 without weight decay, and keeps the
    head: `label_map`. Its patch at a random place, which changes at every call, is left out.

    Args:
        width: of the frame, or height and width of the patch, in pixels. By default those of the paper as parts of the
            images: 30 of 224, or 50 for the patch.
        kind: `"frame"`, or `"patch"` for a square in the upper left corner.
    """

    width: int | None = field(
        default=None, metadata={"help": "Width of the frame or patch in pixels; default: 30 or 50 of 224.", "tiny": 3}
    )
    kind: str = field(default="frame", metadata={"help": "frame, or patch for a square in the upper left corner."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width is not None:
            self._require_integer("width", 1)
        self._require_choice("kind", ("frame", "patch"))

    def _check_size(self, height: int, width: int) -> None:
        highest = (min(height, width) - 1) // 2 if self.kind == "frame" else min(height, width)
        self._require_fit("width", highest, f"for images of {height} x {width}")

    def _prompt(self, channels: int, height: int, width: int) -> nn.Module:
        make = FramePrompt if self.kind == "frame" else PatchPrompt
        usual = 30 if self.kind == "frame" else 50
        return make(channels, height, width, self.width or part_of(height, width, usual))
