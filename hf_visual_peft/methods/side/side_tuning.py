"""Side-tuning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BlockView, Placement, SideSite
from ...training.defaults import Training


class SideTuning(nn.Module):
    """A small convolutional network on the images, blended with the backbone.

        R = sigmoid(a) B(x) + (1 - sigmoid(a)) S(x)

    S halves rows and columns `depth` times, each time by a 3 x 3 convolution without bias, a group norm of one group
    and a ReLU. It then averages over each cell of the patch grid and maps the result to the stream's width. Tokens
    before the patches get the mean over all cells. a is 0 at the start.

    Args:
        image_channels: of the images.
        channels: of the convolutions.
        depth: number of convolutions.
        width: of the stream.
        learned: whether a is learned; else it stays 0.
    """

    def __init__(self, image_channels: int, channels: int, depth: int, width: int, learned: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(depth):
            before = channels if index else image_channels
            layers.append(nn.Conv2d(before, channels, 3, stride=2, padding=1, bias=False))
            layers.append(nn.GroupNorm(1, channels))
            layers.append(nn.ReLU())
        self.features = nn.Sequential(*layers)
        self.proj = nn.Conv2d(channels, width, 1, bias=False)
        self.alpha = nn.Parameter(torch.zeros(1)) if learned else None

    def side(self, view: BlockView) -> Tensor:
        """S(x), (batch, tokens, width)."""
        assert view.after is not None
        assert view.pixels is not None
        assert view.layout is not None
        pixels, grid = view.pixels, view.layout.grid
        if grid is None:
            raise ValueError("The patch grid is not known: call the whole model, not a block of it.")
        if pixels.ndim == 5:  # a video, (batch, channels, frames, height, width): the mean over the frames of one grid
            pixels = pixels.unflatten(2, (grid.times, -1)).mean(dim=3).transpose(1, 2).flatten(0, 1)
        maps = self.proj(F.adaptive_avg_pool2d(self.features(pixels), (grid.height, grid.width)))
        sequences = view.after.shape[0] * grid.times // maps.shape[0]
        if sequences > 1:  # several per image, one after the other, each with a token of every cell
            maps = maps.repeat_interleave(sequences, dim=0)
        mean = maps.mean(dim=(2, 3)).unflatten(0, (-1, grid.times)).mean(dim=1, keepdim=True)
        return view.layout.join(mean.expand(-1, view.layout.prefix, -1), maps)

    def forward(self, state: Tensor | None, view: BlockView) -> tuple[Tensor, None]:
        """R, (batch, tokens, width); there is no earlier state."""
        assert view.after is not None
        side = self.side(view).to(view.after.dtype)  # autocast leaves the stream in float32
        if self.alpha is None:
            return (view.after + side) / 2, None
        return torch.lerp(side, view.after, torch.sigmoid(self.alpha).to(side.dtype)), None


@register(
    name="sidetuning",
    paper=Paper(
        "Side-Tuning: A Baseline for Network Adaptation via Additive Side Networks", "ECCV 2020", "1912.13503"
    ),
    summary="a small convolutional network on the image, mixed with the backbone's result",
    visual_tuning="adapter: mix",
    equation="R = sigmoid(a) B(x) + (1 - sigmoid(a)) S(x)",
    counts=(({}, 161_985), ({"merge": "half"}, 161_984)),
    mergeable=False,
    identity_at_start=False,
    gradients="none",
    training=Training(3e-3),
)
@dataclass
class SideTuningConfig(VisualPeftConfig):
    """Config of side-tuning, arXiv 1912.13503.

    A small network S reads the images beside the backbone B. A blend of both replaces the output of the last block and
    goes on to the final norm and the head. No gradient crosses the backbone. With `layers_to_transform`, B is the
    output of the last of these blocks.

    In VPT's version S is AlexNet with ImageNet weights, and gives one vector for CLS. Here S is a small convolutional
    network with random initial weights on the patch grid, so that it fits any token, stage and image size; its norms
    have no running statistics. With C image channels it has 9 C c + 9 (D - 1) c^2 + 2 D c + c d parameters (c
    channels, depth D, d the backbone's width), plus one for a: 161,985 on ViT-B/16. The paper's other merges, by a
    product, an MLP or FiLM, are not implemented, nor is concatenation, which needs a wider head.

    Args:
        channels: of S.
        depth: convolutions of S, each of which halves rows and columns; 4 give cells of 16 x 16 pixels.
        merge: `"alpha"`: a is learned; `"half"`: R is the mean of B and S.
    """

    channels: int = field(default=64, metadata={"help": "Channels of the side network."})
    depth: int = field(default=4, metadata={"help": "Convolutions of the side network, each of stride 2."})
    merge: str = field(
        default="alpha", metadata={"help": "'alpha': the blend is learned; 'half': the mean of backbone and side."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("channels", 1, 4096)
        self._require_integer("depth", 1, 16)
        self._require_choice("merge", ("alpha", "half"))

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """After the last block."""
        if backbone.width_after is not None:
            return
        if not backbone.image_channels:
            raise ValueError(f"{type(self).__name__} does not fit {backbone.class_name}: its input is not images.")
        width = backbone.width
        site = SideSite(needs_layout=True, needs_pixels=True)
        yield Placement(backbone.blocks[-1].path, "side", site, lambda _: self._build(backbone.image_channels, width))

    def _build(self, image_channels: int, width: int) -> SideTuning:
        return SideTuning(image_channels, self.channels, self.depth, width, self.merge == "alpha")
