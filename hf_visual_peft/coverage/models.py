"""The catalogue: one tiny random model an architecture."""

from __future__ import annotations

from .convolutional import CONVOLUTIONAL
from .dense import DENSE
from .hierarchical import HIERARCHICAL
from .plain import PLAIN
from .timm_models import TIMM
from .tiny import by_name


MODELS = by_name(*PLAIN, *HIERARCHICAL, *CONVOLUTIONAL, *DENSE, *TIMM)
