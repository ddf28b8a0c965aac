"""Renames for adapters and configs with module names of earlier versions of transformers.

transformers renames modules from time to time and keeps tables to rename the keys of checkpoints on loading. peft
applies them only to LoRA; this module applies them to the methods of this library.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TypeVar

from peft import PeftModel
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import match_target_against_key
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key


PEFT_PREFIX = "base_model.model."
SUFFIX = ".weight"  # the tables rename parameters, not modules

ValueT = TypeVar("ValueT")
Names = list[str] | set[str] | str | None
Rename = Callable[[str], str]


def to_present_keys(
    model: nn.Module, weights: Mapping[str, ValueT], expected: Collection[str], prefix: str
) -> dict[str, ValueT]:
    """Rename an adapter's weights to the names under which they would be saved today.

    An expected key stays, and so does a key that nothing maps to an expected one: neither a table of transformers, nor
    that what adapters have in a block was named as if it stood around the block.

    Args:
        model: with the adapter's layers in it.
        weights: of the adapter's file, by keys without the adapter's name.
        expected: keys under which the adapter would be saved now.
        prefix: of the method, e.g. `"vpt_"`.

    Returns:
        the same weights in the same order.
    """
    unknown = [key for key in weights if key not in expected and key.removeprefix(PEFT_PREFIX) not in expected]
    tables: list[Rename] = [str, *_tables(model)] if unknown else []
    places = _places(expected, prefix) if unknown else {}
    renamed: dict[str, str] = {}
    for key in unknown:
        root = PEFT_PREFIX if key.startswith(PEFT_PREFIX) else ""
        for rename in tables:
            for name in _candidates(key.removeprefix(root), prefix, rename):
                name = _place_in_block(name, prefix, places)
                if (root + name in expected or name in expected) and root + name not in weights:
                    renamed.setdefault(key, root + name)
    return {renamed.get(key, key): value for key, value in weights.items()}


def to_present_names(model: nn.Module, names: Names) -> Names:
    """Replace old module names in a field of a config by the names in the model.

    Args:
        model: without or with adapters.
        names: names, or ends of names, or a regular expression for full names, or None.

    Returns:
        the same; names that match no module today are replaced by the full names of the modules that they matched
        before.
    """
    if not names or (isinstance(names, str) and names.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND):
        return names

    def matches(name: str, path: str) -> bool:
        if isinstance(names, str):
            return bool(match_target_against_key(name, path))
        return f".{path}".endswith(f".{name}")

    given = [names] if isinstance(names, str) else names
    paths = [path for path, _ in model.named_modules() if path]
    unknown = [name for name in given if not any(matches(name, path) for path in paths)]
    if not unknown:
        return names
    tables = _tables(model, reverse=True)
    before = {path: _name_before(path, tables) for path in paths}
    found = {name: [path for path, was in before.items() if matches(name, was)] for name in unknown}
    if not any(found.values()):
        return names
    present = dict.fromkeys(path for name in given for path in found.get(name) or [name])
    return set(present) if isinstance(names, set) else list(present)


def _candidates(key: str, prefix: str, rename: Rename) -> list[str]:
    """Possible present names of an old key `<module>.<prefix><slot>.<parameter>`, or of that of a module's copy."""
    module, found, tail = key.rpartition(f".{prefix}")
    if not found:
        return [rename(key)]
    slot, _, parameter = tail.partition(".")
    now = rename(module + SUFFIX).removesuffix(SUFFIX)
    # if the adapter is a copy of a module, its parameters were renamed with those of the module
    copied = rename(f"{module}.{parameter}")
    inside = copied.removeprefix(f"{now}.") if copied.startswith(f"{now}.") else parameter
    return [f"{now}.{prefix}{slot}.{name}" for name in (parameter, inside)]


def _places(expected: Collection[str], prefix: str) -> dict[str, list[str]]:
    """The modules at which an adapter has a parameter, by what names the parameter there."""
    found: dict[str, list[str]] = {}
    for key in expected:
        module, there, parameter = key.removeprefix(PEFT_PREFIX).rpartition(f".{prefix}")
        if there:
            found.setdefault(parameter, []).append(module)
    return found


def _place_in_block(key: str, prefix: str, places: Mapping[str, list[str]]) -> str:
    """The key of a parameter of a block's adapters, where an earlier version had it at the block itself."""
    block, _, parameter = key.rpartition(f".{prefix}")
    modules = places.get(parameter, [])
    inside = [module for module in modules if module.startswith(f"{block}.")]
    return f"{inside[0]}.{prefix}{parameter}" if len(inside) == 1 and block not in modules else key


def _tables(model: nn.Module, reverse: bool = False) -> list[Rename]:
    """For each transformers model in a model, a function that renames keys as transformers does on loading.

    Args:
        model: may hold several, or none.
        reverse: whether to rename to the old keys.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found: list[str] = []
    tables: list[Rename] = []
    for path, module in base.named_modules():
        if not isinstance(module, PreTrainedModel) or any(not p or path.startswith(f"{p}.") for p in found):
            continue
        found.append(path)
        steps = [step for step in get_model_conversion_mapping(module) if isinstance(step, WeightRenaming)]
        if reverse:
            steps = [step.reverse_transform() for step in reversed(steps)]
        tables.append(partial(_rename, f"{path}." if path else "", steps))
    return tables


def _rename(root: str, steps: list[WeightRenaming], key: str) -> str:
    if not key.startswith(root):
        return key
    return root + rename_source_key(key.removeprefix(root), steps, [])[0]


def _name_before(path: str, tables: list[Rename]) -> str:
    for rename in tables:
        path = rename(path + SUFFIX).removesuffix(SUFFIX)
    return path
