"""Cross-modal adaptation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.registry import Paper
from ..classifier import ZeroShotClassifier
from ..config import USUAL, LanguageConfig, register_language
from ..rows import by_name
from ..slot import LanguageEquation, Linear
from ..view import Outcome, View, normalised


class CrossModalLinear(LanguageEquation):
    """A linear on normalised features, whose training examples are images and the texts of the classes.

        logits = scale image / |image| W^T, loss = (cross entropy of the images + that of the texts) / 2

    Args:
        weight: the start, (classes, width).
        names: of these classes.
    """

    def __init__(self, weight: Tensor, names: Sequence[str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.names = list(names)

    def _weight(self, view: View) -> Tensor:
        return by_name(self.weight, self.names, view.names, normalised(view.text))

    def forward(self, view: View) -> Outcome:
        """The logits of the linear."""
        weight = self._weight(view)
        return Outcome(view.scale * normalised(view.image).to(weight) @ weight.T, view.image, weight)

    def linear(self, classifier: ZeroShotClassifier) -> Linear:
        """The linear, with the scale."""
        weight = classifier.scale()[0] * self.weight
        return Linear(self.names, weight, torch.zeros(len(weight), device=weight.device), raw=False, biased=False)

    def objective(self, view: View, outcome: Outcome, loss: Tensor, labels: Tensor) -> Tensor:
        """The mean of the losses of images and texts."""
        if labels.ndim != 1:
            raise ValueError("CrossModalConfig: the texts of the classes have one label each, and the images several.")
        logits = view.scale * normalised(view.text).to(outcome.text) @ outcome.text.T
        return (loss + F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))) / 2


@register_language(
    name="cross_modal",
    paper=Paper(
        "Multimodality Helps Unimodality: Cross-Modal Few-Shot Learning with Multimodal Models",
        "CVPR 2023",
        "2301.06267",
    ),
    equation="a linear from the texts; the texts of the classes are training examples like the images",
    counts=(({}, 100, 51_200),),
    training=replace(USUAL, learning_rate=1e-3),
)
@dataclass
class CrossModalConfig(LanguageConfig):
    """Config of cross-modal adaptation, arXiv 2301.06267: its linear probe.

    A linear without bias, which starts as the normalised features of the classes and is not normalised again. The loss
    is half that of the images and half that of the classes' texts. The authors draw as many texts as images for each
    batch; here all classes are in each, which is its mean.
    """

    def starts_from_texts(self) -> bool:
        """Always: the linear is that of the texts."""
        return True

    def build(self, classifier: ZeroShotClassifier) -> LanguageEquation:
        """The linear."""
        assert self.class_names is not None
        return CrossModalLinear(classifier.features_of(self.class_names), self.class_names)
