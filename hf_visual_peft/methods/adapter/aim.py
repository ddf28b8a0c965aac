"""AIM."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BranchSite, Placement, TokenLayout, drop_path
from ...training.defaults import Training
from .bottleneck import Bottleneck
from .video import by_video, require_full_grid


def adapter(width: int, r: int) -> Bottleneck:
    """A bottleneck that starts at zero: W_down truncated normal of deviation 0.02, W_up and biases zero."""
    bottleneck = Bottleneck(width, r)
    nn.init.trunc_normal_(bottleneck.down.weight, std=0.02)
    nn.init.zeros_(bottleneck.up.weight)
    return bottleneck


class Temporal(nn.Module):
    """The block's own attention over frames, and a bottleneck.

        f(x) = e + DP(g(MHSA(LN1 (x + e)))),  each token attends to those at its position in the other frames

    Args:
        width: channels of the token stream.
        r: width of the bottleneck g.
        num_frames: length of the embedding e of a frame's position, zero at the start; None: there is no e.
        drop_path: rate of the stochastic depth DP.
    """

    def __init__(self, width: int, r: int, num_frames: int | None, drop_path: float = 0.0) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.adapter = adapter(width, r)
        self.embedding = None if num_frames is None else nn.Parameter(torch.zeros(num_frames, 1, width))

    def forward(self, x: Tensor, layout: TokenLayout, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Map (batch x frames, tokens, width) to the same shape; `attend` applies norm and attention."""
        t = by_video(x, layout)
        if self.embedding is not None:
            frames = t.shape[1]
            if frames > len(self.embedding):
                raise ValueError(f"The videos have {frames} frames, but num_frames is {len(self.embedding)}.")
            t = t + self.embedding[:frames]
        batch, _, tokens, _ = t.shape
        mixed = self.adapter(attend(t.transpose(1, 2).flatten(0, 1)))
        mixed = mixed.unflatten(0, (batch, tokens)).transpose(1, 2).flatten(0, 1)
        mixed = drop_path(mixed, self.drop_path, self.training)
        if self.embedding is not None:
            mixed = mixed + self.embedding[: t.shape[1]].repeat(batch, 1, 1)
        return mixed


class Joint(nn.Module):
    """A bottleneck times a fixed factor.

    Args:
        width: channels of the token stream.
        r: width of the bottleneck.
        scale: the factor.
        drop_path: rate of its stochastic depth.
    """

    def __init__(self, width: int, r: int, scale: float, drop_path: float) -> None:
        super().__init__()
        self.adapter = adapter(width, r)
        self.scale = scale
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch x frames, tokens, width) to the same shape."""
        return drop_path(self.scale * self.adapter(x), self.drop_path, self.training)


@register(
    name="aim",
    paper=Paper(
        "AIM: Adapting Image Models for Efficient Video Action Recognition",
        "ICLR 2023",
        "2302.03024",
    ),
    summary="bottlenecks after attention over frames, after attention and beside the MLP",
    visual_tuning="adapter: mix",
    equation="y = x + DP(T(MHSA_frames(LN1 x))); z = y + a + S(a), a = MHSA(LN1 y); "
    "out = z + MLP(LN2 z) + DP(s J(LN2 z))",
    counts=(({}, 10_651_392), ({"num_frames": 8}, 10_657_536)),
    mergeable=False,
    identity_at_start=True,
    training=Training(3e-4),
)
@dataclass
class AIMConfig(VisualPeftConfig):
    """Config of AIM, arXiv 2302.03024; for videos, `pixel_values` of (batch, frames, channels, height, width).

    Each block gets three bottlenecks. The temporal one follows the block's own attention, which first runs over
    frames, separately for each token position, CLS included. The spatial one follows the usual attention, with a skip
    connection. The joint one stands beside the MLP. The first and the last have a stochastic depth of their own, whose
    rate rises from 0 in the first block of the backbone to `drop_path` in the last. The backbone's own branches are
    not dropped in the authors' code: load it with a rate of 0. Here stochastic depth drops whole frames. The authors'
    code has the tokens in the first dimension there, and so drops one token position in all frames of all videos, at
    the same rate. The head sees the mean over frames. Attention over frames has no position biases, rotary embedding
    or layer scale of the backbone, which is our choice: the paper's backbones have none.

    The paper also trains an embedding of frame positions; `num_frames` adds it before the first adapted block (in the
    paper: before CLIP's first norm). The paper's 10.65 M parameters on ViT-B do not count it. Without it the order of
    frames makes no difference. The paper also trains the last norm; add it by `modules_to_save`. The second temporal
    adapter of its setting for Something-Something, before attention over frames, is not implemented.

    Args:
        ratio: width of the bottlenecks as a part of the backbone's width.
        scale: s of the joint adapter; 0.5 in the paper, 1 for Something-Something.
        drop_path: rate of the adapters' stochastic depth in the last block; 0.2 in the authors' configs.
        num_frames: length of the embedding of frame positions, the most frames a video may have; None: there is none.
    """

    ratio: float = field(default=0.25, metadata={"help": "Width of the bottlenecks as a part of the backbone's."})
    scale: float = field(default=0.5, metadata={"help": "Factor s of the adapter beside the MLP."})
    drop_path: float = field(default=0.2, metadata={"help": "Rate of the adapters' stochastic depth, last block."})
    num_frames: int | None = field(default=None, metadata={"help": "Length of the embedding of frame positions."})

    video: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_number("ratio", 0.0)
        if not 0 < self.ratio <= 1:
            self._fail("ratio", "a number above 0 and at most 1")
        self._require_number("scale")
        self._require_number("drop_path", 0.0, below=1.0)
        if self.num_frames is not None:
            self._require_integer("num_frames", 1, 10_000)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """The three bottlenecks of every block."""
        require_full_grid(type(self).__name__, backbone)
        if backbone.num_heads is None:
            raise ValueError(
                f"{type(self).__name__} does not fit {backbone.class_name}: its config has no num_attention_heads, "
                "which attention over frames needs."
            )
        width, r = backbone.width, int(backbone.width * self.ratio)
        if r == 0:
            self._fail("ratio", f"at least 1 / {width}, the backbone's width")
        temporal = BranchSite("attention", reads="input", needs_layout=True, attends=True)
        spatial = BranchSite("attention", reads="output")
        joint = BranchSite("mlp", reads="normed")
        for block in backbone.blocks:
            frames = self.num_frames if block is backbone.blocks[0] else None
            rate = self.drop_path * block.index / max(1, backbone.depth - 1)
            yield Placement(block.path, "temporal", temporal, partial(_temporal, width, r, frames, rate))
            yield Placement(block.path, "spatial", spatial, lambda _: adapter(width, r))
            yield Placement(block.path, "joint", joint, partial(_joint, width, r, self.scale, rate))


def _temporal(width: int, r: int, num_frames: int | None, rate: float, _: nn.Module) -> nn.Module:
    return Temporal(width, r, num_frames, rate)


def _joint(width: int, r: int, scale: float, rate: float, _: nn.Module) -> nn.Module:
    return Joint(width, r, scale, rate)
