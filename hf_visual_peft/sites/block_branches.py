"""The part of the adapters of a block that sees its stream, and adds branches to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.backbone import SUBLAYER_ROLES, Block, VisionBackbone, entered, versions
from .block_attention import AttentionLayer
from .block_checks import norms_first
from .block_side import BypassedLayer
from .block_sites import BranchSite, Pass, Reads
from .grid import TokenLayout, from_tokens, map_grid, to_tokens, unfolded_grid, unit_grid
from .layer import Equation, call_equation
from .selection import ChoosingLayer


class BranchLayer(AttentionLayer, BypassedLayer, ChoosingLayer):
    """The part of `BlockAdapters` with the hooks at the points of the stream, where branches read it and add to it."""

    _block: Block
    _sublayers: tuple[str, ...]
    _stream_inside: Any
    _group: int
    _holder: tuple[nn.Module, ...]
    drop_path_rate: float

    @property
    def path(self) -> str:
        """Full name of the block in the model, without adapters."""
        return self._block.path

    def _versions(self, path: str) -> list[nn.Module]:
        """The modules with a name in the block, as in `versions`, for hooks."""
        owner = self.get_base_layer()
        inside = path.removeprefix(self.path).removeprefix(".")
        names = inside.split(".") if inside else []
        for end, name in enumerate(names):
            for parent in versions(owner, ".".join(names[:end])):
                for holder in entered(parent):
                    if name in holder._modules:
                        self._steps.append((holder._modules, name, holder._modules[name]))
        return versions(owner, inside)

    def _set_hooks(self) -> None:
        """Set the hooks that see the block's stream."""
        block, roles = self._block, self._block.roles
        self._steps: list[tuple[dict, str, nn.Module | None]] = []  # on the way to the modules with hooks
        # tuples, so that they are not submodules of the layer
        self._attention: tuple[tuple[nn.Module, ...], ...] = tuple(
            tuple(self._versions(path)[0] for path in roles[role][:1]) for role in ("norm1", "output")
        )
        self._reads_block: list[str] = []  # sub-layers that read the block's own input
        handles = self._stream_handles
        for sublayer, path in block.entrances.items():
            if path == block.path:
                self._reads_block.append(sublayer)
                continue
            for entrance in self._versions(path):
                if path in roles[SUBLAYER_ROLES[sublayer][0]]:
                    if sublayer == "mlp":
                        handles.append(entrance.register_forward_pre_hook(self._before_mlp))
                    handles.append(entrance.register_forward_hook(partial(self._after_norm, sublayer)))
                else:
                    handles.append(entrance.register_forward_pre_hook(partial(self._before_sublayer, sublayer)))
        for module in (module for path in block.rest for module in self._versions(path)):
            handles.append(module.register_forward_pre_hook(self._before_rest))
        handles += norms_first(block, self._versions, self._runs)
        handles += self._hook_mlp()

    def _runs(self) -> bool:
        """Whether the block runs on its own tokens, with adapters."""
        return self._pass is not None

    def _remove_hooks(self) -> None:
        for handle in self._stream_handles:
            handle.remove()
        self._stream_handles.clear()

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Remove the hooks in the block inside the context, then set them again, also at new copies of its modules."""
        self._remove_hooks()
        yield
        self._set_hooks()

    def set_hooks_again(self) -> None:
        """Set the hooks in the block again."""
        self._remove_hooks()
        self._set_hooks()

    def follow(self) -> None:
        """Set the hooks again: layers of other adapters may have been added or removed.

        Raises:
            ValueError: the block has changed since the model was compiled.
        """
        if all(holder.get(name) is module for holder, name, module in self._steps):
            return
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{self.path}: adapters were added to the block after its last forward pass. Call the model once "
                "before it is compiled."
            )
        self.set_hooks_again()

    def _layout(self, current: Pass, tokens: Tensor) -> TokenLayout:
        """The layout of these tokens in the image.

        Raises:
            ValueError: they do not fit the image.
        """
        kind, grid = self._grid_kind, current.grid
        if kind == "units":
            grid = unit_grid(self._holder[0], self._group, tokens, grid)
        elif grid is not None and kind == "halved":
            grid = grid.halved_to(tokens.shape[1] - current.prefix)
        elif grid is not None and kind == "unfolded":
            grid = unfolded_grid(grid, current.inside, tokens)
        elif grid is not None and kind == "frames_last":
            grid = replace(grid, times=(tokens.shape[1] - current.prefix) // grid.area, frames_last=True)
        return TokenLayout(current.prefix, grid, current.frames)

    def _branches(self, sublayer: str, reads: Reads) -> Iterator[Equation]:
        for equation in self._at(BranchSite):
            if equation.site.sublayer == sublayer and equation.site.reads == reads:
                yield equation

    def _beside(self, sublayer: str, current: Pass, stream: Tensor, normed: Tensor) -> None:
        """Branches beside a sub-layer, which all read the stream before it, as does what chooses tokens for it."""
        if sublayer == "mlp":
            self._choose(current, stream)
        for branch in self._branches(sublayer, "normed"):
            self._add(current, branch, normed)
        for branch in self._branches(sublayer, "stream"):
            self._add(current, branch, stream)

    def _after_sublayer(self, sublayer: str, current: Pass, stream: Tensor) -> None:
        """Branches after a sub-layer; `stream` is the block's own, without the additions of branches."""
        for branch in self._branches(sublayer, "output"):
            assert current.before is not None
            self._add(current, branch, stream - current.before)
        for branch in self._branches(sublayer, "block"):
            assert current.entered is not None
            self._add(current, branch, current.entered)
        for branch in self._branches(sublayer, "sum"):
            self._add(current, branch, current.with_added(stream))

    def _add(self, current: Pass, branch: Equation, x: Tensor) -> None:
        site = branch.site
        assert branch.module is not None
        layout = (self._layout(current, x),) if site.needs_layout else ()
        attend = (*((self._attend,) if site.attends else ()), *((self._cross,) if site.crosses else ()))
        sequences = x.shape[0] // current.images if current.images and site.needs_layout else 1
        if sequences > 1:  # several per image, one after the other: equal positions are consecutive in time
            assert current.frames is not None
            x = x.unflatten(0, (-1, current.frames, sequences)).transpose(1, 2).flatten(0, 2)
        delta = self._left(branch, call_equation(self, branch.module, x, *layout, *attend, *branch.shared))
        if sequences > 1:
            delta = delta.unflatten(0, (-1, sequences, current.frames)).transpose(1, 2).flatten(0, 2)
        if site.drop_path:
            delta = drop_path(delta, self.drop_path_rate, self.training)
        current.added = delta if current.added is None else current.added + delta

    def _seen(self, x: Tensor) -> Tensor:
        """The stream at the entrance of a sub-layer, as tokens; a map also gives the grid."""
        current = self._pass
        if current is not None and x.ndim == 4 and self._grid_kind == "map":
            current.grid = map_grid(x, self._stream_inside)
        return to_tokens(x, self._stream_inside)

    def _after_norm(self, sublayer: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self._pass is None:
            return
        stream = self._seen(args[0])
        if sublayer == "attention":
            self._pass.before = stream
        self._beside(sublayer, self._pass, stream, to_tokens(output, self._stream_inside))

    def _before_mlp(self, module: nn.Module, args: tuple) -> tuple | None:
        """Between attention and MLP; the MLP's norm also reads the additions so far."""
        current = self._pass
        if current is None:
            return None
        stream = self._seen(args[0])
        if "attention" in self._sublayers:
            self._after_sublayer("attention", current, stream)
            self._reduce(current, current.with_added(stream))
            current.between = current.with_added(stream)
        current.before = stream
        return None if current.added is None else (current.with_added(args[0], self._stream_inside), *args[1:])

    def _before_rest(self, module: nn.Module, args: tuple) -> tuple | None:
        """After the last sub-layer of a block that continues there."""
        current = self._pass
        return None if current is None else (self._finish(current, args[0]), *args[1:])

    def _finish(self, current: Pass, stream: Tensor) -> Tensor:
        """The stream after the last sub-layer, with all additions of branches."""
        if current.chosen is not None:
            chosen = self._chosen_only(current, to_tokens(stream, self._stream))
            stream = from_tokens(chosen, stream, self._stream)
        for sublayer in self._sublayers[-1:]:
            self._after_sublayer(sublayer, current, to_tokens(stream, self._stream))
        current.finished = True
        return current.with_added(stream, self._stream)

    def _before_sublayer(self, sublayer: str, module: nn.Module, args: tuple) -> tuple | None:
        """At the entrance of a sub-layer without a norm there."""
        current = self._pass
        if current is None:
            return None
        if sublayer == "mlp":
            args = self._before_mlp(module, args) or args
        else:
            current.before = self._seen(args[0])
        stream = self._seen(args[0])
        self._beside(sublayer, current, stream, self._normed(sublayer, stream))
        return args


def holder_of_lists(backbone: VisionBackbone) -> str:
    """Name of the module that holds the lists of blocks."""
    assert isinstance(backbone.architecture.blocks, str)
    names = backbone.architecture.blocks.split(".")
    inner = names[: names.index("*") - 1] if "*" in names else names[:-1]
    return ".".join(filter(None, (backbone.path, *inner)))


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: in training, zero whole samples of (batch, ...) at `rate` and scale up the others."""
    if rate == 0.0 or not training:
        return x
    keep = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), device=x.device) >= rate
    return x * keep.to(x.dtype) / (1.0 - rate)
