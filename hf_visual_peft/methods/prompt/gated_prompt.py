"""Gated prompt tuning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import LogitSite, Placement, TokenLayout, TokenSite
from ...training.defaults import Training
from .vpt import MAX_VIRTUAL_TOKENS, Prompts, require_consecutive


LEAST, MOST = 0.01, 10.0  # temperatures of the authors' code


class Gate(nn.Module):
    """How much of what a block makes of the prompts the next block gets.

        g P_out + (1 - g) P_in,  g = sigmoid(logit)

    Args:
        logit: its first value.
    """

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.full((1,), float(logit)))

    def forward(self, both: Tensor) -> Tensor:
        """Map P_in and P_out, one after the other, (batch, 2 x prompts, width), to (batch, prompts, width)."""
        entered, left = both.chunk(2, dim=1)
        return torch.lerp(entered, left, torch.sigmoid(self.logit))


class Temperature(nn.Module):
    """Divides the logits of attention, of all tokens.

    logits / tau,  tau from 0.01 to 10, 1 at the start; outside, its gradient is that at the limit
    """

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, logits: Tensor, layout: TokenLayout) -> Tensor:
        """Map (batch, heads, queries, keys) to the same shape."""
        tau = self.temperature
        return logits / (tau + (tau.clamp(LEAST, MOST) - tau).detach())


@register(
    name="gatedprompt",
    paper=Paper("Improving Visual Prompt Tuning for Self-supervised Vision Transformers", "ICML 2023", "2306.05067"),
    summary="tokens of which a gate lets a part change in each block, and temperatures of attention",
    visual_tuning="prompt: vision-driven",
    equation="P_{i+1} = g_i O_i + (1 - g_i) P_i, O: outputs of the prompts; softmax(Q K^T / (tau_i sqrt d)) V",
    counts=(({"num_virtual_tokens": 100}, 76_823),),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class GatedPromptConfig(VisualPeftConfig):
    """Config of gated prompt tuning, arXiv 2306.05067.

    One set of prompts enters the first block. After each block but the last a gate decides how much of their output
    goes on, and how much of what they were before the block; at the start nearly all of the latter. Each attention
    divides its logits by a learned temperature, for all tokens. It is made for backbones trained without labels (MAE,
    MoCo v3). The blocks must be consecutive, and attention must read the block's sequence: no windows.

    On ViT-B/16 100 prompts have 76,800 parameters, 11 gates and 12 temperatures one each. The authors' code averages
    all tokens but CLS, prompts included, before the head; here head and pooling see only the backbone's own tokens.
    Their code cuts temperatures off at the limits in every step; here the parameter may leave them, and counts as the
    limit. With temperatures, attention is computed without fused kernels, as for other methods on logits.

    Args:
        num_virtual_tokens: prompts; 100 in the paper.
        gate_init: first logit of the gates.
        temperature: whether attention has learned temperatures.
        dropout: probability, on the prompts before the first block.
    """

    num_virtual_tokens: int = field(default=100, metadata={"help": "Prompts.", "tiny": 4})
    gate_init: float = field(default=-10.0, metadata={"help": "First logit of the gates."})
    temperature: bool = field(default=True, metadata={"help": "Learn a temperature for every attention."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on a prompt."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("num_virtual_tokens", 1, MAX_VIRTUAL_TOKENS)
        self._require_number("gate_init")
        self._require_choice("temperature", (True, False))
        self._require_number("dropout", 0.0, below=1.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Prompts before the first block, a gate before each other, and a temperature in each."""
        blocks = backbone.blocks
        require_consecutive(self, blocks, "")
        sizes = (self.num_virtual_tokens, backbone.width, backbone.patch_features, self.dropout)
        for block in blocks:
            first, last = block is blocks[0], block is blocks[-1]
            site = TokenSite(takes=not first, hands_on=not last, keeps_input=not last)
            build = (lambda _: Prompts(*sizes)) if first else (lambda _: Gate(self.gate_init))
            yield Placement(block.path, "tokens", site, build)
            if self.temperature:
                yield Placement(block.path, "logits", LogitSite(), lambda _: Temperature())
