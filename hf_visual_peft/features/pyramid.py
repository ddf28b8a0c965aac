"""The pyramid of features that an adapter computes beside a plain backbone, for dense heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..sites import BlockAdapters


def level_sizes(pixels: Tensor) -> list[tuple[int, int]]:
    """Rows and columns of the four levels, at 1/4, 1/8, 1/16 and 1/32 of the images, rounded up.

    Args:
        pixels: (batch, channels, height, width).
    """
    sizes: list[tuple[int, int]] = []
    height, width = pixels.shape[-2:]
    for halvings in range(1, 6):
        height, width = -(-height // 2), -(-width // 2)
        if halvings > 1:
            sizes.append((height, width))
    return sizes


def as_maps(tokens: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Split tokens of several maps, (batch, tokens, channels), into maps (batch, channels, height, width)."""
    parts = tokens.split([height * width for height, width in sizes], dim=1)
    return [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]


def feature_pyramid(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four maps of `ViTAdapterConfig(pyramid=True)`, for your own segmentation or detection head.

        maps = hf_visual_peft.feature_pyramid(model, pixel_values=pixels)
        logits = dense_head(maps)

    Gradients flow into the adapter. The whole model runs; its output is dropped, and its own task head gets no
    gradient: `modules_to_save=[]` keeps it from training. Save your own head beside the adapter.

    Args:
        model: with the adapter active; a `PeftModel`, or a transformers model with the adapter added.
        args: of the model.
        kwargs: of the model.

    Returns:
        (batch, width of the backbone, rows, columns) at 1/4, 1/8, 1/16 and 1/32 of the images' rows and columns,
        rounded up; in the adapter's dtype.

    Raises:
        ValueError: no active adapter computes a pyramid, several do, or a batch mixes adapters.
    """
    layer = next((module for module in model.modules() if isinstance(module, BlockAdapters)), None)
    if kwargs.get("adapter_names") is not None:
        raise ValueError("feature_pyramid takes no batch that mixes adapters: use set_adapter, not adapter_names.")
    states: dict[str, Tensor] = {}
    if layer is not None:
        with layer.exchange.collecting() as states:
            model(*args, **kwargs)
    if layer is None or len(states) != 1:
        raise ValueError(
            f"feature_pyramid needs one active adapter of ViTAdapterConfig(pyramid=True), but there are {len(states)}."
        )
    assert layer.exchange.pixels is not None
    (state,) = states.values()
    one, two, three, four = as_maps(state, level_sizes(layer.exchange.pixels))
    return one, two, three, four
