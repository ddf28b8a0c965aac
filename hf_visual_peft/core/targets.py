"""Explicit targets, as in peft's own methods: single modules of any model, by name instead of by role."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, ClassVar

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..backbones.backbone import linear_sizes, unwrapped
from ..backbones.probing import probe
from ..sites import Placement, VisualTunerLayer, output_channels
from .config import VisualPeftConfig
from .shared_modules import names_of_modules


LINEARS = "linears and convolutions of 1 x 1 without groups"
ANY_CHANNELS = "linears, convolutions, and layer, group and batch norms"


@dataclass
class TargetedConfig(VisualPeftConfig):
    """Base of the configs of methods whose equation can stand at a single module.

    Args:
        target_modules: names, a regular expression for full names, or `"all-linear"`, as in peft's own methods:
            modules of any model. They replace the roles; a fresh adapter is then the identity, as in peft, and
            `modules_to_save=None` means none.
        layers_pattern: with `target_modules` and `layers_to_transform`: name of the list of blocks.
    """

    target_modules: list[str] | str | None = field(  # type: ignore[misc]
        default=None, metadata={"help": 'Names, a regular expression, or "all-linear"; default: by role.'}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks, with target_modules and layers_to_transform."}
    )

    valid_targets: ClassVar[str] = LINEARS  # or ANY_CHANNELS

    def __post_init__(self) -> None:
        super().__post_init__()
        targets: Any = self.target_modules
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                self._fail("target_modules", f"a regular expression where it is a string ({error})")
            if self.layers_to_transform is not None:
                self._fail("layers_to_transform", "None where target_modules is a string")
        elif targets is not None:
            if not isinstance(targets, list | tuple | set) or not all(isinstance(name, str) for name in targets):
                self._fail("target_modules", 'None, names, a regular expression, or "all-linear"')
            self.target_modules = set(targets)  # type: ignore[assignment]
        if targets is not None:
            self._require_unset("backbone", "where target_modules names modules")
            self._require_unset("tower", "where target_modules names modules")
        if targets is not None and not targets:
            self._fail("target_modules", "None or not empty")
        if self.layers_pattern and not (targets and self.layers_to_transform):
            self._fail("layers_pattern", "None where target_modules or layers_to_transform is None")

    def placement_at(self, path: str, module: nn.Module) -> Placement:
        """The method's equation at one module that `target_modules` names.

        Args:
            path: full name of the module.
            module: the module.

        Raises:
            ValueError: the method cannot act on modules of this class.
        """
        self._check_target(path, module)
        return self._at(path)

    def _check_target(self, path: str, module: nn.Module) -> None:
        valid = linear_sizes(module) if self.valid_targets == LINEARS else output_channels(module)
        if valid is None or isinstance(module, nn.modules.conv._ConvTransposeNd):
            raise ValueError(
                f"{type(self).__name__}.target_modules: {path!r} is a {type(module).__name__}; valid are "
                f"{self.valid_targets}."
            )

    def _at(self, path: str) -> Placement:
        """The placement of the equation at the module of that name."""
        raise NotImplementedError(f"{type(self).__name__} does not define its equation at one module.")


def own_fields(config_cls: type) -> list[Field]:
    """The fields that a method has, inherited ones of another method too, without those that all configs have."""
    general = {*VisualPeftConfig.__mro__, TargetedConfig}
    declared = {name for base in config_cls.__mro__ if base not in general for name in inspect.get_annotations(base)}
    return [each for each in fields(config_cls) if each.name in declared]


def default_of(each: Field) -> Any:
    """The default of a config's field."""
    return each.default if each.default_factory is MISSING else each.default_factory()


def find_targets(model: nn.Module, config: TargetedConfig) -> dict[str, nn.Module]:
    """The modules that a config with `target_modules` names, by full name; `"all-linear"` becomes these names.

    Args:
        model: to be adapted.
        config: of the method.

    Raises:
        ValueError: no target is in a block of `layers_to_transform`, or one is never called.
    """
    modules = dict(model.named_modules())
    if str(config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        _maybe_include_all_linear_layers(config, model)  # it does not see linears inside layers of this library
        own = {path for path, module in modules.items() if isinstance(module, VisualTunerLayer)}
        config.target_modules |= {path for path in own if isinstance(unwrapped(modules[path]), nn.Linear | Conv1D)}  # type: ignore
    names: Any = config.target_modules
    inside = tuple(f"{path}." for path, module in modules.items() if isinstance(module, BaseTunerLayer))
    free = [path for path in modules if path and not path.startswith(inside)]  # peft skips the others
    several = names_of_modules(model)
    for layer in config.layers or ():
        only = replace(config, layers_to_transform=[layer])
        if not any(names_target(only, several.get(path, [path])) for path in free):
            pattern = f" {config.layers_pattern!r}" if config.layers_pattern else ""
            raise ValueError(
                f"{type(config).__name__}.layers_to_transform has {layer}: no list of blocks{pattern} has any of "
                f"{', '.join(sorted(names))} at that index."
            )
    targets = {path: unwrapped(modules[path]) for path in free if names_target(config, several.get(path, [path]))}
    for path in targets:
        parent = modules[path.rpartition(".")[0]]
        if isinstance(unwrapped(parent), nn.MultiheadAttention):
            raise ValueError(
                f"{type(config).__name__}.target_modules: {path!r} belongs to a MultiheadAttention, which uses its "
                "weight without calling it. Exclude it with exclude_modules."
            )
    _require_calls(model, targets, type(config).__name__)
    return targets


def _require_calls(model: nn.Module, targets: Collection[str], name: str) -> None:
    """Refuse a target whose weight the model uses without calling it: an adapter there would have no effect.

    It is detected by the biases that such attention has beside its projection, or by running a copy of the model.

    Raises:
        ValueError: there is such a target.
    """
    suspects = [path for path in targets if _holds_tensors(model.get_submodule(path.rpartition(".")[0]))]
    if not suspects:
        return
    seen = probe(model, suspects)
    if seen is None:
        past = [path for path in suspects if _has_bias_beside(model, path)]
    else:
        past = [path for path in suspects if path in seen.read and path not in seen.called]
    if past:
        names = ", ".join(map(repr, past[:3])) + (f" and {len(past) - 3} more" if len(past) > 3 else "")
        raise ValueError(
            f"{name}.target_modules: {names}: the model reads the weight without calling the module, so nothing there "
            "would have an effect. Leave it out, by exclude_modules or by naming others."
        )


def _holds_tensors(parent: nn.Module) -> bool:
    """Whether a module has own parameters, and so may also use the weights of its children directly."""
    return any(True for _ in parent.parameters(recurse=False))


def _has_bias_beside(model: nn.Module, path: str) -> bool:
    return getattr(model.get_submodule(path.rpartition(".")[0]), "q_bias", None) is not None


def names_target(config: TargetedConfig, names: Iterable[str]) -> Any:
    """Whether a module is a target under one of its names and excluded under none, by peft's rules."""
    found = [check_target_module_exists(config, name) for name in names]
    excluded = [each for each in found if isinstance(each, _ExcludedModule)]
    return excluded[0] if excluded else any(found)
