"""The exchange between the convolutions of ViT-Adapter and the backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...features.pyramid import as_maps, level_sizes
from ...sites import BlockView, TokenLayout, drop_path
from .deformable import DeformableAttention, Sizes, centres
from .spatial_prior import Pyramid, SpatialPrior, start_convolutions, to_rows


EPS = 1e-6  # of the norms


class Injector(nn.Module):
    """The injector, from the convolutions' tokens to patches: gamma MSDA(LN x; LN c), gamma zero at the start.

    Args:
        width: channels of x and c.
        num_heads: of the attention.
        points: of the attention.
        value_width: of the attention.
    """

    def __init__(self, width: int, num_heads: int, points: int, value_width: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width, eps=EPS)
        self.value_norm = nn.LayerNorm(width, eps=EPS)
        self.deformable = DeformableAttention(width, num_heads, 3, points, value_width)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, layout: TokenLayout, c: Tensor, sizes: Sizes) -> Tensor:
        """The addition to x, (batch, tokens, width); zero for prefix tokens.

        Args:
            x: the backbone's stream.
            layout: of its tokens.
            c: (batch, tokens of three levels, width).
            sizes: of the levels.
        """
        prefix, maps = layout.split(self.query_norm(x))
        grid = (maps.shape[2], maps.shape[3])
        found = self.deformable(to_rows(maps), centres([grid], c), self.value_norm(c), sizes)
        return layout.join(torch.zeros_like(prefix), (self.gamma * found).transpose(1, 2).unflatten(2, grid))


class ConvFFN(nn.Module):
    """An MLP with a 3 x 3 convolution of each channel at its hidden layer: W_2 GELU(dw(W_1 c + b_1)) + b_2.

    Args:
        width: channels of c.
        hidden: channels between.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.convolution = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, width)
        start_convolutions(self)
        for linear in (self.fc1, self.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, c: Tensor, sizes: Sizes) -> Tensor:
        """Map (batch, tokens of several maps, width) to the same shape."""
        maps = as_maps(self.fc1(c), list(sizes))
        return self.fc2(F.gelu(torch.cat([to_rows(self.convolution(each)) for each in maps], dim=1)))


class Extractor(nn.Module):
    """The extractor, from patches to the convolutions' tokens: c <- c + MSDA(LN c; LN x), c <- c + ConvFFN(LN c).

    Args:
        width: channels of x and c.
        num_heads: of the attention.
        points: of the attention.
        value_width: of the attention.
        hidden: channels in the ConvFFN.
        drop_rate: probability of dropping the ConvFFN for a sample.
    """

    def __init__(
        self, width: int, num_heads: int, points: int, value_width: int, hidden: int, drop_rate: float
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width, eps=EPS)
        self.value_norm = nn.LayerNorm(width, eps=EPS)
        self.deformable = DeformableAttention(width, num_heads, 1, points, value_width)
        self.ffn_norm = nn.LayerNorm(width, eps=EPS)
        self.ffn = ConvFFN(width, hidden)
        self.drop_rate = drop_rate

    def forward(self, c: Tensor, sizes: Sizes, x: Tensor, layout: TokenLayout) -> Tensor:
        """(batch, tokens of three levels, width) to the same; arguments as of `Injector`."""
        _, maps = layout.split(self.value_norm(x))
        grid = (maps.shape[2], maps.shape[3])
        c = c + self.deformable(self.query_norm(c), centres(sizes, c), to_rows(maps), [grid])
        return c + drop_path(self.ffn(self.ffn_norm(c), sizes), self.drop_rate, self.training)


class Interaction(nn.Module):
    """The part of an interaction that stands at one block; an interaction spans a group of blocks.

    Args:
        prior: computes c from the images, before the first block.
        injector: before the first block of a group.
        extractors: after the last block of a group.
        gathers: whether the stream is appended to c here, for the pyramid.
        pyramid: after the last block of the last group, if a pyramid is wanted.
    """

    def __init__(
        self,
        prior: SpatialPrior | None,
        injector: Injector | None,
        extractors: Sequence[Extractor],
        gathers: bool = False,
        pyramid: Pyramid | None = None,
    ) -> None:
        super().__init__()
        self.prior, self.injector, self.pyramid = prior, injector, pyramid
        self.extractors = nn.ModuleList(extractors)
        self.gathers = gathers

    def enter(self, state: Tensor | None, view: BlockView) -> tuple[Tensor, Tensor]:
        """Before the block: c, and the addition to the stream."""
        assert view.pixels is not None
        assert view.before is not None
        assert view.layout is not None
        assert self.injector is not None
        if self.prior is not None:
            state = self.prior(view.pixels)
        assert state is not None
        sizes = level_sizes(view.pixels)[1:]
        return state, self.injector(view.before, view.layout, state[:, : _count(sizes)], sizes)

    def forward(self, state: Tensor, view: BlockView) -> tuple[Tensor, None]:
        """After the block: the new c, followed by the streams kept for the pyramid; or the pyramid."""
        assert view.pixels is not None
        assert view.after is not None
        assert view.layout is not None
        sizes = level_sizes(view.pixels)[1:]
        c, *kept = state.split([_count(sizes), state.shape[1] - _count(sizes)], dim=1)
        for extractor in self.extractors:
            c = extractor(c, sizes, view.after, view.layout)
        if not self.gathers:
            return (torch.cat([c, *kept], dim=1) if kept[0].shape[1] else c), None
        maps = view.layout.split(view.after)[1]
        state = torch.cat([c, *kept, to_rows(maps)], dim=1)
        if self.pyramid is not None:
            state = self.pyramid(state, view.pixels, (maps.shape[2], maps.shape[3]))
        return state, None


def _count(sizes: Sizes) -> int:
    return sum(height * width for height, width in sizes)
