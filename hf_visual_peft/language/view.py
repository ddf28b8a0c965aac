"""What a method sees of a classifier in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tokens import Position, Tokens
from .towers import Towers


class TextClassifier(Protocol):
    """What a view needs of `ZeroShotClassifier`, which explains these."""

    @property
    def towers(self) -> Towers: ...  # noqa: D102

    @property
    def logit_scale(self) -> nn.Module: ...  # noqa: D102

    @property
    def class_names(self) -> list[str]: ...  # noqa: D102

    def scale(self) -> tuple[Tensor, Tensor | None]: ...  # noqa: D102

    def parameters(self) -> Iterator[nn.Parameter]: ...  # noqa: D102

    def class_features(self, raw: bool = False) -> Tensor: ...  # noqa: D102

    def texts_with_slots(self, count: int, position: Position, before: str = "") -> Tokens: ...  # noqa: D102

    def encode_tokens(  # noqa: D102
        self, tokens: Tokens, rows: Tensor | None = None, deep: Mapping[int, Tensor] | None = None
    ) -> Tensor: ...

    def class_features_by(self, weights: Mapping[str, Tensor], drawn: bool = False) -> Tensor: ...  # noqa: D102

    def kept(self, equation: nn.Module, compute: Callable[[], Tensor]) -> Tensor: ...  # noqa: D102


FEATURES = "image_features"  # argument of the classifier, in the place of images


@dataclass
class Outcome:
    """The result of a forward pass before the loss.

    Attributes:
        logits: (images, classes).
        image: features of the images.
        text: features of the classes, (classes, width) or (images, classes, width).
    """

    logits: Tensor
    image: Tensor
    text: Tensor


class View:
    """A classifier and the images of one forward pass. What is asked for is computed, and computed once.

    Args:
        classifier: the classifier.
        images: arguments of its image tower, or the features that it gave for the images.
    """

    def __init__(self, classifier: TextClassifier, images: dict[str, Any]) -> None:
        self.classifier = classifier
        self.images = images

    @property
    def names(self) -> Sequence[str]:
        """Of the classes."""
        return self.classifier.class_names

    @cached_property
    def image(self) -> Tensor:
        """Features of the images, not normalised: (images, width)."""
        if FEATURES in self.images:
            features: Tensor = self.images[FEATURES]
            return features
        return self.classifier.towers.encode_image(**self.images)

    def encode_image(self, tokens: Mapping[int, Tensor]) -> Tensor:
        """Features of the images with learned tokens among theirs.

        Args:
            tokens: by block: tokens before it, (tokens, width).

        Raises:
            ValueError: there are features in the place of images.
        """
        return self.classifier.towers.encode_image_with(tokens, **self.pixels())

    def pixels(self) -> dict[str, Any]:
        """The arguments of the image tower, for a method that acts inside.

        Raises:
            ValueError: there are features in the place of images.
        """
        if FEATURES in self.images:
            raise ValueError(
                f"{FEATURES}: the adapter acts inside the image tower, whose outputs are not known before. Give "
                "pixel_values."
            )
        return self.images

    def image_by(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Features of the images, computed with other weights.

        Args:
            weights: in the place of those of the dual encoder, by name.

        Raises:
            ValueError: there are features in the place of images.
        """
        return self.classifier.towers.encode_image_by(weights, **self.pixels())

    def text_by(self, weights: Mapping[str, Tensor], drawn: bool = False) -> Tensor:
        """Features of the classes by the templates, computed with other weights.

        Args:
            weights: in the place of those of the dual encoder, by name.
            drawn: by one template for each class, drawn at random, instead of all.
        """
        return self.classifier.class_features_by(weights, drawn)

    @cached_property
    def text(self) -> Tensor:
        """Features of the classes by the templates: (classes, width)."""
        return self.classifier.class_features()

    @cached_property
    def raw_text(self) -> Tensor:
        """The mean over templates of features that are not normalised."""
        return self.classifier.class_features(raw=True)

    @cached_property
    def scale(self) -> Tensor:
        """The factor of the cosine in the logits."""
        return self.classifier.scale()[0]

    def encode(self, tokens: Tokens, rows: Tensor, deep: Mapping[int, Tensor] | None = None) -> Tensor:
        """Features of texts with learned vectors in them.

        Args:
            tokens: the texts.
            rows: the vectors, (texts or 1, slots, width).
            deep: by block: vectors for the slots at its input, (texts or 1, slots, width).
        """
        return self.classifier.encode_tokens(tokens, rows, deep)

    def kept(self, equation: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
        """Features of the classes that depend on an equation's weights; kept in evaluation.

        Args:
            equation: on whose weights they depend.
            compute: makes them.
        """
        return self.classifier.kept(equation, compute)

    def compare(self, image: Tensor, text: Tensor, learned: bool = True) -> Tensor:
        """Logits of the model: scale x cosine, and SigLIP's bias.

        Args:
            image: (images, width).
            text: (classes, width), or (images, classes, width).
            learned: with what an adapter learned of the scale; False: as the dual encoder has it.
        """
        scale, bias = self.classifier.towers.scale()
        image, text = normalised(image), normalised(text)
        with torch.autocast(image.device.type, enabled=False):  # a scale of 100 needs all digits
            cosine = (text @ image.unsqueeze(-1)).squeeze(-1) if text.ndim == 3 else image @ text.T.to(image)
            logits = cosine * scale.to(cosine)
            logits = self.classifier.logit_scale(logits) if learned else logits
        return logits if bias is None else logits + bias.to(logits)

    def zero_shot(self) -> Outcome:
        """The result by the templates alone."""
        return Outcome(self.compare(self.image, self.text), self.image, self.text)


def normalised(features: Tensor) -> Tensor:
    """Features divided by their L2 norm, in float32 or better."""
    return F.normalize(features if features.element_size() > 2 else features.float(), dim=-1)
