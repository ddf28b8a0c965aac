"""Independent prompts for images and texts (IVLP)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...core.registry import Paper
from ..classifier import ZeroShotClassifier
from ..config import LanguageConfig, register_language
from ..slot import LanguageEquation
from ..view import Outcome, View


class JointPrompts(LanguageEquation):
    """Learned vectors in the texts and learned tokens among those of the images, in the first blocks of both towers.

        text_k = T([start; V_0; words; name_k; .; end]), V_j in its slots at the input of block j
        image = I([class; patches; U_0]), U_j in the place of U_0 at the input of block j

    Args:
        texts: V_0, V_1, ..., each (slots, width).
        images: U_0, U_1, ..., each (tokens, width of the image tower).
        before: words between the vectors and the name.
    """

    why_not_merged = "learned tokens act inside both towers"

    def __init__(self, texts: Sequence[Tensor], images: Sequence[Tensor], before: str) -> None:
        super().__init__()
        self.texts = nn.ParameterList(texts)
        self.images = nn.ParameterList(images)
        self.before = before

    def tokens(self) -> dict[int, Tensor]:
        """The tokens of the images, by block."""
        return dict(enumerate(self.images))

    def text(self, view: View) -> Tensor:
        """Features of the classes."""
        tokens = view.classifier.texts_with_slots(len(self.texts[0]), "end", self.before)
        first, *others = (each.unsqueeze(0) for each in self.texts)
        return view.encode(tokens, first, dict(enumerate(others, 1)))

    def forward(self, view: View) -> Outcome:
        """The logits with learned texts and images."""
        text = view.kept(self, lambda: self.text(view))
        image = view.encode_image(self.tokens())
        return Outcome(view.compare(image, text), image, text)


@dataclass
class JointConfig(LanguageConfig):
    """Base of the configs of prompts in both towers.

    Args:
        num_virtual_tokens: learned vectors a text.
        init_text: words whose embeddings are the first ones' start; words that are left over stay in front of the
            name. None: N(0, 0.02^2).
        depth: number of blocks of each tower that have prompts of their own; None: the method's share of them.
    """

    num_virtual_tokens: int = field(default=2, metadata={"help": "Learned vectors a text."})
    init_text: str | None = field(default="a photo of a", metadata={"help": "Words to start from."})
    depth: int | None = field(default=None, metadata={"help": "Blocks with prompts; default: the method's share."})

    needs_images: ClassVar[bool] = True
    share: ClassVar[float] = 1.0  # of the blocks

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("num_virtual_tokens", 1)
        if self.init_text is not None and (type(self.init_text) is not str or not self.init_text.strip()):
            self._fail("init_text", "None or words")
        if self.depth is not None:
            self._require_integer("depth", 1)

    def text_vectors(self, classifier: ZeroShotClassifier) -> tuple[list[Tensor], str]:
        """The vectors of the texts, and the words that stay in front of the names; fills in `depth`."""
        towers = classifier.towers
        most = min(len(towers.text_blocks), len(towers.image_blocks))
        self.depth = max(1, round(self.share * most)) if self.depth is None else self.depth
        self._require_integer("depth", 1, most, "the number of blocks of the shallower tower")
        shape = self.num_virtual_tokens, towers.text_width
        vectors = [torch.empty(shape).normal_(std=0.02) for _ in range(self.depth)]
        before = ""
        if self.init_text is not None:
            ids = classifier.writer.words(self.init_text)
            if len(ids) < self.num_virtual_tokens:
                self._fail("num_virtual_tokens", f"at most {len(ids)}, the number of tokens of {self.init_text!r}")
            before = classifier.tokenizer.decode(ids[self.num_virtual_tokens :]).strip()
            start = torch.tensor(ids[: self.num_virtual_tokens], device=towers.embedding.weight.device)
            with torch.no_grad():
                vectors[0] = towers.embedding(start).float().clone()
        classifier.texts_with_slots(self.num_virtual_tokens, "end", before)
        return vectors, before


@register_language(
    name="ivlp",
    paper=Paper("MaPLe: Multi-modal Prompt Learning (independent prompts)", "CVPR 2023", "2210.03117"),
    equation="V_j in the texts' slots and U_j after the images' tokens, at the input of block j; all learned",
    counts=(({}, 100, 30_720), ({"depth": 9}, 100, 23_040)),
)
@dataclass
class IVLPConfig(JointConfig):
    """Config of independent vision-language prompts (IVLP), a baseline in arXiv 2210.03117 and the base of PromptSRC.

    Vectors in the texts and tokens among those of the images, for each of the first blocks. The tokens of the images
    join before the norm in front of the blocks, where there is one, and leave after the last block.

    Args:
        num_vision_tokens: learned tokens an image.
    """

    num_vision_tokens: int = field(default=2, metadata={"help": "Learned tokens an image."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("num_vision_tokens", 1)

    def build(self, classifier: ZeroShotClassifier) -> LanguageEquation:
        """The vectors and tokens."""
        texts, before = self.text_vectors(classifier)
        shape = self.num_vision_tokens, classifier.towers.image_width
        return self.equation(texts, [torch.empty(shape).normal_(std=0.02) for _ in texts], before)

    def equation(self, texts: list[Tensor], images: list[Tensor], before: str) -> LanguageEquation:
        """The equation with these."""
        return JointPrompts(texts, images, before)
