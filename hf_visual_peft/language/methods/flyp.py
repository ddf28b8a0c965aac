"""FLYP."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...core.registry import Paper
from ..classifier import ZeroShotClassifier
from ..config import USUAL, LanguageConfig, register_language
from ..own_weights import OwnWeights
from ..slot import LanguageEquation
from ..towers import replaced_weights
from ..view import Outcome, View


class FineTuned(LanguageEquation):
    """The whole dual encoder, trained with the loss of its pretraining.

        S_ij = scale cos(I(image_i), T(text of label j)) over the batch,
        loss = (cross entropy of S's rows + of its columns) / 2, targets [label_i = label_j], divided by their sum

    Args:
        weights: of the dual encoder.
        soft: whether pairs of one class share the target; False: only the own text counts, as in the authors' code.
    """

    def __init__(self, weights: OwnWeights, soft: bool) -> None:
        super().__init__()
        self.weights = weights
        self.soft = soft

    def forward(self, view: View) -> Outcome:
        """The logits of the tuned encoder; in training by one template for each class."""
        weights = self.weights.by_name()
        drawn = self.training and torch.is_grad_enabled()
        text = view.kept(self, lambda: view.text_by(weights, drawn))
        image = view.image_by(weights)
        return Outcome(self._compare(view, image, text), image, text)

    def _compare(self, view: View, image: Tensor, text: Tensor) -> Tensor:
        with replaced_weights(view.classifier.towers.model, self.weights.by_name()):  # the scale is one of them
            return view.compare(image, text)

    def objective(self, view: View, outcome: Outcome, loss: Tensor, labels: Tensor) -> Tensor:
        """The loss of images and texts of the batch, on all processes."""
        if labels.is_floating_point():
            raise ValueError("FLYPConfig: an image has the text of one class, and here several labels.")
        image, trains = outcome.image, self.training and torch.is_grad_enabled()
        if trains and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            image, labels = _of_all_processes(image), _of_all_processes(labels)
        logits = self._compare(view, image, outcome.text)[:, labels]
        same = (labels[:, None] == labels).to(logits)
        targets = same / same.sum(1, keepdim=True) if self.soft else torch.eye(len(labels)).to(logits)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def _of_all_processes(values: Tensor) -> Tensor:
    """The values of all processes in the order of their ranks; gradients reach the own ones.

    All processes compute the same loss, so that each has the whole gradient of its own values. The mean of gradients
    over processes divides it by their number, for which it is multiplied here.
    """
    count, rank = dist.get_world_size(), dist.get_rank()
    parts = [torch.empty_like(values) for _ in range(count)]
    dist.all_gather(parts, values.detach().contiguous())
    if values.requires_grad:
        parts[rank] = values + (count - 1) * (values - values.detach())
    return torch.cat(parts)


@register_language(
    name="flyp",
    paper=Paper(
        "Finetune like you pretrain: Improved finetuning of zero-shot vision models", "CVPR 2023", "2212.00638"
    ),
    equation="the whole dual encoder trains with the contrastive loss of images and texts of their classes",
    counts=(({}, 100, 149_620_737),),
    training=replace(USUAL, learning_rate=1e-5, weight_decay=0.1),
)
@dataclass
class FLYPConfig(LanguageConfig):
    """Config of fine-tuning like pretraining (FLYP), arXiv 2212.00638.

    All weights of the dual encoder train, its scale too, with the contrastive loss of the images of a batch and the
    texts of their classes; the head is always the texts. With several templates each step draws one for each class.
    Images of one class in a batch share the target, where the authors' code counts them as wrong pairs. The adapter
    has its own copy of all weights, so that the dual encoder stays as it was, and
    `hf_visual_peft.interpolate(model, 0.5)` takes the weights between both, as in WiSE-FT.

    Args:
        soft_targets: False: as in the authors' code.
    """

    soft_targets: bool = field(default=True, metadata={"help": "Images of one class share the target."})

    needs_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_choice("soft_targets", (True, False))

    def starts_from_texts(self) -> bool:
        """Always: the weights are those of the dual encoder."""
        return True

    def build(self, classifier: ZeroShotClassifier) -> LanguageEquation:
        """A copy of all weights."""
        names = [name for name, _ in classifier.encoder.named_parameters()]
        return FineTuned(OwnWeights(classifier.encoder, names), self.soft_targets)
