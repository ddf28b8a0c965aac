"""How modules of unknown classes use weight and bias, derived from their outputs."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.func import functional_call


@torch.no_grad()
def is_activated(norm: nn.Module) -> bool:
    """Whether a norm does more after its weight and bias, for example an activation.

    It is tested with a weight of zero, so that the output depends only on the bias.

    Args:
        norm: of any class; False if it has no bias, or does not take the usual shapes.
    """
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if type(norm).__module__.startswith("torch.nn.") or not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
        return False
    if weight.ndim != 1:
        return False
    channels = len(weight)
    made = -torch.linspace(0.5, 1.5, channels)  # activations change negative numbers
    values = {**_statistics(norm), "weight": torch.zeros(channels), "bias": made}
    side = 2 if channels != 2 else 3
    for shape, laid in (((1, channels, side, side), (1, -1, 1, 1)), ((1, side, channels), (1, 1, -1))):
        output = _call(norm, values, torch.ones(shape))
        if output is not None and output.shape == shape:
            return not torch.allclose(output, made.view(laid).expand(shape), atol=1e-6)
    return False


@torch.no_grad()
def is_linear_in_weight(module: nn.Module) -> bool:
    """Whether a convolution or linear is linear in its weight, and does not, for example, standardise it first.

    Args:
        module: of any class; True for those of torch, and if the module cannot be tested.
    """
    weight = getattr(module, "weight", None)
    if type(module).__module__.startswith("torch.nn.") or not isinstance(weight, Tensor):
        return True
    shape: tuple[int, ...]
    if isinstance(module, nn.modules.conv._ConvNd):
        spans = zip(module.kernel_size, module.dilation, strict=True)
        shape = (1, module.in_channels, *((size - 1) * step + 1 for size, step in spans))
    elif isinstance(module, nn.Linear):
        shape = (1, module.in_features)
    else:
        return True
    generator = torch.Generator().manual_seed(0)
    x, new = torch.rand(shape, generator=generator), torch.rand(weight.shape, generator=generator)
    one, two = (_call(module, {**_zeros(module), "weight": factor * new}, x) for factor in (1.0, 2.0))
    if one is None or two is None:
        return True
    return torch.allclose(2 * one, two, rtol=1e-4, atol=1e-5 * float(two.abs().max()))


_FIRST: dict[type, bool] = {}


@torch.no_grad()
def has_channels_first(norm: nn.Module) -> bool:
    """Whether a norm of an unknown class takes maps, (batch, channels, height, width), and not (..., channels).

    It is tested by running it, once per class.

    Args:
        norm: with a weight with one element per channel.
    """
    cls = type(norm)
    if cls not in _FIRST:
        weight = getattr(norm, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 1 or len(weight) == 1:
            return False
        channels = len(weight)
        side = 2 if channels != 2 else 3
        values = {**_statistics(norm), **{name: torch.ones(p.shape) for name, p in norm.named_parameters()}}
        shapes = (1, channels, side, side), (1, side, side, channels)
        first, last = (_call(norm, values, torch.ones(shape)) is not None for shape in shapes)
        if not first and not last:
            return False
        _FIRST[cls] = first and not last
    return _FIRST[cls]


def _statistics(norm: nn.Module) -> dict[str, Tensor]:
    """Initial buffers of a norm."""
    ones = {name: torch.ones(buffer.shape) for name, buffer in norm.named_buffers() if buffer.is_floating_point()}
    others = {name: torch.zeros_like(b, device="cpu") for name, b in norm.named_buffers() if name not in ones}
    return {**ones, **others}


def _zeros(module: nn.Module) -> dict[str, Tensor]:
    """Ones for gains, and zeros for all other parameters."""
    return {
        name: torch.zeros(p.shape) if name == "bias" else torch.ones(p.shape) for name, p in module.named_parameters()
    }


def _call(module: nn.Module, values: dict[str, Tensor], x: Tensor) -> Tensor | None:
    """A module's output with other parameters and buffers; None if it does not take such an input."""
    plain = copy.copy(module)  # without hooks: they may count or change what runs through the module
    plain._forward_hooks, plain._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        output = functional_call(plain, values, (x,))
    except (RuntimeError, ValueError, AssertionError, IndexError):
        return None
    return output if isinstance(output, Tensor) else None
