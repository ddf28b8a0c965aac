"""Make inputs for a module that takes images: pixels, videos, or patches as language models with images pack them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig


_SIZE = 224  # pixels, if no size is known
_SMALL = 128  # pixels, for models without a fixed size
_CELLS = 4  # rows and columns of packed patches, times those that are merged


def image_of(tower: nn.Module, device: str | None = None) -> dict[str, Tensor]:
    """One image or video of the tower's size, or patches if it takes these; by the names of its arguments.

    Args:
        tower: that takes them.
        device: of the tensors; by default that of the tower.
    """
    made = _made_for(tower) | ({} if device is None else {"device": device})
    packed = _packed(tower, made)
    if packed:
        return packed
    config: Any = getattr(tower, "config", None)
    first = next((m for m in tower.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    channels = first.in_channels if first is not None else getattr(config, "num_channels", 3)
    size = getattr(config, "image_size", None) or getattr(getattr(tower, "patch_embed", None), "img_size", None)
    size = size or getattr(tower, "default_cfg", {}).get("input_size", (_SIZE,))[-1]
    height, width = size if isinstance(size, tuple | list) else (size, size)
    frames = (config.num_frames,) if isinstance(getattr(config, "num_frames", None), int) else ()
    return {"pixel_values": torch.rand(1, *frames, channels, height, width, **made)}


def inputs_for(twin: nn.Module, example: Any) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """Arguments to try, the most likely first.

    Args:
        twin: that takes them.
        example: the only arguments to try, if they are given: a tensor, tuple or mapping.
    """
    if example is not None:
        if isinstance(example, Mapping):
            yield (), dict(example)
        else:
            yield (tuple(example) if isinstance(example, list | tuple) else (example,)), {}
        return
    made = _made_for(twin)
    packed = _packed(twin, made)
    if packed:
        yield (), packed
        return
    config: Any = getattr(twin, "config", None)
    told: Any = getattr(twin, "default_cfg", None) or {}
    first = next((m.in_channels for m in twin.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    channels = dict.fromkeys((first, getattr(config, "num_channels", None), *told.get("input_size", ())[:1], 3))
    sizes = list(_sizes(twin, config, told))
    name = getattr(twin, "main_input_name", None)
    names = list(inspect.signature(twin.forward).parameters)
    if name not in names:
        name = next((each for each in ("pixel_values", "pixel_values_videos", "x", "images") if each in names), None)
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(1, count, *size) for count in channels if count for size in sizes]
    if isinstance(frames, int):
        shapes = [(1, frames, *shape[1:]) for shape in shapes] + shapes
    elif isinstance(config, PretrainedConfig):
        shapes += [(1, 2, *shape[1:]) for shape in shapes]  # models that compare two images
    for shape in shapes:
        pixels = torch.randn(shape, generator=generator).to(**made)
        yield ((), {name: pixels}) if name and hasattr(twin, "main_input_name") else ((pixels,), {})


def named_for(function: Callable[..., Any], images: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of a tower by the names that a model around it has for them, such as `image_grid_thw` for `grid_thw`."""
    names = inspect.signature(function).parameters
    first = next(iter(images))
    made = {}
    for name, value in images.items():
        others = ("pixel_values",) if name == first else (f"image_{name}", name.replace("pixel_", "image_"))
        made[next((each for each in (name, *others) if each in names), name)] = value
    return made


def of_samples(images: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The same images, as models with several images a sample take them; None if they are not images."""
    first, *others = images
    if images[first].ndim != 4:
        return None
    return {first: images[first].unsqueeze(1), **{name: images[name] for name in others}}


def _packed(tower: nn.Module, made: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Patches with the arguments that say where they lie; None if the forward takes no such arguments."""
    names = list(inspect.signature(tower.forward).parameters)
    config: Any = getattr(tower, "config", None)
    whole: dict[str, Any] = {"dtype": torch.long, "device": made.get("device")}
    merged = math.lcm(*(n for n in (getattr(config, each, 1) for each in _MERGES) if isinstance(n, int) and n))
    side = _CELLS * merged
    grid = next((name for name in names if name.endswith("grid_thw")), None)
    if grid is not None:  # those of several images in one row
        return {names[0]: torch.rand(side * side, _patch_width(tower), **made), grid: _long([[1, side, side]], whole)}
    if "spatial_shapes" in names:
        side = int(config.num_patches**0.5)
        features = config.num_channels * config.patch_size**2
        return {
            "pixel_values": torch.rand(1, side * side, features, **made),
            "pixel_attention_mask": torch.ones(1, side * side, **whole),
            "spatial_shapes": _long([[side, side]], whole),
        }
    places = next((name for name in names if name.endswith("_position_ids")), None)
    if places is not None:  # padded, each with its column and row
        cells = [[column, row] for row in range(side) for column in range(side)]
        return {names[0]: torch.rand(1, side * side, _patch_width(tower), **made), places: _long([cells], whole)}
    if "aspect_ratio_ids" in names:  # an image in tiles
        tiles, size = config.max_num_tiles, config.image_size
        return {
            names[0]: torch.rand(1, 1, tiles, config.num_channels, size, size, **made),
            "aspect_ratio_ids": torch.ones(1, 1, **whole),
            "aspect_ratio_mask": torch.ones(1, 1, tiles, **whole),
        }
    return None


_MERGES = ("spatial_merge_size", "pooling_kernel_size")  # rows of patches that become one token


def _long(values: list, whole: Mapping[str, Any]) -> Tensor:
    return torch.tensor(values, **whole)


def _patch_width(tower: nn.Module) -> int:
    """Values of one patch, as the first linear or convolution reads them."""
    first = next(m for m in tower.modules() if isinstance(m, nn.Conv2d | nn.Conv3d | nn.Linear))
    return first.weight[0].numel()


def _made_for(tower: nn.Module) -> dict[str, Any]:
    weight = next((p for p in tower.parameters() if p.is_floating_point()), None)
    return {} if weight is None else {"dtype": weight.dtype, "device": weight.device}


def _sizes(twin: nn.Module, config: Any, told: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    size = getattr(config, "image_size", None) or getattr(getattr(twin, "patch_embed", None), "img_size", None)
    size = size or getattr(twin, "img_size", None) or getattr(twin, "image_size", None)
    full = size or told.get("input_size", (_SIZE,))[1:] or (_SIZE, _SIZE)
    if isinstance(full, Mapping):
        full = (full.get("height"), full.get("width"))
    height, width = (full, full) if isinstance(full, int) else (tuple(full) * 2)[:2]
    if told and not told.get("fixed_input_size") and not size and min(height, width) > _SMALL:
        yield _SMALL, _SMALL
    yield int(height), int(width)
    yield from ((side, side) for side in (64, 32) if not isinstance(config, PretrainedConfig))
