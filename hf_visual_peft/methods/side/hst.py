"""Hierarchical side-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import NORM_ROLES, Block, VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BlockView, Placement, Shared, SideSite, TokenSite, WeightSite, drop_path
from ...training.defaults import Training
from ..prompt.vpt import MAX_VIRTUAL_TOKENS
from ..specification.difffit import norm_deltas


EPS = 1e-6
INIT_STD = 0.02


class MetaTokens(nn.Module):
    """Learned tokens, the same for every image, Xavier-uniform.

    Args:
        num_virtual_tokens: how many.
        width: of the backbone.
    """

    def __init__(self, num_virtual_tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(1, num_virtual_tokens, width))
        nn.init.xavier_uniform_(self.tokens)

    def forward(self, batch_size: int) -> Tensor:
        """Tokens of shape (batch, num_virtual_tokens, width)."""
        return self.tokens.expand(batch_size, -1, -1)


class Stem(nn.Sequential):
    """The stem: maps images to maps of a quarter of their height and width.

    Args:
        image_channels: of the images.
        dim: of the maps.
    """

    def __init__(self, image_channels: int, dim: int) -> None:
        super().__init__(
            nn.Conv2d(image_channels, dim, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 2, stride=2),
        )


class SideBlock(nn.Module):
    """A block of the side network, pre-norm.

        s <- s + DP(MHA(q = LN1 s, kv = t));  s <- s + f;  s <- s + DP(W_2 GELU(W_1 LN2 s + b_1) + b_2)

    t holds the meta tokens and the mean of f, the features of the backbone; all have the width of s.

    Args:
        dim: that width, a multiple of `num_heads`.
        num_heads: of the attention.
        mlp_ratio: width of the MLP divided by `dim`.
        drop_path: rate of the stochastic depth DP.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.num_heads, self.drop_path = num_heads, drop_path
        self.norm1, self.norm2 = nn.LayerNorm(dim, EPS), nn.LayerNorm(dim, EPS)
        self.query, self.key, self.value, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1 = nn.Linear(dim, int(mlp_ratio * dim))
        self.fc2 = nn.Linear(int(mlp_ratio * dim), dim)

    def forward(self, s: Tensor, tokens: Tensor, features: Tensor) -> Tensor:
        """Map s (batch, places, dim), t (batch, tokens, dim) and f (batch, places, dim) to the new s."""
        projected = self.query(self.norm1(s)), self.key(tokens), self.value(tokens)
        heads = (each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in projected)
        attended = self.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        s = s + drop_path(attended, self.drop_path, self.training) + features
        return s + drop_path(self.fc2(F.gelu(self.fc1(self.norm2(s)))), self.drop_path, self.training)


