"""peft's interface of a tuner, implemented once for all methods."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import _check_adapters_not_merged, _ExcludedModule
from torch import Tensor, nn

from ..backbones.backbone import VisionBackbone, unwrapped
from ..backbones.finding import find_backbone
from ..backbones.frozen_norms import (
    freeze_norms,
    keeps_statistics,
    move_statistics,
    norms_with_statistics,
)
from ..backbones.key_renames import to_present_keys
from ..backbones.paths import within
from ..sites import BlockAdapters, VisualTunerLayer, layer_for, layers_of
from ..sites.layer import CHILD
from .auxiliary import AuxiliaryLosses
from .calibration import Calibration
from .config import VisualPeftConfig
from .copies import activate_copies, copy_modules
from .labels import fitted, forget, record
from .loading import across_heads, copies_of, with_copies, without_layers
from .mixing import MixingTuner
from .planning import PlanningTuner, refuse_together
from .registry import tuner_base
from .shared_modules import holders_of, share_copies, with_all_names
from .switching import switch
from .targets import names_target
from .undoing import Structure


@tuner_base
class VisualTuner(PlanningTuner, MixingTuner):
    """Base of the tuners; the registry makes one for each method.

    A method gives the places of its equations (`VisualPeftConfig.placements`); this class finds the backbone, checks
    everything before the model is changed, and puts the layers in.
    """

    tuner_layer_cls = VisualTunerLayer
    target_module_mapping: dict[str, list[str]] = {}
    _before: dict[str, Structure] = {}  # the model before an adapter whose weights come from a file

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put the layers of an adapter into the model.

        Args:
            model: to be adapted, in place.
            adapter_name: key of the config in `peft_config`.
            autocast_adapter_dtype: whether half-precision adapter weights are converted to float32.
            low_cpu_mem_usage: whether adapter weights are created on the meta device.
            state_dict: names of the adapter's weights. It decides about the targets only if the config names target
                modules.

        Raises:
            ValueError: the config does not fit the model; the model is then unchanged.
        """
        config: VisualPeftConfig = self.peft_config[adapter_name]
        if config.filled_heads is not None and config.filled_heads is config.modules_to_save:
            # it belongs to an adapter already, whose model may have another head
            config = self.peft_config[adapter_name] = copy.copy(config)
            config.modules_to_save = None
        fields = dict(vars(config))
        self._forget_plan()
        before = Structure(model, *self._exchanges.values(), *filter(None, [getattr(model, "config", None)]))
        try:
            with fitted(model, config, adapter_name):
                self._plan(model, config)
                self._inject(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except BaseException:
            before.restore()
            for name, value in fields.items():
                setattr(config, name, value)
            self.peft_config.pop(adapter_name)
            raise
        finally:
            self._forget_plan()
        self._before = {adapter_name: before} if config.from_file else {}

    def _inject(
        self,
        model: nn.Module,
        config: VisualPeftConfig,
        adapter_name: str,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
        state_dict: dict[str, Tensor] | None,
    ) -> None:
        active = adapter_name in self.active_adapters
        self._exchange.unhook_heads()
        if self._crossing:
            self._exchange.crossing.add(f"{self.prefix}{adapter_name}")
        with self._without_hooks(model):  # copies must not have the hooks
            copy_modules(model, self._copied, adapter_name, active)
            share_copies(model, adapter_name)
            self._check_layers_around(model, config)
        if config.train_norm_statistics:
            norms = norms_with_statistics(model)
            acted_on = [path for path in norms if self._check_target_module_exists(config, path)]
            copied = [path for path, (first, *_) in self._placements.items() if first.site.trains_copy]
            move_statistics(model, adapter_name, active, acted_on, [*copied, *self._copied])
            share_copies(model, adapter_name)
        self._holders = holders_of(model)
        if self._backbone is not None and config.video:
            self._exchange.split_videos(model, self._backbone, config.frames_meet_before_norms)
        names, config.modules_to_save = config.modules_to_save, None  # peft has nothing left to do for them
        try:
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict if config.target_modules is not None else None,
            )
        finally:
            config.modules_to_save = names
        if active:
            activate_copies(model, self._copied, adapter_name, config.inference_mode)
        for layer in model.modules():
            if isinstance(layer, BlockAdapters):
                layer.follow()
                layer._changed()  # what trains is known now
        freeze_norms(self)
        self._hook_heads(model)
        if config.has_auxiliary_loss:
            losses = self._exchange.losses = self._exchange.losses or AuxiliaryLosses(self._exchange)
            losses.hook(model)
            losses.configs[f"{self.prefix}{adapter_name}"] = (adapter_name, config)
        if config.init_weights:
            for backbone in self._backbones.values():
                config.initialise(self._opened(model, backbone, adapter_name))

    @contextmanager
    def _without_hooks(self, model: nn.Module) -> Iterator[None]:
        """Remove the hooks of adapters at copied modules inside the context."""
        exchange = self._exchange
        hooked = self._copied and (exchange.handles or exchange.pixel_handles or exchange.image_handles)
        layers = [m for m in model.modules() if isinstance(m, BlockAdapters) and m.holds(self._copied)]
        with ExitStack() as stack:
            if hooked:
                stack.enter_context(exchange.without_hooks(model, self._backbone or find_backbone(model)))
            for layer in layers:
                stack.enter_context(layer.without_hooks())
            yield

    def _check_layers_around(self, model: nn.Module, config: VisualPeftConfig) -> None:
        """Refuse copies of modules that a layer of any adapter changes by more than hooks.

        Raises:
            ValueError: there is one.
        """
        for layer in [m for m in model.modules() if isinstance(m, BlockAdapters) and m.holds(self._copied)]:
            for path in self._copied:
                if layer.holds([path]) and layer.reaches_into(path):
                    refuse_together(config, path, layer.path)

    def _hook_heads(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, VisualTunerLayer)]
        sites = [planned.site for layer in layers for plan in layer.plans.values() for planned in plan]
        uses = [site.heads for site in sites if site.heads is not None]
        self._exchange.hook_heads(model, list(dict.fromkeys(path for use in uses for path, _ in use.outputs)))

    def _opened(self, model: nn.Module, backbone: VisionBackbone, adapter_name: str) -> Calibration:
        """An adapter in one backbone, for its method to inspect, without data."""
        layers = {
            path: layer
            for path, layer in layers_of(model).items()
            if self.prefix in layer.methods_of(adapter_name) and self._tower_of.get(path) == backbone.tower
        }
        return Calibration(model, backbone, adapter_name, layers, None, dataloader=(), progress=False)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As in peft, which casts only parameters; running statistics must have the dtype of their parameters."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        layers = [module for module in self.model.modules() if isinstance(module, VisualTunerLayer)]
        equations = [e.module for layer in layers for e in layer.equations_of(adapter_name) if e.module is not None]
        for norm in [module for equation in equations for module in equation.modules() if keeps_statistics(module)]:
            for name, buffer in norm.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(norm, name, buffer.to(next(norm.parameters(), buffer).dtype))

    def _prepare_adapter_config(self, peft_config: VisualPeftConfig, model_config: dict) -> VisualPeftConfig:
        return peft_config  # targets are found by role, from the model itself

    def _check_target_module_exists(self, peft_config: VisualPeftConfig, key: str) -> Any:
        if peft_config.target_modules is not None:
            if within(key, self._copied) or key in self._excluded:
                return _ExcludedModule()
            return names_target(peft_config, self._names.get(key, [key]))
        at_root = key == CHILD and "" in self._placements
        return _ExcludedModule() if key in self._excluded else at_root or key in self._placements

    def _prepare_model(self, peft_config: VisualPeftConfig, model: nn.Module) -> None:
        """Hold a place in the model itself if the method acts there, as peft passes its own name over."""
        if "" in self._placements and CHILD not in model._modules:
            model.add_module(CHILD, nn.Identity())

    def _create_and_replace(
        self,
        peft_config: VisualPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if current_key == CHILD and "" in self._placements:
            target, current_key = self.model, ""
            if not isinstance(target._modules[CHILD], VisualTunerLayer):
                del target._modules[CHILD]  # the place that was held
        # weights of a file may decide about targets, and not the config; then they were not planned for
        placements = self._placements.get(current_key) or [peft_config.placement_at(current_key, unwrapped(target))]
        tower = self._tower_of.get(current_key, "vision")
        backbone = self._backbones.get(tower)
        kind = layer_for(placements[0].site)
        there = target._modules.get(CHILD) if kind.stands_in else target
        new = not isinstance(there, kind)
        if isinstance(there, kind):
            layer: VisualTunerLayer = there
        else:
            make = next((p.site.own_layer for p in placements if p.site.own_layer is not None), kind)
            layer = make.create(target, current_key, self.model, backbone, self._exchanges[tower])
        layer.where = current_key
        for placement in placements:
            equation = placement.build(kind.made_from(layer.get_base_layer())) if placement.build else None
            if equation is not None and not layer.training:
                equation.eval()  # in the mode of the model, also where it joins other adapters
            layer.add_equation(
                adapter_name,
                self.prefix,
                placement.slot,
                placement.site,
                equation,
                peft_config.init_weights,
                placement.shared,
            )
            placement.site.connect(layer, self.model, backbone)
        if new:
            self._put_layer(layer, parent, target_name, target)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, requires_grad=False)

    def _put_layer(self, layer: VisualTunerLayer, parent: nn.Module, name: str, target: nn.Module) -> None:
        """Put a layer into a block, or around a module, under all names that the module has."""
        if layer.stands_in:
            layer.attach()
            return
        for holder, child in self._holders.get(id(target), [(parent, name)]):
            self._replace_module(holder, child, layer, target)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As peft's, for the adapters of this method, in a time that does not grow with their number."""
        switch(self.model, adapter_name, inference_mode, self.prefix, self.peft_config)
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """As peft's; an adapter of another method with that name stays."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        _check_adapters_not_merged(self.model, adapter_name)
        del self.peft_config[adapter_name]
        for layer in self._own_layers():
            if layer.exchange.losses is not None:
                layer.exchange.losses.configs.pop(f"{self.prefix}{adapter_name}", None)
            layer.delete_adapter(adapter_name, self.prefix)
        active = next((list(layer.active_adapters) for layer in self._own_layers()), [])
        active = [name for name in active if name in self.peft_config]
        for wrapper in self._own_wrappers([adapter_name]):
            wrapper.delete_adapter(adapter_name, new_active_adapters=active)
        self.active_adapter = active

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        """As peft's; those of other methods stay as they are."""
        for layer in self._own_layers():
            layer.mute(self.prefix, not enabled)
        for wrapper in self._own_wrappers(wrapper_names := list(self.peft_config)):
            if set(wrapper.active_adapters) <= set(wrapper_names):
                wrapper.enable_adapters(enabled)

    def unload(self) -> nn.Module:
        """As `MergingTuner.unload`, without names of labels that the adapter brought."""
        forget(self.model)
        return super().unload()

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: VisualPeftConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The weights of an adapter to be saved; its class names are recorded at this moment."""
        record(model, adapter_name)
        weights = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        # adapters of other methods may have the same name
        return {key: value for key, value in weights.items() if f".{cls.prefix}" in key}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # <module>.<prefix><slot>.<adapter>.<parameter, possibly nested>
        head, found, tail = key.rpartition(f".{cls.prefix}")
        slot, _, rest = tail.partition(".")
        if not found or not rest.startswith(f"{adapter_name}."):
            return super()._remove_adapter_name_from_key(key, adapter_name)
        return f"{head}.{cls.prefix}{slot}.{rest.removeprefix(f'{adapter_name}.')}"

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: VisualPeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Rename the weights of a file to their names in the model.

        Raises:
            ValueError: the weights are not those of this model's adapter layers.
        """
        own = {
            key: value
            for key, value in model.state_dict().items()
            if f".{cls.prefix}" in key and f".{adapter_name}." in key.rpartition(f".{cls.prefix}")[2]
        }
        saved_as = {cls._remove_adapter_name_from_key(key, adapter_name) for key in own}
        copied = {key for keys in copies_of(model, adapter_name).values() for key in keys.values()}
        state_dict = without_layers(state_dict, copied)
        state_dict = to_present_keys(model, state_dict, saved_as | copied, cls.prefix)
        state_dict = across_heads(model, state_dict, saved_as | copied)
        state_dict, wrong_copies = with_copies(model, config, adapter_name, state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # A file's tensors may have any alignment in memory, and sums round differently depending on it. Copies of the
        # weights give the same outputs as when they were saved, also if loading would only refer to them.
        remapped = {key: value.clone() for key, value in remapped.items()}
        remapped = with_all_names(remapped, model)
        wrong = [f"{key} is missing" for key in own if key not in remapped]
        wrong += [f"{key} is not expected" for key in remapped if f".{cls.prefix}" in key and key not in own]
        wrong += [
            f"{key} has shape {tuple(remapped[key].shape)} in the file and {tuple(value.shape)} in the model"
            for key, value in own.items()
            if key in remapped and remapped[key].shape != value.shape
        ]
        wrong += wrong_copies
        whole: Any = model
        base = whole.get_base_model() if isinstance(model, PeftModel) else model
        tuner = whole.base_model if isinstance(model, PeftModel) else None
        before = tuner._before.pop(adapter_name, None) if isinstance(tuner, VisualTuner) else None
        if wrong:
            if before is not None:  # the adapter was put in for this file
                before.restore()
                for configs in (whole.peft_config, getattr(base, "peft_config", {})):
                    configs.pop(adapter_name, None)
            trained_on = config.base_model_name_or_path or "a model whose name was not recorded"
            raise ValueError(
                f"The adapter was trained on {trained_on} and does not fit this {type(base).__name__}: {wrong[0]}"
                + (f" (and {len(wrong) - 1} more)." if len(wrong) > 1 else ".")
                + " Load it into a model of the class and size that it was trained in."
            )
        return remapped
