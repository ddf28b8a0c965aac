"""SHERL."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BlockView, Placement
from ...training.defaults import Training
from .unipt import EPS, Collected, collecting


TEMPERATURE = 0.1  # of the gate
NORM_EPS = 1e-12


class SHERL(Collected):
    """The last piece: for each token, its states after all blocks, weighed by use and redundancy.

        r_i = sum_j relu(cos(u_i, u_j));  a_i = relu(W_g (u_i * u_L) + b_g) / r_i, divided by their sum
        out = dropout(LN(W relu(u_L + sum_i a_i u_i) + b)) + tanh(g / 0.1) h_L

    i and j count the blocks before the last. g is zero at the start, so that h_L, the block's own output, is off.

    Args:
        width: channels of the stream.
        r: channels of its reduced form.
        dropout: probability, on what is added to h_L.
        first: whether the stream before the block is collected, too.
    """

    def __init__(self, width: int, r: int, dropout: float, first: bool) -> None:
        super().__init__(width, r, first)
        self.r = r
        self.use = nn.Linear(r, 1)
        self.gate = nn.Parameter(torch.zeros(1))
        self.up = nn.Linear(r, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, state: Tensor | None, view: BlockView) -> tuple[Tensor, None]:
        """Map the state to what replaces the block's output, (batch, tokens, width)."""
        assert view.after is not None
        states = self.collect(state, view).unflatten(-1, (-1, self.r))
        others, guide = states[..., :-1, :], states[..., -1:, :]
        normed = others / (others.square().sum(dim=-1, keepdim=True).sqrt() + EPS)
        redundancy = F.relu(normed @ normed.mT).sum(dim=-1, keepdim=True)
        shares = F.relu(self.use(others * guide)) / redundancy
        shares = shares / (shares.sum(dim=-2, keepdim=True) + EPS)
        mixed = ((shares * others).sum(dim=-2, keepdim=True) + guide).squeeze(-2)
        out = self.dropout(self.norm(self.up(F.relu(mixed))))
        return out + torch.tanh(self.gate / TEMPERATURE) * view.after, None


@register(
    name="sherl",
    paper=Paper(
        "SHERL: Synthesizing High Accuracy and Efficient Memory for Resource-Limited Transfer Learning",
        "ECCV 2024",
        "2407.07523",
    ),
    summary="the states of a token after all blocks, weighed by use and redundancy; replaces the last",
    visual_tuning="adapter: parallel",
    equation="out = LN(W relu(u_L + sum_i a_i u_i)) + tanh(g / 0.1) h_L, a_i: use over redundancy, u_i = LN(W_i h_i)",
    counts=(({"r": 384}, 3_850_370),),
    mergeable=False,
    identity_at_start=False,
    gradients="none",
    training=Training(3e-3),
)
@dataclass
class SHERLConfig(VisualPeftConfig):
    """Config of SHERL, arXiv 2407.07523.

    The outputs of all blocks are reduced to few channels. For each token, those of the blocks before the last are
    weighed: the more they serve the last one and the less they repeat each other. What comes out, normalised, replaces
    the output of the last block, to which a gate adds that output itself. The gate starts at zero, as in the authors'
    code, so a fresh adapter is not the identity. No gradient crosses the backbone.

    The authors (Paranioar/SHERL, VSE-infty/lib/adapter_for_transformer.py) tune encoders for retrieval, some of which
    run their last blocks with gradients; here all blocks are frozen, and the result goes to the backbone's final norm
    and head. In hierarchical backbones, outputs of earlier stages are averaged over the cells that are merged, which
    is our generalisation.

    Args:
        r: channels of the reduced outputs.
        dropout: probability, on what is added to the block's own output.
    """

    r: int = field(default=384, metadata={"help": "Channels of the reduced outputs.", "tiny": 7})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability on the result."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1, 10_000)
        self._require_number("dropout", 0.0, below=1.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Beside every block."""

        def last(first: bool) -> nn.Module:
            return SHERL(backbone.width, self.r, self.dropout, first)

        for block, site, build in collecting(backbone, last, self.r, inputs=False):
            yield Placement(block.path, "piece", site, build)
