"""KgCoOp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from ...core.registry import Paper
from ..classifier import ZeroShotClassifier
from ..config import register_language
from ..slot import LanguageEquation
from ..tokens import Position
from ..view import Outcome, View
from .coop import Context, CoOpConfig


class GuidedContext(Context):
    """CoOp whose texts stay near those of the templates.

        loss = cross entropy + weight (1 - mean_k cos(text_k, text0_k))

    Args:
        vectors: as of `Context`.
        names: as of `Context`.
        position: as of `Context`.
        weight: of the distance.
    """

    def __init__(self, vectors: Tensor, names: Sequence[str], position: Position, weight: float) -> None:
        super().__init__(vectors, names, position)
        self.weight = weight

    def objective(self, view: View, outcome: Outcome, loss: Tensor, labels: Tensor) -> Tensor:
        """The loss with the distance of the texts."""
        cosine = F.cosine_similarity(outcome.text.float(), view.text.float(), dim=-1)
        return loss + self.weight * (1 - cosine.mean())


@register_language(
    name="kgcoop",
    paper=Paper("Visual-Language Prompt Tuning with Knowledge-guided Context Optimization", "CVPR 2023", "2303.13283"),
    equation="CoOp; loss + weight (1 - mean_k cos(text_k, text0_k))",
    counts=(({}, 100, 2_048),),
)
@dataclass
class KgCoOpConfig(CoOpConfig):
    """Config of knowledge-guided context optimisation (KgCoOp), arXiv 2303.13283.

    CoOp that starts from words, with a term in the loss that keeps the features of the classes near those of the
    classifier's templates; the authors take a template for each data set there. Their code also builds a meta-network
    and an adapter, which it never uses.

    Args:
        weight: of the term; 8 in the paper.
    """

    init_text: str | None = field(default="a photo of a", metadata={"help": "Words to start from."})
    weight: float = field(default=8.0, metadata={"help": "Of the distance to the features of the templates."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_number("weight", 0.0)

    def equation(self, classifier: ZeroShotClassifier, vectors: Tensor) -> LanguageEquation:
        """The equation with these vectors."""
        assert self.class_names is not None
        return GuidedContext(vectors, self.class_names, self.position, self.weight)
