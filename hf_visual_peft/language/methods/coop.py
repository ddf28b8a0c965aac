"""CoOp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...core.registry import Paper
from ..classifier import ZeroShotClassifier
from ..config import LanguageConfig, register_language
from ..rows import by_name
from ..slot import LanguageEquation
from ..tokens import POSITIONS, Position
from ..view import Outcome, View


class Context(LanguageEquation):
    """Learned vectors in the text of every class.

        text_k = T([start; V_1 .. V_M; name_k; ending; end]), or V_k for each class

    Args:
        vectors: (slots, width), or (classes, slots, width).
        names: of these classes.
        position: of the class name.
    """

    why_not_merged = "learned vectors stand among the words of every text, of new names too"

    def __init__(self, vectors: Tensor, names: Sequence[str], position: Position) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)
        self.names = list(names)
        self.position = position

    def rows(self, view: View) -> Tensor:
        """The vectors for the slots of all classes, (classes or 1, slots, width)."""
        if self.vectors.ndim == 2:
            return self.vectors.unsqueeze(0)
        return by_name(self.vectors, self.names, view.names, self.vectors.mean(0, keepdim=True))

    def text(self, view: View) -> Tensor:
        """Features of the classes."""
        tokens = view.classifier.texts_with_slots(self.vectors.shape[-2], self.position)
        return view.encode(tokens, self.rows(view))

    def forward(self, view: View) -> Outcome:
        """The logits with the learned texts."""
        text = view.kept(self, lambda: self.text(view))
        return Outcome(view.compare(view.image, text), view.image, text)


@register_language(
    name="coop",
    paper=Paper("Learning to Prompt for Vision-Language Models", "IJCV 2022", "2109.01134"),
    equation="text_k = T([start; V; name_k; .; end]), V learned",
    counts=(
        ({}, 100, 8_192),
        ({"num_virtual_tokens": 4}, 100, 2_048),
        ({"class_specific": True}, 100, 819_200),
    ),
)
@dataclass
class CoOpConfig(LanguageConfig):
    """Config of context optimisation (CoOp), arXiv 2109.01134.

    Learned vectors stand in the place of a template's words, in the token embeddings of every class's text. The text
    is the learned vectors, the class name and a full stop. Loaded under other names, shared vectors serve them as they
    are. Vectors of one class go with its name, and new names get the mean of all.

    Args:
        num_virtual_tokens: learned vectors a text; None: 16, or as many as `init_text` has tokens.
        init_text: words whose embeddings are the start; None: N(0, 0.02^2).
        class_specific: vectors of its own for each class.
        position: of the class name: `"front"`, `"middle"` or `"end"`.
    """

    num_virtual_tokens: int | None = field(default=None, metadata={"help": "Learned vectors a text; default: 16."})
    init_text: str | None = field(default=None, metadata={"help": "Words to start from; default: random."})
    class_specific: bool = field(default=False, metadata={"help": "Vectors of its own for each class."})
    position: Position = field(default="end", metadata={"help": "Of the class name."})

    default_tokens: ClassVar[int] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_virtual_tokens is not None:
            self._require_integer("num_virtual_tokens", 1)
        if self.init_text is not None and (type(self.init_text) is not str or not self.init_text.strip()):
            self._fail("init_text", "None or words")
        self._require_choice("class_specific", (True, False))
        self._require_choice("position", POSITIONS)

    def starts_from_texts(self) -> bool:
        """If its vectors start as words."""
        return self.init_text is not None

    def build(self, classifier: ZeroShotClassifier) -> LanguageEquation:
        """The vectors, and a check that every text is short enough."""
        vectors = self.start(classifier)
        assert self.class_names is not None
        classifier.texts_with_slots(len(vectors), self.position)
        if self.class_specific:
            vectors = vectors.expand(len(self.class_names), -1, -1).clone()
            if self.init_text is None:
                nn.init.normal_(vectors, std=0.02)
        return self.equation(classifier, vectors)

    def equation(self, classifier: ZeroShotClassifier, vectors: Tensor) -> LanguageEquation:
        """The equation with these vectors."""
        assert self.class_names is not None
        return Context(vectors, self.class_names, self.position)

    def start(self, classifier: ZeroShotClassifier) -> Tensor:
        """The first values of the vectors, (slots, width); they fill in `num_virtual_tokens`."""
        embedding = classifier.towers.embedding
        if self.init_text is None:
            self.num_virtual_tokens = self.num_virtual_tokens or self.default_tokens
            return torch.empty(self.num_virtual_tokens, classifier.towers.text_width).normal_(std=0.02)
        ids = classifier.writer.words(self.init_text)
        if self.num_virtual_tokens not in (None, len(ids)):
            self._fail("num_virtual_tokens", f"None or {len(ids)}, the number of tokens of {self.init_text!r}")
        self.num_virtual_tokens = len(ids)
        with torch.no_grad():
            return embedding(torch.tensor(ids, device=embedding.weight.device)).float().clone()
