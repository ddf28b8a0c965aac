"""What features depend on, as hashes: a cache of anything else is never read."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from xxhash import xxh3_128

from .calls import base_path
from .replay import Border


# entries of a model's config that change nothing before its head, or name where it comes from
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
_PACKAGES = ("torch", "transformers", "timm", "torchvision", "Pillow")


def digest(value: Any) -> str:
    """The hash of plain values, arrays, and whatever has a `to_dict`.

    Raises:
        TypeError: something in it has no text that is the same in every process.
    """
    return xxh3_128(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
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
    raise TypeError(f"key: {value!r} ({type(value).__name__}) is no number, text, list, mapping or array.")


def digest_tensors(tensors: Iterator[tuple[str, Tensor]]) -> str:
    """The hash of names, shapes, types and numbers of tensors."""
    total = xxh3_128()
    for name, tensor in tensors:
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(bytes_of(tensor))
    return total.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as they lie in memory."""
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
    """Everything that features depend on, by what it is.

    Args:
        model: that the border belongs to.
        border: says which modules make the features.
        key: what tells the images and their transform.
        dtype: of the features in the cache.
        views: of each image.
        arguments: further ones of the model.
        device: of the model.

    Raises:
        TypeError: the key or an argument is nothing that can be hashed.
    """
    config: Any = getattr(model, "config", None)
    content = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    autocast = torch.is_autocast_enabled(device.type)
    return {
        "weights": digest_tensors(_frozen_tensors(model, border)),
        "model": digest(
            {
                "modules": [[point.path, type(point.module).__name__] for point in border.cuts],
                "config": {name: value for name, value in content.items() if name not in _NAMES},
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


def _frozen_tensors(model: nn.Module, border: Border) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of what is skipped, and those that the modules around it have of their own."""
    cuts = {id(point.module) for point in border.cuts}

    def walk(path: str, module: nn.Module, inside: bool) -> Iterator[tuple[str, Tensor]]:
        inside = inside or id(module) in cuts
        if not inside and not any(id(part) in cuts for part in module.modules()):
            return
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if not tensor.requires_grad:
                yield base_path(f"{path}.{name}"), tensor
        for name, child in module.named_children():
            yield from walk(f"{path}.{name}" if path else name, child, inside)

    return walk("", model, False)


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def key_of(data: Any) -> Any:
    """What tells the images of a data set and their transform from others.

    Args:
        data: a `datasets.Dataset`, whose fingerprint covers its rows and its transform, or a folder of images as
            torchvision reads it.

    Raises:
        ValueError: nothing tells.
    """
    fingerprint = getattr(data, "_fingerprint", None)
    if isinstance(fingerprint, str):
        return fingerprint
    samples = getattr(data, "samples", None)
    if isinstance(samples, list) and samples and isinstance(samples[0], tuple):
        stats = [(str(path), Path(path).stat(), target) for path, target in samples]
        # the text of a transform without one of its own holds an address: then the cache is made anew in each process
        return [
            [(path, stat.st_size, stat.st_mtime_ns, target) for path, stat, target in stats],
            repr(getattr(data, "transforms", None)),
        ]
    raise ValueError(
        f"key: nothing of a {type(data).__name__} tells which images and which transform it has. Give key= what does: "
        "names or hashes of files, the processor, the settings of the transform."
    )
