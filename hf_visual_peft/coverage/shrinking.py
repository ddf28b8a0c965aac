"""Make configs of transformers small, so that a model of them costs little to build and to run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig


LAYERS, WORDS = 2, 1024
_WIDTH = 32  # below that, a field that looks like a width is another number
_DEPTHS = re.compile(r"(layers|^depth|_depth)$")
_HEADS = re.compile(r"(^|_)(num_heads|n_heads?|heads)$")
_WIDTHS = re.compile(r"(size|sizes|dim|dims|width|widths|channels|d_model|planes)$")
# sizes of something else, and of heads, whose number is divided instead
_NO_WIDTHS = re.compile(
    r"(patch|image|img|window|kernel|pool|vocab|grid|num_channels|in_channels|head_dim|rope|batch)"
)


def shrunken(
    config_class: type[PreTrainedConfig], side: int | None = None, divisor: int = 1, layers: int | None = LAYERS
) -> PreTrainedConfig:
    """The default config with few layers per stack and a small vocabulary, in all its parts.

    Args:
        config_class: its class.
        side: of the images; by default as the config says.
        divisor: by which widths and numbers of heads are divided.
        layers: per stack; None for as many as the config says.
    """
    return config_class(**_smaller(config_class(), side, divisor, layers))


def _smaller(config: PreTrainedConfig, side: int | None, divisor: int, layers: int | None) -> dict[str, Any]:
    """The fields that differ, to build the config again so that dependent fields follow."""
    fields: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            part = _smaller(value, side, divisor, layers)
            if part:
                fields[name] = {"model_type": value.model_type, **part}
        elif isinstance(value, int) and _DEPTHS.search(name):
            fields |= {name: layers} if layers is not None and value > layers else {}
        elif name == "image_size" and side:
            fields[name] = side if isinstance(value, int) else [side] * len(value)
        elif name == "vocab_size" and isinstance(value, int) and value > WORDS:
            fields[name] = WORDS
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= WORDS:
            fields[name] = value % WORDS
        elif divisor > 1 and (narrow := _narrow(name, value, divisor)) != value:
            fields[name] = narrow
    return fields


def _narrow(name: str, value: Any, divisor: int) -> Any:
    """A width or number of heads, or all of several, divided; the same value if it is none or cannot be divided."""
    if isinstance(value, Mapping):
        return {key: _narrow(str(key), each, divisor) for key, each in value.items()}
    several = isinstance(value, Sequence) and bool(value) and all(type(each) is int for each in value)
    numbers = tuple(value) if several else (value,)
    if not all(type(each) is int for each in numbers):
        return value
    if _HEADS.search(name):
        narrow = [max(1, each // divisor) if each % divisor == 0 or "key_value" in name else each for each in numbers]
    elif not _WIDTHS.search(name) or _NO_WIDTHS.search(name) or any(n < _WIDTH or n % divisor for n in numbers):
        return value
    else:
        narrow = [each // divisor for each in numbers]
    return type(value)(narrow) if several else narrow[0]
