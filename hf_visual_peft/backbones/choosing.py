"""Chooses one of the backbones in a model, and explains what to do if none is known."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..tables import close_names, did_you_mean
from .architectures import Architecture, Tower, architecture_of, known_backbones
from .backbone import BackboneError, SeveralError
from .paths import is_in


Choice = tuple[str, nn.Module, Architecture]
"""Path, module and role table of a backbone."""

REMEDY = (
    "For another architecture, register a role table before get_peft_model: "
    "hf_visual_peft.register_architecture(hf_visual_peft.Architecture(backbones=('MyViT',), blocks='blocks', "
    "patch_embedding='patch_embed', ...))."
)
_TEXT_REMEDY = (
    "For another text tower, register a role table before get_peft_model: hf_visual_peft.register_architecture("
    "hf_visual_peft.Architecture(backbones=({name!r},), blocks='encoder.layer', patch_embedding=(), prefix_tokens=(), "
    "grid=None, ...), tower='text')."
)
_SEVERAL = (
    "{outer} holds several {tower} backbones: {names}. Choose one by its path: backbone={first!r} in the config, or "
    "with_visual_targets(config, model, backbone={first!r}) for peft's own methods."
)
_PIXELS = (1, 3, 4)  # channels of images
_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def choose(model: nn.Module, named: str | None = None, tower: Tower = "vision") -> Choice | None:
    """The chosen backbone; None if it has no table.

    Args:
        model: a backbone, or a model that holds one or several.
        named: path of the backbone, or of a module that holds only this one.
        tower: whether it is a vision backbone or a text tower.

    Raises:
        BackboneError: several fit, or none can be at this path.
    """
    known = known_in(model, tower)
    found = known
    if named is not None:
        _check_path(model, named, known)
        found = [choice for choice in known if is_in(choice[0], named)]
    if len(found) > 1 and named is None:
        taken = _taken(model)
        found = [choice for choice in known if is_in(choice[0], taken)] if taken is not None else found
    if len(found) > 1:
        outer = f"{named!r} of {type(model).__name__}" if named else type(model).__name__
        message = _SEVERAL.format(outer=outer, tower=tower, names=_listed(found), first=found[0][0])
        raise SeveralError(message, [path for path, _, _ in found])
    return found[0] if found else None


def known_in(model: nn.Module, tower: Tower = "vision") -> list[Choice]:
    """The outermost backbones in a model that have a table."""
    found: list[Choice] = []
    for path, module in model.named_modules():
        architecture = architecture_of(module, tower)
        if architecture is not None and not any(is_in(path, outer) for outer, _, _ in found):
            found.append((path, module, architecture))
    return found


def _taken(model: nn.Module) -> str | None:
    """The path that the adapters in a model have chosen; None if there are no adapters or no choice."""
    configs: Any = getattr(model, "peft_config", None) or {}
    paths = [getattr(config, "backbone", None) for config in configs.values()]
    return next((path for path in paths if path is not None), None)


def _check_path(model: nn.Module, named: str, known: Sequence[Choice]) -> None:
    """Refuse a path without a backbone, and list the paths with one.

    Raises:
        BackboneError: there is no such module, or it is a part of a backbone.
    """
    if type(named) is not str:
        raise BackboneError(f"backbone is {named!r}: must be None or the path of a module.")
    paths = [path for path, _ in model.named_modules()]
    there = f" {type(model).__name__} has {_listed(known)}." if known else ""
    if named not in paths:
        meant = "" if there else did_you_mean(close_names(named, paths))
        raise BackboneError(
            f"backbone is {named!r}: {type(model).__name__} has no such module.{there} {meant}".rstrip()
        )
    around = next((choice for choice in known if is_in(named, choice[0]) and named != choice[0]), None)
    if around is not None:
        raise BackboneError(
            f"backbone is {named!r}, which is a part of the backbone {around[0]!r} ({type(around[1]).__name__}): name "
            "the whole backbone, and choose blocks by layers_to_transform."
        )


def _listed(choices: Sequence[Choice]) -> str:
    return ", ".join(f"{path!r} ({type(module).__name__})" for path, module, _ in choices)


def unknown(model: nn.Module, named: str | None = None) -> str:
    """The error text for a model without a known backbone: remedy, classes with similar names, and what works.

    Args:
        model: the whole model.
        named: path of the module that was chosen in it.
    """
    path = named if named is not None else tower_in(model)
    tower = model.get_submodule(path)
    name, outer = type(tower).__name__, type(model).__name__
    where = f"{name} ({path!r} in {outer}) is" if path else f"{name} holds"
    known = {each.partition(":")[0].rpartition(".")[2] for each in known_backbones()}
    close = close_names(name, known)
    return (
        f"{where} no vision backbone that hf_visual_peft knows. {REMEDY.replace('MyViT', name)} "
        + (f"Known classes with similar names: {', '.join(close)}. " if close else "")
        + "Without a table, name linears in target_modules: methods that have this field, such as SSF and BitFit, and "
        "peft's own methods act on them."
    )


def no_text_tower(model: nn.Module, named: str | None = None) -> str:
    """The error text for a model without a text tower that is known: what there is, and the remedy.

    Args:
        model: the whole model.
        named: path of the module that was chosen in it.
    """
    within = model if named is None else model.get_submodule(named)
    place = type(model).__name__ if named is None else f"{named!r} in {type(model).__name__}"
    told = getattr(within, "text_model", None)
    name = type(told).__name__ if isinstance(told, nn.Module) else ""
    found = f"its {name} has no role table" if name else "none of its modules is one that has a role table"
    known = {each.rpartition(".")[2] for each in known_backbones("text")}
    return (
        f'tower="text": {place} has no text tower that hf_visual_peft knows: {found}. Known are '
        f"{', '.join(sorted(known))}. {_TEXT_REMEDY.format(name=name or 'MyTextModel')}"
    )


def tower_in(model: nn.Module) -> str:
    """Path of the part of a model that takes images, even without a table; `""` if it is the whole model.

    It is the smallest module that holds blocks and either embeds pixels by a convolution or is a pretrained model with
    pixels as input; of several, the one that a config calls its vision part.

    Raises:
        BackboneError: several of one class could be meant.
    """
    modules = dict(model.named_modules())
    pixels = [path for path, module in modules.items() if _embeds_pixels(module)]
    blocks = [path for path, module in modules.items() if _is_list_of_blocks(module)]
    told = vision_parts(model)
    around = [
        path
        for path, module in modules.items()
        if not isinstance(module, _LISTS)
        and _runs(module)
        and (path in told or _takes_pixels(module) or any(is_in(each, path) for each in pixels))
        and any(is_in(each, path) for each in blocks)
    ]
    smallest = [path for path in around if not any(is_in(other, path) and other != path for other in around)]
    parts = [path for path in smallest if any(is_in(path, part) for part in told)]
    if not parts:  # an encoder and a decoder may be of one class, and only one of them embeds pixels
        parts = [path for path in smallest if any(is_in(each, path) for each in pixels)]
    path = max(parts or smallest, key=lambda path: path.count(".") + bool(path), default="")
    alike = [other for other in parts or smallest if type(modules[other]) is type(modules[path])]
    if len(alike) > 1:
        names = ", ".join(f"{other!r} ({type(modules[other]).__name__})" for other in alike)
        text = _SEVERAL.format(outer=type(model).__name__, tower="vision", names=names, first=alike[0])
        raise SeveralError(text, alike)
    return path


def vision_parts(model: nn.Module) -> list[str]:
    """The outermost pretrained models within a model that its config calls the vision part."""
    models = [(path, module) for path, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    kinds = {type(getattr(module.config, "vision_config", None)) for _, module in models} - {type(None)}
    found: list[str] = []
    for path, module in models:
        if path and type(module.config) in kinds and not any(is_in(path, outer) for outer in found):
            found.append(path)
    return found


def takes_images(model: nn.Module) -> bool:
    """Whether anything in a model takes images."""
    return any(_takes_pixels(module) or _embeds_pixels(module) for module in model.modules()) or bool(known_in(model))


def _runs(module: nn.Module) -> bool:
    """Whether a module has a forward of its own, and is not only a name for its parts."""
    return type(module).forward is not nn.Module.forward


def _embeds_pixels(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Conv3d) and module.in_channels in _PIXELS


def _is_list_of_blocks(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
        return False
    return len({type(block) for block in module}) == 1 and any(True for _ in module[0].children())


def _takes_pixels(module: nn.Module) -> bool:
    if not isinstance(module, PreTrainedModel):
        return False
    name, names = str(module.main_input_name), list(inspect.signature(module.forward).parameters)
    # encoders within have the name of their classes' base, and take hidden states
    return any(each.startswith("pixel_values") for each in (*({name} & set(names)), *names[:1]))
