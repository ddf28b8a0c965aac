"""Hashes of everything that features depend on, so that a cache of other features is never read."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from xxhash import xxh3_128

from ..backbones.backbone import own_children
from ..sites import VisualTunerLayer
from .calls import base_path
from .replay import Border


# entries of a model's config that change nothing before its head, or name its origin
_NAMES = (
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "_name_or_path",
    "name_or_path",
    "architectures",
    "transformers_version",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
)
# attributes of modules that change nothing before the head, or that differ between runs of the same model
_ATTRIBUTES = {
    *vars(nn.Module()),
    *_NAMES,
    "config",
    "num_classes",
    "forward",  # adapters and accelerate replace it
    "_old_forward",
    "train",
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "grad_checkpointing",
    "loss_type",
    "loss_function",
    "peft_config",
    "pretrained_cfg",
    "default_cfg",
    "pretrained_model_args",
    "_model_args",
    "_is_hf_initialized",
    "_hf_peft_config_loaded",
    "hf_device_map",
}
_PACKAGES = ("torch", "transformers", "timm", "torchvision", "Pillow")


def digest(value: Any) -> str:
    """The hash of plain values, arrays, and objects with a `to_dict`.

    Raises:
        TypeError: a value has no text that is the same in every process.
    """
    return xxh3_128(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.hasobject:  # its bytes are addresses
        return [value.shape, value.tolist()]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.shape, xxh3_128(value.tobytes()).hexdigest()]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path | torch.dtype):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "to_dict"):
        return [type(value).__name__, value.to_dict()]
    raise TypeError(f"key: {value!r} ({type(value).__name__}) is not a number, string, list, mapping or array.")


def digest_tensors(tensors: Iterator[tuple[str, Tensor]]) -> str:
    """The hash of names, shapes, dtypes and values of tensors."""
    total = xxh3_128()
    for name, tensor in tensors:
        for inner, plain in _plain_tensors(name, tensor):
            total.update(inner.encode())
            total.update(bytes_of(plain))
    return total.hexdigest()


def _plain_tensors(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """A tensor with its name and dtype; for one that consists of several, such as a quantised weight, each of them."""
    told = f"{name} {tuple(tensor.shape)} {tensor.dtype}"
    if not hasattr(tensor, "__tensor_flatten__"):
        yield told, tensor
        return
    names, context = tensor.__tensor_flatten__()
    for inner in names:
        yield from _plain_tensors(f"{told} {context!r} {inner}", getattr(tensor, inner))


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    numbers: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(numbers)


def describe(
    model: nn.Module,
    border: Border,
    *,
    key: Any,
    dtype: torch.dtype,
    views: int,
    arguments: Mapping[str, Any],
    device: torch.device,
) -> dict[str, str]:
    """Everything that features depend on, by kind.

    Args:
        model: that the border belongs to.
        border: says which modules compute the features.
        key: identifies the images and their transform.
        dtype: of the features in the cache.
        views: of each image.
        arguments: extra arguments of the model.
        device: of the model.

    Raises:
        TypeError: the key or an argument cannot be hashed.
    """
    parts = list(_parts(model, border))
    autocast = torch.is_autocast_enabled(device.type)
    return {
        "weights": digest_tensors(_frozen_tensors(parts)),
        "model": digest(
            {
                "modules": [[point.path, type(point.module).__name__] for point in border.cuts],
                "state": list(_state(parts)),
                "autocast": str(torch.get_autocast_dtype(device.type)) if autocast else None,
                "arguments": dict(arguments),
            }
        ),
        "features": json.dumps(border.shapes),
        "images": digest(key),
        "views": str(views),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": ", ".join(f"{name} {version}" for name, version in _versions()),
    }


def _parts(model: nn.Module, border: Border) -> Iterator[tuple[str, nn.Module, bool]]:
    """The modules that can affect the features, with their paths, and whether they are skipped.

    These are the cuts and their modules, the modules around them, and modules that are never called, whose weights may
    be used directly. Modules called outside the cuts, such as heads and side networks, are left out, and so are the
    layers of this library and peft around the cuts, so that runs with other adapters there share features.
    """
    cuts = {point.module for point in border.cuts}

    def walk(path: str, module: nn.Module, skipped: bool) -> Iterator[tuple[str, nn.Module, bool]]:
        skipped = skipped or module in cuts
        around = not skipped and any(part in cuts for part in module.modules())
        if module in border.live and not around:
            return
        adapter = around and isinstance(module, PeftModel | BaseTuner | VisualTunerLayer)
        if not adapter:
            yield path, module, skipped
        for name, child in own_children(module):
            if not adapter or name == "base_layer" or not isinstance(module, VisualTunerLayer):
                yield from walk(f"{path}.{name}" if path else name, child, skipped)

    return walk("", model, False)


def _frozen_tensors(parts: Iterable[tuple[str, nn.Module, bool]]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the parts; for parts that are not skipped, only those that do not train."""
    for path, module, skipped in parts:
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if skipped or not tensor.requires_grad:
                yield base_path(f"{path}.{name}" if path else name), tensor


