"""`nn.MultiheadAttention` with ordinary linears, which can be adapted.

torch's module keeps the projections to queries, keys and values in one parameter and never calls the output
projection, so no method and no LoRA finds a linear in OpenCLIP's or torchvision's transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


Model = TypeVar("Model", bound=nn.Module)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class SplitAttention(nn.Module):
    """Multi-head attention of torch with a linear for each projection: `q_proj`, `k_proj`, `v_proj`, `out_proj`.

    It is called like `nn.MultiheadAttention`, with the same results up to rounding.

    Args:
        attention: whose weights it takes; `out_proj` shares its parameters.

    Raises:
        ValueError: it has extra keys and values, or its forward or its weights are not torch's.
    """

    # Attributes that torch's transformer layers check before they choose a kernel that would bypass the linears.
    in_proj_weight = None
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        _check(attention)
        self.embed_dim, self.num_heads, self.head_dim = attention.embed_dim, attention.num_heads, attention.head_dim
        self.kdim, self.vdim = attention.kdim, attention.vdim
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        packed = attention.in_proj_weight
        weights: tuple[Tensor, ...] = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        trained = (weights[0] if packed is None else packed).requires_grad
        if packed is not None:
            weights = packed.detach().chunk(3)
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.detach().chunk(3)
        for name, weight, bias in zip(_PROJECTIONS, weights, biases, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=trained)
            if attention.in_proj_bias is not None and bias is not None:
                linear.bias = nn.Parameter(bias.clone(), requires_grad=attention.in_proj_bias.requires_grad)
            self.add_module(name, linear)
        self.out_proj: nn.Module = attention.out_proj
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention, and its weights if needed.

        Args:
            query: (batch, queries, channels), with batch second without `batch_first`, or (queries, channels).
            key: the same for keys.
            value: the same for values.
            key_padding_mask: (batch, keys); True hides a key, numbers are added to the logits.
            need_weights: whether to return the weights.
            attn_mask: (queries, keys) or (batch x heads, queries, keys), in the same form.
            average_attn_weights: whether to average the weights over heads.
            is_causal: whether `attn_mask` is the causal mask, which must also be given.

        Returns:
            The output in the shape of `query`, and weights (batch, queries, keys) or (batch, heads, queries, keys), or
            None.

        Raises:
            ValueError: `is_causal` without a mask, or nested tensors.
        """
        if query.is_nested:
            raise ValueError(
                "Nested tensors are not supported: set `use_nested_tensor` of nn.TransformerEncoder to False."
            )
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal is only a hint about attn_mask, which is None: pass the causal mask as attn_mask."
            )
        batched = query.ndim == 3
        batch_dim = 0 if self.batch_first or not batched else 1

        def heads(project: nn.Module, x: Tensor) -> Tensor:
            x = project(x if batched else x.unsqueeze(0))
            x = x.transpose(0, batch_dim).unflatten(-1, (self.num_heads, self.head_dim))
            return x.transpose(1, 2)

        inputs = zip(_PROJECTIONS, (query, key, value), strict=True)
        q, k, v = (heads(self.get_submodule(name), x) for name, x in inputs)
        bias = self._bias(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits = q / math.sqrt(self.head_dim) @ k.mT
            weights = F.dropout((logits if bias is None else logits + bias).softmax(dim=-1), dropout)
            mixed = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, bias, dropout)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2).transpose(0, batch_dim))
        return output if batched else output.squeeze(0), weights

    def _bias(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor) -> Tensor | None:
        """The sum of both masks, to be added to the logits, (1 or batch, 1 or heads, 1 or queries, keys)."""
        found = []
        if attn_mask is not None:
            shape = (-1, self.num_heads) if attn_mask.ndim == 3 else (1, 1)
            found.append(_additive(attn_mask, query.dtype).reshape(*shape, *attn_mask.shape[-2:]))
        if key_padding_mask is not None:
            found.append(_additive(key_padding_mask, query.dtype).reshape(query.shape[0], 1, 1, -1))
        return sum(found[1:], found[0]) if found else None

    def merged(self) -> nn.MultiheadAttention:
        """The module of torch with these weights.

        Raises:
            ValueError: a projection is no longer an `nn.Linear`.
        """
        named = {name: self.get_submodule(name) for name in (*_PROJECTIONS, "out_proj")}
        for name, module in named.items():
            if not isinstance(module, nn.Linear):
                raise ValueError(f"{name} is a {type(module).__name__}, and only nn.Linear can be merged.")
        *inner, out = (module for module in named.values() if isinstance(module, nn.Linear))
        biases = [linear.bias for linear in inner]
        biased = any(bias is not None for bias in biases)
        attention = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            dropout=self.dropout,
            bias=biased,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device="meta",
        )
        trained = any(linear.weight.requires_grad for linear in inner)
        if attention.in_proj_weight is not None:
            packed = torch.cat([linear.weight.detach() for linear in inner])
            attention.in_proj_weight = nn.Parameter(packed, requires_grad=trained)
        else:
            for name, linear in zip(_PROJECTIONS, inner, strict=True):
                setattr(attention, f"{name}_weight", nn.Parameter(linear.weight.detach().clone(), trained))
        if biased:  # merging may have added biases
            zeros = inner[0].weight.new_zeros(self.embed_dim)
            parts: list[Tensor] = [zeros if bias is None else bias.detach() for bias in biases]
            trained = any(bias is not None and bias.requires_grad for bias in biases)
            attention.in_proj_bias = nn.Parameter(torch.cat(parts), trained)
        attention.add_module("out_proj", out)
        return attention.train(self.training)


