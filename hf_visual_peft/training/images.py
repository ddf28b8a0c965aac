"""Decoded images as models take them."""

from __future__ import annotations

import numpy as np
from PIL import Image


def as_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB; 16 bits are scaled to 8.

    Args:
        image: of any mode, upright.

    Raises:
        ValueError: the range of its pixels is not known.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"32-bit pixels from {pixels.min()} to {pixels.max()}; save them as 8 or 16 bits")
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels with an unknown range; save them as 8 or 16 bits")
    return image.convert("RGB")
