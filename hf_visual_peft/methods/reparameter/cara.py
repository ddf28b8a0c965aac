"""CaRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import Block, VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import LinearSite, Placement, Shared
from ...training.defaults import Training
from .fact import slices
from .kadaptation import pairwise
from .rows import Rows, projections


ATTENTION = ("query", "key", "value")
OTHERS = ("output", "fc1", "fc2")


class CPFactors(nn.Module):
    """What all updates have in common: the factors of two tensors, and biases.

    The factor that reads the input of attention, and the one that writes the width of the other linears, are zero; the
    rest is orthogonal, and the weights of the ranks are normal.

    Args:
        width: of a slice.
        heads: of the attention.
        channels: of a head.
        r: rank.
        biases: sizes by name.
        mean: of the weights of the ranks at the start.
        std: their standard deviation.
    """

    def __init__(
        self, width: int, heads: int, channels: int, r: int, biases: Mapping[str, int], mean: float, std: float
    ) -> None:
        super().__init__()
        self.read = nn.Parameter(torch.zeros(width, r))
        self.heads = nn.Parameter(nn.init.orthogonal_(torch.empty(heads, r)))
        self.channels = nn.Parameter(nn.init.orthogonal_(torch.empty(channels, r)))
        self.ranks = nn.Parameter(torch.empty(r).normal_(mean, std))
        self.rows = nn.Parameter(torch.zeros(width, r))
        self.columns = nn.Parameter(nn.init.orthogonal_(torch.empty(width, r)))
        self.ranks_of_others = nn.Parameter(torch.empty(r).normal_(mean, std))
        self.biases = nn.ParameterDict({name: nn.Parameter(torch.zeros(size)) for name, size in biases.items()})


class CaRA(nn.Module):
    """A linear's slices in the canonical-polyadic decompositions of all updates.

        f(y, x) = y + s (dropout(D) x + b)
        D of queries, keys, values: sum_r R_r a_kr (h_r kron c_r) e_r^T
        D_k of slice k of the others: sum_r R_r a_kr p_r q_r^T, transposed where the input is cut

    Dropout acts on the matrix D. b is for the others only.

    Args:
        rows: the outputs of the linear that it acts on.
        in_features: of the linear.
        width: of a slice.
        r: rank.
        total: number of all a_k in the tensor, on which their Xavier-normal start depends.
        bias: name of the bias; None for queries, keys and values.
        scale: s.
        dropout: probability, on D.
    """

    def __init__(
        self,
        rows: Rows,
        in_features: int,
        width: int,
        r: int,
        total: int,
        bias: str | None,
        scale: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.rows, self.in_features, self.bias, self.scale = rows, in_features, bias, scale
        self.cuts_input = bias is not None and in_features > rows.size
        count = 1 if bias is None else slices(max(rows.size, in_features), width)
        self.weights = nn.Parameter(torch.randn(count, r) * (2.0 / (total + r)) ** 0.5)
        self.dropout = nn.Dropout(dropout)

    def matrix(self, factors: CPFactors) -> Tensor:
        """D, (rows, in_features)."""
        if self.bias is None:
            written = pairwise(factors.heads.T, factors.channels.T).T * (factors.ranks * self.weights)
            return written @ factors.read.T
        stacked = (factors.rows * (factors.ranks_of_others * self.weights)[:, None]).flatten(0, 1)
        matrix = stacked @ factors.columns.T
        matrix = matrix.T if self.cuts_input else matrix
        return matrix[: self.rows.size, : self.in_features]

    def forward(self, y: Tensor, x: Tensor, factors: CPFactors) -> Tensor:
        """The new output (..., out_features), from the linear's output and its input (..., in_features)."""
        shift = None if self.bias is None else self.scale * factors.biases[self.bias]
        update = F.linear(x, self.scale * self.dropout(self.matrix(factors)), shift)
        return y + self.rows.pad(update, y.shape[-1], dim=-1)

    @torch.no_grad()
    def fold(self, weight: Tensor, bias: Tensor | None, factors: CPFactors) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the linear with the update folded in."""
        update = self.rows.pad(self.scale * self.matrix(factors).to(weight), len(weight), dim=-2)
        if self.bias is not None:
            shift = self.scale * factors.biases[self.bias].to(weight)
            bias = shift if bias is None else bias + shift
        return weight + update, bias


@register(
    name="cara",
    paper=Paper(
        "CaRA: Canonical Rank Adaptation of Vision Transformers",
        "ICML 2025",
        None,
        page="https://github.com/BonnBytes/CaRA",
    ),
    summary="all updates as two tensors in canonical-polyadic form",
    visual_tuning="parameter: weight and bias",
    equation="W + s D, D slices of two tensors in canonical-polyadic form: over heads for q, k, v, and for the others",
    counts=(({"r": 32}, 85_440), ({"r": 16}, 45_024), ({"r": 64}, 166_272)),
    mergeable=True,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class CaRAConfig(VisualPeftConfig):
    """Config of canonical rank adaptation (CaRA), ICML 2025.

    The updates of all queries, keys and values form a tensor of four dimensions (matrix, input, head, channel of a
    head), those of all other linears of the blocks, cut into slices of width x width, one of three. Both are sums of r
    products of vectors, which all blocks share but for one number per rank and slice. Blocks also share a bias each
    for the attention's output, the first and the second linear of the MLP.

    As in the released code (BonnBytes/CaRA), dropout acts on the entries of the update, and the biases are outside of
    it, multiplied by s. That code finds its factors through a global variable, so that two models in one program have
    the same; here each adapter has its own. Where the MLP's width is not a multiple of the backbone's, the last slice
    is cut, which is our generalisation.

    Args:
        r: rank of both decompositions.
        scale: s.
        dropout: probability, on the entries of the update.
        mean: of the weights of the ranks at the start.
        std: their standard deviation at the start; 0 with a mean of 1: all ones.
    """

    r: int = field(default=32, metadata={"help": "Rank of both decompositions."})
    scale: float = field(default=1.0, metadata={"help": "Factor s of the update."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability on the update."})
    mean: float = field(default=1.0, metadata={"help": "Mean of the weights of the ranks at the start."})
    std: float = field(default=0.0, metadata={"help": "Standard deviation of these weights at the start."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1, 10_000)
        self._require_number("scale")
        self._require_number("dropout", 0.0, below=1.0)
        self._require_number("mean")
        self._require_number("std", 0.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At every linear of every block."""
        heads: list[tuple[Block, str, Rows]] = []
        others: list[tuple[str, str, Rows]] = []
        biases: dict[str, int] = {}
        for block in backbone.blocks:
            found = projections(backbone, block)
            heads += [(block, role, found[role]) for role in ATTENTION if role in found]
            for role in OTHERS:
                for number, path in enumerate(block.roles[role]):
                    name = f"{role}{number or ''}"
                    rows = Rows(path, 0, backbone.linears[path][0])
                    if biases.setdefault(name, rows.size) != rows.size:
                        raise ValueError(
                            f"{type(self).__name__}: {path} has {rows.size} outputs, others {biases[name]}, and all "
                            "blocks share one bias. Choose blocks of one size by layers_to_transform."
                        )
                    others.append((name, path, rows))
        sizes = {rows.size for _, _, rows in heads}
        if len(sizes) > 1:
            raise ValueError(
                f"{type(self).__name__} does not fit {backbone.class_name}: its queries, keys and values have "
                f"{sorted(sizes)} channels, and form one tensor only if they have the same number."
            )
        size = next(iter(sizes), backbone.width)
        count = heads[0][0].num_heads if heads else 1
        if not count or size % count:
            raise ValueError(
                f"{type(self).__name__} does not fit {backbone.class_name}: {size} channels of queries are not a "
                f"whole number for each of {count or 'an unknown number of'} heads."
            )
        shared = Shared(
            "factors",
            partial(CPFactors, backbone.width, count, size // count, self.r, biases, mean=self.mean, std=self.std),
        )
        build = partial(CaRA, width=backbone.width, r=self.r, scale=self.scale, dropout=self.dropout)
        for _, role, rows in heads:
            into = backbone.linears[rows.path][1]
            made = partial(_made, build, rows, into, len(heads), None)
            yield Placement(rows.path, role, LinearSite(), made, shared)
        total = sum(slices(max(backbone.linears[path]), backbone.width) for _, path, _ in others)
        for name, path, rows in others:
            made = partial(_made, build, rows, backbone.linears[path][1], total, name)
            yield Placement(path, "slices", LinearSite(), made, shared)


def _made(build: partial[CaRA], rows: Rows, into: int, total: int, bias: str | None, _: nn.Module) -> CaRA:
    return build(rows, into, total=total, bias=bias)
