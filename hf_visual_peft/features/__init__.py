"""Features of frozen backbones, computed once and then read from disk in all later epochs and runs."""

from .cache import FeatureCache
from .dataset import CachedFeatures


__all__ = ["CachedFeatures", "FeatureCache"]
