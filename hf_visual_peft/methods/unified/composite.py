"""Several methods in one adapter."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ...core.config import VisualPeftConfig
from ...core.parts import Part, PartedConfig
from ...core.registry import Paper, list_methods, register
from ...core.targets import default_of, own_fields
from ...training.defaults import Training
from ..reparameter.low_rank import LORA_FIELDS, LoraPart


_PARTS = ({"method": "vpt"}, {"method": "sharedlora", "r": 8}, {"method": "pfeiffer", "r": 8})
_SMALL = ({"method": "vpt", "num_virtual_tokens": 2}, {"method": "sharedlora", "r": 4}, {"method": "pfeiffer", "r": 4})
_OF_ALL = (
    "modules_to_save",
    "backbone",
    "tower",
    "train_norm_statistics",
    "init_weights",
    "inference_mode",
    "task_type",
)
_LORA = "lora"


@register(
    name="composite",
    paper=Paper("Neural Prompt Search", "arXiv 2022", "2206.04673"),
    summary="several methods as one adapter, such as prompts, LoRA and bottlenecks, with sizes by layer",
    visual_tuning="several",
    equation="the equations of all parts, each at its own place; in the order of the list where they meet",
    counts=(({}, 543_840),),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class CompositeConfig(PartedConfig):
    """Config of an adapter that is made of several methods, as the subnets of NOAH, arXiv 2206.04673.

    `CompositeConfig(parts=[VPTConfig(), AdaptFormerConfig(r=8), LoraConfig(r=4)])` is one adapter: one file, one name
    to switch, disable and unload by. It merges if all parts do. Each part acts as it does alone, and reads what the
    others make of the block. Where two parts act at one linear or norm, or on the stream after one sub-layer, they act
    in the order of the list; an order in which they cannot act is refused.

    A part's `layers_to_transform` and `exclude_modules` choose among the blocks of the whole adapter. So one method
    with several sizes is several parts: `VPTConfig(num_virtual_tokens=5, layers_to_transform=[0, 1])` and
    `VPTConfig(num_virtual_tokens=10, layers_to_transform=[2, 3])`. Fields that concern the whole adapter, such as
    `modules_to_save`, are set here and not in a part. Auxiliary losses of parts add up. LoRA is peft's `LoraConfig`,
    with its plain fields. Methods that train whole modules, choose from data, widen the head, take videos, need a
    second pass for their loss (GIST, DyT) or name `target_modules` cannot be parts; put them on the model as an
    adapter beside this one.

    The default parts are the kinds of NOAH's search space: prompts, low-rank updates of queries, keys and values with
    one first factor, and a bottleneck after the MLP.

    Args:
        parts: configs, or mappings as in files: `{"method": "vpt", "num_virtual_tokens": 5}`.
    """

    parts: list[Any] = field(
        default_factory=lambda: [dict(part) for part in _PARTS],
        metadata={"help": "Methods with their fields: {method: NAME, FIELD: VALUE, ...}.", "tiny": list(_SMALL)},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = [self.parts] if isinstance(self.parts, dict | PeftConfig) else self.parts
        if not isinstance(given, list | tuple) or not given:
            self._fail("parts", "a non-empty list of configs")
        self.parts = [self._read(index, part) for index, part in enumerate(given)]
        self._check_of_all()

    def adapter_parts(self) -> Sequence[Part]:
        """The parts, labelled by their methods; several of one method also by numbers from 2."""
        seen: Counter[str] = Counter()
        found = []
        for config in self.parts:
            lora = isinstance(config, LoraConfig)
            name = _LORA if lora else config.method_type.lower()
            seen[name] += 1
            label = name if seen[name] == 1 else f"{name}{seen[name]}"
            found.append(Part(label, LoraPart.from_lora(config) if lora else config))
        return found

    def to_dict(self) -> dict[str, Any]:
        """The fields as they stand in `adapter_config.json`."""
        return {**super().to_dict(), "parts": [_saved(part) for part in self.parts]}

    def _refuse(self, index: int, reason: str) -> None:
        raise ValueError(f"{type(self).__name__}.parts[{index}]: {reason}")

    def _read(self, index: int, part: Any) -> PeftConfig:
        """A part's config, from itself or from a mapping.

        Raises:
            ValueError: it is none, or its method cannot be a part.
        """
        config: Any = part
        if isinstance(part, dict):
            given = dict(part)
            name = str(given.pop("method", None) or given.get("peft_type"))
            config_cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(name.upper())
            if config_cls is None:
                self._refuse(index, f"no method {name!r}. Choose one of {', '.join([*list_methods(), _LORA])}.")
            try:
                config = config_cls(**given)
            except TypeError as error:
                self._refuse(index, f"{config_cls.__name__} {str(error).rpartition('() ')[2].rstrip('.')}.")
        if type(config) is LoraConfig:
            LoraPart.from_lora(config)
            return copy.copy(config)
        if not isinstance(config, VisualPeftConfig):
            self._refuse(
                index,
                f"{type(config).__name__} cannot be a part, which is a config of a method on vision backbones, or "
                "peft's LoraConfig.",
            )
        reason = (
            "it trains whole modules"
            if config.whole_modules
            else "it chooses from data what to train"
            if config.chooses_from_data
            else "it makes the head wider"
            if config.widened_head
            else "its loss needs a second pass of the model"
            if config.has_auxiliary_loss and type(config).extra_pass is not VisualPeftConfig.extra_pass
            else "it takes videos"
            if config.video
            else "it names target_modules, and parts act by role"
            if config.target_modules is not None
            else ""
        )
        if reason:
            name = type(config).__name__
            self._refuse(index, f"{name} cannot be a part: {reason}. Put it on the model as an adapter of its own.")
        return copy.copy(config)

    def _check_of_all(self) -> None:
        for index, part in enumerate(self.parts):
            for each in fields(part):
                if each.name in _OF_ALL and getattr(part, each.name) != default_of(each):
                    name = f"{type(part).__name__}.{each.name}"
                    own = f"{type(self).__name__}.{each.name}"
                    self._refuse(
                        index, f"{name} is {getattr(part, each.name)!r}, which concerns all parts: set {own}."
                    )


def _saved(part: PeftConfig) -> dict[str, Any]:
    """A part in files, with all fields of its method: defaults may change."""
    own = LORA_FIELDS if isinstance(part, LoraConfig) else tuple(each.name for each in own_fields(type(part)))
    plain = part.to_dict()
    chosen = {
        name: plain[name] for name in (*own, "layers_to_transform", "exclude_modules") if plain[name] is not None
    }
    found = {name: sorted(value) if isinstance(value, set) else value for name, value in chosen.items()}
    return {"peft_type": str(getattr(part.peft_type, "value", part.peft_type)), **found}
