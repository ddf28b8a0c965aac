"""Explicit visual prompting."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BlockView, Placement, Shared, SideSite
from ...training.defaults import Training


def high_frequencies(x: Tensor, share: float) -> Tensor:
    """The size of what is left of images without their low frequencies.

        |Re F^-1(mask * F x)|, mask: 0 in a square in the centre of the spectrum, else 1

    Args:
        x: (batch, channels, height, width).
        share: of the spectrum that the square covers.
    """
    height, width = x.shape[-2:]
    half = int(math.sqrt(height * width * share) // 2)
    with torch.autocast(x.device.type, enabled=False):
        spectrum = torch.fft.fftshift(torch.fft.fft2(x.float(), norm="forward"), dim=(-2, -1))
        rows, columns = (torch.arange(size, device=x.device) - size // 2 for size in (height, width))
        low = ((rows >= -half) & (rows < half))[:, None] & ((columns >= -half) & (columns < half))
        spectrum = torch.fft.ifftshift(spectrum * low.logical_not(), dim=(-2, -1))
        return torch.fft.ifft2(spectrum, norm="forward").real.abs().to(x.dtype)


class Features(nn.Module):
    """What all prompts of an image are made of: its patches, and its high frequencies.

        e + f,  e = W patches + b,  f = conv(high frequencies), with the kernel and stride of a patch

    W ~ N(0, 0.02), truncated; the convolution ~ N(0, 2 / fan out); biases zero.

    Args:
        width: channels of the patches.
        r: channels of the features.
        channels: of the images.
        patch: rows and columns of a patch, in pixels.
        share: of the spectrum that is taken away.
    """

    def __init__(self, width: int, r: int, channels: int, patch: int, share: float) -> None:
        super().__init__()
        self.share = share
        self.embedding = _linear(width, r)
        self.frequencies = nn.Conv2d(channels, r, patch, stride=patch)
        nn.init.normal_(self.frequencies.weight, std=math.sqrt(2.0 / (patch * patch * r)))
        assert self.frequencies.bias is not None
        nn.init.zeros_(self.frequencies.bias)

    def forward(self, patches: Tensor, pixels: Tensor) -> Tensor:
        """(batch, r, rows, columns), from (batch, width, rows, columns) and the images.

        Raises:
            ValueError: the patches of the images are not those of the backbone.
        """
        f = self.frequencies(high_frequencies(pixels, self.share))
        if f.shape[2:] != patches.shape[2:]:
            raise ValueError(
                f"Images of {pixels.shape[2]} x {pixels.shape[3]} pixels have {patches.shape[2]} x {patches.shape[3]} "
                f"patches in the backbone, but {f.shape[2]} x {f.shape[3]} by the size of a patch. Give images whose "
                "height and width are multiples of it."
            )
        # contiguous: then linears round alike, wherever memory lies
        return self.embedding(patches.movedim(1, -1).contiguous()).movedim(-1, 1) + f


class ExplicitPrompts(nn.Module):
    """Prompts of one block, added to its patches: W GELU(A t) + b, t the features of the image.

    A ~ N(0, 0.02), truncated, with a bias of zero. W and b are shared by all blocks.

    Args:
        r: channels of the features.
        features: makes them, in the first block.
    """

    def __init__(self, r: int, features: Features | None) -> None:
        super().__init__()
        self.features = features
        self.mix = _linear(r, r)

    def enter(self, t: Tensor | None, view: BlockView, up: nn.Module) -> tuple[Tensor, Tensor]:
        """The features, (batch, tokens, r), and the addition to the block's input."""
        assert view.layout is not None
        if self.features is not None:
            assert view.patches is not None
            assert view.pixels is not None
            maps = self.features(view.patches, view.pixels)
            t = view.layout.join(maps.new_zeros(len(maps), view.layout.prefix, maps.shape[1]), maps)
        assert t is not None
        prefix = view.layout.prefix
        prompts = up(F.gelu(self.mix(t[:, prefix:].contiguous())))
        return t, F.pad(prompts, (0, 0, prefix, 0))

    def forward(self, t: Tensor | None, view: BlockView, up: nn.Module) -> tuple[Tensor, None]:
        """Nothing happens after the block."""
        assert t is not None
        return t, None


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


@register(
    name="evp",
    paper=Paper("Explicit Visual Prompting for Low-Level Structure Segmentations", "CVPR 2023", "2303.10883"),
    summary="prompts made of the patches and of the image's high frequencies, added to the patches before every block",
    visual_tuning="prompt: vision-driven",
    equation="x_i = x_i + W GELU(A_i (e + f)) + b at patches before block i, e: of patches, f: of high frequencies",
    # 768 x 24 of the patches, 3 x 16 x 16 x 24 of the frequencies, 12 x 24 x 24, 24 x 768, and biases
    counts=(({}, 63_312),),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class EVPConfig(VisualPeftConfig):
    """Config of explicit visual prompting (EVP), arXiv 2303.10883; SAM-Adapter, arXiv 2304.09148, is the same on SAM.

    Before every block, a prompt of its own is added to each patch. All prompts of a patch are made of one vector of a
    few channels: a linear of the patch, before its position is added, and a convolution of the image's high
    frequencies, which are what is left without a square of low ones. Prefix tokens, such as CLS, get nothing. Not the
    identity at the start.

    For backbones whose blocks have one width and one grid of patches: in hierarchical ones the authors' code makes
    features anew for each stage, by patch embeddings that other backbones do not have, and these are refused here. SAM
    has one width. Both papers also train the decoder: name it in `modules_to_save`.

    Args:
        r: channels of the vector; the backbone's width / 32 by default, as in the paper.
        share: share of the spectrum that counts as low frequencies.
    """

    r: int | None = field(default=None, metadata={"help": "Channels of the features; default: width / 32.", "tiny": 2})
    share: float = field(default=0.25, metadata={"help": "Share of the spectrum that counts as low frequencies."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None:
            self._require_integer("r", 1)
        self._require_number("share", 0.0)
        if self.share > 1:
            self._fail("share", "a share from 0 to 1")

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Before every block."""
        reason, patch = "", 0
        if backbone.stage is not None:
            reason = "its blocks are in stages of several widths"
        elif not backbone.image_channels:
            reason = "its input is not images"
        elif backbone.times > 1 or backbone.architecture.video:
            reason = "a sequence of its tokens holds several frames"
        else:
            patch = math.isqrt(backbone.patch_features // backbone.image_channels)
            if patch**2 * backbone.image_channels != backbone.patch_features:
                reason = "its patches are not squares"
            elif any(size % patch for size in backbone.image_size or ()):
                reason = "its patches overlap"
        if reason:
            raise ValueError(f"{type(self).__name__} does not fit {backbone.class_name}: {reason}.")
        if self.r is not None:
            self._require_integer("r", 1, backbone.width, "the backbone's width")
        r = self.r or max(1, backbone.width // 32)
        site = SideSite(
            reads=("before",),
            frozen=False,
            ends=False,
            enters=True,
            needs_layout=True,
            needs_pixels=True,
            needs_patches=True,
        )
        up = Shared("up", partial(_linear, r, backbone.width))
        sizes = (backbone.width, r, backbone.image_channels, patch, self.share)
        for block in backbone.blocks:
            first = block is backbone.blocks[0]
            build = partial(self._build, r, sizes if first else None)
            yield Placement(block.path, "prompts", site, build, up)

    def _build(self, r: int, sizes: tuple[int, int, int, int, float] | None, block: nn.Module) -> nn.Module:
        return ExplicitPrompts(r, None if sizes is None else Features(*sizes))
