"""Plans where an adapter acts, before the model is changed."""

from __future__ import annotations

import warnings
from dataclasses import replace

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..backbones.architectures import TOWERS, Tower
from ..backbones.backbone import VisionBackbone, own_children, unwrapped
from ..backbones.finding import find_backbone
from ..backbones.found import require_plain
from ..backbones.frozen_norms import NormStatistics
from ..backbones.key_renames import to_present_names
from ..backbones.paths import within
from ..backbones.task_heads import announce
from ..sites import Exchange, Placement, VisualTunerLayer, layer_for
from ..sites.block_sites import reaches_into
from .config import VisualPeftConfig
from .copies import find_copied, replace_lost_heads
from .merging import MergingTuner
from .parts import unknown_fields_of
from .placing import check_layers, is_excluded, placements_of
from .shapes import shapes_only
from .shared_modules import holders_of, names_of_modules
from .targets import TargetedConfig, find_targets


class PlanningTuner(MergingTuner):
    """The part of `VisualTuner` that finds the place of each equation, and refuses what does not fit.

    Everything is checked here, and equations are built on the meta device, so that an error leaves the model as it is.
    """

    _exchange: Exchange  # of the layers in the vision backbone
    _exchanges: dict[Tower, Exchange]
    _crossing: bool  # whether gradients cross the backbone, although the method needs none there
    _holders: dict[int, list[tuple[nn.Module, str]]]

    def _forget_plan(self) -> None:
        self._placements: dict[str, list[Placement]] = {}
        self._excluded: set[str] = set()
        self._holders = {}
        self._names: dict[str, list[str]] = {}
        self._copied: list[str] = []  # by modules_to_save
        self._left_out: list[str] = []  # of these, the ones in which the method would act
        self._crossing = False
        self._backbones: dict[Tower, VisionBackbone] = {}
        self._tower_of: dict[str, Tower] = {}  # of each module that a method by role acts on
        layers = [module for module in self.model.modules() if isinstance(module, VisualTunerLayer)]
        there = {layer.exchange.tower: layer.exchange for layer in reversed(layers)}
        shared = next((exchange.shared for exchange in there.values()), {})  # one for all: their names differ
        self._exchanges = {tower: there.get(tower) or Exchange(tower=tower, shared=shared) for tower in TOWERS}
        self._exchange = self._exchanges["vision"]

    @property
    def _backbone(self) -> VisionBackbone | None:
        """The vision backbone, if the method acts there by role."""
        return self._backbones.get("vision")

    def _plan(self, model: nn.Module, config: VisualPeftConfig) -> None:
        if unknown := unknown_fields_of(config):
            raise ValueError(
                f"The configuration has fields that {type(config).__name__} does not know: "
                f"{', '.join(unknown)}. Install the version of hf_visual_peft that wrote it, or remove "
                "the fields if they are a mistake."
            )
        self._forget_plan()
        if isinstance(model, PeftModel):
            raise ValueError(
                f"{type(config).__name__}: the model is a {type(model).__name__} already, so the adapter would be "
                "saved with names that fit no other model. Add it to that one: model.add_adapter('second', config). "
                "Or call get_peft_model on model.get_base_model()."
            )
        self._holders, self._names = holders_of(model), names_of_modules(model)
        for field in ("exclude_modules", "modules_to_save", "target_modules"):
            if getattr(config, field) is not None:
                setattr(config, field, to_present_names(model, getattr(config, field)))
        if isinstance(config, TargetedConfig) and config.target_modules is not None:
            self._copied = find_copied(model, config)
            targets = find_targets(model, config)
            trained = 0
            for path, module in targets.items():
                if len(self.peft_config) == 1:
                    require_plain(model, path)
                if within(path, self._copied):
                    self._excluded.add(path)
                else:
                    trained += self._place(model, config.placement_at(path, module))
            self._check_trained(trained, config, type(model).__name__)
            return
        if config.backbone:
            config.backbone = next(iter(to_present_names(model, [config.backbone]) or ()))
        backbones = {tower: find_backbone(model, config.backbone, tower=tower) for tower in config.towers}
        for backbone in backbones.values():
            if len(self.peft_config) == 1:  # later adapters go where the first one is
                require_plain(model, backbone.path)
            self._check_one_backbone(model, config, backbone)
            check_layers(config, backbone)
        first = next(iter(backbones.values()))
        replace_lost_heads(model, config, first.heads)
        note = ""
        if config.modules_to_save is None:
            note = first.head_note
            if first.heads and not config.copied_head:
                config.modules_to_save = config.filled_heads = list(first.heads)  # type: ignore[misc]
        self._copied = find_copied(model, config, first.heads)
        for backbone in backbones.values():
            self._plan_backbone(model, config, backbone)
        announce(note)
        self._backbones = backbones
        self._tell_of_copies(config, first)

    def _plan_backbone(self, model: nn.Module, config: VisualPeftConfig, backbone: VisionBackbone) -> None:
        """Plan the equations in one backbone.

        Raises:
            ValueError: the method does not fit it, or nothing there would train.
        """
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
                f"({backbone.path!r}), and methods by role act in its blocks only. For other parts of the model "
                "name target_modules, in methods that take them."
            )
        trained = 0
        for placement in placements_of(config, selected, backbone):
            self._check_beside_copies(placement, config, backbone)
            passage = placement.site.passes_on and placement.build is None
            if passage and placement.path in self._excluded:  # keep only what passes through it
                self._excluded.remove(placement.path)
                children = own_children(model.get_submodule(placement.path))
                self._excluded.update(f"{placement.path}.{name}" for name, _ in children)
            if copied := within(placement.path, self._copied):
                self._excluded.add(placement.path)
                self._left_out.append(copied)
            elif not passage and is_excluded(config, placement.path):
                self._excluded.add(placement.path)
            else:
                self._tower_of[placement.path] = backbone.tower
                trained += self._place(model, placement)
        self._check_trained(trained, config, backbone.class_name)

    def _check_one_backbone(self, model: nn.Module, config: VisualPeftConfig, backbone: VisionBackbone) -> None:
        """Refuse an adapter on another backbone than the adapters that the model has: they tell each other its grid.

        Raises:
            ValueError: there is one.
        """
        for name, other in self.peft_config.items():
            by_role = isinstance(other, VisualPeftConfig) and other.target_modules is None and other is not config
            if not by_role or other.backbone == config.backbone or backbone.tower not in other.towers:
                continue
            path = find_backbone(model, other.backbone, tower=backbone.tower).path
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
                    refuse_together(config, part, path)

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
        """Refuse a module that an adapter of another kind replaces or contains.

        Layers on single modules go around those of other methods; adapters in a block let all others stand there.

        Raises:
            ValueError: an existing adapter, or another equation of this one, prevents the method from acting there.
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


def refuse_together(config: VisualPeftConfig, path: str, block: str) -> None:
    """Refuse a copy of a module in a block where an adapter changes how the block works.

    Args:
        config: of the method.
        path: of the copied module.
        block: name of the block.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"{type(config).__name__} and a trained copy of {path!r} (modules_to_save) do not go together: an adapter "
        "changes how the block works there. Name other modules in modules_to_save, or the whole block, or leave the "
        f"block to one of them by exclude_modules=[{block!r}]."
    )
