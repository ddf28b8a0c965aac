"""The mix-and-match adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ...core.parts import Part, PartedConfig
from ...core.registry import Paper, register
from ...training.defaults import Training
from ..adapter.adaptformer import AdaptFormerConfig
from ..prefix.prefix_tuning import PrefixConfig
from ..prompt.vpt import MAX_VIRTUAL_TOKENS


@dataclass
class ParallelConfig(AdaptFormerConfig):
    """A bottleneck beside the MLP that reads the MLP's own input, after its norm."""

    reads: ClassVar[Literal["stream", "normed"]] = "normed"


@register(
    name="mam",
    paper=Paper("Towards a Unified View of Parameter-Efficient Transfer Learning", "ICLR 2022", "2110.04366"),
    summary="prefix tuning in attention and a scaled bottleneck beside the MLP",
    visual_tuning="several",
    equation="softmax(Q [K; P_k]^T / sqrt(d_head)) [V; P_v];  out = z + MLP(n) + s W_up ReLU(W_down n), n = LN2 z",
    counts=(({}, 1_742_592),),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class MAMConfig(PartedConfig):
    """Config of the mix-and-match adapter (MAM), arXiv 2110.04366.

    Prefix tuning in attention and a scaled bottleneck beside the MLP. As in the paper, the bottleneck reads the input
    of the MLP, which in these backbones is the output of its norm; AdaptFormer's reads the stream before it. It starts
    at zero. The authors' code for language makes the prefixes by an MLP (`reparam_dim=512`; `store_prefixes` drops it
    after training) and has a bottleneck of 512; by default, prefixes here are parameters themselves, and the
    bottleneck has 64 channels.

    Args:
        num_virtual_tokens: keys, and as many values, a block; 30 in the paper.
        reparam_dim: hidden width of the MLP that makes the prefixes; None: they are parameters themselves.
        r: width of the bottleneck.
        scale: s; 4 in the paper.
        dropout: probability, on prefixes and in the bottleneck.
    """

    num_virtual_tokens: int = field(default=30, metadata={"help": "Keys, and as many values, a block.", "tiny": 3})
    reparam_dim: int | None = field(default=None, metadata={"help": "Hidden width of an MLP that makes the prefixes."})
    r: int = field(default=64, metadata={"help": "Width of the bottleneck."})
    scale: float = field(default=4.0, metadata={"help": "Factor s of the bottleneck."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on prefixes and in the bottleneck."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("num_virtual_tokens", 1, MAX_VIRTUAL_TOKENS)
        if self.reparam_dim is not None:
            self._require_integer("reparam_dim", 1, 100_000)
        self._require_integer("r", 1)
        self._require_number("scale")
        self._require_number("dropout", 0.0, below=1.0)

    def adapter_parts(self) -> Sequence[Part]:
        """Prefixes, and the bottleneck."""
        prefix = PrefixConfig(
            num_virtual_tokens=self.num_virtual_tokens, reparam_dim=self.reparam_dim, dropout=self.dropout
        )
        mlp = ParallelConfig(r=self.r, scale=self.scale, dropout=self.dropout)
        return self._part("prefix", prefix), self._part("mlp", mlp)
