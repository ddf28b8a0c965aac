"""Scaling and shifting your features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...backbones.backbone import LINEAR_ROLES, VisionBackbone
from ...core.registry import Paper, register
from ...core.targets import ANY_CHANNELS, TargetedConfig
from ...sites import OutputSite, Placement, output_channels
from ...training.defaults import Training


INIT_STD = 0.02  # as in the paper
SMALLEST = 0.1  # smallest scale to divide by, where no shift is larger than 1


class ScaleAndShift(torch.autograd.Function):
    """`scale * x + shift`, which keeps its output instead of x for the backward pass.

    The next operation often keeps the same tensor, as attention does with queries, keys and values, and GELU with its
    input. Then no extra memory is used. The gradient of scale is sum(g x) = (sum(g y) - shift sum(g)) / scale.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Map (..., channels) to the same shape."""
        return (x * scale).add_(shift)  # rounds as the plain formula does, which is used where nothing is kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        """Keep what the backward pass needs."""
        ctx.save_for_backward(output, *inputs[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, scale and shift."""
        output, scale, shift = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_shift = rows.sum(dim=0)
        of_scale = ((rows * output.reshape(rows.shape)).sum(dim=0) - shift * of_shift) / scale
        return gradient * scale, of_scale, of_shift


def is_recoverable(x: Tensor, scale: Tensor, shift: Tensor) -> bool:
    """Whether x can be recovered from `scale * x + shift` with nearly full precision.

    It cannot where a scale is close to zero or the shift much larger, nor in half precision. A compiler decides itself
    what it keeps. This is done only on a CPU: on other devices the check would synchronise at every linear.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not x.dtype == scale.dtype == shift.dtype:
        return False
    if x.dtype.itemsize < 4:
        return False
    return bool((scale.abs() >= SMALLEST * shift.abs().clamp(min=1.0)).all())


class SSF(nn.Module):
    """A scale and a shift for each channel.

        y = gamma * x + beta,  gamma ~ N(1, init_std), beta ~ N(0, init_std)

    Args:
        channels: of x.
        init_std: standard deviation of both at the start.
        recover: whether x may be recovered from y in the backward pass; later operations must not change y in place.
    """

    def __init__(self, channels: int, init_std: float, recover: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.recover = recover
        nn.init.normal_(self.scale, mean=1.0, std=init_std)
        nn.init.normal_(self.shift, std=init_std)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., channels) to the same shape."""
        if self.recover and torch.is_grad_enabled() and is_recoverable(x, self.scale, self.shift):
            return ScaleAndShift.apply(x, self.scale, self.shift)
        return x * self.scale + self.shift

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight and bias of the module with SSF folded in."""
        scale, shift = (
            p.detach().to(weight.device, torch.promote_types(p.dtype, weight.dtype)) for p in (self.scale, self.shift)
        )
        new_weight = weight * scale.view(-1, *(1,) * (weight.ndim - 1))
        new_bias = shift if bias is None else bias * scale + shift
        return new_weight.to(weight.dtype), new_bias.to(weight.dtype)


def after(module: nn.Module, init_std: float, recover: bool = False) -> SSF:
    """Scale and shift for the output of a module.

    Args:
        module: any module with channels.
        init_std: as of `SSF`.
        recover: as of `SSF`; used only at linears.

    Raises:
        ValueError: its channels are not known.
    """
    channels = output_channels(module)
    if channels is None:
        raise ValueError(f"Cannot scale the output of {module}: valid modules are {ANY_CHANNELS}.")
    return SSF(channels, init_std, recover and isinstance(module, nn.Linear))


@register(
    name="ssf",
    paper=Paper(
        "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", "NeurIPS 2022", "2210.08823"
    ),
    summary="a scale and a shift after every operation",
    visual_tuning="parameter: weight and bias",
    equation="y = gamma * op(x) + beta after every linear, norm and convolution",
    counts=(({}, 205_824),),
    mergeable=True,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class SSFConfig(TargetedConfig):
    """Config of scaling and shifting your features (SSF), arXiv 2210.08823.

    A scale and a shift follow the patch embedding and every norm and linear of the backbone; a fused projection counts
    as one linear. On timm's models that pool tokens before their last norm (`fc_norm`), they stand after that norm.
    The authors' code instead has them on the tokens before the pooling, so that the norm follows, with as many
    parameters: logits differ by 0.3% with the same initial values, and by 18% at deviations of 0.5. The method folds
    into the weights. Where the projections have no bias (keys of BEiT), merging gives them one.

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
        # other modules, and the convolutions that are linears of maps, may be followed by an operation that changes
        # their output in place, as activations of convolutional networks do
        blocks = (b for b in backbone.blocks if (b.table or backbone.architecture).stream != "channels_first")
        recovered = {path for block in blocks for path in block.modules(LINEAR_ROLES)}
        for path in (*backbone.outside, *backbone.modules()):
            yield self._at(path, path in recovered)

    def _at(self, path: str, recover: bool = False) -> Placement:
        build = partial(after, init_std=self.init_std or 0.0, recover=recover)
        return Placement(path, "output", OutputSite(channelwise=True), build)
