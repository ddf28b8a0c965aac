"""Build modules for their shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


# what initialisation calls; on the meta device each call costs as much as a small operation on real numbers
_FILLS = ("normal_", "uniform_", "zero_", "fill_", "copy_", "mul_", "add_", "erfinv_", "clamp_")


@contextmanager
def shapes_only() -> Iterator[None]:
    """Create tensors on the meta device inside the context, and do not fill them."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Passes over functions that only give values to a tensor without values."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FILLS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)
