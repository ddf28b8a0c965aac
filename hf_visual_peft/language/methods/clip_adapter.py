"""CLIP-Adapter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn

from ...core.registry import Paper
from ..classifier import ZeroShotClassifier
from ..config import USUAL, LanguageConfig, register_language
from ..slot import LanguageEquation
from ..view import Outcome, View


class Bottleneck(nn.Module):
    """A residual bottleneck on features.

        f' = ratio relu(W2 relu(W1 f)) + (1 - ratio) f

    Args:
        width: of the features.
        hidden: inside.
        ratio: of what is added.
    """

    def __init__(self, width: int, hidden: int, ratio: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.ratio = ratio

    def forward(self, features: Tensor) -> Tensor:
        """Map features to features."""
        inner = self.up(self.down(features.to(self.down.weight.dtype)).relu()).relu()
        return self.ratio * inner + (1 - self.ratio) * features


class FeatureAdapters(LanguageEquation):
    """Bottlenecks on the features of images, of classes, or of both; None for none."""

    why_not_merged = "a bottleneck with ReLUs acts on features, of images or of any names"

    def __init__(self, image: Bottleneck | None, text: Bottleneck | None) -> None:
        super().__init__()
        self.image = image
        self.text = text

    def forward(self, view: View) -> Outcome:
        """The logits of the adapted features."""
        image = view.image if self.image is None else self.image(view.image)
        text = view.raw_text if self.text is None else self.text(view.raw_text)
        return Outcome(view.compare(image, text if self.text is not None else view.text), image, text)


@register_language(
    name="clip_adapter",
    paper=Paper("CLIP-Adapter: Better Vision-Language Models with Feature Adapters", "IJCV 2024", "2110.04544"),
    equation="f' = ratio relu(W2 relu(W1 f)) + (1 - ratio) f on features of images, classes, or both",
    counts=(({}, 100, 131_072), ({"side": "both"}, 100, 262_144)),
    training=replace(USUAL, learning_rate=1e-3),
)
@dataclass
class CLIPAdapterConfig(LanguageConfig):
    """Config of CLIP-Adapter, arXiv 2110.04544.

    A residual bottleneck without biases after the projection, on features that are not normalised yet. The authors'
    code has the one for images only.

    Args:
        side: whose features: `"image"`, `"text"` or `"both"`.
        reduction: of the width inside.
        ratio: of the bottleneck's output in the sum.
    """

    side: Literal["image", "text", "both"] = field(default="image", metadata={"help": "Whose features."})
    reduction: int = field(default=4, metadata={"help": "Of the width inside."})
    ratio: float = field(default=0.2, metadata={"help": "Of the bottleneck's output in the sum."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_choice("side", ("image", "text", "both"))
        self._require_integer("reduction", 1)
        self._require_number("ratio", 0.0, below=1.0)

    def build(self, classifier: ZeroShotClassifier) -> LanguageEquation:
        """The bottlenecks."""
        width = classifier.width
        hidden = max(1, width // self.reduction)
        image, text = (
            Bottleneck(width, hidden, self.ratio) if self.side in (side, "both") else None
            for side in ("image", "text")
        )
        return FeatureAdapters(image, text)
