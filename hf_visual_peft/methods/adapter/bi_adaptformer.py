"""AdaptFormer with weights of a few bits."""

from __future__ import annotations

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
from .binary import BinaryWeight, packed_weights


UP_STD = 1e-3  # not 0: the levels of a matrix of zeros would all be equal
BITS = (1, 2, 4)


def binary_pair(in_features: int, out_features: int, r: int, bits: int) -> tuple[BinaryWeight, BinaryWeight]:
    """Down, Kaiming-uniform (a = sqrt 5), and up, from a normal of standard deviation 0.001 cut at two deviations."""
    down, up = torch.empty(r, in_features), torch.empty(out_features, r)
    nn.init.kaiming_uniform_(down, a=5**0.5)
    nn.init.trunc_normal_(up, std=UP_STD, a=-2 * UP_STD, b=2 * UP_STD)
    return BinaryWeight(down, bits), BinaryWeight(up, bits)


class BiAdaptFormer(nn.Module):
    """A bottleneck without biases whose weights have a few bits.

        f(x) = s * q(W_up) dropout(ReLU(q(W_down) x))

    Args:
        width: channels of the token stream.
        r: width of the bottleneck.
        bits: per weight.
        scale: s.
        dropout: probability, in the bottleneck.
    """

    def __init__(self, width: int, r: int, bits: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.down, self.up = binary_pair(width, width, r, bits)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        return self.scale * F.linear(self.dropout(F.relu(F.linear(x, self.down()))), self.up())


@register(
    name="biadaptformer",
    paper=Paper(
        "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy",
        "ICCV 2023",
        "2307.16867",
    ),
    summary="AdaptFormer with 1, 2 or 4 bits a weight",
    visual_tuning="adapter: parallel",
    equation="out = z + DP(MLP(LN2 z)) + s q(W_up) ReLU(q(W_down) z), q to 2^bits levels",
    counts=(({"r": 32, "bits": 1}, 589_824),),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class BiAdaptFormerConfig(VisualPeftConfig):
    """Config of Bi-AdaptFormer, arXiv 2307.16867.

    AdaptFormer without biases, trained so that each weight needs 1, 2 or 4 bits; the file holds these bits. Starts
    close to the identity. Training uses full-precision parameters. They are not saved, so training that resumes from a
    file starts at the quantised levels. The paper's images are not normalised.

    Args:
        r: width of the bottleneck.
        bits: per weight: 1, 2 or 4.
        scale: s, tuned per task in the paper.
        dropout: probability, in the bottleneck.
    """

    r: int = field(default=32, metadata={"help": "Width of the bottleneck."})
    bits: int = field(default=1, metadata={"help": "Bits of a weight: 1, 2 or 4."})
    scale: float = field(default=1.0, metadata={"help": "Factor s of the branch."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability in the bottleneck."})

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
        """Beside the MLP of every block, on the stream."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")

        def build(_: nn.Module) -> nn.Module:
            return BiAdaptFormer(backbone.width, self.r, self.bits, self.scale, self.dropout)

        for block in backbone.blocks:
            yield Placement(block.path, "mlp", BranchSite("mlp", reads="stream"), build)
