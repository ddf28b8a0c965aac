"""The families of models that timm and transformers contain, and models of them that are small enough to run.

No family is listed here by name. A family is a module file of timm, or a folder of transformers with a model that
takes images. Weights are random; transformers' configs have their defaults, with fewer layers, a smaller vocabulary
and, if the model then still runs, smaller widths and images.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..backbones.backbone import BackboneError, NotRunError, SeveralError
from ..backbones.examples import images_of, named_for, of_samples
from ..backbones.finding import find_backbone
from .cell import tensors_of
from .shrinking import LAYERS, shrunken
from .tiny import TinyModel, images


Library = Literal["timm", "transformers"]
LIBRARIES: tuple[Library, ...] = ("timm", "transformers")

LARGEST = 150_000_000  # parameters of a model that is run; a larger one is adapted on the meta device only
_LARGE = 5_000_000  # parameters of one that is run with few blocks, where it can be
_SIDES = (64, 96, 128)  # image sizes to try before the size that a model is made for
_SIDE, _WIDE, _DIVISOR = 96, 384, 4
# the class that represents a family: the first that matches one of these, the whole model before its parts
_TASKS = ("For(Image|Video)Classification$", "For(?!PreTraining)", "Model$", "")


class NotRunnableError(Exception):
    """The model does not run on images alone, with or without an adapter."""


@dataclass(frozen=True)
class FamilyModel(TinyModel):
    """A model of a family, of a size that can be run."""

    def model(self) -> nn.Module:
        """The model in eval mode with the same random weights every time.

        Weights are moved away from their initial values as in a tiny model, by less the more of them are summed, so
        that a deep network without norms stays finite.
        """
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model = self.build()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                summed = parameter[0].numel() if parameter.ndim > 1 and len(parameter) else 1
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype), alpha=0.1 / math.sqrt(summed))
            self._measure(model)
        return model.eval()


@dataclass(frozen=True)
class _OfTransformers(FamilyModel):
    """The same of transformers, called as it takes pictures.

    Attributes:
        features: whether to call `get_image_features`, for models that otherwise need text.
        several: whether it takes several images a sample.
    """

    features: bool = False
    several: bool = False

    def call(self, model: nn.Module, arguments: Any) -> Any:
        """The model's output for images."""
        arguments = (of_samples(arguments) or arguments) if self.several else arguments
        function: Any = model.get_image_features if self.features else model
        return function(**named_for(function if self.features else model.forward, arguments))


def timm_families() -> dict[str, list[str]]:
    """Names of timm's models by their module file.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    timm = importlib.import_module("timm")
    return {module: timm.list_models(module=module) for module in timm.list_modules()}


def transformers_families(only: Collection[str] | None = None) -> dict[str, list[str]]:
    """Names of transformers' models that take images, by their folder; the one that represents it comes first.

    Args:
        only: folders to look into; all by default.
    """
    root = importlib.import_module("transformers.models")
    families: dict[str, list[str]] = {}
    for file in sorted(Path(next(iter(root.__path__))).glob("*/modeling_*.py")):
        wanted = only is None or file.parent.name in only
        if not wanted or "pixel_values" not in file.read_text(encoding="utf-8"):
            continue
        try:
            module = importlib.import_module(f"{root.__name__}.{file.parent.name}.{file.stem}")
        except ImportError:  # this family needs a package that is not installed
            continue
        families.setdefault(file.parent.name, []).extend(_with_pictures(module))
    return {name: sorted(classes, key=_rank) for name, classes in families.items() if classes}


def _with_pictures(module: types.ModuleType) -> Iterator[str]:
    for name in getattr(module, "__all__", ()):
        cls = getattr(module, name)
        is_model = inspect.isclass(cls) and issubclass(cls, PreTrainedModel) and not name.endswith("PreTrainedModel")
        if is_model and any("pixel_values" in each for each in inspect.signature(cls.forward).parameters):
            yield f"{module.__name__}.{name}"


def _rank(path: str) -> tuple[bool, int, str]:
    module, _, name = path.rpartition(".")
    main = str(getattr(importlib.import_module(module), name).main_input_name)
    task = next(index for index, pattern in enumerate(_TASKS) if re.search(pattern, name))
    return ("pixel_values" not in main and task > 1, task, name)


def parameters_of(library: Library, name: str) -> int:
    """Number of a model's parameters, counted on the meta device."""
    return count(on_meta(library, name))


