"""Make inputs for a module that takes images: pixels, videos, or patches as language models with images pack them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig


_SIZE = 224  # pixels, if no size is known
_SMALL = 128  # pixels, for models without a fixed size
_WORDS = 4  # beside an image
_CELLS = 4  # rows and columns of packed patches, times those that are merged


def image_of(tower: nn.Module, device: str | None = None) -> dict[str, Tensor]:
    """One image or video of the tower's size, or patches if it takes these; by the names of its arguments.

    Args:
        tower: that takes them.
        device: of the tensors; by default that of the tower.
    """
    return next(images_of(tower, device))


def images_of(tower: nn.Module, device: str | None = None) -> Iterator[dict[str, Tensor]]:
    """The same in each layout that the tower may take, the most likely first.

    Args:
        tower: that takes them.
        device: of the tensors; by default that of the tower.
    """
    made = _made_for(tower) | ({} if device is None else {"device": device})
    packed = list(_packed(tower, made))
    if packed:
        yield from packed
        return
    config: Any = getattr(tower, "config", None)
    first = next((m for m in tower.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    channels = first.in_channels if first is not None else getattr(config, "num_channels", 3)
    size = getattr(config, "image_size", None) or getattr(getattr(tower, "patch_embed", None), "img_size", None)
    size = size or getattr(tower, "default_cfg", {}).get("input_size", (_SIZE,))[-1]
    height, width = size if isinstance(size, tuple | list) else (size, size)
    frames = (config.num_frames,) if isinstance(getattr(config, "num_frames", None), int) else ()
    shape = (1, *frames, channels, height, width)
    for beside in _beside(tower, shape, made):
        yield {"pixel_values": torch.rand(shape, **made), **beside}
    for patches in _patches(tower):
        yield {"pixel_values": torch.rand(patches, **made)}


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
    packed = list(_packed(twin, made))
    if packed:
        yield from (((), each) for each in packed)
        return
    config: Any = getattr(twin, "config", None)
    told: Any = getattr(twin, "default_cfg", None) or {}
    first = next((m.in_channels for m in twin.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    channels = dict.fromkeys((first, getattr(config, "num_channels", None), *told.get("input_size", ())[:1], 3))
    sizes = list(_sizes(twin, config, told))
    names = list(inspect.signature(twin.forward).parameters)
    name = _name_of_pixels(twin, names)
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(1, count, *size) for count in channels if count for size in sizes]
    if isinstance(frames, int):
        # also frames in the place of samples
        shapes = [(1, frames, *shape[1:]) for shape in shapes] + shapes + [(frames, *each[1:]) for each in shapes]
    elif isinstance(config, PretrainedConfig):
        shapes += [(1, 2, *shape[1:]) for shape in shapes]  # models that compare two images
    named = name if name and hasattr(twin, "main_input_name") else None
    for shape in shapes:
        pixels = torch.randn(shape, generator=generator).to(**made)
        yield ((), {named: pixels}) if named else ((pixels,), {})
    for beside in _beside(twin, shapes[0], made) if named else ():
        if named and beside:
            yield (), {named: torch.randn(shapes[0], generator=generator).to(**made), **beside}
    for shape in _patches(twin):
        pixels = torch.randn(shape, generator=generator).to(**made)
        yield ((), {named: pixels}) if named else ((pixels,), {})


def _name_of_pixels(twin: nn.Module, names: Sequence[str]) -> str | None:
    """The argument that takes pixels; a model that reads words, too, does not name it as its main input."""
    main = getattr(twin, "main_input_name", None)
    pixels = [each for each in names if each.startswith("pixel_values")]
    if main in pixels or (main in names and not pixels):
        return main
    return next((each for each in (*pixels, "x", "images") if each in names), None)


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


def _beside(tower: nn.Module, shape: Sequence[int], made: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Nothing, then what the forward also takes: the image's size in patches and in pixels, or words."""
    yield {}
    names = list(inspect.signature(tower.forward).parameters)
    whole: dict[str, Any] = {"dtype": torch.long, "device": made.get("device")}
    name = next((each for each in names if each.endswith(_SIZES)), None)
    if name is not None:
        height, width = shape[-2:]
        patch = _patch_sides(tower)
        if patch is not None:
            yield {name: _long([[height // patch[0], width // patch[1]]], whole)}
        yield {name: _long([[height, width]], whole)}
    if reads_words(tower):
        words = torch.ones(1, _WORDS, **whole)
        boxes = {"bbox": torch.zeros(1, _WORDS, 4, **whole)} if "bbox" in names else {}
        yield {"input_ids": words, **boxes}


def reads_words(module: nn.Module) -> bool:
    """Whether a module also takes words, whose tokens may then stand beside those of an image."""
    return "input_ids" in inspect.signature(module.forward).parameters


def is_video(tower: nn.Module, shape: Sequence[int]) -> bool:
    """Whether an input of a shape is one of frames, and not of patches in five dimensions."""
    return len(shape) == 5 and tuple(shape[-2:]) != _patch_sides(tower) and shape[-1] not in _COLOURS


def _patches(tower: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of patches for a tower that takes them alone: flat, or with time, rows, columns and channels."""
    config: Any = getattr(tower, "config", None)
    sides = _patch_sides(tower)
    if sides is None:
        return
    channels = getattr(config, "num_channels", None) or 3
    width = sides[0] * sides[1] * channels
    first = next((m for m in tower.modules() if isinstance(m, nn.Conv2d | nn.Conv3d | nn.Linear)), None)
    if isinstance(first, nn.Linear) and first.in_features == width:
        size = getattr(config, "image_size", None)
        height, wide = (
            size if isinstance(size, tuple | list) else (size or _CELLS * sides[0], size or _CELLS * sides[1])
        )
        count = (height // sides[0]) * (wide // sides[1])
        yield 1, count, width
        yield count, width
    times = getattr(config, "temporal_patch_size", None)
    if isinstance(times, int):
        yield _CELLS, times, *sides, channels


def _patch_sides(tower: nn.Module) -> tuple[int, int] | None:
    size = getattr(getattr(tower, "config", None), "patch_size", None)
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, tuple | list) and len(size) == 2 else None


def _packed(tower: nn.Module, made: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Patches with the arguments that say where they lie; nothing if the forward takes no such arguments."""
    names = list(inspect.signature(tower.forward).parameters)
    config: Any = getattr(tower, "config", None)
    whole: dict[str, Any] = {"dtype": torch.long, "device": made.get("device")}
    merged = math.lcm(*(n for n in (getattr(config, each, 1) for each in _MERGES) if isinstance(n, int) and n))
    side = _CELLS * merged
    grid = next((name for name in names if name.endswith("grid_thw")), None)
    if grid is not None:  # those of several images in one row
        for rows, shape in _layouts(tower, side, merged):
            yield {
                names[0]: torch.rand(shape, **made),
                grid: _long([[1, rows, rows]], whole),
                **{name: _long([merged], whole) for name in names if name == "merge_sizes"},
            }
        return
    if "spatial_shapes" in names:
        side = int(config.num_patches**0.5)
        features = config.num_channels * config.patch_size**2
        yield {
            "pixel_values": torch.rand(1, side * side, features, **made),
            "pixel_attention_mask": torch.ones(1, side * side, **whole),
            "spatial_shapes": _long([[side, side]], whole),
        }
        return
    places = next((name for name in names if name.endswith("_position_ids")), None)
    if places is not None:  # padded, each with its column and row
        cells = [[column, row] for row in range(side) for column in range(side)]
        yield {names[0]: torch.rand(1, side * side, _patch_width(tower), **made), places: _long([cells], whole)}
        return
    if "aspect_ratio_ids" in names:  # an image in tiles
        tiles, size = config.max_num_tiles, config.image_size
        yield {
            names[0]: torch.rand(1, 1, tiles, config.num_channels, size, size, **made),
            "aspect_ratio_ids": torch.ones(1, 1, **whole),
            "aspect_ratio_mask": torch.ones(1, 1, tiles, **whole),
        }


def _layouts(tower: nn.Module, side: int, merged: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Rows of a square grid and the shape of its patches: flat, as small images, or merged with channels last."""
    first = _first_projection(tower)
    yield side, (side * side, _patch_width(tower))
    if not isinstance(first, nn.Linear):
        yield side, (side * side, first.in_channels, *first.kernel_size)
        yield side, (1, side * side, first.in_channels, *first.kernel_size)
    patch = _patch_sides(tower)
    if patch is not None:
        channels = getattr(tower.config, "num_channels", None) or 3
        yield _CELLS, (_CELLS * _CELLS, patch[0] * merged, patch[1] * merged, channels)


_MERGES = ("spatial_merge_size", "pooling_kernel_size")  # rows of patches that become one token
_COLOURS = (1, 3, 4)
_SIZES = ("_sizes", "_shapes", "_grid_hw", "_grid_hws")  # of arguments that say how large images are


def _long(values: list, whole: Mapping[str, Any]) -> Tensor:
    return torch.tensor(values, **whole)


def _patch_width(tower: nn.Module) -> int:
    """Values of one patch, as the first linear or convolution reads them."""
    return _first_projection(tower).weight[0].numel()


def _first_projection(tower: nn.Module) -> Any:
    """The convolution that reads colours; else the first projection, as modules may stand before it that run later."""
    found = [m for m in tower.modules() if isinstance(m, nn.Conv2d | nn.Conv3d | nn.Linear)]
    return next((m for m in found if not isinstance(m, nn.Linear) and m.in_channels in _COLOURS), found[0])


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
