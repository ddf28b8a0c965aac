"""peft's interface of a tuner, implemented once for all methods."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, _check_adapters_not_merged, _ExcludedModule
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..backbones.backbone import VisionBackbone, own_children, unwrapped
from ..backbones.finding import find_backbone
from ..backbones.frozen_norms import (
    NormStatistics,
    freeze_norms,
    keeps_statistics,
    move_statistics,
    norms_with_statistics,
)
from ..backbones.key_renames import to_present_keys, to_present_names
from ..backbones.paths import within
from ..backbones.task_heads import announce
from ..sites import BlockAdapters, Exchange, Placement, VisualTunerLayer, layer_for, layers_of
from ..sites.block_sites import reaches_into
from ..sites.layer import CHILD
from ..sites.mixed import BASE, check_samples_first, count_rows, instead_of_forward, run_parts
from .auxiliary import AuxiliaryLosses
from .calibration import Calibration
from .config import VisualPeftConfig
from .copies import activate_copies, copy_modules, find_copied, replace_lost_heads
from .labels import check_mixed, fitted, forget, record
from .loading import across_heads, copies_of, with_copies, without_layers
from .merging import MergingTuner
from .parts import unknown_fields_of
from .placing import check_layers, is_excluded, placements_of
from .registry import tuner_base
from .shapes import shapes_only
from .shared_modules import holders_of, names_of_modules, share_copies, with_all_names
from .switching import concerned, switch
from .targets import TargetedConfig, find_targets, names_target
from .undoing import Structure


@tuner_base
class VisualTuner(MergingTuner):
    """Base of the tuners; the registry makes one for each method.

    A method gives the places of its equations (`VisualPeftConfig.placements`); this class finds the backbone, checks
    everything before the model is changed, and puts the layers in.
    """

    tuner_layer_cls = VisualTunerLayer
    target_module_mapping: dict[str, list[str]] = {}
    _exchange: Exchange
    _crossing: bool
    _holders: dict[int, list[tuple[nn.Module, str]]]
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
        before = Structure(model, self._exchange, *filter(None, [getattr(model, "config", None)]))
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
        self._exchange.unwatch_heads()
        if self._crossing:
            self._exchange.crossing.add(f"{self.prefix}{adapter_name}")
        with self._looking_away(model):  # copies shall not have the hooks
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
            self._exchange.watch_frames(model, self._backbone, config.frames_meet_before_norms)
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
        self._watch_heads(model)
        if config.has_auxiliary_loss:
            losses = self._exchange.losses = self._exchange.losses or AuxiliaryLosses(self._exchange)
            losses.watch(model)
            losses.configs[f"{self.prefix}{adapter_name}"] = (adapter_name, config)
        if config.init_weights and self._backbone is not None:
            config.initialise(self._opened(model, adapter_name))

    @contextmanager
    def _looking_away(self, model: nn.Module) -> Iterator[None]:
        """Remove the hooks of adapters at copied modules inside the context."""
        exchange = self._exchange
        watching = self._copied and (exchange.handles or exchange.pixel_handles or exchange.image_handles)
        layers = [m for m in model.modules() if isinstance(m, BlockAdapters) and m.holds(self._copied)]
        with ExitStack() as stack:
            if watching:
                stack.enter_context(exchange.looking_away(model, self._backbone or find_backbone(model)))
            for layer in layers:
                stack.enter_context(layer.looking_away())
            yield

    def _check_layers_around(self, model: nn.Module, config: VisualPeftConfig) -> None:
        """Refuse copies of modules that a layer of any adapter changes by more than hooks.

        Raises:
            ValueError: there is one.
        """
        for layer in [m for m in model.modules() if isinstance(m, BlockAdapters) and m.holds(self._copied)]:
            for path in self._copied:
                if layer.holds([path]) and layer.reaches_into(path):
                    _refuse_together(config, path, layer.path)

    def _watch_heads(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, VisualTunerLayer)]
        sites = [planned.site for layer in layers for plan in layer.plans.values() for planned in plan]
        uses = [site.heads for site in sites if site.heads is not None]
        self._exchange.watch_heads(model, list(dict.fromkeys(path for use in uses for path, _ in use.outputs)))

    def _opened(self, model: nn.Module, adapter_name: str) -> Calibration:
        """An adapter for its method to inspect, without data."""
        assert self._backbone is not None
        layers = {
            path: layer for path, layer in layers_of(model).items() if self.prefix in layer.methods_of(adapter_name)
        }
        return Calibration(model, self._backbone, adapter_name, layers, None, dataloader=(), progress=False)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As in peft, which casts only parameters; running statistics must have the dtype of their parameters."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        layers = [module for module in self.model.modules() if isinstance(module, VisualTunerLayer)]
        equations = [e.module for layer in layers for e in layer.equations_of(adapter_name) if e.module is not None]
        for norm in [module for equation in equations for module in equation.modules() if keeps_statistics(module)]:
            for name, buffer in norm.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(norm, name, buffer.to(next(norm.parameters(), buffer).dtype))

    def _forget_plan(self) -> None:
        self._placements: dict[str, list[Placement]] = {}
        self._excluded: set[str] = set()
        self._holders = {}
        self._names: dict[str, list[str]] = {}
        self._copied: list[str] = []  # by modules_to_save
        self._left_out: list[str] = []  # of these, the ones in which the method would act
        self._crossing = False
        self._backbone: VisionBackbone | None = None
        layers = (module for module in self.model.modules() if isinstance(module, VisualTunerLayer))
        self._exchange = next((layer.exchange for layer in layers), None) or Exchange()

    def _plan(self, model: nn.Module, config: VisualPeftConfig) -> None:
        if unknown := unknown_fields_of(config):
            raise ValueError(
                f"The configuration has fields that {type(config).__name__} does not know: "
                f"{', '.join(unknown)}. Install the version of hf_visual_peft that wrote it, or remove "
                "the fields if they are a mistake."
            )
        self._forget_plan()
        self._holders, self._names = holders_of(model), names_of_modules(model)
        for field in ("exclude_modules", "modules_to_save", "target_modules"):
            if getattr(config, field) is not None:
                setattr(config, field, to_present_names(model, getattr(config, field)))
        if isinstance(config, TargetedConfig) and config.target_modules is not None:
            self._copied = find_copied(model, config)
            targets = find_targets(model, config)
            trained = 0
            for path, module in targets.items():
                if within(path, self._copied):
                    self._excluded.add(path)
                else:
                    trained += self._place(model, config.placement_at(path, module))
            self._check_trained(trained, config, type(model).__name__)
            return
        if config.backbone:
            config.backbone = next(iter(to_present_names(model, [config.backbone]) or ()))
        backbone = find_backbone(model, config.backbone)
        self._check_one_backbone(model, config, backbone)
        check_layers(config, backbone)
        replace_lost_heads(model, config, backbone.heads)
        note = ""
        if config.modules_to_save is None:
            note = backbone.head_note
            if backbone.heads and not config.copied_head:
                config.modules_to_save = config.filled_heads = list(backbone.heads)  # type: ignore[misc]
        self._copied = find_copied(model, config, backbone.heads)
        selected = self._without_excluded(backbone.select(config.layers), config)
        if not backbone.blocks:
            raise ValueError(
                f"{type(config).__name__}: {type(model).__name__} reads none of the {backbone.unread} blocks of "
                f"{backbone.class_name} ({backbone.path!r}), so that nothing there would train. Its config chooses "
                "what it reads, for example in vision_feature_layer or out_features."
            )
        if not selected.blocks:
            fields = f"exclude_modules is {config.exclude_modules!r}"
            fields += f", modules_to_save {config.modules_to_save!r}" if self._left_out else ""
            raise ValueError(
                f"{type(config).__name__}.{fields}: no block is left to adapt in {backbone.class_name} "
                f"({backbone.path!r}), and methods by role act on vision backbones only. For other parts of the model "
                "name target_modules, in methods that take them."
            )
        trained = 0
        for placement in placements_of(config, selected, backbone):
            self._check_beside_copies(placement, config, backbone)
            passage = placement.site.passes_on and placement.build is None
            if passage and placement.path in self._excluded:  # all but the way through it
                self._excluded.remove(placement.path)
                children = own_children(model.get_submodule(placement.path))
                self._excluded.update(f"{placement.path}.{name}" for name, _ in children)
            if copied := within(placement.path, self._copied):
                self._excluded.add(placement.path)
                self._left_out.append(copied)
            elif not passage and is_excluded(config, placement.path):
                self._excluded.add(placement.path)
            else:
                trained += self._place(model, placement)
        self._check_trained(trained, config, backbone.class_name)
        announce(note)
        self._backbone = backbone
        self._tell_of_copies(config, backbone)

    def _check_one_backbone(self, model: nn.Module, config: VisualPeftConfig, backbone: VisionBackbone) -> None:
        """Refuse an adapter on another backbone than the adapters that the model has: they tell each other its grid.

        Raises:
            ValueError: there is one.
        """
        for name, other in self.peft_config.items():
            by_role = isinstance(other, VisualPeftConfig) and other.target_modules is None and other is not config
            if not by_role or other.backbone == config.backbone:
                continue
            path = find_backbone(model, other.backbone).path
            if path != backbone.path:
                raise ValueError(
                    f"{type(config).__name__}.backbone: the adapter {name!r} acts on {path!r}, and this one would act "
                    f"on {backbone.path!r}. All adapters of one model act on the same backbone: use one model for "
                    "each, or, in methods that take them, name target_modules."
                )

    def _check_beside_copies(self, placement: Placement, config: VisualPeftConfig, backbone: VisionBackbone) -> None:
        """Refuse copies of modules that the method needs unchanged, or trains as a whole itself.

        Raises:
            ValueError: there is one.
        """
        path = placement.path
        if why := placement.site.why_not_beside(path, self._copied):
            raise ValueError(f"{type(config).__name__}.modules_to_save is {config.modules_to_save!r}: {why}")
        for block in [block for block in backbone.blocks if block.path == path]:
            for part in [p for p in self._copied if p.startswith(f"{path}.")]:
                if reaches_into([placement.site], block, backbone.architecture.prompts, part):
                    _refuse_together(config, part, path)

    def _tell_of_copies(self, config: VisualPeftConfig, backbone: VisionBackbone) -> None:
        """Warn how copies of modules affect the method."""
        sites = [placement.site for placements in self._placements.values() for placement in placements]
        ahead = (*backbone.patch_embedding, *backbone.embeddings, *backbone.input_norms, *backbone.between)
        ahead += tuple(block.path for block in backbone.blocks)
        frozen = any(site.frozen for site in sites)
        inside = [p for p in self._copied if within(p, ahead) or any(within(path, [p]) for path in ahead)]
        self._crossing = frozen and bool(inside)
        if config.inference_mode:
            return
        name = type(config).__name__
        if self._left_out:
            paths = [path for path in self._copied if path in self._left_out]
            them = "it" if len(paths) == 1 else "them"
            warnings.warn(
                f"{name} leaves out {', '.join(paths)}: modules_to_save trains {them} as a whole.", stacklevel=2
            )
        if self._crossing:
            warnings.warn(
                f"{name}: gradients cross the backbone, because modules_to_save trains {', '.join(inside)} in it. "
                "That takes memory that the method saves otherwise.",
                stacklevel=2,
            )

    def _place(self, model: nn.Module, placement: Placement) -> int:
        """Plan an equation that fits its free module, and return the number of its trained parameters.

        Raises:
            ValueError: it does not fit, or its block is several of a list.
        """
        kind = layer_for(placement.site)
        if kind.stands_in:
            holders = self._holders.get(id(model.get_submodule(placement.path)), [])
            if len({id(holder) for holder, _ in holders}) < len(holders):
                raise ValueError(
                    f"{', '.join(self._names[placement.path])} are one module, and the method acts on each block by "
                    "itself. Methods on single modules, as SSFConfig and LoraConfig, work there."
                )
        kind.require_room(model.get_submodule(placement.path))
        self._check_free(model, placement.path, kind)
        built = []
        if placement.build is not None:  # a module that does not fit must be an error now, before any change
            with shapes_only():
                built.append(placement.build(kind.made_from(unwrapped(model.get_submodule(placement.path)))))
                if placement.shared is not None:
                    built.append(placement.shared.build())
        self._placements.setdefault(placement.path, []).append(placement)
        return sum(parameter.numel() for equation in built for parameter in equation.parameters())

    def _check_trained(self, trained: int, config: VisualPeftConfig, class_name: str) -> None:
        if trained == 0 and self._placements and type(config).choose is VisualPeftConfig.choose:
            raise ValueError(
                f"{type(config).__name__}: nothing of {class_name} would train, as its modules have no such "
                "parameters."
            )

    def _without_excluded(self, backbone: VisionBackbone, config: VisualPeftConfig) -> VisionBackbone:
        paths = {b.index: b.path for b in backbone.blocks} if config.chooses_blocks else {}
        copied = {index: within(path, self._copied) for index, path in paths.items()}
        excluded = {b.index for b in backbone.blocks if is_excluded(config, b.path)}
        self._left_out += [path for index, path in copied.items() if path and index not in excluded]
        excluded |= {index for index, path in copied.items() if path}
        if not excluded:
            return backbone
        self._excluded.update(block.path for block in backbone.blocks if block.index in excluded)
        kept = tuple(block for block in backbone.blocks if block.index not in excluded)
        return replace(backbone, blocks=kept)

    def _check_free(self, model: nn.Module, path: str, kind: type[VisualTunerLayer]) -> None:
        """Refuse what an adapter of another kind replaces, or what lies in it.

        Layers on single modules go around those of other methods; adapters in a block let all others stand there.

        Raises:
            ValueError: an adapter that is there already, or another of this one, does not let the method act there.
        """
        parts = path.split(".")
        planned = {layer_for(other.site) for other in self._placements.get(path, ())}
        if planned - {kind}:
            raise ValueError(
                f"{type(self).__name__} puts equations on the weights or the output of {path!r} and others into it as "
                "a block: one module can have one of these kinds."
            )
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            module = model.get_submodule(name)
            around = end < len(parts)
            taken = (module if isinstance(module, BaseTunerLayer) else None) if around else kind.in_the_way(module)
            if taken is not None:
                raise ValueError(
                    f"{type(self).__name__} cannot act on {path!r}: {name!r} already belongs to another adapter "
                    f"({type(taken).__name__}), which works on it in another way. Use one model for each."
                )
            if isinstance(module, ModulesToSaveWrapper) and not isinstance(module, NormStatistics):
                raise ValueError(
                    f"{type(self).__name__} cannot act on {path!r}: another adapter trains a copy of {name!r} "
                    f"(modules_to_save). Use one model for each, or leave it out by exclude_modules=[{name!r}]."
                )

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
        kind = layer_for(placements[0].site)
        there = target._modules.get(CHILD) if kind.stands_in else target
        new = not isinstance(there, kind)
        if isinstance(there, kind):
            layer: VisualTunerLayer = there
        else:
            make = next((p.site.own_layer for p in placements if p.site.own_layer is not None), kind)
            layer = make.create(target, current_key, self.model, self._backbone, self._exchange)
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
            placement.site.connect(layer, self.model, self._backbone)
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

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Send each sample of the batch through its adapter in `adapter_names`.

        Raises:
            TypeError: `adapter_names` is not a list of names.
            ValueError: it does not fit the model or the batch, or the model cannot mix adapters.
        """
        self._before = {}  # who uses an adapter keeps it
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_mixed(names, args, kwargs)
        wrappers = [module for module in concerned(self.model, names) if isinstance(module, ModulesToSaveWrapper)]
        with ExitStack() as stack:
            stack.enter_context(self._exchange.mixing(names))
            for wrapper in wrappers:
                stack.enter_context(instead_of_forward(wrapper, partial(self._run_copies, wrapper)))
            yield

    def _check_mixed(self, names: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted(set(names) - {BASE} - set(self.peft_config))
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        check_mixed(self.model, names)
        given = (kwargs[key] for key in ("pixel_values", *kwargs) if key in kwargs)
        samples = next((value for value in (*args[:1], *given) if isinstance(value, Tensor)), None)
        if samples is None:
            raise ValueError("adapter_names: no tensor among the model's arguments tells the number of inputs.")
        _check_length(names, len(samples))
        layers = [module for module in concerned(self.model, names) if isinstance(module, VisualTunerLayer)]
        if any(layer.merged for layer in layers):
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if self._exchange.frame_handles:
            raise ValueError("adapter_names: methods for videos cannot mix adapters in a batch. Use set_adapter.")
        config = getattr(self.model, "config", None)
        attentions = kwargs.get("output_attentions")
        if attentions is None:
            attentions = getattr(config, "output_attentions", False)
        in_parts = any(not layer.mixes_by_itself and any(layer.get_base_layer().children()) for layer in layers)
        if attentions and in_parts:
            raise ValueError(
                "output_attentions: a batch that mixes adapters goes through the blocks in parts, whose attentions "
                "are not put together. Leave it False, or use set_adapter and one batch for each adapter."
            )

    def _run_copies(self, wrapper: ModulesToSaveWrapper, *args: Any, **kwargs: Any) -> Any:
        """The forward of a module with copies of adapters, in a mixed batch.

        peft's own code for mixed batches supports only linears and convolutions, and one tensor.
        """
        mixed, original = self._exchange.mixed, wrapper.original_module
        assert mixed is not None
        check_samples_first(original, *args[:1])
        count = count_rows(original, args)
        if len(mixed.names) > 1:  # else it is a part of the batch, for one adapter
            _check_length(mixed.names, count)
        parts: dict[str, list[int]] = {}
        for row, name in enumerate(mixed.of_rows(count, original)):
            parts.setdefault(name if name in wrapper.modules_to_save else BASE, []).append(row)

        def run(name: str, index: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (original if name == BASE else wrapper.modules_to_save[name])(*args, **kwargs)

        return run_parts(original, parts, run, args, kwargs)

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


def _refuse_together(config: VisualPeftConfig, path: str, block: str) -> None:
    raise ValueError(
        f"{type(config).__name__} and a trained copy of {path!r} (modules_to_save) do not go together: an adapter "
        "changes how the block works there. Name other modules in modules_to_save, or the whole block, or leave the "
        f"block to one of them by exclude_modules=[{block!r}]."
    )


def _check_length(names: Sequence[str], inputs: int) -> None:
    if len(names) != inputs:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {inputs} respectively."
        )
