"""Adapter re-composing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import Placement, Shared
from ...training.defaults import Training
from ..reparameter.rep_adapter import NORMS, norms_before


class Basis(nn.Module):
    """The matrix P (width, r) that all blocks share, Xavier-uniform."""

    def __init__(self, width: int, r: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, r))
        nn.init.xavier_uniform_(self.weight)


class ARC(nn.Module):
    """A bottleneck without activation: one shared matrix goes down and up, and is rescaled here.

        f(x) = x + dropout(x P diag(c)) P^T + b

    b is zero at the start; P is passed in the call.

    Args:
        width: channels of the token stream.
        r: width of the bottleneck.
        dropout: probability, in the bottleneck.
        zero: whether c starts at zero; else it is Xavier-uniform as a matrix of one row.
    """

    def __init__(self, width: int, r: int, dropout: float, zero: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(r))
        self.shift = nn.Parameter(torch.zeros(width))
        self.dropout = nn.Dropout(dropout)
        if not zero:
            nn.init.xavier_uniform_(self.scale.data[None])

    def forward(self, x: Tensor, basis: Basis) -> Tensor:
        """Map (..., width) to the same shape; `P` is the shared matrix."""
        return x + self.dropout(x @ (basis.weight * self.scale)) @ basis.weight.T + self.shift

    @torch.no_grad()
    def fold_input(self, weight: Tensor, bias: Tensor | None, basis: Basis) -> tuple[Tensor, Tensor]:
        """Weight and bias of the linear with ARC folded in."""
        p, scale, shift = (t.to(weight) for t in (basis.weight, self.scale, self.shift))
        addend = weight @ shift
        return weight + (weight @ p * scale) @ p.T, addend if bias is None else bias + addend


@register(
    name="arc",
    paper=Paper(
        "Efficient Adaptation of Large Vision Transformer via Adapter Re-Composing", "NeurIPS 2023", "2310.06234"
    ),
    summary="affine bottlenecks before attention and MLP, whose matrices all blocks share",
    visual_tuning="adapter: sequential",
    equation="x + sublayer(f(LN x)), f(x) = x + x P diag(c) P^T + b, one P for attention and one for the MLP",
    counts=(({"r": 50}, 96_432),),
    mergeable=True,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class ARCConfig(VisualPeftConfig):
    """Config of adapter re-composing (ARC), arXiv 2310.06234.

    A bottleneck without activation stands between each norm and the sub-layer that reads it. Its second matrix is the
    transpose of the first. All blocks share one matrix for attention and one for the MLP; each block has its own
    factors c and shifts b. The bottleneck is affine, so it folds into the projections to queries, keys and values and
    into the first linear(s) of the MLP. Where these have no bias (keys of BEiT), merging gives them one.

    As in the authors' code, c starts at zero before attention and Xavier-uniform before the MLP. So the start is the
    identity only with `sublayers="attention"`.

    Args:
        r: width of the bottleneck.
        dropout: probability, in the bottleneck.
        sublayers: before which sub-layers: `"attention"`, `"mlp"`.
    """

    r: int = field(default=50, metadata={"help": "Width of the bottleneck."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability in the bottleneck."})
    sublayers: tuple[str, ...] = field(default=tuple(NORMS), metadata={"help": "Before which: attention, mlp."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_number("dropout", 0.0, below=1.0)
        self._require_some("sublayers", NORMS)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """On the output of the norms before the chosen sub-layers of every block."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")

        def build(_: nn.Module, zero: bool) -> nn.Module:
            return ARC(backbone.width, self.r, self.dropout, zero)

        for block in backbone.blocks:
            for sublayer in self.sublayers:
                basis = Shared(sublayer, partial(Basis, backbone.width, self.r))
                for path, site in norms_before(block, sublayer):
                    yield Placement(path, "scaling", site, partial(build, zero=sublayer == "attention"), basis)
