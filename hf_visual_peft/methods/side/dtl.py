"""Disentangled transfer learning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import Block, VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BlockView, Placement, Shared, SideSite
from ...training.defaults import Training


class CompactPiece(nn.Module):
    """The piece of the compact side network beside one block.

        h <- h + B A x;  output of the block <- output + h', h' = h sigmoid(beta h), in DTL+ convolved

    A is Kaiming-uniform with a = sqrt 5, B zero.

    Args:
        width: channels of x and h.
        r: rank of B A.
        beta: sharpness of the activation; the larger, the closer to ReLU.
        begins: whether h starts here, at 0.
        adds: whether h' is added to this block's output.
    """

    def __init__(self, width: int, r: int, beta: float, begins: bool, adds: bool) -> None:
        super().__init__()
        self.beta, self.begins, self.adds = beta, begins, adds
        self.down = nn.Parameter(torch.empty(r, width))
        self.up = nn.Parameter(torch.zeros(width, r))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(
        self, h: Tensor | None, view: BlockView, conv: nn.Module | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Map h (batch, tokens, width) to the new h, and h' or None."""
        x = view.after if view.before is None else view.before
        assert x is not None
        change = F.linear(F.linear(x, self.down), self.up)
        h = change if h is None or self.begins else h + change
        if not self.adds:
            return h, None
        # = h sigmoid(beta h); silu keeps one tensor for the backward pass, the product would keep two
        active = F.silu(h * self.beta) / self.beta
        if conv is not None:
            assert view.layout is not None
            prefix, maps = view.layout.split(active)
            active = view.layout.join(prefix, conv(maps))
        return h, active


@register(
    name="dtl",
    paper=Paper("DTL: Disentangled Transfer Learning for Visual Recognition", "AAAI 2024", "2312.07856"),
    summary="low-rank maps of every block's input, added up and given back to the second half of the blocks",
    visual_tuning="adapter: parallel",
    equation="h_i = h_{i-1} + B_i A_i x_i; x_{i+1} = Block_i(x_i) + h_i sigmoid(beta h_i) in the second half",
    counts=(({}, 36_864), ({"plus": True}, 56_064), ({"plus": True, "kernel_size": 3}, 43_776)),
    mergeable=False,
    identity_at_start=True,
    gradients="partial",
    training=Training(3e-3),
)
@dataclass
class DTLConfig(VisualPeftConfig):
    """Config of disentangled transfer learning (DTL and, with `plus`, DTL+), arXiv 2312.07856.

    A compact network beside the backbone sums low-rank maps of the input of each block. The sum is added to the output
    of the late blocks. Gradients cross only the blocks after the first addition: in ViT-B/16 blocks 7 to 11 of 0 to
    11. x_i is not detached, so in these blocks gradients also pass through A_i. The blocks before run in eval mode;
    the authors' code uses dropout and stochastic depth there.

    From the authors' code: the equation, the initialisation, and a network that restarts with h = 0 in every stage of
    a hierarchical backbone, so that stages without an addition have no network. Each stage has one convolution, as
    there. In the authors' code the addition begins at block 14 of Swin-B's 24, and the head reads the mean of the
    patches; here the model keeps its own pooling and head. In a block that pools tokens itself (Hiera) x is the
    block's output, because its input does not have the stage's size.

    Args:
        r: rank of each B A.
        beta: sharpness of the activation.
        add_from: index of the first block with an addition; None means half the depth.
        plus: DTL+: h' goes through a depth-wise convolution over the patch grid, without bias, which all blocks of a
            stage share. Prefix tokens skip it. It starts as in `nn.Conv2d`.
        kernel_size: of the convolution, odd, in patches.
    """

    r: int = field(default=2, metadata={"help": "Rank of the map beside each block."})
    beta: float = field(default=100.0, metadata={"help": "Sharpness of the activation h sigmoid(beta h)."})
    add_from: int | None = field(
        default=None, metadata={"help": "Index of the first block whose output is changed; default: half the depth."}
    )
    plus: bool = field(default=False, metadata={"help": "DTL+: convolve what is added over the patch grid."})
    kernel_size: int = field(default=5, metadata={"help": "Rows and columns of the convolution's kernel, odd."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_number("beta")
        if self.beta <= 0:
            self._fail("beta", "greater than 0")
        if self.add_from is not None:
            self._require_integer("add_from", 0)
        self._require_choice("plus", (True, False))
        self._require_integer("kernel_size", 1)
        if self.kernel_size % 2 == 0:
            self._fail("kernel_size", "odd")
        if not self.plus:
            self._require_unset("kernel_size", "with plus False")

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Beside every block of the stages that have an addition."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")
        if self.add_from is not None:
            self._require_integer("add_from", 0, backbone.depth - 1, "the last block")
        add_from = backbone.depth // 2 if self.add_from is None else self.add_from
        if self.layers is not None and max(self.layers) < add_from:
            self._fail("layers_to_transform", f"None or have an index of at least {add_from}, where additions begin")
        if backbone.blocks[-1].index < add_from:
            return
        width, size = backbone.width, self.kernel_size
        conv = partial(nn.Conv2d, width, width, size, padding=size // 2, groups=width, bias=False)
        shared = Shared("conv", conv) if self.plus else None

        def piece(block: Block) -> Callable[[nn.Module], nn.Module]:
            begins, adds = block is backbone.blocks[0], block.index >= add_from
            return lambda _: CompactPiece(width, self.r, self.beta, begins, adds)

        for block in backbone.blocks:
            adds = block.index >= add_from
            reads: tuple[Literal["before", "after"]] = ("after",) if block.pools else ("before",)
            site = SideSite(reads, frozen=block.index <= add_from, ends=False, needs_layout=self.plus and adds)
            yield Placement(block.path, "piece", site, piece(block), shared if adds else None)
