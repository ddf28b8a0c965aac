"""MLAE."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import LINEAR_ROLES, VisionBackbone
from ...core.registry import Paper, register
from ...core.targets import TargetedConfig
from ...sites import LinearSite, Placement
from ...training.defaults import Training
from .products import plus_product


class MLAE(nn.Module):
    """A low-rank update of a linear as a sum of experts of rank one, of which training masks some.

        f(y, x) = y + sum_k m_k b_k (a_k . dropout(x)),  m = dropout_experts(lambda)

    A is Kaiming-uniform (a = sqrt 5), B zero, lambda the scale. One mask is drawn for a call.

    Args:
        linear: the linear, for its sizes.
        r: number of experts.
        scale: of lambda at the start.
        expert_dropout: probability of masking an expert.
        dropout: probability, of the input.
    """

    def __init__(self, linear: nn.Linear, r: int, scale: float, expert_dropout: float, dropout: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(r, linear.in_features))
        self.up = nn.Parameter(torch.zeros(r, linear.out_features))
        self.weights = nn.Parameter(torch.full((r,), float(scale)))
        self.masked = nn.Dropout(expert_dropout)
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The new output (..., out_features), from the linear's output and its input (..., in_features)."""
        return plus_product(y, F.linear(self.dropout(x), self.down) * self.masked(self.weights), self.up)

    @torch.no_grad()
    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the linear with all experts folded in."""
        down, up, weights = (t.to(weight) for t in (self.down, self.up, self.weights))
        return weight + (up.T * weights) @ down, bias


@register(
    name="mlae",
    paper=Paper("MLAE: Masked LoRA Experts for Visual Parameter-Efficient Fine-Tuning", "arXiv 2024", "2405.18897"),
    summary="LoRA as weighted experts of rank one, which training masks at random",
    visual_tuning="parameter: weight",
    equation="W + sum_k lambda_k b_k a_k^T, experts of rank one, of which training masks some",
    # queries and values: 24 linears with (768 + 768 + 1) 8; all: 4 with these, 2 with (768 + 3072 + 1) 8 a block
    counts=(({"r": 8}, 295_104), ({"r": 8, "roles": LINEAR_ROLES}, 1_327_680)),
    mergeable=True,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class MLAEConfig(TargetedConfig):
    """Config of masked LoRA experts (MLAE), arXiv 2405.18897.

    LoRA whose update is a sum of matrices of rank one, each with a learned weight. In training each of them is left
    out with some probability, and the others are scaled up: dropout on the weights, one draw for the whole batch.
    There is no division by r. The released code (jie040109/MLAE, mlae.py) holds one linear and leaves to its user
    which linears get one, and how often experts are masked; both defaults here are our choice.

    Args:
        r: number of experts.
        roles: linears that get an update: one or more of `"query"`, `"key"`, `"value"`, `"output"`, `"fc1"`, `"fc2"`.
        scale: weight of each expert at the start.
        expert_dropout: probability of leaving an expert out in a training step.
        dropout: probability, on the input.
    """

    r: int = field(default=8, metadata={"help": "Number of experts of rank one."})
    roles: tuple[str, ...] = field(default=("query", "value"), metadata={"help": "Linears that get an update."})
    scale: float = field(default=1.0, metadata={"help": "Weight of each expert at the start."})
    expert_dropout: float = field(default=0.5, metadata={"help": "Probability of masking an expert in training."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the input."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_some("roles", LINEAR_ROLES)
        self._require_number("scale")
        self._require_number("expert_dropout", 0.0, below=1.0)
        self._require_number("dropout", 0.0, below=1.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At the chosen linears of every block."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")
        for path in backbone.modules(self.roles):
            yield self._at(path)

    def _at(self, path: str) -> Placement:
        build = partial(MLAE, r=self.r, scale=self.scale, expert_dropout=self.expert_dropout, dropout=self.dropout)
        return Placement(path, "experts", LinearSite(), build)
