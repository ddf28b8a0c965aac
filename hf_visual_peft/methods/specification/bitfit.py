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
    """A bias beside that of a module, zero at the start; nothing where the module has none.

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
            raise ValueError(f"Cannot train the bias of {module}: valid are linears, convolutions and norms.")
        else:
            self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, y: Tensor) -> Tensor:
        """(..., channels) to the same."""
        return y if self.shift is None else y + self.shift

    def randomise(self) -> None:
        """Draw the shift from N(0, 1): in the size of other random weights it would hardly be seen."""
        if self.shift is not None:
            nn.init.normal_(self.shift)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a module that computes the same as the module with these and the shift behind it."""
        return weight, bias if bias is None or self.shift is None else bias + self.shift.to(bias)


@register(
    name="bitfit",
    paper=Paper(
        "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
        "ACL 2022",
        "2106.10199",
    ),
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

    The biases of the backbone train: of patch embedding, linears and norms, inside the blocks and behind them. Each
    is trained as a shift of the module's output that starts at zero, which is exactly the same, and yet switches off,
    merges and is shared like any adapter. Modules without a bias get none. Tables of position biases, which some
    codes catch by their name, are no biases of this kind.
    """

    valid_targets = ANY_CHANNELS

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """On the output of every module that may have a bias."""
        for path in (*backbone.outside, *backbone.modules()):
            yield self._at(path)

    def _at(self, path: str) -> Placement:
        return Placement(path, "bias", OutputSite(), Shift)
