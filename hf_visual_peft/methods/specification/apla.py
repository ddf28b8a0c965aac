"""APLA."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import LinearSite, Placement
from ...training.defaults import Training
from .deltas import Chosen


class APLA(nn.Module):
    """Additions to some rows of a linear's weight and bias, zero at the start.

        f(y, x) = y,  but y_R + D x + d in the channels R

    R is drawn at random once, and saved.

    Args:
        linear: the linear, for its sizes.
        r: number of rows.
    """

    no_weight_decay = ("rows", "shift")

    def __init__(self, linear: nn.Linear, r: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(r, linear.in_features))
        self.shift = None if linear.bias is None else nn.Parameter(torch.zeros(r))
        self.channels = Chosen(r, linear.out_features, "APLA")
        if not self.channels.indices.is_meta:
            self.channels.choose(torch.randperm(linear.out_features)[:r].sort().values)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The new output (..., out_features), from the linear's output and its input (..., in_features)."""
        return y.index_add(-1, self.channels(), F.linear(x, self.rows, self.shift))

    @torch.no_grad()
    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the linear with the additions."""
        channels = self.channels()
        if bias is not None and self.shift is not None:
            bias = bias.index_add(0, channels, self.shift.to(bias))
        return weight.index_add(0, channels, self.rows.to(weight)), bias


@register(
    name="apla",
    paper=Paper("APLA: A Simple Adaptation Method for Vision Transformers", "CVPR 2025", "2503.11335"),
    summary="random rows of every attention's output projection train",
    visual_tuning="parameter: weight",
    equation="W_o + dW_o, b_o + db_o at the attention's output, both zero outside r random rows",
    counts=(({"r": 8}, 73_824), ({"r": 768}, 7_087_104)),
    mergeable=True,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class APLAConfig(VisualPeftConfig):
    """Config of APLA (adapting through the projection after attention), arXiv 2503.11335.

    Of the whole backbone only rows of the linear after each attention train, with their biases: r output channels,
    drawn at random for each block when the adapter is made, by torch's generator. r equal to the width is the paper's
    full APLA. The README of the authors' code speaks of columns; the code, and this method, take output rows.

    The adapter holds the changes of these rows, not the rows, so that it switches off and merges. In the authors' code
    weight decay acts on the rows themselves; the changes here never decay.

    Args:
        r: rows of each output projection that train.
    """

    r: int = field(default=8, metadata={"help": "Rows of each attention's output projection that train."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At the linear after attention of every block."""
        for block in backbone.blocks:
            for path in block.roles["output"]:
                self._require_integer("r", 1, backbone.linears[path][0], f"the output channels of {path}")
                yield Placement(path, "rows", LinearSite(), partial(APLA, r=self.r))
