"""ViT-Adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import Placement, SideSite
from ...sites.weights import BlockWeightSite, trainable_names
from ...training.defaults import Training
from ..specification.deltas import Addend
from .interaction import Extractor, Injector, Interaction
from .spatial_prior import Pyramid, SpatialPrior


class BlockDeltas(nn.Module):
    """Additions to every parameter of a block, zero at the start: equivalent to training the block.

    Args:
        block: the block.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        names = trainable_names(block)
        self.addends = nn.ModuleDict({_key(name): Addend(block.get_parameter(name).numel()) for name in names})

    def forward(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The new parameters of the block by name, from the old ones."""
        keys = {name: _key(name) for name in parameters}
        return {name: self.addends[key](parameters[name]) for name, key in keys.items() if key in self.addends}


def _interaction(
    prior: Callable[[], SpatialPrior] | None,
    injector: Callable[[], Injector] | None,
    extractors: Sequence[Callable[[], Extractor]],
    gathers: bool,
    pyramid: Callable[[], Pyramid] | None,
    block: nn.Module,
) -> Interaction:
    """As `Interaction`, from functions that build its parts."""
    return Interaction(
        prior and prior(), injector and injector(), [make() for make in extractors], gathers, pyramid and pyramid()
    )


def _key(name: str) -> str:
    return name.replace(".", "__")


MAX_POINTS, MAX_CHANNELS = 100, 4096  # the paper has 4 and 64


@register(
    name="vitadapter",
    paper=Paper("Vision Transformer Adapter for Dense Predictions", "ICLR 2023", "2205.08534"),
    summary="convolutions on the image that exchange with groups of blocks by deformable attention",
    visual_tuning="adapter: mix",
    equation="c = convs(pixels); around each group of blocks: x <- x + gamma MSDA(x; c), c <- ConvFFN(c + MSDA(c; x))",
    counts=(({"interactions": 4}, 8_252_144),),
    mergeable=False,
    identity_at_start=True,
    gradients="full",
    training=Training(1e-3),
)
@dataclass
class ViTAdapterConfig(VisualPeftConfig):
    """Config of ViT-Adapter, arXiv 2205.08534.

    Convolutions read the image beside a plain backbone and compute tokens c at 1/8, 1/16 and 1/32 of its size. Before
    each of four groups of blocks the patches attend to c by multi-scale deformable attention (injector); after it c
    attends to the patches (extractor). With `pyramid` the tokens finally become four maps, from 1/4 to 1/32, for a
    segmentation or detection head: `hf_visual_peft.feature_pyramid(model, pixel_values=...)` returns them. Without it
    the model's own head reads the stream with all injections as usual. The extractors after the last group and the
    layers that build the maps are then left out, because they would get no gradient.

    On ViT-B/16 the convolutions have 1,531,712 parameters, with the linears to c and the level embeddings; an injector
    has 927,024 and an extractor 1,004,112. With 4 injectors and 3 extractors that is 8,252,144. `pyramid` adds 3
    extractors, 49,920 for the map at 1/4, 2,360,064 to double the size of that at 1/8 and 6,144 in norms: 13,680,608.

    The paper also trains the backbone. Here it is frozen by default, as with all methods. `train_backbone` trains all
    parameters of its blocks, 85,054,464 more, as differences that start at zero. Embeddings and the final norm stay
    frozen.

    Other differences from the paper: prefix tokens stay, because heads read the CLS token; injections do not change
    them, and extractors do not read them. The convolutions and the maps have group norms of 32 groups, with as many
    parameters as the authors' batch norms over all devices, whose statistics would depend on the batch and are not
    part of an adapter. Deformable attention uses `F.grid_sample`, in float32. Images and patches of any size work;
    sizes of maps are rounded up. Hierarchical backbones have their own pyramid and are refused, as are videos.

    Args:
        interactions: number of groups of blocks, as equal as possible; at most the number of blocks.
        num_heads: of the deformable attention; None: the greatest common divisor of the backbone's number of heads
            and the channels of the values.
        num_points: points that a head samples in each map.
        deform_ratio: channels of the attention's values divided by those of the stream.
        channels: of the first convolutions.
        ffn_ratio: channels in the ConvFFN divided by those of the stream.
        extra_extractors: extra extractors after the last group, with `pyramid`.
        drop_path: probability of dropping a ConvFFN for a sample.
        pyramid: whether to compute the four maps.
        train_backbone: whether the blocks also train.
    """

    interactions: int = field(default=4, metadata={"help": "Groups of blocks."})
    num_heads: int | None = field(
        default=None, metadata={"help": "Heads of the deformable attention; default: those of the backbone."}
    )
    num_points: int = field(default=4, metadata={"help": "Points that a head looks at in each map."})
    deform_ratio: float = field(
        default=0.5, metadata={"help": "Channels of the attention's values over those of the stream."}
    )
    channels: int = field(default=64, metadata={"help": "Channels of the first convolutions."})
    ffn_ratio: float = field(default=0.25, metadata={"help": "Channels in the ConvFFN over those of the stream."})
    extra_extractors: int = field(
        default=2, metadata={"help": "Extra extractors after the last group, with `pyramid`."}
    )
    drop_path: float = field(default=0.0, metadata={"help": "Probability of dropping a ConvFFN for a sample."})
    pyramid: bool = field(default=False, metadata={"help": "Whether four maps are made, for heads of your own."})
    train_backbone: bool = field(default=False, metadata={"help": "Whether the backbone's blocks train, too."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("interactions", 1)
        self._require_integer("num_points", 1, MAX_POINTS)
        self._require_integer("channels", 1, MAX_CHANNELS)
        self._require_integer("extra_extractors", 0)
        if self.num_heads is not None:
            self._require_integer("num_heads", 1)
        for name in ("deform_ratio", "ffn_ratio"):
            self._require_number(name, 0.0)
            if getattr(self, name) == 0:
                self._fail(name, "a finite number above 0")
        self._require_number("drop_path", 0.0, below=1.0)
        for name in ("pyramid", "train_backbone"):
            self._require_choice(name, (True, False))
        if not self.pyramid:
            self._require_unset("extra_extractors", "with pyramid False")

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Injectors before groups of blocks, extractors after them."""
        width, name = backbone.width, f"{type(self).__name__} does not fit {backbone.class_name}"
        if backbone.stage is not None or len({block.group for block in backbone.blocks}) > 1:
            raise ValueError(f"{name}: it is hierarchical and has its own pyramid of features.")
        if backbone.architecture.video:
            raise ValueError(f"{name}: it reads videos, but the convolutions read images.")
        if not backbone.image_channels:
            raise ValueError(f"{name}: its input is not images, which the convolutions read.")
        value_width, hidden = max(1, int(width * self.deform_ratio)), max(1, int(width * self.ffn_ratio))
        heads = self.num_heads or math.gcd(backbone.num_heads or 1, value_width)
        if value_width % heads:
            self._fail("num_heads", f"a divisor of {value_width}, the channels of the attention's values")
        injector = partial(Injector, width, heads, self.num_points, value_width)
        extractor = partial(Extractor, width, heads, self.num_points, value_width, hidden, self.drop_path)
        prior = partial(SpatialPrior, backbone.image_channels, self.channels, width, self.pyramid)
        blocks = backbone.blocks
        groups = min(self.interactions, len(blocks))
        starts = [len(blocks) * group // groups for group in range(groups)]
        for index, block in enumerate(blocks):
            last = index == len(blocks) - 1
            begins, ends = index in starts, last or index + 1 in starts
            if self.train_backbone:
                yield Placement(block.path, "block", BlockWeightSite(), BlockDeltas)
            if not begins and not (ends and (self.pyramid or not last)):
                continue
            number = self.pyramid * (1 + self.extra_extractors) if last else int(ends)
            makes_maps = last and self.pyramid
            build = partial(
                _interaction,
                prior if index == 0 else None,
                injector if begins else None,
                [extractor] * number,
                ends and self.pyramid,
                partial(Pyramid, width, groups) if makes_maps else None,
            )
            site = SideSite(
                frozen=False,
                ends=False,
                aligned=False,
                needs_layout=True,
                needs_pixels=True,
                enters=begins,
                keeps=self.pyramid,
            )
            yield Placement(block.path, "interaction", site, build)
