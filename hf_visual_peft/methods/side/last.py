"""Low-rank attention side-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import Block, VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BlockView, Placement, SideSite
from ...training.defaults import Training


class LowRankAttention(nn.Module):
    """Self-attention of one head among tokens of few channels.

        LSA(u) = W_up softmax(Q K^T / sqrt r) V + b_up,  (Q, K, V) = W_qkv (W_down LN(u) + b_down) + b_qkv

    W_up and b_up start at zero. Padding is hidden from all tokens.

    Args:
        width: channels of u.
        r: channels of Q, K and V.
    """

    def __init__(self, width: int, r: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, r)
        self.qkv = nn.Linear(r, 3 * r)
        self.up = nn.Linear(r, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, u: Tensor, seen: Tensor | None = None) -> Tensor:
        """Map (batch, tokens, width) to the same shape; `seen` is False for padding, (batch or 1, tokens)."""
        query, key, value = self.qkv(self.down(self.norm(u))).unsqueeze(1).chunk(3, dim=-1)
        mask = None if seen is None else seen[:, None, None, :]
        return self.up(F.scaled_dot_product_attention(query, key, value, attn_mask=mask).squeeze(1))


class SidePiece(nn.Module):
    """The piece of the side network beside one block.

        c <- c + z;  s <- s + LSA(s + c)

    z is the block's input, or its output if it pools tokens itself. c is the sum of z over the blocks of the stage,
    and s the sum of the attentions' outputs so far, so u = s + c. Between pieces of a stage the state is [s, c] along
    the channels; after a stage it is s.

    Args:
        width: channels of u.
        r: of the attention.
        enters_from: channels of s in the stage before, which a linear maps to those of this stage; None without a
            linear.
        ends: whether this is the last piece of its stage.
    """

    def __init__(self, width: int, r: int, enters_from: int | None, ends: bool) -> None:
        super().__init__()
        self.ends = ends
        self.enter = nn.Linear(enters_from, width, bias=False) if enters_from else None
        self.attention = LowRankAttention(width, r)

    def forward(self, state: Tensor | None, view: BlockView) -> tuple[Tensor, None]:
        """Map the state, (batch, tokens, 2 width or `enters_from`), None at the start, to the new one."""
        z = view.after if view.before is None else view.before
        assert z is not None
        s, c = None, torch.zeros_like(z)
        if state is not None and self.enter is not None:
            s = self.enter(state)
        elif state is not None:
            s, c = state.chunk(2, dim=-1)
            c = c.detach()  # it has no gradient, so autograd need not compute zeros for it
        read = c + z
        added = self.attention(read if s is None else s + read, view.seen)
        s = added if s is None else s + added
        # a block's output is the next one's input, and is counted there
        return (s if self.ends else torch.cat([s, c if view.before is None else read], dim=-1)), None


@register(
    name="last",
    paper=Paper(
        "Low-rank Attention Side-Tuning for Parameter-Efficient Fine-Tuning", "arXiv preprint 2024", "2402.04009"
    ),
    summary="low-rank attention blocks beside the backbone",
    visual_tuning="adapter: parallel",
    equation="u_i = u_{i-1} + LSA_i(u_{i-1}) + z_i, u_0 = z_0; out = u_m - sum_{i<m} z_i = z_m + sum_i LSA_i(u_{i-1})",
    counts=(({}, 655_872), ({"r": 16}, 332_544)),
    mergeable=False,
    identity_at_start=True,
    gradients="none",
    training=Training(3e-3),
)
@dataclass
class LASTConfig(VisualPeftConfig):
    """Config of low-rank attention side-tuning (LAST), arXiv 2402.04009.

    A stack of self-attentions among tokens of few channels, without MLPs, stands beside the backbone and reads the
    input of each block. The sum of their outputs is added to the output of the last block. No gradient crosses the
    backbone.

    The authors have no public code. From the paper's abstract and summaries: attention in r channels between two
    projections, no MLP, a frozen backbone, and the bias correction: the representation is u_m - sum_{i<m} z_i. Our
    reading: z_0 are the embedded tokens, z_i is the output of block i of m, and u_i is as in the equation, so that the
    correction leaves z_m plus the outputs of the attentions. r = 32 with biases, a LayerNorm before and one projection
    to r channels gives 655,872 parameters on ViT-B/16; the paper reports 0.66 M. We also chose one head, and a start
    at zero, so that a fresh network changes nothing.

    In hierarchical backbones u restarts in each stage with the stage's input, plus the additions of the stages before,
    averaged over the cells that are merged and mapped to the new width by a trained linear without bias. These linears
    come on top of the figure above.

    Args:
        r: channels of query, key and value.
    """

    r: int = field(default=32, metadata={"help": "Channels of query, key and value."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Beside every block."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")
        first, last = backbone.blocks[0], backbone.blocks[-1]

        def piece(block: Block) -> Callable[[nn.Module], nn.Module]:
            enters_from = backbone.width_before if block is first else None
            return lambda _: SidePiece(backbone.width, self.r, enters_from, block is last)

        for block in backbone.blocks:
            site = SideSite(reads=("after",) if block.pools else ("before",), adds=True, needs_mask=True)
            yield Placement(block.path, "piece", site, piece(block))
