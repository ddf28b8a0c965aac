"""Pfeiffer's adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BranchSite, Placement
from ...training.defaults import Training
from .bottleneck import Bottleneck


@register(
    name="pfeiffer",
    paper=Paper("MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer", "EMNLP 2020", "2005.00052"),
    summary="a bottleneck after the MLP",
    visual_tuning="adapter: sequential",
    equation="out = z + m + f(m), m = DP(MLP(LN2 z))",
    counts=(({"r": 8}, 156_768),),
    mergeable=False,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class PfeifferConfig(VisualPeftConfig):
    """Config of Pfeiffer's adapter, arXiv 2005.00052, in the form it has in vision (VPT's and NOAH's "Adapter").

    A bottleneck with a skip connection stands after the MLP of every block. The activation is GELU; W_down is
    Kaiming-uniform (a = sqrt 5), W_up and the biases are zero. (Vision code that starts both weights from zero only
    ever trains the last bias.) The adapter reads what the MLP adds to the stream, after layer scale and stochastic
    depth. VPT's code adapts before stochastic depth, which differs only in training, and only where the block has
    stochastic depth.

    Args:
        r: width of the bottleneck; VPT tunes it, 8 to 256.
        dropout: probability, in the bottleneck.
    """

    r: int = field(default=8, metadata={"help": "Width of the bottleneck."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability in the bottleneck."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_number("dropout", 0.0, below=1.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """After the MLP of every block."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")

        def build(_: nn.Module) -> nn.Module:
            equation = Bottleneck(backbone.width, self.r, self.dropout)
            nn.init.zeros_(equation.up.weight)
            return equation

        for block in backbone.blocks:
            yield Placement(block.path, "mlp", BranchSite("mlp", reads="output"), build)
