"""Attention with the keys and values of further tokens, for modules that compute attention in a way of their own.

Each function takes an attention module, tokens that join it, (images, tokens, channels) as the module reads its own,
and then the arguments of the module's forward, whose result it returns. Every window sees the tokens of its image.
They have no position and no mask hides them; their queries are not used, so nothing comes of them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


Projection = Callable[[Tensor], tuple[Tensor, ...]]  # tokens to the heads of queries, keys and values


def prompted_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The function for an attention module, by the class that its forward is of; None if there is none."""
    owner = next(base for base in type(module).__mro__ if "forward" in vars(base))
    return _FORWARDS.get(f"{owner.__module__}.{owner.__name__}") or _FORWARDS.get(owner.__name__)


def _heads(x: Tensor, number: int) -> Tensor:
    """(windows, ..., channels) to (windows, heads, tokens, channels of a head)."""
    return x.flatten(1, -2).unflatten(-1, (number, -1)).transpose(1, 2)


def _tokens(heads: Tensor) -> Tensor:
    """The inverse of `_heads`, with one dimension of tokens."""
    return heads.transpose(1, 2).flatten(2)


def _joined(project: Projection, own: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of windows, and their keys and values with those of the tokens of their image behind them."""
    (query, *pair), (_, *further) = project(own), project(tokens)
    windows = own.shape[0] // tokens.shape[0]  # of an image; they are neighbours in the batch
    key, value = (
        torch.cat([x, new.repeat_interleave(windows, dim=0)], dim=2) for x, new in zip(pair, further, strict=True)
    )
    return query, key, value


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float, fused: bool = False
) -> tuple[Tensor, Tensor | None]:
    """What heads answer to scaled queries, and the weights if not `fused`; `bias` belongs to the first keys."""
    if bias is not None:
        bias = F.pad(bias, (0, key.shape[2] - bias.shape[-1]))
    if fused:
        bias = None if bias is None else bias.to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=1.0), None
    logits = query @ key.transpose(-1, -2)
    weights = (logits if bias is None else logits + bias).softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    weights = F.dropout(weights, dropout)
    return weights @ value, weights


def _rate(dropout: Any) -> float:
    return dropout.p if dropout.training else 0.0


def _shifted(bias: Tensor, mask: Tensor | None, windows: int) -> Tensor:
    """Bias of positions, (heads, tokens, tokens), and mask, (windows of an image, tokens, tokens), for all windows."""
    if mask is None:
        return bias.unsqueeze(0)
    return (bias + mask.unsqueeze(1)).repeat(windows // mask.shape[0], 1, 1, 1)


def _separate(module: Any, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(_heads(linear(x), module.num_attention_heads) for linear in (module.query, module.key, module.value))


def _fused(module: Any, number: int, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(_heads(part, number) for part in module.qkv(x).chunk(3, dim=-1))


def _swin(
    module: Any, tokens: Tensor, x: Tensor, attention_mask: Tensor | None = None, output_attentions: Any = False
) -> tuple:
    """Of transformers' Donut-Swin and MaskFormer-Swin."""
    query, key, value = _joined(partial(_separate, module), x, tokens)
    area = query.shape[2]
    bias = module.relative_position_bias_table[module.relative_position_index.flatten()].view(area, area, -1)
    bias = _shifted(bias.permute(2, 0, 1), attention_mask, x.shape[0])
    heads, weights = _attend(query / math.sqrt(query.shape[3]), key, value, bias, _rate(module.dropout))
    return (_tokens(heads), weights) if output_attentions else (_tokens(heads),)


def _swin_v2(
    module: Any, tokens: Tensor, x: Tensor, attention_mask: Tensor | None = None, output_attentions: Any = False
) -> tuple:
    """Of transformers; logits are scaled cosines."""
    query, key, value = _joined(partial(_separate, module), x, tokens)
    number, area = query.shape[1:3]
    table = module.continuous_position_bias_mlp(module.relative_coords_table).view(-1, number)
    bias = 16 * torch.sigmoid(
        table[module.relative_position_index.flatten()].view(area, area, number).permute(2, 0, 1)
    )
    mask = None if attention_mask is None else 2 * attention_mask  # the model adds it twice
    scale = module.logit_scale.clamp(max=math.log(100.0)).exp()
    query, key = F.normalize(query, dim=-1) * scale, F.normalize(key, dim=-1)
    heads, weights = _attend(query, key, value, _shifted(bias, mask, x.shape[0]), _rate(module.dropout))
    return (_tokens(heads), weights) if output_attentions else (_tokens(heads),)


def _timm_swin(module: Any, tokens: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    query, key, value = _joined(partial(_fused, module, module.num_heads), x, tokens)
    bias = _shifted(module._get_rel_pos_bias().squeeze(0), mask, x.shape[0])
    heads, _ = _attend(query * module.scale, key, value, bias, _rate(module.attn_drop), module.fused_attn)
    return module.proj_drop(module.proj(_tokens(heads)))


def _sam(module: Any, tokens: Tensor, hidden_states: Tensor, output_attentions: Any = None, *, fused: bool) -> tuple:
    """Of SAM and SAM-HQ; what is fused has no dropout, as in the model."""
    query, key, value = _joined(partial(_fused, module, module.num_attention_heads), hidden_states, tokens)
    size, bias = hidden_states.shape[1:3], None
    if module.use_rel_pos:
        bias = module.get_decomposed_rel_pos(query.flatten(0, 1), module.rel_pos_h, module.rel_pos_w, size, size)
        bias = bias.reshape(*query.shape[:3], -1)
    dropout = module.dropout if module.training and not fused else 0.0
    heads, weights = _attend(query * module.scale, key, value, bias, dropout, fused)
    return module.proj(_tokens(heads)).unflatten(1, size), None if weights is None else weights.flatten(0, 1)


def _vitdet(module: Any, tokens: Tensor, hidden_state: Tensor, output_attentions: bool = False) -> tuple:
    query, key, value = _joined(partial(_fused, module, module.num_heads), hidden_state, tokens)
    size, bias = hidden_state.shape[1:3], None
    if module.use_relative_position_embeddings:
        add: Any = sys.modules[type(module).__module__].add_decomposed_relative_positions
        flat = query.flatten(0, 1)
        none = flat.new_zeros(*flat.shape[:2], flat.shape[1])
        bias = add(none, flat, module.rel_pos_h, module.rel_pos_w, size, size).unflatten(0, query.shape[:2])
    heads, weights = _attend(query * module.scale, key, value, bias, 0.0)
    output = module.proj(_tokens(heads)).unflatten(1, size)
    return (output, weights) if output_attentions else (output,)


def _hiera(module: Any, tokens: Tensor, hidden_states: Tensor, output_attentions: bool = False) -> tuple:
    """Of mask units, whose tokens stand as many places apart as there are units; or of all tokens."""
    images, length, _ = hidden_states.shape
    units = length // (module.query_stride * module.window_size) if module.use_mask_unit_attn else 1
    own = hidden_states.unflatten(1, (-1, units)).transpose(1, 2).flatten(0, 1)
    query, key, value = _joined(partial(_fused, module, module.num_heads), own, tokens)
    query = query.unflatten(2, (module.query_stride, -1)).max(dim=2).values
    heads, weights = _attend(query * module.scale, key, value, None, 0.0)
    assert weights is not None
    output = module.proj(_tokens(heads).unflatten(0, (images, units)).transpose(1, 2).flatten(1, 2))
    return output, weights.unflatten(0, (images, units)).transpose(1, 2) if output_attentions else None


def _timesformer(module: Any, tokens: Tensor, hidden_states: Tensor, output_attentions: bool = False) -> tuple:
    query, key, value = _joined(partial(_fused, module, module.num_heads), hidden_states, tokens)
    heads, weights = _attend(query * module.scale, key, value, None, _rate(module.attn_drop))
    return (_tokens(heads), weights) if output_attentions else (_tokens(heads),)


def _timm_maxvit(module: Any, tokens: Tensor, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
    """Of windows, and of cells that stand a window apart."""

    def project(x: Tensor) -> tuple[Tensor, ...]:
        if module.head_first:  # queries, keys and values side by side in every head
            return _heads(module.qkv(x), module.num_heads).chunk(3, dim=-1)
        return _fused(module, module.num_heads, x)

    query, key, value = _joined(project, x, tokens)
    bias = shared_rel_pos if module.rel_pos is None else module.rel_pos.get_bias()
    heads, _ = _attend(query * module.scale, key, value, bias, _rate(module.attn_drop), module.fused_attn)
    return module.proj_drop(module.proj(_tokens(heads).unflatten(1, x.shape[1:-1])))


def _timm_eva(
    module: Any,
    tokens: Tensor,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Of EVA and DINOv3; patches have rotary positions."""
    modelling: Any = sys.modules[type(module).__module__]
    groups = getattr(module, "num_kv_groups", 1)
    bias = None
    if getattr(module, "q_bias", None) is not None:
        bias = torch.cat([module.q_bias, module.k_bias, module.v_bias])

    def rotated(x: Tensor) -> Tensor:
        prefix, patches = x.tensor_split([module.num_prefix_tokens], dim=2)
        return torch.cat([prefix, modelling.apply_rot_embed_cat(patches, rope, half=module.rotate_half)], dim=2)

    def project(tokens: Tensor) -> tuple[Tensor, ...]:
        if module.qkv is None:
            numbers = (module.num_heads, *[module.num_heads // groups] * 2)
            linears = (module.q_proj, module.k_proj, module.v_proj)
            query, key, value = (
                _heads(linear(tokens), number) for linear, number in zip(linears, numbers, strict=True)
            )
        else:
            fused = module.qkv(tokens) if bias is None else F.linear(tokens, module.qkv.weight, bias)
            query, key, value = (_heads(part, module.num_heads) for part in fused.chunk(3, dim=-1))
        query, key = module.q_norm(query), module.k_norm(key)
        if tokens is x and rope is not None:
            query, key = rotated(query).type_as(value), rotated(key).type_as(value)
        return query, key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)

    query, key, value = _joined(project, x, tokens)
    mask = modelling.resolve_self_attn_mask(x.shape[1], query, attn_mask, is_causal)
    heads, _ = _attend(query * module.scale, key, value, mask, _rate(module.attn_drop), module.fused_attn)
    mixed = module.norm(_tokens(heads))
    if module.gate is not None:
        mixed = mixed * module.gate(x).sigmoid()
    return module.proj_drop(module.proj(mixed))


_FORWARDS: dict[str, Callable[..., Any]] = {
    "DonutSwinSelfAttention": _swin,
    "MaskFormerSwinSelfAttention": _swin,
    "Swinv2SelfAttention": _swin_v2,
    "SamVisionAttention": partial(_sam, fused=False),
    "SamVisionSdpaAttention": partial(_sam, fused=True),
    "SamHQVisionAttention": partial(_sam, fused=False),
    "SamHQVisionSdpaAttention": partial(_sam, fused=True),
    "VitDetAttention": _vitdet,
    "HieraMaskUnitAttention": _hiera,
    "TimesformerSelfAttention": _timesformer,
    "timm.models.swin_transformer.WindowAttention": _timm_swin,
    "timm.models.maxxvit.AttentionCl": _timm_maxvit,
    "timm.models.eva.EvaAttention": _timm_eva,
    "timm.layers.attention.AttentionRope": _timm_eva,
}
