"""Attention, written once: hooks at the point where a module's queries meet its keys.

Each module projects its tokens to queries, keys and values in its own way. Then they meet, at a point that can be
found in three kinds of modules:

- transformers' modules call a function of transformers' `AttentionInterface`;
- others call `F.scaled_dot_product_attention`;
- others multiply queries and keys, add biases and masks, take the softmax and multiply with the values.

The first kind gets a function of ours. In the others, function calls are intercepted while their forward runs. The
same actions are possible in all of them: extra keys and values join, logits change, keys and values are kept, or kept
ones replace the module's own. A module in which the point is not found exactly once is refused.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..backbones.backbone import Block, VisionBackbone
from .site import AttentionSite, joins_others, why_none_join


if TYPE_CHECKING:
    from .grid import TokenLayout


IMPLEMENTATION = "hf_visual_peft"
_ACTS = "_attention_acts"
Pair = tuple[Tensor, Tensor]  # keys and values


class LogitSite(AttentionSite):
    """The logits of a block's attention, before masks and position biases are added.

    The equation is called with them, (batch, heads, queries, keys), and a `TokenLayout`; it returns the same shape.
    """


@dataclass(frozen=True)
class KeyValueSite(AttentionSite):
    """Extra keys and values, which join those of a block's attention, in every window.

    They have no position, and no mask hides them. The equation is called with the number of images; it returns keys
    and values, (images, heads, tokens, channels of a head) each. `sites.forms.head_sizes` returns heads and channels.

    Attributes:
        compensated: whether their values are weighted by a softmax of their own: the weights of all keys sum up to 1,
            but what falls on these is divided by its sum. Changes of logits do not reach that softmax.
    """

    compensated: bool = False

    def exists_at(self, block: Block, whole: VisionBackbone) -> bool:
        """Not where nothing can join, beside blocks where it can."""
        return super().exists_at(block, whole) and not joins_others(block, whole)

    def why_not(self, block: Block | None, whole: VisionBackbone) -> str | None:
        """Attention may let no tokens join."""
        return why_none_join(block, whole)


class LogitEquation(Protocol):
    """What an equation at the logits is called with."""

    def __call__(self, logits: Tensor, layout: TokenLayout, *shared: nn.Module) -> Tensor:
        """The new logits, (batch, heads, queries, keys)."""
        ...


class KeyValueEquation(Protocol):
    """What an equation that returns keys and values is called with."""

    def __call__(self, images: int, *shared: nn.Module) -> Pair:
        """Keys and values, (images, heads, tokens, channels of a head) each."""
        ...


@dataclass(frozen=True)
class Acts:
    """What to do where queries meet keys; all functions are called in every forward.

    Attributes:
        join: called with the module's keys, (..., tokens, channels); returns keys and values that join them, or None.
        change: returns a function of the logits, or None.
        keep: called with keys and values, without those that joined.
        instead: returns keys and values to use in place of the module's own, or None. With them, nothing else happens.
        beside: returns keys and values whose attention, by a softmax of its own, is added to the module's.
    """

    join: Callable[[Tensor], Pair | None]
    change: Callable[[], Callable[[Tensor], Tensor] | None]
    keep: Callable[[Tensor, Tensor], None]
    instead: Callable[[], Pair | None]
    beside: Callable[[], Sequence[Pair]] = tuple  # none


def _nothing(*args: Any) -> None:
    return None


NO_ACTS = Acts(_nothing, _nothing, _nothing, _nothing)


# ---- which modules -----------------------------------------------------------------------------------------------


def attention_of(block: nn.Module, query: str) -> nn.Module:
    """The attention module of a block; see `attention_path`."""
    return block.get_submodule(attention_path(block, query))


def attention_path(block: nn.Module, query: str) -> str:
    """Name of the attention module in a block: the one around the query projection that computes softmax attention.

    Args:
        block: the block.
        query: name of the query projection in the block.

    Raises:
        ValueError: there is none, according to the code of the modules around the projection.
    """
    path = query
    while path:
        path = path.rpartition(".")[0]
        module = block.get_submodule(path)
        if has_interface(module) or _mentions(module):
            return path
    raise ValueError(
        f"{type(block.get_submodule(query.rpartition('.')[0])).__name__} computes no known softmax attention: "
        "it calls neither transformers' AttentionInterface, nor scaled_dot_product_attention, nor softmax."
    )


def has_interface(module: nn.Module) -> bool:
    """Whether an attention module computes attention through transformers' interface."""
    return "ALL_ATTENTION_FUNCTIONS" in _names(type(module)) and hasattr(module, "config")


def _mentions(module: nn.Module) -> bool:
    names = _names(type(module))
    softmax = any(isinstance(child, nn.Softmax) for child in module.children()) or "Softmax" in names
    return softmax or "softmax" in names or "scaled_dot_product_attention" in names


