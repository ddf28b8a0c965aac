"""Names of modules in a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .backbone import own_children, unwrapped


def join(*names: str) -> str:
    """Join names to one dotted name."""
    return ".".join(name for name in names if name)


def is_in(path: str, outer: str) -> bool:
    """Whether a module is another one or inside it, by their names."""
    return not outer or path == outer or path.startswith(f"{outer}.")


def within(path: str, modules: Iterable[str]) -> str | None:
    """The first of some modules that is the module of that name or holds it; None if none is."""
    return next((module for module in modules if path == module or path.startswith(f"{module}.")), None)


def existing(model: nn.Module, prefix: str, names: Sequence[str]) -> tuple[str, ...]:
    """Full names of the existing modules among some names, which may have wildcards.

    Args:
        model: that holds the modules.
        prefix: name of the module that the names are relative to.
        names: of the modules.
    """
    found = (path for name in names for path in _expand(model, prefix, name.split(".") if name else []))
    return tuple(dict.fromkeys(path for path in found if isinstance(lookup(model, path), nn.Module)))


def trainable(model: nn.Module, prefix: str, names: Sequence[str]) -> tuple[str, ...]:
    """Those of `existing` that have parameters."""
    paths = existing(model, prefix, names)
    return tuple(path for path in paths if any(True for _ in unwrapped(model.get_submodule(path)).parameters()))


def lookup(model: nn.Module, path: str) -> object:
    """The object with a dotted name, or None."""
    target: object = model
    for name in path.split(".") if path else ():
        target = getattr(target, name, None)
    return target


def original(module: nn.Module) -> nn.Module:
    """The original module if adapters train copies of it."""
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def _expand(model: nn.Module, prefix: str, names: Sequence[str]) -> Iterator[str]:
    """Full names that match a dotted name with wildcards."""
    first = next((index for index, name in enumerate(names) if "*" in name), None)
    if first is None:
        yield join(prefix, *names)
        return
    parent = join(prefix, *names[:first])
    module = lookup(model, parent)
    if isinstance(module, nn.Module):
        children = [name for name, _ in own_children(unwrapped(module))]
        for child in fnmatch.filter(children, names[first]):
            yield from _expand(model, join(parent, child), names[first + 1 :])
