"""ST-Adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BranchSite, Placement, TokenLayout
from ...training.defaults import Training
from .video import by_video, require_full_grid


class STAdapter(nn.Module):
    """A linear, a depthwise convolution over frames, and a linear.

        f(x) = W_2 (DWConv3d(W_1 x + b_1)) + b_2,  kernel 3x1x1

    It acts on patches; nothing is added to prefix tokens. The convolution and the biases are zero at the start, W_1
    and W_2 as in `nn.Linear`.

    Args:
        width: channels of the token stream.
        channels: between the linears.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, channels)
        self.conv = nn.Conv3d(channels, channels, kernel_size=(3, 1, 1), padding=(1, 0, 0), groups=channels)
        self.up = nn.Linear(channels, width)
        for zero in (self.down.bias, self.conv.weight, self.conv.bias, self.up.bias):
            assert zero is not None
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Map (batch x frames, tokens, width) to the same shape; `layout` has prefix tokens and frames."""
        t = by_video(self.down(x[:, layout.prefix :]), layout)
        # (batch, channels, frames, patches, 1): the kernel mixes no patches, so their layout makes no difference
        t = self.conv(t.permute(0, 3, 1, 2).unsqueeze(-1)).squeeze(-1)
        patches = self.up(t.permute(0, 2, 3, 1).flatten(0, 1))
        return torch.cat([torch.zeros_like(x[:, : layout.prefix], dtype=patches.dtype), patches], dim=1)


# before attention: the stream at the block's input; before the MLP: the stream after attention
SITES = {
    "attention": BranchSite("attention", reads="input", needs_layout=True),
    "mlp": BranchSite("attention", reads="sum", needs_layout=True),
}


@register(
    name="stadapter",
    paper=Paper(
        "ST-Adapter: Parameter-Efficient Image-to-Video Transfer Learning",
        "NeurIPS 2022",
        "2206.13559",
    ),
    summary="a convolution over frames in a bottleneck before attention",
    visual_tuning="adapter: sequential",
    equation="x + W_2 DWConv3d(W_1 x) on the patches before attention, the MLP, or both; kernel 3x1x1, over frames",
    counts=(({}, 7_110_144),),
    mergeable=False,
    identity_at_start=True,
    training=Training(2.5e-4),
)
@dataclass
class STAdapterConfig(VisualPeftConfig):
    """Config of ST-Adapter, arXiv 2206.13559; for videos, `pixel_values` of (batch, frames, channels, height, width).

    A depthwise convolution between two linears, without activation, mixes the patches of neighbouring frames before a
    sub-layer and its norm. CLS and other prefix tokens do not change. After the last block each token becomes its mean
    over the frames, which the final norm reads, as in the authors' code; a model whose head reads tokens without that
    norm gets their mean there. The authors' dropout of 0.5 between final norm and head is not implemented.

    The released code has one adapter per block for Kinetics, before the MLP (`sublayers="mlp"`), and two for
    Something-Something, before both sub-layers. Before the last block's MLP an adapter changes patches after their
    last attention with CLS. With a head that reads only CLS this adapter has no effect; the same holds in the authors'
    code.

    Args:
        channels: between the linears; 384 in the paper, half of ViT-B's width. It may exceed the backbone's width.
        sublayers: before which sub-layers: `"attention"`, `"mlp"`.
    """

    channels: int = field(default=384, metadata={"help": "Channels of the convolution over frames."})
    sublayers: tuple[str, ...] = field(default=("attention",), metadata={"help": "Before which: attention, mlp."})

    video: ClassVar[bool] = True
    frames_meet_before_norms: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("channels", 1, 100_000)
        self._require_some("sublayers", SITES)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Before the chosen sub-layers of every block."""
        require_full_grid(type(self).__name__, backbone)

        def build(_: nn.Module) -> nn.Module:
            return STAdapter(backbone.width, self.channels)

        for block in backbone.blocks:
            for name in self.sublayers:
                yield Placement(block.path, name, SITES[name], build)
