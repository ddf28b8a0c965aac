"""Make inputs for a backbone, and run a copy of it in which repeated blocks are skipped."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from .backbone import BackboneError
from .paths import is_in
from .probing import _images
from .watching import Call, Trace, shared_copy, watch


_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_SMALL = 128  # pixels, for models without a fixed size
_MANY = 20_000_000  # parameters from which repeated blocks are skipped


_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class StopRun(Exception):  # noqa: N818 - not an error
    """Ends a run early."""


@dataclass
class Ran:
    """A recorded run.

    Attributes:
        twin: the copy, with the weights of the model.
        args: that it was run with.
        kwargs: of the run.
        trace: the recorded graph.
        kinds: of items of lists: equal for items of equal structure.
        skipped: skipped items, each with the item of equal structure that has run, by name.
        given: arguments of the items of lists, by name.
        pretrained: whether the model is one of timm or transformers.
    """

    twin: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    trace: Trace
    kinds: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    given: dict[str, tuple[tuple, dict]] = field(default_factory=dict)
    pretrained: bool = False

    def calls(self) -> dict[str, Call]:
        """The first call of each module, in order; for skipped items that of the item that has run."""
        found = self.trace.first_calls()
        order = {path: (float(position), 0) for position, path in enumerate(found)}
        for skipped, like in self.skipped.items():
            call = found[skipped]
            inner = [path for path in found if path != like and is_in(path, like)]
            for position, path in enumerate(inner, start=1):
                name = skipped + path.removeprefix(like)
                found[name] = replace(found[path], start=call.start, end=call.end)
                order[name] = (order[skipped][0], position)
        return dict(sorted(found.items(), key=lambda item: order[item[0]]))

    def as_run(self, path: str) -> str:
        """The module that has run in place of a module; itself if it has run."""
        return next((like + path.removeprefix(s) for s, like in self.skipped.items() if is_in(path, s)), path)

    def alike(self, path: str) -> list[str]:
        """A module and the skipped modules that it represents."""
        return [path, *(s + path.removeprefix(like) for s, like in self.skipped.items() if is_in(path, like))]


def run_shallow(backbone: nn.Module, example_inputs: Any = None) -> Ran:
    """Run a copy and record it.

    Raises:
        BackboneError: it does not run on any of the inputs that could be made.
    """
    twin = shared_copy(backbone)
    reasons = []
    for args, kwargs in _inputs(twin, example_inputs):
        kinds = _kinds(twin)
        given: dict[str, tuple[tuple, dict]] = {}
        skipped: dict[str, str] = {}
        handles = _pass_by(twin, kinds, given, skipped)
        devices = {p.device.index or 0 for p in twin.parameters() if p.is_cuda}
        try:
            with torch.random.fork_rng(devices), torch.inference_mode(False):
                trace = watch(twin, args, kwargs)
        except Exception as error:  # any error of an unknown model
            reasons.append((_described(args, kwargs), error))
            continue
        finally:
            for undo in handles:
                undo()
        pretrained = hasattr(twin, "pretrained_cfg") or hasattr(twin, "base_model_prefix")
        return Ran(twin, args, kwargs, trace, kinds, skipped, given, pretrained)
    raise BackboneError(_not_run(backbone, reasons))


def _not_run(backbone: nn.Module, reasons: list[tuple[str, Exception]]) -> str:
    name = type(backbone).__name__
    wanted = [
        parameter.name
        for parameter in inspect.signature(backbone.forward).parameters.values()
        if parameter.default is parameter.empty and parameter.kind in _NAMED
    ]
    tried = "; ".join(f"{what}: {_said(error)}" for what, error in reasons[-2:])
    return (
        f"{name} could not be run to see what its modules do. Its forward takes {', '.join(wanted) or 'nothing'}. "
        f"Tried: {tried or 'nothing, because no image size is known'}. Give arguments that it takes: "
        "hf_visual_peft.find_backbone(model, example_inputs={'name': tensor}) before get_peft_model."
    )


def _said(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__} {first[:160]}"


def _described(args: tuple, kwargs: Mapping[str, Any]) -> str:
    parts = [str(tuple(each.shape)) for each in args if isinstance(each, Tensor)]
    parts += [f"{name} {tuple(each.shape)}" for name, each in kwargs.items() if isinstance(each, Tensor)]
    return ", ".join(parts)


def _inputs(twin: nn.Module, example: Any) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """Arguments to try, the most likely first."""
    if example is not None:
        if isinstance(example, Mapping):
            yield (), dict(example)
        else:
            yield (tuple(example) if isinstance(example, list | tuple) else (example,)), {}
        return
    config: Any = getattr(twin, "config", None)
    if {"spatial_shapes", "pixel_attention_mask", "grid_thw"} & set(inspect.signature(twin.forward).parameters):
        yield (), _images(twin)
        return
    told: Any = getattr(twin, "default_cfg", None) or {}
    weight = next((p for p in twin.parameters() if p.is_floating_point()), None)
    made: dict[str, Any] = {} if weight is None else {"dtype": weight.dtype, "device": weight.device}
    first = next((m.in_channels for m in twin.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    channels = dict.fromkeys((first, getattr(config, "num_channels", None), *told.get("input_size", ())[:1], 3))
    sizes = list(_sizes(twin, config, told))
    name = getattr(twin, "main_input_name", None)
    names = list(inspect.signature(twin.forward).parameters)
    if name not in names:
        name = next((each for each in ("pixel_values", "pixel_values_videos", "x", "images") if each in names), None)
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    generator = torch.Generator().manual_seed(0)
    if "grid_thw" in names:  # patches of several images in one row, as language models with images have them
        yield (), {names[0]: _patches(twin, made), "grid_thw": torch.tensor([[1, 8, 8]], device=made.get("device"))}
        return
    shapes: list[tuple[int, ...]] = [(1, count, *size) for count in channels if count for size in sizes]
    if isinstance(frames, int):
        shapes = [(1, frames, *shape[1:]) for shape in shapes] + shapes
    for shape in shapes:
        pixels = torch.randn(shape, generator=generator).to(**made)
        yield ((), {name: pixels}) if name and hasattr(twin, "main_input_name") else ((pixels,), {})


def _patches(twin: nn.Module, made: Mapping[str, Any]) -> Tensor:
    """Patches, one a row, as wide as the first linear or convolution reads them."""
    first = next(m for m in twin.modules() if isinstance(m, nn.Conv2d | nn.Conv3d | nn.Linear))
    width = first.weight[0].numel()
    return torch.randn(64, width, generator=torch.Generator().manual_seed(0)).to(**made)


def _sizes(twin: nn.Module, config: Any, told: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    size = getattr(config, "image_size", None) or getattr(getattr(twin, "patch_embed", None), "img_size", None)
    size = size or getattr(twin, "img_size", None) or getattr(twin, "image_size", None)
    full = size or told.get("input_size", (224,))[1:] or (224, 224)
    if isinstance(full, Mapping):
        full = (full.get("height"), full.get("width"))
    height, width = (full, full) if isinstance(full, int) else (tuple(full) * 2)[:2]
    if told and not told.get("fixed_input_size") and not size and min(height, width) > _SMALL:
        yield _SMALL, _SMALL
    yield int(height), int(width)
    yield from ((side, side) for side in (64, 32) if not isinstance(config, PretrainedConfig))


def _kinds(twin: nn.Module) -> dict[str, Any]:
    """The structure of the items of lists: classes, sizes and settings of all modules in them."""
    made = {}
    for path, module in twin.named_modules():
        if not isinstance(module, _LISTS):
            continue
        for name, part in module.named_children():
            if any(True for _ in part.children()):
                made[f"{path}.{name}" if path else name] = tuple(
                    (inside, type(each), *_settings(each)) for inside, each in part.named_modules()
                )
    return made


def _settings(module: nn.Module) -> tuple:
    plain = tuple(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, bool | int | str | tuple | type(None))
        and not name.startswith("_")
        and _hashable(value)
        and not name.endswith(("layer_idx", "layer_index"))
    )
    sizes = tuple((name, tuple(p.shape)) for name, p in module._parameters.items() if p is not None)
    return (plain, sizes)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _pass_by(twin: nn.Module, kinds: Mapping[str, Any], given: dict, skipped: dict[str, str]) -> list[Any]:
    """Make items of lists return their input, if an item of equal structure has run and kept the shape."""
    large = sum(p.numel() for p in twin.parameters()) > _MANY
    shapes: dict[Any, tuple[Any, ...]] = {}
    undo: list[Any] = []

    def note(path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given.setdefault(path, (args, kwargs))

    def run(path: str, module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        key = (path.rpartition(".")[0], kinds[path])
        first = args[0] if args else None
        known = shapes.get(key)
        if known is not None and isinstance(first, Tensor) and tuple(first.shape) == known[0]:
            skipped[path] = known[2]
            return first if known[1] is None else (first, *known[1])
        output = forward(*args, **kwargs)
        result = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and isinstance(result, Tensor) and result.shape == first.shape:
            shapes[key] = (tuple(first.shape), output[1:] if isinstance(output, tuple) else None, path)
        return output

    for path, module in twin.named_modules():
        if any(True for _ in module.children()):
            undo.append(module.register_forward_pre_hook(partial(note, path), with_kwargs=True).remove)
    for path in kinds if large else ():
        part: Any = twin.get_submodule(path)
        before = vars(part).get("forward")
        part.forward = partial(run, path, part, part.forward)
        undo.append(partial(_restore, part, before))
    return undo


def _restore(module: Any, before: Any) -> None:
    del module.forward
    if before is not None:
        module.forward = before
