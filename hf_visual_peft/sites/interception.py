"""Interception of the functions that an attention module calls, to act where its queries meet its keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .attention import Acts, Pair, attend, beside, joined, meet


def intercepted(
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
    interception = _Interception(acts, None if placed else (*args, *kwargs.values()))
    cause = None
    try:
        with interception:
            output = forward(*args, **kwargs)
    except RuntimeError as error:
        if interception.weights is None:
            raise
        cause = error  # weights of keys that joined go where nobody knows them
    if interception.met != 1:
        times = {0: "does so nowhere", 2: "does so twice"}.get(interception.met, f"does so {interception.met} times")
        raise ValueError(
            f"An adapter acts in the attention of {type(module).__name__}, which must compute it once in its forward, "
            f"as the softmax of products of queries and keys, plus biases, times the values. It {times}. Leave these "
            "blocks out by exclude_modules, or choose a method that does not act in attention."
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


class _Interception(TorchFunctionMode):
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
        return value if self.joining is None else joined(value, self.joining)

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

            self.beside = beside(self.acts, logits.query, of)
            change = self.acts.change()
            if change is not None:
                plain = logits.scaled(logits.query @ logits.key).reshape(own.shape)
                if joining is not None:
                    plain = torch.cat([plain, changed[..., own.shape[-1] :]], dim=-1)
                changed = changed + (change(plain) - plain).to(own.dtype)
        self.logits = []
        kwargs = {name: each for name, each in kwargs.items() if name != "input"}
        self.weights = weights = func(changed, *args[1:], **kwargs)
        if self.instead is None:
            self.acts.weigh(lambda count: weights[..., :count, :])
        return weights

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
            return attend(change, query, key, value, mask, scale, dropout_p)

        heads = meet(self.acts, (query, scale), key, value, attn_mask, plain, changed)[0]
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        added = beside(self.acts, query, lambda keys: query @ keys.mT * factor)
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
