"""Convpass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BranchSite, Placement, TokenLayout
from ...training.defaults import Training


def quick_gelu(x: Tensor) -> Tensor:
    """X sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


class Convpass(nn.Module):
    """Bottleneck with a 3x3 convolution over the patch grid.

        t = g(W_down x + b_down);  t = [conv of each prefix token as a 1x1 image; conv of the patch grid]
        f(x) = s (W_up dropout(g(t)) + b_up),  g = QuickGELU

    W_down is Xavier-uniform, W_up and all biases zero, so f starts at zero.

    Args:
        width: channels of the token stream.
        r: width of the bottleneck.
        scale: s.
        dropout: probability, in the bottleneck.
        conv_init: `"identity"`: each channel passes unchanged; `"xavier"`: Xavier-uniform.
    """

    def __init__(self, width: int, r: int, scale: float, dropout: float, conv_init: str) -> None:
        super().__init__()
        self.down = nn.Linear(width, r)
        self.conv = nn.Conv2d(r, r, kernel_size=3, padding=1)
        self.up = nn.Linear(r, width)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.down.weight)
        if conv_init == "identity":
            nn.init.dirac_(self.conv.weight)
        else:
            nn.init.xavier_uniform_(self.conv.weight)
        for module in (self.down, self.conv, self.up):
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Map (batch, tokens, width) to the same shape; `layout` says which tokens are patches and where they lie."""
        t = quick_gelu(self.down(x))
        prefix, patches = layout.split(t)
        # on a 1x1 image all taps but the centre see padding
        prefix = F.linear(prefix, self.conv.weight[:, :, 1, 1], self.conv.bias)
        t = layout.join(prefix, self.conv(patches))
        return self.scale * self.up(self.dropout(quick_gelu(t)))


SUBLAYERS = ("attention", "mlp")


@register(
    name="convpass",
    paper=Paper("Convolutional Bypasses Are Better Vision Transformer Adapters", "arXiv 2022", "2207.07039"),
    summary="a bottleneck with a 3x3 convolution beside attention and MLP",
    visual_tuning="adapter: parallel",
    equation="x + DP(sublayer(LN x)) + DP(f(LN x)), f = s W_up g(conv3x3(g(W_down .))), g = QuickGELU",
    counts=(({}, 327_552), ({"sublayers": ("attention",)}, 163_776)),
    mergeable=False,
    identity_at_start=True,
    training=Training(1e-3),
)
@dataclass
class ConvpassConfig(VisualPeftConfig):
    """Config of Convpass, arXiv 2207.07039.

    A bottleneck with a 3x3 convolution beside attention and MLP. It reads the output of the norm that the sub-layer
    reads, and is dropped at the block's stochastic depth rate, independently of the sub-layer. The grid follows the
    images, of any size and shape. CLS, distillation and register tokens pass the same convolution as 1x1 images. With
    masked images (ViT-MAE) the convolution sees zeros where patches are missing. That is our choice: the paper has no
    such model.

    Args:
        r: width of the bottleneck.
        scale: s; the paper tunes it in 0.01 to 100.
        dropout: probability, in the bottleneck.
        sublayers: beside which sub-layers: `"attention"`, `"mlp"`.
        conv_init: the convolution starts as the identity, or Xavier-uniform.
    """

    r: int = field(default=8, metadata={"help": "Width of the bottleneck."})
    scale: float = field(default=1.0, metadata={"help": "Factor s of the branch."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability in the bottleneck."})
    sublayers: tuple[str, ...] = field(default=SUBLAYERS, metadata={"help": "Beside which: attention, mlp."})
    conv_init: str = field(default="identity", metadata={"help": "Start of the convolution: identity or xavier."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_number("scale")
        self._require_number("dropout", 0.0, below=1.0)
        self._require_some("sublayers", SUBLAYERS)
        self._require_choice("conv_init", ("identity", "xavier"))

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Beside the chosen sub-layers of every block."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")
        for block in backbone.blocks:
            for sublayer in self.sublayers:
                yield Placement(
                    block.path,
                    sublayer,
                    BranchSite(sublayer, reads="normed", drop_path=True, needs_layout=True),  # type: ignore[arg-type]
                    lambda _: Convpass(backbone.width, self.r, self.scale, self.dropout, self.conv_init),
                )
