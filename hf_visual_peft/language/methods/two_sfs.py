"""2SFS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...core.registry import Paper
from ..classifier import ZeroShotClassifier
from ..config import USUAL, LanguageConfig, register_language
from ..own_weights import OwnWeights
from ..rows import by_name
from ..slot import LanguageEquation
from ..steps import active, config_of, require_names
from ..towers import evaluating
from ..view import FEATURES, Outcome, View, normalised


class TwoStages(LanguageEquation):
    """The LayerNorms of both towers, and after them a feature for each class.

        stage 1: logits = scale cos(I(image), T(text_k)), the LayerNorms of I and T train
        stage 2: logits = scale cos(I(image), W_k), W from T at its end, W trains

    Args:
        norms: the weights of the LayerNorms.
        names: of the classes.
        head: W, (classes, width); None in stage 1.
    """

    def __init__(self, norms: OwnWeights, names: Sequence[str], head: Tensor | None) -> None:
        super().__init__()
        self.norms = norms
        self.names = list(names)
        self.head = None if head is None else nn.Parameter(head)

    def forward(self, view: View) -> Outcome:
        """The logits of the stage."""
        if self.head is None:
            image, text = view.image_by(self.norms.by_name()), self._texts(view)
            return Outcome(view.compare(image, text), image, text)
        known = set(view.names) <= set(self.names)
        others = self.head.new_zeros(len(view.names), 1) if known else normalised(self._texts(view))
        text = by_name(self.head, self.names, view.names, others)
        if FEATURES in view.images:
            image = view.image
        else:
            with evaluating([view.classifier.towers.model]):  # it trains no more
                image = view.image_by(self.norms.by_name())
        return Outcome(view.compare(image, text), image, text)

    def _texts(self, view: View) -> Tensor:
        return view.kept(self, lambda: view.text_by(self.norms.by_name()))

    def begin_second(self, view: View) -> None:
        """Freeze the LayerNorms, and start the features of the classes from their texts."""
        with evaluating([view.classifier.towers.model]):
            head = normalised(self._texts(view))
        self.norms.freeze()
        self.head = nn.Parameter(head.detach().clone())


def second_stage(model: nn.Module) -> None:
    """Let the active adapter of 2SFS pass to its second stage: features of the classes train on frozen features.

    Make the optimizer after it. From now on the model also takes `image_features`: those that the adapted image tower
    gave, which are the same in every step.

    Args:
        model: a `ZeroShotClassifier` with an adapter of 2SFS in its first stage.

    Raises:
        ValueError: the active adapter is none, or is in its second stage already; nothing has changed then.
    """
    base, equation = active(model)
    if base is None or not isinstance(equation, TwoStages):
        name = type(model if equation is None else equation).__name__
        raise ValueError(f"second_stage: {name} has no stages. The active adapter must be one of TwoSFSConfig.")
    if equation.head is not None:
        raise ValueError("second_stage: the adapter is in its second stage already.")
    require_names("second_stage", base, equation.names)
    with torch.no_grad():
        equation.begin_second(View(base, {}))
    config_of(base, equation).stage = 2


@register_language(
    name="two_sfs",
    paper=Paper("Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages", "CVPR 2025", "2503.11609"),
    equation="the LayerNorms of both towers train, then a feature for each class from its adapted text",
    counts=(({}, 100, 65_536), ({"stage": 2}, 100, 51_200)),
    training=replace(USUAL, learning_rate=2e-4),
)
@dataclass
class TwoSFSConfig(LanguageConfig):
    """Config of two-stage few-shot adaptation (2SFS), arXiv 2503.11609.

    First the LayerNorms of both towers train; `hf_visual_peft.second_stage` then freezes them, and a feature for each
    class trains, from its text as the adapted tower reads it. A class goes with its name: known ones have the feature
    that was learned, new ones that of the adapted text tower. A run has 300 steps for each image of a class, AdamW at
    0.0002 with a cosine in each stage. Norms do not decay in `parameter_groups`; in the authors' code they do.

    Args:
        stage: 1 or 2; `second_stage` sets it.
        first_stage: share of the steps in stage 1, for recipes.
    """

    stage: int = field(default=1, metadata={"help": "1 or 2; set by hf_visual_peft.second_stage."})
    first_stage: float = field(default=0.6, metadata={"help": "Share of the steps in the first stage, for recipes."})

    needs_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_choice("stage", (1, 2))
        self._require_number("first_stage", 0.0, below=1.0)

    def starts_from_texts(self) -> bool:
        """Always: the norms are those of the dual encoder."""
        return True

    def build(self, classifier: ZeroShotClassifier) -> TwoStages:
        """The LayerNorms, and in stage 2 a feature for each class."""
        assert self.class_names is not None
        encoder = classifier.encoder
        owners = dict(encoder.named_modules())
        of_images, found = set(classifier.towers.image_weights), []
        for name, _ in encoder.named_parameters():
            if isinstance(owners[name.rpartition(".")[0]], nn.LayerNorm):
                found.append(name)
        for tower, there in (("image", of_images & set(found)), ("text", set(found) - of_images)):
            if not there:
                raise ValueError(
                    f"TwoSFSConfig: the {tower} tower of {type(encoder).__name__} has no LayerNorm to train. Take a "
                    "dual encoder of two transformers, or another method, such as clip_lora()."
                )
        head = classifier.features_of(self.class_names) if self.stage == 2 else None
        return TwoStages(OwnWeights(encoder, found, trains=self.stage == 1), self.class_names, head)