def count(model: nn.Module) -> int:
    """Number of a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(library: Library, name: str) -> nn.Module:
    """A model without weights: of timm unchanged, of transformers the smallest in which a backbone is found.

    If none is found in any, it is the last that could be built. The default config itself is only the last resort.
    """
    ways = builders(library, name)
    model = None
    for model in _built(ways if library == "timm" else ways[:-1], ways[-1:]):
        if library == "timm":
            break
        try:
            backbones_of(model)
        except Exception as error:
            if isinstance(error, BackboneError) and not isinstance(error, NotRunError):
                break  # the same in a model of any size
            continue  # sizes of this config may not fit together
        break
    assert model is not None
    return model


def builders(library: Library, name: str) -> list[Callable[[], nn.Module]]:
    """Ways to build a model with random weights, the smallest first."""
    if library == "timm":
        return [lambda: _of_timm(name)]
    module, _, cls_name = name.rpartition(".")
    cls = getattr(importlib.import_module(module), cls_name)
    config = cls.config_class
    return [
        lambda: cls(shrunken(config, _SIDE, _DIVISOR)),
        lambda: cls(shrunken(config, None, _DIVISOR)),
        lambda: cls(shrunken(config, _WIDE, _DIVISOR)),
        lambda: cls(shrunken(config, _SIDE, _DIVISOR, None)),
        lambda: cls(shrunken(config, _SIDE)),
        lambda: cls(shrunken(config)),
        lambda: cls(shrunken(config, _SIDE, _DIVISOR, complete=True)),
        lambda: cls(shrunken(config, complete=True)),
        lambda: cls(config()),
    ]


def backbones_of(model: nn.Module) -> tuple[str | None, ...]:
    """None for the only backbone of a model, or the paths of several, each of which can be chosen.

    Raises:
        BackboneError: none is found, or one of several is not.
    """
    try:
        find_backbone(model)
    except SeveralError as error:
        for path in error.paths:
            find_backbone(model, path)
        return error.paths
    return (None,)


def _of_timm(name: str, **fields: Any) -> nn.Module:
    return importlib.import_module("timm").create_model(name, pretrained=False, num_classes=3, **fields)


def _built(
    ways: Iterable[Callable[[], nn.Module]], otherwise: Iterable[Callable[[], nn.Module]] = ()
) -> Iterator[nn.Module]:
    """The models that can be built, on the meta device.

    Args:
        ways: to build them.
        otherwise: other ways, if none of these can be built.

    Raises:
        NotRunnableError: none can be built.
    """
    reason = "there is no way to build it"
    none = True
    for build in ways:
        try:
            with torch.device("meta"):
                model = build()
        except Exception as error:  # any: default configs of a library may be incomplete
            reason = f"{type(error).__name__}: {error}"
            continue
        none = False
        yield model
    if none and otherwise:
        yield from _built(otherwise)
    elif none:
        raise NotRunnableError(f"its default config builds no model ({' '.join(reason.split())[:200]})")


def runnable(library: Library, name: str) -> FamilyModel:
    """A model of a size that can be run, with images for it.

    Raises:
        NotRunnableError: the model is too large, or does not run on images alone; the message says which.
    """
    ways = list(_timm_ways(name)) if library == "timm" else list(_transformers_ways(name))
    reason = ""
    for tiny in ways:
        try:
            with torch.device("meta"):
                size = count(tiny.build())
            if size > LARGEST:
                reason = reason or f"{size / 1e6:,.0f} M parameters"
                continue
            with torch.no_grad():  # not with initial weights: those of heads may be zeros
                found = tensors_of(tiny.call(tiny.model(), tiny.arguments(2)))
        except Exception as error:  # any: this model does not take this size or call
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            continue
        if found and all(tensor.isfinite().all() for tensor in found) and any(map(_differs, found)):
            return tiny
        reason = "its output does not depend on the picture, or is not finite"
    raise NotRunnableError(reason)


def _differs(output: Tensor) -> bool:
    return bool(output.ndim and not torch.equal(output[0], output[-1]))


def _timm_ways(name: str) -> Iterator[FamilyModel]:
    """With small images and, for a large model, few blocks, if the model takes these; else as it is defined."""
    channels, *made_for = importlib.import_module("timm").get_pretrained_cfg(name).input_size
    fewer = ({"depth": LAYERS}, {}) if parameters_of("timm", name) > _LARGE else ({},)
    for shrunk, side, resized in (*product(fewer, _SIDES, (False, True)), ({}, 0, False)):
        fields = {**shrunk, "img_size": side} if resized else shrunk
        yield FamilyModel(
            name,
            "timm",
            lambda fields=fields: _of_timm(name, **fields),  # type: ignore[misc]
            size=(side, side) if side else tuple(made_for),
            inputs=lambda batch, size: images(batch, size, channels),
            positional=True,
        )


def _transformers_ways(name: str) -> Iterator[FamilyModel]:
    """Shrunk or not, called with images or by `get_image_features`."""
    for build in builders("transformers", name):
        try:
            with torch.device("meta"):
                model = build()
            (chosen, *_) = backbones_of(model)
            tower = model.get_submodule(find_backbone(model, chosen).path)
            examples = list(images_of(tower, "cpu"))
        except Exception:  # any: this way does not work, the next may
            continue
        ways = [(False, False)] + [
            (True, several) for several in (False, True) if hasattr(model, "get_image_features")
        ]
        for example, (features, several) in product(examples, ways):
            yield _OfTransformers(
                name,
                "dense",
                build,
                inputs=lambda batch, size, example=example: _more(example, batch),  # type: ignore[misc]
                features=features,
                several=several,
            )


def _more(example: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
    """That many random images, the same every time; those of packed patches follow each other."""
    generator = torch.Generator().manual_seed(batch)
    return {
        key: torch.randn(batch * len(value), *value.shape[1:], generator=generator)
        if value.is_floating_point()
        else value.repeat(batch, *(1 for _ in value.shape[1:]))
        for key, value in example.items()
    }
