"""What a backbone says about the images that it was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def image_size(backbone: nn.Module) -> tuple[int, int] | None:
    """Height and width; None if it says nothing.

    Args:
        backbone: of transformers, timm or torchvision.
    """
    holders = (getattr(backbone, "config", None), getattr(backbone, "patch_embed", None), backbone)
    sizes = (getattr(holder, name, None) for holder in holders for name in ("image_size", "img_size"))
    told = next((size for size in sizes if size), None) or _told(backbone).get("input_size", ())[-2:]
    if isinstance(told, Mapping):
        told = (told.get("height"), told.get("width"))
    sides = told if isinstance(told, tuple | list) else (told, told)
    whole = len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides)
    return (sides[0], sides[1]) if whole else None


def image_statistics(backbone: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of each channel by which its images are normalised; None if it does not say.

    Models of timm say so. Those of transformers do not: their processors know it.

    Args:
        backbone: the backbone.
    """
    told = _told(backbone)
    if not told.get("mean") or not told.get("std"):
        return None
    return tuple(map(float, told["mean"])), tuple(map(float, told["std"]))


def _told(backbone: nn.Module) -> Mapping[str, Any]:
    """The settings that timm keeps with a model."""
    config = getattr(backbone, "config", None)
    for holder, name in ((backbone, "pretrained_cfg"), (config, "pretrained_cfg"), (backbone, "default_cfg")):
        found = getattr(holder, name, None)
        if isinstance(found, Mapping) and found:
            return found
    return {}
