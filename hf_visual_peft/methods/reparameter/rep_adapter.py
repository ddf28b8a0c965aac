"""RepAdapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import Block, VisionBackbone
from ...core.registry import Paper, register
from ...core.targets import TargetedConfig
from ...sites import OutputSite, Placement
from ...sites.input import InputSite, OnInput
from ...training.defaults import Training


class RepAdapter(nn.Module):
    """A bottleneck without activation whose second linear is grouped.

        f(x) = x + s (blockdiag(B_1 .. B_g) dropout(A x + a) + b)

    Group i maps its own part of the bottleneck to its own part of the channels. A is Xavier-uniform, the rest zero.

    Args:
        width: channels of the token stream.
        r: width of the bottleneck.
        groups: g.
        scale: s.
        dropout: probability, in the bottleneck.
    """

    def __init__(self, width: int, r: int, groups: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, r)
        self.up = nn.Parameter(torch.zeros(groups, width // groups, r // groups))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        # the groups as one matrix, mostly zeros: faster than a product for each
        dense = self.scale * torch.block_diag(*self.up)
        return x + F.linear(self.dropout(self.down(x)), dense, self.scale * self.bias)

    def fold_input(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight and bias of the linear with RepAdapter folded in."""
        down, hidden_bias, shift = (p.to(weight) for p in (self.down.weight, self.down.bias, self.bias))
        dense = torch.block_diag(*self.up.to(weight))
        addend = weight @ (self.scale * (dense @ hidden_bias + shift))
        return weight + self.scale * (weight @ dense @ down), addend if bias is None else bias + addend


NORMS = {"attention": "norm1", "mlp": "norm2"}  # before each sub-layer


def norms_before(block: Block, sublayer: str) -> Iterator[tuple[str, OutputSite]]:
    """Full names of the norms before a sub-layer, each with the site that merges into the modules that read it.

    Raises:
        ValueError: the norms come after the sub-layers.
    """
    if block.post_norm:
        raise ValueError(f"The norms of {block.path} follow its sub-layers, so no adapter fits between them.")
    site = OutputSite(block.readers[sublayer])
    for path in block.roles[NORMS[sublayer]]:
        yield path, site


@register(
    name="repadapter",
    paper=Paper("Towards Efficient Visual Adaption via Structural Re-parameterization", "arXiv 2023", "2302.08106"),
    summary="affine bottlenecks before attention and MLP",
    visual_tuning="adapter: sequential",
    equation="x + sublayer(f(LN x)), f(x) = x + s (GroupedLinear_g(A x + a) + b)",
    counts=(({"r": 8, "groups": 2}, 239_808), ({"r": 8, "groups": 2, "sublayers": ("attention",)}, 119_904)),
    mergeable=True,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class RepAdapterConfig(TargetedConfig):
    """Config of RepAdapter, arXiv 2302.08106.

    A bottleneck without activation stands between each norm and the sub-layer that reads it. It is affine, so it folds
    into the projections to queries, keys and values and into the first linear(s) of the MLP. Where these have no bias
    (keys of BEiT), merging gives them one. The released code merges the MLP's adapter only if it is grouped; here any
    number of groups merges. With `target_modules` one adapter stands before each of these linears and folds into that
    linear alone.

    Args:
        r: width of the bottleneck; a multiple of `groups`.
        groups: g, of the second linear; must divide the backbone's width.
        scale: s; the paper tunes it in 0.1 to 10.
        dropout: probability, in the bottleneck.
        sublayers: before which sub-layers: `"attention"`, `"mlp"`.
    """

    r: int = field(default=8, metadata={"help": "Width of the bottleneck."})
    groups: int = field(default=2, metadata={"help": "Groups of the second linear."})
    scale: float = field(default=1.0, metadata={"help": "Factor s of what the adapter adds."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability in the bottleneck."})
    sublayers: tuple[str, ...] = field(default=tuple(NORMS), metadata={"help": "Before which: attention, mlp."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_integer("groups", 1)
        if self.r % self.groups:
            self._fail("groups", f"a divisor of r, which is {self.r}")
        self._require_number("scale")
        self._require_number("dropout", 0.0, below=1.0)
        self._require_some("sublayers", NORMS)
        if self.target_modules is not None and len(self.sublayers) < len(NORMS):
            self._fail("sublayers", "left out where target_modules is given")

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """On the output of the norms before the chosen sub-layers of every block."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")
        if backbone.width % self.groups:
            self._fail("groups", f"a divisor of the backbone's width {backbone.width}")

        def build(_: nn.Module) -> nn.Module:
            return RepAdapter(backbone.width, self.r, self.groups, self.scale, self.dropout)

        for block in backbone.blocks:
            for sublayer in self.sublayers:
                for path, site in norms_before(block, sublayer):
                    yield Placement(path, sublayer, site, build)

    def _at(self, path: str) -> Placement:
        return Placement(path, "input", InputSite(), self._before)  # type: ignore[arg-type]

    def _before(self, linear: nn.Linear) -> OnInput:
        size = linear.in_features
        if size % self.groups:
            self._fail("groups", f"a divisor of in_features, which is {size} of {linear}")
        return OnInput(RepAdapter(size, self.r, self.groups, self.scale, self.dropout))
