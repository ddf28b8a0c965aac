"""E3VA: adapters on a highway beside the backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import Block, VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BlockView, Placement, SideSite
from ...training.defaults import Training


def _low_rank(in_features: int, rank: int, out_features: int) -> nn.Sequential:
    """A linear whose weight is the product of two matrices, V U, with one bias."""
    return nn.Sequential(nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features))


class DualLowRankAdapter(nn.Module):
    """A bottleneck whose two weights are themselves of low rank.

        f(x) = V_up U_up GELU(V_down U_down x + b_down) + b_up

    V_up and b_up start at zero.

    Args:
        width: channels of x.
        r: width of the bottleneck.
        rank: of both weights.
    """

    def __init__(self, width: int, r: int, rank: int) -> None:
        super().__init__()
        self.down = _low_rank(width, rank, r)
        self.up = _low_rank(r, rank, width)
        for parameter in self.up[1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        return self.up(F.gelu(self.down(x)))


class HighwayPiece(nn.Module):
    """The adapters of the highway beside one block.

        h <- h + f_attention(z) + f_mlp(y)

    z is the stream between attention and MLP, y the stream after the block.

    Args:
        width: channels of h.
        r: of the adapters.
        rank: of the adapters.
        enters_from: channels of h in the stage before, which a linear maps to those of this stage; None without a
            linear.
        between: whether the block has a stream between attention and MLP.
    """

    def __init__(self, width: int, r: int, rank: int, enters_from: int | None, between: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(enters_from, width, bias=False) if enters_from else None
        self.attention = DualLowRankAdapter(width, r, rank) if between else None
        self.mlp = DualLowRankAdapter(width, r, rank)

    def forward(self, h: Tensor | None, view: BlockView) -> tuple[Tensor, None]:
        """Map h (batch, tokens, width or `enters_from`), None at the start, to (batch, tokens, width)."""
        assert view.after is not None
        taken = self.mlp(view.after)
        if self.attention is not None:
            assert view.between is not None
            taken = taken + self.attention(view.between)
        if h is None:
            return taken, None
        return taken + (h if self.enter is None else self.enter(h)), None


@register(
    name="e3va",
    paper=Paper(
        "Parameter-efficient is not Sufficient: Exploring Parameter, Memory, and Time Efficient Adapter Tuning for "
        "Dense Predictions",
        "ACM MM 2023",
        "2306.09729",
    ),
    summary="bottlenecks of low-rank matrices along a highway beside the blocks",
    visual_tuning="adapter: parallel",
    equation="h_i = h_{i-1} + f(z_i) + f'(y_i), f = V_up U_up GELU(V_down U_down .); out = y_L + h_L",
    counts=(({}, 339_456), ({"r": 32, "rank": 4}, 172_800)),
    mergeable=False,
    identity_at_start=True,
    gradients="none",
    training=Training(3e-3),
)
@dataclass
class E3VAConfig(VisualPeftConfig):
    """Config of E3VA, arXiv 2306.09729.

    Adapters of dual low rank stand in parallel along a highway beside the backbone. They read what its blocks compute,
    and none reads another adapter: gradients reach each adapter only along the highway. No gradient crosses the
    backbone.

    The authors have no public code. From the paper's abstract and figures: the highway, adapters that read the results
    of attention and MLP and are parallel, not stacked, and their dual low rank. Our reading: they read the stream z
    between attention and MLP and the stream y after the block, each weight has a bias, and the highway's result is
    added to the output of the last block, before the model's own final norm; `modules_to_save` can name that norm,
    which the paper trains. Default sizes are our choice.

    Between stages the paper's highway goes through the backbone's own downsampling. In many backbones this cannot be
    called with other tokens. So here h is averaged over the cells that are merged, and a trained linear without bias
    maps it to the new width; these linears come on top of the figures for ViT-B/16. Only the last stage's output gets
    the highway's result, because more would send gradients through the backbone.

    Args:
        r: width of the bottleneck.
        rank: of both weights of an adapter.
    """

    r: int = field(default=64, metadata={"help": "Width of the bottleneck."})
    rank: int = field(default=8, metadata={"help": "Rank of both weights of an adapter."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_integer("rank", 1)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Beside every block: two adapters, or one where no stream lies between attention and MLP."""
        self._require_integer("rank", 1, backbone.width, "the backbone's width")
        self._require_integer("r", 1, backbone.width, "the backbone's width")

        def piece(block: Block, between: bool) -> Callable[[nn.Module], nn.Module]:
            enters_from = backbone.width_before if block is backbone.blocks[0] else None
            return lambda _: HighwayPiece(backbone.width, self.r, self.rank, enters_from, between)

        for block in backbone.blocks:
            between = len(block.sublayers) == 2 and block.entrances["mlp"] != block.path
            site = SideSite(reads=("between", "after") if between else ("after",), adds=True)
            yield Placement(block.path, "piece", site, piece(block, between))
