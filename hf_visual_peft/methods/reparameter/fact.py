"""Factor-tuning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import LINEAR_ROLES, VisionBackbone, linear_sizes
from ...core.registry import Paper, register
from ...core.targets import TargetedConfig
from ...sites import LinearSite, Placement, Shared
from ...training.defaults import Training
from .products import plus_product


class Factors(nn.Module):
    """The factors that all linears share: U, V, and the core C of a Tucker decomposition.

    U is as in `nn.Linear`, V zero, C Xavier-uniform.

    Args:
        width: of a slice.
        r: rank.
        core: whether the core C is there.
    """

    def __init__(self, width: int, r: int, core: bool) -> None:
        super().__init__()
        self.u = nn.Linear(width, r, bias=False)
        self.v = nn.Linear(r, width, bias=False)
        self.core = nn.Parameter(torch.empty(r, r, r)) if core else None
        nn.init.zeros_(self.v.weight)
        if self.core is not None:
            nn.init.xavier_uniform_(self.core)


class FacT(nn.Module):
    """A linear's part in the decomposition of the updates of all linears.

        f(y, x) = y + s V dropout(S_k U x)

    The linear's weight is cut into slices of width x width; U reads each slice of the input and V writes each slice
    of the output. S_k has one r x r block for each: free (tensor train), or C x_3 p_k (Tucker), transposed where the
    input is cut.

    Args:
        linear: the linear, for its sizes.
        width: of a slice.
        r: rank.
        scale: s.
        dropout: probability, between S and V.
        columns: number of all p_k in the model, on which the bound of their Xavier-uniform start depends; None for a
            tensor train, whose S start as in `nn.Linear`.
    """

    def __init__(
        self, linear: nn.Linear, width: int, r: int, scale: float, dropout: float, columns: int | None
    ) -> None:
        super().__init__()
        self.sizes = (linear.out_features, linear.in_features)
        self.outputs, self.inputs = (slices(size, width) for size in self.sizes)
        if columns is None:
            self.s = nn.Linear(self.inputs * r, self.outputs * r, bias=False)
        else:
            bound = (6 / (r + columns)) ** 0.5
            self.p = nn.Parameter(torch.empty(r, self.outputs * self.inputs).uniform_(-bound, bound))
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def middle(self, core: Tensor | None) -> Tensor:
        """S_k, (output slices * r, input slices * r)."""
        if core is None:
            return self.s.weight
        blocks = torch.einsum("ijk,kn->nij", core, self.p).unflatten(0, (self.outputs, self.inputs))
        order = (0, 3, 1, 2) if self.inputs == 1 else (0, 2, 1, 3)
        return blocks.permute(order).flatten(2).flatten(0, 1)

    def forward(self, y: Tensor, x: Tensor, factors: Factors) -> Tensor:
        """The new output (..., out_features), from the linear's output and its input (..., in_features)."""
        width = factors.u.in_features
        if missing := self.inputs * width - x.shape[-1]:
            x = F.pad(x, (0, missing))
        read = factors.u(x.unflatten(-1, (self.inputs, width))).flatten(-2)
        hidden = self.dropout(F.linear(read, self.middle(factors.core)))
        hidden, v = hidden.unflatten(-1, (self.outputs, -1)), factors.v.weight
        if self.outputs * width > y.shape[-1]:
            return y + F.linear(hidden, self.scale * v).flatten(-2)[..., : y.shape[-1]]
        return plus_product(y.unflatten(-1, (self.outputs, width)), hidden, v.T, self.scale).flatten(-2)

    @torch.no_grad()
    def fold(self, weight: Tensor, bias: Tensor | None, factors: Factors) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the linear with FacT folded in."""
        u, v, s = (t.to(weight) for t in (factors.u.weight, factors.v.weight, self.middle(factors.core)))
        blocks = s.unflatten(1, (self.inputs, -1)).unflatten(0, (self.outputs, -1))
        update = torch.einsum("oi,bial,lj->boaj", v, blocks, u).flatten(2).flatten(0, 1)
        return weight + self.scale * update[: self.sizes[0], : self.sizes[1]], bias


def slices(size: int, width: int) -> int:
    """Slices that cover `size`."""
    return -(-size // width)


@register(
    name="fact",
    paper=Paper("FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer", "AAAI 2023", "2212.03145"),
    summary='all updates as one tensor, decomposed (`"tt"` or `"tk"`)',
    visual_tuning="parameter: weight",
    equation="W_k + s V S_k U for every width x width slice k of all linears, S_k free (TT) or C x_3 p_k (TK)",
    counts=(({"variant": "tt", "r": 16}, 61_440), ({"variant": "tk", "r": 32}, 86_528)),
    mergeable=True,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class FacTConfig(TargetedConfig):
    """Config of factor-tuning (FacT), arXiv 2212.03145.

    The updates of all linears of all blocks, cut into slices of width x width, form one tensor, which is decomposed.
    All slices share U and V. Each slice has its own r x r matrix S_k (tensor train, `"tt"`), or r weights that mix a
    shared core (Tucker, `"tk"`). V is zero at the start.

    Where the MLP's width is not a multiple of the backbone's (gated MLPs), the last slice is cut. A fused projection
    is cut into slices regardless of what they stand for. Both are our generalisation. The released code of the Tucker
    form reshapes the four S_k of an MLP's linear such that their columns interleave; here, as in the paper, each slice
    has its own.

    With `target_modules` the smaller size of a linear is the width of its slices, linears of one width share U and V
    (and C), and p_k start as if the linear were the only one.

    Args:
        variant: `"tt"` or `"tk"`.
        r: rank; the paper uses 8 or 16 for the tensor train, 16 or 32 for Tucker.
        scale: s; the paper tunes it in 0.01 to 100.
        dropout: probability, between S_k and V.
    """

    variant: str = field(default="tt", metadata={"help": "Tensor train (tt) or Tucker (tk)."})
    r: int = field(default=16, metadata={"help": "Rank of the decomposition."})
    scale: float = field(default=1.0, metadata={"help": "Factor s of the update."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability before V."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_choice("variant", ("tt", "tk"))
        self._require_integer("r", 1)
        self._require_number("scale")
        self._require_number("dropout", 0.0, below=1.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At every linear of every block."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")
        paths = backbone.modules(LINEAR_ROLES)
        columns = None
        if self.variant == "tk":
            sizes = (backbone.linears[path] for path in paths)
            columns = sum(slices(out, backbone.width) * slices(into, backbone.width) for out, into in sizes)
        for path in paths:
            yield self._part(path, backbone.width, columns, "factors")

    def placement_at(self, path: str, module: nn.Module) -> Placement:
        """At one linear; its smaller size is the width of its slices."""
        self._check_target(path, module)
        sizes = linear_sizes(module)
        assert sizes is not None
        columns = max(slices(size, min(sizes)) for size in sizes) if self.variant == "tk" else None
        return self._part(path, min(sizes), columns, f"factors{min(sizes)}")

    def _part(self, path: str, width: int, columns: int | None, name: str) -> Placement:
        build = partial(FacT, width=width, r=self.r, scale=self.scale, dropout=self.dropout, columns=columns)
        shared = Shared(name, lambda: Factors(width, self.r, core=self.variant == "tk"))
        return Placement(path, "slices", LinearSite(), build, shared)
