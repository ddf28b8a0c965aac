"""MaPLe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ...core.registry import Paper
from ..classifier import ZeroShotClassifier
from ..config import register_language
from ..slot import LanguageEquation
from .ivlp import JointConfig, JointPrompts


class CoupledPrompts(JointPrompts):
    """Prompts of the texts, from which a linear of each block makes those of the images.

        U_j = A_j V_j + b_j

    Args:
        texts: as of `JointPrompts`.
        width: of the image tower.
        before: as of `JointPrompts`.
    """

    def __init__(self, texts: Sequence[Tensor], width: int, before: str) -> None:
        super().__init__(texts, [], before)
        inputs = texts[0].shape[-1]
        self.coupling = nn.ModuleList(nn.Linear(inputs, width) for _ in texts)
        for each in self.coupling[2:]:  # the authors copy one linear for all blocks but the first
            each.load_state_dict(self.coupling[1].state_dict())

    def tokens(self) -> dict[int, Tensor]:
        """The tokens of the images, by block."""
        pairs = zip(self.coupling, self.texts, strict=True)
        return {block: linear(vectors) for block, (linear, vectors) in enumerate(pairs)}


@register_language(
    name="maple",
    paper=Paper("MaPLe: Multi-modal Prompt Learning", "CVPR 2023", "2210.03117"),
    equation="V_j in the texts' slots, U_j = A_j V_j + b_j after the images' tokens, at the input of block j",
    counts=(({}, 100, 3_555_072),),
)
@dataclass
class MaPLeConfig(JointConfig):
    """Config of multi-modal prompt learning (MaPLe), arXiv 2210.03117.

    Vectors in the texts, of which a linear of each block makes tokens of the images. The authors take two vectors in
    the place of "a photo", so that "of a" stays in front of the name, and 9 of 12 blocks, SGD at 0.0035, batch 4 and 5
    epochs.
    """

    share: ClassVar[float] = 0.75

    def build(self, classifier: ZeroShotClassifier) -> LanguageEquation:
        """The vectors and linears."""
        texts, before = self.text_vectors(classifier)
        return CoupledPrompts(texts, classifier.towers.image_width, before)
