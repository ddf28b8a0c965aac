"""TaskRes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ...core.registry import Paper
from ..classifier import ZeroShotClassifier
from ..config import LanguageConfig, register_language
from ..rows import by_name
from ..slot import LanguageEquation, Linear, classes_of
from ..view import Outcome, View


class Residual(LanguageEquation):
    """A learned addition to the features of each class.

        text'_k = text_k + scale x_k, x = 0 at the start

    Args:
        names: of the classes.
        width: of the features.
        scale: of the addition.
    """

    def __init__(self, names: Sequence[str], width: int, scale: float) -> None:
        super().__init__()
        self.residual = nn.Parameter(torch.zeros(len(names), width))
        self.names = list(names)
        self.scale = scale

    def forward(self, view: View) -> Outcome:
        """The logits of the changed classes."""
        nothing = torch.zeros_like(view.raw_text)
        text = view.raw_text + self.scale * by_name(self.residual, self.names, view.names, nothing)
        return Outcome(view.compare(view.image, text), view.image, text)

    def linear(self, classifier: ZeroShotClassifier) -> Linear:
        """The changed features, normalised, with scale and bias of the dual encoder."""
        text = classifier.features_of(self.names, raw=True) + self.scale * self.residual
        return classes_of(classifier, self.names, text)


@register_language(
    name="taskres",
    paper=Paper("Task Residual for Tuning Vision-Language Models", "CVPR 2023", "2211.10277"),
    equation="text'_k = text_k + scale x_k",
    counts=(({}, 100, 51_200), ({}, 1000, 512_000)),
)
@dataclass
class TaskResConfig(LanguageConfig):
    """Config of task residual tuning (TaskRes), arXiv 2211.10277.

    What is added to the feature of each class trains, before the features are normalised. With several templates, a
    feature is the mean of those that are not normalised. A class goes with its name; new names get nothing added.

    Args:
        scale: of the addition; 0.5 in the paper, 1 for Flowers.
    """

    scale: float = field(default=0.5, metadata={"help": "Of what is added."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_number("scale", 1e-6)

    def starts_from_texts(self) -> bool:
        """Always: nothing is added at first."""
        return True

    def build(self, classifier: ZeroShotClassifier) -> LanguageEquation:
        """A residual for each class."""
        assert self.class_names is not None
        return Residual(self.class_names, classifier.width, self.scale)
