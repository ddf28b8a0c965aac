"""Where a method may act: each place is written once, for all methods and all architectures.

Words that mean one thing throughout this library:

- stream: the hidden states that run from block to block, as tokens or as a map; sub-layers add to it.
- block: one of the repeated modules of a backbone, such as a transformer layer.
- sub-layer: the attention or the MLP of a block, with its norm.
- prefix tokens: the backbone's own tokens before the patches: CLS, distillation and register tokens.
- prompt: a learned token that an adapter puts into the stream or into attention.
- join: a prompt *joins* a sequence if the tokens of that sequence attend to it.
- extra: belonging to an adapter and not to the backbone, as in extra tokens, keys or queries.
- site: a place where an equation acts, and what it reads and changes there.
- equation: the module of an adapter that computes its change at one site.
- slot: the name of an equation in its layer; it is a part of the names of the adapter's weights.
- piece: the part of a side network that stands at one block.
- view: what a piece can read at its block: streams, layout, images.

A *site* says where an equation acts, a *placement* puts one equation at one site of one module. Three layers carry
them: `ModuleLayer` around a linear, norm or convolution, `BlockAdapters` in a transformer block, `WholeLayer` around
any module that trains as a whole.
"""

from .attention import attention_of, attention_path
from .attention_sites import KeyValueSite, LogitSite
from .block import BlockAdapters
from .block_branches import drop_path
from .block_sites import BranchSite, TokenSite
from .exchange import Exchange
from .forms import head_sizes, projections
from .grid import Grid, TokenLayout, to_tokens
from .head import HeadEquation, HeadSite
from .layer import Equation, VisualTunerLayer, layers_of
from .losses import Left, WithLoss
from .model import ModelAdapters
from .module import ModuleLayer, as_linear, as_matrix, output_channels
from .module_sites import LinearSite, MapSite, OutputSite, WeightSite
from .pixels import PixelEquation, PixelSite
from .reduction import Kept, ReductionSite
from .selection import ChoiceSite
from .side import BlockView, SideSite, resized
from .site import Placement, Shared, Site
from .whole import WholeLayer, WholeSite, whole_module


__all__ = [
    "BlockAdapters",
    "BlockView",
    "BranchSite",
    "ChoiceSite",
    "Equation",
    "Exchange",
    "Grid",
    "HeadEquation",
    "HeadSite",
    "Kept",
    "KeyValueSite",
    "Left",
    "LinearSite",
    "LogitSite",
    "MapSite",
    "ModelAdapters",
    "ModuleLayer",
    "OutputSite",
    "PixelEquation",
    "PixelSite",
    "Placement",
    "ReductionSite",
    "Shared",
    "SideSite",
    "Site",
    "TokenLayout",
    "TokenSite",
    "VisualTunerLayer",
    "WeightSite",
    "WholeLayer",
    "WholeSite",
    "WithLoss",
    "as_linear",
    "as_matrix",
    "attention_of",
    "attention_path",
    "drop_path",
    "head_sizes",
    "layer_for",
    "layers_of",
    "output_channels",
    "projections",
    "resized",
    "to_tokens",
    "whole_module",
]


_LAYERS: tuple[type[VisualTunerLayer], ...] = (BlockAdapters, ModuleLayer, WholeLayer, ModelAdapters)


def layer_for(site: Site) -> type[VisualTunerLayer]:
    """The kind of layer that carries a site."""
    return next(layer for layer in _LAYERS if isinstance(site, layer.serves))
