"""Products that are added to a linear's output."""

from __future__ import annotations

import torch
from torch import Tensor


def plus_product(y: Tensor, x: Tensor, matrix: Tensor, factor: float = 1.0) -> Tensor:
    """Return y + factor * x @ matrix in one pass over y; product, factor and sum would each need one.

    Args:
        y: (..., out).
        x: (..., in).
        matrix: (in, out).
        factor: of the product.
    """
    total = torch.addmm(y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), matrix, alpha=factor)
    return total.view(y.shape)
