"""Settings of methods that fit tiny models of 8 to 32 channels.

Most methods need nothing here: their fields have names that others have. A field of another name says beside itself
what fits: `field(default=30, metadata={"help": "...", "tiny": 4})`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..core.registry import Method
from ..peft_methods.methods import PeftMethod


# for every field of such a name, and for those that the setting names
SMALL = {"r": 4, "n": 4, "channels": 6, "rule_std": 0.01}
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
    "osf": {"init_weights": True},  # likewise: a product of three random matrices, where rounding shows
    "vblora": {"r": 2, "num_vectors": 8, "vector_length": 2},
    "waveft": {"n_frequency": 8},
}
# what their fields for a random start are called
INITIAL_WEIGHTS = ("init_weights", "init_lora_weights", "init_ia3_weights")


def small_fields(config_cls: type, setting: Mapping[str, Any]) -> dict[str, Any]:
    """A setting of a method's config, shrunk to tiny models.

    Args:
        config_cls: the config.
        setting: values of some of its fields.
    """
    fields = {field.name: field for field in dataclasses.fields(config_cls)}
    small = dict(setting)
    small |= {name: value for name, value in SMALL.items() if name in fields}
    small |= {name: value for name, value in SMALL_WHERE_NAMED.items() if name in small}
    return small | {name: field.metadata["tiny"] for name, field in fields.items() if "tiny" in field.metadata}


def small_config_for(method: Method | PeftMethod, model: nn.Module, **given: Any) -> Any:
    """The small config of any method.

    Args:
        method: of this library or of peft.
        model: that it is for.
        given: fields that have these values.
    """
    if isinstance(method, PeftMethod):
        return small_config_of_peft(method, model, **given)
    return small_config(method, **given)


def small_config(method: Method, **given: Any) -> Any:
    """The method's usual setting, shrunk to tiny models, with random numbers in every weight of the adapter."""
    small = small_fields(method.config_cls, method.counts[0][0])
    return method.config_cls(**(small | {"init_weights": False} | given))


def small_config_of_peft(method: PeftMethod, model: nn.Module, **given: Any) -> Any:
    """The same for a method of peft; where its config has no field for random numbers, with those it starts with."""
    names = {field.name for field in dataclasses.fields(method.config_cls)}
    random = {name: False for name in INITIAL_WEIGHTS if name in names}
    return method.config(model, **(random | SMALL_OF_PEFT.get(method.name, {}) | given))
