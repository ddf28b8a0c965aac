"""The parameters that an optimizer gets, and which of them decay."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn


# modules that peft puts between a parameter and the name it had
WRAPPERS = re.compile(r"\b(base_layer|original_module|modules_to_save\.[^.]+)\.")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that train, in two groups: those that decay and those that do not.

    Tensors of two or more dimensions decay. Biases, scales, shifts, weights of norms and all other tensors of fewer
    dimensions do not. Neither do parameters that an equation or a model names in its `no_weight_decay`, which is an
    attribute or, as in timm, a method: there decay would pull pretrained weights towards zero, or undo a choice.

    Args:
        model: any model.
        weight_decay: of the first group; from 0.

    Returns:
        Groups for `torch.optim`, without empty ones.

    Raises:
        ValueError: the weight decay is negative or not finite, or nothing trains.
    """
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay is {weight_decay}: must be 0 or greater, and finite.")
    kept = {
        id(parameter)
        for module in model.modules()
        if (names := _named_without_decay(module))
        for name, parameter in module.named_parameters()
        if WRAPPERS.sub("", name) in names
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no parameter that trains.")
    decays = [parameter.ndim > 1 and id(parameter) not in kept for parameter in trainable]
    groups = (
        {"params": [p for p, decay in zip(trainable, decays, strict=True) if decay], "weight_decay": weight_decay},
        {"params": [p for p, decay in zip(trainable, decays, strict=True) if not decay], "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]


def _named_without_decay(module: nn.Module) -> set[str]:
    """Names, within a module, of its parameters that must not decay."""
    names = getattr(module, "no_weight_decay", ())
    found: Iterable[str] = names() if callable(names) else names
    return {found} if isinstance(found, str) else set(found)
