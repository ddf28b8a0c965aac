"""Sparse tuning with kernelized low-rank factors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import LINEAR_ROLES, VisionBackbone
from ...core.registry import Paper, register
from ...core.targets import TargetedConfig
from ...sites import LinearSite, Placement, drop_path
from ...training.defaults import Training


COEFFICIENTS = (0.1, -0.1)  # of the two distances, constants in the authors' code
WEIGHTINGS = ("magnitude", "mask")


def threshold(magnitudes: Tensor, sparsity: float) -> Tensor:
    """The largest of the `sparsity` smallest entries: all above it, and only these, are above that quantile.

    It takes any number of entries; `torch.quantile` takes at most 16 million.
    """
    rank = math.floor(sparsity * (magnitudes.numel() - 1))
    return magnitudes.flatten().kthvalue(rank + 1).values


class _Sparse(torch.autograd.Function):
    """x D^T, where D is computed again in the backward pass: only which of its entries are kept is saved."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, columns: Tensor, gate: Tensor | None, kept: Tensor, magnitude: bool
    ) -> Tensor:
        """The product; `kept` marks the entries of D."""
        delta = _kept_entries(_differences(torch.cdist(rows, columns)), kept, magnitude)
        delta = delta if gate is None else gate * delta
        ctx.save_for_backward(x, rows, columns, gate, kept)
        ctx.magnitude = magnitude
        return F.linear(x, delta.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """|d| passes no gradient, and neither does a distance of zero, as in `torch.cdist`."""
        x, rows, columns, gate, kept = ctx.saved_tensors
        distances = torch.cdist(rows, columns)
        dense = _differences(distances)
        delta = _kept_entries(dense, kept, ctx.magnitude)
        gated = delta if gate is None else gate * delta
        grad_x = (grad @ gated.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        to_delta = (grad.flatten(0, -2).T @ x.flatten(0, -2).to(grad.dtype)).to(delta.dtype)
        grad_gate = None if gate is None else (to_delta * delta).sum().view_as(gate)
        to_dense = to_delta * (dense.abs() * kept if ctx.magnitude else kept)
        to_dense = to_dense if gate is None else gate * to_dense
        share = to_dense * torch.where(distances == 0, 0.0, distances.reciprocal())
        share *= torch.tensor(COEFFICIENTS, device=share.device, dtype=share.dtype)[:, None, None]
        to_rows = share.sum(dim=2, keepdim=True) * rows - share @ columns
        to_columns = share.sum(dim=1).unsqueeze(-1) * columns - share.mT @ rows
        return grad_x, to_rows, to_columns, grad_gate, None, None


def _differences(distances: Tensor) -> Tensor:
    return COEFFICIENTS[0] * distances[0] + COEFFICIENTS[1] * distances[1]


def _kept_entries(dense: Tensor, kept: Tensor, magnitude: bool) -> Tensor:
    return dense * (dense.abs() * kept if magnitude else kept)


class SNELL(nn.Module):
    """An update of distances between the rows of two factors; only its largest entries are kept.

        f(y, x) = y + DP(D dropout(x))
        D_ij = S(0.1 ||u_i - v_j|| - 0.1 ||u'_i - v'_j||),  S(d) = d |d| or d where |d| is above the quantile, else 0

    Each side has a factor of two halves, (2, features, r / 2), drawn as in `nn.Linear`, with a fan-in of features x r
    / 2. |d| in S passes no gradient. D is recomputed in the backward pass, which saves its memory; only which of its
    entries are kept is saved.

    No gradient passes where D is zero. Where the start must be the identity, a gate g that starts at zero multiplies
    D, and the factors are drawn from N(0, 1). The gate does not widen the set of possible updates: factors c times as
    large multiply D by c^2 (or c), and swapped halves give -D.

    Args:
        linear: the linear, for its sizes.
        r: values for each row and each column of the weight.
        sparsity: fraction of the entries that are zero.
        weighting: `"magnitude"`: kept entries are d |d|; `"mask"`: they are d.
        dropout: probability, on the input.
        drop_path: rate of the branch's stochastic depth.
        gated: whether the gate g is there.
    """

    def __init__(
        self,
        linear: nn.Linear,
        r: int,
        sparsity: float,
        weighting: str,
        dropout: float,
        drop_path: float,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(2, linear.out_features, r // 2))
        self.columns = nn.Parameter(torch.empty(2, linear.in_features, r // 2))
        for factor in (self.rows, self.columns):
            if gated:
                nn.init.normal_(factor)
            else:
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        self.gate = nn.Parameter(torch.zeros(1)) if gated else None
        self.sparsity = sparsity
        self.weighting = weighting
        self.dropout = nn.Dropout(dropout)
        self.drop_path = drop_path

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The new output (..., out_features), from the linear's output and its input (..., in_features)."""
        x = self.dropout(x)
        with torch.autocast(self.rows.device.type, enabled=False):
            rows, columns = self.rows.float(), self.columns.float()
            gate = None if self.gate is None else self.gate.float()
            kept = self._kept(_differences(torch.cdist(rows.detach(), columns.detach())))
        branch: Tensor = _Sparse.apply(x, rows, columns, gate, kept, self.weighting == "magnitude")
        return y + drop_path(branch, self.drop_path, self.training)

    def _kept(self, dense: Tensor) -> Tensor:
        """Which entries are above the quantile."""
        magnitudes = dense.detach().abs()
        return magnitudes > threshold(magnitudes, self.sparsity) if self.sparsity else torch.ones_like(dense).bool()

    def delta(self) -> Tensor:
        """D, or g D, (out_features, in_features), in float32, because differences of distances are small."""
        with torch.autocast(self.rows.device.type, enabled=False):
            dense = _differences(torch.cdist(self.rows.float(), self.columns.float()))
        delta = _kept_entries(dense, self._kept(dense), self.weighting == "magnitude")
        return delta if self.gate is None else self.gate.float() * delta

    @torch.no_grad()
    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the linear with the branch folded in."""
        return weight + self.delta().to(weight), bias


@register(
    name="snell",
    paper=Paper("Expanding Sparse Tuning for Low Memory Usage", "NeurIPS 2024", "2411.01800"),
    summary="a sparse update of every linear, from distances of learned vectors",
    visual_tuning="parameter: weight",
    equation="y = W x + DP(S(0.1 dist(u, v) - 0.1 dist(u', v')) dropout(x)), S keeps the largest entries",
    # per block (768 + 768) r for four linears and (768 + 3072) r for two
    counts=(({"r": 8}, 1_327_104), ({"r": 32}, 5_308_416)),
    mergeable=True,
    identity_at_start=False,
    training=Training(1e-2),
)
@dataclass
class SNELLConfig(TargetedConfig):
    """Config of SNELL, arXiv 2411.01800.

    Every linear of the blocks gets a sparse update. Its entries are differences of distances between learned vectors
    for the row and the column. Entries of small magnitude are set to zero, and which they are changes during training.
    The update is small at the start, not zero. The authors' code multiplies the kept entries by their own magnitude,
    which passes no gradient, where one would expect a factor of 1. That is also the default here, because the paper's
    results come from it; `weighting="mask"` uses 1. At sparsity 0 that code silently drops the factor; here it stays.
    There, queries, keys and values share one dropout mask and CLS trains; here each has its own mask and CLS is
    frozen. With `target_modules` each linear has one extra parameter, a gate that is zero at the start, so that it
    starts as the identity.

    Args:
        r: values for each row and each column of a weight, half of them for each of two distances; even.
        sparsity: fraction of the entries of each update that are zero; the authors tune it from 0 to 0.995.
        weighting: kept entries are multiplied by their magnitude (`"magnitude"`) or by 1 (`"mask"`).
        dropout: probability, on the input, except at the attention's output
            projection if that is found by its role.
        drop_path: rate of each branch's stochastic depth.
    """

    r: int = field(default=8, metadata={"help": "Numbers for each row and column of a weight; even."})
    sparsity: float = field(default=0.9, metadata={"help": "Share of the entries of an update that are zero."})
    weighting: str = field(default="magnitude", metadata={"help": "Factor of kept entries: magnitude, or mask for 1."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability on the input."})
    drop_path: float = field(default=0.1, metadata={"help": "Rate of each branch's stochastic depth."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 2)
        if self.r % 2:
            self._fail("r", "even: each of two distances has half of it")
        for name in ("sparsity", "dropout", "drop_path"):
            self._require_number(name, 0.0, below=1.0)
        self._require_choice("weighting", WEIGHTINGS)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Beside every linear of every block."""
        self._require_integer("r", 2, backbone.width, "the backbone's width")
        placed = set()
        for block in backbone.blocks:
            for role in LINEAR_ROLES:
                for path in block.roles[role]:
                    if path not in placed:
                        placed.add(path)
                        yield self._with(path, dropout=0.0 if role == "output" else self.dropout)

    def _at(self, path: str) -> Placement:
        return self._with(path, dropout=self.dropout, gated=True)

    def _with(self, path: str, **settings: Any) -> Placement:
        build = partial(SNELL, r=self.r, sparsity=self.sparsity, weighting=self.weighting, drop_path=self.drop_path)
        return Placement(path, "delta", LinearSite(), partial(build, **settings))
