"""Progressive visual prompts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import Placement, TokenSite
from ...training.defaults import Training
from .vpt import MAX_VIRTUAL_TOKENS, Prompts, require_consecutive


class ProgressivePrompts(Prompts):
    """New prompts, mixed with what the prompts of the block before became there.

        alpha O + (1 - alpha) dropout(P),  O: outputs of the prompts of the block before

    Args:
        num_virtual_tokens: how many.
        width: channels of the prompts.
        patch_features: input values of one patch, channels x height x width.
        dropout: probability, independent for each image.
        alpha: part of O.
    """

    def __init__(self, num_virtual_tokens: int, width: int, patch_features: int, dropout: float, alpha: float) -> None:
        super().__init__(num_virtual_tokens, width, patch_features, dropout)
        self.alpha = alpha

    def forward(self, before: Tensor) -> Tensor:  # type: ignore[override]
        """Map O, (batch, num_virtual_tokens, width), to the prompts of this block."""
        return self.alpha * before + (1.0 - self.alpha) * super().forward(len(before))


@register(
    name="provp",
    paper=Paper("Progressive Visual Prompt Learning with Contrastive Feature Re-formation", "IJCV 2024", "2304.08386"),
    summary="as VPT, with a small part of what the tokens of the block before became",
    visual_tuning="prompt: vision-driven",
    equation="x_i = [prefix; alpha O_{i-1} + (1 - alpha) P_i; patches] into block i; O: outputs of the prompts",
    counts=(({"num_virtual_tokens": 16}, 147_456),),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class ProVPConfig(VisualPeftConfig):
    """Config of progressive visual prompts (ProVP), arXiv 2304.08386.

    As VPT, but the prompts of a block keep a small part of what those of the block before became. The authors tune the
    image tower of CLIP, with a loss against its frozen features; that loss is not implemented. Prompts start as in VPT
    here. The blocks must be consecutive, and attention must read the block's sequence: no windows.

    Args:
        num_virtual_tokens: prompts per block.
        alpha: part of the earlier prompts' outputs; 0.01 in the authors' code. 0 is VPT, 1 its shallow variant.
        dropout: probability, on the new prompts.
    """

    num_virtual_tokens: int = field(default=16, metadata={"help": "Prompts a block."})
    alpha: float = field(default=0.01, metadata={"help": "Part of the outputs of the block before."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on a prompt."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("num_virtual_tokens", 1, MAX_VIRTUAL_TOKENS)
        self._require_number("alpha", 0.0)
        if self.alpha > 1:
            self._fail("alpha", "a number from 0 to 1")
        self._require_number("dropout", 0.0, below=1.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Prompts before every block."""
        blocks = backbone.blocks
        require_consecutive(self, blocks, "")
        for block in blocks:
            first = block is blocks[0]
            site = TokenSite(takes=not first, hands_on=block is not blocks[-1])
            build = partial(self._build, backbone.width, backbone.patch_features, first)
            yield Placement(block.path, "tokens", site, build)

    def _build(self, width: int, patch_features: int, first: bool, block: nn.Module) -> Prompts:
        sizes = (self.num_virtual_tokens, width, patch_features, self.dropout)
        return Prompts(*sizes) if first else ProgressivePrompts(*sizes, self.alpha)