def _state(parts: Iterable[tuple[str, nn.Module, bool]]) -> Iterator[list[Any]]:
    """Everything but tensors that determines what the parts compute: path, type, plain attributes and config."""
    seen: set[int] = set()  # configs, which the modules of a model share
    for path, module, _ in parts:
        attributes = _told_of(vars(module), _ATTRIBUTES)
        config = vars(module).get("config")
        content: dict[str, Any] = {}
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            content = _told_of(_content(config), _NAMES)
        yield [base_path(f"{path}.").strip("."), _told(type(module)), attributes, content]


def _content(config: Any) -> Mapping[str, Any]:
    if hasattr(config, "to_dict"):
        return config.to_dict()
    return config if isinstance(config, Mapping) else getattr(config, "__dict__", {})


def _told_of(values: Mapping[str, Any], without: Iterable[str]) -> dict[str, Any]:
    told = {str(name): _told(value) for name, value in values.items() if name not in without}
    return {name: value for name, value in told.items() if value is not None}


def _told(value: Any) -> Any:
    """Plain values, collections of them and names of functions, for JSON; None for other objects."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Mapping):
        return sorted(([_told(name), _told(inner)] for name, inner in value.items()), key=str)
    if isinstance(value, list | tuple):
        return [_told(inner) for inner in value]
    if isinstance(value, partial):
        return [_told(value.func), _told(value.args), _told(value.keywords)]
    name = getattr(value, "__qualname__", None)  # of functions and classes
    return f"{value.__module__}.{name}" if isinstance(name, str) else None


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def key_of(data: Any) -> Any:
    """Identify the images of a data set and their transform.

    Args:
        data: a `datasets.Dataset`. Its fingerprint covers its rows and its transform, but a function from an imported
            module that `with_transform` got only by name, not by its code. For files that the rows name but do not
            contain, size and modification time are added.

    Raises:
        ValueError: the data set has no fingerprint.
    """
    if type(data).__module__ != "datasets.arrow_dataset":  # subclasses and wrappers may change the samples
        raise ValueError(
            f"key: a {type(data).__name__} does not say which images and which transform it has. Give key= with what "
            "identifies them: names or hashes of files, the processor, the settings of the transform."
        )
    columns = [data.data.column(name) for name in data.data.column_names]
    files = {path for column in columns for chunk in column.chunks for path in _files_in(chunk)}
    return [data._fingerprint, [_stamp(path) for path in sorted(files)]]


def _files_in(array: Any) -> list[str]:
    """The paths in an Arrow array of images, or of lists of them, whose bytes it does not hold."""
    if hasattr(array.type, "value_type") and hasattr(array, "flatten"):
        return _files_in(array.flatten())
    fields = {array.type.field(index).name for index in range(array.type.num_fields)}
    if not {"bytes", "path"} <= fields:
        return []
    return array.field("path").filter(array.field("bytes").is_null()).drop_null().to_pylist()


def _stamp(path: str) -> list[Any]:
    try:
        stat = os.stat(path)
    except OSError:  # a URL, or missing: reading it will show
        return [path]
    return [path, stat.st_size, stat.st_mtime_ns]
