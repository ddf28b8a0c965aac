"""FLYP."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

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
        softmax: loss = (cross entropy of S's rows + of its columns) / 2, targets [label_i = label_j], divided by their
        sum; sigmoid: loss = -sum_ij log sigmoid(y_ij (S_ij + bias)) / images, y_ij = 1 if label_i = label_j, else -1

    Args:
        weights: of the dual encoder.
        soft: whether texts of the same class are right, too; False: only the own text, as in the authors' code.
        sigmoid: whether each pair is a decision of its own, as in SigLIP's pretraining.
    """

    def __init__(self, weights: OwnWeights, soft: bool, sigmoid: bool) -> None:
        super().__init__()
        self.weights = weights
        self.soft = soft
        self.sigmoid = sigmoid

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
        same = (labels[:, None] == labels).to(logits) if self.soft else torch.eye(len(labels)).to(logits)
        if self.sigmoid:
            return -F.logsigmoid((2 * same - 1) * logits).sum() / len(labels)
        targets = same / same.sum(1, keepdim=True)
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

    The authors have CLIP alone. SigLIP's pretraining decides about each pair of image and text by itself (arXiv
    2303.15343, equation 1), and so does this method on dual encoders that have a bias for it.

    Args:
        soft_targets: False: as in the authors' code.
        loss: `"softmax"` as CLIP, `"sigmoid"` as SigLIP, or `"pretraining"`: by whether the encoder has a logit bias.
    """

    soft_targets: bool = field(default=True, metadata={"help": "Images of one class share the target."})
    loss: Literal["pretraining", "softmax", "sigmoid"] = field(
        default="pretraining", metadata={"help": "Contrast over the batch, or a decision for each pair."}
    )

    needs_images: ClassVar[bool] = True
    why_no_scale: ClassVar[str] = "the scale is one of the dual encoder's weights, which all train"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_choice("soft_targets", (True, False))
        self._require_choice("loss", ("pretraining", "softmax", "sigmoid"))

    def starts_from_texts(self) -> bool:
        """Always: the weights are those of the dual encoder."""
        return True

    def build(self, classifier: ZeroShotClassifier) -> LanguageEquation:
        """A copy of all weights."""
        names = [name for name, _ in classifier.encoder.named_parameters()]
        biased = classifier.towers.scale()[1] is not None
        sigmoid = self.loss == "sigmoid" or (self.loss == "pretraining" and biased)
        return FineTuned(OwnWeights(classifier.encoder, names), self.soft_targets, sigmoid)
