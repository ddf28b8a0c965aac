"""Make configs of transformers small, so that a model of them costs little to build and to run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import AutoConfig, AutoModel, PreTrainedConfig


LAYERS, WORDS = 2, 1024
_WIDTH = 32  # below that, a field that looks like a width is another number
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_CALLED_OFF = ("pruned_heads", "task_specific_params", "label2id", "id2label", "quantization_config")
_DEPTHS = re.compile(r"(layers|^depth|_depth)$")
_INDICES = re.compile(r"layers?(_(ids|indexes|indices))?$")  # of layers
_HEADS = re.compile(r"(^|_)(num_heads|n_heads?|heads)$")
_WIDTHS = re.compile(r"(size|sizes|dim|dims|width|widths|channels|d_model|planes)$")
# sizes of something else, and of heads, whose number is divided instead
_NO_WIDTHS = re.compile(
    r"(patch|image|img|window|kernel|pool|vocab|grid|num_channels|in_channels|head_dim|rope|batch)"
)


def shrunken(
    config_class: type[PreTrainedConfig],
    side: int | None = None,
    divisor: int = 1,
    layers: int | None = LAYERS,
    complete: bool = False,
) -> PreTrainedConfig:
    """The default config with few layers per stack and a small vocabulary, in all its parts.

    Args:
        config_class: its class.
        side: of the images; by default as the config says.
        divisor: by which widths and numbers of heads are divided.
        layers: per stack; None for as many as the config says.
        complete: whether to give fields without a value one of their kind: some defaults alone build no model.
    """
    config = config_class(**_smaller(config_class(), side, divisor, layers))
    return config_class(**_complete(config)) if complete else config


def _complete(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a config, without its class and version, and with values where there were none."""
    fields: dict[str, Any] = {}
    parameters = inspect.signature(type(config)).parameters
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = {"model_type": value.model_type, **_complete(value)}
        elif name in parameters:
            value = list(value) if isinstance(value, tuple) else value  # as in a file
            value = _value_for(config, name, str(parameters[name].annotation)) if value is None else value
            fields |= {} if value is None else {name: value}
    kinds = getattr(config, "layer_types", None)
    rope = fields.get("rope_parameters")
    if kinds and isinstance(rope, dict) and set(kinds).isdisjoint(rope):
        fields["rope_parameters"] = {kind: dict(_ROPE) for kind in kinds}
    return fields


def _value_for(config: PreTrainedConfig, name: str, kind: str) -> Any:
    """A value for a field of a kind, by its annotation and name; None for names that are no numbers of parts."""
    if name == "rope_parameters" or (name in _CALLED_OFF):
        return dict(_ROPE) if name == "rope_parameters" else None
    if "dict" in kind:
        return {}
    if "list" in kind:
        return []
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if name == "head_dim" and heads and width:
        return width // heads
    if "int" in kind and re.search(r"^num_|^top_k|experts", name):
        return LAYERS
    return _WIDTH if "int" in kind and _WIDTHS.search(name) and not _NO_WIDTHS.search(name) else None


def _smaller(config: PreTrainedConfig, side: int | None, divisor: int, layers: int | None) -> dict[str, Any]:
    """The fields that differ, to build the config again so that dependent fields follow."""
    fields: dict[str, Any] = {}
    depths = {
        value
        for name, value in vars(config).items()
        if isinstance(value, int) and _DEPTHS.search(name) and layers is not None and value > layers
    }
    for name, value in _with_parts(config).items():
        if isinstance(value, PreTrainedConfig):
            part = _told(value) | _smaller(value, side, divisor, layers)
            if part or getattr(config, name, None) is None:
                fields[name] = {"model_type": value.model_type, **part}
        elif isinstance(value, int) and _DEPTHS.search(name):
            fields |= {name: layers} if value in depths else {}
        elif name == "image_size" and side:
            fields[name] = side if isinstance(value, int) else [side] * len(value)
        elif name == "vocab_size" and isinstance(value, int) and value > WORDS:
            fields[name] = WORDS
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= WORDS:
            fields[name] = value % WORDS
        elif layers is not None and _INDICES.search(name) and _integers(value) and max(value) >= layers:
            fields[name] = type(value)(each % layers for each in value)
        else:
            short = value
            if isinstance(value, list | tuple) and len(value) in depths and _default(config, name) is not None:
                short = value[:layers]
            short = _narrow(name, short, divisor) if divisor > 1 else short
            fields |= {name: short} if short != value else {}
    return fields


def _with_parts(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a config, with the default of each part that it leaves out, such as a picture encoder."""
    fields = dict(vars(config))
    for name, spec in (getattr(type(config), "sub_configs_defaults", None) or {}).items():
        if fields.get(name) is None:
            cls, kind = spec.config_class, spec.model_type
            part = AutoConfig.for_model(kind) if cls is AutoConfig else cls()
            fields |= {name: part} if _reads_pictures(part) else {}
    return fields


def _reads_pictures(part: PreTrainedConfig) -> bool:
    """Whether the model of a config takes pictures. Other parts are left out: they cost, and may build nothing."""
    if type(part) not in AutoModel._model_mapping:
        return False
    model = AutoModel._model_mapping[type(part)]
    models = model if isinstance(model, tuple) else (model,)
    return any(name.startswith("pixel_values") for m in models for name in inspect.signature(m.forward).parameters)


def _told(part: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a part in which it differs from its class's default: those that the config around it has set."""
    usual = vars(type(part)())
    return {
        name: value
        for name, value in vars(part).items()
        if isinstance(value, bool | int | float | str | type(None)) and not name.startswith("_")
        if name in usual and name in _names(part) and usual[name] != value
    }


def _names(config: PreTrainedConfig) -> Collection[str]:
    return inspect.signature(type(config)).parameters


def _default(config: PreTrainedConfig, name: str) -> Any:
    """The value that a field has if it is not given, before others are derived from it."""
    parameter = inspect.signature(type(config)).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def _integers(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(type(each) is int for each in value)


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
