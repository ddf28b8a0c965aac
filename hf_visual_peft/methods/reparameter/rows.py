"""The rows of a linear that make a projection, also where several projections are fused into one linear."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ...backbones.backbone import Block, VisionBackbone


class Rows(NamedTuple):
    """Rows of a linear's weight.

    Attributes:
        path: full name of the linear.
        start: the first row.
        size: how many there are.
    """

    path: str
    start: int
    size: int

    def pad(self, rows: Tensor, total: int, dim: int) -> Tensor:
        """Pad the rows with zeros to `total` along a dimension, which is negative and counts from the end."""
        margins = (self.start, total - self.start - self.size)
        return rows if rows.shape[dim] == total else F.pad(rows, (0, 0) * (-1 - dim) + margins)


def projections(backbone: VisionBackbone, block: Block) -> dict[str, Rows]:
    """Query, key, value and output of one block; those that share a linear have one size and follow in this order.

    Roles that the block does not have are left out.
    """
    roles = ("query", "key", "value", "output")
    paths = {role: block.roles[role][0] for role in roles if block.roles[role]}
    found = {}
    for role, path in paths.items():
        sharing = [other for other, its in paths.items() if its == path]
        if len(sharing) > 1 and not backbone.architecture.equal_parts:
            raise ValueError(f"{path} of {backbone.class_name} makes {', '.join(sharing)} of different sizes.")
        size = backbone.linears[path][0] // len(sharing)
        found[role] = Rows(path, sharing.index(role) * size, size)
    return found
