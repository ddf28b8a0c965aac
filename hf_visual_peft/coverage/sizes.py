"""Settings of methods that fit tiny models of 8 to 32 channels.

Most methods need no entry here, because their fields have the same names as those of others. A field with a new name
gives its own value: `field(default=30, metadata={"help": "...", "tiny": 4})`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..core.registry import Method
from ..peft_methods.methods import PeftMethod


# for every field with such a name, and for fields that the setting names; `r` is half of the channels
SMALL = {"n": 4, "channels": 6, "rule_std": 0.01}
SMALL_WHERE_NAMED = {"groups": 2, "num_virtual_tokens": 2}
# the same for methods of peft
SMALL_OF_PEFT: dict[str, dict[str, Any]] = {
    "adamss": {"r": 2, "num_subspaces": 2},
    "boft": {"boft_block_size": 2},
    "c3a": {"block_size": 2},
    "frod": {"progressbar": False},
    "fourierft": {"n_frequency": 8},
    "gralora": {"r": 2, "gralora_k": 2},
    "miss": {"r": 2},
    "oft": {"oft_block_size": 2},
    "psoft": {"r": 2},
    "road": {"group_size": 2},
    "shira": {"r": 2},
    "supertuning": {"sparsity": 0.5},
    "tinylora": {"init_weights": True},  # its random start is too large for random models
    "osf": {"init_weights": True},  # the same: a product of three random matrices, in which rounding matters
    "vblora": {"r": 2, "num_vectors": 8, "vector_length": 2},
    "waveft": {"n_frequency": 8},
}
# names of their fields for a random start
INITIAL_WEIGHTS = ("init_weights", "init_lora_weights", "init_ia3_weights")


def small_fields(config_cls: type, setting: Mapping[str, Any], width: int = 8) -> dict[str, Any]:
    """A setting of a method's config, shrunk for tiny models.

    Args:
        config_cls: the config.
        setting: values of some of its fields.
        width: channels of the model, where it is the least.
    """
    fields = {field.name: field for field in dataclasses.fields(config_cls)}
    small = dict(setting)
    small |= {name: value for name, value in (SMALL | {"r": width // 2}).items() if name in fields}
    small |= {name: value for name, value in SMALL_WHERE_NAMED.items() if name in small}
    return small | tiny_fields(config_cls)


def tiny_fields(config_cls: type) -> dict[str, Any]:
    """The fields of a method's config that say which value fits tiny models, with these values.

    Args:
        config_cls: the config.
    """
    return {field.name: field.metadata["tiny"] for field in dataclasses.fields(config_cls) if "tiny" in field.metadata}


def small_config_for(method: Method | PeftMethod, model: nn.Module, **given: Any) -> Any:
    """The small config of any method.

    Args:
        method: of this library or of peft.
        model: that it is for.
        given: fields with given values.
    """
    if isinstance(method, PeftMethod):
        return small_config_of_peft(method, model, **given)
    return small_config(method, **given)


def small_config(method: Method, **given: Any) -> Any:
    """The method's usual setting, shrunk for tiny models, with random values in every weight of the adapter."""
    small = small_fields(method.config_cls, method.counts[0][0])
    return method.config_cls(**(small | {"init_weights": False} | given))


def small_config_of_peft(method: PeftMethod, model: nn.Module, **given: Any) -> Any:
    """The same for a method of peft; if its config has no field for a random start, with its own initial values."""
    names = {field.name for field in dataclasses.fields(method.config_cls)}
    random = {name: False for name in INITIAL_WEIGHTS if name in names}
    return method.config(model, **(random | SMALL_OF_PEFT.get(method.name, {}) | given))
