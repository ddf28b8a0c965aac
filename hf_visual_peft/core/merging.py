"""Merging of adapters into the weights of a whole model, and warnings of what its file would lose."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from tqdm import tqdm

from ..backbones.backbone import unwrapped
from ..sites import BlockAdapters, ModuleLayer, VisualTunerLayer
from ..sites.input import InputLayer
from ..sites.shifts import Flow
from .own_configs import OwnConfigs
from .shared_modules import holders_of


_NAMED = 3  # modules to name in a message; for the others it gives the number


class MergingTuner(OwnConfigs):
    """The part of `VisualTuner` that merges and removes adapters."""

    prefix: str

    def unload(self) -> nn.Module:
        """Take the adapters of this method out; without others the model is then the very base, its head included.

        (With peft's own methods the trained copies of `modules_to_save` stay in the model.)
        """
        return self._unload_and_optionally_merge(merge=False)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As peft's, for the adapters of this method.

        A shift of a module without a bias goes where it keeps the model what its class makes of it.
        """
        self._check_merge_allowed()
        self._merge(safe_merge, adapter_names)

    def unmerge_adapter(self) -> None:
        """As peft's, for the adapters of this method; layers with nothing merged are passed over."""
        # blocks tell that they cannot be merged at all
        layers = [layer for layer in self._own_layers() if isinstance(layer, BlockAdapters) or layer.holds_weights]
        if not layers:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        for layer in reversed(layers):
            with onload_layer(layer):
                layer.unmerge()

    def _own_layers(self) -> list[VisualTunerLayer]:
        """The layers in which this method has adapters, in the order of merging.

        What folds into linears that read a module comes last: it acts on all that these layers make of their input.
        """
        layers = [module for module in self.model.modules() if isinstance(module, VisualTunerLayer)]
        own = [layer for layer in layers if self.prefix in layer.methods()]
        return sorted(own, key=lambda layer: isinstance(layer, ModuleLayer) and bool(layer.followers))

    def _own_wrappers(self, names: Iterable[str]) -> list[Any]:
        """What holds copies of modules that adapters of some names train, and no adapter of another method does.

        Args:
            names: of adapters of this method.
        """
        others = {
            name
            for module in self.model.modules()
            if isinstance(module, BaseTunerLayer)
            for name in _names_at(module, self.prefix)
        }
        mine = set(names) - others
        wrappers = [module for module in self.model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        return [wrapper for wrapper in wrappers if mine & set(wrapper._adapters)]

    def _merge(self, safe_merge: bool, adapter_names: list[str] | None, progressbar: bool = False) -> None:
        try:
            for layer in tqdm(self._own_layers(), disable=not progressbar, desc="Merging adapters"):
                with onload_layer(layer):
                    layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        finally:
            self._settle()

    def _settle(self) -> None:
        names = []
        for name, layer in self.model.named_modules():
            if isinstance(layer, ModuleLayer):
                layer.settle()
                names += [name] if layer.get_base_layer() in layer.given else []
                names += [path for path, follower in layer.followers.items() if follower() in layer.given]
        if names:
            warn_of_biases(self.model, list(dict.fromkeys(names)))

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """As in peft, which recognises adapter layers by attributes that a model's own modules may also have."""
        if merge:
            self._check_merge_allowed()
        wrappers = self._own_wrappers(self.peft_config)
        if merge:
            self._merge(safe_merge, adapter_names, progressbar)
        for wrapper in wrappers:
            base: nn.Module = wrapper.original_module
            if merge:
                base = wrapper.unload_and_optionally_merge_module(
                    merge=merge, safe_merge=safe_merge, adapter_names=adapter_names
                )
            self._put_back(wrapper, base)
        exchanges = {}
        for layer in [module for module in self.model.modules() if isinstance(module, VisualTunerLayer)]:
            exchanges[id(layer.exchange)] = layer.exchange
            for name in [name for name in layer.plans if not merge or not layer.merged]:
                layer.delete_adapter(name, self.prefix)
            if layer.plans and not layer.merged:
                continue
            if layer.stands_in:
                layer.detach()
            else:
                self._put_back(layer, layer.base_layer)
        left = {id(m.exchange) for m in self.model.modules() if isinstance(m, VisualTunerLayer)}
        for exchange in [exchange for key, exchange in exchanges.items() if key not in left]:
            exchange.remove_hooks()
        shared = getattr(self.model, "peft_config", {})
        for name, config in self.peft_config.items():
            if shared.get(name) is config:
                del shared[name]
        if not shared and hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    def _put_back(self, module: nn.Module, base: nn.Module) -> None:
        for parent, child in holders_of(self.model, lambda each: each is module).get(id(module), []):
            self._replace_module(parent, child, base, module)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        own = self._own_layers()
        named = {name: module for name, module in self.model.named_modules() if isinstance(module, ModuleLayer)}
        named = {name: module for name, module in named.items() if module in own}
        layers = list(named.values())
        read = {id(follower()) for layer in layers for follower in layer.followers.values()}
        for layer in layers:
            if isinstance(layer, InputLayer) and id(layer.get_base_layer()) in read:
                raise ValueError(
                    f"Cannot merge: adapters by role and by target_modules both fold into {layer.get_base_layer()}, "
                    "not in the order in which they act. Delete one of them, or keep them beside the backbone."
                )
        for module in own:
            module.check_alone(self.prefix)
        for module in own:  # first what no backbone takes: else the error would advise another one
            module.check_mergeable()
        for module in own:
            module.check_merge()
        if not any(layer.merged for layer in layers):
            flow = Flow(self.model)
            for name, layer in named.items():
                layer.find_places(flow, name)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        """As in peft; none if a model does not give its input embeddings, such as detectors with tied heads."""
        try:
            return super()._get_module_names_tied_with_embedding()
        except (NotImplementedError, ValueError):
            return []


def _names_at(layer: BaseTunerLayer, prefix: str) -> set[str]:
    """Names of adapters at a layer that are not of one method."""
    if isinstance(layer, VisualTunerLayer):
        return {name for name, plan in layer.plans.items() for planned in plan if planned.prefix != prefix}
    return {name for slot in layer.adapter_layer_names for name in getattr(layer, slot, ())}


@dataclass
class _LossOnSaving:
    """The hook that warns, when the state of a merged model is taken, what a file of it would lose.

    Attributes:
        names: of the modules with a bias that their class does not create.
    """

    names: list[str]

    def __call__(self, model: nn.Module, prefix: str, keep_vars: bool) -> None:
        if prefix or keep_vars:  # a part of another state: of an adapter, or for a look at parameters
            return
        parts: dict[str, Any] = dict(model.named_modules())
        given = [name for name in self.names if name in parts and unwrapped(parts[name]).bias is not None]
        if given:
            warnings.warn(
                f"This merged {type(model).__name__} has biases that its class does not make: {_listed(given)}. A "
                "model that its class loads from a file has lost them, and with them what the adapter shifts there. "
                "Save the adapter, not the merged model.",
                stacklevel=6,
            )


def warn_of_biases(model: nn.Module, names: list[str]) -> None:
    """Warn which modules got a bias by merging, now and whenever the model's state is taken.

    Args:
        model: with adapter layers or without.
        names: of the modules.
    """
    for hook in list(model._state_dict_pre_hooks.values()):
        if isinstance(hook, _LossOnSaving):
            hook.names = names
            break
    else:
        model.register_state_dict_pre_hook(_LossOnSaving(names))
    plural = len(names) > 1
    warnings.warn(
        f"{_listed(names)} in {type(model).__name__}: {'each ' if plural else ''}gets a bias by merging. The model in "
        "memory is right. One that is built from its config has no such bias, unless a field (as qkv_bias) gives it "
        "one: saved and loaded, the merged model loses it. Save the adapter, not the merged model.",
        stacklevel=5,
    )


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
