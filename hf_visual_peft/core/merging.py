"""What tuners do with a whole model when adapters go into its weights, and what a file of it would lose."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from tqdm import tqdm

from ..backbones.backbone import unwrapped
from ..sites import BlockLayer, ModuleLayer
from ..sites.input import InputLayer
from ..sites.shifts import Flow
from .shared_modules import holders_of


_NAMED = 3  # modules in a message; of the others it tells the number


class MergingTuner(BaseTuner):
    """The part of `VisualTuner` that merges adapters and takes them out."""

    def unload(self) -> nn.Module:
        """Take all adapter layers out; the model is then the very base again, its head included.

        (With peft's own methods the trained copies of `modules_to_save` stay in the model.)
        """
        for holders in holders_of(self.model, lambda module: isinstance(module, ModulesToSaveWrapper)).values():
            for parent, child in holders:
                setattr(parent, child, parent.get_submodule(child).original_module)
        return super().unload()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As peft's; a shift of a module without a bias goes where it keeps the model what its class makes of it."""
        try:
            super().merge_adapter(adapter_names, safe_merge=safe_merge)
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
        """As peft's, which takes modules for adapter layers by their attributes: a model's own may be called so."""
        if merge:
            self._check_merge_allowed()
        found: list[tuple[str, nn.Module]] = []
        for name, module in self.model.named_modules():
            inside = any(name.startswith(f"{outer}.") for outer, _ in found[-1:])  # outer ones come first
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not inside:
                found.append((name, module))
        layers = [module for _, module in found if isinstance(module, BaseTunerLayer)]
        if merge:
            try:
                for layer in tqdm(layers, disable=not progressbar, desc="Merging adapters"):
                    with onload_layer(layer):
                        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            finally:
                self._settle()
        holders = holders_of(self.model)
        for _, module in found:
            base: nn.Module
            if isinstance(module, AuxiliaryTrainingWrapper):
                base = module.unload_and_optionally_merge_module(
                    merge=merge, safe_merge=safe_merge, adapter_names=adapter_names
                )
            else:
                base = unwrapped(module)
            for parent, child in holders[id(module)]:
                self._replace_module(parent, child, base, module)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)
        if isinstance(child, BlockLayer):
            child.detach()

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        named = {name: module for name, module in self.model.named_modules() if isinstance(module, ModuleLayer)}
        layers = [module for module in named.values() if module.plans]
        read = {id(follower()) for layer in layers for follower in layer.followers.values()}
        for layer in layers:
            if isinstance(layer, InputLayer) and id(layer.get_base_layer()) in read:
                raise ValueError(
                    f"Cannot merge: adapters by role and by target_modules both fold into {layer.get_base_layer()}, "
                    "not in the order in which they act. Delete one of them, or keep them beside the backbone."
                )
        for module in self.model.modules():
            if isinstance(module, BlockLayer) and module.plans:
                module.merge()
            if isinstance(module, ModuleLayer):
                module.check_merge()
        if not any(layer.merged for layer in layers):
            flow = Flow(self.model)
            for name, layer in named.items():
                layer.find_places(flow, name)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        """As peft's; none where the model does not tell its input embeddings, as detectors with tied heads."""
        try:
            return super()._get_module_names_tied_with_embedding()
        except (NotImplementedError, ValueError):
            return []


@dataclass
class _LossOnSaving:
    """The hook that tells, when the state of a merged model is taken, what a file of it would lose.

    Attributes:
        names: of the modules with a bias that their class does not make.
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
    """Say which modules have got a bias by merging, now and whenever the model's state is taken.

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
