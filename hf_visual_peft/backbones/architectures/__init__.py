"""Role tables: the roles of the modules in each family of backbones, and the functions to add tables."""

from .convolutional import CONVOLUTIONAL
from .hierarchical import HIERARCHICAL
from .plain import PLAIN
from .table import (
    Architecture,
    GridKind,
    Names,
    Stream,
    architecture_of,
    heads_of,
    known_backbones,
    register_architecture,
    register_heads,
)
from .timm_models import TIMM
from .torch_attention import TORCH_ATTENTION


_OWN = (*PLAIN, *HIERARCHICAL, *CONVOLUTIONAL, *TIMM, *TORCH_ATTENTION)
for _table in _OWN:
    register_architecture(_table)


def is_own(table: Architecture) -> bool:
    """Whether a role table comes with this library, and was not registered by a user."""
    return any(table is each for each in _OWN)


__all__ = [
    "Architecture",
    "GridKind",
    "Names",
    "Stream",
    "architecture_of",
    "heads_of",
    "is_own",
    "known_backbones",
    "register_architecture",
    "register_heads",
]
