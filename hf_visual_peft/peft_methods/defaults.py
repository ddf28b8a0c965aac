"""`LoraConfig()` and the like on vision models: peft asks for their targets here, where it knows none itself.

peft looks targets up by the `model_type` of the model's config, which says nothing of a backbone that a detector or a
language model holds, and which timm's models do not have. So the model itself is looked at. Entries of peft's own and
of the user's come first: on BLIP-2, Gemma 4 and Llama 4 peft's adapt the language model, and
`with_visual_targets(LoraConfig(), model)` the vision tower.
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
    """Let peft's tuners look at the model where no entry says what they act on; done once."""
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
    """Whether peft or the user has an entry for the type of the model, or other fields name the targets."""
    mapping = IA3_TARGETS if isinstance(tuner, IA3Model) else tuner.target_module_mapping
    named = getattr(config, "target_parameters", None) or getattr(config, "target_modules_to_tie", None)
    return model_config.get("model_type") in mapping or bool(named)


def _fill(config: Any, tuner: BaseTuner) -> None:
    """Look for the targets.

    Raises:
        ValueError: the model takes images, and no backbone or nothing to act on is found in it.
    """
    if not takes_images(tuner.model):
        return
    try:
        fill_targets(config, tuner.model, find_backbone(tuner.model), short=True)
    except BackboneError as error:
        raise ValueError(f"Please specify `target_modules` in `peft_config`. {error}") from error


def _tied_with_embedding(find: Any) -> Any:
    """As peft's; none where a model does not tell its input embeddings, as detectors with tied heads."""

    @functools.wraps(find)
    def found(self: BaseTuner) -> list[str]:
        try:
            return find(self)
        except NotImplementedError:
            return []

    found._looks = True  # type: ignore[attr-defined]
    return found
