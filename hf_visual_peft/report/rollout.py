"""Attention roll-out (Abnar and Zuidema, arXiv 2005.00928): how much of each patch reaches a backbone's output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..backbones.backbone import BackboneError, Block, VisionBackbone, entered, versions
from ..backbones.finding import find_backbone
from ..backbones.modes import in_eval_mode
from ..sites.attention import attention_path


class NoRolloutError(ValueError):
    """A model has no roll-out; the message says why."""


class _Weights(TorchFunctionMode):
    """Keeps the attention weights that a module computes, in the mean over heads, (batch, queries, keys)."""

    def __init__(self) -> None:
        super().__init__()
        self.watching = False
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self.watching:
            name = getattr(func, "__name__", "")
            if name == "scaled_dot_product_attention":
                self._keep(_fused(*args, **kwargs))
            elif name == "softmax" and kwargs.get("dim", args[1] if len(args) > 1 else None) in (-1, output.ndim - 1):
                self._keep(output)
        return output

    def _keep(self, weights: Tensor) -> None:
        if weights.ndim == 4:
            self.found.append(weights.detach().float().mean(1))


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The weights of `F.scaled_dot_product_attention`."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(-1)


@torch.no_grad()
def rollout(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The share that each patch has in the output, (batch, rows, columns); it adds up to 1 with that of other tokens.

    The weights of each block are averaged over heads, and half of the stream passes by each attention. Prompts, and
    keys that join an attention, are no tokens of the backbone: they are left out, and the rows of the rest are
    normalised. The output is the first token where there is one before the patches, else the mean of patches.

    Args:
        model: with or without adapters.
        inputs: of its forward, with `pixel_values`.

    Raises:
        NoRolloutError: its blocks have no softmax attention among all tokens of one grid of patches.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        backbone = find_backbone(base)
    except BackboneError as error:
        raise NoRolloutError(" ".join(str(error).split())) from error
    blocks = backbone.blocks
    if not blocks or blocks[0].width is None:
        raise NoRolloutError(f"{backbone.class_name} has no blocks of tokens.")
    prefix = blocks[0].prefix_tokens
    total: Tensor | None = None
    for weights, tokens in _weights(model, base, inputs, backbone):
        own = _of_own(weights, tokens, prefix)
        mixed = (own + torch.eye(tokens, device=own.device)) / 2
        total = mixed if total is None else mixed @ total
    assert total is not None
    rows, columns = _grid(backbone, inputs["pixel_values"].shape[-2:], total.shape[-1] - prefix)
    share = total[:, 0] if prefix else total.mean(1)
    return share[:, prefix:].unflatten(1, (rows, columns))


def _of_own(weights: Tensor, tokens: int, prefix: int) -> Tensor:
    """The weights among a backbone's own tokens: prompts stand after the prefix, keys that join at the end."""
    inserted = weights.shape[-2] - tokens
    kept = [*range(prefix), *range(prefix + inserted, tokens + inserted)]
    own = weights[:, kept][:, :, kept]
    return own / own.sum(-1, keepdim=True)


def _weights(
    model: nn.Module, base: nn.Module, inputs: Mapping[str, Any], backbone: VisionBackbone
) -> Iterator[tuple[Tensor, int]]:
    """The weights of each block with the number of its own tokens."""
    seen: list[tuple[list[Tensor], int]] = []
    with in_eval_mode(model), _Weights() as mode, _watched(base, backbone, mode, seen):
        model(**inputs)
    name = backbone.class_name
    if len(seen) != len(backbone.blocks):
        raise NoRolloutError(f"{name} does not run each of its blocks once.")
    for found, tokens in seen:
        whole = [one for one in found if one.shape[-2] >= tokens and one.shape[-1] >= one.shape[-2]]
        if not whole:
            raise NoRolloutError(f"{name} has blocks without softmax attention among all tokens of an image.")
        if tokens != seen[0][1]:
            raise NoRolloutError(f"{name} has blocks with different numbers of tokens.")
        yield whole[0], tokens


@contextmanager
def _watched(
    model: nn.Module, backbone: VisionBackbone, mode: _Weights, seen: list[tuple[list[Tensor], int]]
) -> Iterator[None]:
    """Keep what the attention of each block computes."""
    handles = []

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if x.ndim != 3:
            raise NoRolloutError(f"{backbone.class_name} has no sequence of tokens.")
        mode.found = []
        seen.append((mode.found, x.shape[1]))

    def watch(*_: Any) -> None:
        mode.watching = True

    def leave(*_: Any) -> None:
        mode.watching = False

    try:
        for block in backbone.blocks:
            copies = [module for each in versions(model, block.path) for module in entered(each)]
            for module in copies:  # of those that adapters train, one runs
                attention = _attention(module, block, backbone)
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
                handles.append(attention.register_forward_pre_hook(watch))
                handles.append(attention.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attention(module: nn.Module, block: Block, backbone: VisionBackbone) -> nn.Module:
    """The module of a block that computes its attention."""
    table = block.table or backbone.architecture
    if not table.softmax or not block.projections:
        raise NoRolloutError(f"{backbone.class_name} has blocks without softmax attention.")
    try:
        path = attention_path(module, block.projections[0].removeprefix(f"{block.path}."))
    except ValueError as error:
        raise NoRolloutError(str(error)) from error
    return module.get_submodule(path)


def _grid(backbone: VisionBackbone, size: tuple[int, int], patches: int) -> tuple[int, int]:
    """Rows and columns of patches of images of a size."""
    side = math.isqrt(backbone.patch_features // max(backbone.image_channels, 1))
    rows, columns = (length // max(side, 1) for length in size)
    if rows * columns != patches:
        raise NoRolloutError(f"{backbone.class_name} has {patches} tokens that are no grid of patches of {side} px.")
    return rows, columns
