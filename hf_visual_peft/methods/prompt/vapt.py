"""Visual adaptive prompt tuning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import Placement, Shared, TokenLayout, TokenSite
from ...training.defaults import Training
from .vpt import MAX_GRID, MAX_VIRTUAL_TOKENS, Prompts


class AdaptivePrompts(nn.Module):
    """Tokens made of the image: of the patches of the stream, by linears over their places.

        P = g(M dropout(K * LN(x)) + b),  K: a kernel for the maps of all channels;  M: (tokens, places), zero, b zero

    Dropout drops whole channels. Where the grid has another size, the map is resized to that of M, first.

    Args:
        num_virtual_tokens: how many.
        width: channels of the stream.
        grid: rows and columns of patches for which M is made.
        kernel_size: rows and columns of K, which is drawn from N(0, 1).
        dropout: probability.
    """

    def __init__(
        self, num_virtual_tokens: int, width: int, grid: tuple[int, int], kernel_size: int, dropout: float
    ) -> None:
        super().__init__()
        self.grid = tuple(grid)
        places = (grid[0] - kernel_size + 1) * (grid[1] - kernel_size + 1)
        self.norm = nn.LayerNorm(width)
        self.kernel = nn.Parameter(torch.randn(1, 1, kernel_size, kernel_size))
        self.mix = nn.Linear(places, num_virtual_tokens)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor, layout: TokenLayout, project: nn.Module) -> Tensor:
        """Tokens of shape (batch, num_virtual_tokens, width), for a stream (batch, tokens, width)."""
        _, maps = layout.split(self.norm(x))
        if tuple(maps.shape[2:]) != self.grid:
            maps = F.interpolate(maps, self.grid, mode="bilinear", align_corners=False)
        channels = maps.shape[1]
        maps = self.dropout(F.conv2d(maps, self.kernel.expand(channels, -1, -1, -1), groups=channels))
        # contiguous: then linears round alike, whether they train or not
        return project(self.mix(maps.flatten(2).contiguous()).mT.contiguous())


class Projector(nn.Module):
    """A bottleneck with a skip connection, one for all blocks.

        g(t) = t + W_b dropout(relu(W_a t)),  linears as `nn.Linear` makes them, without biases

    Args:
        width: channels of the tokens.
        r: width of the bottleneck.
        dropout: probability.
    """

    def __init__(self, width: int, r: int, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, r, bias=False)
        self.up = nn.Linear(r, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, t: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        return t + self.up(self.dropout(F.relu(self.down(t))))


@register(
    name="vapt",
    paper=Paper("Visual Adaptive Prompt Tuning", "ICLR 2026", "2501.18936"),
    summary="tokens made of the patches of the stream, before every block but the first",
    visual_tuning="prompt: vision-driven",
    equation="x_i = [prefix; g(M_i (K_i * LN_i(patches_i)) + b_i); patches] into block i > 0; P before the first",
    counts=(({"num_virtual_tokens": 10}, 55_608),),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class VAPTConfig(VisualPeftConfig):
    """Config of visual adaptive prompt tuning (VAPT), arXiv 2501.18936.

    The first block gets prompts as in VPT. Every other block gets prompts that are made of its own input: a norm, a
    small convolution with one kernel for all channels, a linear over the places of the map for each prompt, and a
    bottleneck that all blocks share. Prompts of these blocks are zero at the start, but attention sees them, so this
    is not the identity.

    The linear has a weight for each place, so the number of parameters depends on the grid: 14 x 14 patches on
    ViT-B/16. The authors' code knows grids of 14 x 14 and 16 x 16 only; here the grid is that of the backbone's
    images, or `grid_size`, and maps of another size are resized. In a hierarchical backbone the first block of each
    stage gets ordinary prompts, as its width is new.

    Args:
        num_virtual_tokens: prompts per block.
        r: width of the shared bottleneck.
        kernel_size: rows and columns of the kernel; no padding.
        grid_size: rows and columns of patches for which the linears are made; by default those of the backbone's
            images, which must be given where its config does not tell.
        dropout: probability, on the first prompts, on channels of the maps and in the bottleneck.
    """

    num_virtual_tokens: int = field(default=10, metadata={"help": "Prompts a block."})
    r: int = field(default=8, metadata={"help": "Width of the shared bottleneck."})
    kernel_size: int = field(default=2, metadata={"help": "Rows and columns of the kernel."})
    grid_size: int | None = field(
        default=None,
        metadata={"help": "Rows and columns of patches; default: of the backbone's own image size.", "tiny": 4},
    )
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("num_virtual_tokens", 1, MAX_VIRTUAL_TOKENS)
        self._require_integer("r", 1)
        self._require_integer("kernel_size", 1)
        if self.grid_size is not None:
            self._require_integer("grid_size", 1, MAX_GRID)
        self._require_number("dropout", 0.0, below=1.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Prompts before the first block, and prompts of the stream before each other."""
        if backbone.architecture.video:
            raise ValueError(
                f"{type(self).__name__} does not fit {backbone.class_name}: a sequence of its tokens holds several "
                "frames."
            )
        if self.grid_size is None and backbone.grid is None:
            self._fail("grid_size", f"given, because the config of {backbone.class_name} does not tell the grid")
        grid = (self.grid_size,) * 2 if self.grid_size is not None else backbone.grid or (0, 0)
        self._require_integer("r", 1, backbone.width, "the backbone's width")
        self._require_integer("kernel_size", 1, min(grid), "rows or columns of the grid")
        projector = Shared("projector", partial(Projector, backbone.width, self.r, self.dropout))
        for block in backbone.blocks:
            first = block is backbone.blocks[0]
            build = partial(self._build, backbone.width, backbone.patch_features, grid, first)
            yield Placement(block.path, "tokens", TokenSite(reads=not first), build, None if first else projector)

    def _build(
        self, width: int, patch_features: int, grid: tuple[int, int], first: bool, block: nn.Module
    ) -> nn.Module:
        if first:
            return Prompts(self.num_virtual_tokens, width, patch_features, self.dropout)
        return AdaptivePrompts(self.num_virtual_tokens, width, grid, self.kernel_size, self.dropout)
