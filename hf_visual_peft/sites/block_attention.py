"""What a block layer does to the attention of its block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attention import LogitSite, attention_of, change_attention, has_interface, leave_attention
from .block_sites import Pass
from .grid import TokenLayout
from .layer import VisualTunerLayer, call_equation
from .masks import PositionBias
from .prompted_attention import prompted_forward
from .queries import QueryPath


class AttentionLayer(VisualTunerLayer):
    """The part of `BlockLayer` that changes logits, lets tokens join, and takes further ones through the block."""

    _query: str
    _prompts: str | None
    _post_norm: bool
    _attention: tuple[tuple[nn.Module, ...], ...]  # norm, query, key, value, output
    _position_biases: list[PositionBias]
    _handles: list[Any]
    _pass: Pass | None

    def _init_attention(self) -> None:
        self._watched: tuple[nn.Module, ...] = ()  # the attention module that equations act in
        self._appending = False
        self._prompted: tuple[nn.Module, ...] = ()  # the attention module whose forward takes further tokens
        self._prompted_before: Callable[..., Any] | None = None
        self._queries: QueryPath | None = None  # the way of further tokens through the block

    def watch_attention(self) -> None:
        """Let equations change the logits of the block's attention, or its keys and values, from now on."""
        if not self._watched:
            self._watched = (attention_of(self.base_layer, self._query),)
            change_attention(self._watched[0], self._logit_change, self._joining_heads, self._seen_heads)

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
            self._replace_forward(attention)
            return
        _, _, keys, values, _ = self._attention
        if keys == values:
            raise ValueError(
                f"{type(attention).__name__} makes queries, keys and values in one module and computes attention in a "
                "way of its own: no tokens can join those of its attention. Set Architecture.prompts to None."
            )
        for module in dict.fromkeys((*keys, *values)):
            self._handles.append(module.register_forward_hook(self._append))

    def watch_queries(self) -> None:
        """Let further tokens go through the block from now on, which its own do not see."""
        if self._queries is not None:
            return
        _, _, (key,), (value,), _ = self._attention
        self._queries = QueryPath(self.base_layer, self._query, key, value, self._position_biases)
        self._handles += self._queries.handles
        if self._queries.interface:
            self.watch_attention()
        else:
            self._replace_forward(self._queries.attention)

    def _seen_heads(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, bool]:
        return (key, value, False) if self._queries is None else self._queries.see(key, value)

    def _replace_forward(self, attention: nn.Module) -> None:
        if not self._prompted:
            self._prompted = (attention,)
            self._prompted_before = attention.__dict__.get("forward")
            attention.forward = self._prompted_forward

    def _prompted_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the attention module does instead of its own forward."""
        (attention,) = self._prompted
        if self._queries is not None and self._queries.seen is not None:
            return self._queries.answer(*args, **kwargs)
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

    def _join(self, tokens: Tensor, current: Pass) -> None:
        current.joining = self._normed("attention", tokens)

    def _append(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Keys or values, with those of the tokens that join behind them."""
        current = self._pass
        if current is None or current.joining is None:
            return None
        with self._unwatched():
            return torch.cat([output, module(current.joining)], dim=1)

    def _ask(self, ask: Callable[[Tensor], Tensor], queries: Tensor) -> Tensor:
        with self._unwatched():
            return ask(queries)

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

    def _detach_attention(self) -> None:
        for module in self._watched:
            leave_attention(module)
        for module in self._prompted:
            del module.forward
            if self._prompted_before is not None:
                module.forward = self._prompted_before
