"""Scaling and shifting your features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ...backbone import VisionBackbone
from ...registry import Paper, register
from ...sites import OutputSite, Placement, output_channels
from ...targets import ANY_CHANNELS, TargetedConfig


INIT_STD = 0.02  # of the paper


class SSF(nn.Module):
    """A scale and a shift for each channel.

        y = gamma * x + beta,  gamma ~ N(1, init_std), beta ~ N(0, init_std)

    Args:
        channels: of x.
        init_std: standard deviation of both at the start.
    """

    def __init__(self, channels: int, init_std: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        nn.init.normal_(self.scale, mean=1.0, std=init_std)
        nn.init.normal_(self.shift, std=init_std)

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to the same."""
        return x * self.scale + self.shift

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight and bias of a module that computes the same as the module with these and SSF after it."""
        scale, shift = (
            p.detach().to(weight.device, torch.promote_types(p.dtype, weight.dtype)) for p in (self.scale, self.shift)
        )
        new_weight = weight * scale.view(-1, *(1,) * (weight.ndim - 1))
        new_bias = shift if bias is None else bias * scale + shift
        return new_weight.to(weight.dtype), new_bias.to(weight.dtype)


def after(module: nn.Module, init_std: float) -> SSF:
    """Scale and shift for the output of a module.

    Raises:
        ValueError: it is not known which channels it has.
    """
    channels = output_channels(module)
    if channels is None:
        raise ValueError(f"Cannot scale the output of {module}: valid are {ANY_CHANNELS}.")
    return SSF(channels, init_std)


@register(
    name="ssf",
    paper=Paper(
        "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", "NeurIPS 2022", "2210.08823"
    ),
    visual_tuning="parameter: weight and bias",
    equation="y = gamma * op(x) + beta after every linear, norm and convolution",
    counts=(({}, 205_824),),
    mergeable=True,
    identity_at_start=False,
)
@dataclass
class SSFConfig(TargetedConfig):
    """Config of scaling and shifting your features (SSF), arXiv 2210.08823.

    A scale and a shift after the patch embedding and every norm and linear of the backbone, fused projections
    counting as one. It folds into the weights. Where the projections have no bias (keys of BEiT), merging gives them
    one.

    Args:
        init_std: standard deviation of scale (around 1) and shift (around 0) at the start. By default 0.02 as in the
            paper, which is not the identity; 0 with `target_modules`.
    """

    init_std: float | None = field(
        default=None,
        metadata={"help": "Standard deviation of scale and shift at the start; 0.02, or 0 with target_modules."},
    )

    valid_targets = ANY_CHANNELS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_std is None:
            self.init_std = INIT_STD if self.target_modules is None else 0.0
        self._require_number("init_std", 0.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """After every operation of the backbone."""
        for path in (*backbone.outside, *backbone.modules()):
            yield self._at(path)

    def _at(self, path: str) -> Placement:
        return Placement(path, "output", OutputSite(), partial(after, init_std=self.init_std or 0.0))
