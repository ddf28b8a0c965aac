"""How attention modules project tokens to keys and values, derived from their parts.

This file has only what depends on a module's form: how the channels of its projections are divided into queries, keys
and values and into heads, which norms follow, and how its forward is called with tokens that have no position. The
point where queries meet keys is the same for all: see `attention`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import NO_ACTS, Acts, Pair, own_implementation
from .interception import intercepted


_QUERY_NORMS = ("q_norm", "norm_q", "query_norm", "q_layernorm")
_KEY_NORMS = ("k_norm", "norm_k", "key_norm", "k_layernorm")
_VALUE_NORMS = ("v_norm", "norm_v", "value_norm")
_KEY_HEADS = ("num_kv_heads", "num_key_value_heads")
_HEADS = ("num_attention_heads", "num_heads", "heads")
_SIZES = ("head_dim", "dim_head", "attention_head_size", "head_size")
_ROTATION = "position_embeddings"  # rotates queries and keys by rows and columns; extra tokens have none


class Projections(NamedTuple):
    """An attention module and its projections, which may be one module."""

    attention: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module


def projections(block: nn.Module, path: str, query: str, key: str, value: str) -> Projections:
    """The form of a block's attention, by the names of the module and of the projections in the block."""
    attention = block.get_submodule(path)
    children = (name.removeprefix(f"{path}.").partition(".")[0] for name in (query, key, value))
    return Projections(attention, *map(attention.get_submodule, children))


def head_sizes(form: Projections) -> tuple[int, int, int]:
    """Number of heads that keys have, and channels of a head in keys and in values."""
    attention, query, key, value = form
    heads = _heads_of(attention)
    if key is not value and getattr(attention, "key_dim", None) == _width(key):
        heads = 1  # of keys that all queries share
    if _by_head(attention) and not getattr(attention, "head_first", False):
        sizes: Any = attention
        return heads, sizes.key_dim, sizes.val_dim
    wide, deep = _width(key) // heads, _width(value) // heads
    size = next((n for name in _SIZES if isinstance(n := getattr(attention, name, None), int)), None)
    if key is value:
        size = size or wide // (3 if query is key else 2)
        return heads, size, size
    return heads, wide // 2 if query is key else wide, deep


def _heads_of(attention: nn.Module) -> int:
    for name in (*_KEY_HEADS, *_HEADS):
        number = getattr(attention, name, None)
        if isinstance(number, int):
            return number
    groups = getattr(attention, "num_key_value_groups", 1)
    config: Any = getattr(attention, "config", None)
    number = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if not isinstance(number, int):
        return 1  # what has several must know how many; where keys join, this shows
    return number // groups if getattr(config, "num_key_value_heads", None) is None else number


def _width(projection: nn.Module) -> int:
    for module in reversed([*projection.modules()]):  # the last of a sequence
        for name in ("out_features", "out_channels", "nf"):
            number: Any = getattr(module, name, None)
            if isinstance(number, int):
                return number
    raise ValueError(f"{type(projection).__name__} is not a linear or convolution that projects to keys and values.")


def project(form: Projections, tokens: Tensor) -> Pair:
    """Keys and values of tokens without position, (images, heads, tokens, channels of a head) each.

    Args:
        form: of the module.
        tokens: (images, tokens, channels), as the module reads its own.
    """
    attention, _, key, value = form
    heads, channels, _ = head_sizes(form)
    projected = _applied(attention, key, tokens)
    if key is not value:
        keys = _split(projected[..., -heads * channels :], heads)  # after queries, if both are one linear
        values = _split(_applied(attention, value, tokens), heads)
    elif _by_head(attention):
        depth = getattr(attention, "val_dim", channels)
        projected = _split(projected, heads)
        keys, values = projected[..., -depth - channels : -depth], projected[..., -depth:]
    else:
        part = heads * channels
        keys, values = (_split(each, heads) for each in projected[..., -2 * part :].chunk(2, dim=-1))
    return _normed(attention, _KEY_NORMS, keys), _normed(attention, _VALUE_NORMS, values)


