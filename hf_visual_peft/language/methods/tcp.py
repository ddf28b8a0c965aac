"""TCP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers.activations import QuickGELUActivation

from ...core.registry import Paper
from ..classifier import ZeroShotClassifier
from ..config import register_language
from ..slot import LanguageEquation
from ..tokens import Position
from ..view import View, normalised
from .kgcoop import GuidedContext, KgCoOpConfig


class ClassAwareContext(GuidedContext):
    """KgCoOp whose slots hold vectors of each class from one block of the text tower on.

        C_k = Q2 quickgelu(Q1 text0_k / |text0_k| + b1) + b2, in the place of the slots at the block's input

    Args:
        vectors: (slots, width).
        names: as of `Context`.
        position: as of `Context`.
        weight: as of `GuidedContext`.
        inputs: width of the features.
        hidden: width inside the network.
        block: index of the block.
    """

    def __init__(
        self,
        vectors: Tensor,
        names: Sequence[str],
        position: Position,
        weight: float,
        inputs: int,
        hidden: int,
        block: int,
    ) -> None:
        super().__init__(vectors, names, position, weight)
        self.meta = nn.Sequential(nn.Linear(inputs, hidden), QuickGELUActivation(), nn.Linear(hidden, vectors.numel()))
        self.block = block

    def text(self, view: View) -> Tensor:
        """Features of the classes."""
        tokens = view.classifier.texts_with_slots(len(self.vectors), self.position)
        own = self.meta(normalised(view.text).to(self.vectors.dtype)).unflatten(-1, self.vectors.shape)
        return view.encode(tokens, self.rows(view), {self.block: own})


@register_language(
    name="tcp",
    paper=Paper("TCP: Textual-based Class-aware Prompt Tuning for Visual-Language Model", "CVPR 2024", "2311.18231"),
    equation="KgCoOp; at one block's input the slots become Q2 quickgelu(Q1 text0_k)",
    counts=(({}, 100, 331_904),),
)
@dataclass
class TCPConfig(KgCoOpConfig):
    """Config of textual-based class-aware prompt tuning (TCP), arXiv 2311.18231.

    KgCoOp, and a network that makes vectors of each class from the features of its templates' texts. They replace what
    stands in the slots at the input of one block. New names go through the network as well. The authors train with
    Adam and an epsilon of 1e-3.

    Args:
        hidden: width inside the network.
        block: index of the block; None: after two thirds of them, 8 of 12 as in the paper.
    """

    hidden: int = field(default=128, metadata={"help": "Width inside the network."})
    block: int | None = field(default=None, metadata={"help": "Index of the block; default: after two thirds."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("hidden", 1)
        self._require_unset("class_specific", "as the network makes vectors of each class")

    def starts_from_texts(self) -> bool:
        """Never: its network starts at random."""
        return False

    def equation(self, classifier: ZeroShotClassifier, vectors: Tensor) -> LanguageEquation:
        """The equation with these vectors."""
        assert self.class_names is not None
        depth = len(classifier.towers.text_blocks)
        self.block = depth * 2 // 3 if self.block is None else self.block
        self._require_integer("block", 0, depth - 1, "the text tower's last block")
        return ClassAwareContext(
            vectors, self.class_names, self.position, self.weight, classifier.width, self.hidden, self.block
        )
