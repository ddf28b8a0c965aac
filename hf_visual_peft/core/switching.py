"""Switching of adapters in a time that does not grow with their number.

To switch, peft visits every module of a model, including the equations of all adapters. Here the walk visits only the
backbone and the affected adapters.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Iterable, Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from ..sites import VisualTunerLayer


def teach_enabling() -> None:
    """Make `enable_adapters` of transformers turn on everything that its `disable_adapters` turns off.

    transformers itself leaves the copies of modules off, so that a model answers with the head of its base from then
    on, in silence. This concerns adapters of ours and of peft alike.
    """
    enable = PeftAdapterMixin.enable_adapters

    @functools.wraps(enable)
    def enable_adapters(self: nn.Module) -> None:
        enable(self)
        for module in self.modules():
            if isinstance(module, ModulesToSaveWrapper) and module.disable_adapters:
                module.enable_adapters(True)

    PeftAdapterMixin.enable_adapters = enable_adapters


def switch(model: nn.Module, names: str | list[str], inference_mode: bool, prefix: str, own: Collection[str]) -> None:
    """Set the active adapters of one method; those of others stay as they are.

    Args:
        model: with adapters.
        names: of those to be active.
        inference_mode: whether they are frozen.
        prefix: of the method.
        own: names of all its adapters.
    """
    wanted = [names] if isinstance(names, str) else names
    for module in concerned(model, wanted):
        if isinstance(module, AuxiliaryTrainingWrapper):
            if (copy := module.check_set_adapter(names)) in module._adapters:
                module.set_adapter(copy, inference_mode=inference_mode)
            elif set(module.active_adapters) <= set(own):
                module.set_adapter([], inference_mode=inference_mode)
        elif isinstance(module, VisualTunerLayer) and prefix in module.methods():
            if module.merged:
                warnings.warn(
                    "Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3
                )
                module.unmerge()
            module.switch(prefix, list(wanted), inference_mode)


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
            found.extend(child for name, child in module.named_children() if name == "base_layer")
        elif isinstance(module, AuxiliaryTrainingWrapper):
            found.append(module.original_module)
            copies = getattr(module, "modules_to_save", {})
            found.extend(copies[name] for name in wanted.union(module.active_adapters) if name in copies)
        else:
            found.extend(module.children())
