"""peft's own methods on vision backbones: by name, with their targets found in the model itself.

`LoraConfig()` alone gets its targets when peft puts it into a model, see `defaults.py`. `with_visual_targets` fills in
a config before that, also with the task head, and for one of several backbones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn

from ..backbones.finding import find_backbone
from ..backbones.found import require_plain
from ..backbones.task_heads import announce
from ..core.config import VisualPeftConfig
from ..core.copies import require_named
from ..core.labels import name_classes
from ..core.registry import Method, get_method, list_methods
from ..training.defaults import Training
from .targets import CONVOLUTIONAL_METHODS, METHODS, fill_targets, method_of


ConfigT = TypeVar("ConfigT", bound=PeftConfig)

# AdaLoRA needs the number of training steps and a call after each step, Poly the task of every sample
_NEED_MORE = ("ADALORA", "POLY")
_NOT_MERGEABLE = ("LILY",)
_LOW_RANK = Training(1e-3)
_TRAINING = {"ln_tuning": Training(1e-2), "ia3": Training(1e-2)}  # few parameters, which have to change a lot


@dataclass(frozen=True)
class PeftMethod:
    """A method of peft that needs no changes of the training loop.

    Attributes:
        name: lower-case name used on command lines: that of its `peft_type`, or of a variant.
        peft_type: as in `adapter_config.json`.
        chosen: fields of the config that define the variant.
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
        """The prefix of the names of its parameters."""
        return PEFT_TYPE_TO_PREFIX_MAPPING[self.peft_type]

    @property
    def convolutional(self) -> bool:
        """Whether it can also act on `nn.Conv2d`."""
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
        """Its targets, in a few words."""
        usual = "query and value, else fc1 and fc2"
        blocks = f"{usual}, else convolutions" if self.convolutional else usual
        return {
            "BEFT": "value",
            "IA3": "key, value and fc2",
            "LN_TUNING": "all norms but batch norms, else these",
            "OSF": "all linears of the blocks",
        }.get(self.peft_type, blocks)

    def config(self, model: nn.Module, **chosen: Any) -> PeftConfig:
        """Its config for a model, whose batch norms also need `freeze_norms`.

        Args:
            model: with the backbone and the task head.
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
    """A config of peft with the modules of this model in the fields that are None.

        model = get_peft_model(vit, with_visual_targets(LoraConfig(), vit))

    `target_modules` gets the method's targets by their roles in the backbone, see `targets.py`; `modules_to_save` gets
    the task head, and `auto_mapping` its class names, see `labels`. Fields that are set do not change.
    `layers_to_transform` counts the blocks of the whole backbone from 0. Batch norms of the backbone also need
    `freeze_norms`.

    Args:
        config: of a method for linears or norms; a config of this library, which needs no targets, is returned
            unchanged, or with the backbone in its field.
        model: that the config is for.
        backbone: path of the backbone to adapt, in a model that holds several.

    Returns:
        A copy.

    Raises:
        ValueError: the method is not for linears or norms, or has nothing to act on in this backbone; or
            `modules_to_save` names no module.
        BackboneError: no backbone was found in the model, or the model is compiled or distributed.
    """
    if isinstance(config, VisualPeftConfig):
        chosen = config if backbone is None else copy.copy(config)
        chosen.backbone = chosen.backbone if backbone is None else backbone
        return chosen
    if method_of(config) not in METHODS:
        known = ", ".join(sorted({PEFT_METHODS[name].config_cls.__name__ for name in PEFT_METHODS}))
        raise ValueError(f"{type(config).__name__} has no targets in vision backbones: choose one of {known}.")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = find_backbone(base, backbone)
    if base is model:  # later adapters go where the first one is
        require_plain(base, found.path)
    filled: Any = copy.deepcopy(config)
    if filled.modules_to_save is None:
        announce(found.head_note)
        filled.modules_to_save = list(found.heads) or None
    else:
        require_named(base, filled)
    fill_targets(filled, base, found)
    name_classes(filled, base)
    return filled