def project_queries(form: Projections, tokens: Tensor) -> Tensor:
    """Queries of tokens without position, (images, heads, tokens, channels of a head).

    Args:
        form: of the module.
        tokens: (images, tokens, channels), as the module reads its own.
    """
    attention, query, key, value = form
    heads, channels, _ = head_sizes(form)
    if query is not key:
        queries = _applied(attention, query, tokens).unflatten(-1, (-1, channels)).transpose(1, 2)
    elif _by_head(attention):
        queries = _split(_applied(attention, query, tokens), heads)[..., :channels]
    else:
        rows = _width(query) - (2 if value is key else 1) * heads * channels
        queries = _first_rows(attention, query, tokens, rows).unflatten(-1, (-1, channels)).transpose(1, 2)
    return _normed(attention, _QUERY_NORMS, queries)


def _first_rows(attention: nn.Module, projection: nn.Module, tokens: Tensor, rows: int) -> Tensor:
    """The first output channels of a projection, without computing the others where it is an ordinary linear."""
    if type(projection) is not nn.Linear or getattr(attention, "q_bias", None) is not None:
        return _applied(attention, projection, tokens)[..., :rows]
    bias = projection.bias
    return F.linear(tokens, projection.weight[:rows], None if bias is None else bias[:rows])


def crossed(form: Projections, x: Tensor, others: Tensor) -> Tensor:
    """Softmax attention from tokens to others, without positions; heads side by side, before the output projection.

    Args:
        form: of the attention module.
        x: (images, tokens, channels), as the module reads its own.
        others: (images or 1, other tokens, channels).
    """
    query = project_queries(form, x)
    scale: Any = getattr(form.attention, "scaling", getattr(form.attention, "scale", None))
    scale = float(scale) if isinstance(scale, int | float) else query.shape[-1] ** -0.5
    groups = query.shape[1] // head_sizes(form)[0]
    key, value = (part.repeat_interleave(groups, dim=1).expand(len(x), -1, -1, -1) for part in project(form, others))
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2)


def _applied(attention: nn.Module, projection: nn.Module, tokens: Tensor) -> Tensor:
    """Apply a projection, with the biases that some modules keep beside it."""
    if any(isinstance(module, nn.Conv2d) for module in projection.modules()):
        return projection(tokens.mT.unsqueeze(-1)).squeeze(-1).mT
    projected = projection(tokens)
    biases: list[Any] = [getattr(attention, name, None) for name in ("q_bias", "k_bias", "v_bias")]
    if all(isinstance(bias, Tensor) for bias in biases):
        projected = projected + torch.cat(biases)
    return projected


def _by_head(attention: nn.Module) -> bool:
    """Whether the channels are grouped by heads first, each with its query, key and value."""
    sizes = (getattr(attention, name, None) for name in ("key_dim", "val_dim"))
    return bool(getattr(attention, "head_first", False)) or all(isinstance(size, int) for size in sizes)


def _split(x: Tensor, heads: int) -> Tensor:
    """(images, tokens, channels) to (images, heads, tokens, channels of a head)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _normed(attention: nn.Module, names: tuple[str, ...], x: Tensor) -> Tensor:
    """Apply the module's norm of queries or keys to heads, over the channels of one head or of all."""
    found = (getattr(attention, name, None) for name in names)
    norm: Any = next((each for each in found if each is not None), None)
    if norm is None:
        return x
    shape = getattr(norm, "normalized_shape", None)
    weight = getattr(norm, "weight", None)
    size = shape[-1] if shape else x.shape[-1] if weight is None else weight.shape[-1]
    if size == x.shape[-1]:
        return norm(x)
    return _split(norm(x.transpose(1, 2).flatten(2)), x.shape[1])


