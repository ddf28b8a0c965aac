"""What the adapters for videos share: which backbones they fit, and the frames of a batch."""

from __future__ import annotations

from torch import Tensor

from ...backbone import VisionBackbone
from ...sites import TokenLayout


def require_full_grid(config_name: str, backbone: VisionBackbone) -> None:
    """Refuse backbones whose images differ in the patches they have: a token then has no counterpart in other frames.

    Args:
        config_name: class name of the config, for the error.
        backbone: to be adapted.

    Raises:
        ValueError: it is such a backbone.
    """
    if backbone.architecture.grid != "full":
        kind = {"spatial_shapes": "have grids of their own", "masked": "are masked at random"}
        raise ValueError(
            f"{config_name} does not fit {backbone.class_name}, whose images {kind[backbone.architecture.grid]}: "
            "videos need images of one grid."
        )


def by_video(tokens: Tensor, layout: TokenLayout) -> Tensor:
    """(batch x frames, tokens, channels) to (batch, frames, tokens, channels).

    Raises:
        ValueError: nothing has told how many frames a video has.
    """
    if layout.frames is None:
        raise ValueError("The number of frames is not known: call the whole model, not a part of it.")
    return tokens.unflatten(0, (-1, layout.frames))
