"""BitFit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.registry import Paper, register
from ...core.targets import ANY_CHANNELS, TargetedConfig
from ...sites import OutputSite, Placement, output_channels
from ...training.defaults import Training


class Shift(nn.Module):
    """An addition to the bias of a module, zero at the start; nothing where the module has no bias.

        f(y) = y + b

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        channels = output_channels(module)
        if getattr(module, "bias", None) is None:
            self.register_parameter("shift", None)
        elif channels is None:
            raise ValueError(f"Cannot train the bias of {module}: valid modules are linears, convolutions and norms.")
        else:
            self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, y: Tensor) -> Tensor:
        """Map (..., channels) to the same shape."""
        return y if self.shift is None else y + self.shift

    def randomise(self) -> None:
        """Draw the shift from N(0, 1): a shift as small as other random weights would hardly have an effect."""
        if self.shift is not None:
            nn.init.normal_(self.shift)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the module with the shift folded in."""
        return weight, bias if bias is None or self.shift is None else bias + self.shift.to(bias)


@register(
    name="bitfit",
    paper=Paper(
        "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
        "ACL 2022",
        "2106.10199",
    ),
    summary="all biases",
    visual_tuning="parameter: bias",
    equation="every bias trains: y = W x + b + db",
    counts=(({}, 102_912),),
    mergeable=True,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class BitFitConfig(TargetedConfig):
    """Config of BitFit, arXiv 2106.10199.

    The biases of the backbone train: those of the patch embedding, linears and norms, inside the blocks and after
    them. Each is trained as a shift of the module's output that starts at zero. That is exactly equivalent, and it
    switches off, merges and is shared like any adapter. Modules without a bias get none. Tables of position biases,
    which some code includes because of their name, do not count as biases.
    """

    valid_targets = ANY_CHANNELS

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At the output of every module that can have a bias."""
        for path in (*backbone.outside, *backbone.modules()):
            yield self._at(path)

    def _at(self, path: str) -> Placement:
        return Placement(path, "bias", OutputSite(), Shift)
