"""Compacter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BranchSite, Placement, Shared
from ...training.defaults import Training


class Rule(nn.Module):
    """The matrices R_1 .. R_n that all PHM layers of an adapter share.

    Args:
        n: number of matrices, and their size.
        std: standard deviation of their elements at the start.
    """

    def __init__(self, n: int, std: float) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.empty(n, n, n).normal_(std=std))


class PHMLinear(nn.Module):
    """A linear whose weight is a sum of Kronecker products.

        y = H^T x + b,  H = sum_i R_i kron (s_i t_i)

    Columns s_i and rows t_i are Xavier-uniform with gain sqrt 2, the bias is zero.

    Args:
        in_features: size of x.
        out_features: size of y.
        n: number of products; divides both sizes.
    """

    def __init__(self, in_features: int, out_features: int, n: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(n, in_features // n, 1))
        self.right = nn.Parameter(torch.empty(n, 1, out_features // n))
        self.bias = nn.Parameter(torch.zeros(out_features))
        for factors in (self.left, self.right):
            for factor in factors:
                nn.init.xavier_uniform_(factor, gain=math.sqrt(2))

    def forward(self, x: Tensor, rule: Rule) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        weight = torch.einsum("iab,icd->bdac", rule.matrices, self.left @ self.right)
        # contiguous: with other strides torch sums in another order where a computed weight needs no gradient
        return F.linear(x.contiguous(), weight.flatten(2).flatten(0, 1), self.bias)


class Compacter(nn.Module):
    """Bottleneck of PHM layers, f(x) = up(GELU(down(x))), the GELU in its tanh approximation.

    Args:
        width: channels of the token stream.
        r: width of the bottleneck.
        n: Kronecker products of each weight.
    """

    def __init__(self, width: int, r: int, n: int) -> None:
        super().__init__()
        self.down = PHMLinear(width, r, n)
        self.up = PHMLinear(r, width, n)

    def forward(self, x: Tensor, rule: Rule) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        return self.up(F.gelu(self.down(x, rule), approximate="tanh"), rule)


SUBLAYERS = ("attention", "mlp")


@register(
    name="compacter",
    paper=Paper("Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", "NeurIPS 2021", "2106.04647"),
    summary="bottlenecks after attention and MLP, as sums of Kronecker products",
    visual_tuning="parameter: weight and bias",
    equation="z = x + a + f(a), a = MHSA(LN1 x); f = W_up GELU(W_down .), each W = sum_i R_i kron (s_i t_i), one R",
    counts=(({"r": 24, "n": 4}, 57_088), ({"r": 24, "n": 4, "sublayers": ("mlp",)}, 28_576)),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class CompacterConfig(VisualPeftConfig):
    """Config of Compacter, arXiv 2106.04647.

    Houlsby's adapter with weights that are sums of Kronecker products of small matrices R_i and matrices of rank one.
    The adapter reads what the sub-layer adds to the stream. One set of R_i serves all layers, both positions, and both
    weights of an adapter. All weights are random at the start, but the R_i are so small that f is nearly zero.
    Compacter++ stands only after the MLP: `sublayers="mlp"`. The adapter has no norm, as in the released configuration
    (its class defaults differ). The paper also trains the backbone's norms; add them with `modules_to_save`.

    Args:
        r: width of the bottleneck; a multiple of n. The paper's reduction factor of 32 is 24 on ViT-B.
        n: Kronecker products of each weight; divides r and the backbone's width.
        rule_std: standard deviation of the elements of all R_i at the start.
        sublayers: after which sub-layers: `"attention"`, `"mlp"`.
    """

    r: int = field(default=24, metadata={"help": "Width of the bottleneck, a multiple of n."})
    n: int = field(default=4, metadata={"help": "Kronecker products of each weight; divides r and the width."})
    rule_std: float = field(default=1e-4, metadata={"help": "Standard deviation of all R_i at the start."})
    sublayers: tuple[str, ...] = field(default=SUBLAYERS, metadata={"help": "After which: attention, mlp."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_integer("n", 1)
        if self.r % self.n:
            self._fail("n", f"a divisor of r, which is {self.r}")
        self._require_number("rule_std", 0.0)
        self._require_some("sublayers", SUBLAYERS)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """After the chosen sub-layers of every block."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")
        if backbone.width % self.n:
            self._fail("n", f"a divisor of the backbone's width {backbone.width}")

        def build(_: nn.Module) -> nn.Module:
            return Compacter(backbone.width, self.r, self.n)

        rule = Shared("rule", lambda: Rule(self.n, self.rule_std))
        for block in backbone.blocks:
            for name in self.sublayers:
                site = BranchSite(name, reads="output")  # type: ignore[arg-type]
                yield Placement(block.path, name, site, build, rule)
