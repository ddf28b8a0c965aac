"""KRAdapter."""

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
from ...sites import LinearSite, Placement
from ...training.defaults import Training
from .products import plus_product


class KRAdapter(nn.Module):
    """An update of a linear that is a Khatri-Rao product, of full rank with few parameters.

        f(y, x) = y + s D x,  row i of D: b_i kron a_i, cut at the end

    There is a row for each of the smaller of the two sizes, so D is the transposed product if the linear has more
    outputs than inputs. b_i is zero at the start and a_i Kaiming-uniform (a = sqrt 5).

    Args:
        linear: the linear, for its sizes.
        scale: s.
    """

    def __init__(self, linear: nn.Linear, scale: float) -> None:
        super().__init__()
        self.shape = (linear.out_features, linear.in_features)
        rows, columns = sorted(self.shape)
        outer = math.isqrt(columns)
        self.outer = nn.Parameter(torch.zeros(rows, outer))
        self.inner = nn.Parameter(torch.empty(rows, -(-columns // outer)))
        self.scale = scale
        nn.init.kaiming_uniform_(self.inner, a=math.sqrt(5))

    def matrix(self) -> Tensor:
        """D, (out_features, in_features)."""
        product = (self.outer[:, :, None] * self.inner[:, None]).flatten(1)[:, : max(self.shape)]
        return product if self.shape[0] <= self.shape[1] else product.T

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The new output (..., out_features), from the linear's output and its input (..., in_features)."""
        return plus_product(y, x, self.matrix().T, self.scale)

    @torch.no_grad()
    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the linear with the update folded in."""
        return weight + self.scale * self.matrix().to(weight), bias


@register(
    name="kradapter",
    paper=Paper(
        "Towards Higher Effective Rank in Parameter-efficient Fine-tuning using Khatri-Rao Product",
        "ICCV 2025",
        None,
        page="https://github.com/PaulAlbert31/KRAdapter",
    ),
    summary="updates of full rank by Khatri-Rao products",
    visual_tuning="parameter: weight",
    equation="W + s D, row i of D (or column) b_i kron a_i",
    # 27 and 29 for each of 768 rows, at 24 linears; 55 and 56 for each of 768 at the 24 of the MLPs
    counts=(({}, 1_032_192), ({"roles": LINEAR_ROLES}, 4_110_336)),
    mergeable=True,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class KRAdapterConfig(TargetedConfig):
    """Config of KRAdapter (ICCV 2025).

    The update of a linear is a Khatri-Rao product: every row is the Kronecker product of two short vectors of its own.
    So it may have full rank, with about 2 sqrt(n) parameters a row of n.

    What differs from the authors' code (PaulAlbert31/KRAdapter, approximate_weight.py): where the linear has more
    outputs than inputs, the code cuts the wrong end of the product after it was transposed; here what is too much is
    cut before. The factor s is that of an earlier example of theirs; the script has 1.

    Args:
        roles: linears that get an update: one or more of `"query"`, `"key"`, `"value"`, `"output"`, `"fc1"`, `"fc2"`.
        scale: s.
    """

    roles: tuple[str, ...] = field(default=("query", "value"), metadata={"help": "Linears that get an update."})
    scale: float = field(default=2.0, metadata={"help": "Factor s of the update."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_some("roles", LINEAR_ROLES)
        self._require_number("scale")

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At the chosen linears of every block."""
        for path in backbone.modules(self.roles):
            yield self._at(path)

    def _at(self, path: str) -> Placement:
        return Placement(path, "product", LinearSite(), partial(KRAdapter, scale=self.scale))
