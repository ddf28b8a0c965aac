"""Adapters and configs that name a backbone's modules as an earlier version of transformers did.

transformers renames modules from time to time and keeps tables by which it renames the keys of checkpoints while
loading. peft applies them to LoRA alone; here they serve the methods of this library.
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
    """Give an adapter's weights the names they would be saved under today.

    A key that is expected stays, and so does one that no table of transformers leads from to an expected one.

    Args:
        model: with the adapter's layers in it.
        weights: of the adapter's file, by keys without its name.
        expected: keys under which the adapter would be saved now.
        prefix: of the method, e.g. `"vpt_"`.

    Returns:
        the same weights in the same order.
    """
    unknown = [key for key in weights if key not in expected and key.removeprefix(PEFT_PREFIX) not in expected]
    tables = _tables(model) if unknown else []
    renamed: dict[str, str] = {}
    for key in unknown:
        root = PEFT_PREFIX if key.startswith(PEFT_PREFIX) else ""
        for rename in tables:
            for name in _candidates(key.removeprefix(root), prefix, rename):
                if (root + name in expected or name in expected) and root + name not in weights:
                    renamed.setdefault(key, root + name)
    return {renamed.get(key, key): value for key, value in weights.items()}


def to_present_names(model: nn.Module, names: Names) -> Names:
    """Give modules the names they have in the model, where a field of a config names them as they were called before.

    Args:
        model: without or with adapters.
        names: names, or ends of names, or a regular expression for full names, or None.

    Returns:
        the same; in place of what matches no module today, the full names of the modules that it matched before.
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
    """What an old key `<module>.<prefix><slot>.<parameter>`, or that of a copy of a module, may be called today."""
    module, found, tail = key.rpartition(f".{prefix}")
    if not found:
        return [rename(key)]
    slot, _, parameter = tail.partition(".")
    now = rename(module + SUFFIX).removesuffix(SUFFIX)
    # where the adapter is a copy of a module, its parameters have been renamed with those of the module
    copied = rename(f"{module}.{parameter}")
    inside = copied.removeprefix(f"{now}.") if copied.startswith(f"{now}.") else parameter
    return [f"{now}.{prefix}{slot}.{name}" for name in (parameter, inside)]


def _tables(model: nn.Module, reverse: bool = False) -> list[Rename]:
    """For each transformers model in a model, what renames keys as transformers does when it loads a checkpoint.

    Args:
        model: may hold several, or none.
        reverse: rename to what the keys were before.
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
