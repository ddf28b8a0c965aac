"""Targets for `LoraConfig()` and the like on vision models for which peft itself has none.

peft looks targets up by the `model_type` of the model's config. That type does not identify a backbone inside a
detector or a language model, and timm's models do not have one. So the targets are found in the model itself. Entries
of peft and of the user have priority: on BLIP-2, Gemma 4 and Llama 4 peft's entries adapt the language model, while
`with_visual_targets(LoraConfig(), model)` adapts the vision tower.
"""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftConfig
from peft.tuners.ia3 import IA3Model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_TARGETS

from ..backbones.backbone import BackboneError
from ..backbones.choosing import takes_images
from ..backbones.finding import find_backbone
from .targets import METHODS, TUNERS, fill_targets, method_of


def teach_targets() -> None:
    """Make peft's tuners search the model if no entry gives their targets; done once."""
    for tuner in {BaseTuner, *TUNERS.values()}:
        prepare = vars(tuner).get("_prepare_adapter_config")
        if prepare is not None and not hasattr(prepare, "_looks"):
            tuner._prepare_adapter_config = _looking(getattr(prepare, "__func__", prepare), tuner is IA3Model)
    if not hasattr(BaseTuner._get_module_names_tied_with_embedding, "_looks"):
        BaseTuner._get_module_names_tied_with_embedding = _tied_with_embedding(
            BaseTuner._get_module_names_tied_with_embedding
        )


def _looking(prepare: Any, is_static: bool) -> Any:
    @functools.wraps(prepare)
    def looking(self: BaseTuner, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config: Any = peft_config
        if (
            method_of(config) in METHODS
            and config.target_modules is None
            and not _is_known(self, config, model_config)
        ):
            _fill(config, self)
        return prepare(peft_config, model_config) if is_static else prepare(self, peft_config, model_config)

    looking._looks = True  # type: ignore[attr-defined]
    return looking


def _is_known(tuner: BaseTuner, config: Any, model_config: dict[str, Any]) -> bool:
    """Whether peft or the user has an entry for the model's type, or other fields name the targets."""
    mapping = IA3_TARGETS if isinstance(tuner, IA3Model) else tuner.target_module_mapping
    named = getattr(config, "target_parameters", None) or getattr(config, "target_modules_to_tie", None)
    return model_config.get("model_type") in mapping or bool(named)


def _fill(config: Any, tuner: BaseTuner) -> None:
    """Find the targets.

    Raises:
        ValueError: the model takes images, but no backbone or no target is found in it.
    """
    if not takes_images(tuner.model):
        return
    try:
        fill_targets(config, tuner.model, find_backbone(tuner.model), short=True)
    except BackboneError as error:
        raise ValueError(f"Please specify `target_modules` in `peft_config`. {error}") from error


def _tied_with_embedding(find: Any) -> Any:
    """As in peft; none if a model does not give its input embeddings, such as detectors with tied heads."""

    @functools.wraps(find)
    def found(self: BaseTuner) -> list[str]:
        try:
            return find(self)
        except NotImplementedError:
            return []

    found._looks = True  # type: ignore[attr-defined]
    return found
