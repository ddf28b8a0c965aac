"""The site of side networks: what they read at a block, and how their state passes to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.backbone import VisionBackbone
from .grid import TokenLayout
from .heads import HeadUse
from .layer import Site


if TYPE_CHECKING:
    from .layer import Equation, VisualTunerLayer


@dataclass(frozen=True)
class SideSite(Site):
    """A piece of a side network, after a block.

    The equation is called with the state from the piece before (None in the first piece), and a `Tap` of the block. It
    returns the new state and an addition to the block's output, or None. Blocks without a piece only pass the state
    on.

    Attributes:
        reads: the streams in the tap: before the block, between its attention and its MLP, and after (behind) it.
        frozen: whether no gradient crosses the block. It then runs without autograd and in eval mode.
        ends: whether the state after the last piece, (batch, tokens, width), replaces the output of the backbone's
            last block.
        adds: whether, if it `ends`, that state is added to the output of the last block instead.
        aligned: whether the state has one row for each token, (batch, tokens, channels). Before blocks with fewer
            tokens it is averaged over the cells that are merged.
        needs_layout: whether the tap has the layout of the tokens in the image.
        needs_pixels: whether the tap has the images.
        needs_mask: whether the tap says which tokens are padding.
        asks: whether the tap has a function that runs extra tokens through the block.
        enters: whether the equation also has a method `enter`, which is called before the block in the same way: with
            the state, and a tap with the stream before the block. Its addition is added to that stream.
        keeps: whether the state after the last block is kept for `Exchange.collecting`.
        heads: how the state after the last block reaches the task heads, if it does.
        takes: whether there is an earlier state; the core sets this and the next two.
        hands_on: whether a block follows.
        exits: whether the state becomes the backbone's output here.
        part: tells several networks of one adapter apart.
    """

    reads: tuple[Literal["before", "between", "behind"], ...] = ("behind",)
    frozen: bool = True
    ends: bool = True
    adds: bool = False
    aligned: bool = True
    needs_layout: bool = False
    needs_pixels: bool = False
    needs_mask: bool = False
    asks: bool = False
    enters: bool = False
    keeps: bool = False
    heads: HeadUse | None = None
    takes: bool = False
    hands_on: bool = False
    exits: bool = False
    part: str = ""


@dataclass(frozen=True)
class Tap:
    """What a side network can read at a block.

    Attributes:
        before: the stream before the block, (batch, tokens, width), if the site reads it.
        between: the stream between attention and MLP.
        behind: the stream after the block.
        layout: of the tokens after the block, if the site needs it.
        pixels: the images, (batch, channels, height, width), if the site needs them.
        tokens: the block's output for the adapter's own tokens (`TokenSite`), (batch, tokens, width).
        ask: runs extra tokens through the block, (batch, tokens, width) to the same shape, if the site asks for it.
            They attend only to the block's own tokens, which do not attend to them.
        seen: which tokens before the block are not padding, (batch or 1, tokens), boolean, if the site needs it; None
            if all are.
    """

    before: Tensor | None = None
    between: Tensor | None = None
    behind: Tensor | None = None
    layout: TokenLayout | None = None
    pixels: Tensor | None = None
    tokens: Tensor | None = None
    ask: Callable[[Tensor], Tensor] | None = None
    seen: Tensor | None = None


def resized(state: Tensor, before: TokenLayout, now: TokenLayout) -> Tensor:
    """The state of a side network on the tokens of the next stage: averages over the cells that are merged.

    Args:
        state: (batch, tokens, channels) on the tokens of `before`.
        before: layout of these tokens.
        now: layout of the new tokens. New prefix tokens get the mean over all cells.
    """
    assert now.grid is not None
    prefix, maps = before.split(state)
    pooled = F.adaptive_avg_pool2d(maps, (now.grid.height, now.grid.width))
    if now.prefix > before.prefix:
        mean = maps.mean(dim=(2, 3)).unflatten(0, (state.shape[0], -1)).mean(dim=1, keepdim=True)
        prefix = torch.cat([prefix, mean.expand(-1, now.prefix - before.prefix, -1)], dim=1)
    return now.join(prefix[:, : now.prefix], pooled)


def call_piece(
    layer: VisualTunerLayer, equation: Equation, state: Tensor | None, tap: Tap, enter: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Evaluate a piece in its own dtype.

    Args:
        layer: whose `cast_input_dtype_enabled` says whether the input is cast.
        equation: the piece.
        state: of the side network.
        tap: of the block.
        enter: whether it is at the entrance of the block.

    Returns:
        The new state, in the piece's dtype, and the addition to the block's output, in the dtype of the stream.
    """
    module: Any = equation.module
    streams = [x for x in (tap.behind, tap.before) if x is not None]
    if not torch.is_autocast_enabled(streams[0].device.type):
        modules = (module, *(part for part in equation.shared if isinstance(part, nn.Module)))
        dtype = next((p.dtype for each in modules for p in each.parameters()), streams[0].dtype)

        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else layer._cast_input_dtype(x, dtype)

        state = cast(state)
        tap = replace(tap, before=cast(tap.before), between=cast(tap.between), behind=cast(tap.behind))
        tap = replace(tap, pixels=cast(tap.pixels), tokens=cast(tap.tokens))
    state, added = (module.enter if enter else module)(state, tap, *equation.shared)
    assert state is not None
    return state, None if added is None else added.to(streams[0].dtype)


def modules_before(model: nn.Module, backbone: VisionBackbone) -> list[nn.Module]:
    """The modules of a backbone before its first block, such as embeddings and dropouts.

    Modules between stages do not count: they stay in the model's mode.
    """
    found: list[nn.Module] = []
    parent = model.get_submodule(backbone.path)
    for step in backbone.blocks[0].path.removeprefix(f"{backbone.path}.").split("."):
        for name, child in parent.named_children():
            if name == step:
                break
            found.append(child)
        parent = parent.get_submodule(step)
    return found
