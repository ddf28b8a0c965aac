"""Parallel attention of V-PETL."""

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
from ...sites import LinearSite, Placement, Shared
from ...training.defaults import Training
from ..reparameter.rows import Rows, projections


PAPER = Paper("Towards a Unified View on Visual Parameter-Efficient Transfer Learning", "arXiv 2022", "2210.00788")
ROLES = ("query", "key", "value")
STD = 0.02


class Offsets(nn.Module):
    """What is added to the projections of one block, one part after the other.

        [dK, dV] = W_2 tanh(W_1 x + b_1) + b_2,  W ~ N(0, 0.02) cut at two units, b = 0

    Args:
        width: channels of the projections' input.
        r: width of the bottleneck.
        total: channels of all projections that it makes offsets for.
        bias: whether there are b_1 and b_2.
    """

    def __init__(self, width: int, r: int, total: int, bias: bool) -> None:
        super().__init__()
        self.down = nn.Linear(width, r, bias=bias)
        self.up = nn.Linear(r, total, bias=bias)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=STD)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, start: int, size: int) -> Tensor:
        """The offsets of one projection, (..., size)."""
        rows = slice(start, start + size)
        bias = None if self.up.bias is None else self.up.bias[rows]
        return F.linear(torch.tanh(self.down(x)), self.up.weight[rows], bias)


class Offset(nn.Module):
    """The offset of one projection.

        f(y, x) = y + s dK(x)

    Args:
        rows: outputs of the linear that are this projection.
        start: of its offsets among those of the block.
        scale: s.
    """

    def __init__(self, rows: Rows, start: int, scale: float) -> None:
        super().__init__()
        self.rows, self.start, self.scale = rows, start, scale

    def forward(self, y: Tensor, x: Tensor, offsets: nn.Module) -> Tensor:
        """The new output (..., out_features), from the linear's output and its input (..., in_features)."""
        offset = self.scale * offsets(x, self.start, self.rows.size)
        return y + self.rows.pad(offset, y.shape[-1], dim=-1)


@register(
    name="patt",
    paper=PAPER,
    summary="a bottleneck that adds to keys and values",
    visual_tuning="prompt: vision-driven",
    equation="K + s dK, V + s dV with [dK, dV] = W_2 tanh(W_1 x + b_1) + b_2, x: the input of the projections",
    counts=(({"r": 32}, 903_552), ({"r": 8}, 239_712)),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class PATTConfig(VisualPeftConfig):
    """Config of the parallel attention (PATT) of V-PETL, arXiv 2210.00788.

    A bottleneck beside the projections to keys and values adds to both. It takes the place that the MLP of prefix
    tuning has, but reads the tokens themselves; nothing attends to learned tokens. The released code makes weights
    without biases where the backbone's projections have none; that is `biases=False` here.

    Args:
        r: width of the bottleneck.
        scale: s; 0.8 in the authors' commands, 0.2 in their code's defaults.
        offsets: projections that get an offset: `"query"`, `"key"`, `"value"`.
        biases: whether the bottleneck has biases.
    """

    r: int = field(default=32, metadata={"help": "Width of the bottleneck."})
    scale: float = field(default=0.8, metadata={"help": "Factor s of the offsets."})
    offsets: tuple[str, ...] = field(
        default=("key", "value"), metadata={"help": "Projections that get an offset: query, key, value."}
    )
    biases: bool = field(default=True, metadata={"help": "Whether the bottleneck has biases."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_number("scale")
        self._require_some("offsets", ROLES)
        self._require_choice("biases", (True, False))

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At the projections of every block."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")
        for block in backbone.blocks:
            rows = projections(backbone, block)
            found = [rows[role] for role in self.offsets if role in rows]
            inputs = sorted({backbone.linears[each.path][1] for each in found})
            if not found:
                continue
            if len(inputs) > 1:
                raise ValueError(
                    f"{self.title} does not fit {backbone.class_name}: the projections of {block.path!r} "
                    f"read inputs of {' and '.join(map(str, inputs))} channels, and the bottleneck has one input."
                )
            total = sum(each.size for each in found)
            shared = Shared(f"network{block.index}", partial(Offsets, inputs[0], self.r, total, self.biases))
            start = 0
            for role in (role for role in self.offsets if role in rows):
                build = partial(self._build, rows[role], start)
                yield Placement(rows[role].path, role, LinearSite(), build, shared)
                start += rows[role].size

    def _build(self, rows: Rows, start: int, _: nn.Module) -> Offset:
        return Offset(rows, start, self.scale)