def split_attention(model: Model) -> Model:
    """Replace every `nn.MultiheadAttention` of a model, in place, by a module whose linears can be adapted.

    The model computes the same as before, up to rounding. Call it before an adapter is put in or loaded. Load
    checkpoints of the model in its usual layout before, and write them after `merge_attention`. Hooks on the replaced
    modules are lost.

    Args:
        model: e.g. of OpenCLIP or torchvision.

    Returns:
        The same model.

    Raises:
        ValueError: the model has none, or one cannot be split; the model is then unchanged.
    """
    return _exchange(model, nn.MultiheadAttention, SplitAttention, "already split, or built in another way")


def merge_attention(model: Model) -> Model:
    """Undo `split_attention`: names and values of the weights are again those of the usual layout.

    Args:
        model: without adapters: after `merge_and_unload()` or `unload()`.

    Returns:
        The same model.

    Raises:
        ValueError: no attention in it is split, or it still has an adapter; the model is then unchanged.
    """
    return _exchange(model, SplitAttention, SplitAttention.merged, "hf_visual_peft.split_attention makes them")


def _exchange(model: Model, kind: type, make: Callable[..., nn.Module], why_none: str) -> Model:
    """Replace each module of a kind, in all its parents."""
    if isinstance(model, kind):
        raise ValueError(f"The model is itself a {kind.__name__}, which can only be replaced inside another module.")
    adapter = next((path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)), None)
    if adapter is not None:
        raise ValueError(f"An adapter is in the model ({adapter}): call merge_and_unload() or unload() first.")
    made: dict[nn.Module | None, nn.Module] = {}
    module: nn.Module
    for path, module in model.named_modules():
        if isinstance(module, kind):
            try:
                made[module] = make(module)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
    if not made:
        raise ValueError(f"{type(model).__name__} holds no {kind.__name__}: {why_none}.")
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in made:
                setattr(parent, name, made[child])
    return model


def _check(attention: nn.MultiheadAttention) -> None:
    if type(attention).forward is not nn.MultiheadAttention.forward:
        raise ValueError(
            f"{type(attention).__name__} has its own forward; only that of nn.MultiheadAttention is known."
        )
    if is_parametrized(attention):
        raise ValueError(
            "its weights are parametrized: call torch.nn.utils.parametrize.remove_parametrizations first."
        )
    if attention.bias_k is not None or attention.add_zero_attn:
        field = "add_zero_attn" if attention.add_zero_attn else "add_bias_kv"
        raise ValueError(f"{field} is True: attention with extra keys and values cannot be split.")


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers that are added to logits; True hides."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
