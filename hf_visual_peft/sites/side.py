"""The site of side networks: what they read at a block, and how their state passes to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.backbone import Block, VisionBackbone
from ..backbones.paths import within
from .grid import TokenLayout
from .heads import HeadUse
from .site import NO_LAYOUT, BlockSite, Placement, attention_in


if TYPE_CHECKING:
    from .layer import Equation, VisualTunerLayer


class SideEquation(Protocol):
    """What a piece of a side network is called with."""

    def __call__(self, state: Tensor | None, view: BlockView, *shared: nn.Module) -> tuple[Tensor, Tensor | None]:
        """The new state, and an addition to the block's output or None."""
        ...


@dataclass(frozen=True)
class SideSite(BlockSite):
    """A piece of a side network, after a block.

    The equation is called with the state from the piece before (None in the first piece), and a `BlockView` of the
    block. It returns the new state and an addition to the block's output, or None. Blocks without a piece only pass
    the state on.

    Attributes:
        reads: the streams in the view: before the block, between its attention and its MLP, and after it.
        frozen: whether no gradient crosses the block. It then runs without autograd and in eval mode.
        ends: whether the state after the last piece, (batch, tokens, width), replaces the output of the backbone's
            last block.
        adds: whether, if it `ends`, that state is added to the output of the last block instead.
        aligned: whether the state has one row for each token, (batch, tokens, channels). Before blocks with fewer
            tokens it is averaged over the cells that are merged.
        needs_layout: whether the view has the layout of the tokens in the image.
        needs_pixels: whether the view has the images.
        needs_patches: whether the view at the entrance has the patches before their positions are added.
        needs_mask: whether the view says which tokens are padding.
        asks: whether the view has a function that runs extra tokens through the block.
        enters: whether the equation also has a method `enter`, which is called before the block in the same way: with
            the state, and a view with the stream before the block. Its addition is added to that stream.
        keeps: whether the state after the last block is kept for `Exchange.collecting`.
        heads: how the state after the last block reaches the task heads, if it does.
        takes: whether there is an earlier state; the core sets this and the next two.
        hands_on: whether a block follows.
        exits: whether the state becomes the backbone's output here.
        part: tells several networks of one adapter apart.
    """

    reads: tuple[Literal["before", "between", "after"], ...] = ("after",)
    frozen: bool = True
    ends: bool = True
    adds: bool = False
    aligned: bool = True
    needs_layout: bool = False
    needs_pixels: bool = False
    needs_patches: bool = False
    needs_mask: bool = False
    asks: bool = False
    enters: bool = False
    keeps: bool = False
    heads: HeadUse | None = None
    takes: bool = False
    hands_on: bool = False
    exits: bool = False
    part: str = ""
    passes_on = True

    def key(self, owner: str) -> str:
        """A state passes on beside the tokens of the same adapter."""
        return f"{self.tokens_key(owner)} (side)"

    def tokens_key(self, owner: str) -> str:
        """The name of the tokens of the same adapter, or of the same part of it."""
        return super().key(owner)

    def why_not(self, block: Block | None, whole: VisionBackbone) -> str | None:
        """It may need images."""
        patches = self.needs_pixels and whole.architecture.grid == "spatial_shapes"
        return ": its input is patches, not images." if patches else None

    def why_no_text(self) -> str | None:
        """Side networks read images, and attend without masks."""
        return ": a side network reads images, and would not see which tokens of a text the mask hides."

    def why_not_beside(self, path: str, copied: Sequence[str]) -> str | None:
        """A block that is copied as a whole has no outside to read from."""
        whole = within(path, copied)
        return whole and (
            f"the method's network reads the block {path!r} from outside, so {whole!r} cannot be copied as a whole. "
            "Name the parts of the block to train, such as its attention or its MLP, or choose a method that "
            "has no network beside the backbone."
        )

    def reaches(self, block: Block, prompts: str | None) -> Sequence[str]:
        """The position biases and the attention, if extra tokens run through the block."""
        return (*block.roles["position_bias"], attention_in(block)) if self.asks else ()

    def connect(self, layer: Any, model: nn.Module, backbone: VisionBackbone | None) -> None:
        """Watch what the view needs, and let the state pass from block to block."""
        assert backbone is not None
        exchange = layer.exchange
        if self.needs_layout:
            exchange.record_grid(model, backbone)
        exchange.checkpoint_blocks(model, backbone)
        if self.needs_pixels:
            exchange.record_pixels(model, backbone)
        if self.needs_patches:
            exchange.reads_patches = True
        if self.asks:
            layer.let_queries_attend()
        layer.keep_in_eval_mode(modules_before(model, backbone) if layer.path == backbone.blocks[0].path else ())

    @classmethod
    def arrange(cls, placements: list[Placement], whole: VisionBackbone, name: str, selects: str) -> list[Placement]:
        """The pieces of a network, and the sites that pass its state on at blocks without a piece.

        Args:
            placements: of the method.
            whole: the backbone.
            name: of the config, for errors.
            selects: what selects its blocks, for errors.

        Raises:
            ValueError: the network ends before the last stage, or the layout of the tokens in the image is not known.
        """
        pieces = {p.path: p for p in placements if isinstance(p.site, cls)}
        paths = [block.path for block in whole.blocks]
        last = next(path for path in reversed(paths) if path in pieces)
        stages = whole.stages(whole)
        tables = [block.table or whole.architecture for block in whole.blocks]
        kinds = {(b.group, b.prefix_tokens, table.grid) for b, table in zip(whole.blocks, tables, strict=True)}
        one_grid = len(stages) == len(kinds) == 1
        if _side(pieces[last]).ends and last not in {block.path for block in stages[-1].blocks}:
            raise ValueError(
                f"{selects}: the network must end in the last stage of {whole.class_name}, blocks "
                f"{', '.join(str(block.index) for block in stages[-1].blocks)}."
            )
        if whole.blocks[0].pools and any("before" in _side(p).reads for p in pieces.values() if p.path == paths[0]):
            raise ValueError(
                f"{name} does not fit {whole.class_name}: its first block makes another stream of its input, and the "
                "network would read that."
            )
        placed = [p for p in placements if not isinstance(p.site, cls)]
        begun = False
        for index, path in enumerate(paths):
            piece = pieces.get(path)
            following = next((pieces[later] for later in paths[index:] if later in pieces), None)
            model = _side(following or pieces[last])
            frozen = model.frozen if following else model.ends or model.heads is not None
            layout = model.needs_layout or (model.aligned and not one_grid)
            if layout and tables[index].grid is None:
                raise ValueError(f"{name} does not fit {whole.class_name}{NO_LAYOUT}")
            final = path == paths[-1]
            site = replace(
                model,
                frozen=frozen,
                needs_layout=layout,
                takes=begun,
                hands_on=(not final or model.heads is not None or model.keeps) and (begun or piece is not None),
                keeps=final and model.keeps,
                heads=model.heads if final else None,
                exits=final and model.ends,
            )
            begun = begun or piece is not None
            if piece is not None:
                placed.append(replace(piece, site=site))
            elif frozen or site.takes:
                placed.append(Placement(path, "passage", site, None))
        return placed


