"""Restores a model if putting an adapter in fails half-way."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


class Structure:
    """A snapshot of the modules of a model with their hooks and attributes, without the values of tensors.

    Args:
        model: the model.
        others: other objects whose attributes belong to the snapshot.
    """

    def __init__(self, model: nn.Module, *others: object) -> None:
        self._objects = [(each, type(each), _contents(vars(each))) for each in (*model.modules(), *others)]
        self._trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Restore the model."""
        for each, kind, contents in self._objects:
            if type(each) is not kind:
                each.__class__ = kind
            attributes = vars(each)
            attributes.clear()
            for name, (value, copied) in contents.items():
                if copied is not None:
                    _refill(value, copied)
                attributes[name] = value
        for parameter, trains in self._trains:
            parameter.requires_grad_(trains)


def _contents(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Attributes, with copies of those that may be changed in place."""
    return {
        name: (value, copy.copy(value) if isinstance(value, dict | list | set) else None)
        for name, value in attributes.items()
    }


def _refill(container: Any, contents: Any) -> None:
    # keep the same dictionary object, through which handles of hooks find their hooks
    container.clear()
    container.extend(contents) if isinstance(container, list) else container.update(contents)