def _names(cls: type) -> set[str]:
    """The names in the code of a class's forward and of its own methods that it calls."""
    names: set[str] = set()
    pending = ["forward"]
    while pending:
        code = getattr(getattr(cls, pending.pop(), None), "__code__", None)
        new = set() if code is None else set(code.co_names) - names
        names |= new
        pending += new
    return names


# ---- through transformers' interface -----------------------------------------------------------------------------


def change_attention(module: nn.Module, acts: Acts) -> None:
    """Apply acts in an attention module that uses transformers' interface, from now on."""
    if _ACTS in vars(module):
        return
    own: Any = module.config
    config = copy.copy(own)
    config._attn_implementation = IMPLEMENTATION
    vars(module)[_ACTS] = (acts, own)
    module.config = config


def own_implementation(module: nn.Module) -> str | None:
    """Name of the attention function that the module uses without adapters."""
    config: Any = vars(module)[_ACTS][1] if _ACTS in vars(module) else module.config
    return config._attn_implementation


def leave_attention(module: nn.Module) -> None:
    """Undo `change_attention`."""
    if _ACTS in vars(module):
        module.config = vars(module).pop(_ACTS)[1]


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Replaces the module's own attention function in transformers, with its arguments."""
    acts, config = vars(module)[_ACTS]

    def plain(key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        modelling: Any = sys.modules[type(module).__module__]
        call = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, modelling.eager_attention_forward)
        return call(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)

    def changed(change: Callable, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        heads, weights = _attend(change, query, key, value, mask, scaling, dropout if module.training else 0.0)
        return heads.transpose(1, 2).contiguous(), weights

    output, weights = _meet(acts, key, value, attention_mask, plain, changed)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    added = _beside(acts, query, lambda keys: query @ keys.mT * scale)
    return output if added is None else output + added.transpose(1, 2), weights


AttentionInterface.register(IMPLEMENTATION, _interface)


# ---- what happens ------------------------------------------------------------------------------------------------


def _meet(
    acts: Acts, key: Tensor, value: Tensor, mask: Tensor | None, plain: Callable, changed: Callable
) -> tuple[Tensor, Tensor | None]:
    """Apply the acts, then compute attention by `plain`, or by `changed` if logits change."""
    instead = acts.instead()
    if instead is not None:
        return plain(*instead, mask)[0], None
    acts.keep(key, value)
    joining = acts.join(key)
    if joining is not None:
        key, value = (_joined(*pair) for pair in zip((key, value), joining, strict=True))
        if mask is not None:
            shown = 1.0 if mask.dtype == torch.bool or mask.ndim == 2 else 0.0
            mask = F.pad(mask, (0, joining[0].shape[-2]), value=shown)
    change = acts.change()
    return plain(key, value, mask) if change is None else changed(change, key, value, mask)


def _beside(acts: Acts, query: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor | None:
    """What attention to keys and values beside the module's own adds to its heads, (..., queries, channels).

    Args:
        acts: that give them.
        query: (..., queries, channels).
        logits: of the queries, for any keys.
    """
    total = None
    for key, value in acts.beside():
        groups = query.shape[1] // key.shape[1] if query.ndim == key.ndim == 4 else 1
        key, value = (x if groups == 1 else x.repeat_interleave(groups, dim=1) for x in (key, value))
        heads = torch.softmax(logits(key), dim=-1, dtype=torch.float32).to(value.dtype) @ value
        total = heads if total is None else total + heads
    return total


def _joined(own: Tensor, new: Tensor) -> Tensor:
    if own.shape[:-2] != new.shape[:-2] or own.shape[-1] != new.shape[-1]:
        raise ValueError(
            f"Keys or values of shape {tuple(new.shape)} cannot join an attention's own of shape {tuple(own.shape)}: "
            "how its module divides channels into heads is not known. Leave these blocks out by exclude_modules."
        )
    return torch.cat([own, new], dim=-2)


def _attend(
    change: Callable[[Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention with changed logits: heads and weights."""
    logits = change(query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale))
    if mask is not None and mask.ndim == 2 and query.ndim == 4 and mask.shape[0] == query.shape[0]:
        mask = mask[:, None, None, :].bool()  # the mask of flash attention: (batch, keys)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    elif mask is not None:
        logits = logits + mask
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout)
    return weights @ value, weights


# ---- in any other module -----------------------------------------------------------------------------------------


def watched(
    module: nn.Module,
    acts: Acts,
    forward: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    placed: bool = True,
) -> Any:
    """Call the forward of an attention module, and apply acts where queries meet keys.

    Args:
        module: the module, for errors.
        acts: what to do.
        forward: its forward.
        args: of it.
        kwargs: of it.
        placed: whether the tokens have a position in the image. If not, a bias that the module computes is left out.

    Raises:
        ValueError: the point was not found, or more than once.
    """
    watch = _Watch(acts, None if placed else (*args, *kwargs.values()))
    cause = None
    try:
        with watch:
            output = forward(*args, **kwargs)
    except RuntimeError as error:
        if watch.weights is None:
            raise
        cause = error  # weights of keys that joined go where nobody knows them
    if watch.met != 1:
        found = "no softmax of the products of queries and keys" if watch.met == 0 else f"{watch.met} of them"
        raise ValueError(
            f"{type(module).__name__} should compute attention once in its forward, as the softmax of the products of "
            f"queries and keys, plus biases, times the values; {found} was seen. An adapter cannot act in it: leave "
            "these blocks out by exclude_modules, or choose a method that does not act in attention."
        ) from cause
    return output


_PRODUCTS = ("matmul", "__matmul__", "bmm")
_SOFTMAX = ("softmax",)
_FACTORS = ("mul", "__mul__", "__rmul__", "__imul__", "mul_", "multiply", "div", "__truediv__", "__itruediv__", "div_")
_DIVISIONS = ("div", "__truediv__", "__itruediv__", "div_")
# Operations on logits before the softmax: sums, masks, and other views of the rows in the same order.
_SUMS = ("add", "__add__", "__radd__", "__iadd__", "add_", "sub", "__sub__", "__isub__", "masked_fill", "masked_fill_")
_BIASES = ("add", "__add__", "__radd__", "__iadd__", "add_")
_VIEWS = ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous", "to", "float", "type_as")
_TURNS = ("transpose", "swapaxes", "mT", "__get__", "permute")  # of keys that are normalised, and of weights
_AFTER = ("dropout", "mul", "__mul__", "to", "float", "type_as", "contiguous", "transpose", "__get__")


@dataclass
class _Logits:
    """Products of queries and keys, on their way to the softmax.

    Attributes:
        tensor: their current values.
        query: (..., queries, channels).
        key: (..., channels, keys).
        normalized: whether the keys were.
        factors: by which the products were multiplied.
    """

    tensor: Tensor
    query: Tensor
    key: Tensor
    normalized: bool
    factors: tuple[Any, ...] = ()

    def scaled(self, products: Tensor) -> Tensor:
        for factor in self.factors:
            products = products * factor
        return products


class _Watch(TorchFunctionMode):
    """Intercepts the functions that a module calls in its forward."""

    def __init__(self, acts: Acts, given: tuple | None) -> None:
        super().__init__()
        self.acts = acts
        self.given = given  # a mask among these is the caller's; any other is a position bias, to be left out
        self.met = 0
        self.logits: list[_Logits] = []
        self.normalized: list[Tensor] = []
        self.weights: Tensor | None = None  # after the softmax, also for keys that joined
        self.key: Tensor | None = None
        self.joining: Tensor | None = None  # values
        self.instead: Tensor | None = None  # values in place of the module's
        self.beside: Tensor | None = None  # to be added to the heads

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self._fused(func, *args, **kwargs)
        if name == "normalize":
            output = func(*args, **kwargs)
            self.normalized.append(output)
            return output
        if name in _PRODUCTS:
            return self._product(func, *args, **kwargs)
        if name == "einsum" and (pair := _as_product(*args)) is not None:
            return self._product(torch.matmul, *pair)
        if name in _SOFTMAX and (logits := self._of(args[0] if args else kwargs["input"])) is not None:
            return self._softmax(logits, func, args, kwargs)
        if self.given is not None and name in _BIASES and (plain := self._without_bias(*args)) is not None:
            return plain
        output = func(*args, **kwargs)
        self._follow(name, args, output)
        return output

    def _without_bias(self, a: Any, b: Any = None, **kwargs: Any) -> Tensor | None:
        """The logits of a sum that adds a bias of the module's own to them, else None."""
        for logits, other in ((self._of(a), b), (self._of(b), a)):
            if logits is not None and not any(other is each for each in self.given or ()):
                return logits.tensor
        return None

    def _of(self, x: Any) -> _Logits | None:
        return next((logits for logits in self.logits if logits.tensor is x), None)

    def _follow(self, name: str, args: tuple, output: Any) -> None:
        """Keep track of logits, weights and normalised keys through a function."""
        if not isinstance(output, Tensor) or not args:
            return
        first = args[0]
        if self.weights is not None and first is self.weights and name in _AFTER:
            self.weights = output
        if name in _TURNS and any(each is first for each in self.normalized):
            self.normalized.append(output)
        logits = self._of(first)
        other = args[1] if len(args) > 1 else None
        if logits is None and name in ("add", "__add__", "mul", "__mul__"):
            logits, other = self._of(other), first
        if logits is None or output.numel() != logits.tensor.numel():
            return
        if name in _FACTORS and _is_factor(other):
            factor: Any = other
            factor = 1.0 / factor if name in _DIVISIONS else factor
            self.logits.append(_Logits(output, logits.query, logits.key, logits.normalized, (*logits.factors, factor)))
        elif name in _SUMS or name in _VIEWS:
            self.logits.append(_Logits(output, logits.query, logits.key, logits.normalized, logits.factors))

    def _product(self, func: Any, a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
        if self.weights is not None and a is self.weights:
            return self._with_beside(func(a, self._values(b), **kwargs))
        if self.weights is not None and b is self.weights:
            return self._with_beside(func(self._values(a.mT).mT, b, **kwargs).mT).mT
        if a.ndim < 3 or b.ndim < 3:
            return func(a, b, **kwargs)
        if not self.logits and (instead := self.acts.instead()) is not None:
            b, self.instead = instead[0].mT, instead[1]
        output = func(a, b, **kwargs)
        self.logits.append(_Logits(output, a, b, any(each is b for each in self.normalized)))
        return output

    def _with_beside(self, heads: Tensor) -> Tensor:
        return heads if self.beside is None else heads + self.beside.reshape(heads.shape)

    def _values(self, value: Tensor) -> Tensor:
        """The values that weights are for."""
        self.met += 1
        self.weights = None
        if self.instead is not None:
            return self.instead
        assert self.key is not None
        self.acts.keep(self.key, value)
        return value if self.joining is None else _joined(value, self.joining)

    def _softmax(self, logits: _Logits, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        own = args[0] if args else kwargs["input"]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dim not in (-1, own.ndim - 1):
            return func(*args, **kwargs)
        changed = own
        self.key = logits.key.mT
        if self.instead is None:
            joining = self.acts.join(self.key)
            if joining is not None:
                key, self.joining = joining
                key = F.normalize(key, dim=-1) if logits.normalized else key
                products = logits.scaled(logits.query @ key.mT)
                changed = torch.cat([own, products.reshape(*own.shape[:-1], -1).to(own.dtype)], dim=-1)

            def of(keys: Tensor) -> Tensor:
                return logits.scaled(logits.query @ (F.normalize(keys, dim=-1) if logits.normalized else keys).mT)

            self.beside = _beside(self.acts, logits.query, of)
            change = self.acts.change()
            if change is not None:
                plain = logits.scaled(logits.query @ logits.key).reshape(own.shape)
                if joining is not None:
                    plain = torch.cat([plain, changed[..., own.shape[-1] :]], dim=-1)
                changed = changed + (change(plain) - plain).to(own.dtype)
        self.logits = []
        kwargs = {name: each for name, each in kwargs.items() if name != "input"}
        self.weights = func(changed, *args[1:], **kwargs)
        return self.weights

    def _fused(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        self.met += 1
        if self.given is not None and not any(attn_mask is each for each in self.given):
            attn_mask = None
        if is_causal and attn_mask is None:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None and attn_mask.ndim == 2:
            attn_mask = attn_mask.unsqueeze(0)

        def plain(key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
            return func(query, key, value, mask, dropout_p, scale=scale, enable_gqa=enable_gqa), None

        def changed(change: Callable, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            groups = query.shape[1] // key.shape[1] if enable_gqa else 1
            key, value = (x if groups == 1 else x.repeat_interleave(groups, dim=1) for x in (key, value))
            return _attend(change, query, key, value, mask, scale, dropout_p)

        heads = _meet(self.acts, key, value, attn_mask, plain, changed)[0]
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        added = _beside(self.acts, query, lambda keys: query @ keys.mT * factor)
        return heads if added is None else heads + added


def _as_product(equation: Any, *operands: Any) -> Pair | None:
    """The two factors if `torch.einsum` computes a matrix product, else None."""
    operands = tuple(operands[0]) if len(operands) == 1 else operands
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    lead, row, inner = left[:-2], left[-2:-1], left[-1:]
    if right[:-2] != lead or output[:-1] != lead + row or inner not in right[-2:]:
        return None
    if right[-2:] == inner + output[-1:]:
        return operands[0], operands[1]
    return (operands[0], operands[1].mT) if right[-2:] == output[-1:] + inner else None


def _is_factor(x: Any) -> bool:
    """Whether a value is one number for all logits of a head."""
    if isinstance(x, Tensor):
        return x.ndim == 0 or tuple(x.shape[-2:]) in ((1,), (1, 1))
    return isinstance(x, int | float) and not math.isnan(x)
