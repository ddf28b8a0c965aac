"""Role tables: the roles of the modules in each family of backbones, and the functions to add tables."""

from .convolutional import CONVOLUTIONAL
from .hierarchical import HIERARCHICAL
from .plain import PLAIN
from .table import (
    TOWERS,
    Architecture,
    GridKind,
    Names,
    Stream,
    Tower,
    architecture_of,
    heads_of,
    known_backbones,
    register_architecture,
    register_heads,
)
from .text import TEXT
from .timm_models import TIMM
from .torch_attention import TORCH_ATTENTION


_OWN = (*PLAIN, *HIERARCHICAL, *CONVOLUTIONAL, *TIMM, *TORCH_ATTENTION)
for _table in _OWN:
    register_architecture(_table)
for _table in TEXT:
    register_architecture(_table, "text")


def is_own(table: Architecture) -> bool:
    """Whether a role table comes with this library, and was not registered by a user."""
    return any(table is each for each in (*_OWN, *TEXT))


__all__ = [
    "TOWERS",
    "Architecture",
    "GridKind",
    "Names",
    "Stream",
    "Tower",
    "architecture_of",
    "heads_of",
    "is_own",
    "known_backbones",
    "register_architecture",
    "register_heads",
]
