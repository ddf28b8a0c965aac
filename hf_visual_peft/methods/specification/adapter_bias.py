"""AdapterBias."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.registry import Paper, register
from ...core.targets import TargetedConfig
from ...sites import LinearSite, Placement
from ...training.defaults import Training


class AdapterBias(nn.Module):
    """A shift of a linear's output, weighted for each token.

        f(y, h) = y + (w . h + c) v

    v is zero at the start; w and c are as in `nn.Linear`.

    Args:
        linear: the linear, for its sizes.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Linear(linear.in_features, 1)
        self.shift = nn.Parameter(torch.zeros(linear.out_features))

    def forward(self, y: Tensor, h: Tensor) -> Tensor:
        """The new output (..., out_features), from the linear's output and its input (..., in_features)."""
        return y + self.weight(h) * self.shift

    @torch.no_grad()
    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight and bias of the linear with AdapterBias folded in."""
        shift = self.shift.to(weight)
        addend = self.weight.bias.to(weight) * shift
        return weight + torch.outer(shift, self.weight.weight[0].to(weight)), addend if bias is None else bias + addend


@register(
    name="adapterbias",
    paper=Paper(
        "AdapterBias: Parameter-efficient Token-dependent Representation Shift for Adapters in NLP Tasks",
        "NAACL 2022 Findings",
        "2205.00305",
    ),
    summary="a shift of the MLP's output, weighted for each token",
    visual_tuning="parameter: bias",
    equation="y = W2 h + b2 + (w . h + c) v at the last MLP linear",
    counts=(({}, 46_092),),
    mergeable=True,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class AdapterBiasConfig(TargetedConfig):
    """Config of AdapterBias, arXiv 2205.00305.

    A shift v is added to the output of the last linear of every MLP, weighted for each token by a linear of the MLP's
    hidden activation. It depends on the token, so it is not a bias. But it equals a rank-one update v w^T of the
    weight and an update c v of the bias, so it merges. Blocks do not share the weight.
    """

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At the last linear of every MLP."""
        for block in backbone.blocks:
            for path in block.roles["fc2"]:
                yield self._at(path)

    def _at(self, path: str) -> Placement:
        return Placement(path, "shift", LinearSite(), AdapterBias)  # type: ignore[arg-type]
