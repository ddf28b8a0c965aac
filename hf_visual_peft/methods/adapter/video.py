"""Helpers of the adapters for videos: which backbones they fit, and the frames of a batch."""

from __future__ import annotations

from torch import Tensor

from ...backbones.backbone import VisionBackbone
from ...sites import TokenLayout


def require_full_grid(config_name: str, backbone: VisionBackbone) -> None:
    """Refuse backbones whose images have different patches: a token then has no counterpart in other frames.

    Args:
        config_name: class name of the config, for the error.
        backbone: to be adapted.

    Raises:
        ValueError: the backbone is one of these.
    """
    grid = backbone.architecture.grid
    if backbone.dense:
        raise ValueError(f"{config_name} needs a head with one output per video: this model's head gives maps.")
    if backbone.architecture.video:
        raise ValueError(f"{config_name} is for models of images: {backbone.class_name} takes videos itself.")
    if grid not in ("full", "given", "map", "units", "halved", "unfolded"):
        reasons = {
            "spatial_shapes": "whose images each have their own grid",
            "masked": "whose images are masked at random",
        }
        reason = reasons.get(grid or "", "whose sequences are not images")
        raise ValueError(
            f"{config_name} does not fit {backbone.class_name}, {reason}: videos need images of one grid."
        )


def by_video(tokens: Tensor, layout: TokenLayout) -> Tensor:
    """Reshape (batch x frames, tokens, channels) to (batch, frames, tokens, channels).

    Raises:
        ValueError: the number of frames is not known.
    """
    if layout.frames is None:
        raise ValueError("The number of frames is not known: call the whole model, not a part of it.")
    return tokens.unflatten(0, (-1, layout.frames))
