"""Kronecker adaptation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from .rows import Rows, projections


RULE_BOUND = 0.01  # as in the authors' code
ROLES = ("query", "value")


def pairwise(a: Tensor, b: Tensor) -> Tensor:
    """The Kronecker product of each row of a (n, p) with the same row of b (n, q): (n, p q)."""
    return (a[:, :, None] * b[:, None, :]).flatten(1)


class Rules(nn.Module):
    """R_i = a_i b_i^T for queries and for values, shared by all blocks; and a bias per block, shared by these two.

    a_i and b_i are drawn from U(-0.01, 0.01), one in each row of a parameter (n, n); biases are zero.

    Args:
        n: number of terms and size of each R_i.
        blocks: indices of the blocks.
        size: of a bias.
    """

    def __init__(self, n: int, blocks: Sequence[int], size: int) -> None:
        super().__init__()
        for side in ("left", "right"):
            for role in ROLES:
                self.register_parameter(f"{role}_{side}", nn.Parameter(torch.empty(n, n)))
        for rule in self.parameters():
            nn.init.uniform_(rule, -RULE_BOUND, RULE_BOUND)
        self.bias = nn.ParameterDict({str(index): nn.Parameter(torch.zeros(size)) for index in blocks})

    def of(self, role: str) -> tuple[Tensor, Tensor]:
        """All a_i and all b_i of queries or values, (n, n) each."""
        return getattr(self, f"{role}_left"), getattr(self, f"{role}_right")


class KAdaptation(nn.Module):
    """An update that is a sum of Kronecker products.

        f(y, x) = y + s x dropout(sum_i R_i kron (l_i r_i^T)) + bias

    l is Glorot-uniform with a gain of sqrt 2, r is zero; R_i and the bias are passed in the call.

    Args:
        rows: the outputs of the linear that it acts on.
        in_features: of the linear.
        n: number of terms; divides both sizes.
        role: whose rules apply, `"query"` or `"value"`.
        block: whose bias applies.
        scale: s.
        dropout: probability, on the sum.
    """

    def __init__(
        self, rows: Rows, in_features: int, n: int, role: str, block: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(n, in_features // n))
        self.right = nn.Parameter(torch.zeros(n, rows.size // n))
        self.rows, self.role, self.block, self.scale = rows, role, str(block), scale
        self.dropout = nn.Dropout(dropout)
        bound = 2**0.5 * (6 / (in_features // n + 1)) ** 0.5  # each l_i by itself, as a matrix of one column
        nn.init.uniform_(self.left, -bound, bound)

    def matrix(self, rules: Rules) -> Tensor:
        """The sum (in_features, rows), of n terms of rank one: a_i kron l_i times b_i kron r_i."""
        a, b = rules.of(self.role)
        return pairwise(a, self.left).T @ pairwise(b, self.right)

    def forward(self, y: Tensor, x: Tensor, rules: Rules) -> Tensor:
        """The new output (..., out_features), from the linear's output and its input (..., in_features)."""
        update = F.linear(x, self.scale * self.dropout(self.matrix(rules)).T, rules.bias[self.block])
        return y + self.rows.pad(update, y.shape[-1], dim=-1)

    @torch.no_grad()
    def fold(self, weight: Tensor, bias: Tensor | None, rules: Rules) -> tuple[Tensor, Tensor]:
        """Weight and bias of the linear with the update folded in."""
        update = self.rows.pad(self.scale * self.matrix(rules).T.to(weight), len(weight), dim=-2)
        addend = self.rows.pad(rules.bias[self.block].to(weight), len(weight), dim=-1)
        return weight + update, addend if bias is None else bias + addend


@register(
    name="kadaptation",
    paper=Paper("Parameter-efficient Model Adaptation for Vision Transformers", "AAAI 2023", "2203.16329"),
    summary="updates of queries and values as sums of Kronecker products",
    visual_tuning="parameter: weight",
    equation="W_m + s (sum_i R_i kron (l_i r_i^T))^T for m = q, v, the R_i shared by all blocks",
    counts=(({"n": 32}, 50_176),),
    mergeable=True,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class KAdaptationConfig(VisualPeftConfig):
    """Config of Kronecker adaptation (KAdaptation), arXiv 2203.16329.

    The projections to queries and to values are updated by sums of Kronecker products of n x n matrices of rank one,
    which all blocks share, with matrices of rank one that belong to each block. A block's two updates share a bias. In
    the authors' released code both factors of a block start at zero, so that only the bias ever trains, and values use
    the factors of queries. Here, as in the paper's equation, values have their own; one factor starts Glorot-uniform
    and the other at zero, which is our choice.

    Args:
        n: number of terms and size of the shared matrices; must divide the sizes of the projections.
        scale: s; 5 x 128 / 4 in the authors' code.
        dropout: probability, on the update itself, not on an activation.
    """

    n: int = field(default=32, metadata={"help": "Number of terms and size of the shared matrices."})
    scale: float = field(default=160.0, metadata={"help": "Factor s of the update."})
    dropout: float = field(default=0.5, metadata={"help": "Dropout probability on the update."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("n", 1)
        self._require_number("scale")
        self._require_number("dropout", 0.0, below=1.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At the projections to queries and values of every block."""
        blocks = [block for block in backbone.blocks if all(block.roles[role] for role in ROLES)]
        if not blocks:
            return
        size = projections(backbone, blocks[0])["value"].size
        shared = Shared("rules", partial(Rules, self.n, [block.index for block in blocks], size))
        for block in blocks:
            found = projections(backbone, block)
            for role in ROLES:
                rows, in_features = found[role], backbone.linears[found[role].path][1]
                if size % self.n or in_features % self.n:
                    self._fail("n", f"a divisor of the sizes of {rows.path}, {in_features} to {size}")
                if rows.size != size:
                    raise ValueError(
                        f"{type(self).__name__}: {rows.path} has {rows.size} rows; the shared bias has {size}."
                    )
                yield Placement(
                    rows.path, role, LinearSite(), self._builder(rows, in_features, role, block.index), shared
                )

    def _builder(self, rows: Rows, in_features: int, role: str, block: int) -> Callable[[nn.Module], nn.Module]:
        return lambda _: KAdaptation(rows, in_features, self.n, role, block, self.scale, self.dropout)
