"""The modules that `modules_to_save` names, and the copies that an adapter trains of them.

Names have the same meaning as in peft: ends of full names. Errors that peft would raise while it copies are found
before: a name that fits no module, and modules that cannot be copied.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..backbones.backbone import own_children, stands_in
from ..backbones.frozen_norms import NormStatistics
from ..backbones.paths import within
from ..sites.whole import require_trainable
from ..tables import close_names, did_you_mean


if TYPE_CHECKING:
    from .config import VisualPeftConfig


_NOT_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# peft itself adds these names if a config has a `task_type`
_NAMES_OF_PEFT = {"classifier", "score", "qa_outputs"}


class _ForTheTuner(dict):
    """The keys of a copy, which iterates as if empty.

    peft iterates over it when it loads a file, and fails at the first key that the file lacks. Here it finds none, and
    `loading.with_copies` handles the keys, with better messages.
    """

    def __iter__(self) -> Iterator[str]:
        return iter(())


class TrainedCopy(ModulesToSaveWrapper):
    """A module and its copies, which adapters train. It differs from peft's class in how files are read."""

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """As peft's."""
        return _ForTheTuner(super().adapter_state_dict_load_map(adapter_name))


def inner(module: nn.Module) -> nn.Module:
    """The module of the backbone, without layers or copies of adapters around it."""
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        around = isinstance(module, AuxiliaryTrainingWrapper)
        module = module.original_module if around else module.base_layer
    return module


def base_modules(model: nn.Module, path: str = "") -> dict[str, nn.Module]:
    """The modules of the backbone by their names without adapters.

    If adapters have put something around a module, the value is that.

    Args:
        model: with adapters or without.
        path: its name.
    """
    found = {path: model}
    for name, child in own_children(inner(model)):
        found |= base_modules(child, f"{path}.{name}" if path else name)
    return found


def replace_lost_heads(model: nn.Module, config: VisualPeftConfig, heads: Sequence[str]) -> None:
    """Make an adapter from a file copy the model's own task head if it was trained without one, or with another.

    Args:
        model: to be adapted.
        config: of the adapter, which then names the heads.
        heads: full names of the model's task heads.
    """
    if not config.from_file or not heads or config.copied_head:
        return
    names, modules = config.modules_to_save, base_modules(model)
    lost = [name for name in names or () if not any(path.endswith(name) for path in modules)]
    known = [name for name in names or () if name not in lost]
    if names is None or (lost and not any(head.endswith(name) for head in heads for name in known)):
        for name in lost:
            _tell_lost(name, type(model).__name__)
        config.modules_to_save = [*known, *heads]
        config.heads_added = list(heads)  # type: ignore[misc]


def find_copied(model: nn.Module, config: VisualPeftConfig, heads: Iterable[str] = ()) -> list[str]:
    """Full names of the modules in a config's `modules_to_save`; of nested ones only the outermost.

    Args:
        model: to be adapted.
        config: of the adapter.
        heads: full names that match only these modules.

    Raises:
        ValueError: a name fits no module, or an adapter cannot train a copy of one of the modules.
    """
    if not config.modules_to_save:
        return []
    modules = base_modules(model)
    named: dict[str, str] = {}  # the name that matched a module
    for name in config.modules_to_save:
        found = [name] if name in heads else [path for path in modules if path and path.endswith(name)]
        if not found:
            _reject(name, modules, type(model).__name__, config)
        named |= {path: name for path in found if path not in named}
    outermost = [path for path in modules if path in named and not within(path, [p for p in named if p != path])]
    for path in outermost:
        _check_copied(path, named[path], modules, config)
    return outermost


def require_named(model: nn.Module, config: PeftConfig) -> None:
    """Check the names in `modules_to_save` of a config of peft, which passes over those that fit no module.

    Args:
        model: to be adapted.
        config: of a method of peft.

    Raises:
        ValueError: a name fits no module.
    """
    names = getattr(config, "modules_to_save", None) or ()
    if isinstance(names, str):
        raise ValueError(
            f"{type(config).__name__}.modules_to_save is {names!r}: must be None or a list of names, as [{names!r}]."
        )
    modules = base_modules(model)
    for name in names:
        if not any(path.endswith(name) for path in modules if path):
            _reject(name, modules, type(model).__name__, config)


