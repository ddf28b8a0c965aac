"""Where a method may act: each place written once, for all methods and all architectures.

A *site* says where an equation acts, a *placement* puts one equation at one site of one module. Three layers carry
them: `ModuleLayer` around a linear, norm or convolution, `BlockLayer` around a transformer block, `WholeLayer` around
any module that trains as a whole.
"""

from .attention import KeyValueSite, LogitSite, attention_of, attention_path
from .block import BlockLayer, drop_path
from .block_sites import BranchSite, NormSite, TokenSite
from .exchange import Exchange
from .grid import Grid, TokenLayout, to_tokens
from .layer import Equation, Placement, Shared, Site, VisualTunerLayer
from .module import LinearSite, ModuleLayer, OutputSite, WeightSite, as_linear, as_matrix, output_channels
from .side import SideSite, Tap, resized
from .whole import WholeLayer, WholeSite, whole_module


__all__ = [
    "BlockLayer",
    "BranchSite",
    "Equation",
    "Exchange",
    "Grid",
    "KeyValueSite",
    "LinearSite",
    "LogitSite",
    "ModuleLayer",
    "NormSite",
    "OutputSite",
    "Placement",
    "Shared",
    "SideSite",
    "Site",
    "Tap",
    "TokenLayout",
    "TokenSite",
    "VisualTunerLayer",
    "WeightSite",
    "WholeLayer",
    "WholeSite",
    "as_linear",
    "as_matrix",
    "attention_of",
    "attention_path",
    "drop_path",
    "output_channels",
    "resized",
    "to_tokens",
    "whole_module",
]
