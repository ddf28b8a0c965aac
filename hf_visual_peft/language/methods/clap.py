"""CLAP, and the linear probe from zero-shot weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...core.registry import Paper
from ..classifier import ZeroShotClassifier
from ..config import register_language
from ..rows import by_name
from ..slot import Linear, classes_of
from ..support import SupportConfig, SupportEquation
from ..view import Outcome, View


class ConstrainedProbe(SupportEquation):
    """A feature for each class that trains, held near its text.

        logits = scale cos(image, W_k), loss = cross entropy + mean_k c_k |W_k - text_k|^2

    Args:
        weight: the start, (classes, width).
        names: of these classes.
        constrained: whether there is the second term.
        support: number of images that c was computed from; None: not yet.
    """

    constraint: Tensor

    def __init__(self, weight: Tensor, names: Sequence[str], constrained: bool, support: int | None) -> None:
        super().__init__(names, support)
        self.weight = nn.Parameter(weight)
        self.constrained = constrained
        self.register_buffer("constraint", torch.zeros(len(names)))

    def forward(self, view: View) -> Outcome:
        """The logits of the learned features."""
        text = by_name(self.weight, self.names, view.names, view.raw_text)
        return Outcome(view.compare(view.image, text), view.image, text)

    def linear(self, classifier: ZeroShotClassifier) -> Linear:
        """The learned features, normalised, with scale and bias of the dual encoder."""
        return classes_of(classifier, self.names, self.weight)

    def objective(self, view: View, outcome: Outcome, loss: Tensor, labels: Tensor) -> Tensor:
        """The loss with the distance from the texts."""
        if not self.constrained:
            return loss
        self.require_support()
        constraint = by_name(self.constraint, self.names, view.names, torch.zeros(len(view.names)))
        distance = (outcome.text - view.raw_text.to(outcome.text)).square().sum(-1)
        return loss + (constraint * distance).mean()

    def take(self, view: View, features: Tensor, labels: Tensor) -> None:
        """Take c_k: the mean zero-shot probability of class k on its images."""
        probability = view.compare(features, view.text, learned=False).softmax(-1).gather(1, labels[:, None])[:, 0]
        count = torch.bincount(labels, minlength=len(self.names))
        total = torch.zeros(len(self.names), device=labels.device).index_add(0, labels, probability.float())
        self.constraint.copy_(total / count.clamp(min=1))


@register_language(
    name="clap",
    paper=Paper("A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models", "CVPR 2024", "2312.12730"),
    equation="a feature for each class from its text; loss + mean_k c_k |W_k - text_k|^2",
    counts=(({}, 100, 51_200),),
)
@dataclass
class CLAPConfig(SupportConfig):
    """Config of the class-adaptive linear probe (CLAP), arXiv 2312.12730.

    The features of the classes train, from those of their texts. A term in the loss holds them there, the more the
    better the zero-shot classifier is on the images of a class: `hf_visual_peft.fit` computes that before training. No
    validation data are needed. A class goes with its name; new names get the feature of their text.

    Args:
        constrained: False: without this term, the paper's baseline ZS-LP, which needs no `fit`.
    """

    constrained: bool = field(default=True, metadata={"help": "Hold the features near the texts."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_choice("constrained", (True, False))

    def starts_from_texts(self) -> bool:
        """Always: the features are those of the texts."""
        return True

    def build(self, classifier: ZeroShotClassifier) -> ConstrainedProbe:
        """A feature for each class."""
        assert self.class_names is not None
        weight = classifier.features_of(self.class_names, raw=True)
        return ConstrainedProbe(weight, self.class_names, self.constrained, self.support_size)
