"""What features of texts depend on, so that they are kept as long as it is the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..sites import VisualTunerLayer


_KINDS = ("cpu", "cuda")  # of devices with automatic casts


def state_of(modules: Sequence[nn.Module]) -> Any:
    """What tells whether features of texts are still right: the weights, and the adapters among them."""
    weights = [
        (id(p), 0 if p.is_inference() else p._version, p.data_ptr(), p.dtype, p.device)
        for module in modules
        for p in (*module.parameters(), *module.buffers())
    ]
    adapters = [
        _state_of_layer(layer)
        for module in modules
        for layer in module.modules()
        if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    types = [torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in _KINDS]
    return weights, adapters, types


def _state_of_layer(layer: Any) -> Any:
    """Which of its adapters act in a layer or a copied module, and how strongly."""
    scaling = getattr(layer, "scaling", None)
    return (
        tuple(layer.active_adapters),
        layer.disable_adapters,
        tuple(getattr(layer, "merged_adapters", ())),
        tuple(scaling.items()) if isinstance(scaling, dict) else None,
        layer.adapters_off if isinstance(layer, VisualTunerLayer) else None,
    )


def trains(modules: Sequence[nn.Module]) -> bool:
    """Whether a weight of some modules trains."""
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())