def _reject(name: str, modules: Mapping[str, nn.Module], class_name: str, config: PeftConfig) -> None:
    """Report a name that fits no module."""
    if config.task_type is not None and name in _NAMES_OF_PEFT:
        return
    if getattr(config, "from_file", False):  # it was right where the adapter was trained
        _tell_lost(name, class_name)
        return
    start = f"{type(config).__name__}.modules_to_save has {name!r}"
    holders = [
        path for path, module in modules.items() for own, _ in inner(module).named_parameters(recurse=False)
        if f"{path}.{own}".endswith(name)
    ]  # fmt: skip
    if holders:
        named = [path for path in holders if path]
        advice = f"Name the module that holds it: {_listed(named)}." if named else "It belongs to the model itself."
        raise ValueError(f"{start}, which is a parameter, not a module: whole modules are copied. {advice}")
    short = {path.rpartition(".")[2]: path for path in reversed(list(modules)) if path}
    close = close_names(name.rpartition(".")[2], [key for key in short if not key.isdigit()])
    close = close_names(name, modules, most=1, cutoff=0.8) + [short[key] for key in close]
    advice = did_you_mean(dict.fromkeys(close)) or "See model.named_modules()."
    raise ValueError(f"{start}: {class_name} has no module of that name. {advice}")


def _tell_lost(name: str, class_name: str) -> None:
    warnings.warn(
        f"The adapter was trained with a copy of {name!r}, and {class_name} has no module of that name: its weights "
        "are left out.",
        stacklevel=2,
    )


def _check_copied(path: str, name: str, modules: Mapping[str, nn.Module], config: VisualPeftConfig) -> None:
    """Refuse a module if an adapter cannot train a copy of it.

    Raises:
        ValueError: it is one.
    """
    start = f"{type(config).__name__}.modules_to_save has {name!r}"
    module = modules[path]
    if isinstance(inner(module), _NOT_CALLED):
        inside = [f"{path}.{child}" for child, _ in own_children(inner(module))]
        raise ValueError(
            f"{start}: {path!r} is a {type(inner(module)).__name__}, which the model does not call. Name what is in "
            f"it: {_listed(inside) or 'it is empty'}."
        )
    parts = path.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts))]
    inside = [other for other in modules if other.startswith(f"{path}.")]
    taken = [other for other in around if _holds_another(modules[other])]
    taken += [other for other in inside if modules[other] is not inner(modules[other])]
    taken += [other for other in (path, *inside) if any(map(stands_in, inner(modules[other]).children()))]
    if module is not inner(module) and not _is_copied(module):
        taken.append(path)
    if taken:
        raise ValueError(
            f"{start}, but another adapter has changed {taken[0]!r} already, so {path!r} cannot be copied as the "
            "backbone has it. Put the adapters on models of their own, or name other modules."
        )
    try:
        require_trainable(inner(module))
    except ValueError as error:
        raise ValueError(f"{start}: {error}") from error


def _is_copied(module: nn.Module) -> bool:
    """Whether adapters may train more copies of the module."""
    copied = isinstance(module, ModulesToSaveWrapper) and not isinstance(module, NormStatistics)
    return copied and module.original_module is inner(module)


def _holds_another(module: nn.Module) -> bool:
    """Whether a wrapper around a module would not run a copy of a part of it."""
    return module is not inner(module)


def _listed(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names]
    if len(shown) > 4:
        shown = [*shown[:3], f"{len(shown) - 3} more"]
    return f"{', '.join(shown[:-1])} or {shown[-1]}" if len(shown) > 1 else "".join(shown)


def copy_modules(model: nn.Module, paths: Iterable[str], adapter_name: str, active: bool) -> None:
    """Give an adapter copies of modules, and put each beside the module.

    Args:
        model: to be adapted, in place.
        paths: names as `find_copied` has them.
        adapter_name: whose copies.
        active: whether that adapter is active.
    """
    modules = base_modules(model)
    for path in paths:
        module = modules[path]
        if isinstance(module, ModulesToSaveWrapper):
            module.update(adapter_name)  # which an adapter of another method shares that has the same name
        else:
            parent, _, name = path.rpartition(".")
            wrapper: Any = TrainedCopy(module, adapter_name)
            wrapper.set_adapter([adapter_name] if active else [])
            setattr(inner(modules[parent]), name, wrapper)


def activate_copies(model: nn.Module, paths: Iterable[str], adapter_name: str, inference_mode: bool) -> None:
    """Activate the copies of an adapter, and train them unless it is in inference mode.

    Args:
        model: with them.
        paths: names of the modules.
        adapter_name: whose copies.
        inference_mode: whether they stay frozen.
    """
    modules = base_modules(model)
    for path in paths:
        wrapper: Any = modules[path]
        wrapper.set_adapter([adapter_name], inference_mode=inference_mode)
