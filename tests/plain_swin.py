"""A tiny Swin taken apart into its stages, for evaluating networks beside it without the library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from families import images, liven
from peft import get_peft_model
from torch import Tensor, nn
from transformers import SwinConfig, SwinForImageClassification


@dataclass
class SwinPlace:
    """Where a block stands: its number, that of its stage, the stage's sides, and whether it is the first in it."""

    index: int
    stage: int
    side: int
    first: bool


def tiny_swin(**kwargs) -> nn.Module:
    """Four blocks in three stages of 8, 16 and 32 channels on 16 x 16, 8 x 8 and 4 x 4 cells."""
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 2, 1], "num_heads": [1, 2, 2]}
    torch.manual_seed(0)
    return liven(SwinForImageClassification(SwinConfig(**sizes | {"window_size": 2, "num_labels": 3} | kwargs)))


def swin_with(config) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A Swin of its own, the same with an adapter, images, and what the adapted one makes of them before its head."""
    pixels = images(2)["pixel_values"]
    torch.manual_seed(3)
    model = get_peft_model(tiny_swin(), config).eval()
    return tiny_swin(), model, pixels, model.get_base_model().swin(pixels).last_hidden_state


def run_swin(model: nn.Module, pixels: Tensor, change=lambda place, x, z, y: y) -> Tensor:
    """The last hidden state of an unadapted Swin.

    Args:
        model: it.
        pixels: images.
        change: called behind each block with its place and the tokens before it, between its attention and its MLP,
            and behind it; returns those that go on.
    """
    swin, between = model.swin, []
    x, (side, _) = swin.embeddings(pixels)
    index = 0
    for stage, layer in enumerate(swin.encoder.layers):
        for number, block in enumerate(layer.blocks):
            handle = block.layernorm_after.register_forward_pre_hook(lambda module, args: between.append(args[0]))
            y = block(x, (side, side))[0]
            handle.remove()
            x = change(SwinPlace(index, stage, side, number == 0), x, between[-1], y)
            index += 1
        if layer.downsample is not None:
            x = layer.downsample(x, (side, side))
            side //= 2
    return swin.layernorm(x)


def pooled(tokens: Tensor, side: int) -> Tensor:
    """Tokens of a square grid averaged over 2 x 2 cells."""
    maps = tokens.transpose(1, 2).unflatten(2, (side, side))
    return F.avg_pool2d(maps, 2).flatten(2).transpose(1, 2)


def pieces_of(model: nn.Module, slot: str) -> Iterator[dict[str, Tensor] | None]:
    """The weights of a slot, block by block, None at blocks without."""
    for layer in model.get_base_model().swin.encoder.layers:
        for block in layer.blocks:
            held = getattr(getattr(block, "adapters", None), slot, None)
            yield None if held is None else dict(held["default"].named_parameters())
