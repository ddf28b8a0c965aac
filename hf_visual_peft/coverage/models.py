"""The catalogue: one tiny random model per architecture, and variants of some for the tests only."""

from __future__ import annotations

from .convolutional import CONVOLUTIONAL
from .dense import DENSE
from .hierarchical import HIERARCHICAL
from .plain import PLAIN, PLAIN_VARIANTS
from .timm_models import TIMM
from .tiny import by_name


MODELS = by_name(*PLAIN, *HIERARCHICAL, *CONVOLUTIONAL, *DENSE, *TIMM)
VARIANTS = by_name(*PLAIN_VARIANTS)
