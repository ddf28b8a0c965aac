"""The kinds of modules that methods act on: linears, convolutions and norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from .backbone import linear_sizes


_PROJECTIONS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm
_normalises: dict[type, bool] = {}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of features with a weight; a batch norm belongs to the convolution before it.

    A class with another name is a norm if the scale of its input does not matter, which is tested once.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or isinstance(module, _BATCH_NORMS):
        return False
    if any(True for _ in module.children()):
        return False
    cls = type(module)
    if "norm" in cls.__name__.lower():
        return True
    if cls not in _normalises:
        _normalises[cls] = _ignores_scale(module, len(weight))
    return _normalises[cls]


@torch.no_grad()
def _ignores_scale(module: nn.Module, channels: int) -> bool:
    """Whether a module returns the same for its input and for multiples of it, and not the same for every input."""
    if channels < 3 or type(module).__module__.startswith("torch.nn."):
        return False
    tensors = (*module.named_parameters(), *module.named_buffers())
    values = {
        name: torch.ones(t.shape) if t.is_floating_point() else torch.zeros_like(t, device="cpu")
        for name, t in tensors
    }
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, channels, 2, 2), (2, 2, channels)):
        x, other = (torch.randn(shape, generator=generator) for _ in range(2))
        try:
            once, more, else_ = (functional_call(module, values, (each,)) for each in (x, 64.0 * x, other))
        except Exception:  # any: it takes other inputs
            continue
        if isinstance(once, Tensor) and once.shape == shape and not torch.allclose(once, else_, rtol=1e-2, atol=1e-2):
            return torch.allclose(once, more, rtol=1e-2, atol=1e-2)
    return False


def is_operation(module: nn.Module) -> bool:
    """Whether a module is a linear, convolution or norm that methods can act on."""
    if getattr(module, "weight", None) is None:
        return False
    if is_projection(module) or isinstance(module, nn.LayerNorm | nn.GroupNorm | _BATCH_NORMS):
        return True
    return isinstance(module.weight, nn.Parameter) and is_norm(module)  # a frozen batch norm has none


def is_projection(module: nn.Module) -> bool:
    """Whether a module is a linear or convolution."""
    return isinstance(module, _PROJECTIONS)


def is_depthwise(module: nn.Module) -> bool:
    """Whether a module is a convolution that mixes no channels."""
    return getattr(module, "groups", 1) > 1 and module.groups >= getattr(module, "in_channels", 0)  # type: ignore


def channels_read(module: nn.Module) -> list[int]:
    """Channels that a module reads, by its weight."""
    sizes = linear_sizes(module)
    if sizes is not None:
        return [sizes[1]]
    if isinstance(module, nn.modules.conv._ConvNd):
        return [module.in_channels]
    weight = getattr(module, "weight", None)
    return (
        [len(weight)] if isinstance(weight, Tensor) and (isinstance(module, _BATCH_NORMS) or is_norm(module)) else []
    )
