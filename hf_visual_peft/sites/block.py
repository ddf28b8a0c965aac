"""The sites inside and around a transformer block.

A block layer leaves the block's forward to the block and works at five points of it:

    x -> norm1 -> attention -> (+ x) = z -> norm2 -> MLP -> (+ z) = out

that is x, the outputs of both norms, z and out. What a sub-layer adds is the difference of the stream before and after
it. What is added at z is added to out once more, because the residual connection carried z past the addition. So the
block's own layer scale and stochastic depth act on its own branches only, as the equations of the adapters have it, in
whatever way the architecture writes them.

Other blocks have the same points. Where the norms follow the sub-layers, or there are none, attention and MLP read the
stream itself, and so do branches beside them. Where blocks hold maps, equations see their cells as tokens. Where a
block pools, or has one sub-layer only, branches stand at the other alone.

All of it is one forward pass, which is why this file is longer than others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..architectures import Stream
from ..backbone import SUBLAYER_ROLES, Block, VisionBackbone
from .attention import LogitSite, attention_of, change_attention, has_interface, leave_attention
from .exchange import Exchange
from .grid import Grid, TokenLayout, from_tokens, map_grid, to_tokens, unfolded_grid, unit_grid
from .layer import Equation, Site, VisualTunerLayer, call_equation
from .masks import PositionBias, widen
from .mixed import BASE
from .prompted_attention import prompted_forward


# Arguments of blocks that have one entry, or a row and a column, for each token.
_MASKS = ("attention_mask", "relative_position_bias")
# Arguments of blocks that tell rows and columns of the grid.
_SIZES = ("input_dimensions", "height", "width")


Reads = Literal["input", "normed", "stream", "output", "sum"]


@dataclass(frozen=True)
class BranchSite(Site):
    """A branch at attention or MLP, added to the token stream after the sub-layer.

    The equation is called with (batch, tokens, width) and returns the same shape. Branches before the sub-layer
    (`"input"`) are part of what those beside it read (`"normed"`, `"stream"`), and these come before those that follow
    it (`"output"`, then `"sum"`).

    Attributes:
        sublayer: which of the two.
        reads: the branch's input. `"input"`: the stream as it comes to the block, which the branch changes for the
            attention, too; `"normed"`: the output of the norm before the sub-layer; `"stream"`: the stream before that
            norm; `"output"`: what the sub-layer adds to the stream, after layer scale and stochastic depth; `"sum"`:
            the stream after the sub-layer, with all branches before this one.
        drop_path: whether the branch is dropped at the block's stochastic depth rate, independently of the sub-layer.
        needs_layout: whether the equation is called with a `TokenLayout` as second argument.
        attends: whether the equation is then called with a function, too, that applies the block's first norm and its
            attention to any (batch, tokens, width), without masks, position biases and layer scale.
    """

    sublayer: Literal["attention", "mlp"]
    reads: Reads
    drop_path: bool = False
    needs_layout: bool = False
    attends: bool = False


@dataclass(frozen=True)
class TokenSite(Site):
    """Tokens put into the sequence after the prefix tokens and taken out again after the block.

    From outside, a block has the backbone's own tokens only. The equation is called with the batch size and returns
    (batch, tokens, width). Where attention does not take a sequence as it comes to the block, the tokens join it
    there as further keys and values (`Architecture.prompts`), those of all windows, and none leave the block.

    Attributes:
        takes: whether the tokens are those that the block before handed on, and not new ones.
        hands_on: whether the block after gets the tokens as this block leaves them.
    """

    takes: bool = False
    hands_on: bool = False


@dataclass
class _Pass:
    """One pass through one block: what comes in, and what the equations add on the way."""

    grid: Grid | None
    frames: int | None
    tokens: dict[str, Tensor]
    prefix: int
    before: Tensor | None = None  # the block's own stream before the sub-layer at work
    images: int = 0  # where they belong to videos
    inside: int = 1  # cells of a patch, where these are the rows of the stream
    joining: Tensor | None = None  # tokens that are not in the sequence, as attention reads them
    added: Tensor | None = None  # by all branches so far
    finished: bool = False  # whether the stream is behind the last sub-layer

    def with_added(self, x: Tensor, stream: Stream = "tokens") -> Tensor:
        return x if self.added is None else x + from_tokens(self.added, x, stream)


class BlockLayer(VisualTunerLayer, nn.Module):
    """A transformer block with equations inside and around it.

    The block keeps its class and its hooks, and what the hooks see (transformers records hidden states there) is the
    backbone's own tokens with everything that was added to them.

    Args:
        base_layer: the block.
        model: the model it belongs to.
        block: the block's roles.
        backbone: that it belongs to.
        exchange: shared with the other adapter layers of the model.
    """

    def __init__(
        self, base_layer: nn.Module, model: nn.Module, block: Block, backbone: VisionBackbone, exchange: Exchange
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._init_layer(exchange)
        table = backbone.architecture
        self.prefix_tokens = block.prefix_tokens
        self._num_heads = block.num_heads
        self._sublayers, self._post_norm = block.sublayers, block.post_norm
        self._grid_kind, self._prompts, self._group = table.grid, table.prompts, block.group
        self._stream, self._stream_inside = table.stream, table.stream_inside or table.stream
        self._query = block.roles["query"][0].removeprefix(f"{block.path}.") if block.roles["query"] else ""
        self._watched: tuple[nn.Module] | None = None  # the attention module that equations act in
        self._appending = False
        self._prompted: tuple[nn.Module, ...] = ()  # the attention module whose forward takes further tokens
        self._prompted_before: Callable[..., Any] | None = None
        self._pass: _Pass | None = None
        self._block_returns_tuple = False
        names = list(inspect.signature(type(base_layer).forward).parameters)[2:]
        self._mask_positions = {name: position for position, name in enumerate(names) if name in _MASKS}
        self._size_positions = {name: position for position, name in enumerate(names) if name in _SIZES}
        # The block's forward may already be one that was set on it (accelerate does that), not that of its class.
        self._forward_before = base_layer.__dict__.get("forward")
        base_layer.forward = self._adapted_forward
        self._handles: list[Any] = []
        # tuples, so that they are no submodules of the layer
        modules = {role: tuple(map(model.get_submodule, paths)) for role, paths in block.roles.items()}
        self._attention: tuple[tuple[nn.Module, ...], ...] = tuple(
            modules[role][:1] for role in SUBLAYER_ROLES["attention"]
        )
        self._holder: tuple[nn.Module, ...] = (
            (model.get_submodule(_holder_of_lists(backbone)),) if table.grid == "units" else ()
        )
        self._watch_sublayers(block, model)
        rates = (getattr(module, "drop_prob", None) for module in modules["drop_path"])
        self.drop_path_rate = next((rate for rate in rates if rate), 0.0)
        self._position_biases = [
            PositionBias(module, self.prefix_tokens)
            for module in modules["position_bias"]
            if self._prompts == "sequence"
        ]

    def _watch_sublayers(self, block: Block, model: nn.Module) -> None:
        """Set the hooks at which the block's stream can be seen."""
        self._reads_block: list[str] = []  # sub-layers whose entrance is that of the block
        for sublayer, path in block.entrances.items():
            if path == block.path:
                self._reads_block.append(sublayer)
                continue
            entrance = model.get_submodule(path)
            if path in block.roles[SUBLAYER_ROLES[sublayer][0]]:
                if sublayer == "mlp":
                    self._handles.append(entrance.register_forward_pre_hook(self._before_mlp))
                self._handles.append(entrance.register_forward_hook(partial(self._after_norm, sublayer)))
            else:
                self._handles.append(entrance.register_forward_pre_hook(partial(self._before_sublayer, sublayer)))
        for path in block.rest:
            self._handles.append(model.get_submodule(path).register_forward_pre_hook(self._before_rest))

    def watch_attention(self) -> None:
        """Let equations change the logits of the block's attention, or its keys and values, from now on."""
        if self._watched is None:
            self._watched = (attention_of(self.base_layer, self._query),)
            change_attention(self._watched[0], self._logit_change, self._joining_heads)

    def watch_tokens(self) -> None:
        """Let tokens join the block's attention as further keys and values, where they are not in the sequence."""
        if self._prompts != "keys" or self._appending:
            return
        if has_interface(self.base_layer, self._query):
            self.watch_attention()
            return
        self._appending = True
        attention = self.base_layer.get_submodule(self._query.rpartition(".")[0])
        if prompted_forward(attention) is not None:
            self._prompted = (attention,)
            self._prompted_before = attention.__dict__.get("forward")
            attention.forward = self._prompted_forward
            return
        _, _, keys, values, _ = self._attention
        if keys == values:
            raise ValueError(
                f"{type(attention).__name__} makes queries, keys and values in one module and computes attention in a "
                "way of its own: no tokens can join those of its attention. Set Architecture.prompts to None."
            )
        for module in dict.fromkeys((*keys, *values)):
            self._handles.append(module.register_forward_hook(self._append))

    def _prompted_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the attention module does instead of its own forward."""
        (attention,) = self._prompted
        if self._pass is not None and self._pass.joining is not None:
            forward = prompted_forward(attention)
            assert forward is not None
            return forward(attention, self._pass.joining, *args, **kwargs)
        return (self._prompted_before or partial(type(attention).forward, attention))(*args, **kwargs)

    def _joining_heads(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the tokens that join, as heads (batch, heads, tokens, channels) like the block's own."""
        current = self._pass
        if current is None or current.joining is None:
            return None
        _, _, (key,), (value,), _ = self._attention
        joining, heads = current.joining, like.shape[1]
        windows = like.shape[0] // joining.shape[0]
        with self._unwatched():
            projected = key(joining).chunk(3, dim=-1)[1:] if key is value else (key(joining), value(joining))
            found = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in projected)
            keys, values = (tensor.repeat_interleave(windows, dim=0) for tensor in found)
        return keys, values

    def _logit_change(self) -> Callable[[Tensor], Tensor] | None:
        equations = [e for e in self._active() if isinstance(e.site, LogitSite)]
        if not equations or self._pass is None:
            return None
        layout = TokenLayout(self._pass.prefix, self._pass.grid, self._pass.frames)

        def change(logits: Tensor) -> Tensor:
            for _, equation, _, shared in equations:
                assert equation is not None
                logits = call_equation(self, equation, logits, layout, *shared)
            return logits

        return change

    def detach(self) -> nn.Module:
        """Undo everything that was done to the block and return it."""
        del self.base_layer.forward
        if self._forward_before is not None:
            self.base_layer.forward = self._forward_before
        for handle in self._handles:
            handle.remove()
        for bias in self._position_biases:
            bias.remove()
        for module in self._watched or ():
            leave_attention(module)
        for module in self._prompted:
            del module.forward
            if self._prompted_before is not None:
                module.forward = self._prompted_before
        self.exchange.unwatch()
        return self.base_layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible.

        Raises:
            ValueError: always.
        """
        slots = {slot for plan in self.plans.values() for slot, _, _ in plan}
        raise ValueError(
            f"{', '.join(sorted(slots))} cannot be merged: it is no affine change of a weight of the backbone. Keep "
            "the adapter beside the backbone; `unload()` gives the backbone back without it."
        )

    def unmerge(self) -> None:
        """Not possible, as nothing can be merged.

        Raises:
            ValueError: always.
        """
        self.merge()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the block's, (batch, tokens, width) first."""
        if not any(True for _ in self._active()):
            return self.base_layer(hidden_states, *args, **kwargs)
        sites = {e.adapter: e.site for e in self._active() if isinstance(e.site, TokenSite)}
        tokens = {name: self.exchange.handed_on.pop(name) for name, site in sites.items() if site.takes}
        onward = tuple(name for name, site in sites.items() if site.hands_on)
        base: Any = self.base_layer
        checkpoint = self.training and getattr(base, "gradient_checkpointing", False)
        # Tokens, grid and frames of this pass are arguments: when the function runs again in the backward pass, other
        # images may have been through the model.
        new_pass = partial(_Pass, self.exchange.grid, self.exchange.frames, images=self.exchange.images)
        run = partial(self._run, new_pass, tuple(tokens), onward, checkpoint, kwargs)
        call = partial(base._gradient_checkpointing_func, run) if checkpoint else run
        output = call(hidden_states, *tokens.values(), *args)
        if onward:
            self.exchange.handed_on.update(zip(onward, output[-len(onward) :], strict=True))
            output = output[: -len(onward)]
            return output if self._block_returns_tuple else output[0]
        return output

    def _run(
        self,
        new_pass: Callable[[dict[str, Tensor], int], _Pass],
        taken: tuple[str, ...],
        onward: tuple[str, ...],
        checkpoint: bool,
        kwargs: dict[str, Any],
        hidden_states: Tensor,
        *rest: Any,
    ) -> Any:
        tokens = dict(zip(taken, rest, strict=False))
        self._pass = new_pass(tokens, self.prefix_tokens)
        base: Any = self.base_layer
        if checkpoint:  # once is enough: the block would do it again inside
            base.gradient_checkpointing = False
        try:
            output = base(hidden_states, *rest[len(taken) :], **kwargs)
        finally:
            self._pass = None
            if checkpoint:
                base.gradient_checkpointing = True
        if not onward:
            return output
        flat = output if self._block_returns_tuple else (output,)
        return (*flat, *(tokens[name] for name in onward))

    def _adapted_forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the block does instead of its own forward; called by the block, inside its hooks."""
        forward: Callable[..., Any] = self._forward_before or partial(type(self.base_layer).forward, self.base_layer)
        current = self._pass
        if current is None:
            return forward(hidden_states, *args, **kwargs)
        # Inside the hooks, which see the whole batch, and before tokens make sequences of different lengths.
        if parts := self._parts((hidden_states,)):
            return self._run_parts(parts, partial(self._part_forward, current), (hidden_states, *args), kwargs)
        current.grid = self._told_grid(current, hidden_states, args, kwargs)
        names = self._insert(hidden_states, current)
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
        # Here, and only here, what is added reaches everything after it by itself.
        hidden_states, current.added = current.with_added(hidden_states, self._stream), None
        for sublayer in self._reads_block:
            stream = to_tokens(hidden_states, self._stream)
            current.before = stream
            self._beside(sublayer, current, stream, self._normed(sublayer, stream))
        output = forward(hidden_states, *args, **kwargs)
        self._block_returns_tuple = isinstance(output, tuple)
        stream = output[0] if self._block_returns_tuple else output
        if not current.finished:
            stream = self._finish(current, stream)
        if inserted:
            start = self.prefix_tokens
            for name in names:
                stop = start + current.tokens[name].shape[1]
                current.tokens[name] = stream[:, start:stop]
                start = stop
            stream = torch.cat([stream[:, : self.prefix_tokens], stream[:, start:]], dim=1)
        return (stream, *output[1:]) if self._block_returns_tuple else stream

    def _part_forward(
        self, whole: _Pass, name: str, index: Tensor, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """The samples of one adapter in a batch that mixes several."""
        grid = None if whole.grid is None else whole.grid.of_samples(index)
        self._pass = None if name == BASE else replace(whole, grid=grid)
        try:
            return self._adapted_forward(hidden_states, *args, **kwargs)
        finally:
            self._pass = whole

    def _told_grid(self, current: _Pass, x: Tensor, args: tuple, kwargs: dict) -> Grid | None:
        """How the tokens of the block's input lie in the image, as far as the embeddings, x or arguments tell."""
        if self._grid_kind == "map":
            return map_grid(x, self._stream)
        if self._grid_kind == "unfolded":
            current.inside = x.shape[2]
        if self._grid_kind == "given":
            given = {name: args[i] if i < len(args) else kwargs[name] for name, i in self._size_positions.items()}
            return Grid(*given["input_dimensions"] if "input_dimensions" in given else given.values())
        return current.grid

    def _layout(self, current: _Pass, tokens: Tensor) -> TokenLayout:
        """How these tokens lie in the image.

        Raises:
            ValueError: they do not fit what is known of the image.
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

    def _normed(self, sublayer: str, stream: Tensor) -> Tensor:
        """What a sub-layer reads that takes its input from the block and not from a norm at its entrance."""
        norm = self._attention[0] if sublayer == "attention" else ()
        if self._post_norm or len(norm) == 0:
            return stream
        with self._unwatched():
            return norm[0](stream)

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        """Modules of the block work on other tokens than the block's own meanwhile; hooks are for these only."""
        current, self._pass = self._pass, None
        try:
            yield
        finally:
            self._pass = current

    def _join(self, tokens: Tensor, current: _Pass) -> None:
        current.joining = self._normed("attention", tokens)

    def _append(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Keys or values, with those of the tokens that join behind them."""
        current = self._pass
        if current is None or current.joining is None:
            return None
        with self._unwatched():
            return torch.cat([output, module(current.joining)], dim=1)

    def _insert(self, hidden_states: Tensor, current: _Pass) -> list[str]:
        """Make the tokens that this block starts with; the names of all adapters that have tokens here."""
        names = []
        for name, equation, site, shared in self._active():
            if isinstance(site, TokenSite):
                if equation is not None:
                    new = equation(hidden_states.shape[0], *shared)
                    current.tokens[name] = new.to(hidden_states.dtype)
                names.append(name)
        return names

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

    def _branches(self, sublayer: str, reads: Reads) -> Iterator[Equation]:
        for equation in self._active():
            site = equation.site
            if isinstance(site, BranchSite) and site.sublayer == sublayer and site.reads == reads:
                yield equation

    def _beside(self, sublayer: str, current: _Pass, stream: Tensor, normed: Tensor) -> None:
        """Branches beside a sub-layer, which all see the stream as it comes to it."""
        for branch in self._branches(sublayer, "normed"):
            self._add(current, branch, normed)
        for branch in self._branches(sublayer, "stream"):
            self._add(current, branch, stream)

    def _behind(self, sublayer: str, current: _Pass, stream: Tensor) -> None:
        """Branches that follow a sub-layer; `stream` is the block's own, without what the branches added."""
        assert current.before is not None
        for branch in self._branches(sublayer, "output"):
            self._add(current, branch, stream - current.before)
        for branch in self._branches(sublayer, "sum"):
            self._add(current, branch, current.with_added(stream))

    def _add(self, current: _Pass, branch: Equation, x: Tensor) -> None:
        site = branch.site
        assert isinstance(site, BranchSite)
        assert branch.module is not None
        layout = (self._layout(current, x),) if site.needs_layout else ()
        attend = (self._attend,) if site.attends else ()
        sequences = x.shape[0] // current.images if current.images and site.needs_layout else 1
        if sequences > 1:  # of an image, one behind the other: those of one place follow each other in time
            assert current.frames is not None
            x = x.unflatten(0, (-1, current.frames, sequences)).transpose(1, 2).flatten(0, 2)
        delta = call_equation(self, branch.module, x, *layout, *attend, *branch.shared)
        if sequences > 1:
            delta = delta.unflatten(0, (-1, sequences, current.frames)).transpose(1, 2).flatten(0, 2)
        if site.drop_path:
            delta = drop_path(delta, self.drop_path_rate, self.training)
        current.added = delta if current.added is None else current.added + delta

    def _attend(self, x: Tensor) -> Tensor:
        """Norm and attention of the block on other tokens than its own."""
        (norm,), (query,), (key,), (value,), (output,) = self._attention
        assert self._num_heads is not None
        weight: Any = norm.weight
        with self._unwatched():
            normed = norm(x.to(weight.dtype))  # an equation may work in another precision than the backbone
            if query is key:
                projected = query(normed).chunk(3, dim=-1)
            else:
                projected = tuple(module(normed) for module in (query, key, value))
            heads = (p.unflatten(-1, (self._num_heads, -1)).transpose(1, 2) for p in projected)
            mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
            return output(mixed).to(x.dtype)

    def _seen(self, x: Tensor) -> Tensor:
        """The stream at the entrance of a sub-layer, as tokens; a map tells the grid."""
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
        """Between attention and MLP; what was added so far is what the MLP's norm reads, too."""
        current = self._pass
        if current is None:
            return None
        stream = self._seen(args[0])
        if "attention" in self._sublayers:
            self._behind("attention", current, stream)
        current.before = stream
        return None if current.added is None else (current.with_added(args[0], self._stream_inside), *args[1:])

    def _before_rest(self, module: nn.Module, args: tuple) -> tuple | None:
        """Behind the last sub-layer of a block that goes on there."""
        current = self._pass
        return None if current is None else (self._finish(current, args[0]), *args[1:])

    def _finish(self, current: _Pass, stream: Tensor) -> Tensor:
        """The stream behind the last sub-layer, with all that branches add."""
        for sublayer in self._sublayers[-1:]:
            self._behind(sublayer, current, to_tokens(stream, self._stream))
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


def _holder_of_lists(backbone: VisionBackbone) -> str:
    """Name of the module in which the lists of blocks are found."""
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
