"""The classes of blocks with adapters: those of the blocks, with a call that runs the adapters around it."""

from __future__ import annotations

from functools import cache
from typing import Any

from .layer import CHILD


class AdaptedBlock:
    """Mixin for the classes of blocks with adapters; `adapted_class` creates these classes.

    So a block keeps its place, its name, its hooks and its children.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block, with the adapters around its hooks."""
        return getattr(self, CHILD).around(super().__call__, *args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copying and pickling: the class is created again from that of the block."""
        state: tuple = super().__reduce_ex__(max(2, int(protocol)))[2:]  # type: ignore[assignment]
        return (_new_block, (plain_class(type(self)),), *state)


@cache
def adapted_class(kind: type) -> type:
    """The class of blocks with adapters, for a class of blocks.

    It has the same name, by which accelerate and others find blocks.

    Args:
        kind: the block's own class.
    """
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind)(kind.__name__, (AdaptedBlock, kind), names)


def plain_class(kind: type) -> type:
    """The class of a block without adapters.

    Args:
        kind: its present class.
    """
    return kind.__bases__[1] if kind.__bases__[0] is AdaptedBlock else kind


def _new_block(kind: type) -> Any:
    made: Any = adapted_class(kind)
    return made.__new__(made)
