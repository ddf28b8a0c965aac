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
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


IMPLEMENTATION = "hf_visual_peft"
_ACTS = "_attention_acts"
Pair = tuple[Tensor, Tensor]  # keys and values


def _nothing(*args: Any) -> None:
    return None


@dataclass(frozen=True)
class Acts:
    """What to do where queries meet keys; all functions are called in every forward.

    Attributes:
        join: called with the module's keys, (..., tokens, channels); returns keys and values that join them, or None.
        change: returns a function of the logits, or None.
        keep: called with keys and values, without those that joined.
        instead: returns keys and values to use in place of the module's own, or None. With them, nothing else happens.
        beside: returns keys and values whose attention, by a softmax of its own, is added to the module's.
        weigh: called with a function that returns the weights of the first queries, of a number or all for None:
            (..., queries, keys), also those of keys that joined.
    """

    join: Callable[[Tensor], Pair | None]
    change: Callable[[], Callable[[Tensor], Tensor] | None]
    keep: Callable[[Tensor, Tensor], None]
    instead: Callable[[], Pair | None]
    beside: Callable[[], Sequence[Pair]] = tuple  # none
    weigh: Callable[[Callable[[int | None], Tensor]], None] = _nothing


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
        heads, weights = attend(change, query, key, value, mask, scaling, dropout if module.training else 0.0)
        return heads.transpose(1, 2).contiguous(), weights

    output, weights = meet(acts, (query, scaling), key, value, attention_mask, plain, changed)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    added = beside(acts, query, lambda keys: query @ keys.mT * scale)
    return output if added is None else output + added.transpose(1, 2), weights


AttentionInterface.register(IMPLEMENTATION, _interface)


# ---- what happens ------------------------------------------------------------------------------------------------


def meet(
    acts: Acts,
    asking: tuple[Tensor, float | None],
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    plain: Callable,
    changed: Callable,
) -> tuple[Tensor, Tensor | None]:
    """Apply the acts, then compute attention by `plain`, or by `changed` if logits change.

    Args:
        acts: to apply.
        asking: the queries, and the factor of their products with keys; None for the usual one.
        key: of the module.
        value: of the module.
        mask: added to the logits, or boolean; or None.
        plain: called with keys, values and mask; returns heads and weights.
        changed: called with the change of logits before these.
    """
    instead = acts.instead()
    if instead is not None:
        return plain(*instead, mask)[0], None
    acts.keep(key, value)
    joining = acts.join(key)
    if joining is not None:
        key, value = (joined(*pair) for pair in zip((key, value), joining, strict=True))
        if mask is not None:
            shown = 1.0 if mask.dtype == torch.bool or mask.ndim == 2 else 0.0
            mask = F.pad(mask, (0, joining[0].shape[-2]), value=shown)
    change = acts.change()
    if change is not None:
        heads, weights = changed(change, key, value, mask)
        acts.weigh(lambda count: weights[..., :count, :])
        return heads, weights
    acts.weigh(lambda count: _weights(asking[0][..., :count, :], key, mask, asking[1]))
    return plain(key, value, mask)


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention of the first queries of a sequence."""
    if query.ndim == key.ndim == 4 and query.shape[1] != key.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    rows = mask if mask is None or mask.ndim == 2 or mask.shape[-2] == 1 else mask[..., : query.shape[-2], :]
    return torch.softmax(_masked(logits, rows), dim=-1, dtype=torch.float32)


def beside(acts: Acts, query: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor | None:
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


def joined(own: Tensor, new: Tensor) -> Tensor:
    """Keys or values with those that join them, (..., tokens, channels).

    Raises:
        ValueError: they do not fit.
    """
    if own.shape[:-2] != new.shape[:-2] or own.shape[-1] != new.shape[-1]:
        raise ValueError(
            f"Keys or values of shape {tuple(new.shape)} cannot join an attention's own of shape {tuple(own.shape)}: "
            "how its module divides channels into heads is not known. Leave these blocks out by exclude_modules."
        )
    return torch.cat([own, new], dim=-2)


def attend(
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
    weights = torch.softmax(_masked(logits, mask), dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout)
    return weights @ value, weights


def _masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and mask.ndim == 2 and logits.ndim == 4 and mask.shape[0] == logits.shape[0]:
        mask = mask[:, None, None, :].bool()  # the mask of flash attention: (batch, keys)
    if mask is not None and mask.dtype == torch.bool:
        return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits if mask is None else logits + mask
