"""The three adapters of LAE: prefixes, bottlenecks and low-rank updates in the first blocks."""

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
from ...sites import BranchSite, KeyValueSite, LinearSite, Placement
from ...training.defaults import Training
from ..adapter.bottleneck import Bottleneck
from ..prompt.vpt import MAX_VIRTUAL_TOKENS
from ..reparameter.low_rank import LowRank
from ..reparameter.rows import projections
from .prefix_tuning import attending, heads_in


PAPER = Paper(
    "A Unified Continual Learning Framework with General Parameter-Efficient Tuning", "ICCV 2023", "2303.10070"
)
BLOCKS = 5  # of the paper
PREFIX_BOUND = 0.01


class ScaledPrefixes(nn.Module):
    """Learned keys and values of one block, each with a factor.

        s_k P_k,  s_v P_v,  P ~ U(0, 0.01), s = 1 at the start

    Args:
        num_virtual_tokens: how many keys, and as many values.
        heads: of the attention's keys.
        widths: channels of a head in keys and in values.
    """

    def __init__(self, num_virtual_tokens: int, heads: int, widths: tuple[int, int]) -> None:
        super().__init__()
        self.heads = heads
        self.keys, self.values = (
            nn.Parameter(torch.empty(num_virtual_tokens, heads * width).uniform_(0.0, PREFIX_BOUND))
            for width in widths
        )
        self.key_scale, self.value_scale = (nn.Parameter(torch.ones(1)) for _ in range(2))

    def forward(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Keys and values, (batch, heads, num_virtual_tokens, channels of a head) each."""
        return self._heads(self.key_scale * self.keys, batch_size), self._heads(
            self.value_scale * self.values, batch_size
        )

    def _heads(self, prefix: Tensor, batch_size: int) -> Tensor:
        return prefix.expand(batch_size, -1, -1).unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ScaledBottleneck(Bottleneck):
    """A bottleneck with a factor.

        f(x) = s (W_up GELU(W_down x + b_down) + b_up)

    W_down is Kaiming-uniform (a = sqrt 5), W_up and the biases are zero, s is 1.

    Args:
        width: channels of the token stream.
        r: width of the bottleneck.
    """

    def __init__(self, width: int, r: int) -> None:
        super().__init__(width, r)
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        return self.scale * super().forward(x)


@dataclass
class LAEBase(VisualPeftConfig):
    """Base of the configs of LAE's adapters.

    Args:
        depth: in how many of the first blocks they stand, unless `layers_to_transform` names blocks; 5 in the paper.
    """

    depth: int = field(default=BLOCKS, metadata={"help": "In how many of the first blocks it stands."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("depth", 1)
        if self.layers is not None:
            self._require_unset("depth", "where layers_to_transform names blocks")

    def _within(self, blocks: Iterable[Block], backbone: VisionBackbone) -> list[Block]:
        self._require_integer("depth", 1, max(BLOCKS, backbone.depth), "the backbone's blocks, or the paper's 5")
        return [block for block in blocks if self.layers is not None or block.index < self.depth]


@register(
    name="laeprefix",
    paper=PAPER,
    summary="keys and values in the first five attentions, with a softmax of their own",
    visual_tuning="prompt: vision-driven",
    equation="A + softmax(Q P_k^T / sqrt(d_head)) P_v, A: of attention to [K; s_k P_k] what falls on V, P <- s P",
    counts=(({}, 76_810),),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class LAEPrefixConfig(LAEBase):
    """Config of the prefixes of LAE (learning, accumulation, ensemble), arXiv 2303.10070.

    The first five attentions get learned keys and values, each times a factor that trains. With `compensated`, as in
    the authors' code, the weights that fall on prefixes are divided by their sum, so that prefixes learn as fast as
    other adapters; what falls on the other tokens stays. They start close to zero, so the output is close to that of
    the backbone.

    LAE itself is a way of continual learning around such adapters: a moving average of them is kept, and the larger
    of both probabilities counts. That is for the training loop and is not implemented.

    Args:
        num_virtual_tokens: keys, and as many values, a block.
        compensated: whether prefixes have a softmax of their own.
    """

    num_virtual_tokens: int = field(default=10, metadata={"help": "Keys, and as many values, a block.", "tiny": 3})
    compensated: bool = field(default=True, metadata={"help": "Whether prefixes have a softmax of their own."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("num_virtual_tokens", 1, MAX_VIRTUAL_TOKENS)
        self._require_choice("compensated", (True, False))

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """In the attention of the first blocks that have one."""
        for block in self._within(attending(backbone), backbone):
            yield Placement(block.path, "heads", KeyValueSite(self.compensated), partial(self._build, block))

    def _build(self, block: Block, module: nn.Module) -> ScaledPrefixes:
        heads, *widths = heads_in(block, module)
        return ScaledPrefixes(self.num_virtual_tokens, heads, (widths[0], widths[1]))


@register(
    name="laeadapter",
    paper=PAPER,
    summary="a scaled bottleneck beside the first five attentions",
    visual_tuning="adapter: parallel",
    equation="z = x + MHSA(n) + s (W_up GELU(W_down n)), n = LN1 x",
    counts=(({}, 42_270),),
    mergeable=False,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class LAEAdapterConfig(LAEBase):
    """Config of the bottlenecks of LAE, arXiv 2303.10070.

    A bottleneck stands beside attention in the first five blocks. It reads attention's own input, after the norm, and
    has a factor that trains. See `LAEPrefixConfig` for LAE.

    Args:
        r: width of the bottleneck.
    """

    r: int = field(default=5, metadata={"help": "Width of the bottleneck."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Beside attention in the first blocks."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")
        for block in self._within(backbone.blocks, backbone):
            site = BranchSite("attention", reads="normed")
            yield Placement(block.path, "attention", site, lambda _: ScaledBottleneck(backbone.width, self.r))


@register(
    name="laelora",
    paper=PAPER,
    summary="scaled low-rank updates of keys and values in the first five blocks",
    visual_tuning="parameter: weight",
    equation="W_m + s_m B_m A_m for m = k, v",
    counts=(({}, 76_810),),
    mergeable=True,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class LAELoRAConfig(LAEBase):
    """Config of the low-rank updates of LAE, arXiv 2303.10070.

    LoRA on keys and values of the first five blocks, each update with a factor that trains. See `LAEPrefixConfig` for
    LAE.

    Args:
        r: rank.
    """

    r: int = field(default=5, metadata={"help": "Rank of each update."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At the projections to keys and values of the first blocks."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")
        for block in self._within(backbone.blocks, backbone):
            found = projections(backbone, block)
            for role in ("key", "value"):
                if role in found:
                    rows = found[role]
                    build = partial(LowRank, r=self.r, scale="learnable", dropout=0.0, rows=rows)
                    yield Placement(rows.path, role, LinearSite(), build)
