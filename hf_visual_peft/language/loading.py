"""Loads a classifier with its adapter from one folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftConfig, PeftModel
from transformers.utils import cached_file

from ..core.labels import TEMPLATES, Labels
from ..core.loading import load_complete
from .classifier import ZeroShotClassifier


ADAPTER_CONFIG = "adapter_config.json"


def load_classifier(
    folder: str,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | str | None = None,
    base: str | None = None,
    is_trainable: bool = False,
    **kwargs: Any,
) -> ZeroShotClassifier | PeftModel:
    """Load a classifier: the dual encoder, class names and templates, and the adapter.

    Args:
        folder: folder or repository of an adapter, of any method, or of a whole classifier.
        class_names: of the classes; by default those that the adapter was trained on.
        templates: by default those of training.
        base: folder or repository of the dual encoder; by default where it was loaded from for training.
        is_trainable: whether the adapter trains.
        kwargs: as of `ZeroShotClassifier.from_pretrained`.

    Returns:
        The classifier with the adapter, or the whole classifier, in evaluation mode.

    Raises:
        ValueError: the adapter does not tell its base or its class names, and neither does the call.
    """
    if cached_file(folder, ADAPTER_CONFIG, _raise_exceptions_for_missing_entries=False) is None:
        return ZeroShotClassifier.from_pretrained(folder, class_names=class_names, templates=templates, **kwargs)
    config = PeftConfig.from_pretrained(folder)
    mapping: Any = config.auto_mapping or {}
    labels = Labels.of_mapping(mapping)
    names = class_names or getattr(config, "class_names", None) or (labels and list(labels.names))
    texts = templates or getattr(config, "templates", None) or mapping.get(TEMPLATES)
    where = base or config.base_model_name_or_path
    if not where:
        raise ValueError(f"The adapter in {folder} does not tell its base. Name it: load_classifier(..., base=...).")
    if not names:
        raise ValueError(
            f"The adapter in {folder} has no class names: it was not trained on a ZeroShotClassifier. Name the "
            "classes: load_classifier(..., class_names=[...])."
        )
    classifier = ZeroShotClassifier.from_pretrained(where, class_names=names, templates=texts, **kwargs)
    model = load_complete(classifier, folder, is_trainable=is_trainable)
    return model.train(is_trainable)
