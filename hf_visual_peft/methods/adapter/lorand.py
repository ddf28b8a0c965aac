"""LoRand."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BranchSite, Placement
from ...training.defaults import Training


def _uniform(*shape: int) -> nn.Parameter:
    """Kaiming-uniform with a = sqrt 5, for a matrix with this many columns."""
    return nn.Parameter(torch.empty(shape).uniform_(-1.0, 1.0) / math.sqrt(shape[-1]))


class Projection(nn.Module):
    """A linear whose weight is a sum of products of three small matrices.

        y = x sum_i P_i K_i Q_i + b

    Args:
        in_features: size of x.
        out_features: size of y.
        branches: number of products.
        rank: size of each K_i.
    """

    def __init__(self, in_features: int, out_features: int, branches: int, rank: int) -> None:
        super().__init__()
        self.left = _uniform(branches, in_features, rank)
        self.right = _uniform(branches, rank, out_features)
        bound = 1 / math.sqrt(in_features)
        self.bias = nn.Parameter(torch.empty(out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features), with the K_i as (branches, rank, rank)."""
        hidden = torch.einsum("...i,nir->...nr", x, self.left)
        hidden = torch.einsum("...nr,nrs->...ns", hidden, kernel)
        return torch.einsum("...ns,nso->...o", hidden, self.right) + self.bias


class LoRand(nn.Module):
    """Bottleneck of low-rank projections, f(x) = up(GELU(down(x))).

    All matrices are Kaiming-uniform with a = sqrt 5, biases as in `nn.Linear`.

    Args:
        width: channels of the token stream.
        r: width of the bottleneck.
        branches: products of each projection.
        rank: size of each kernel matrix.
        share_kernel: whether down and up have the same kernel matrices.
    """

    def __init__(self, width: int, r: int, branches: int, rank: int, share_kernel: bool) -> None:
        super().__init__()
        self.down = Projection(width, r, branches, rank)
        self.up = Projection(r, width, branches, rank)
        self.kernel = _uniform(branches, rank, rank)
        self.up_kernel = None if share_kernel else _uniform(branches, rank, rank)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        hidden = F.gelu(self.down(x, self.kernel))
        return self.up(hidden, self.kernel if self.up_kernel is None else self.up_kernel)


@register(
    name="lorand",
    paper=Paper(
        "1% VS 100%: Parameter-Efficient Low Rank Adapter for Dense Predictions",
        "CVPR 2023",
        None,
        page="https://openaccess.thecvf.com/content/CVPR2023/html/"
        "Yin_1_VS_100_Parameter-Efficient_Low_Rank_Adapter_for_Dense_Predictions_CVPR_2023_paper.html",
    ),
    summary="bottlenecks after attention and MLP, as sums of products of small matrices",
    visual_tuning="adapter: sequential",
    equation="z = x + a + f(a), a = MHSA(LN1 x); f = W_up GELU(W_down .), each W = sum_i P_i K_i Q_i, K_i shared",
    counts=(({}, 915_456), ({"share_kernel": False}, 918_528)),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class LoRandConfig(VisualPeftConfig):
    """Config of LoRand, CVPR 2023.

    A bottleneck with a skip connection stands after attention and after the MLP of every block. It reads what the
    sub-layer adds to the stream. Its two weights are sums of products of three small matrices. All are random at the
    start, so it is not the identity.

    Known from code of the paper's first author: the sum of products with one bias, exact GELU, the skip, both
    positions, the initialisation, and a bottleneck of half the width. Our reading: down and up share the middle
    matrices, as other descriptions of the paper say; that code has separate ones (`share_kernel=False`). Two branches
    of rank 8 are inferred from the 1.20 M parameters reported for Swin-B, which they give; that code has four
    branches.

    Args:
        r: width of the bottleneck; by default half the backbone's width.
        branches: number of products whose sum is each weight.
        rank: size of the middle matrices.
        share_kernel: whether down and up of an adapter have the same middle matrices.
    """

    r: int | None = field(default=None, metadata={"help": "Width of the bottleneck; default: half the width."})
    branches: int = field(default=2, metadata={"help": "Products that add up to each weight."})
    rank: int = field(default=8, metadata={"help": "Size of the middle matrices."})
    share_kernel: bool = field(default=True, metadata={"help": "Down and up have the same middle matrices."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None:
            self._require_integer("r", 1)
        self._require_integer("branches", 1, 1000)
        self._require_integer("rank", 1)
        self._require_choice("share_kernel", (True, False))

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """After both sub-layers of every block."""
        if self.r is not None:
            self._require_integer("r", 1, backbone.width, "the backbone's width")
        self._require_integer("rank", 1, backbone.width, "the backbone's width")
        r = self.r or backbone.width // 2

        def build(_: nn.Module) -> nn.Module:
            return LoRand(backbone.width, r, self.branches, self.rank, self.share_kernel)

        for block in backbone.blocks:
            yield Placement(block.path, "attention", BranchSite("attention", reads="output"), build)
            yield Placement(block.path, "mlp", BranchSite("mlp", reads="output"), build)
