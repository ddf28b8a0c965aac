"""The convolutions of ViT-Adapter: from images to its tokens, and from tokens to a pyramid of maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...features.pyramid import as_maps, level_sizes


GROUPS = 32  # of group norms, if the number of channels allows it


def group_norm(channels: int) -> nn.GroupNorm:
    """A group norm in place of the batch norm, whose statistics would depend on the batch and are not in the file."""
    groups = math.gcd(GROUPS, channels)
    # with one channel per group and a map of one cell, only the bias would be left
    return nn.GroupNorm(groups if groups < channels else max(1, channels // 4), channels)


def to_rows(maps: Tensor) -> Tensor:
    """Map (batch, channels, height, width) to tokens."""
    return maps.flatten(2).transpose(1, 2)


def start_convolutions(module: nn.Module) -> None:
    """Draw the weights of all convolutions in a module from N(0, 2 / fan_out); biases are zero."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            fan_out = part.kernel_size[0] * part.kernel_size[1] * part.out_channels // part.groups
            nn.init.normal_(part.weight, std=math.sqrt(2.0 / fan_out))
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class SpatialPrior(nn.Module):
    """Tokens of the image by convolutions: c_k = P_k conv(...conv(pixels)) + e_k at 1/8, 1/16 and 1/32.

    Three 3 x 3 convolutions, the first of stride 2, and a pooling lead to 1/4; three more of stride 2 lead on. Each is
    followed by a norm and ReLU. P_k are linears, e_k ~ N(0, 1) encodes the level.

    Args:
        image_channels: of the images.
        channels: of the first convolutions; those that follow have 2, 4 and 4 times as many.
        width: channels of the tokens.
        pyramid: whether the map at 1/4 follows, also as tokens, without e.
    """

    def __init__(self, image_channels: int, channels: int, width: int, pyramid: bool) -> None:
        super().__init__()

        def step(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), group_norm(outputs), nn.ReLU()
            )

        widths = (channels, 2 * channels, 4 * channels, 4 * channels)
        self.stem = nn.Sequential(
            step(image_channels, channels, 2),
            step(channels, channels, 1),
            step(channels, channels, 1),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.steps = nn.ModuleList(step(a, b, 2) for a, b in pairwise(widths))
        self.to_width = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in widths[1:])
        self.first_to_width = nn.Conv2d(channels, width, 1) if pyramid else None
        self.levels = nn.Parameter(torch.randn(3, width))
        start_convolutions(self)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (batch, image_channels, height, width) to (batch, tokens of all levels, width)."""
        first = maps = self.stem(pixels)
        found = []
        for step, to_width, level in zip(self.steps, self.to_width, self.levels, strict=True):
            maps = step(maps)
            found.append(to_rows(to_width(maps)) + level)
        if self.first_to_width is not None:
            found.append(to_rows(self.first_to_width(first)))
        return torch.cat(found, dim=1)


class Pyramid(nn.Module):
    """The four maps: f_k = norm(c_k + resized x_k), after c_1 <- c_1 + up(c_2).

    x_k is the backbone's stream as a map, after one group of blocks for each k; with fewer groups, one serves several
    k.

    Args:
        width: channels.
        groups: of blocks.
    """

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.norms = nn.ModuleList(group_norm(width) for _ in range(4))
        start_convolutions(self)

    def forward(self, state: Tensor, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map the tokens of c_2, c_3, c_4, c_1 and of x after each group to those of f_1 to f_4.

        Args:
            state: (batch, tokens, width).
            pixels: the images.
            grid: rows and columns of x.
        """
        sizes = level_sizes(pixels)
        c2, c3, c4, c1, *streams = as_maps(state, [*sizes[1:], sizes[0], *[grid] * self.groups])
        height, width = sizes[0]
        maps: Sequence[Tensor] = (c1 + self.up(c2)[..., :height, :width], c2, c3, c4)
        found = []
        for level, (norm, c) in enumerate(zip(self.norms, maps, strict=True)):
            x = streams[level * self.groups // 4]
            if x.shape != c.shape:
                x = F.interpolate(x, size=c.shape[2:], mode="bilinear", align_corners=False)
            found.append(to_rows(norm(c + x)))
        return torch.cat(found, dim=1)
