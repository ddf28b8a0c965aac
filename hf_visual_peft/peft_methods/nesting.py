"""peft's own layers stand inside this library's, whichever came first.

Both kinds wrap a linear. peft merges its weights into the innermost module, so a layer of peft around one of SSF would
merge into weights that SSF scales afterwards: another function. SSF around a layer of peft has no such fault. So the
layers of this library are taken out while peft puts its own in, and then stand around whatever is there. They are out,
too, while peft merges, saves and loads: it would merge and save every layer that it meets, and a file would have names
that only a model with the same layers around has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from peft import peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..core.shared_modules import holders_of
from ..sites import ModuleLayer, VisualTunerLayer
from ..sites.layer import WrappingLayer


def teach_nesting() -> None:
    """Make peft's tuners put their layers inside those of this library, and merge only their own; done once."""
    if not hasattr(BaseTuner.inject_adapter, "_nests"):
        BaseTuner.inject_adapter = _nesting(BaseTuner.inject_adapter)
        BaseTuner.merge_adapter = _alone(BaseTuner.merge_adapter)
        BaseTuner.unmerge_adapter = _alone(BaseTuner.unmerge_adapter)
        # by the names that `PeftModel` calls while it saves and loads
        peft_model.get_peft_model_state_dict = _by_plain_names(peft_model.get_peft_model_state_dict)
        peft_model.set_peft_model_state_dict = _by_plain_names(peft_model.set_peft_model_state_dict)


def _nesting(inject: Callable) -> Callable:
    @functools.wraps(inject)
    def inject_adapter(self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if self.tuner_layer_cls is VisualTunerLayer:
            inject(self, model, adapter_name, *args, **kwargs)
            return
        merged = next((p for p, m in model.named_modules() if isinstance(m, ModuleLayer) and m.merged), None)
        if merged is not None:
            raise ValueError(
                f"An adapter is merged into {merged}. Call unmerge_adapter() before {adapter_name!r} is added: the "
                "weights of both would otherwise be mixed up."
            )
        held = _held(model)
        for layer, places in held:
            _put(layer.base_layer, places)
        try:
            inject(self, model, adapter_name, *args, **kwargs)
            for layer, places in held:
                # peft replaces a module that several others hold in one place only
                there = (getattr(parent, name) for parent, name in places)
                layer.base_layer = next((each for each in there if each is not layer.base_layer), layer.base_layer)
        finally:
            for layer, places in held:
                _put(layer, places)

    inject_adapter._nests = True  # type: ignore[attr-defined]
    return inject_adapter


def _held(model: nn.Module) -> list[tuple[ModuleLayer, list[tuple[nn.Module, str]]]]:
    """The layers around linears, norms and convolutions, with the modules that hold them and their names there."""
    found = holders_of(model, lambda module: isinstance(module, ModuleLayer)).values()
    outside = [[(parent, name) for parent, name in places if not isinstance(parent, ModuleLayer)] for places in found]
    return [(getattr(*places[0]), places) for places in outside if places]


def _put(module: nn.Module, places: list[tuple[nn.Module, str]]) -> None:
    for parent, name in places:
        setattr(parent, name, module)


def _alone(act: Callable) -> Callable:
    """Let peft's tuner act on its own layers only; those of this library have their own tuners."""

    @functools.wraps(act)
    def acting(self: BaseTuner, *args: Any, **kwargs: Any) -> None:
        with _hidden(self.model):
            act(self, *args, **kwargs)

    return acting


def _by_plain_names(call: Callable) -> Callable:
    """Let weights of peft's own methods have the names that they have in a model without layers of this library."""

    @functools.wraps(call)
    def calling(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tuner: Any = getattr(model, "base_model", None)
        is_peft = isinstance(tuner, BaseTuner) and tuner.tuner_layer_cls is not VisualTunerLayer
        named = kwargs.get("state_dict") is not None  # gathered by the caller, under the names of the whole model
        with _hidden(tuner.model) if is_peft and not named else nullcontext():
            return call(model, *args, **kwargs)

    return calling


@contextmanager
def _hidden(model: nn.Module) -> Iterator[None]:
    """Take all layers of this library out of a model; what they are around stands in their places."""
    parents = [(parent, dict(parent._modules)) for parent in model.modules()]
    parents = [
        (parent, held) for parent, held in parents if any(isinstance(m, VisualTunerLayer) for m in held.values())
    ]
    for parent, held in parents:
        for name, module in held.items():
            if isinstance(module, WrappingLayer):
                parent._modules[name] = module.base_layer
            elif isinstance(module, VisualTunerLayer):
                del parent._modules[name]
    try:
        yield
    finally:
        for parent, held in parents:
            parent._modules.clear()
            parent._modules.update(held)
