"""PLOT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ...core.registry import Paper
from ..classifier import ZeroShotClassifier
from ..config import register_language
from ..slot import LanguageEquation
from ..tokens import Position
from ..view import Outcome, View, normalised
from .coop import Context, CoOpConfig


EPSILON, ROUNDS, STOP, LOOK = 0.1, 100, 1e-2, 10


@torch.no_grad()
def transport(similarity: Tensor) -> Tensor:
    """The plan that moves patches to prompts at the least cost 1 - similarity, by Sinkhorn's iterations.

    They end when the scales of the patches change by less than 0.01 in the mean, or after 100.

    Args:
        similarity: (pairs, patches, prompts).
    """
    kernel = ((similarity.float() - 1) / EPSILON).exp()
    rows, columns = 1 / kernel.shape[1], 1 / kernel.shape[2]
    left = torch.ones_like(kernel[:, :, 0])
    right = torch.ones_like(kernel[:, 0, :])
    going = torch.ones((), dtype=torch.bool, device=kernel.device)
    for number in range(ROUNDS):
        if number % LOOK == 0 and not going:  # looked at seldom: each look waits for the device
            break
        new_left = rows / torch.einsum("bln,bn->bl", kernel, right)
        new_right = columns / torch.einsum("bln,bl->bn", kernel, new_left)
        change = (new_left - left).abs().mean()
        left, right = torch.where(going, new_left, left), torch.where(going, new_right, right)
        going = going & (change >= STOP)
    return left.unsqueeze(2) * kernel * right.unsqueeze(1)


class PromptSet(Context):
    """Several learned texts of each class, compared with the patches of an image by optimal transport.

        S = patches . texts_k, T = transport plan of 1 - S (without gradient), logit_k = scale sum(T S)

    Args:
        vectors: (prompts, slots, width).
        names: as of `Context`.
        position: as of `Context`.
    """

    def __init__(self, vectors: Tensor, names: Sequence[str], position: Position) -> None:
        super().__init__(vectors, names, position)

    def rows(self, view: View) -> Tensor:
        """Not for one text a class."""
        raise NotImplementedError

    def text(self, view: View) -> Tensor:
        """Features of the texts, (prompts, classes, width)."""
        tokens = view.classifier.texts_with_slots(self.vectors.shape[-2], self.position)
        return torch.stack([view.encode(tokens, each.unsqueeze(0)) for each in self.vectors])

    def forward(self, view: View) -> Outcome:
        """The logits by transport."""
        text = view.kept(self, lambda: self.text(view))
        image, patches = view.classifier.towers.encode_patches(**view.pixels())
        prompts = normalised(text)
        with torch.autocast(image.device.type, enabled=False):
            similarity = torch.einsum("bld,nkd->bkln", normalised(patches).to(prompts), prompts)
            plan = transport(similarity.detach().flatten(0, 1)).view_as(similarity)
            logits = view.scale.to(prompts) * (plan * similarity).sum((2, 3))
        return Outcome(logits, image, prompts.mean(0))


@register_language(
    name="plot",
    paper=Paper("PLOT: Prompt Learning with Optimal Transport", "ICLR 2023", "2210.01253"),
    equation="logit_k = scale sum(T S), S = patches . N texts of class k, T the transport plan of 1 - S",
    counts=(({}, 100, 32_768),),
)
@dataclass
class PLOTConfig(CoOpConfig):
    """Config of prompt learning with optimal transport (PLOT), arXiv 2210.01253.

    Several sets of CoOp's vectors. The texts that they give for a class are compared with all patches of an image, in
    the space of the features: patches pass the norm after the last block and the projection. (The authors' ResNet has
    such features itself.) That needs an image tower whose features are a projected token, as CLIP's; SigLIP's pools by
    attention and is refused.

    Args:
        num_prompts: texts a class.
    """

    num_prompts: int = field(default=4, metadata={"help": "Texts a class."})

    needs_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("num_prompts", 1)
        self._require_unset("class_specific", "as the texts of a class are several already")

    def starts_from_texts(self) -> bool:
        """Never: it compares patches."""
        return False

    def equation(self, classifier: ZeroShotClassifier, vectors: Tensor) -> LanguageEquation:
        """The vectors of all texts."""
        assert self.class_names is not None
        classifier.towers.require_patches()
        several = vectors.expand(self.num_prompts, -1, -1).clone()
        several = (
            several + torch.empty_like(several).normal_(std=0.02) if self.init_text else several.normal_(std=0.02)
        )
        return PromptSet(several, self.class_names, self.position)
