"""Whether a model must be told that its images have another size than in pretraining."""

from __future__ import annotations

import inspect
from typing import Any


def size_to_tell(model: Any) -> tuple[int, int] | None:
    """Height and width that a model of transformers takes without `interpolate_pos_encoding=True`.

    Args:
        model: with or without adapters.

    Returns:
        None if the model has no such argument: it takes any size, or only one.
    """
    size = getattr(model.config, "image_size", None)
    takers = (m for m in model.modules() if "interpolate_pos_encoding" in inspect.signature(m.forward).parameters)
    if size is None or next(takers, None) is None:
        return None
    return (size, size) if isinstance(size, int) else tuple(size)
