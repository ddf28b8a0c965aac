"""peft's own methods on vision backbones: by name, with their targets found in the model itself.

`defaults.py` tells peft the targets by model type, which is all peft asks for. `with_visual_targets` looks at the
model: it works for models without a config, as timm's, and inside larger ones, and finds the task head, too.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils.other import _get_module_names_tied_with_embedding
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..backbones.backbone import LINEAR_ROLES, Block, VisionBackbone, unwrapped
from ..backbones.finding import find_backbone
from ..backbones.frozen_norms import keeps_statistics
from ..backbones.task_heads import announce
from ..core.config import VisualPeftConfig
from ..core.labels import name_classes
from ..core.registry import Method, get_method, list_methods
from ..training.defaults import Training
from .defaults import CONVOLUTIONAL_METHODS, METHODS, attention_or_mlp


ConfigT = TypeVar("ConfigT", bound=PeftConfig)

# AdaLoRA needs the number of training steps and a call after each, Poly the task of every sample
_NEED_MORE = ("ADALORA", "POLY")
_NOT_MERGEABLE = ("LILY",)
_LOW_RANK = Training(1e-3)
_TRAINING = {"ln_tuning": Training(1e-2), "ia3": Training(1e-2)}  # few numbers, which have to move far


@dataclass(frozen=True)
class PeftMethod:
    """A method of peft's that needs nothing of a training loop.

    Attributes:
        name: lower-case name used on command lines: that of its `peft_type`, or of a variant.
        peft_type: as it stands in `adapter_config.json`.
        chosen: the config's fields that make it the variant.
    """

    name: str
    peft_type: str
    chosen: Mapping[str, Any] = field(default_factory=dict)

    video: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    whole_modules: ClassVar[bool] = False

    @property
    def config_cls(self) -> type[PeftConfig]:
        """Its config."""
        return PEFT_TYPE_TO_CONFIG_MAPPING[self.peft_type]

    @property
    def prefix(self) -> str:
        """What the names of its parameters start with."""
        return PEFT_TYPE_TO_PREFIX_MAPPING[self.peft_type]

    @property
    def convolutional(self) -> bool:
        """Whether it can act on `nn.Conv2d`, too."""
        return self.peft_type in CONVOLUTIONAL_METHODS

    @property
    def mergeable(self) -> bool:
        """Whether it folds into the weights of the backbone."""
        return self.peft_type not in _NOT_MERGEABLE

    @property
    def training(self) -> Training:
        """Settings for AdamW that suit it."""
        return _TRAINING.get(self.name, _LOW_RANK)

    @property
    def acts_on(self) -> str:
        """Where, in a few words."""
        usual = "query and value, else fc1 and fc2"
        blocks = f"{usual}, else convolutions" if self.convolutional else usual
        return {
            "BEFT": "value",
            "IA3": "key, value and fc2",
            "LN_TUNING": "all norms but batch norms",
            "OSF": "all linears of the blocks",
        }.get(self.peft_type, blocks)

    def config(self, model: nn.Module, **chosen: Any) -> PeftConfig:
        """Its config for a model, whose batch norms need `freeze_norms` besides.

        Args:
            model: whose backbone and task head it is for.
            chosen: fields other than the defaults.
        """
        return with_visual_targets(self.config_cls(**{**self.chosen, **chosen}), model)


_BY_TYPE = [PeftMethod(name.lower(), name) for name in METHODS if name not in _NEED_MORE]
PEFT_METHODS: Mapping[str, PeftMethod] = MappingProxyType(
    {
        method.name: method
        for method in sorted([*_BY_TYPE, PeftMethod("dora", "LORA", {"use_dora": True})], key=lambda m: m.name)
    }
)


def any_method(name: str) -> Method | PeftMethod:
    """The method of that name, of this library or of peft.

    Raises:
        ValueError: no such method; the message lists those there are.
    """
    found = PEFT_METHODS.get(name.lower())
    if found is not None:
        return found
    if name.lower() in list_methods():
        return get_method(name)
    raise ValueError(
        f"Unknown method {name!r}: choose one of {', '.join(list_methods())}, or of peft's {', '.join(PEFT_METHODS)}."
    )


def with_visual_targets(config: ConfigT, model: nn.Module, backbone: str | None = None) -> ConfigT:
    """A config of peft's with the modules of this model in the fields that are None.

        model = get_peft_model(vit, with_visual_targets(LoraConfig(), vit))

    `target_modules` gets what the method acts on by the roles in the backbone, see `peft_defaults`; `modules_to_save`
    the task head, and `auto_mapping` the names of its classes, see `labels`. What a field says stays.
    `layers_to_transform` counts the blocks of the whole backbone from 0. Batch norms of the backbone need
    `freeze_norms` besides.

    Args:
        config: of a method for linears or norms; one of this library's, which need nothing, is returned as it is, or
            with the backbone in its field.
        model: that the config is for.
        backbone: path of the backbone to adapt, in a model that holds several.

    Returns:
        A copy.

    Raises:
        ValueError: the method is none for linears or norms, or has nothing to act on in this backbone; or peft refuses
            the model, whatever the config.
        BackboneError: the model holds no backbone that a role table describes.
    """
    if isinstance(config, VisualPeftConfig):
        chosen = config if backbone is None else copy.copy(config)
        chosen.backbone = chosen.backbone if backbone is None else backbone
        return chosen
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if method not in METHODS:
        known = ", ".join(sorted({PEFT_METHODS[name].config_cls.__name__ for name in PEFT_METHODS}))
        raise ValueError(f"{type(config).__name__} acts on no modules of vision backbones: choose one of {known}.")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    _check_tied(base)
    found = find_backbone(base, backbone)
    filled: Any = copy.deepcopy(config)
    if filled.modules_to_save is None:
        announce(found.head_note)
        filled.modules_to_save = list(found.heads) or None
    if filled.target_modules is None and getattr(filled, "target_parameters", None) is None:
        part = found.select(_layers(filled, found))
        paths = _TARGETS.get(method, _linears)(base, part, method in CONVOLUTIONAL_METHODS)
        if not paths:
            raise ValueError(
                f"{type(config).__name__} has nothing to act on in {found.class_name}: "
                f"{_REASONS.get(method, _NO_LINEARS)}. Name modules in target_modules, or choose another method."
            )
        # peft may shorten a set of names, and then refuses the file of IA3, whose two fields no longer agree
        whole = method != "IA3" and not _is_end(base, paths)
        filled.target_modules = set(paths) if whole else _pattern(paths)
        for name in ("layers_to_transform", "layers_pattern"):  # full names are those of the chosen blocks
            if hasattr(filled, name):
                setattr(filled, name, None)
    if method == "IA3" and filled.feedforward_modules is None:
        filled.feedforward_modules = _pattern(_of_roles(base, found.blocks, found.architecture.fc2))
    name_classes(filled, base)
    return filled


def _check_tied(model: nn.Module) -> None:
    """Refuse a model in which peft looks for weights that are tied to its input embeddings, and finds no embeddings.

    Raises:
        ValueError: it is one, with the way round.
    """
    try:
        _get_module_names_tied_with_embedding(model)
    except NotImplementedError as error:
        raise ValueError(
            f"peft's own methods refuse {type(model).__name__}: weights of its heads are tied, and it does not tell "
            "its input embeddings (get_input_embeddings), which peft asks for. Set model.config.tie_word_embeddings = "
            "False before with_visual_targets, get_peft_model, add_adapter and PeftModel.from_pretrained, and to True "
            "again afterwards: peft then does not ask, and the heads stay tied. Methods of this library need nothing."
        ) from error


_NO_LINEARS = "its blocks have no linears that the method supports"
_REASONS = {
    "BEFT": "it has no linear for values",
    "IA3": "it has no keys, no values and no MLP",
    "LN_TUNING": "it has no norms but batch norms",
}


def _layers(config: Any, backbone: VisionBackbone) -> list[int] | None:
    given = getattr(config, "layers_to_transform", None)
    if given is None or given == []:
        return None
    layers = [given] if isinstance(given, int) else list(given)
    if not all(0 <= layer < backbone.depth for layer in layers):
        raise ValueError(
            f"{type(config).__name__}.layers_to_transform is {given!r}: {backbone.class_name} has the blocks 0 to "
            f"{backbone.depth - 1}."
        )
    return layers


def _linears(model: nn.Module, backbone: VisionBackbone, convolutional: bool) -> list[str]:
    """Query and value, else the MLP, else dense convolutions: the first of which the method supports some."""
    for names in attention_or_mlp(backbone.architecture):
        found = _of_roles(model, backbone.blocks, names, convolutional)
        if found:
            return found
    operations = (path for block in backbone.blocks for path in block.roles["operations"])
    return [
        path
        for path in operations
        if convolutional
        and _is_dense(unwrapped(model.get_submodule(path)))
        and not _is_read(model.get_submodule(path.rpartition(".")[0]))
    ]


def _values(model: nn.Module, backbone: VisionBackbone, convolutional: bool) -> list[str]:
    return _of_roles(model, backbone.blocks, backbone.architecture.value, convolutional)


def _all_linears(model: nn.Module, backbone: VisionBackbone, convolutional: bool) -> list[str]:
    names = [name for role in LINEAR_ROLES for name in getattr(backbone.architecture, role)]
    found = _of_roles(model, backbone.blocks, names, convolutional)
    return [path for path in found if not isinstance(unwrapped(model.get_submodule(path)), Conv1D)]  # OSF passes by


def _ia3(model: nn.Module, backbone: VisionBackbone, convolutional: bool) -> list[str]:
    table = backbone.architecture
    return _of_roles(model, backbone.blocks, (*table.key, *table.value, *table.fc2), convolutional)


def _norms(model: nn.Module, backbone: VisionBackbone, convolutional: bool) -> list[str]:
    roles = ("norm1", "norm2", "further_norms")
    paths = [*(path for block in backbone.blocks for path in block.modules(roles)), *backbone.norms]
    norms = {path: unwrapped(model.get_submodule(path)) for path in paths}
    return [
        path
        for path, norm in norms.items()
        if any(True for _ in norm.parameters(recurse=False)) and not keeps_statistics(norm)
    ]


_TARGETS: Mapping[str, Callable[[nn.Module, VisionBackbone, bool], list[str]]] = {
    "BEFT": _values,
    "IA3": _ia3,
    "LN_TUNING": _norms,
    "OSF": _all_linears,
}


def _of_roles(
    model: nn.Module, blocks: Iterable[Block], names: Iterable[str], convolutional: bool = True
) -> list[str]:
    """Full names of the linears that a table names so, those of attention that pools tokens included."""
    wanted = re.compile("|".join(re.escape(name).replace(r"\*", r"\w+") for name in names) or "(?!)")
    return [
        f"{block.path}.{name}"
        for block in blocks
        for name, module in model.get_submodule(block.path).named_modules()
        if wanted.fullmatch(name)
        and (isinstance(base := unwrapped(module), nn.Linear | Conv1D) or (convolutional and _is_dense(base)))
    ]


def _is_dense(module: nn.Module) -> bool:
    """Whether a module is a convolution of all channels that peft's layers can stand beside.

    These make another with its kernel, stride and padding, and know neither dilation nor borders other than zeros.
    """
    if not isinstance(module, nn.Conv2d) or module.groups != 1:
        return False
    dilated = any(step > 1 < size for step, size in zip(module.dilation, module.kernel_size, strict=True))
    return not dilated and module.padding_mode == "zeros"


def _is_read(parent: nn.Module) -> bool:
    """Whether a module reads the stride of its convolution, to pad as TensorFlow does; peft's layers have none."""
    names = ("MobileNetV1ConvLayer", "MobileNetV2ConvLayer")
    return type(parent).__name__ in names and bool(getattr(parent.config, "tf_padding", False))


def _is_end(model: nn.Module, paths: Iterable[str]) -> bool:
    """Whether another module's name ends in one of these, with which peft would take it for a target, too."""
    names = set(paths)
    others = (path.split(".") for path, _ in model.named_modules() if path not in names)
    return any(".".join(parts[start:]) in names for parts in others for start in range(1, len(parts)))


def _pattern(paths: Iterable[str]) -> str:
    return "|".join(map(re.escape, paths))
