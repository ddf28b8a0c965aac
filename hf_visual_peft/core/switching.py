"""Switching of adapters in a time that does not grow with their number.

To switch, peft visits every module of a model, including the equations of all adapters. Here the walk visits only the
backbone and the affected adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


def switch(
    model: nn.Module, names: str | list[str], inference_mode: bool = False, layer_cls: type = BaseTunerLayer
) -> None:
    """Set the active adapters, as `peft.tuners.tuners_utils.set_adapter` does.

    Args:
        model: with adapters.
        names: of those to be active.
        inference_mode: whether they are frozen.
        layer_cls: of the layers that hold them.
    """
    wanted = _Concerned(model, [names] if isinstance(names, str) else names)
    tuners_utils.set_adapter(wanted, names, inference_mode=inference_mode, layer_cls=layer_cls)


def concerned(model: nn.Module, names: Iterable[str]) -> Iterator[nn.Module]:
    """The modules of the backbone, the layers around them, and copies of modules that are active or named.

    Args:
        model: with adapters. Their equations are left out.
        names: of adapters.
    """
    wanted, found = set(names), [model]
    while found:
        module = found.pop()
        yield module
        if isinstance(module, BaseTunerLayer):
            found.append(module.get_submodule("base_layer"))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            found.append(module.original_module)
            copies = getattr(module, "modules_to_save", {})
            found.extend(copies[name] for name in wanted.union(module.active_adapters) if name in copies)
        else:
            found.extend(module.children())


class _Concerned:
    """Stands for a model in peft's walk over its modules.

    Args:
        model: with adapters.
        names: of those to be active.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model, self.names = model, names

    def modules(self) -> Iterator[nn.Module]:
        """As `concerned` has them."""
        return concerned(self.model, self.names)
