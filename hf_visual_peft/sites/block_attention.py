"""The part of the adapters of a block that acts in its attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..backbones.backbone import Block, linear_sizes, unwrapped
from ..backbones.modes import in_eval_mode
from .attention import (
    Acts,
    Pair,
    attention_path,
    change_attention,
    has_interface,
    leave_attention,
)
from .attention_sites import KeyValueSite, LogitSite
from .block_sites import Pass
from .forms import (
    Projections,
    alone,
    crossed,
    head_sizes,
    project,
    project_by_running,
    project_queries,
    projections,
    spread,
)
from .grid import TokenLayout
from .interception import intercepted
from .layer import Equation, Site, call_equation
from .masks import PositionBias, without_positions
from .module import channel_dim
from .queries import QueryPath
from .reduction import ReducingLayer, ReductionSite


class AttentionLayer(ReducingLayer):
    """The part of `BlockAdapters` that acts in the block's attention."""

    _query: str
    _key: str
    _value: str
    _output: str
    _prompts: str | None
    _post_norm: bool
    _attention: tuple[tuple[nn.Module, ...], ...]  # norm and output projection
    _position_biases: list[PositionBias]
    _pass: Pass | None
    _block: Block

    def _init_attention(self) -> None:
        self._acts_in_attention = False  # whether an adapter acts in the block's attention module
        self._attention_path = ""  # its name in the block, once it is needed
        self._interface = False  # whether it computes attention through transformers' interface
        self._attention_forward: Callable[..., Any] | None = None  # set on the module before
        self._queries: QueryPath | None = None  # runs extra tokens through the block

    def find_attention(self) -> nn.Module:
        """Find the block's attention module; once, as it looks at code."""
        self._attention_path = attention_path(self.get_base_layer(), self._query)
        attention = self.get_base_layer().get_submodule(self._attention_path)
        self._interface = has_interface(attention)
        return attention

    def _attention_module(self) -> nn.Module:
        return self.get_base_layer().get_submodule(self._attention_path)

    def hook_attention(self) -> None:
        """Make equations act in the block's attention from now on."""
        if self._acts_in_attention:
            return
        attention = self.find_attention()
        self._acts_in_attention = True
        if self._interface:
            change_attention(attention, self._acts())
        else:
            self._attention_forward = attention.__dict__.get("forward")
            attention.forward = self._forward_with_acts

    def let_tokens_join(self) -> None:
        """Make tokens join the block's attention as extra keys and values, if they are not in the sequence."""
        if self._prompts == "keys":
            self.hook_attention()

    def let_queries_attend(self) -> None:
        """Run extra tokens through the block from now on, to which its own do not attend."""
        if self._queries is None:
            self._queries = QueryPath(self.get_base_layer(), self._position_biases)
            self.hook_attention()

    def require_alone(self) -> None:
        """Check that the block's attention can be called with other tokens than the block's own, by a short run.

        Raises:
            ValueError: it cannot.
        """
        name = type(self.find_attention()).__name__
        try:
            with self._trial() as tokens:  # three tokens fill no square grid
                shape = self._attend(tokens).shape
        except Exception as error:  # any error of an unknown module
            self._fail("serve other tokens than its own", f"{name} does not run on three tokens", error)
        if shape != tokens.shape:
            found = f"{name} returns {tuple(shape)} for tokens of {tuple(tokens.shape)}"
            self._fail("serve other tokens than its own", found)

    def require_cross(self) -> None:
        """Check that attention from tokens to others is that of the block, by a short run on a few tokens.

        Raises:
            ValueError: to themselves, its module computes another.
        """
        name = type(self.find_attention()).__name__
        try:
            with self._trial() as tokens:
                found, expected = self._cross(tokens, tokens), self._alone(tokens)
        except Exception as error:  # any error of an unknown module
            self._fail("be that of tokens to others, by its projections alone", f"{name} does not run", error)
        tolerance = 1e-4 if found.dtype in (torch.float32, torch.float64) else 5e-2
        if not found.is_meta and not (found - expected).abs().max() <= tolerance * expected.abs().max():
            why = f"{name} computes another attention than that"
            self._fail("be that of tokens to others, by its projections alone", why)

    @contextmanager
    def _trial(self) -> Iterator[Tensor]:
        """Two images of three tokens to run the attention on; no random numbers are drawn, no statistics changed."""
        owner = self.get_base_layer()
        weight = next(p for p in owner.parameters() if p.is_floating_point())
        width = self._block.width or len(weight)
        with in_eval_mode(self._attention_module()), torch.no_grad():
            yield torch.arange(6 * width, device=weight.device).sin().to(weight.dtype).view(2, 3, width)

    def _fail(self, purpose: str, why: str, error: Exception | None = None) -> NoReturn:
        if error is not None:
            why += f" ({next(iter(str(error).splitlines()), type(error).__name__)})"
        raise ValueError(
            f"The attention of {type(self.get_base_layer()).__name__} cannot {purpose}: {why}. Leave these blocks out "
            "by exclude_modules."
        ) from error

    def _detach_attention(self) -> None:
        if not self._acts_in_attention:
            return
        attention = self._attention_module()
        leave_attention(attention)
        if "forward" in vars(attention):
            del attention.forward
            if self._attention_forward is not None:
                attention.forward = self._attention_forward

    def _forward_with_acts(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of an attention module that does not use transformers' interface, with adapters."""
        attention = self._attention_module()
        forward = self._attention_forward or partial(type(attention).forward, attention)
        asked = self._queries is not None and self._queries.seen is not None
        kept = self._queries is not None and self._queries.kept is not None
        joined = self._pass is not None and self._pass.joining is not None
        watched = self._watching is not None
        if asked or kept or joined or watched or any(self._equations(KeyValueSite, LogitSite, ReductionSite)):
            return intercepted(attention, self._acts(), forward, args, kwargs, placed=not asked)
        return forward(*args, **kwargs)

    def _acts(self) -> Acts:
        return Acts(self._joining_heads, self._logit_change, self._keep, self._instead, self._apart, self._weigh)

    def _equations(self, *kinds: type[Site]) -> Iterator[Equation]:
        if self._pass is not None:
            yield from self._at(*kinds)

    def _keep(self, key: Tensor, value: Tensor) -> None:
        if self._queries is not None:
            self._queries.keep(key, value)

    def _instead(self) -> Pair | None:
        return None if self._queries is None else self._queries.seen

    def _joining_heads(self, own: Tensor) -> Pair | None:
        """Extra keys and values, in the layout of the block's own."""
        current, pairs = self._pass, []
        equations = list(self._equations(KeyValueSite))
        if current is None or (current.joining is None and not equations):
            return None
        form = projections(self.get_base_layer(), self._attention_path, self._query, self._key, self._value)
        if current.joining is not None:
            with self._on_extra_tokens():
                pairs.append((project if self._projects_plainly(form) else project_by_running)(form, current.joining))
        assert current.entered is not None
        beside = []
        for each in equations:
            assert isinstance(each.site, KeyValueSite)
            assert each.module is not None
            pair = self._left(each, each.module(current.entered.shape[0], *each.shared))
            if each.site.compensated:
                beside.append(pair)
                pair = (pair[0], torch.zeros_like(pair[1]))  # the values count by themselves
            pairs.append(pair)
        heads = head_sizes(form)[0]
        current.beside = tuple(spread((k.to(own.dtype), v.to(own.dtype)), own, heads) for k, v in beside)
        keys, values = (torch.cat([x.to(own.dtype) for x in each], dim=2) for each in zip(*pairs, strict=True))
        return spread((keys, values), own, heads)

    def _projects_plainly(self, form: Projections) -> bool:
        """Whether the output projection reads as many channels as that of the values gives."""
        output = linear_sizes(unwrapped(self.get_base_layer().get_submodule(self._output))) if self._output else None
        heads, _, channels = head_sizes(form)
        return output is None or self._interface or form.value is form.key or output[1] % (heads * channels) == 0

    def _apart(self) -> Sequence[Pair]:
        """The keys and values of this pass with a softmax of their own, once."""
        if self._pass is None:
            return ()
        pairs, self._pass.beside = self._pass.beside, ()
        return pairs

    def _logit_change(self) -> Callable[[Tensor], Tensor] | None:
        equations = list(self._equations(LogitSite))
        if not equations or self._pass is None:
            return None
        layout = TokenLayout(self._pass.prefix, self._pass.grid, self._pass.frames)

        def change(logits: Tensor) -> Tensor:
            for each in equations:
                assert each.module is not None
                logits = self._left(each, call_equation(self, each.module, logits, layout, *each.shared))
            return logits

        return change

    def _join(self, tokens: Tensor, current: Pass) -> None:
        current.joining = self._normed("attention", tokens)

    def _attend(self, x: Tensor) -> Tensor:
        """Norm and attention of the block on extra tokens, which have no position."""
        (norm,) = self._attention[0]
        weight: Any = norm.weight
        with self._on_extra_tokens():
            # an equation may have another precision than the backbone
            normed = _of_tokens(norm, x.to(weight.dtype))
        return self._alone(normed).to(x.dtype)

    def _alone(self, x: Tensor) -> Tensor:
        """Attention of the block on extra tokens, which have no position."""
        (output,) = self._attention[1]
        with without_positions(self._position_biases), self._on_extra_tokens():
            mixed = alone(self._attention_module(), x, self._interface)
            inside = self._output.startswith(f"{self._attention_path}.")
            return mixed if inside else output(mixed)

    def _cross(self, x: Tensor, others: Tensor) -> Tensor:
        """Attention from tokens to others, none with a position, by the projections without adapters."""
        block = self.get_base_layer()
        form = projections(block, self._attention_path, self._query, self._key, self._value)
        form = form._replace(**{name: unwrapped(getattr(form, name)) for name in ("query", "key", "value")})
        output = unwrapped(block.get_submodule(self._output))
        dtype = next(p.dtype for p in block.parameters() if p.is_floating_point())
        with self._on_extra_tokens():
            return output(crossed(form, x.to(dtype), others.to(dtype))).to(x.dtype)

    def _make_queries(self, tokens: Tensor) -> Tensor:
        """Queries of the block's attention for tokens without position, (batch, tokens, channels of all heads)."""
        form = projections(self.get_base_layer(), self._attention_path, self._query, self._key, self._value)
        dtype = next(p.dtype for p in self.get_base_layer().parameters() if p.is_floating_point())
        with self._on_extra_tokens():
            queries = project_queries(form, self._normed("attention", tokens.to(dtype)))
        return queries.transpose(1, 2).flatten(2).to(tokens.dtype)

    def _ask(self, ask: Callable[[Tensor], Tensor], queries: Tensor) -> Tensor:
        with self._on_extra_tokens():
            return ask(queries)

    def _normed(self, sublayer: str, stream: Tensor) -> Tensor:
        """The input of a sub-layer that reads the block's stream directly and not through a norm."""
        norm = self._attention[0] if sublayer == "attention" else ()
        if self._post_norm or len(norm) == 0:
            return stream
        with self._on_extra_tokens():
            return _of_tokens(norm[0], stream)

    @contextmanager
    def _on_extra_tokens(self) -> Iterator[None]:
        """Disable the hooks inside the context, while modules of the block run on extra tokens."""
        current, self._pass = self._pass, None
        try:
            yield
        finally:
            self._pass = current


def _of_tokens(norm: nn.Module, tokens: Tensor) -> Tensor:
    """A norm's output for (batch, tokens, channels), also if it takes maps with the channels first."""
    if channel_dim(norm, 4) == -1:
        return norm(tokens)
    return norm(tokens.mT.unsqueeze(-1)).squeeze(-1).mT
