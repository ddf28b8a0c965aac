"""AdaptFormer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BranchSite, Placement
from ...training.defaults import Training


class AdaptFormer(nn.Module):
    """A bottleneck beside the MLP.

        f(z) = s (W_up dropout(ReLU(W_down z + b_down)) + b_up)

    W_down is Kaiming-uniform (a = sqrt 5), the rest zero, so f starts at zero.

    Args:
        width: channels of the token stream.
        r: width of the bottleneck.
        scale: s, or `"learnable"`: one number that starts at 1.
        dropout: probability, in the bottleneck.
        layer_norm: `"in"` before W_down, `"out"` after the scaling, or `"none"`.
    """

    def __init__(
        self, width: int, r: int, scale: float | Literal["learnable"], dropout: float, layer_norm: str
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width, r)
        self.up = nn.Linear(r, width)
        self.scale = nn.Parameter(torch.ones(1)) if scale == "learnable" else scale
        self.dropout = nn.Dropout(dropout)
        self.norm_in = nn.LayerNorm(width) if layer_norm == "in" else None
        self.norm_out = nn.LayerNorm(width) if layer_norm == "out" else None
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, z: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        z = z if self.norm_in is None else self.norm_in(z)
        delta = self.scale * self.up(self.dropout(F.relu(self.down(z))))
        return delta if self.norm_out is None else self.norm_out(delta)


@register(
    name="adaptformer",
    paper=Paper(
        "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", "NeurIPS 2022", "2205.13535"
    ),
    summary="a bottleneck beside every MLP",
    visual_tuning="adapter: parallel",
    equation="out = z + DP(MLP(LN2 z)) + s (W_up ReLU(W_down z))",
    counts=(({"r": 64}, 1_189_632), ({"r": 8}, 156_768)),
    mergeable=False,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class AdaptFormerConfig(VisualPeftConfig):
    """Config of AdaptFormer, arXiv 2205.13535.

    A bottleneck beside the MLP of every block. It reads the stream before the norm and is added after the block's
    layer scale and stochastic depth, which do not act on it. Some ports normalise its input and set s = 1; that is
    another method (`layer_norm="in"`, `scale=1.0`).

    Args:
        r: width of the bottleneck; 64 in the paper, 8 for VTAB.
        scale: s, or `"learnable"`: one number a block that starts at 1.
        dropout: probability, in the bottleneck.
        layer_norm: a norm of the adapter's own on its input (`"in"`), on its output (`"out"`), or none.
    """

    reads: ClassVar[Literal["stream", "normed"]] = "stream"

    r: int = field(default=64, metadata={"help": "Width of the bottleneck."})
    scale: float | str = field(default=0.1, metadata={"help": 'Factor s of the branch, or "learnable".'})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability in the bottleneck."})
    layer_norm: str = field(default="none", metadata={"help": "The adapter's own norm: none, in, or out."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_number_or("scale", "learnable")
        self._require_number("dropout", 0.0, below=1.0)
        self._require_choice("layer_norm", ("none", "in", "out"))

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Beside the MLP of every block."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")
        for block in backbone.blocks:
            yield Placement(
                block.path,
                "mlp",
                BranchSite("mlp", reads=self.reads),
                lambda _: AdaptFormer(backbone.width, self.r, self.scale, self.dropout, self.layer_norm),  # type: ignore[arg-type]
            )
