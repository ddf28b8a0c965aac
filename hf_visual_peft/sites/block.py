"""The sites inside and around a transformer block.

A block runs its own forward; adapters act at five points of it:

    x -> norm1 -> attention -> (+ x) = z -> norm2 -> MLP -> (+ z) = out

that is x, the outputs of both norms, z and out. The output of a sub-layer is the difference of the stream before and
after it. An addition at z is added to out again, because the residual connection carries z past the addition. So the
block's own layer scale and stochastic depth act only on its own branches, as in the equations of the adapters, however
the architecture implements them.

Other blocks have the same points. If the norms follow the sub-layers, or there are no norms, attention and MLP read
the stream itself, and so do branches beside them. If blocks hold maps, equations see their cells as tokens. In a block
whose attention pools, or that has only one sub-layer, branches stand only at the sub-layer that remains.

`block_branches` has the hooks at these points and the branches, `block_attention` the part that acts in attention,
`block_side` the part for side networks, and `selection` the part that chooses tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.backbone import Block, VisionBackbone
from ..backbones.watching import first_argument
from .block_branches import BranchLayer, holder_of_lists
from .block_checks import require_stream
from .block_class import adapted_class, plain_class
from .block_sites import Pass, TokenSite, reaches_into
from .exchange import Exchange, recomputes
from .grid import Grid, map_grid, to_tokens
from .layer import CHILD, Equation, call_equation
from .losses import Left
from .masks import PositionBias, seen_tokens, widen
from .mixed import BASE, instead_of_forward
from .site import BlockSite
from .weights import changed_forward


# Arguments of blocks with one entry, or a row and a column, for each token.
_MASKS = ("attention_mask", "relative_position_bias")
# Arguments of blocks with the rows and columns of the grid.
_SIZES = ("input_dimensions", "height", "width")


class BlockAdapters(BranchLayer, nn.Module):
    """Equations inside and around a transformer block, of which this is a child.

    The block keeps its place, its class (see `AdaptedBlock`) and its hooks. The hooks (transformers records hidden
    states there) see the backbone's own tokens with all additions.

    Args:
        owner: the block.
        model: the model it belongs to.
        block: the block's roles.
        backbone: that it belongs to.
        exchange: shared with the other adapter layers of the model.

    Raises:
        ValueError: the block already has an attribute of that name.
    """

    serves = BlockSite
    stands_in = True

    @classmethod
    def create(
        cls, target: nn.Module, path: str, model: nn.Module, backbone: VisionBackbone | None, exchange: Exchange
    ) -> BlockAdapters:
        """For the block of that name."""
        assert backbone is not None
        block = next(block for block in backbone.blocks if block.path == path)
        return cls(target, model, block, backbone, exchange)

    def __init__(
        self, owner: nn.Module, model: nn.Module, block: Block, backbone: VisionBackbone, exchange: Exchange
    ) -> None:
        super().__init__()
        if hasattr(owner, CHILD):
            raise ValueError(
                f"{type(owner).__name__} has an attribute {CHILD!r} of its own, where methods at blocks put theirs. "
                "Methods on single modules, as SSFConfig and LoraConfig, work there."
            )
        self._owner = (owner,)  # a tuple, so that it is not a submodule
        self._init_layer(exchange)
        table = block.table or backbone.architecture
        self.prefix_tokens = block.prefix_tokens
        self._sublayers, self._post_norm = block.sublayers, block.post_norm
        self._grid_kind, self._prompts, self._group = table.grid, table.prompts, block.group
        self._stream, self._stream_inside = table.stream, table.stream_inside or table.stream
        self._query, self._key, self._value, self._output = (
            path.removeprefix(f"{block.path}.")
            for path in (*(block.projections or ("",) * 3), (*block.roles["output"], "")[0])
        )
        self._init_attention()
        self._init_side()
        self._init_choice()
        self._pass: Pass | None = None
        self._block_returns_tuple = False
        self._first_argument = first_argument(owner)
        names = list(inspect.signature(type(owner).forward).parameters)[2:]
        self._mask_positions = {name: position for position, name in enumerate(names) if name in _MASKS}
        self._size_positions = {name: position for position, name in enumerate(names) if name in _SIZES}
        self._stream_handles: list[Any] = []
        self._block = block
        self.where = block.path
        modules = {role: tuple(map(model.get_submodule, paths)) for role, paths in block.roles.items()}
        self._holder: tuple[nn.Module, ...] = (
            (model.get_submodule(holder_of_lists(backbone)),) if table.grid == "units" else ()
        )
        self._set_hooks()
        rates = (getattr(module, "drop_prob", None) for module in modules["drop_path"])
        self.drop_path_rate = next((rate for rate in rates if rate), 0.0)
        self._position_biases = [
            PositionBias(module, self.prefix_tokens)
            for module in modules["position_bias"]
            if self._prompts == "sequence"
        ]

    def get_base_layer(self) -> nn.Module:
        """The block."""
        return self._owner[0]

    def attach(self) -> None:
        """Attach to the block, which then calls `around` and `inside`."""
        owner: Any = self.get_base_layer()
        # The block may already have its own forward (accelerate sets one) instead of that of its class.
        self._forward_before = vars(owner).get("forward")
        owner.forward = self.inside
        owner.add_module(CHILD, self)
        kind: type = type(owner)
        owner.__class__ = adapted_class(kind)
        self.exchange.blocks[self._block.index] = self

    def detach(self) -> None:
        """Undo all changes of the block."""
        owner: Any = self.get_base_layer()
        own, kind = vars(owner), plain_class(type(owner))
        # accelerate may have put its own forward around this one since
        name = "_old_forward" if own.get("_old_forward") == self.inside else "forward"
        if self._forward_before is not None or name == "_old_forward":
            setattr(owner, name, self._forward_before or MethodType(kind.forward, owner))  # type: ignore[attr-defined]
        elif own.get("forward") == self.inside:
            del owner.forward
        owner.__class__ = kind
        delattr(owner, CHILD)
        self._remove_hooks()
        for bias in self._position_biases:
            bias.remove()
        self._detach_attention()
        self._detach_side()
        self.exchange.blocks.pop(self._block.index, None)

    def holds(self, paths: Iterable[str]) -> bool:
        """Whether one of some modules, given by their full names, is a part of the block."""
        return any(path.startswith(f"{self.path}.") for path in paths)

    def reaches_into(self, path: str) -> bool:
        """Whether the adapters change a module of the block by more than hooks, so that a copy would lack the change.

        Args:
            path: full name of the module.
        """
        sites = [planned.site for plan in self.plans.values() for planned in plan]
        return reaches_into(sites, self._block, self._prompts, path)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible.

        Raises:
            ValueError: always.
        """
        slots = {planned.attribute for plan in self.plans.values() for planned in plan}
        raise ValueError(
            f"{', '.join(sorted(slots))} cannot be merged: it is not an affine change of a weight of the backbone. "
            "Keep the adapter beside the backbone; `unload()` gives the backbone back without it."
        )

    def check_mergeable(self) -> None:
        """Not possible.

        Raises:
            ValueError: always.
        """
        self.merge()

    def unmerge(self) -> None:
        """Not possible, because nothing can be merged.

        Raises:
            ValueError: always.
        """
        self.merge()

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call of the block with adapters.

        Args:
            call: the block's own call, with its hooks.
            args: of the block, (batch, tokens, width) first.
            kwargs: of the block.
        """
        if not args and self._first_argument in kwargs:
            args = (kwargs.pop(self._first_argument),)
        self.exchange.for_heads.clear()  # left from a pass that did not reach the heads
        self.follow()
        self._changed()
        if self.exchange.instead is not None:
            output = self.exchange.instead(self._block.index, args[0])
            # transformers collects hidden states by hooks of blocks; nothing that a checkpoint would save is computed
            returned = (output,) if self._block_returns_tuple else output
            with instead_of_forward(self._owner[0], lambda *_, **__: returned):
                return nn.Module.__call__(self._owner[0], *args, **kwargs)
        if not any(True for _ in self._active()):
            return call(*args, **kwargs)
        return self._around(call, *args, **kwargs)

    def _around(self, call: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        exchange, base = self.exchange, self._owner[0]
        require_stream(base, hidden_states, self._stream == "packed")
        sites = {e.key: e.site for e in self._active() if e.site.takes or e.site.hands_on or e.site.needs_pixels}
        self._require_whole_pass(sites.values())
        tokens = {name: self._taken(name) for name, site in sites.items() if site.takes}
        layouts = {name: exchange.layouts.pop(name) for name in tokens if name in exchange.layouts}
        onward = tuple(name for name, site in sites.items() if site.hands_on)
        # a bypassed block keeps no activations, so there is nothing to recompute
        checkpoint = self.training and getattr(base, "gradient_checkpointing", False) and not self.bypassed
        # Tokens, grid and frames of this pass are arguments: before the function runs again in the backward pass, the
        # model may have seen other images.
        after = dict(layouts)
        new_pass = partial(
            Pass,
            exchange.grid,
            exchange.frames,
            images=exchange.images,
            layouts=layouts,
            layouts_after=after,
            pixels=exchange.pixels,
            patches=exchange.patches,
        )
        # Terms of auxiliary losses are outputs of the checkpointed function, so that gradients reach them. When it
        # runs again in the backward pass, they are dropped.
        left: list[Left] | None = None if exchange.left is None else []
        run = partial(self._run, call, new_pass, tuple(tokens), onward, left, checkpoint, kwargs)
        if checkpoint:
            checkpointed: Any = base._gradient_checkpointing_func
            run = partial(checkpointed, run)
        output = run(hidden_states, *tokens.values(), *args)
        if left:
            output, values = output[: -len(left)], output[-len(left) :]
            assert exchange.left is not None
            exchange.left += [each._replace(value=value) for each, value in zip(left, values, strict=True)]
            if not onward and not self._block_returns_tuple:
                output = output[0]
        exchange.layouts.update((name, after[name]) for name in onward if name in after)
        if onward:
            exchange.handed_on.update(zip(onward, output[-len(onward) :], strict=True))
            for e in self._active():
                if e.site.heads is not None and e.site.hands_on:
                    exchange.leave_to_heads(e.adapter, e.owner, exchange.handed_on.pop(e.key), e.site.heads)
                elif e.site.keeps:
                    state = exchange.handed_on.pop(e.key)
                    if exchange.collected is not None:
                        exchange.collected[e.adapter] = state
            output = output[: -len(onward)]
            return output if self._block_returns_tuple else output[0]
        return output

    def _require_whole_pass(self, sites: Iterable[BlockSite]) -> None:
        """Refuse to run in the backward pass, for a checkpoint around more than this block.

        Raises:
            ValueError: an adapter needs results of other blocks, or images, of the forward pass.
        """
        if torch.compiler.is_compiling() or not recomputes():
            return
        if any(s.takes or s.hands_on or s.needs_pixels for s in sites):
            raise ValueError(
                f"Gradient checkpointing around several modules computes {type(self.get_base_layer()).__name__} again "
                "without what an active adapter hands from block to block. Switch it off (timm: "
                "`set_grad_checkpointing(False)`), or checkpoint single blocks (transformers: "
                "`gradient_checkpointing_enable()`)."
            )

    def _taken(self, name: str) -> Tensor:
        """Tokens, or the state of a side network, from the block before."""
        if name not in self.exchange.handed_on:
            raise ValueError(
                f"{self.path!r} gets nothing of the adapter {name!r} from the block before: call the whole model, not "
                "a block of it."
            )
        return self.exchange.handed_on.pop(name)

    def _run(
        self,
        call: Callable[..., Any],
        new_pass: Callable[[dict[str, Tensor], int], Pass],
        taken: tuple[str, ...],
        onward: tuple[str, ...],
        left: list[Left] | None,
        checkpoint: bool,
        kwargs: dict[str, Any],
        hidden_states: Tensor,
        *rest: Any,
    ) -> Any:
        found: list[Left] | None = None if left is None else []
        before, self.exchange.left = self.exchange.left, found
        tokens = dict(zip(taken, rest, strict=False))
        self._pass = new_pass(tokens, self.prefix_tokens)
        base: Any = self.get_base_layer()
        if checkpoint:  # once is enough: the block would checkpoint again inside
            base.gradient_checkpointing = False
        try:
            output = call(hidden_states, *rest[len(taken) :], **kwargs)
        finally:
            self._pass = None
            self.exchange.left = before
            if checkpoint:
                base.gradient_checkpointing = True
        if left is not None and found is not None:
            left[:] = found
        if not onward and not found:
            return output
        flat = output if self._block_returns_tuple else (output,)
        return (*flat, *(tokens[name] for name in onward), *(each.value for each in found or ()))

    def inside(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward with adapters; called by the block, inside its hooks."""
        base: Any = self.get_base_layer()
        forward: Callable[..., Any] = self._forward_before or partial(type(base).forward, base)
        if self._pass is None:
            return forward(*args, **kwargs)
        return self._inside(self._pass, forward, *args, **kwargs)

    def _inside(
        self, current: Pass, forward: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        # Inside the hooks, which see the whole batch, and before tokens make sequences of different lengths.
        if parts := self._parts((hidden_states,)):
            return self._run_parts(parts, partial(self._part_forward, current), (hidden_states, *args), kwargs)
        forward = changed_forward(self.get_base_layer(), forward, self._active())
        current.grid = self._told_grid(current, hidden_states, args, kwargs)
        if any(e.site.needs_mask for e in self._active()):
            current.seen = self._seen_tokens(args, kwargs)
        hidden_states = before = self._enter(current, hidden_states)
        names = self._insert(hidden_states, current)
        both = {e.key for e in self._at(TokenSite) if e.site.keeps_input}
        inserted = 0
        if self._prompts == "sequence":
            inserted = sum(current.tokens[name].shape[1] for name in names)
        elif names:
            self._join(torch.cat([current.tokens[name] for name in names], dim=1), current)
        if inserted:
            end = self.prefix_tokens
            pieces = [hidden_states[:, :end], *(current.tokens[name] for name in names), hidden_states[:, end:]]
            args, kwargs = self._make_room(args, kwargs, hidden_states.shape[1], inserted)
            hidden_states = torch.cat(pieces, dim=1)
            current.prefix += inserted
        for branch in self._branches("attention", "input"):
            self._add(current, branch, to_tokens(hidden_states, self._stream))
        # An addition here reaches all later parts of the block.
        hidden_states, current.added = current.with_added(hidden_states, self._stream), None
        current.entered = to_tokens(hidden_states, self._stream)
        for sublayer in self._reads_block:
            stream = to_tokens(hidden_states, self._stream)
            current.before = stream
            self._beside(sublayer, current, stream, self._normed(sublayer, stream))
        with torch.no_grad() if self.bypassed else nullcontext():
            if self._queries is not None and any(e.site.asks for e in self._active()):
                output, ask = self._queries.run(forward, hidden_states, args, kwargs)
                current.ask = partial(self._ask, ask)
            else:
                output = forward(hidden_states, *args, **kwargs)
        self._block_returns_tuple = isinstance(output, tuple)
        stream = output[0] if self._block_returns_tuple else output
        if not current.finished:
            stream = self._finish(current, stream)
        if inserted:
            start = self.prefix_tokens
            for name in names:
                stop = start + current.tokens[name].shape[1]
                left = stream[:, start:stop]
                current.tokens[name] = torch.cat([current.tokens[name], left], dim=1) if name in both else left
                start = stop
            stream = torch.cat([stream[:, : self.prefix_tokens], stream[:, start:]], dim=1)
            if current.between is not None:
                between = current.between
                current.between = torch.cat([between[:, : self.prefix_tokens], between[:, start:]], dim=1)
            current.prefix -= inserted
        stream = self._without_tokens(current, stream)
        stream = self._beside_block(current, before, stream)
        return (stream, *output[1:]) if self._block_returns_tuple else stream

    def _part_forward(
        self, whole: Pass, name: str, index: Tensor, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """The samples of one adapter in a batch that mixes several."""
        grid = None if whole.grid is None else whole.grid.of_samples(index)
        pixels, patches = (None if x is None else x[index] for x in (whole.pixels, whole.patches))
        self._pass = None if name == BASE else replace(whole, grid=grid, pixels=pixels, patches=patches)
        try:
            return self.inside(hidden_states, *args, **kwargs)
        finally:
            self._pass = whole

    def _told_grid(self, current: Pass, x: Tensor, args: tuple, kwargs: dict) -> Grid | None:
        """The layout of the tokens of the block's input in the image, as far as embeddings, x or arguments give it."""
        if self._grid_kind == "map":
            return map_grid(x, self._stream)
        if self._grid_kind == "unfolded":
            current.inside = x.shape[2]
        if self._grid_kind == "given":
            given = {name: args[i] if i < len(args) else kwargs[name] for name, i in self._size_positions.items()}
            return Grid(*given["input_dimensions"] if "input_dimensions" in given else given.values())
        return current.grid

    def _insert(self, hidden_states: Tensor, current: Pass) -> list[str]:
        """Compute the prompts of this block; return the names of all sets of prompts here."""
        names = []
        for each in self._at(TokenSite):
            if each.module is not None:
                new = self._left(each, self._new_tokens(current, hidden_states, each))
                current.tokens[each.key] = new.to(hidden_states.dtype)
            names.append(each.key)
        return names

    def _new_tokens(self, current: Pass, hidden_states: Tensor, each: Equation) -> Any:
        assert each.module is not None
        if each.site.takes:
            return call_equation(self, each.module, current.tokens[each.key], *each.shared)
        if each.site.reads:
            x = to_tokens(hidden_states, self._stream)
            queries = (self._make_queries,) if each.site.queries else ()
            return call_equation(self, each.module, x, self._layout(current, x), *queries, *each.shared)
        return each.module(hidden_states.shape[0], *each.shared)

    def _make_room(self, args: tuple, kwargs: dict, length: int, count: int) -> tuple[tuple, dict]:
        """Give masks and biases on attention logits a row and a column for each inserted token."""
        kwargs = dict(kwargs)
        positional = list(args)
        for name, position in self._mask_positions.items():
            if position < len(positional):
                positional[position] = widen(positional[position], name, self.prefix_tokens, length, count)
            elif name in kwargs:
                kwargs[name] = widen(kwargs[name], name, self.prefix_tokens, length, count)
        return tuple(positional), kwargs

    def _seen_tokens(self, args: tuple, kwargs: dict) -> Tensor | None:
        """Which tokens of the block's input are not padding; None if all are."""
        name, position = "attention_mask", self._mask_positions.get("attention_mask", len(args))
        return seen_tokens(args[position] if position < len(args) else kwargs.get(name), name)
