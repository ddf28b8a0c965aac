"""Houlsby's adapter."""

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
    name="houlsby",
    paper=Paper("Parameter-Efficient Transfer Learning for NLP", "ICML 2019", "1902.00751"),
    summary="a bottleneck after attention and after the MLP",
    visual_tuning="adapter: sequential",
    equation="z = x + a + f(a), a = DP(MHSA(LN1 x)); out = z + m + f'(m), m = DP(MLP(LN2 z))",
    counts=(({"r": 8}, 313_536),),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class HoulsbyConfig(VisualPeftConfig):
    """Config of Houlsby's adapter, arXiv 1902.00751.

    A bottleneck with a skip connection stands after attention and after the MLP of every block. It reads what the
    sub-layer adds to the stream, after layer scale and stochastic depth. The activation is GELU. As in the paper, both
    weights are drawn from a normal of standard deviation 0.01, cut at two deviations, and biases are zero, so it
    starts close to the identity. The paper also trains the norms; add them with `modules_to_save`.

    Args:
        r: width of the bottleneck.
        dropout: probability, in the bottleneck.
    """

    r: int = field(default=8, metadata={"help": "Width of the bottleneck."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability in the bottleneck."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_number("dropout", 0.0, below=1.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """After both sub-layers of every block."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")

        def build(_: nn.Module) -> nn.Module:
            return Bottleneck(backbone.width, self.r, self.dropout).truncated_normal()

        for block in backbone.blocks:
            yield Placement(block.path, "attention", BranchSite("attention", reads="output"), build)
            yield Placement(block.path, "mlp", BranchSite("mlp", reads="output"), build)