class SidePiece(nn.Module):
    """One piece of the side network, beside one block.

    It gets the maps of the piece before; where a stage starts, they come from the stem or through a convolution of
    stride 2. The bridge maps the block's patch tokens, resized to the maps, and its meta tokens to the width of the
    maps. The result of the last piece is mapped back to the backbone's width and grid; prefix tokens get the mean.

    Args:
        width: of the backbone.
        dim: channels of the maps.
        num_heads: of the attention in the side block.
        mlp_ratio: of the side block.
        drop_path: of the side block.
        image_channels: of the images that the stem reads; None where there is no stem.
        enters_from: channels of the maps of the stage before; None where no stage starts.
        stage_ends: whether a norm ends the stage here.
        ends: whether the network ends here.
    """

    def __init__(
        self,
        width: int,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: float,
        image_channels: int | None,
        enters_from: int | None,
        stage_ends: bool,
        ends: bool,
    ) -> None:
        super().__init__()
        self.enter: nn.Module | None = None
        if image_channels is not None:
            self.enter = Stem(image_channels, dim)
        elif enters_from is not None:
            self.enter = nn.Conv2d(enters_from, dim, 3, stride=2, padding=1)
        self.enter_norm = None if self.enter is None else nn.LayerNorm(dim)
        self.token_norm = nn.LayerNorm(dim)
        self.block = SideBlock(dim, num_heads, mlp_ratio, drop_path)
        self.norm = nn.LayerNorm(dim, EPS) if stage_ends else None
        self.up = nn.Linear(dim, width) if ends else None
        self.apply(init_weights)

    def forward(self, maps: Tensor | None, view: BlockView, bridge: nn.Module) -> tuple[Tensor, None]:
        """Turn maps (batch, channels, height, width), None at the start, into new ones or (batch, tokens, width)."""
        x, layout, tokens = view.after, view.layout, view.tokens
        assert x is not None
        assert layout is not None
        assert tokens is not None
        if self.enter is not None:
            maps = self.enter(view.pixels if maps is None else maps)
        assert maps is not None
        size = maps.shape[2:]
        s = maps.flatten(2).transpose(1, 2)
        if self.enter_norm is not None:
            s = self.enter_norm(s)
        # The bridge first: it commutes with resizing, and there are fewer tokens before.
        _, features = layout.split(bridge(x))
        grid = features.shape[2:]
        features = F.interpolate(features, size, mode="bilinear").flatten(2).transpose(1, 2)
        # Contiguous: the rounding of a strided part of the stream would depend on whether the bridge trains.
        tokens = self.token_norm(bridge(tokens.contiguous()))
        tokens = torch.cat([tokens, features.mean(dim=1, keepdim=True)], dim=1)
        s = self.block(s, tokens, features)
        if self.norm is not None:
            s = self.norm(s)
        maps = s.transpose(1, 2).unflatten(2, size)
        if self.up is None:
            return maps, None
        prefix = s.mean(dim=1, keepdim=True).expand(-1, layout.prefix, -1)
        return self.up(layout.join(prefix, F.interpolate(maps, grid, mode="bilinear"))), None


