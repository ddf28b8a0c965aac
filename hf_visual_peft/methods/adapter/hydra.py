"""Hydra."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.registry import Paper, register
from ...core.targets import TargetedConfig
from ...sites import LinearSite, Placement
from ...training.defaults import Training


class LowRank(nn.Module):
    """Down and up with biases and only dropout between; W_down Xavier-uniform, the rest zero."""

    def __init__(self, in_features: int, out_features: int, r: int, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, r)
        self.up = nn.Linear(r, out_features)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.down.weight)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def hidden(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., r)."""
        return self.dropout(self.down(x))

    def matrix(self) -> tuple[Tensor, Tensor]:
        """Both linears as one weight (out, in) and bias (out,)."""
        return self.up.weight @ self.down.weight, self.up.weight @ self.down.bias + self.up.bias


class Hydra(nn.Module):
    """A low-rank branch beside a linear and one after it.

        y = W x + b;  f(y, x) = y + s par(x) + s seq(y)

    Args:
        linear: the linear, for its sizes.
        r: rank of each branch.
        scale: s.
        dropout: probability, in the bottleneck.
    """

    def __init__(self, linear: nn.Linear, r: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.parallel = LowRank(linear.in_features, linear.out_features, r, dropout)
        self.sequential = LowRank(linear.out_features, linear.out_features, r, dropout)
        self.scale = scale

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The new output (..., out_features), from the linear's output and its input (..., in_features)."""
        beside, after = self.parallel, self.sequential
        # both branches in one product, with s on the small matrices: separate sums would each pass over the output
        hidden = torch.cat([beside.hidden(x), after.hidden(y)], dim=-1)
        weight = self.scale * torch.cat([beside.up.weight, after.up.weight], dim=1)
        return y + F.linear(hidden, weight, self.scale * (beside.up.bias + after.up.bias))

    @torch.no_grad()
    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight and bias of the linear with Hydra folded in."""
        (parallel, parallel_bias), (sequential, sequential_bias) = (
            tuple(t.to(weight) for t in branch.matrix()) for branch in (self.parallel, self.sequential)
        )
        old_bias = weight.new_zeros(len(weight)) if bias is None else bias
        new_weight = weight + self.scale * (parallel + sequential @ weight)
        return new_weight, old_bias + self.scale * (parallel_bias + sequential @ old_bias + sequential_bias)


@register(
    name="hydra",
    paper=Paper(
        "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning",
        "Neural Networks 2024",
        "2309.06922",
    ),
    summary="low-rank branches beside and after the last linear of attention and MLP",
    visual_tuning="adapter: mix",
    equation="y = W x + b; y + s A2 B2 x + s A1 B1 y, at the attention's output projection and the last MLP linear",
    counts=(({"r": 2}, 239_712),),
    mergeable=True,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class HydraConfig(TargetedConfig):
    """Config of Hydra, arXiv 2309.06922.

    Two low-rank branches stand at the output projection of attention and at the last linear of the MLP: one reads the
    linear's input, one its output. They have no activation, so both fold into the weight. The released code merges the
    MLP's weight into the attention; here each linear gets its own.

    Args:
        r: rank of each of the two branches.
        scale: s, tuned per task in the paper.
        dropout: probability, in the bottleneck.
    """

    r: int = field(default=2, metadata={"help": "Rank of each of the two branches."})
    scale: float = field(default=1.0, metadata={"help": "Factor s of both branches."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability in the bottleneck."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_number("scale")
        self._require_number("dropout", 0.0, below=1.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At the last linear of both sub-layers."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")
        for block in backbone.blocks:
            for path in (*block.roles["output"], *block.roles["fc2"]):
                yield self._at(path)

    def _at(self, path: str) -> Placement:
        build = partial(Hydra, r=self.r, scale=self.scale, dropout=self.dropout)
        return Placement(path, "branches", LinearSite(), build)
