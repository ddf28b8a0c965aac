"""Attention prompt tuning."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ...backbones.backbone import Block, VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import KeyValueSite, Placement
from ...training.defaults import Training
from ..prompt.vpt import MAX_VIRTUAL_TOKENS
from .prefix_tuning import attending, heads_in


class AttentionPrompts(nn.Module):
    """Learned keys and values of one head, which all heads of a block have in common.

        K'_h = [K_h; dropout(max(s_k, 1) P_k)],  V'_h = [V_h; dropout(max(s_v, 1) P_v)]

    P ~ U(-v, v), v = sqrt(6 / (patch_features + channels of a head)); s is one number a prompt that starts at 1.

    Args:
        num_virtual_tokens: how many keys, and as many values.
        heads: of the attention's keys.
        widths: channels of a head in keys and in values.
        patch_features: elements of one patch, channels x height x width.
        dropout: probability, for each element of each image.
        scaled: whether there are s.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        heads: int,
        widths: tuple[int, int],
        patch_features: int,
        dropout: float,
        scaled: bool,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.keys, self.values = (_drawn(num_virtual_tokens, width, patch_features) for width in widths)
        self.key_scale, self.value_scale = (
            nn.Parameter(torch.ones(num_virtual_tokens)) if scaled else None for _ in range(2)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Keys and values, (batch, heads, num_virtual_tokens, channels of a head) each."""
        return (
            self._of_all_heads(self.keys, self.key_scale, batch_size),
            self._of_all_heads(self.values, self.value_scale, batch_size),
        )

    @torch.no_grad()
    def randomise(self) -> None:
        """Take random factors to where they count."""
        for scale in (self.key_scale, self.value_scale):
            if scale is not None:
                scale.copy_(1.0 + (scale - 1.0).abs())

    def _of_all_heads(self, prompts: Tensor, scale: Tensor | None, batch_size: int) -> Tensor:
        scaled = prompts if scale is None else prompts * scale.clamp(min=1.0).unsqueeze(-1)
        dropped = self.dropout(scaled.expand(batch_size, -1, -1))
        return dropped.unsqueeze(1).expand(-1, self.heads, -1, -1)


def _drawn(tokens: int, width: int, patch_features: int) -> nn.Parameter:
    bound = math.sqrt(6.0 / (patch_features + width))
    return nn.Parameter(torch.empty(tokens, width).uniform_(-bound, bound))


@register(
    name="apt",
    paper=Paper("Attention Prompt Tuning: Parameter-efficient Adaptation", "FG 2024", "2403.06978"),
    summary="learned keys and values of one head in every attention, which its heads have in common",
    visual_tuning="prompt: vision-driven",
    equation="softmax(Q_h [K_h; max(s_k, 1) P_k]^T / sqrt(d_head)) [V_h; max(s_v, 1) P_v], one P for all heads h",
    counts=(({"num_virtual_tokens": 100}, 156_000), ({"num_virtual_tokens": 2}, 3_120)),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class APTConfig(VisualPeftConfig):
    """Config of attention prompt tuning (APT), arXiv 2403.06978.

    Every attention gets learned keys and values with the channels of one head, which all heads of a block have in
    common. A factor for each prompt counts where it is above 1; below, it has no gradient, as in the authors' code.
    The prompts have no position and are the same in every window. The authors train VideoMAE on videos; their bound of
    the start counts one frame of a patch, and so it is on images here.

    Args:
        num_virtual_tokens: keys, and as many values, a block; the paper has 1 to 400.
        dropout: probability of dropping an element of a prompt; 0.1 in the authors' code.
        scaled: whether each prompt has a factor.
    """

    num_virtual_tokens: int = field(default=100, metadata={"help": "Keys, and as many values, a block."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability on a prompt."})
    scaled: bool = field(default=True, metadata={"help": "Whether each prompt has a factor."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("num_virtual_tokens", 1, MAX_VIRTUAL_TOKENS)
        self._require_number("dropout", 0.0, below=1.0)
        self._require_choice("scaled", (True, False))

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """In the attention of every block that has one."""
        for block in attending(backbone):
            build = partial(self._build, block, backbone.patch_features)
            yield Placement(block.path, "prompts", KeyValueSite(), build)

    def _build(self, block: Block, patch_features: int, module: nn.Module) -> AttentionPrompts:
        heads, *widths = heads_in(block, module)
        return AttentionPrompts(
            self.num_virtual_tokens, heads, (widths[0], widths[1]), patch_features, self.dropout, self.scaled
        )