def init_weights(module: nn.Module) -> None:
    """Draw the weights of linears and convolutions as the authors do, and make biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _rung(*args: Any) -> nn.Module:
    """Build a piece; the last argument, the block, is not needed."""
    return SidePiece(*args[:-1])


@register(
    name="hst",
    paper=Paper("Hierarchical Side-Tuning for Vision Transformers", "arXiv 2023", "2310.05393"),
    summary="a pyramid fed with one learned token a block and the blocks' maps",
    visual_tuning="adapter: mix",
    equation="s <- SideBlock(s; [LN W_k m_l; mean f_l], f_l), f_l = W_k resize(x_l), stages k of s as in a pyramid",
    counts=(({"num_virtual_tokens": 1}, 820_904),),
    mergeable=False,
    identity_at_start=False,
    training=Training(1e-3),
)
@dataclass
class HSTConfig(VisualPeftConfig):
    """Config of hierarchical side-tuning (HST), arXiv 2310.05393.

    A pyramid stands beside a plain vision transformer: a convolutional stem on the image, then stages at strides 4, 8,
    16 and 32, each beside equally many blocks. Every block gets its own meta tokens. Their outputs and the block's
    patch tokens go through the stage's bridge, a linear, into the side block beside it. The norms of the blocks also
    train, as additions to weight and bias that start at zero. Gradients cross the backbone.

    The authors' head reads the mean of the last maps after a batch norm without weights. Here the model keeps its
    head, whatever it pools: a linear maps the maps back to the backbone's width, resized to its grid; prefix tokens
    get the mean; and the model's final norm replaces the batch norm. On ViT-B/16 that linear has 72 x 768 + 768 =
    56,064 of the 820,904 parameters. The other 764,840 are those of the authors' code: bridges 166,104, side blocks
    462,312, stem and convolutions with their norms 88,616, meta tokens 9,216, their norms 1,296, norms of stages 432
    and of the backbone's blocks 36,864. The authors' head adds 73 for each class. That gives 0.77 M with VTAB-1k's 50
    classes on average and 0.78 M, the figure in tables, with FGVC's 235.

    Blocks are divided evenly among the stages; with fewer blocks than stages the last stages are left out. The
    backbone must have a single stage, and its blocks must take extra tokens.

    Args:
        dims: channels of the stages' maps.
        num_heads: heads of their attention, which divide the channels.
        mlp_ratio: width of the MLP of side blocks divided by that of their maps.
        num_virtual_tokens: meta tokens per block.
        drop_path: rate of the stochastic depth in the last side block; it rises evenly from 0 in the first. The
            authors' scripts use 0, 0.1 or 0.2, also in the backbone.
    """

    dims: tuple[int, ...] = field(default=(32, 48, 64, 72), metadata={"help": "Channels of the stages' maps."})
    num_heads: tuple[int, ...] = field(default=(2, 4, 8, 12), metadata={"help": "Heads of the stages' attention."})
    mlp_ratio: float = field(default=4.0, metadata={"help": "Width of the side blocks' MLP over that of their maps."})
    num_virtual_tokens: int = field(default=1, metadata={"help": "Meta tokens a block."})
    drop_path: float = field(
        default=0.0, metadata={"help": "Rate of the side network's stochastic depth, at its end."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dims", "num_heads"):
            value: Any = getattr(self, name)
            if not isinstance(value, list | tuple) or not value or any(type(n) is not int or n < 1 for n in value):
                self._fail(name, "a number of at least 1 for each stage")
            setattr(self, name, tuple(value))
        if len(self.num_heads) != len(self.dims):
            self._fail("num_heads", f"one number for each of the {len(self.dims)} dims")
        if any(dim % heads for dim, heads in zip(self.dims, self.num_heads, strict=True)):
            self._fail("num_heads", f"numbers that divide the dims {self.dims!r}")
        self._require_number("mlp_ratio", 1 / min(self.dims))
        self._require_integer("num_virtual_tokens", 1, MAX_VIRTUAL_TOKENS)
        self._require_number("drop_path", 0.0, below=1.0)

    def trained_parameters(self, name: str, shape: tuple[int, ...]) -> int:
        """The same, without running statistics."""
        statistics = name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
        return 0 if statistics else super().trained_parameters(name, shape)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Meta tokens, norms and a piece of the side network at every block."""
        table = backbone.architecture
        if backbone.stage is not None or table.prompts != "sequence" or table.grid is None or table.video:
            raise ValueError(
                f"{type(self).__name__} does not fit {backbone.class_name}: it needs blocks of one width for images, "
                "whose tokens lie in a known grid, and blocks that take extra tokens."
            )
        blocks = backbone.blocks
        stages = min(len(self.dims), len(blocks))
        stage_of = [index * stages // len(blocks) for index in range(len(blocks))]

        def tokens(_: nn.Module) -> nn.Module:
            return MetaTokens(self.num_virtual_tokens, backbone.width)

        for index, (block, stage) in enumerate(zip(blocks, stage_of, strict=True)):
            first, last = index == 0, index == len(blocks) - 1
            starts = first or stage_of[index - 1] != stage
            build = partial(
                _rung,
                backbone.width,
                self.dims[stage],
                self.num_heads[stage],
                self.mlp_ratio,
                self.drop_path * index / max(1, len(blocks) - 1),
                backbone.image_channels if first else None,
                self.dims[stage - 1] if starts and not first else None,
                last or stage_of[index + 1] != stage,
                last,
            )
            yield Placement(block.path, "tokens", TokenSite(), tokens)
            yield from self._norms(block)
            site = SideSite(frozen=False, aligned=False, needs_layout=True, needs_pixels=first)
            bridge = Shared(f"bridge{stage}", partial(self._bridge, backbone.width, self.dims[stage]))
            yield Placement(block.path, "rung", site, build, bridge)

    @staticmethod
    def _bridge(width: int, dim: int) -> nn.Module:
        return nn.Linear(width, dim).apply(init_weights)

    @staticmethod
    def _norms(block: Block) -> Iterator[Placement]:
        for index, path in enumerate(block.modules((*NORM_ROLES, "further_norms"))):
            yield Placement(path, f"norm{index + 1}", WeightSite(), norm_deltas)
