"""LoRA with weights of a few bits."""

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
from ..adapter.bi_adaptformer import BITS, binary_pair
from ..adapter.binary import packed_weights
from .products import plus_product


class BiLoRA(nn.Module):
    """A low-rank update of a linear whose factors have a few bits.

        f(y, x) = y + s * q(B) dropout(q(A) x)

    A quantised B cannot be zero. Where the start must be the identity, a gate g that starts at zero multiplies s, and
    B is drawn as A is. The gate does not widen the set of possible updates: c q(B) = q(c B).

    Args:
        linear: the linear, for its sizes.
        r: rank.
        bits: per weight.
        scale: s.
        dropout: probability, between the factors.
        gated: whether the gate g is there.
    """

    def __init__(
        self, linear: nn.Linear, r: int, bits: int, scale: float, dropout: float = 0.0, gated: bool = False
    ) -> None:
        super().__init__()
        self.down, self.up = binary_pair(linear.in_features, linear.out_features, r, bits)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.gate = nn.Parameter(torch.zeros(1)) if gated else None
        if gated:
            nn.init.kaiming_uniform_(self.up.weight, a=5**0.5)
            self.up.randomise()

    def factor(self) -> Tensor | float:
        """s, or g s."""
        return self.scale if self.gate is None else self.gate * self.scale

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The new output (..., out_features), from the linear's output and its input (..., in_features)."""
        return plus_product(y, self.factor() * self.dropout(F.linear(x, self.down())), self.up().T)

    @torch.no_grad()
    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the linear with the update folded in."""
        return weight + (self.factor() * (self.up() @ self.down())).to(weight), bias


@register(
    name="bilora",
    paper=Paper(
        "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy",
        "ICCV 2023",
        "2307.16867",
    ),
    summary="low-rank updates of queries and values with 1, 2 or 4 bits a weight",
    visual_tuning="parameter: weight",
    equation="y = W x + b + s q(B) q(A) x at queries and values, q to 2^bits levels",
    counts=(({"r": 32, "bits": 1}, 1_179_648),),
    mergeable=True,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class BiLoRAConfig(TargetedConfig):
    """Config of Bi-LoRA, arXiv 2307.16867.

    LoRA on queries and values, trained so that its factors need 1, 2 or 4 bits per element; the file holds these bits.
    Starts close to the identity. A fused projection is updated as a whole, keys included. Training uses full-precision
    parameters. They are not saved, so training that resumes from a file starts at the quantised levels. The paper's
    images are not normalised. With `target_modules` each linear has one extra parameter, a gate that is zero at the
    start, so that it starts as the identity.

    Args:
        r: rank.
        bits: per weight: 1, 2 or 4.
        scale: s, tuned per task in the paper.
        dropout: probability, between the factors; 0.1 in the authors' code.
    """

    r: int = field(default=32, metadata={"help": "Rank."})
    bits: int = field(default=1, metadata={"help": "Bits of a weight: 1, 2 or 4."})
    scale: float = field(default=1.0, metadata={"help": "Factor s of the update."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability between the factors."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_choice("bits", BITS)
        self._require_number("scale")
        self._require_number("dropout", 0.0, below=1.0)

    def trained_parameters(self, name: str, shape: tuple[int, ...]) -> int:
        """How many weights a tensor of the file stands for, without the padding of the last byte."""
        packed = packed_weights(name, shape, self.bits)
        return super().trained_parameters(name, shape) if packed is None else packed

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Beside the query and value projections of every block, or the MLP's linears where it has no attention."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")
        for block in backbone.blocks:
            for path in block.modules(("query", "value")) or block.modules(("fc1", "fc2")):
                yield self._at(path)

    def _at(self, path: str) -> Placement:
        gated = self.target_modules is not None
        build = partial(BiLoRA, r=self.r, bits=self.bits, scale=self.scale, dropout=self.dropout, gated=gated)
        return Placement(path, "update", LinearSite(), build)
