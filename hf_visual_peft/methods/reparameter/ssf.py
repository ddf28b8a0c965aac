"""Scaling and shifting your features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...backbone import ALL_ROLES, VisionBackbone
from ...config import VisualPeftConfig
from ...registry import Paper, register
from ...sites import OutputSite, Placement, output_channels


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
class SSFConfig(VisualPeftConfig):
    """Config of scaling and shifting your features (SSF), arXiv 2210.08823.

    A scale and a shift after the patch embedding and every norm and linear of the backbone, fused projections
    counting as one. It folds into the weights. Where the projections have no bias (keys of BEiT), merging gives them
    one.

    Args:
        init_std: standard deviation of scale (around 1) and shift (around 0) at the start. By default 0.02 as in the
            paper, which is not the identity; with `target_modules` 0, the identity, as peft's own methods start.
        target_modules: names, a regular expression for full names, or `"all-linear"`, as in peft's own methods: any
            linears, layer norms, batch norms or convolutions of any model. Overrides the roles; then
            `modules_to_save=None` means none.
        layers_pattern: with `target_modules` and `layers_to_transform`: name of the list of blocks.
    """

    init_std: float | None = field(
        default=None,
        metadata={"help": "Standard deviation of scale and shift at the start; 0.02, or 0 with target_modules."},
    )
    target_modules: list[str] | str | None = field(  # type: ignore[misc]
        default=None, metadata={"help": 'Names, a regular expression, or "all-linear"; default: by role.'}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks, with target_modules and layers_to_transform."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_std is None:
            self.init_std = INIT_STD if self.target_modules is None else 0.0
        self._require_number("init_std", 0.0)
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            self._fail("layers_to_transform", "None where target_modules is a string")
        if self.layers_pattern and not self.layers_to_transform:
            self._fail("layers_pattern", "None where layers_to_transform is None")

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """After every operation of the backbone."""
        for path in backbone.outside:
            yield self.placement_at(path)
        for block in backbone.blocks:
            for path in block.modules(ALL_ROLES):
                yield self.placement_at(path)

    def placement_at(self, path: str) -> Placement:
        """After one module."""
        return Placement(path, "output", OutputSite(), self._equation_for)

    def _equation_for(self, module: nn.Module) -> nn.Module:
        channels = output_channels(module)
        if channels is None:
            raise ValueError(
                f"SSFConfig.target_modules: cannot scale the output of a {type(module).__name__}; valid are linears, "
                "convolutions, and layer and batch norms."
            )
        return SSF(channels, init_std=self.init_std or 0.0)
