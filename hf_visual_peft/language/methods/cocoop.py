"""CoCoOp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...core.registry import Paper
from ..classifier import ZeroShotClassifier
from ..config import register_language
from ..slot import LanguageEquation
from ..tokens import Position
from ..view import Outcome, View, normalised
from .coop import Context, CoOpConfig


class ConditionalContext(Context):
    """Learned vectors that a small network shifts for each image.

        V_i = V + W2 relu(W1 image_i / |image_i| + b1) + b2, the same shift for all slots

    Args:
        vectors: (slots, width).
        names: as of `Context`.
        position: as of `Context`.
        inputs: width of the features.
        hidden: width inside the network.
    """

    def __init__(self, vectors: Tensor, names: Sequence[str], position: Position, inputs: int, hidden: int) -> None:
        super().__init__(vectors, names, position)
        width = vectors.shape[-1]
        self.meta = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, view: View) -> Outcome:
        """The logits with texts for each image; one image at a time, computed again in the backward pass."""
        tokens = view.classifier.texts_with_slots(len(self.vectors), self.position)
        shifts = self.meta(normalised(view.image).to(self.vectors.dtype))

        def text(shift: Tensor) -> Tensor:
            return view.encode(tokens, (self.vectors + shift).unsqueeze(0))

        again = torch.is_grad_enabled()
        texts = [checkpoint(text, each, use_reentrant=False) if again else text(each) for each in shifts]
        features = torch.stack(texts)
        return Outcome(view.compare(view.image, features), view.image, features)


@register_language(
    name="cocoop",
    paper=Paper("Conditional Prompt Learning for Vision-Language Models", "CVPR 2022", "2203.05557"),
    equation="CoOp with V + meta(image): texts of their own for each image",
    counts=(({}, 100, 35_360),),
)
@dataclass
class CoCoOpConfig(CoOpConfig):
    """Config of conditional context optimisation (CoCoOp), arXiv 2203.05557.

    CoOp whose vectors a network of two linears shifts by the features of the image. The text tower runs on all classes
    for every image: a step takes as long as one of CoOp for each image of the batch. The authors take batches of one.

    Args:
        reduction: of the features' width inside the network.
    """

    init_text: str | None = field(default="a photo of a", metadata={"help": "Words to start from."})
    reduction: int = field(default=16, metadata={"help": "Of the width inside the network."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("reduction", 1)
        self._require_unset("class_specific", "as the vectors depend on the image instead")

    def starts_from_texts(self) -> bool:
        """Never: its network starts at random."""
        return False

    def equation(self, classifier: ZeroShotClassifier, vectors: Tensor) -> LanguageEquation:
        """The equation with these vectors."""
        assert self.class_names is not None
        width = classifier.width
        hidden = max(1, width // self.reduction)
        return ConditionalContext(vectors, self.class_names, self.position, width, hidden)
