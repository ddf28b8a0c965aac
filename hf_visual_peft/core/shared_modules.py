"""Modules and weights that a model has under several names.

torch lists such a module once, under its first name, and peft replaces it only there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn


def holders_of(
    model: nn.Module, wanted: Callable[[nn.Module], bool] = lambda module: True
) -> dict[int, list[tuple[nn.Module, str]]]:
    """The parents of modules and the names of the modules in them, by the id of the module.

    Args:
        model: any.
        wanted: which modules.
    """
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None and wanted(child):
                found.setdefault(id(child), []).append((parent, name))
    return found


def names_of_modules(model: nn.Module) -> dict[str, list[str]]:
    """All names of the modules that have several, by the first name, which is among them."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return {some[0]: some for some in names.values() if len(some) > 1}


def share_copies(model: nn.Module, adapter_name: str) -> None:
    """Share and tie an adapter's trained copies as the original modules are.

    Args:
        model: with the copies (`modules_to_save`).
        adapter_name: whose copies.
    """
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    originals = {id(wrapper.original_module): wrapper for wrapper in wrappers}
    for original, holders in holders_of(model, lambda module: id(module) in originals).items():
        for parent, name in holders:
            if not isinstance(parent, BaseTunerLayer | AuxiliaryTrainingWrapper):
                setattr(parent, name, originals[original])
    first: dict[int, nn.Parameter] = {}
    for wrapper in wrappers:
        if adapter_name not in wrapper.modules_to_save:
            continue
        copy = wrapper.modules_to_save[adapter_name]
        for name, parameter in wrapper.original_module.named_parameters(remove_duplicate=False):
            owner, _, last = name.rpartition(".")
            part: Any = copy.get_submodule(owner)
            setattr(part, last, first.setdefault(id(parameter), getattr(part, last)))


def with_all_names(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """An adapter's weights under all names that a model has for them; a file has each only once.

    Args:
        state_dict: the weights.
        model: that the weights belong to.
    """
    names: dict[int, list[str]] = {}
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            names.setdefault(id(tensor), []).append(name)
    found = dict(state_dict)
    for same in names.values():
        there = next((name for name in same if name in found), None)
        if there is not None:
            found |= {name: found[there] for name in same if name not in found}
    return found
