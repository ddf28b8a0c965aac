"""The models of the demonstration: a checkpoint with a new head, and how its images are prepared."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers import logging as transformers_logging

from ..backbones.finding import find_backbone
from ..core.registry import Method
from ..peft_methods.methods import PeftMethod


@dataclass(frozen=True)
class PixelOptions:
    """The preprocessing of images.

    Attributes:
        image_size: side of the input, pixels.
        mean: of the normalisation, a channel.
        std: likewise.
        rescale_factor: what bytes are multiplied with before that.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float = 1 / 255


def pixel_options(name: str, image_size: int | None) -> PixelOptions:
    """Read a checkpoint's normalisation, and its image size unless one is given.

    Raises:
        ValueError: the image processor does not say what is needed.
        OSError: there is no such checkpoint, or none with an image processor.
    """
    processor = AutoImageProcessor.from_pretrained(name)
    if image_size is None:
        cropped = getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None)
        size = dict(cropped or processor.size)
        image_size = size.get("height", size.get("shortest_edge"))
        if image_size is None:
            raise ValueError(f"The image processor of {name} has size {size}: choose --image_size.")
    if not getattr(processor, "do_normalize", True):
        return PixelOptions(image_size, (0.0,) * 3, (1.0,) * 3)
    if not (getattr(processor, "image_mean", None) and getattr(processor, "image_std", None)):
        raise ValueError(f"The image processor of {name} has no image_mean and image_std: choose another checkpoint.")
    factor = getattr(processor, "rescale_factor", None) or 1 / 255
    return PixelOptions(image_size, tuple(processor.image_mean), tuple(processor.image_std), factor)


def load_classifier(name: str, labels: tuple[str, ...]) -> PreTrainedModel:
    """Load a checkpoint with a head for these classes, new where the checkpoint's does not fit.

    Args:
        name: checkpoint on the Hub or on disk.
        labels: class names.

    Raises:
        ValueError: the model has no image-classification head, or the checkpoint lacks weights besides the head's.
        OSError: there is no such checkpoint.
    """
    config = AutoConfig.from_pretrained(
        name,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the report that the head is new; the rest of it is checked below
    try:
        model, loading = AutoModelForImageClassification.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, output_loading_info=True
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    heads = head_modules(model)
    changed = [str(key[0] if isinstance(key, tuple) else key) for key in loading["mismatched_keys"]]
    empty = sorted({*map(str, loading["missing_keys"]), *changed})
    empty = [key for key in empty if not any(key.startswith(f"{head}.") for head in heads)]
    if empty:
        raise ValueError(
            f"{name} does not fill {type(model).__name__}: {len(empty)} weights besides the head are missing or of "
            f"another shape, e.g. {', '.join(empty[:3])}. Choose a checkpoint of the whole backbone."
        )
    return model


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The task heads by name.

    Raises:
        ValueError: there is none.
    """
    heads = {path: model.get_submodule(path) for path in find_backbone(model).heads}
    if not heads:
        raise ValueError(f"{type(model).__name__} has no task head: the demonstration needs a classifier.")
    return heads


def keep_head_only(model: nn.Module) -> None:
    """Freeze everything but the task heads: a linear probe."""
    model.requires_grad_(False)
    for head in head_modules(model).values():
        head.requires_grad_(True)


def default_config(method: Method | PeftMethod, model: nn.Module, image_size: int) -> PeftConfig:
    """A method's config with its defaults, and with the image size if it depends on that."""
    if isinstance(method, PeftMethod):
        return method.config(model)
    names = {field.name for field in fields(method.config_cls)}
    config: Any = model.config
    patch = getattr(getattr(config, "vision_config", config), "patch_size", None)
    fitted = {"grid_size": image_size // patch} if "grid_size" in names and isinstance(patch, int) else {}
    return method.config_cls(**fitted)


def forward_options(model: nn.Module, image_size: int) -> dict[str, Any]:
    """Extra arguments that a model's `forward` needs for images of this size.

    Some families interpolate their positions by themselves, others only if an argument says so.
    """
    told = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    config: Any = model.config
    native = getattr(getattr(config, "vision_config", config), "image_size", None)
    return {"interpolate_pos_encoding": True} if told and native not in (image_size, [image_size] * 2) else {}