def spread(pair: Pair, like: Tensor, heads: int) -> Pair:
    """Expand heads of images to the layout of a module's windows.

    Args:
        pair: (images, heads, tokens, channels of a head) each.
        like: a module's keys: (windows, heads, ...), (windows x heads, ...), or (images, heads, windows, ...) with the
            heads also after the windows; windows of an image are neighbours.
        heads: number of heads.

    Raises:
        ValueError: the module's keys have another layout.
    """
    images = pair[0].shape[0]
    lead = tuple(like.shape[:-2])
    where = f"keys of shape {tuple(like.shape)}, for {images} images and {heads} heads"
    if pair[0].shape[1] != heads or pair[0].shape[-1] != like.shape[-1]:
        raise ValueError(f"Keys of shape {tuple(pair[0].shape)} cannot join {where}.")
    if len(lead) == 1 and lead[0] % (images * heads) == 0:
        windows = lead[0] // (images * heads)
        keys, values = (x.repeat_interleave(windows, dim=0).flatten(0, 1) for x in pair)
    elif len(lead) == 2 and lead[1] == heads and lead[0] % images == 0:
        keys, values = (x.repeat_interleave(lead[0] // images, dim=0) for x in pair)
    elif len(lead) == 3 and lead[0] == images and heads in lead[1:]:
        dim = 2 if lead[1] == heads else 1
        if lead[1] == lead[2] and lead[1] > 1:
            dim = 2 if like.stride(1) < like.stride(2) else 1  # heads are neighbouring channels, windows are not
        keys, values = (x.unsqueeze(dim).expand(*lead, *x.shape[-2:]) for x in pair)
    else:
        raise ValueError(f"The layout of heads and windows is not known in {where}.")
    return keys, values


def project_by_running(form: Projections, tokens: Tensor) -> Pair:
    """Keys and values as `project` returns them, where a module makes them of more than its projections.

    The module runs on one token at a time: a module that pads or divides a map then has the token in its first row.

    Args:
        form: of a module that uses no interface of transformers.
        tokens: (images, tokens, channels), as the module reads its own.

    Raises:
        ValueError: it lays out heads in an unknown way.
    """
    images, count, _ = tokens.shape
    single = tokens.flatten(0, 1)
    as_maps = any(isinstance(module, nn.Conv2d) for module in form.key.modules())
    kept: list[Tensor] = []
    acts = replace(NO_ACTS, keep=lambda *pair: kept.extend(pair))
    alone(form.attention, single[:, :, None, None] if as_maps else single[:, None], False, acts)
    if any(x.numel() // (x.shape[-1] * x.shape[-2]) % len(single) for x in kept):
        shapes = " and ".join(str(tuple(x.shape)) for x in kept)
        raise ValueError(f"The layout of heads is not known in keys and values of shapes {shapes}.")
    # (tokens x heads, rows, channels), with several windows of one token or one
    first = (x.reshape(images, count, -1, *x.shape[-2:])[..., 0, :] for x in kept)
    key, value = (x.transpose(1, 2) for x in first)
    return key, value


def alone(attention: nn.Module, tokens: Tensor, interface: bool, acts: Acts = NO_ACTS) -> Tensor:
    """The output of a module for tokens without position: without bias and rotation.

    Args:
        attention: the module.
        tokens: (sequences, tokens, channels), as the module reads its own.
        interface: whether it computes attention through transformers' interface.
        acts: what to do where queries meet keys, in modules without that interface.
    """
    names = list(inspect.signature(type(attention).forward).parameters)
    batch_first = getattr(attention, "batch_first", True)
    x = tokens if batch_first else tokens.transpose(0, 1)
    kwargs: dict[str, Any] = {}
    if _ROTATION in names:
        none = x.new_zeros(0, getattr(attention, "head_dim", 1))
        kwargs[_ROTATION] = (none, none)
    if "resolution" in names:
        kwargs["resolution"] = (0, 0)
    if "need_weights" in names:
        kwargs["need_weights"] = False
    args = (x, x, x) if {"key", "value"} <= set(names) else (x,)
    # without its hooks, which are for its own tokens
    forward: Callable[..., Any] = partial(type(attention).forward, attention)
    # kernels that cannot be intercepted take no biases either
    if interface and own_implementation(attention) not in ("eager", "sdpa", None):
        output = forward(*args, **kwargs)
    else:
        output = intercepted(attention, acts, forward, args, kwargs, placed=False)
    output = output[0] if isinstance(output, tuple) else output
    return output if batch_first else output.transpose(0, 1)
