"""Multi-scale deformable attention, arXiv 2010.04159, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


Sizes = Sequence[tuple[int, int]]  # rows and columns of maps


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype of places: in bfloat16 they would be off by half a cell in a map of 128 x 128."""
    return torch.promote_types(dtype, torch.float32)


def centres(sizes: Sizes, like: Tensor) -> Tensor:
    """Centres of the cells of maps, (cells, 2): x and y from 0 to 1, map by map, row by row; float32 or float64."""
    found, dtype = [], precise(like.dtype)
    for height, width in sizes:
        y = (torch.arange(height, device=like.device, dtype=dtype) + 0.5) / height
        x = (torch.arange(width, device=like.device, dtype=dtype) + 0.5) / width
        found.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1))
    return torch.cat(found)


class DeformableAttention(nn.Module):
    """Each query samples a few points of each map, whose offsets it predicts.

        out = W_o [ sum_{l,k} a_hlk V_h^l(p + o_hlk / size_l) ]_h + b_o
        o = W_p q + b_p;  a = softmax_{l,k}(W_a q + b_a)

    V^l(p) is the value map of level l at p, bilinear between cells and zero outside the map. At the start the points
    of head h lie 1 to `points` cells away in the direction 2 pi h / heads, with equal weights.

    Args:
        width: channels of queries, values and output.
        num_heads: a divisor of `value_width`.
        levels: number of maps.
        points: number of points of each head in each map.
        value_width: channels of V.
    """

    def __init__(self, width: int, num_heads: int, levels: int, points: int, value_width: int) -> None:
        super().__init__()
        self.num_heads, self.levels, self.points = num_heads, levels, points
        self.offsets = nn.Linear(width, num_heads * levels * points * 2)
        self.weights = nn.Linear(width, num_heads * levels * points)
        self.to_value = nn.Linear(width, value_width)
        self.from_value = nn.Linear(value_width, width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the weights described above; values and output are Xavier-uniform, biases zero."""
        for linear in (self.offsets, self.weights, self.to_value, self.from_value):
            nn.init.zeros_(linear.bias)
            nn.init.zeros_(linear.weight)
        nn.init.xavier_uniform_(self.to_value.weight)
        nn.init.xavier_uniform_(self.from_value.weight)
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.points + 1).view(-1, 1)
        start = (directions[:, None, None] * steps).expand(-1, self.levels, -1, -1)
        self.offsets.bias.copy_(start.flatten())

    def forward(self, queries: Tensor, places: Tensor, values: Tensor, sizes: Sizes) -> Tensor:
        """Attend.

        Args:
            queries: (batch, queries, width).
            places: p of each query, (queries, 2), as `centres` gives them.
            values: tokens of all maps, one after the other, (batch, tokens, width).
            sizes: of the maps.

        Returns:
            (batch, queries, width).
        """
        heads, values = self.num_heads, self.to_value(values)
        shape = (heads, self.levels, self.points)
        dtype = precise(values.dtype)
        offsets = self.offsets(queries).unflatten(-1, (*shape, 2)).to(dtype)
        weights = self.weights(queries).unflatten(-1, (heads, -1)).softmax(dim=-1).unflatten(-1, shape[1:])
        found = []
        for level, part in enumerate(values.split([height * width for height, width in sizes], dim=1)):
            height, width = sizes[level]
            maps = part.transpose(1, 2).unflatten(1, (heads, -1)).flatten(0, 1).unflatten(-1, (height, width))
            steps = offsets[..., level, :, :]
            steps = torch.stack([steps[..., 0] / width, steps[..., 1] / height], dim=-1)  # no copy from the host
            points = places[:, None, None] + steps
            points = (2 * points - 1).transpose(1, 2).flatten(0, 1)  # (batch x heads, queries, points, 2)
            sampled = F.grid_sample(maps.to(dtype), points.to(dtype), padding_mode="zeros", align_corners=False)
            weight = weights[..., level, :].transpose(1, 2).flatten(0, 1).unsqueeze(1)
            found.append((sampled * weight).sum(dim=-1))  # (batch x heads, channels, queries)
        mixed = torch.stack(found).sum(dim=0).unflatten(0, (-1, heads)).flatten(1, 2).transpose(1, 2)
        return self.from_value(mixed.to(values.dtype))
