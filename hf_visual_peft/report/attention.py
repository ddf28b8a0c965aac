"""Where backbone and adapted model look: attention roll-out of images, drawn over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftConfig, PeftModel
from PIL import Image, ImageOps
from torch import Tensor

from ..backbones.input_size import size_to_tell
from ..sharing.card import CONFIG_NAME
from ..sharing.hub import load_processor
from ..training.images import as_rgb
from .reading import Result
from .rollout import rollout


DARKEST = 0.12  # what is left of the brightness of the least attended patch


@dataclass
class Maps:
    """Maps of images, or why there are none.

    Attributes:
        method: the adapted model's; "" if no result has an adapter.
        reason: why there are no maps; "" if there are.
        pairs: for each image the map of the base and of the adapted model, drawn over the image.
        same: whether adapted and base model attend alike.
    """

    method: str = ""
    reason: str = ""
    pairs: list[tuple[Image.Image, Image.Image]] = field(default_factory=list)
    same: bool = False


def attention_maps(results: Sequence[Result], images: Sequence[Image.Image], side: int) -> Maps:
    """The maps of the most accurate model with an adapter, and of its base.

    Nothing is downloaded: the base must be on this machine.

    Args:
        results: with the folders of their runs.
        images: to look at.
        side: most pixels of a side of a drawn map.
    """
    adapted = [result for result in results if result.folder is not None and (result.folder / CONFIG_NAME).is_file()]
    if not adapted:
        return Maps(reason="No adapter of these runs is on this machine.")
    best = max(adapted, key=lambda result: result.accuracy)
    assert best.folder is not None
    try:
        processor = load_processor(best.folder)
        pixels = processor(images=[as_rgb(image) for image in images], return_tensors="pt")["pixel_values"]
        if pixels.ndim != 4:
            raise ValueError(f"{type(processor).__name__} cuts patches itself.")
        base = _base(best.folder, best.model)
        plain = _maps(base, pixels)
        own = _maps(PeftModel.from_pretrained(base, str(best.folder)).eval(), pixels)
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        return Maps(method=best.name, reason=" ".join(str(error).split()))
    shown = _visible(pixels, processor)
    pairs = [
        (_drawn(image, before, side), _drawn(image, after, side))
        for image, before, after in zip(shown, plain, own, strict=True)
    ]
    return Maps(best.name, pairs=pairs, same=torch.allclose(plain, own, rtol=1e-3, atol=1e-6))


def _base(folder: Path, model: str | None) -> Any:
    """The model that an adapter was trained on, from this machine."""
    config = PeftConfig.from_pretrained(str(folder))
    name = model or config.base_model_name_or_path
    if not name:
        raise ValueError(f"{folder} does not name its base model.")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its table says that the head is new; the adapter brings one
    try:
        return transformers.AutoModelForImageClassification.from_pretrained(
            name, revision=config.revision or "main", dtype=torch.float32, local_files_only=True
        ).eval()
    except OSError as error:
        raise ValueError(f"The base model {name} is not on this machine.") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def _maps(model: Any, pixels: Tensor) -> Tensor:
    size = size_to_tell(model)
    other = size is not None and tuple(pixels.shape[-2:]) != size
    return rollout(model, {"pixel_values": pixels} | ({"interpolate_pos_encoding": True} if other else {}))


def _visible(pixels: Tensor, processor: Any) -> list[Image.Image]:
    """What a model reads, as images."""
    known = getattr(processor, "data_config", None)  # of timm
    if known:
        mean, std = known["mean"], known["std"]
    elif processor.do_normalize:
        mean, std = processor.image_mean, processor.image_std
    else:
        mean, std = [0.0], [1.0]
    colours = torch.tensor(std)[:, None, None] * pixels + torch.tensor(mean)[:, None, None]
    return [Image.fromarray((one.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()) for one in colours]


def _drawn(image: Image.Image, share: Tensor, side: int) -> Image.Image:
    """An image that is the brighter the larger the share of a place, from the least to the greatest of them."""
    image = ImageOps.contain(image, (side, side))
    scaled = (share - share.min()) / (share.max() - share.min()).clamp_min(1e-12)
    bright = Image.fromarray((scaled * 255).byte().numpy()).resize(image.size, Image.Resampling.BICUBIC)
    strength = DARKEST + (1 - DARKEST) * np.asarray(bright, dtype=np.float32)[..., None] / 255
    return Image.fromarray((np.asarray(image) * strength).round().astype(np.uint8))
