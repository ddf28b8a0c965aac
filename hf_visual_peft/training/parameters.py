"""The parameters that an optimizer gets, and which of them decay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn


# modules that peft puts between a parameter and the name it had
WRAPPERS = re.compile(r"\b(base_layer|original_module|modules_to_save\.[^.]+)\.")


# parts of a dual encoder of transformers or OpenCLIP, by tower
TOWER_PARTS = {"vision": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")}


def parameter_groups(
    model: nn.Module, weight_decay: float, learning_rates: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """The parameters that train, in two groups: those that decay and those that do not.

    Tensors of two or more dimensions decay. Biases, scales, shifts, weights of norms and all other tensors of fewer
    dimensions do not. Neither do parameters that an equation or a model names in its `no_weight_decay`, which is an
    attribute or, as in timm, a method: there decay would pull pretrained weights towards zero, or undo a choice.

    Args:
        model: any model.
        weight_decay: of the first group; from 0.
        learning_rates: of the towers of a dual encoder, `"vision"` and `"text"`, where they are not that of the
            optimizer. A tower is the encoder with its projection and the adapters in it. What stands in neither, as a
            learned scale and the weights of methods for class texts, keeps the optimizer's.

    Returns:
        Groups for `torch.optim`, without empty ones; those of a tower with a learning rate have it as `lr`.

    Raises:
        ValueError: the weight decay or a learning rate is negative or not finite; or nothing trains, or nothing of a
            tower that has a learning rate.
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
    groups: Sequence[dict[str, Any]] = (
        {"params": [p for p, decay in zip(trainable, decays, strict=True) if decay], "weight_decay": weight_decay},
        {"params": [p for p, decay in zip(trainable, decays, strict=True) if not decay], "weight_decay": 0.0},
    )
    for tower, rate in (learning_rates or {}).items():
        groups = _with_rate(model, groups, tower, rate)
    return [group for group in groups if group["params"]]


def _with_rate(
    model: nn.Module, groups: Sequence[dict[str, Any]], tower: str, rate: float
) -> tuple[dict[str, Any], ...]:
    """The groups, with the parameters of one tower in groups of their own."""
    if tower not in TOWER_PARTS:
        raise ValueError(f"learning_rates has {tower!r}: must be among {', '.join(map(repr, TOWER_PARTS))}.")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < float("inf"):
        raise ValueError(f"learning_rates[{tower!r}] is {rate!r}: must be 0 or greater, and finite.")
    inside = {id(parameter) for part in _parts_of(model, tower) for parameter in part.parameters()}
    if not any(id(parameter) in inside for group in groups for parameter in group["params"]):
        raise ValueError(
            f"learning_rates[{tower!r}] is {rate}: nothing of a {tower} tower trains in {type(model).__name__}. Leave "
            'it out, or adapt that tower (tower="both").'
        )
    found = []
    for group in groups:
        mine = [parameter for parameter in group["params"] if id(parameter) in inside]
        others = [parameter for parameter in group["params"] if id(parameter) not in inside]
        found += [group | {"params": others}, group | {"params": mine, "lr": rate}]
    return tuple(found)


def _parts_of(model: nn.Module, tower: str) -> Iterator[nn.Module]:
    """The parts of one tower of the dual encoders in a model."""
    required = [names[0] for names in TOWER_PARTS.values()]
    for module in model.modules():
        if all(isinstance(getattr(module, name, None), nn.Module) for name in required):
            parts = (getattr(module, name, None) for name in TOWER_PARTS[tower])
            yield from (part for part in parts if isinstance(part, nn.Module))


def _named_without_decay(module: nn.Module) -> set[str]:
    """Names, within a module, of its parameters that must not decay."""
    names = getattr(module, "no_weight_decay", ())
    found: Iterable[str] = names() if callable(names) else names
    return {found} if isinstance(found, str) else set(found)
