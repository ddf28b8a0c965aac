"""The site at the attention logits, reached through transformers' interface for attention functions."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .layer import Site


IMPLEMENTATION = "hf_visual_peft"
_CHANGES = "_change_logits"


class LogitSite(Site):
    """The logits of a block's attention, before masks and position biases are added.

    The equation is called with them, (batch, heads, queries, keys), and a `TokenLayout`; it returns the same shape.
    """


def attention_of(block: nn.Module, query: str) -> nn.Module:
    """The attention module of a block, which must compute attention through transformers' interface.

    Args:
        block: the block.
        query: name of the query projection in the block.

    Raises:
        ValueError: it computes attention in a way of its own.
    """
    module = block.get_submodule(query.rpartition(".")[0])
    if not has_interface(block, query):
        raise ValueError(
            f"{type(module).__name__} does not compute attention through transformers' AttentionInterface, so its "
            "logits cannot be changed."
        )
    return module


def has_interface(block: nn.Module, query: str) -> bool:
    """Whether the attention module of a block computes attention through transformers' interface.

    Args:
        block: the block.
        query: name of the query projection in the block.
    """
    module = block.get_submodule(query.rpartition(".")[0])
    return "ALL_ATTENTION_FUNCTIONS" in type(module).forward.__code__.co_names and hasattr(module, "config")


def change_attention(
    module: nn.Module,
    change: Callable[[], Callable[[Tensor], Tensor] | None],
    join: Callable[[Tensor], tuple[Tensor, Tensor] | None],
    see: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, bool]],
) -> None:
    """Let functions change the logits, or the keys and values, of an attention module from now on.

    Args:
        module: as `attention_of` gives it.
        change: asked in every forward for a function of the logits; None leaves them to the module's implementation.
        join: called in every forward with the keys, (batch, heads, tokens, channels); returns further keys and
            values, which no mask hides, or None.
        see: called first with the keys and the values; returns those that count, and whether they stand in for the
            queries' own. Then nothing else changes, and no weights are returned.
    """
    if _CHANGES in vars(module):
        return
    own: Any = module.config
    config = copy.copy(own)
    config._attn_implementation = IMPLEMENTATION
    vars(module)[_CHANGES] = (change, join, see, own)
    module.config = config


def leave_attention(module: nn.Module) -> None:
    """Undo `change_attention`."""
    if _CHANGES in vars(module):
        module.config = vars(module).pop(_CHANGES)[3]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in place of the module's own attention function; arguments are those it gives."""
    wanted, join, see, config = vars(module)[_CHANGES]
    key, value, elsewhere = see(key, value)
    joining = None if elsewhere else join(key)
    if joining is not None:
        key, value = torch.cat([key, joining[0]], dim=2), torch.cat([value, joining[1]], dim=2)
        if attention_mask is not None:
            shown = 1.0 if attention_mask.dtype == torch.bool or attention_mask.ndim == 2 else 0.0
            attention_mask = nn.functional.pad(attention_mask, (0, joining[0].shape[2]), value=shown)
    change = None if elsewhere else wanted()
    if change is None:
        modelling: Any = sys.modules[type(module).__module__]
        plain = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, modelling.eager_attention_forward)
        output, weights = plain(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        return output, None if elsewhere else weights
    logits = change(query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling))
    if attention_mask is not None and attention_mask.ndim == 2:  # as flash attention has it: (batch, keys)
        attention_mask = attention_mask[:, None, None, :].bool()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attention_mask, torch.finfo(logits.dtype).min)
    elif attention_mask is not None:
        logits = logits + attention_mask
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(IMPLEMENTATION, _attention)
