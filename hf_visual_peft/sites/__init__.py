"""Where a method may act: each place written once, for all methods and all architectures.

A *site* says where an equation acts, a *placement* puts one equation at one site of one module. Two layers carry
them: `ModuleLayer` around a linear, norm or convolution, `BlockLayer` around a transformer block.
"""

from .block import BlockLayer, BranchSite, TokenSite, drop_path
from .exchange import Exchange
from .grid import Grid, TokenLayout
from .layer import Equation, Placement, Shared, Site, VisualTunerLayer
from .module import LinearSite, ModuleLayer, OutputSite, WeightSite


__all__ = [
    "BlockLayer",
    "BranchSite",
    "Equation",
    "Exchange",
    "Grid",
    "LinearSite",
    "ModuleLayer",
    "OutputSite",
    "Placement",
    "Shared",
    "Site",
    "TokenLayout",
    "TokenSite",
    "VisualTunerLayer",
    "WeightSite",
    "drop_path",
]
