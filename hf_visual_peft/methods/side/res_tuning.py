"""Res-Tuning and Res-Tuning-Bypass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BlockView, BranchSite, Placement, SideSite
from ...training.defaults import Training


PLACES = ("attention", "mlp", "block")
KINDS = ("adapter", "prefix", "prompt")
BIAS_STD = 1e-6


class ResAdapter(nn.Module):
    """A bottleneck without a skip connection; the module beside it provides that.

        f(x) = W_up GELU(W_down x + b_down) + b_up

    Weights are Xavier-uniform, biases normal of standard deviation 1e-6.

    Args:
        width: channels of x.
        r: width of the bottleneck.
    """

    def __init__(self, width: int, r: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, r)
        self.up = nn.Linear(r, width)
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=BIAS_STD)

    def hidden(self, x: Tensor) -> Tensor:
        """Map (..., width) to the input of W_up, (..., r)."""
        return F.gelu(self.down(x))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        return self.up(self.hidden(x))


class ResPrefix(nn.Module):
    """Attention to learned tokens, in heads.

        f(x) = softmax(x K^T / sqrt(width / heads)) V

    K and V are Xavier-uniform.

    Args:
        width: channels of x, a multiple of `num_heads`.
        num_virtual_tokens: rows of K and V.
        num_heads: of the attention.
        tied: whether V is K: the learned tokens are both keys and values, as prompts are.
    """

    def __init__(self, width: int, num_virtual_tokens: int, num_heads: int, tied: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.keys = nn.Parameter(torch.empty(num_virtual_tokens, width))
        self.values = None if tied else nn.Parameter(torch.empty(num_virtual_tokens, width))
        for parameter in self.parameters():
            nn.init.xavier_uniform_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""

        def heads(tokens: Tensor) -> Tensor:
            return tokens.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

        learned = (self.keys, self.keys if self.values is None else self.values)
        keys, values = (heads(each).to(x.dtype).expand(x.shape[0], -1, -1, -1) for each in learned)
        return F.scaled_dot_product_attention(heads(x), keys, values).transpose(1, 2).flatten(2)


class Bypass(nn.Module):
    """One piece of the bypass, beside one block that returns x.

        s <- lambda (x + h(x)) + (1 - lambda) (s + v(s)),  lambda = sigmoid(a)

    h, the horizontal tuner, and v, the vertical one, are `ResAdapter`s. a is 0 at the start.

    Args:
        width: channels of x.
        r: width of the bottlenecks.
        enters_from: channels of s where a stage of another width ends, which a linear maps to this width; else None.
    """

    def __init__(self, width: int, r: int, enters_from: int | None) -> None:
        super().__init__()
        self.enter = nn.Linear(enters_from, width) if enters_from else None
        self.horizontal = ResAdapter(width, r)
        self.vertical = ResAdapter(width, r)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, s: Tensor | None, view: BlockView) -> tuple[Tensor, None]:
        """Map s (batch, tokens, width or `enters_from`), None at the start, to (batch, tokens, width)."""
        s = view.before if s is None else s
        x = view.after
        assert s is not None
        assert x is not None
        if self.enter is not None:
            s = self.enter(s)
        gate = torch.sigmoid(self.gate)
        # Both tuners end in one matrix product: the stream is wide, and every pass over it takes time.
        parts = (self.horizontal, gate, x), (self.vertical, 1 - gate, s)
        hidden = torch.cat([tuner.hidden(stream) for tuner, _, stream in parts], dim=-1)
        weight = torch.cat([share * tuner.up.weight for tuner, share, _ in parts], dim=1)
        bias = torch.cat([share * tuner.up.bias[None] for tuner, share, _ in parts]).sum(dim=0)
        added = F.linear(hidden, weight, bias)
        return added + torch.lerp(s.to(added.dtype), x.to(added.dtype), gate.to(added.dtype)), None


@register(
    name="restuning",
    paper=Paper(
        "Res-Tuning: A Flexible and Efficient Tuning Paradigm via Unbinding Tuner from Backbone",
        "NeurIPS 2023",
        "2310.19859",
    ),
    summary="bottlenecks along a bypass of the blocks, or inside them",
    visual_tuning="adapter: parallel",
    equation="s_l = lambda_l (x_l + h_l(x_l)) + (1 - lambda_l) (s_{l-1} + v_l(s_{l-1})); or x + OP(x) + f(x)",
    counts=(
        ({"bypass": True, "r": 10}, 387_324),
        ({"bypass": False, "r": 10}, 580_968),
        (
            {
                "bypass": False,
                "attention": "prefix",
                "mlp": "adapter",
                "block": "prompt",
                "r": 10,
                "num_virtual_tokens": 10,
            },
            470_136,
        ),
    ),
    mergeable=False,
    identity_at_start=False,
    gradients="none",
    training=Training(3e-3),
)
@dataclass
class ResTuningConfig(VisualPeftConfig):
    """Config of Res-Tuning and Res-Tuning-Bypass, arXiv 2310.19859.

    *Bypass*: a stream s beside the backbone starts as the first block's input. After each block a horizontal tuner
    reads the block's output, a vertical one reads s, and a learned gate mixes both; at the end s replaces the output
    of the last block. No gradient crosses the backbone. The tuners are adapters with their skip connections, as in the
    authors' code (ModelScope Swift), which adds them without gates; the gates are the paper's. On ViT-B/16 there are
    24 adapters of 2 x 768 r + r + 768 and 12 gates. Where the width changes between stages, a linear maps s to the new
    width.

    *Without*: tuners in residual form stand beside the attention, the MLP and the whole block, x' = OP(x) + f(x), and
    gradients cross the backbone. OP and f read the same x: the outputs of the norms at attention and MLP, and the
    stream before the block. Adapters have as many parameters as above, prefixes 2 x 768, prompts 768 for each token.
    No tuner stands beside a block that pools tokens or has only one sub-layer.

    The authors' code has no prefixes and prompts. In the paper their weight is computed from the logits of the block's
    own attention. A tuner that is unbound from the attention does not see these, so here the queries are x, and the
    values learn the weight.

    Args:
        bypass: whether to use the bypass; else the tuners in residual form.
        r: width of the adapters' bottleneck.
        num_virtual_tokens: tokens of a prefix or prompt.
        attention: tuner beside the attention: "adapter", "prefix", "prompt" or None. Only without the bypass; if none
            of the three fields is given, all are adapters.
        mlp: the same beside the MLP.
        block: the same beside the block.
    """

    bypass: bool = field(default=True, metadata={"help": "Beside the backbone, without gradients through it; or in."})
    r: int = field(default=10, metadata={"help": "Width of the adapters' bottleneck."})
    num_virtual_tokens: int = field(default=10, metadata={"help": "Tokens of a prefix or prompt."})
    attention: str | None = field(default=None, metadata={"help": "Tuner beside the attention, without the bypass."})
    mlp: str | None = field(default=None, metadata={"help": "Tuner beside the MLP, without the bypass."})
    block: str | None = field(default=None, metadata={"help": "Tuner beside the block, without the bypass."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_choice("bypass", (True, False))
        self._require_integer("r", 1)
        self._require_integer("num_virtual_tokens", 1)
        for place in PLACES:
            self._require_choice(place, (*KINDS, None))
            if self.bypass and getattr(self, place) is not None:
                self._fail(place, "None with bypass=True, whose tuners are adapters beside the backbone")
        if not self.bypass and not any(getattr(self, place) for place in PLACES):
            self.attention = self.mlp = self.block = "adapter"
        if not {"prefix", "prompt"} & {getattr(self, place) for place in PLACES}:
            self._require_unset("num_virtual_tokens", "without a prefix or prompt")

    @property
    def gradients(self) -> Literal["full", "partial", "none"]:
        """How far gradients cross the backbone."""
        return "none" if self.bypass else "full"

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """A piece of the bypass beside every block, or the tuners in it."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")
        return self._bypass(backbone) if self.bypass else self._branches(backbone)

    def _bypass(self, backbone: VisionBackbone) -> Iterator[Placement]:
        first = backbone.blocks[0]
        starts = backbone.width_before is None
        for block in backbone.blocks:
            enters_from = backbone.width_before if block is first else None

            def build(_: nn.Module, enters_from: int | None = enters_from) -> nn.Module:
                return Bypass(backbone.width, self.r, enters_from)

            site = SideSite(reads=("before", "after") if starts and block is first else ("after",))
            yield Placement(block.path, "bypass", site, build)

    def _branches(self, backbone: VisionBackbone) -> Iterator[Placement]:
        sites = {
            "attention": BranchSite("attention", reads="normed"),
            "mlp": BranchSite("mlp", reads="normed"),
            "block": BranchSite("mlp", reads="block"),
        }
        for block in backbone.blocks:
            for place, site in sites.items():
                kind = getattr(self, place)
                if kind is None or (place == "block" and "attention" not in block.sublayers):
                    continue
                build = partial(self._tuner, kind, backbone.width, block.num_heads or 1)
                yield Placement(block.path, place, site, build)

    def _tuner(self, kind: str, width: int, num_heads: int, _: nn.Module) -> nn.Module:
        if kind == "adapter":
            return ResAdapter(width, self.r)
        return ResPrefix(width, self.num_virtual_tokens, math.gcd(num_heads, width), tied=kind == "prompt")
