"""Backbones without a role table: the search for their module, and a cache of what was found."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from .backbone import BackboneError, SeveralError
from .choosing import Choice, takes_images, tower_in, unknown, vision_parts
from .paths import is_in
from .reading import Found, read_backbone


_COMPILED = ("compiled", "compile it after get_peft_model")
_SHARDED = ("sharded", "shard it after get_peft_model")
_WRAPPERS = {  # by name, because importing them is slow
    "OptimizedModule": _COMPILED,
    "DataParallel": ("wrapped in DataParallel", "wrap it after get_peft_model"),
    "DistributedDataParallel": ("wrapped in DistributedDataParallel", "wrap it after get_peft_model"),
    "FullyShardedDataParallel": _SHARDED,
}
_found: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Found]] = weakref.WeakKeyDictionary()


def find_unlisted(model: nn.Module, named: str | None = None, example_inputs: Any = None) -> Choice:
    """The backbone of a model without a role table, with the table that was derived from a run.

    Args:
        model: a backbone, or a model that holds one.
        named: path of the backbone in the model; by default it is searched for.
        example_inputs: arguments of the backbone's forward, if none can be made: a tensor, tuple or mapping.

    Raises:
        BackboneError: it cannot be run, or the observations do not fit together; the message gives details.
    """
    path = backbone_path(model) if named is None else named
    backbone = model.get_submodule(path)
    return path, backbone, look_at(model, path, example_inputs).table


def look_at(model: nn.Module, path: str, example_inputs: Any = None) -> Found:
    """The roles of a backbone, read once.

    Args:
        model: that holds it.
        path: of the backbone in the model.
        example_inputs: as in `find_unlisted`.

    Raises:
        BackboneError: as in `find_unlisted`.
    """
    backbone = model.get_submodule(path)
    require_plain(model, path)
    adapted = any(isinstance(module, BaseTunerLayer) for module in backbone.modules())
    kind = None if adapted else _kind(backbone)
    if example_inputs is None and backbone in _found:
        before, found = _found[backbone]
        if adapted or before == kind:
            return found
    try:
        found = read_backbone(backbone, example_inputs)
    except BackboneError as error:
        raise type(error)(f"{_sentence(error)} {unknown(model, path)}") from error
    _found[backbone] = (kind, found)
    return found


def carry_over(model: nn.Module, copied: nn.Module) -> None:
    """Take what was found in a model for a deep copy of it, which then does not run again.

    Args:
        model: that was looked at.
        copied: the copy.
    """
    for path, module in model.named_modules():
        if module in _found:
            _found[copied.get_submodule(path)] = _found[module]


def backbone_path(model: nn.Module) -> str:
    """The path of the module that takes the images: a model of timm, a pretrained model, or the smallest module.

    Raises:
        BackboneError: there are several candidates.
    """
    timm = [path for path, module in model.named_modules() if hasattr(module, "pretrained_cfg")]
    timm = [path for path in timm if not any(is_in(path, other) and path != other for other in timm)]
    if len(timm) > 1:
        raise SeveralError(
            f"{type(model).__name__} holds several models of timm: {', '.join(map(repr, timm))}. Choose one by its "
            f"path: backbone={timm[0]!r} in the config.",
            timm,
        )
    if timm:
        return timm[0]
    path = tower_in(model)
    part = next((each for each in vision_parts(model) if is_in(path, each)), None)
    if part is not None:
        return part
    if not path and isinstance(model, PreTrainedModel) and not takes_images(model):
        raise BackboneError(f"{type(model).__name__} has no vision backbone: none of its parts takes images alone.")
    around = [path]
    while around[-1]:
        around.append(around[-1].rpartition(".")[0])
    pretrained = [each for each in around if isinstance(model.get_submodule(each), PreTrainedModel)]
    taking = (each for each in pretrained if _takes_its_input(model.get_submodule(each)))
    chosen = next(taking, pretrained[0] if pretrained else path)
    if _takes_pixels_first(model.get_submodule(chosen)):
        return chosen
    # a model that reads words first: the part that reads the pixels, though its class is not a pretrained model's
    parts = (each for each in reversed(around) if is_in(each, chosen) and each != chosen)
    return next((each for each in parts if _takes_pixels_first(model.get_submodule(each))), chosen)


def _takes_pixels_first(module: nn.Module) -> bool:
    names = list(inspect.signature(module.forward).parameters)
    return bool(names) and names[0].startswith("pixel_values")


def _takes_its_input(model: Any) -> bool:
    """Whether a pretrained model takes pixels or what its class says, and not what another part has made of it."""
    return model.main_input_name in inspect.signature(model.forward).parameters or _takes_pixels(model)


def _takes_pixels(model: nn.Module) -> bool:
    return any(name.startswith("pixel_values") for name in inspect.signature(model.forward).parameters)


def require_plain(model: nn.Module, path: str) -> None:
    """Refuse a model that is compiled or distributed.

    A copy of it would not behave in the same way, its modules have other names than those of the plain model, and an
    adapter that was saved with these names would fit nothing else.

    Args:
        model: that holds the backbone.
        path: of the backbone in the model.

    Raises:
        BackboneError: the model, the backbone, or a module around it is compiled or distributed.
    """
    backbone = model.get_submodule(path)
    parts = path.split(".") if path else []
    around = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts))]
    for module in (model, *around, *backbone.modules()):
        for base in type(module).__mro__:
            if base.__name__ in _WRAPPERS:
                raise BackboneError(_wrapped(model, *_WRAPPERS[base.__name__]))
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise BackboneError(_wrapped(model, *_COMPILED))
    if any(hasattr(parameter, "device_mesh") for parameter in backbone.parameters()):
        raise BackboneError(_wrapped(model, *_SHARDED))


def _wrapped(model: nn.Module, state: str, way_out: str) -> str:
    return (
        f"{type(model).__name__} is {state}, and adapters are made for the modules and the names of the plain model. "
        f"Call get_peft_model on the plain model: {way_out}."
    )


def _kind(backbone: nn.Module) -> tuple[Any, ...]:
    return tuple((path, type(module)) for path, module in backbone.named_modules())


def _sentence(error: BackboneError) -> str:
    text = str(error)
    return text if text.endswith((".", "!")) else f"{text}."
