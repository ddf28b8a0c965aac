"""The entry of one architecture in the matrix: a tiny random model, and images for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.modeling_outputs import ImageClassifierOutput


Kind = Literal["plain", "hierarchical", "convolutional", "dense", "timm"]
Size = tuple[int, int]

LABELS: dict[str, Any] = {"num_labels": 3}


def images(batch: int, size: Size, channels: int = 3) -> dict[str, Any]:
    """Random `pixel_values` of (batch, channels, height, width), the same every time."""
    generator = torch.Generator().manual_seed(batch)
    return {"pixel_values": torch.randn(batch, channels, *size, generator=generator)}


@torch.no_grad()
def liven(model: nn.Module) -> nn.Module:
    """The model in eval mode, with the same random change of every initial weight every time."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


@dataclass(frozen=True)
class TinyModel:
    """One architecture of the matrix.

    Attributes:
        name: of the row; for an image classifier of transformers its `model_type`.
        kind: by which the matrix groups rows.
        build: builds the model, with its usual head if it has one.
        size: height and width of its images.
        other_size: another size that it takes; None if it takes only its own.
        interpolates: whether it needs `interpolate_pos_encoding` for another size.
        inputs: returns the model's arguments for a number of samples and their size.
        positional: whether the model's forward takes the pixels as first argument instead of `pixel_values`.
        video: whether its own inputs are videos, (batch, frames, channels, height, width).
        package: extra package that it needs.
    """

    name: str
    kind: Kind
    build: Callable[[], nn.Module]
    size: Size = (32, 32)
    other_size: Size | None = None
    interpolates: bool = False
    inputs: Callable[[int, Size], dict[str, Any]] = images
    positional: bool = False
    video: bool = False
    package: str | None = None

    @property
    def missing_package(self) -> str | None:
        """The package that this architecture needs and that is not installed."""
        return self.package if self.package and importlib.util.find_spec(self.package) is None else None

    def model(self) -> nn.Module:
        """The model in eval mode, with the same random weights every time.

        Every weight is moved away from its initial value: zeros, ones or tiny layer scales must not hide a change of
        the model. Batch norms have the statistics of some images, because with others the signal would vanish.
        """
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model = self.build()
        with torch.no_grad():
            self._measure(liven(model))
        return model.eval()

    def _measure(self, model: nn.Module) -> None:
        norms = {module: module.momentum for module in model.modules() if isinstance(module, _BatchNorm)}
        if not norms:
            return
        for norm in norms:
            norm.momentum = None  # the mean over all batches, of which there is one
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.call(model.train(), self.arguments(8))
        for norm, momentum in norms.items():
            norm.momentum = momentum

    def arguments(self, batch: int, size: Size | None = None) -> dict[str, Any]:
        """Arguments of the model's forward, for images of its own or of another size."""
        made = self.inputs(batch, size or self.size)
        if self.interpolates and size not in (None, self.size):
            made["interpolate_pos_encoding"] = True
        return made

    def call(self, model: nn.Module, arguments: Mapping[str, Any]) -> Any:
        """The model's output."""
        if self.positional:
            return model(arguments["pixel_values"])
        return model(**arguments)


class WithHead(nn.Module):
    """A bare backbone with a classifier of the mean over its last output, as a user writes it.

    Args:
        backbone: whose output has a `last_hidden_state`.
        channels: of that output.
        channels_first: whether it is (batch, channels, height, width); else (batch, ..., channels).
    """

    def __init__(self, backbone: nn.Module, channels: int, channels_first: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(channels, LABELS["num_labels"])
        self.channels_first = channels_first

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> ImageClassifierOutput:
        """Logits of the images."""
        features = self.backbone(pixel_values, **kwargs).last_hidden_state
        features = features.flatten(2).mean(dim=2) if self.channels_first else features.flatten(1, -2).mean(dim=1)
        return ImageClassifierOutput(logits=self.classifier(features))


def by_name(*models: TinyModel) -> MappingProxyType[str, TinyModel]:
    """The catalogue of some architectures.

    Raises:
        ValueError: two have the same name.
    """
    names = [model.name for model in models]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ValueError(f"Two architectures are named {', '.join(double)}: choose another name for one.")
    return MappingProxyType({model.name: model for model in models})
