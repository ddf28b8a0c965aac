"""Adapter+."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BranchSite, Placement, drop_path
from ...training.defaults import Training
from .bottleneck import Bottleneck


class AdapterPlus(nn.Module):
    """Bottleneck with a learned factor for each channel.

        f(x) = c * DP(W_up GELU(W_down x + b_down) + b_up)

    Both weights are drawn from a normal of standard deviation 0.01, cut at two deviations; biases are 0, c is 1.

    Args:
        width: channels of the token stream.
        r: width of the bottleneck.
        drop_path: rate of the adapter's own stochastic depth.
        layer_norm: whether the adapter has a norm of its own on its input.
    """

    def __init__(self, width: int, r: int, drop_path: float, layer_norm: bool) -> None:
        super().__init__()
        self.bottleneck = Bottleneck(width, r).truncated_normal()
        self.scale = nn.Parameter(torch.ones(width))
        self.norm = nn.LayerNorm(width) if layer_norm else None
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        x = x if self.norm is None else self.norm(x)
        return self.scale * drop_path(self.bottleneck(x), self.drop_path, self.training)


POSITIONS: dict[str, tuple[BranchSite, ...]] = {
    "post": (BranchSite("mlp", reads="sum"),),
    "pre": (BranchSite("attention", reads="sum"),),
    "parallel": (BranchSite("mlp", reads="stream"),),
    "intermediate": (BranchSite("mlp", reads="output"),),
    "pfeiffer": (BranchSite("mlp", reads="sum"),),
    "houlsby": (BranchSite("attention", reads="output"), BranchSite("mlp", reads="output")),
}


@register(
    name="adapterplus",
    paper=Paper("Adapters Strike Back", "CVPR 2024", "2406.06820"),
    summary="a bottleneck after the block with a factor for each channel",
    visual_tuning="adapter: sequential",
    equation="X = X + c * DP(W_up GELU(W_down X)) after the block",
    counts=(({"r": 8}, 165_984), ({"r": 1}, 36_876)),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class AdapterPlusConfig(VisualPeftConfig):
    """Config of Adapter+, arXiv 2406.06820.

    One bottleneck after each block, with a learned factor for each channel and a stochastic depth of its own. Near the
    identity at the start, not it.

    Args:
        r: width of the bottleneck.
        position: where it stands. `"post"`: on the stream after the block; `"pre"`: on the stream after attention;
            `"parallel"`: beside the MLP, reading the stream; `"intermediate"`: on what the MLP adds; `"pfeiffer"`: as
            post, with a norm of its own on its input; `"houlsby"`: on what attention and the MLP add.
        drop_path: rate of the adapter's own stochastic depth.
    """

    r: int = field(default=8, metadata={"help": "Width of the bottleneck."})
    position: str = field(default="post", metadata={"help": f"One of {', '.join(POSITIONS)}."})
    drop_path: float = field(default=0.1, metadata={"help": "Rate of the adapter's own stochastic depth."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_choice("position", POSITIONS)
        self._require_number("drop_path", 0.0, below=1.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At the chosen position of every block."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")

        def build(_: nn.Module) -> nn.Module:
            return AdapterPlus(backbone.width, self.r, self.drop_path, layer_norm=self.position == "pfeiffer")

        for block in backbone.blocks:
            for site in POSITIONS[self.position]:
                yield Placement(block.path, site.sublayer, site, build)
