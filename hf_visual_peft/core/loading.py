"""Maps the weights of a file to the model that they are loaded into, or explains why they do not fit."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import Tensor, nn

from ..backbones.key_renames import PEFT_PREFIX
from .copies import TrainedCopy


if TYPE_CHECKING:
    from .config import VisualPeftConfig


_PEFT_WARNS = "Found missing adapter keys while loading the checkpoint: "


def load_complete(model: nn.Module, where: str | Path, **kwargs: Any) -> PeftModel:
    """`PeftModel.from_pretrained`, which refuses files that lack weights of the adapter.

    For its own methods peft only warns, and the adapter does less than it was trained for, or nothing.

    Args:
        model: the base.
        where: folder or Hub id of the adapter.
        **kwargs: of `PeftModel.from_pretrained`.

    Raises:
        ValueError: weights are missing.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{_PEFT_WARNS}", category=UserWarning)
        try:
            return PeftModel.from_pretrained(model, where, **kwargs)
        except UserWarning as warning:
            lacking = re.findall(r"'([^']+)'", str(warning).partition(_PEFT_WARNS)[2])
        except KeyError as error:  # as peft fails where the head that was trained with the adapter is missing
            lacking = [str(error.args[0])]
            if not lacking[0].startswith(PEFT_PREFIX):
                raise
    more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    raise ValueError(
        f"{where}: the file of the adapter lacks {lacking[0]}{more}. It belongs to another model or was not saved "
        "completely."
    )


def across_heads(model: nn.Module, weights: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Rename weights between a bare backbone and a model with a head.

    transformers does the same for a checkpoint by the model's `base_model_prefix`: `vit.layers.0` of a classifier is
    `layers.0` of the bare backbone. An expected key stays, and so does a key that this does not map to an expected
    one.

    Args:
        model: with the adapter's layers in it.
        weights: of the adapter's file.
        expected: keys under which the adapter would be saved now.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    prefix = getattr(base, "base_model_prefix", "")
    if not prefix or all(key in expected for key in weights):
        return dict(weights)
    found = {}
    for key, value in weights.items():
        root = PEFT_PREFIX if key.startswith(PEFT_PREFIX) else ""
        name = key.removeprefix(root)
        other = root + (name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else f"{prefix}.{name}")
        found[other if key not in expected and other in expected and other not in weights else key] = value
    return found


def without_layers(weights: Mapping[str, Tensor], copied: Collection[str]) -> dict[str, Tensor]:
    """The weights of an adapter; those of copies have the names of their modules without layers around them.

    Args:
        weights: of the adapter's file.
        copied: these names.
    """
    plain = {key: key.replace(".base_layer.", ".") for key in weights}
    return {plain[key] if plain[key] in copied else key: value for key, value in weights.items()}


def copies_of(model: nn.Module, adapter_name: str) -> dict[str, dict[str, str]]:
    """For each module with a copy of an adapter: its names in a file, by its names in the model.

    A file has the names without layers around the module, as `without_layers` makes them.

    Args:
        model: with the adapter.
        adapter_name: whose copies.
    """
    found: dict[str, dict[str, str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, TrainedCopy) and adapter_name in module.modules_to_save:
            keys = module.modules_to_save[adapter_name].state_dict()
            plain = path.replace(".base_layer", "")
            found[plain] = {f"{path}.modules_to_save.{adapter_name}.{key}": f"{plain}.{key}" for key in keys}
    return found


def with_copies(
    model: nn.Module, config: VisualPeftConfig, adapter_name: str, weights: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the weights of copies to their names in the model.

    An adapter that was trained without a task head keeps the head of the model.

    Args:
        model: with the adapter.
        config: of the adapter.
        adapter_name: its name.
        weights: of its file.

    Returns:
        The weights, and the errors of those of copies.
    """
    weights, present = dict(weights), model.state_dict()
    wrong = []
    for path, keys in copies_of(model, adapter_name).items():
        missing = [key for key in keys.values() if key not in weights]
        name = path.removeprefix(PEFT_PREFIX)
        if missing and len(missing) == len(keys) and name in config.heads_added:
            weights |= {key: value for key, value in present.items() if key in keys}
            warnings.warn(
                f"The adapter was trained without this task head. {name!r} keeps the weights that it has in the base "
                "model, in a copy that belongs to the adapter. Train it, or take a base model whose head is trained.",
                stacklevel=2,
            )
            continue
        wrong += [f"{key} is missing" for key in missing]
        for key, saved in keys.items():
            if saved in weights and weights[saved].shape != present[key].shape:
                shapes = f"{tuple(weights[saved].shape)} in the file and {tuple(present[key].shape)}"
                wrong.append(f"{saved} has shape {shapes} in the model")
        weights |= {key: weights.pop(saved) for key, saved in keys.items() if saved in weights}
    return weights, wrong
