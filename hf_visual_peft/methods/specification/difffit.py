"""DiffFit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...backbones.backbone import NORM_ROLES, VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import OutputSite, Placement, WeightSite
from ...training.defaults import Training
from .bitfit import Shift
from .deltas import Addend, Deltas


class ScaledShift(nn.Module):
    """An addition to the bias of a linear, zero at the start, and a factor for each channel, one at the start.

        f(y) = gamma * (y + b)

    Args:
        linear: the linear; without a bias it gets only the factor.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = Shift(linear)
        self.gamma = nn.Parameter(torch.ones(linear.out_features))

    def forward(self, y: Tensor) -> Tensor:
        """Map (..., out_features) to the same shape."""
        return self.gamma * self.bias(y)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the linear with the factor folded in."""
        gamma = self.gamma.to(weight)
        weight, bias = self.bias.fold(weight, bias)
        return weight * gamma[:, None], None if bias is None else bias * gamma


def norm_deltas(norm: nn.Module) -> Deltas:
    """Additions to weight and bias of a norm."""
    weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    return Deltas(*(None if p is None else Addend(p.numel()) for p in (weight, bias)))


@register(
    name="difffit",
    paper=Paper(
        "DiffFit: Unlocking Transferability of Large Diffusion Models via Simple Parameter-Efficient Fine-Tuning",
        "ICCV 2023",
        "2304.06648",
    ),
    summary="all biases and norms, and a factor for each channel of what attention and MLP add",
    visual_tuning="parameter: weight and bias",
    equation="biases and norms train; x + gamma1 * attention(LN x), z + gamma2 * mlp(LN z)",
    counts=(({}, 140_544),),
    mergeable=True,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class DiffFitConfig(VisualPeftConfig):
    """Config of DiffFit, arXiv 2304.06648.

    The biases and norms of the backbone train, and a factor gamma for each channel of the outputs of attention and
    MLP. Biases and norms are trained as additions that start at zero, which is exactly equivalent. Gamma multiplies
    the output of the sub-layer's last linear, bias included. That equals the paper's place before the residual
    addition, because it commutes with layer scale and stochastic depth, and it folds into the weights. The authors
    train diffusion transformers; this is the form that others use for classification.
    """

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At every linear, norm and patch embedding."""
        for path in (*backbone.norms, *backbone.modules((*NORM_ROLES, "further_norms"))):
            yield Placement(path, "norm", WeightSite(), norm_deltas)
        last = backbone.modules(("output", "fc2"))
        for path in last:
            yield Placement(path, "scale", OutputSite(), ScaledShift)  # type: ignore[arg-type]
        others = backbone.modules(("query", "key", "value", "fc1", "operations"))
        for path in (*backbone.patch_embedding, *backbone.between, *others):
            yield Placement(path, "bias", OutputSite(), Shift)
