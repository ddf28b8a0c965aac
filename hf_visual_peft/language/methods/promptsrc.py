"""PromptSRC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ...core.registry import Paper
from ..config import register_language
from ..slot import LanguageEquation
from ..view import Outcome, View, normalised
from .ivlp import IVLPConfig, JointPrompts


class RegulatedPrompts(JointPrompts):
    """IVLP whose features and predictions stay near those without it.

        loss = cross entropy + a mean|text - text0| + b mean|image - image0| + KL(p || p0) / (images classes),
        all features normalised, means over all their entries

    Args:
        texts: as of `JointPrompts`.
        images: as of `JointPrompts`.
        before: as of `JointPrompts`.
        text_weight: a.
        image_weight: b.
    """

    def __init__(
        self, texts: Sequence[Tensor], images: Sequence[Tensor], before: str, text_weight: float, image_weight: float
    ) -> None:
        super().__init__(texts, images, before)
        self.weights = text_weight, image_weight

    def objective(self, view: View, outcome: Outcome, loss: Tensor, labels: Tensor) -> Tensor:
        """The loss with the distances."""
        text0, image0 = normalised(view.raw_text), normalised(view.image.detach())
        text = (normalised(outcome.text) - text0).abs().mean()
        image = (normalised(outcome.image) - image0).abs().mean()
        own = F.log_softmax(outcome.logits.float(), -1)
        base = F.log_softmax(view.compare(image0, text0, learned=False).float(), -1)
        distance = F.kl_div(own, base, reduction="sum", log_target=True) / own.numel()
        return loss + self.weights[0] * text + self.weights[1] * image + distance


@register_language(
    name="promptsrc",
    paper=Paper(
        "Self-regulating Prompts: Foundational Model Adaptation without Forgetting", "ICCV 2023", "2307.06948"
    ),
    equation="IVLP; loss + a mean|text - text0| + b mean|image - image0| + KL(p || p0) / (images classes)",
    counts=(({}, 100, 46_080), ({"depth": 3}, 100, 15_360)),
)
@dataclass
class PromptSRCConfig(IVLPConfig):
    """Config of self-regulating prompts (PromptSRC), arXiv 2307.06948.

    IVLP with four vectors and tokens, and terms in the loss that keep features and predictions near those of the base.
    The features of the classes' templates are the mean of those that are not normalised; the authors take 60
    templates. They keep the mean of the weights of all epochs with the weights of a normal distribution: that is
    `hf_visual_peft.GaussianAverage`, of the adapter's weights only. SGD at 0.0025, batch 4, 20 epochs.

    Args:
        text_weight: of the texts' distance.
        image_weight: of the images' distance.
    """

    num_virtual_tokens: int = field(default=4, metadata={"help": "Learned vectors a text."})
    num_vision_tokens: int = field(default=4, metadata={"help": "Learned tokens an image."})
    text_weight: float = field(default=25.0, metadata={"help": "Of the distance of the texts."})
    image_weight: float = field(default=10.0, metadata={"help": "Of the distance of the images."})

    share: ClassVar[float] = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_number("text_weight", 0.0)
        self._require_number("image_weight", 0.0)

    def equation(self, texts: list[Tensor], images: list[Tensor], before: str) -> LanguageEquation:
        """The equation with these."""
        return RegulatedPrompts(texts, images, before, self.text_weight, self.image_weight)
