"""The part of the adapters of a block that serves side networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.architectures import GridKind, Stream
from ..backbones.backbone import Block
from .block_sites import Pass
from .grid import TokenLayout, from_tokens, map_grid, to_tokens
from .layer import VisualTunerLayer
from .side import BlockView, SideSite, call_piece, resized


class BypassedLayer(VisualTunerLayer):
    """The part of `BlockAdapters` that serves side networks, and bypasses the block if only they are active."""

    _stream: Stream
    _grid_kind: GridKind | None
    _block: Block

    def _init_side(self) -> None:
        self._before_blocks: tuple[nn.Module, ...] = ()  # that are in eval mode whenever the blocks are
        self._was_bypassed = False
        self._crossed = False  # whether parameters train in the block or before it, apart from adapters at blocks

    def _layout(self, current: Pass, tokens: Tensor) -> TokenLayout:
        raise NotImplementedError

    @property
    def bypassed(self) -> bool:
        """Whether only side networks are active here, and no gradient crosses the block."""
        active = list(self._active())
        crossing = self._crossed or not self.exchange.crossing.isdisjoint(e.owner for e in active)
        return len(active) > 0 and all(e.site.frozen for e in active) and not crossing

    def _look_for_training(self) -> None:
        """Find out whether a gradient crosses the block on its way to other adapters, in it or before it."""
        active = list(self._active())
        if not active or not all(e.site.frozen for e in active):
            return  # nothing is bypassed here, and the look at all parameters takes time
        before = self.exchange.blocks.get(self._block.index - 1)
        own = (p for module in (*self._own_modules(), *self._before_blocks) for p in module.parameters())
        owner = self.get_base_layer()
        images = self.exchange.outside is not None and self.exchange.outside.changes_images()
        self._crossed = (
            images
            or (before is not None and before._crossed)
            or any(p.requires_grad for parameters in (own, owner.parameters(recurse=False)) for p in parameters)
        )

    def _own_modules(self) -> Iterator[nn.Module]:
        """The children of the block, without adapters at blocks."""
        return (child for child in self.get_base_layer().children() if child is not self)

    def train(self, mode: bool = True) -> Any:
        """Set the mode; a bypassed block, and the modules before the blocks, stay in eval mode."""
        super().train(mode)
        self._look_for_training()
        if self.bypassed:
            self._put_backbone(False)
        return self

    def _changed(self) -> None:
        """Find out whether the block is bypassed from now on, and set eval mode or restore the mode."""
        self._look_for_training()
        # Only if it changes: modules that a user put into eval mode stay there.
        if self.bypassed != self._was_bypassed:
            self._was_bypassed = self.bypassed
            self._put_backbone(self.training and not self.bypassed)

    def _put_backbone(self, mode: bool) -> None:
        self.get_base_layer().training = mode
        for module in (*self._own_modules(), *self._before_blocks):
            module.train(mode)

    def keep_in_eval_mode(self, before_blocks: Sequence[nn.Module]) -> None:
        """Also keep modules before the blocks in eval mode while this block is bypassed."""
        self._before_blocks = tuple(before_blocks)

    def _enter(self, current: Pass, x: Tensor) -> Tensor:
        """Call side networks at the entrance of the block, where they read and change the stream."""
        stream = to_tokens(x, self._stream)
        changed = stream
        for piece in self._at(SideSite):
            site = piece.site
            if not site.enters or piece.module is None:
                continue
            layout = self._layout(current, stream) if site.needs_layout else None
            view = BlockView(
                before=stream,
                layout=layout,
                pixels=current.pixels if site.needs_pixels else None,
                patches=current.patches if site.needs_patches else None,
            )
            state, added = call_piece(self, piece, current.tokens.get(piece.key), view, enter=True)
            current.tokens[piece.key] = state
            changed = changed if added is None else changed + added
        return x if changed is stream else from_tokens(changed, x, self._stream)

    def _beside_block(self, current: Pass, before: Tensor, stream: Tensor) -> Tensor:
        """Call side networks after the block; return the block's output with their results.

        If several replace the block's output, their results are summed, and so are additions to it.
        """
        pieces = list(self._at(SideSite))
        if not pieces:
            return stream
        y = to_tokens(stream, self._stream)
        layout: TokenLayout | None = None
        results: list[Tensor] = []
        additions: list[Tensor] = []
        for piece in pieces:
            key, site = piece.key, piece.site
            state = current.tokens.get(key)
            if site.needs_layout or (site.aligned and state is not None and state.shape[1] != y.shape[1]):
                layout = layout or self._layout_after(current, stream, y)
            if layout is not None and site.aligned and state is not None and state.shape[1] != y.shape[1]:
                state = resized(state, current.layouts[key], layout)
            if piece.module is not None:
                x = to_tokens(before, self._stream) if "before" in site.reads else None
                between = current.between if "between" in site.reads else None
                after = y if "after" in site.reads else None
                pixels = current.pixels if site.needs_pixels else None
                tokens = current.tokens.get(piece.site.tokens_key(piece.owner))
                seen = current.seen if site.needs_mask else None
                laid = layout if site.needs_layout else None
                view = BlockView(x, between, after, laid, pixels, tokens, current.ask, seen)
                state, added = call_piece(self, piece, state, view)
                additions += [] if added is None else [added]
            if state is not None:
                current.tokens[key] = state
            if site.needs_layout:
                assert layout is not None
                current.layouts_after[key] = layout
            if site.exits:
                assert state is not None
                (additions if site.adds else results).append(state.to(y.dtype))
        result = y if not results else torch.stack(results).sum(dim=0) if len(results) > 1 else results[0]
        for added in additions:
            result = result + added
        return stream if result is y else from_tokens(result, stream, self._stream)

    def _layout_after(self, current: Pass, stream: Tensor, tokens: Tensor) -> TokenLayout:
        """The layout of the block's output tokens in the image."""
        if self._grid_kind == "map":
            current.grid = map_grid(stream, self._stream)
        return self._layout(current, tokens)

    def _detach_side(self) -> None:
        if self._was_bypassed:
            self._put_backbone(self.training)
