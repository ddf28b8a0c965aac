"""Images of requests: limits are checked before anything is decoded."""

from __future__ import annotations

import io
import threading
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers import AutoImageProcessor

from ..sharing.card import PROCESSOR_NAME
from ..sharing.hub import load_processor
from ..training.images import as_rgb
from .catalogue import Base, Entry
from .errors import RequestError


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
NO_IMAGE = "no_image"


def decoded(content: bytes, max_pixels: int) -> Image.Image:
    """The first frame of an encoded image, upright and in RGB.

    Args:
        content: the file.
        max_pixels: more, by its header, are refused before they are decoded.

    Raises:
        RequestError: it is no such image, damaged, or too large.
    """
    if not content:
        raise RequestError(400, NO_IMAGE, "The request has no image: its body is empty.")
    known = ", ".join(FORMATS)
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = image.size
    except UnidentifiedImageError:
        raise RequestError(
            415, "not_an_image", f"The body is not an image in any of these formats: {known}."
        ) from None
    except Image.DecompressionBombError:
        raise RequestError(413, "too_many_pixels", f"The image has more than {max_pixels:,} pixels.") from None
    except Exception as error:  # decoders raise all kinds of errors for a damaged header
        raise RequestError(422, "damaged_image", f"The header of the image is damaged: {_short(error)}.") from None
    if width * height > max_pixels:
        raise RequestError(
            413,
            "too_many_pixels",
            f"The image has {width:,} x {height:,} pixels; at most {max_pixels:,} pixels are taken.",
        )
    try:
        return as_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # as above
        raise RequestError(422, "damaged_image", f"The image cannot be decoded: {_short(error)}.") from None


class Processors:
    """The image processors of adapters, each once; an adapter without its own has that of the backbone.

    Args:
        base: the backbone.

    Raises:
        ValueError: the backbone has no image processor.
    """

    def __init__(self, base: Base) -> None:
        try:
            self.base = AutoImageProcessor.from_pretrained(base.name, revision=base.revision or "main")
        except (OSError, ValueError) as error:
            raise ValueError(f"--model {base.name} has no image processor that can be loaded: {error}") from error
        self.known: dict[str, Any] = {}
        self.lock = threading.Lock()

    def of(self, entry: Entry) -> Any:
        """The image processor of an adapter.

        Raises:
            ValueError: its file is damaged.
        """
        file = entry.folder / PROCESSOR_NAME
        if not file.is_file():
            return self.base
        text = file.read_text(encoding="utf-8")
        with self.lock:
            if text not in self.known:
                self.known[text] = load_processor(entry.folder)
            return self.known[text]


def pixels_of(image: Image.Image, processor: Any) -> Tensor:
    """The input of the model: (channels, height, width)."""
    values = processor(images=image, return_tensors="pt")["pixel_values"]
    if values.ndim != 4:
        raise ValueError(f"{type(processor).__name__} cuts patches itself, which the server does not support.")
    return values[0].to(torch.float32)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
