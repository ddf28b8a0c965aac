"""Methods that take something from labelled images before they classify or train, without steps of an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .config import LanguageConfig
from .slot import LanguageEquation
from .steps import active, config_of, require_names
from .towers import evaluating
from .view import View


class SupportEquation(LanguageEquation):
    """Base of the equations that `fit` gives labelled images.

    Args:
        names: of the adapter's classes.
        support: number of images that it was given; None: none yet.
    """

    def __init__(self, names: Sequence[str], support: int | None) -> None:
        super().__init__()
        self.names = list(names)
        self.support = support

    def take(self, view: View, features: Tensor, labels: Tensor) -> None:
        """Take what is needed from images.

        Args:
            view: of the classifier, without images.
            features: of the images, not normalised.
            labels: their classes.
        """
        raise NotImplementedError

    def require_support(self) -> None:
        """Check that it has been given images.

        Raises:
            ValueError: it has not.
        """
        if self.support is None:
            raise ValueError(
                "The adapter has seen no images yet. Call hf_visual_peft.fit(model, dataloader) with the labelled "
                "images first, then make the optimizer, if it trains."
            )


@dataclass
class SupportConfig(LanguageConfig):
    """Base of the configs of these methods.

    Args:
        support_size: number of labelled images; filled in by `hf_visual_peft.fit`.
    """

    support_size: int | None = field(default=None, metadata={"help": "Filled in by hf_visual_peft.fit."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.support_size is not None:
            self._require_integer("support_size", 1)


@torch.no_grad()
def fit(model: nn.Module, dataloader: Iterable[Mapping[str, Any]]) -> None:
    """Give the active adapter labelled images, in methods that take something from them without an optimizer.

    The image tower runs once on every batch, in evaluation mode. With several processes, each must see all images.

    Args:
        model: a `ZeroShotClassifier` with an adapter of Tip-Adapter, LP++, CLAP or ProKeR.
        dataloader: batches with `labels` and the inputs of the image tower, such as `pixel_values`, or with
            `image_features`.

    Raises:
        ValueError: the adapter takes no images, there are none, or a label does not fit; nothing has changed then.
    """
    base, equation = active(model)
    if base is None or not isinstance(equation, SupportEquation):
        name = type(model if equation is None else equation).__name__
        raise ValueError(
            f"fit: {name} takes no images in this way. Methods that do: Tip-Adapter, LP++, CLAP and ProKeR, active on "
            "a ZeroShotClassifier; train others with an optimizer."
        )
    require_names("fit", base, equation.names)
    features, labels = [], []
    with evaluating([base]):
        for batch in dataloader:
            images = {name: value.to(base.device) for name, value in batch.items() if name != "labels"}
            features.append(View(base, images).image.float())
            labels.append(torch.as_tensor(batch["labels"]).to(base.device))
    if not labels:
        raise ValueError("fit: the dataloader has no batch.")
    wanted = torch.cat(labels)
    if wanted.ndim != 1 or wanted.is_floating_point() or not 0 <= wanted.min() <= wanted.max() < len(equation.names):
        raise ValueError(f"fit: labels must be indices from 0 to {len(equation.names) - 1}, one for each image.")
    equation.take(View(base, {}), torch.cat(features), wanted)
    equation.support = len(wanted)
    config_of(base, equation).support_size = len(wanted)
