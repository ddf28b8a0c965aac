"""Cross visual prompt tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BranchSite, Placement
from ...sites.block_sites import Reads
from ...training.defaults import Training
from .vpt import MAX_VIRTUAL_TOKENS


_PLACES: dict[str, tuple[str, Reads]] = {
    "before": ("attention", "input"),
    "between": ("attention", "sum"),
    "after": ("mlp", "sum"),
}


class CrossPrompts(nn.Module):
    """Attention of the stream to learned tokens.

        f(x) = W_o softmax(W_q x (W_k P')^T / sqrt(d_head)) W_v P',  P' = dropout(P)

    W are the projections of the block's own attention, with their biases.
    P ~ U(-v, v), v = sqrt(6 / ((tokens + blocks) width)).

    Args:
        num_virtual_tokens: how many.
        width: channels of the stream.
        blocks: how many blocks have such tokens.
        dropout: probability, independent for each image.
    """

    def __init__(self, num_virtual_tokens: int, width: int, blocks: int, dropout: float) -> None:
        super().__init__()
        bound = math.sqrt(6.0 / ((num_virtual_tokens + blocks) * width))
        self.prompts = nn.Parameter(torch.empty(num_virtual_tokens, width).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cross: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        prompts = self.prompts.unsqueeze(0)
        if self.training and self.dropout.p > 0:  # else they are the same for all images
            prompts = self.dropout(prompts.expand(len(x), -1, -1))
        return cross(x, prompts)


@register(
    name="cvpt",
    paper=Paper("CVPT: Cross Visual Prompt Tuning", "ICCV 2025", "2408.14961"),
    summary="learned tokens to which the stream attends apart, by the projections of the block's own attention",
    visual_tuning="prompt: vision-driven",
    equation="z_i = z_i + W_o softmax(W_q z_i (W_k P_i)^T / sqrt(d_head)) W_v P_i after attention, W the block's own",
    counts=(({"num_virtual_tokens": 10}, 92_160),),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class CVPTConfig(VisualPeftConfig):
    """Config of cross visual prompt tuning (CVPT), arXiv 2408.14961.

    The stream attends to learned tokens by the projections of the block's own attention, which stay frozen. So tokens
    of the image do not compete with prompts, and the cost grows linearly with their number. Neither side passes a norm
    before; there is no position, mask, window or layer scale. The authors keep frozen copies of all projections; here
    the block's own are used, as they are without adapters at them. An adapter that was merged into them counts.

    The block's attention must be plain softmax attention of its projections: where it compares directions (Swin v2) or
    reads a map, the method is refused. Not the identity at the start.

    Args:
        num_virtual_tokens: prompts per block; the paper tunes it.
        place: where the result is added: `"before"` attention, `"between"` attention and MLP (the authors' default),
            or `"after"` the MLP. Their two places inside the sub-layers are not implemented.
        dropout: probability, on the prompts.
    """

    num_virtual_tokens: int = field(default=10, metadata={"help": "Prompts a block."})
    place: str = field(
        default="between", metadata={"help": "'before' attention, 'between' attention and MLP, or 'after' the MLP."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on a prompt."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("num_virtual_tokens", 1, MAX_VIRTUAL_TOKENS)
        self._require_choice("place", tuple(_PLACES))
        self._require_number("dropout", 0.0, below=1.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """In every block with attention."""
        blocks = [block for block in backbone.blocks if block.projections and block.roles["output"]]
        sublayer, reads = _PLACES[self.place]
        sizes = (self.num_virtual_tokens, backbone.width, len(blocks), self.dropout)
        for block in blocks:
            site = BranchSite(sublayer, reads=reads, crosses=True)  # type: ignore[arg-type]
            yield Placement(block.path, "cross", site, lambda _: CrossPrompts(*sizes))
