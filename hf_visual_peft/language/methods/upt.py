"""UPT."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation

from ...core.registry import Paper
from ..classifier import ZeroShotClassifier
from ..config import LanguageConfig, register_language
from ..slot import LanguageEquation
from ..tokens import Position
from ..view import Outcome, View


class UnifiedPrompts(LanguageEquation):
    """Prompts of texts and images that pass one small transformer layer together.

        X = [V D_t; U D_v] with biases; Y = X + attention(LN X); Z = Y + MLP(LN Y); V' = Z_text E_t, U' = Z_image E_v

    Args:
        text: V, (slots, width).
        image: U, (tokens, width of the image tower).
        hidden: width inside the layer.
        position: of the class name among the slots.
    """

    def __init__(self, text: Tensor, image: Tensor, hidden: int, position: Position) -> None:
        super().__init__()
        self.text_prompts, self.image_prompts = nn.Parameter(text), nn.Parameter(image)
        self.text_down, self.image_down = nn.Linear(text.shape[-1], hidden), nn.Linear(image.shape[-1], hidden)
        self.text_up, self.image_up = nn.Linear(hidden, text.shape[-1]), nn.Linear(hidden, image.shape[-1])
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = nn.MultiheadAttention(hidden, 1)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), QuickGELUActivation(), nn.Linear(4 * hidden, hidden))
        self.position = position

    def prompts(self) -> tuple[Tensor, Tensor]:
        """The prompts of texts and of images."""
        x = torch.cat([self.text_down(self.text_prompts), self.image_down(self.image_prompts)])
        inner = self.norm1(x)
        x = x + self.attention(inner, inner, inner, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        text, image = x.split([len(self.text_prompts), len(self.image_prompts)])
        return self.text_up(text), self.image_up(image)

    def forward(self, view: View) -> Outcome:
        """The logits with both."""
        text_prompts, image_prompts = self.prompts()
        tokens = view.classifier.texts_with_slots(len(text_prompts), self.position)
        text = view.kept(self, lambda: view.encode(tokens, text_prompts.unsqueeze(0)))
        image = view.encode_image({0: image_prompts})
        return Outcome(view.compare(image, text), image, text)


@register_language(
    name="upt",
    paper=Paper("Unified Vision and Language Prompt Learning", "arXiv 2022", "2210.07225"),
    equation="[V'; U'] = E layer(D [V; U]): prompts of texts and images through one transformer layer",
    counts=(({}, 100, 532_608),),
)
@dataclass
class UPTConfig(LanguageConfig):
    """Config of unified prompt tuning (UPT), arXiv 2210.07225, with the sizes of its re-implementation in MVLPT.

    Args:
        num_virtual_tokens: learned vectors a text, with the class name in their middle.
        num_vision_tokens: learned tokens an image.
        hidden: width inside the layer.
    """

    num_virtual_tokens: int = field(default=4, metadata={"help": "Learned vectors a text."})
    num_vision_tokens: int = field(default=4, metadata={"help": "Learned tokens an image."})
    hidden: int = field(default=128, metadata={"help": "Width inside the layer."})

    needs_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_virtual_tokens", "num_vision_tokens", "hidden"):
            self._require_integer(name, 1)

    def build(self, classifier: ZeroShotClassifier) -> LanguageEquation:
        """The prompts and the layer."""
        towers = classifier.towers
        assert len(towers.image_blocks)  # refuses image towers that take no tokens
        classifier.texts_with_slots(self.num_virtual_tokens, "middle")
        patch = towers.model.vision_model.config.patch_size
        bound = math.sqrt(6 / (3 * patch * patch + towers.image_width))
        text = torch.empty(self.num_virtual_tokens, towers.text_width).normal_(std=0.02)
        image = torch.empty(self.num_vision_tokens, towers.image_width).uniform_(-bound, bound)
        return UnifiedPrompts(text, image, self.hidden, "middle")
