"""Parallel attention and a bottleneck beside the MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...core.parts import Part, PartedConfig
from ...core.registry import register
from ...training.defaults import Training
from ..prefix.patt import PAPER, PATTConfig
from .mam import ParallelConfig


@register(
    name="bapat",
    paper=PAPER,
    summary="PATT, and a scaled bottleneck beside the MLP",
    visual_tuning="several",
    equation="PATT on keys and values;  out = z + MLP(n) + s W_up ReLU(W_down n), n = LN2 z",
    counts=(({}, 2_093_184),),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class BAPATConfig(PartedConfig):
    """Config of BAPAT of V-PETL, arXiv 2210.00788.

    PATT at keys and values, and a bottleneck as AdaptFormer's beside the MLP, which reads the MLP's own input, after
    the norm, and starts at zero. In the authors' code the bottleneck is inside the MLP, so that the block's stochastic
    depth drops both, and its dropout is the MLP's; here stochastic depth does not act on it.

    Args:
        attention_r: width of the bottleneck beside the projections.
        attention_scale: factor of the offsets.
        r: width of the bottleneck beside the MLP.
        scale: its factor; 0.1 in the authors' code.
        dropout: probability, in the bottleneck beside the MLP.
    """

    attention_r: int = field(default=32, metadata={"help": "Width of the bottleneck at keys and values.", "tiny": 4})
    attention_scale: float = field(default=0.8, metadata={"help": "Factor of the offsets of keys and values."})
    r: int = field(default=64, metadata={"help": "Width of the bottleneck beside the MLP."})
    scale: float = field(default=0.1, metadata={"help": "Factor of the bottleneck beside the MLP."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability in the bottleneck beside the MLP."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("attention_r", 1)
        self._require_integer("r", 1)
        self._require_number("attention_scale")
        self._require_number("scale")
        self._require_number("dropout", 0.0, below=1.0)

    def adapter_parts(self) -> Sequence[Part]:
        """PATT, and the bottleneck."""
        patt = PATTConfig(r=self.attention_r, scale=self.attention_scale)
        mlp = ParallelConfig(r=self.r, scale=self.scale, dropout=self.dropout)
        return self._part("patt", patt, r="attention_r", scale="attention_scale"), self._part("mlp", mlp)
