"""Consolidator."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ...backbones.backbone import LINEAR_ROLES, VisionBackbone
from ...core.registry import Paper, register
from ...core.targets import TargetedConfig
from ...sites import LinearSite, Placement, drop_path
from ...training.defaults import Training


INIT_BOUND = 1e-3


class Consolidator(nn.Module):
    """A grouped linear beside a linear.

        f(y, x) = y + DP(blockdiag(W_1 .. W_g) shuffle(x) + b)

    Group i maps its own part of the input to its own part of the output. `shuffle` is that of ShuffleNet: the channels
    are cut into g pieces, and the first of each, the second of each, and so on, come one after the other. Weights and
    biases are drawn from U(-bound, bound).

    Args:
        linear: the linear, for its sizes.
        groups: g; None for half the greatest common divisor of the sizes, or the whole divisor if it is odd.
        shuffle: whether the channels are shuffled.
        drop_path: rate of the branch's stochastic depth.
        bound: of weights and biases at the start.
    """

    def __init__(
        self, linear: nn.Linear, groups: int | None, shuffle: bool, drop_path: float, bound: float = INIT_BOUND
    ) -> None:
        super().__init__()
        if groups is None:
            divisor = math.gcd(linear.in_features, linear.out_features)
            groups = divisor if divisor % 2 else divisor // 2
        for name, size in (("in_features", linear.in_features), ("out_features", linear.out_features)):
            if size % groups:
                raise ValueError(f"groups is {groups}: must divide {name} {size} of {linear}.")
        shape = (groups, linear.out_features // groups, linear.in_features // groups)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(linear.out_features).uniform_(-bound, bound))
        self.shuffle = shuffle
        self.drop_path = drop_path

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The new output (..., out_features), from the linear's output and input (..., in_features)."""
        groups, _, size = self.weight.shape
        if self.shuffle:
            x = x.unflatten(-1, (groups, size)).transpose(-1, -2).flatten(-2)
        branch = torch.einsum("...gi,goi->...go", x.unflatten(-1, (groups, size)), self.weight).flatten(-2) + self.bias
        return y + drop_path(branch, self.drop_path, self.training)

    @torch.no_grad()
    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight and bias of the linear with the branch folded in."""
        groups, _, size = self.weight.shape
        dense = torch.block_diag(*self.weight.to(weight))
        if self.shuffle:  # the shuffle undone: each column goes to the channel that it reads
            dense = dense.unflatten(1, (size, groups)).transpose(1, 2).flatten(1)
        addend = self.bias.to(weight)
        return weight + dense, addend if bias is None else bias + addend


@register(
    name="consolidator",
    paper=Paper(
        "Consolidator: Mergeable Adapter with Grouped Connections for Visual Adaptation", "ICLR 2023", "2305.00603"
    ),
    summary="a grouped linear beside every linear",
    visual_tuning="adapter: parallel",
    equation="y = W x + b + DP(GroupConv1x1_g(shuffle_g(x))) at every linear of the blocks",
    counts=(({}, 304_128), ({"groups": 384}, 304_128)),
    mergeable=True,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class ConsolidatorConfig(TargetedConfig):
    """Config of Consolidator, arXiv 2305.00603.

    A grouped linear stands beside every linear of the blocks. Starts close to the identity. Where queries, keys and
    values are separate linears, each has its own groups. The authors' code has one fused linear, whose groups connect
    other channels, with as many parameters and connections. With `target_modules` weights and biases are zero at the
    start.

    Args:
        groups: g; must divide the sizes of all linears. By default half the width, so that a group reads two channels
            of the stream, as the paper's 384 groups do on ViT-B; with `target_modules` half the greatest common
            divisor of a linear's sizes, or the whole divisor if it is odd.
        shuffle: shuffle the input channels, as ShuffleNet does, before they are cut into groups; the authors' training
            does not.
        drop_path: rate of the branch's stochastic depth, tuned per task in the paper.
    """

    groups: int | None = field(default=None, metadata={"help": "Groups; by default half the backbone's width."})
    shuffle: bool = field(
        default=False, metadata={"help": "Shuffle the input channels before they are cut into groups."}
    )
    drop_path: float = field(default=0.0, metadata={"help": "Rate of the branch's stochastic depth."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups is not None:
            self._require_integer("groups", 1)
        self._require_choice("shuffle", (True, False))
        self._require_number("drop_path", 0.0, below=1.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Beside every linear of every block."""
        groups = self.groups or backbone.width // 2
        if backbone.width % groups:
            self._fail("groups", f"a divisor of the backbone's width {backbone.width}")
        for block in backbone.blocks:
            for path in block.modules(LINEAR_ROLES):
                fits = self.groups or not any(size % groups for size in backbone.linears[path])
                own = groups if fits else None  # the linear's own, as with explicit targets
                build = partial(Consolidator, groups=own, shuffle=self.shuffle, drop_path=self.drop_path)
                yield Placement(path, "groups", LinearSite(), build)

    def _at(self, path: str) -> Placement:
        build = partial(Consolidator, groups=self.groups, shuffle=self.shuffle, drop_path=self.drop_path, bound=0.0)
        return Placement(path, "groups", LinearSite(), build)
