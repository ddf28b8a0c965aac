"""WiSE-FT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...core.registry import Paper
from ..classifier import ZeroShotClassifier
from ..config import USUAL, LanguageConfig, register_language
from ..own_weights import OwnWeights
from ..rows import by_name
from ..slot import LanguageEquation
from ..view import Outcome, View, normalised


class FineTunedImages(LanguageEquation):
    """The whole image tower, and a linear head that starts as the texts.

        logits = scale cos(I(image), text_k) + I(image) / |I(image)| . R_k, R = 0 at the start; I and R train

    Args:
        weights: of the image tower.
        names: of the classes.
        width: of the features.
    """

    def __init__(self, weights: OwnWeights, names: Sequence[str], width: int) -> None:
        super().__init__()
        self.weights = weights
        self.residual = nn.Parameter(torch.zeros(len(names), width))
        self.names = list(names)

    def forward(self, view: View) -> Outcome:
        """The logits of the tuned tower and head."""
        image, text = view.image_by(self.weights.by_name()), view.text
        residual = by_name(self.residual, self.names, view.names, self.residual.new_zeros(len(view.names), 1))
        logits = view.compare(image, text)
        logits = logits + (normalised(image).to(residual) @ residual.T).to(logits)
        return Outcome(logits, image, self._head(view, text, residual))

    @staticmethod
    def _head(view: View, text: Tensor, residual: Tensor) -> Tensor:
        return normalised(text).to(residual) + residual / view.scale.to(residual)


@register_language(
    name="wise_ft",
    paper=Paper("Robust fine-tuning of zero-shot models", "CVPR 2022", "2109.01903"),
    equation="the image tower and a linear head from the texts train; weights (1 - alpha) start + alpha tuned",
    counts=(({}, 100, 86_243_840), ({}, 1000, 86_704_640)),
    training=replace(USUAL, learning_rate=3e-5, weight_decay=0.1),
)
@dataclass
class WiSEFTConfig(LanguageConfig):
    """Config of full fine-tuning as in WiSE-FT, arXiv 2109.01903: the image tower, and a head from the texts.

    The adapter has its own copy of the image tower, so that the dual encoder stays as it was. Of the authors' head,
    `scale` times the texts at the start, what is learned is held apart: weight decay pulls it to the texts. After
    training, `hf_visual_peft.interpolate(model, 0.5)` takes the weights between start and end. A class goes with its
    name; new names have their texts.
    """

    needs_images: ClassVar[bool] = True

    def starts_from_texts(self) -> bool:
        """Always: the tower is that of the dual encoder, and the head its texts."""
        return True

    def build(self, classifier: ZeroShotClassifier) -> LanguageEquation:
        """The image tower and the head."""
        assert self.class_names is not None
        weights = OwnWeights(classifier.encoder, classifier.towers.image_weights)
        return FineTunedImages(weights, self.class_names, classifier.width)
