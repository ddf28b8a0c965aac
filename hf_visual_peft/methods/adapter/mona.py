"""Mona."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BranchSite, Placement, TokenLayout
from ...training.defaults import Training


KERNELS = (3, 5, 7)
GAMMA = 1e-6


class Mona(nn.Module):
    """Bottleneck with depthwise convolutions of three sizes over the patch grid.

        u = g * LN(x) + g_x * x;  t = W_1 u + b_1
        t <- t + (conv3(t) + conv5(t) + conv7(t)) / 3;  t <- t + conv1(t)
        f(x) = W_2 dropout(GELU(t)) + b_2

    The first three convolutions are depthwise. Prefix tokens pass all four as images of 1x1. g is 1e-6 and g_x is 1 at
    the start, all else as in PyTorch's own layers.

    Args:
        width: channels of the token stream.
        r: width of the bottleneck.
        dropout: probability, in the bottleneck.
    """

    def __init__(self, width: int, r: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gamma = nn.Parameter(torch.full((width,), GAMMA))
        self.gamma_x = nn.Parameter(torch.ones(width))
        self.down = nn.Linear(width, r)
        self.convs = nn.ModuleList(nn.Conv2d(r, r, size, padding=size // 2, groups=r) for size in KERNELS)
        self.mix = nn.Conv2d(r, r, kernel_size=1)
        self.up = nn.Linear(r, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Map (batch, tokens, width) to the same shape; `layout` says which tokens are patches and where they lie."""
        t = self.down(self.norm(x) * self.gamma + x * self.gamma_x)
        prefix, patches = layout.split(t)
        patches = patches + sum(conv(patches) for conv in self.convs) / len(KERNELS)
        # on a 1x1 image all taps but the centre see padding
        prefix = prefix + sum(at_centre(conv, prefix) for conv in self.convs) / len(KERNELS)
        t = layout.join(prefix, patches)
        t = t + F.linear(t, self.mix.weight.flatten(1), self.mix.bias)
        return self.up(self.dropout(F.gelu(t)))


def at_centre(conv: nn.Module, tokens: Tensor) -> Tensor:
    """A depthwise convolution of (batch, tokens, channels) as images of 1x1."""
    assert isinstance(conv, nn.Conv2d)
    centre = conv.kernel_size[0] // 2
    assert conv.bias is not None
    return tokens * conv.weight[:, 0, centre, centre] + conv.bias


@register(
    name="mona",
    paper=Paper(
        "5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual Recognition Tasks",
        "CVPR 2025",
        "2408.08345",
    ),
    summary="a bottleneck with depthwise convolutions of three sizes after attention and MLP",
    visual_tuning="adapter: sequential",
    equation="z + f(z) after attention and after the MLP, f: LN mix, W_1, mean of depthwise 3, 5, 7, 1x1, GELU, W_2",
    counts=(({"r": 64}, 2_684_928),),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class MonaConfig(VisualPeftConfig):
    """Config of Mona, arXiv 2408.08345.

    A bottleneck acts on the stream after attention and after the MLP. It has its own norm, whose output it weighs
    against the stream itself, and depthwise convolutions of three sizes over the patch grid. All weights start as
    PyTorch's own layers do, so the adapter is not the identity at the start. The paper adapts Swin, which has patches
    alone. Our choices for other backbones: CLS, distillation and register tokens pass the convolutions as 1x1 images,
    as in Convpass; with masked images (ViT-MAE) the convolutions see zeros where patches are missing.

    Args:
        r: width of the bottleneck; the released code has 64 for every width of the backbone, so it may exceed that.
        dropout: probability, in the bottleneck.
    """

    r: int = field(default=64, metadata={"help": "Width of the bottleneck, at any width of the backbone."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability in the bottleneck."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1, 10_000)
        self._require_number("dropout", 0.0, below=1.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """After both sub-layers of every block."""

        def build(_: nn.Module) -> nn.Module:
            return Mona(backbone.width, self.r, self.dropout)

        for block in backbone.blocks:
            yield Placement(block.path, "attention", BranchSite("attention", reads="sum", needs_layout=True), build)
            yield Placement(block.path, "mlp", BranchSite("mlp", reads="sum", needs_layout=True), build)
