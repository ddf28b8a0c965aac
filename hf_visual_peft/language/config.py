"""The base of the configs of methods for class texts, and how such a method becomes known to peft."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from peft import PeftConfig

from ..core.fields import CheckedFields
from ..core.registry import Paper, VisualPeftType, enlist
from ..training.defaults import Training
from .scale import SCALE
from .slot import LanguageEquation
from .templates import check_templates
from .tokens import check_names
from .tuner import LanguageTuner


if TYPE_CHECKING:
    from .classifier import ZeroShotClassifier

ConfigT = TypeVar("ConfigT", bound=type)
USUAL = Training(2e-3, train_crop="none")  # features of images are computed once


@dataclass
class LanguageConfig(CheckedFields, PeftConfig):
    """Base of the configs of methods for a `ZeroShotClassifier`.

    Args:
        class_names: of the classes that the adapter was trained on; filled in from the classifier. Weights that it has
            for each class are found by these names.
        templates: with which it was trained; filled in from the classifier.
        train_logit_scale: whether the factor of the cosine in the logits trains, too: one parameter, a copy of
            `classifier.logit_scale`. Methods for images and of peft name it: `modules_to_save=["logit_scale"]`.
    """

    class_names: list[str] | None = field(default=None, metadata={"help": "Filled in from the classifier."})
    templates: list[str] | None = field(default=None, metadata={"help": "Filled in from the classifier."})
    train_logit_scale: bool = field(default=False, metadata={"help": "Train the factor of the cosine, too."})

    method_type: ClassVar[VisualPeftType]
    target_modules: ClassVar[Any] = None
    unknown_fields: ClassVar[list[str]] = []
    needs_images: ClassVar[bool] = False  # whether features of images are not enough
    from_file: ClassVar[bool] = False
    why_no_scale: ClassVar[str] = ""  # why `train_logit_scale` has no meaning

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method_type
        if self.class_names is not None:
            self.class_names = check_names(self.class_names)
        if self.templates is not None:
            self.templates = check_templates(self.templates)
        self._require_choice("train_logit_scale", (True, False))
        if self.train_logit_scale and self.why_no_scale:
            self._fail("train_logit_scale", f"False: {self.why_no_scale}")

    @property
    def modules_to_save(self) -> list[str] | None:
        """What peft copies and trains beside the method's own weights."""
        return [SCALE] if self.train_logit_scale else None

    def starts_from_texts(self) -> bool:
        """Whether the adapter decides by the texts before it is trained, so that weights between both have a meaning.

        `hf_visual_peft.interpolate` then takes them between what `build` makes and what was learned.
        """
        return False

    def build(self, classifier: ZeroShotClassifier) -> LanguageEquation:
        """The method's equation for a classifier.

        Raises:
            ValueError: a field does not fit the classifier.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class LanguageMethod:
    """Facts about a method for class texts.

    Attributes:
        name: lower-case name, and prefix of parameter names.
        config_cls: its config.
        paper: its source.
        equation: the method in one line.
        counts: trainable parameters on CLIP ViT-B/16: fields of the config, number of classes, count.
        training: settings for AdamW.
    """

    name: str
    config_cls: type[LanguageConfig]
    paper: Paper
    equation: str
    counts: tuple[tuple[dict[str, Any], int, int], ...]
    training: Training


_METHODS: dict[str, LanguageMethod] = {}


def list_language_methods() -> MappingProxyType[str, LanguageMethod]:
    """Every method for a `ZeroShotClassifier`, by name; a read-only view."""
    return MappingProxyType(dict(sorted(_METHODS.items())))


def register_language(
    *,
    name: str,
    paper: Paper,
    equation: str,
    counts: Iterable[tuple[dict[str, Any], int, int]],
    training: Training = USUAL,
) -> Callable[[ConfigT], ConfigT]:
    """Make a config class a peft method. The arguments are those of `LanguageMethod`.

    Raises:
        ValueError: the name or its parameter prefix is taken.
    """

    def decorate(config_cls: Any) -> Any:
        enlist(config_cls, name, LanguageTuner)
        _METHODS[name] = LanguageMethod(name, config_cls, paper, equation, tuple(counts), training)
        return config_cls

    return decorate
