"""Low-rank rescaled tuning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ...backbone import LINEAR_ROLES, NORM_ROLES, OTHER_ROLES, VisionBackbone
from ...config import VisualPeftConfig
from ...registry import Paper, register
from ...sites import OutputSite, Placement, WeightSite, output_channels
from .ssf import INIT_STD, SSF


class RLRR(nn.Module):
    """A rescaling of rank one beside a frozen weight, and a shift of its bias.

        W' = W + (c_out c_in^T) * W,  b' = b + db

    Both factors are Kaiming-uniform, c_in from U(-sqrt(6 / in), sqrt(6 / in)) and c_out, of which each entry counts as
    a row of one input, from U(-sqrt(6), sqrt(6)); db is zero. Of two dimensions, so that they decay: to W itself.

    Args:
        linear: the linear, for its sizes.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale_in = nn.Parameter(torch.empty(1, linear.in_features))
        self.scale_out = nn.Parameter(torch.empty(linear.out_features, 1))
        self.shift = nn.Parameter(torch.zeros(linear.out_features))
        nn.init.kaiming_uniform_(self.scale_in)
        nn.init.kaiming_uniform_(self.scale_out)

    def forward(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight (out, in) and bias (out,) that take the place of these."""
        return weight + weight * self.scale_in * self.scale_out, self.shift if bias is None else bias + self.shift


@register(
    name="rlrr",
    paper=Paper(
        "Low-Rank Rescaled Vision Transformer Fine-Tuning: A Residual Design Approach", "CVPR 2024", "2403.19067"
    ),
    visual_tuning="parameter: weight",
    equation="W' = W + (c_out c_in^T) * W, b' = b + db at every linear; gamma * x + beta after norms",
    counts=(({}, 288_768),),
    mergeable=True,
    identity_at_start=False,
)
@dataclass
class RLRRConfig(VisualPeftConfig):
    """Config of RLRR, arXiv 2403.19067.

    Each linear of the blocks is rescaled, entry by entry, by a matrix of rank one around 1, and its bias is shifted.
    A scale and a shift, as in SSF, follow the patch embedding and every norm. Not the identity at the start: the
    factors of the matrix are random, and large (c_out up to 2.4), as in the authors' code. Fused projections are one
    linear here; the authors have three. Where the projections have no bias (keys of BEiT), merging gives them one.

    Args:
        init_std: standard deviation of scale (around 1) and shift (around 0) after norms and patch embedding.
    """

    init_std: float = field(
        default=INIT_STD,
        metadata={"help": "Standard deviation of scale and shift after norms and patch embedding at the start."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_number("init_std", 0.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At every linear and norm and the patch embedding."""
        others = (path for block in backbone.blocks for path in block.modules((*NORM_ROLES, *OTHER_ROLES)))
        for path in (*backbone.outside, *others):
            yield Placement(path, "output", OutputSite(), partial(_pair, init_std=self.init_std))
        for block in backbone.blocks:
            for path in block.modules(LINEAR_ROLES):
                yield Placement(path, "weight", WeightSite(), RLRR)  # type: ignore[arg-type]


def _pair(module: nn.Module, init_std: float) -> SSF:
    channels = output_channels(module)
    if channels is None:
        raise ValueError(f"Cannot scale the output of {module}: valid are linears, convolutions and norms.")
    return SSF(channels, init_std=init_std)
