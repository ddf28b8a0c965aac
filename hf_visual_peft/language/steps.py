"""What a call between the steps of training, such as `fit`, asks of a model before it changes the active adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from torch import nn

from .classifier import ZeroShotClassifier
from .slot import LanguageEquation, LanguageLayer


def active(model: nn.Module) -> tuple[ZeroShotClassifier | None, LanguageEquation | None]:
    """The classifier in a model and the equation of its active adapter; None for what there is not."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layer = getattr(base, "adapters", None)
    equation = layer.active() if isinstance(layer, LanguageLayer) else None
    return (base if isinstance(base, ZeroShotClassifier) else None), equation


def require_names(call: str, base: ZeroShotClassifier, names: Sequence[str]) -> None:
    """Check that the classifier has the classes of an adapter.

    Raises:
        ValueError: it has not.
    """
    if list(names) != base.class_names:
        raise ValueError(
            f"{call}: the classifier has the classes {base.class_names[:5]}, and the adapter {list(names)[:5]}. Set "
            "those of the adapter: classifier.set_class_names(...)."
        )


def config_of(base: ZeroShotClassifier, equation: LanguageEquation) -> Any:
    """The config of the adapter that has an equation."""
    configs: Any = base.peft_config
    layer: Any = base.adapters
    return configs[next(name for name, held in layer.equations.items() if held is equation)]