def _side(placement: Placement) -> SideSite:
    assert isinstance(placement.site, SideSite)
    return placement.site


@dataclass(frozen=True)
class BlockView:
    """What a side network can read at a block.

    Attributes:
        before: the stream before the block, (batch, tokens, width), if the site reads it.
        between: the stream between attention and MLP.
        after: the stream after the block.
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
    after: Tensor | None = None
    layout: TokenLayout | None = None
    pixels: Tensor | None = None
    tokens: Tensor | None = None
    ask: Callable[[Tensor], Tensor] | None = None
    seen: Tensor | None = None
    patches: Tensor | None = None


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
    layer: VisualTunerLayer, equation: Equation, state: Tensor | None, view: BlockView, enter: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Evaluate a piece in its own dtype.

    Args:
        layer: whose `cast_input_dtype_enabled` says whether the input is cast.
        equation: the piece.
        state: of the side network.
        view: of the block.
        enter: whether it is at the entrance of the block.

    Returns:
        The new state, in the piece's dtype, and the addition to the block's output, in the dtype of the stream.
    """
    module: Any = equation.module
    streams = [x for x in (view.after, view.before) if x is not None]
    if not torch.is_autocast_enabled(streams[0].device.type):
        modules = (module, *(part for part in equation.shared if isinstance(part, nn.Module)))
        dtype = next((p.dtype for each in modules for p in each.parameters()), streams[0].dtype)

        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else layer._cast_input_dtype(x, dtype)

        state = cast(state)
        view = replace(view, before=cast(view.before), between=cast(view.between), after=cast(view.after))
        view = replace(view, pixels=cast(view.pixels), tokens=cast(view.tokens), patches=cast(view.patches))
    state, added = (module.enter if enter else module)(state, view, *equation.shared)
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
