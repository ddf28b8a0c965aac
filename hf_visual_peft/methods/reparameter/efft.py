"""Effective factor-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ...backbones.backbone import Block, VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import LinearSite, Placement, Shared
from ...training.defaults import Training
from .products import plus_product
from .rows import Rows, projections


class Factors(nn.Module):
    """U (sizes[0], r), C (r, r, matrices) and V (r, sizes[1]), Xavier-uniform except U or V, which is zero."""

    def __init__(self, sizes: tuple[int, int], r: int, matrices: int, zero: str) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(sizes[0], r))
        self.core = nn.Parameter(torch.zeros(r, r, matrices))
        self.v = nn.Parameter(torch.zeros(r, sizes[1]))
        for factor in (self.core, self.u if zero == "v" else self.v):
            nn.init.xavier_uniform_(factor)


class EFFT(nn.Module):
    """One of the updates that all blocks share.

        f(y, x) = y + s x drop(U) drop(C_k) drop(V),  or with the three factors' product transposed

    It has no weights of its own: the factors are passed in the call.

    Args:
        rows: the outputs of the linear that it acts on.
        index: k.
        transposed: whether V reads the input and U writes the output.
        scale: s.
        dropout: probability, on each factor.
    """

    def __init__(self, rows: Rows, index: int, transposed: bool, scale: float, dropout: float) -> None:
        super().__init__()
        self.rows, self.index, self.transposed, self.scale = rows, index, transposed, scale
        self.dropout = nn.Dropout(dropout)

    def chain(self, factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
        """The three matrices, the one that reads the input first."""
        u, core, v = factors.u, factors.core[..., self.index], factors.v
        return (v.T, core.T, u.T) if self.transposed else (u, core, v)

    def forward(self, y: Tensor, x: Tensor, factors: Factors) -> Tensor:
        """The new output (..., out_features), from the linear's output and its input (..., in_features)."""
        first, core, last = map(self.dropout, self.chain(factors))
        # the small matrices first: each product with the tokens is a pass over all of them
        return plus_product(y, x @ (first @ core), self.rows.pad(last, y.shape[-1], dim=-1), self.scale)

    @torch.no_grad()
    def fold(self, weight: Tensor, bias: Tensor | None, factors: Factors) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the linear with the update folded in."""
        first, core, last = (matrix.to(weight) for matrix in self.chain(factors))
        return weight + self.rows.pad(self.scale * (first @ core @ last).T, len(weight), dim=-2), bias


ZERO = ("vv", "vu", "uv", "uu")


@register(
    name="efft",
    paper=Paper(
        "Aggregate, Decompose, and Fine-Tune: A Simple Yet Effective Factor-Tuning Method for Vision Transformer",
        "arXiv 2023",
        "2311.06749",
    ),
    summary="one low-rank update for all blocks, with a core for each linear",
    visual_tuning="parameter: weight",
    equation="W + s (U C_k V)^T in all blocks, k = q, k, v, o with one set of factors, fc1 and fc2^T with another",
    counts=(({"r": 16}, 87_552),),
    mergeable=True,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class EFFTConfig(VisualPeftConfig):
    """Config of effective factor-tuning (EFFT), arXiv 2311.06749.

    All blocks share one update for each of their linears. Those of attention are U1 C1_k V1, those of the MLP U2 C2_k
    V2, transposed for its last linear. Dropout acts on the factors; the authors draw one mask for the four matrices of
    a block's attention, here each linear draws its own, as theirs do in the MLP.

    On backbones with stages, each stage has its own factors, of one rank, and square cores. The authors' code for Swin
    doubles the rank from stage to stage and has cores of r x 2r in the MLP: on Swin-B its ranks of 4 to 32 (2 to 16 in
    the MLP) give 289,680 parameters that are used; here r=16 gives 221,184.

    A gated MLP has a C2_k for each of its two input matrices, which is our choice. The linears of attention must be as
    wide as the backbone.

    Args:
        r: rank; the authors take 8, 16 or 32 per task.
        scale: s; the authors take 0.01 to 100.
        dropout: probability, on a factor.
        zero_factors: which factor is zero at the start, first in attention, then in the MLP: `"vv"`, `"vu"`, `"uv"` or
            `"uu"`; the authors choose between the first two per task.
    """

    r: int = field(default=16, metadata={"help": "Rank of the decomposition."})
    scale: float = field(default=1.0, metadata={"help": "Factor s of the update."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability on a factor."})
    zero_factors: str = field(default="vv", metadata={"help": f"Zero in attention and MLP: {', '.join(ZERO)}."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_number("scale")
        self._require_number("dropout", 0.0, below=1.0)
        self._require_choice("zero_factors", ZERO)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At every linear of every block.

        Raises:
            ValueError: a linear does not have the size for which all blocks share one update.
        """
        width = backbone.width
        self._require_integer("r", 1, width, "the backbone's width")
        paths = (path for block in backbone.blocks for path in block.roles["fc2"])
        hidden = next((backbone.linears[path][1] for path in paths), 0)
        for block in backbone.blocks:
            for name, wide, matrices, zero in (
                ("attention", width, projections(backbone, block), self.zero_factors[0]),
                ("mlp", hidden, _mlp(backbone, block, hidden), self.zero_factors[1]),
            ):
                shared = Shared(name, partial(Factors, (width, wide), self.r, len(matrices), zero))
                for index, (slot, rows) in enumerate(matrices.items()):
                    transposed = slot == "fc2"
                    expected = (width, wide) if transposed else (wide, width)
                    if (rows.size, backbone.linears[rows.path][1]) != expected:
                        raise ValueError(
                            f"{type(self).__name__}: the update that all blocks share is {expected}, and {rows.path} "
                            f"has {rows.size} rows of {backbone.linears[rows.path][1]}."
                        )
                    yield Placement(rows.path, slot, LinearSite(), self._builder(rows, index, transposed), shared)

    def _builder(self, rows: Rows, index: int, transposed: bool) -> Callable[[nn.Module], nn.Module]:
        return lambda _: EFFT(rows, index, transposed, self.scale, self.dropout)


def _mlp(backbone: VisionBackbone, block: Block, hidden: int) -> dict[str, Rows]:
    """The input matrices of the MLP, each of `hidden` rows, and its output matrix."""
    into = [
        Rows(path, start, min(hidden, backbone.linears[path][0] - start))
        for path in block.roles["fc1"]
        for start in range(0, backbone.linears[path][0], hidden)
    ]
    found = {f"fc1_{index}": rows for index, rows in enumerate(into)}
    out = block.roles["fc2"]
    return found | {"fc2": Rows(out[0], 0, backbone.linears[out[0]][0])} if out else found
