"""Low-rank rescaled tuning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ...backbones.backbone import LINEAR_ROLES, NORM_ROLES, OTHER_ROLES, VisionBackbone, linear_sizes
from ...core.registry import Paper, register
from ...core.targets import ANY_CHANNELS, TargetedConfig
from ...sites import OutputSite, Placement, WeightSite
from ...training.defaults import Training
from .ssf import INIT_STD, after


class RLRR(nn.Module):
    """A rank-one rescaling of a frozen weight, and a shift of its bias.

        W' = W + (c_out c_in^T) * W,  b' = b + db

    Both factors are Kaiming-uniform: c_in from U(-sqrt(6 / in), sqrt(6 / in)), and c_out, whose entries count as rows
    of one input each, from U(-sqrt(6), sqrt(6)); db is zero. The factors have two dimensions, so that weight decay
    acts on them and pulls W' to W.

    Args:
        linear: the linear, for its sizes.
        identity: whether c_out is zero instead.
    """

    def __init__(self, linear: nn.Linear, identity: bool = False) -> None:
        super().__init__()
        self.scale_in = nn.Parameter(torch.empty(1, linear.in_features))
        self.scale_out = nn.Parameter(torch.empty(linear.out_features, 1))
        self.shift = nn.Parameter(torch.zeros(linear.out_features))
        nn.init.kaiming_uniform_(self.scale_in)
        if identity:
            nn.init.zeros_(self.scale_out)
        else:
            nn.init.kaiming_uniform_(self.scale_out)

    def forward(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The new weight (out, in) and bias (out,), from the old ones."""
        return weight + weight * self.scale_in * self.scale_out, self.shift if bias is None else bias + self.shift


@register(
    name="rlrr",
    paper=Paper(
        "Low-Rank Rescaled Vision Transformer Fine-Tuning: A Residual Design Approach", "CVPR 2024", "2403.19067"
    ),
    summary="every linear rescaled entry by entry, by a matrix of rank one",
    visual_tuning="parameter: weight",
    equation="W' = W + (c_out c_in^T) * W, b' = b + db at every linear; gamma * x + beta after norms",
    counts=(({}, 288_768),),
    mergeable=True,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class RLRRConfig(TargetedConfig):
    """Config of RLRR, arXiv 2403.19067.

    The weight of each linear of the blocks is multiplied, entry by entry, by 1 plus a matrix of rank one, and its bias
    is shifted. A scale and a shift, as in SSF, follow the patch embedding and every norm. It does not start as the
    identity: the factors of the matrix are random, and large (c_out up to 2.4), as in the authors' code. A fused
    projection is one linear here; the authors have three. Where the projections have no bias (keys of BEiT), merging
    gives them one. With `target_modules` c_out is zero at the start; convolutions get the scale and shift of norms.

    Args:
        init_std: standard deviation of scale (around 1) and shift (around 0) after norms and patch embedding; by
            default 0.02, and 0 with `target_modules`.
    """

    init_std: float | None = field(
        default=None,
        metadata={"help": "Standard deviation of scale and shift after norms; 0.02, or 0 with target_modules."},
    )

    valid_targets = ANY_CHANNELS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_std is None:
            self.init_std = INIT_STD if self.target_modules is None else 0.0
        self._require_number("init_std", 0.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At every linear and norm and the patch embedding."""
        for path in (*backbone.outside, *backbone.modules((*NORM_ROLES, *OTHER_ROLES))):
            yield self._at(path)
        for path in backbone.modules(LINEAR_ROLES):
            yield Placement(path, "weight", WeightSite(), RLRR)  # type: ignore[arg-type]

    def placement_at(self, path: str, module: nn.Module) -> Placement:
        """At a linear as in the blocks; at other modules as after a norm."""
        self._check_target(path, module)
        return self._at(path) if linear_sizes(module) is None else Placement(path, "weight", WeightSite(), _identity)

    def _at(self, path: str) -> Placement:
        return Placement(path, "output", OutputSite(channelwise=True), partial(after, init_std=self.init_std or 0.0))


def _identity(linear: nn.Module) -> nn.Module:
    return RLRR(linear, identity=True)  # type: ignore[arg-type]
