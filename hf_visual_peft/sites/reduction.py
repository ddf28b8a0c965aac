"""The site that takes tokens out of the stream inside a block, and the part of a block's adapters that serves it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..backbones.backbone import Block, VisionBackbone
from .block_sites import Pass
from .exchange import recomputes
from .layer import Equation, VisualTunerLayer
from .side import SideSite
from .site import AttentionSite, why_none_join


# Arguments of blocks, and attributes of their attention, with one entry for each token or for each pair of tokens.
_POSITIONS = ("position_embeddings", "rope", "relative_position_bias")


class Kept(NamedTuple):
    """Which patches stay in the stream.

    Attributes:
        patches: (batch, left), indices of those that stay. Those at the end are overwritten by the merged ones.
        merged: (batch, merged, width), the tokens that take the places of the last ones of `patches`; None if none do.
    """

    patches: Tensor
    merged: Tensor | None


class ReductionEquation(Protocol):
    """What an equation that takes tokens out is called with."""

    def __call__(self, patches: Tensor, weights: Tensor, *shared: nn.Module) -> Kept:
        """Choose the patches that stay.

        Args:
            patches: of the stream between attention and MLP, (batch, patches, width).
            weights: of attention to them, a mean over its heads, (batch, patches): that of the first prefix token,
                such as CLS, or the mean over all patches where there is no prefix token.
            shared: modules of the adapter.
        """
        ...


@dataclass(frozen=True)
class ReductionSite(AttentionSite):
    """Between attention and MLP of a block: patches that leave the stream there, for all that follows.

    Prefix tokens and prompts stay. Later blocks, and what follows them, get a shorter sequence and compute only that,
    in training, too. Patches keep their order. The number of those that stay must not depend on the data.

    Attributes:
        part: tells several sites of one adapter apart.
    """

    part: str = ""
    at = "mlp"
    mixes = False

    def exists_at(self, block: Block, whole: VisionBackbone) -> bool:
        """Everywhere: a sequence that is shorter in some blocks only is not what a method asks for."""
        return True

    def why_not(self, block: Block | None, whole: VisionBackbone) -> str | None:
        """Something may need all tokens: windows, convolutions, position biases, padding, frames, dense heads."""
        table = (block.table if block is not None else None) or whole.architecture
        if whole.dense:
            heads = ", ".join(whole.heads)
            return f": its task head, {heads}, reads every place of the image, and tokens leave the stream."
        if whole.headless:
            return f": {whole.headless} may need each token in its place, and tokens leave the stream."
        if table.grid is None:
            return ": which of its tokens are patches of the image is not known, and patches leave the stream."
        if len({(each.width, each.group) for each in whole.blocks}) > 1 or table.grid in ("map", "units", "halved"):
            return ": its blocks have windows, or make maps of the tokens, and need all of them."
        if table.grid == "spatial_shapes":
            return ": its images are padded, and a mask tells which tokens are padding; tokens leave the stream."
        if table.grid not in ("full", "masked") or whole.times > 1:
            return ": the frames of a video share one sequence, from which tokens would leave."
        if block is not None and (block.entrances.get("mlp", "") in ("", block.path) or not block.projections):
            return ": its blocks do not have attention first, and then an MLP on the result."
        if table.position_bias:  # also if all blocks share one
            return ": its attention has a bias for each pair of places in the image, and tokens leave the stream."
        if table.prompts == "keys":
            return ": its attention acts in windows or knows the places of its tokens, and tokens leave the stream."
        return why_none_join(block, whole)

    def connect(self, layer: Any, model: nn.Module, backbone: VisionBackbone | None) -> None:
        """Watch the attention, and let the MLP run on the tokens that stay.

        Raises:
            ValueError: the model needs all tokens.
        """
        assert backbone is not None
        owner = layer.get_base_layer()
        named = [name for name in _POSITIONS if name in inspect.signature(type(owner).forward).parameters]
        if named:
            raise ValueError(
                f"{type(owner).__name__} takes {named[0]}, the positions of all tokens in the image, so none can "
                "leave the stream. Choose a method that keeps all tokens, such as DyT."
            )
        kinds = type(model.get_submodule(backbone.path)).mro()
        if any(kind.__name__ == "BackboneMixin" for kind in kinds):  # it moves between modules of transformers
            raise ValueError(
                f"{backbone.class_name} returns maps of the tokens, so none can leave the stream. Choose a method "
                "that keeps all tokens, such as DyT."
            )
        layer.exchange.checkpoint_blocks(model, backbone)
        layer.hook_attention()
        layer.let_mlp_skip()

    def describe(self, names: Mapping[str, str]) -> str:
        """What leaves."""
        return "which patches stay in the stream after attention, for all that follows"


class ReducingLayer(VisualTunerLayer):
    """The part of `BlockAdapters` that takes tokens out of the stream."""

    prefix_tokens: int
    path: Any
    _pass: Pass | None
    _watching: list[Tensor] | None = None  # weights of attention that somebody asks for

    @contextmanager
    def watch_weights(self) -> Iterator[list[Tensor]]:
        """Collect the weights that the first token gives to all keys, (..., 1, keys), in every pass in the context."""
        found: list[Tensor] = []
        self._watching = found
        try:
            yield found
        finally:
            self._watching = None

    def _weigh(self, weights: Callable[[int | None], Tensor]) -> None:
        """Keep the weights of the block's attention that equations read.

        Args:
            weights: called with a number of queries, or None for all; returns the weights that these give to all
                keys, (..., queries, keys).
        """
        if self._watching is not None:
            self._watching.append(weights(1))
        current = self._pass
        if current is None or not any(self._at(ReductionSite)):
            return
        assert current.entered is not None
        batch, tokens = current.entered.shape[:2]
        found = weights(1 if self.prefix_tokens else None)
        found = found.reshape(batch, -1, *found.shape[-2:]).mean(dim=1)
        # keys that joined come after the block's own
        found = found[:, 0] if self.prefix_tokens else found[:, current.prefix : tokens].mean(dim=1)
        current.weights = found[:, current.prefix : tokens]

    def _reduce(self, current: Pass, stream: Tensor) -> None:
        """Ask the equation which tokens stay, and put merged ones in the places of others.

        Args:
            current: of the block.
            stream: between attention and MLP, with all additions, (batch, tokens, width).

        Raises:
            ValueError: other adapters do not allow it.
        """
        equations = list(self._at(ReductionSite))
        if not equations:
            return
        self._check_reduction(equations)
        assert equations[0].module is not None
        assert current.weights is not None
        index, merged = equations[0].module(stream[:, current.prefix :], current.weights, *equations[0].shared)
        count = 0 if merged is None else merged.shape[1]
        stay, places = index[:, : index.shape[1] - count], index[:, index.shape[1] - count :]
        stay = torch.cat([stay.sort(dim=1).values, places], dim=1)
        if merged is not None:
            at = (places + current.prefix).unsqueeze(-1).expand(-1, -1, stream.shape[2])
            change = torch.zeros_like(stream).scatter(1, at, merged.to(stream.dtype) - stream.gather(1, at))
            current.added = change if current.added is None else current.added + change
        current.stay, current.merged = stay, count

    def _check_reduction(self, equations: list[Equation]) -> None:
        own = equations[0]
        if len(equations) > 1:
            owners = ", ".join(repr(each.adapter) for each in equations)
            raise ValueError(
                f"The active adapters {owners} both take tokens out of the stream in {self.path!r}: one of them can. "
                "Use set_adapter."
            )
        for each in self._at(SideSite):
            if each.site.tokens_key(each.owner) != own.key:
                raise ValueError(
                    f"The adapter {each.adapter!r} has a network beside the blocks with a row for each token, and "
                    f"{own.adapter!r} takes tokens out of the stream in {self.path!r}. Use one of them at a time "
                    "(set_adapter)."
                )

    def _without_tokens(self, current: Pass, stream: Tensor) -> Tensor:
        """The stream after the block, and that between its sub-layers, with the tokens that stay.

        Args:
            current: of the block, without prompts.
            stream: (batch, tokens, width).
        """
        if current.stay is None:
            return stream
        index = self._positions_of(current).unsqueeze(-1).expand(-1, -1, stream.shape[2])
        if current.between is not None:
            current.between = current.between.gather(1, index)
        current.grid = _reduced(current, stream.shape[1])
        # when a checkpoint runs again in the backward pass, the model may have seen other images
        if torch.compiler.is_compiling() or not recomputes():
            self.exchange.grid = current.grid
        return stream.gather(1, index)

    def _positions_of(self, current: Pass) -> Tensor:
        """Positions in the sequence of the tokens that stay, (batch, tokens)."""
        assert current.stay is not None
        first = torch.arange(current.prefix, device=current.stay.device).expand(len(current.stay), -1)
        return torch.cat([first, current.stay + current.prefix], dim=1)


def _reduced(current: Pass, tokens: int) -> Any:
    """The grid of the tokens that stay; merged ones have no place in it."""
    grid, stay = current.grid, current.stay
    if grid is None:
        return None
    assert stay is not None
    cells = grid.cells
    if cells is None:
        cells = torch.arange(tokens - current.prefix, device=stay.device).expand(len(stay), -1)
    cells = cells.gather(1, stay)
    if current.merged:
        nowhere = cells.new_full((len(cells), current.merged), grid.area)
        cells = torch.cat([cells[:, : -current.merged], nowhere], dim=1)
    return replace(grid, cells=cells)
