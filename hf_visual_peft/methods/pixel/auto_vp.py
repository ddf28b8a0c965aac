"""AutoVP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.registry import Paper, register
from ...training.defaults import Training
from .common import in_float, padded, require_size, resized
from .ilm_vp import ILMVPConfig


class ScaledCanvas(nn.Module):
    """Images of a learned size in the middle of a learned canvas.

        scale(pad(resize(x)), s) + sigmoid(P) outside the image, s = 1 and P = 0 at first

    Args:
        channels: of the images.
        height: of the canvas.
        width: of the canvas.
        inner: height and width of the images in it at scale 1.
    """

    def __init__(self, channels: int, height: int, width: int, inner: int) -> None:
        super().__init__()
        self.program = nn.Parameter(torch.zeros(channels, height, width))
        self.scale = nn.Parameter(torch.ones(1))
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to the same shape.

        Raises:
            ValueError: the images have another size.
        """
        height, width = self.program.shape[1:]
        require_size(images, height, width)
        canvas = in_float(padded(resized(images, self.inner, self.inner), height, width))
        scale = self.scale.to(canvas)
        theta = torch.eye(2, 3, device=canvas.device, dtype=canvas.dtype) / scale
        grid = F.affine_grid(theta.expand(len(canvas), 2, 3), list(canvas.shape), align_corners=False)
        scaled = F.grid_sample(canvas, grid, padding_mode="zeros", align_corners=False).to(images.dtype)
        return scaled + self.program.sigmoid() * self._outside(scale.detach()).to(self.program.dtype)

    def _outside(self, scale: Tensor) -> Tensor:
        """1 at the pixels whose centre is outside the image, else 0; without a gradient for the scale."""
        height, width = self.program.shape[1:]
        centres = ((torch.arange(n, device=scale.device) - (n - 1) / 2).abs() for n in (height, width))
        rows, columns = (centre > scale * self.inner / 2 for centre in centres)
        return rows[:, None] | columns


@register(
    name="autovp",
    paper=Paper("AutoVP: An Automated Visual Prompting Framework and Benchmark", "ICLR 2024", "2310.08381"),
    summary="as ILM-VP, and the size of the image on the canvas is learned",
    visual_tuning="prompt: vision-driven",
    equation="scale(pad(resize(x)), s) + sigmoid(P) outside the image",
    counts=(({"inner_size": 128}, 150_529),),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class AutoVPConfig(ILMVPConfig):
    """Config of the prompt of AutoVP, arXiv 2310.08381.

    As ILM-VP, but the size of the image on the canvas is learned, too: one scale, 1 at first, by which the image is
    sampled again about its middle. What is outside the image changes with the scale, without a gradient for it. The
    paper also searches over models, sizes and label maps, and has a linear layer as map, which is the trained head
    here. For CLIP its code adds the parameters without a sigmoid; that form is left out.

    Args:
        inner_size: height and width of the images on the canvas at scale 1; by default 128 of 224.
    """

    def _prompt(self, channels: int, height: int, width: int) -> nn.Module:
        return ScaledCanvas(channels, height, width, self._inner(height, width))
