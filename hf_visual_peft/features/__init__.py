"""Features of frozen backbones, computed once and read from disk in every further epoch and run."""

from .cache import FeatureCache
from .dataset import CachedFeatures


__all__ = ["CachedFeatures", "FeatureCache"]
