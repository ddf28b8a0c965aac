"""LoRA with one down projection for queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import LinearSite, Placement, Shared
from ...training.defaults import Training
from .products import plus_product


class SharedLoRA(nn.Module):
    """A low-rank update of a linear whose first factor is shared with others.

        f(y, x) = y + s B A dropout(x)

    B is zero at the start; A, as in `nn.Linear`, is passed in the call.

    Args:
        linear: the linear, for its sizes.
        r: rank.
        scale: s.
        dropout: probability, of the input.
    """

    def __init__(self, linear: nn.Linear, r: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(r, linear.out_features, bias=False)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.up.weight)

    def forward(self, y: Tensor, x: Tensor, down: nn.Linear) -> Tensor:
        """The new output (..., out_features), from the linear's output, its input (..., in_features) and A."""
        return plus_product(y, down(self.dropout(x)), self.up.weight.T, self.scale)

    @torch.no_grad()
    def fold(self, weight: Tensor, bias: Tensor | None, down: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the linear with the update folded in."""
        return weight + self.scale * (self.up.weight.to(weight) @ down.weight.to(weight)), bias


@register(
    name="sharedlora",
    paper=Paper("Neural Prompt Search", "arXiv 2022", "2206.04673"),
    summary="low-rank updates of queries, keys and values with one factor in common",
    visual_tuning="parameter: weight",
    equation="W_m + s B_m A for m = q, k, v, one A a block",
    counts=(({"r": 8}, 294_912),),
    mergeable=True,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class SharedLoRAConfig(VisualPeftConfig):
    """Config of LoRA as in NOAH (arXiv 2206.04673), where queries, keys and values share the first factor.

    LoRA (arXiv 2106.09685) gives each projection two factors A and B. NOAH's code, and later code that follows it, has
    one fused projection, so that queries, keys and values share one A and have a B each. That is as many parameters as
    LoRA on queries and values alone, but a different model. Here the update is the same whether the backbone's
    projections are fused or not. There is no alpha / r: s is the whole factor, 1 in NOAH. NOAH draws one dropout mask
    for the three projections; here, unless they are fused, each draws its own.

    Args:
        r: rank.
        scale: s.
        dropout: probability, on the projection's input before A.
    """

    r: int = field(default=8, metadata={"help": "Rank of the update."})
    scale: float = field(default=1.0, metadata={"help": "Factor s of the update."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability on the input."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_number("scale")
        self._require_number("dropout", 0.0, below=1.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At the projections to queries, keys and values of every block."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")
        build = partial(SharedLoRA, r=self.r, scale=self.scale, dropout=self.dropout)
        for block in backbone.blocks:
            down = Shared(f"down{block.index}", lambda: nn.Linear(backbone.width, self.r, bias=False))
            for path in block.modules(("query", "key", "value")):
                yield Placement(path, "up", LinearSite(), build, down)
