"""Batch norms of a frozen backbone keep their running statistics while an adapter trains.

An adapter's file does not hold the statistics of the backbone. If training changed them, disabling the adapter would
no longer give the backbone, and the adapter would compute something else in another copy of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a module updates running statistics in training: batch norms, tracking instance norms, EvoNorm.

    Norms that are frozen by design (`DetrFrozenBatchNorm2d`, timm's `FrozenBatchNormAct2d`) have their weight as a
    buffer; their statistics never change.

    Args:
        module: any; its children are not checked.
    """
    buffers = dict(module.named_buffers(recurse=False))
    return "weight" not in buffers and any(name.startswith("running_") for name in buffers)


def norms_with_statistics(model: nn.Module) -> list[str]:
    """The full names of the backbone's norms with running statistics, without those of adapters.

    To train these norms, weights and statistics, with a method of peft, pass it the names: `LoraConfig(...,
    modules_to_save=norms_with_statistics(model))`. peft then trains a copy of each and saves it.

    Args:
        model: with adapters or without.
    """
    return [path for path, module in _of_base(model) if keeps_statistics(module)]


def freeze_norms(model: nn.Module) -> list[str]:
    """Keep the backbone's norms with running statistics in evaluation mode, also under `model.train()`.

    Norms that belong to an adapter are updated as usual: copies that peft trains (`modules_to_save`, `LNTuningConfig`)
    and norms in an adapter's own equations. `unload()`, `merge_and_unload()` and `thaw_norms` undo it. Adapters of
    this library call it themselves; call it again after adding an adapter of peft, which may copy norms.

    Args:
        model: a `PeftModel`, also a wrapped one, or any other model with or without adapters.

    Returns:
        The full names of the norms that now keep their statistics.
    """
    base = {path: module for path, module in _of_base(model) if keeps_statistics(module)}
    kept = {id(module) for module in base.values()}
    for module in model.modules():
        if id(module) in kept:
            _freeze(module)
        else:
            _thaw(module)  # an adapter's copy of a norm that was already frozen
    for tuner in [module for module in model.modules() if isinstance(module, BaseTuner)]:
        for name in ("unload", "merge_and_unload"):
            vars(tuner).setdefault(name, _ThenThaw(tuner, name))
    return list(base)


def thaw_norms(model: nn.Module) -> None:
    """Undo `freeze_norms`: every norm gets the mode that was last set.

    Args:
        model: as given to `freeze_norms`, or a part of it.
    """
    for module in model.modules():
        _thaw(module)
        for name in [name for name, value in vars(module).items() if isinstance(value, _ThenThaw)]:
            delattr(module, name)


class _StaysInEval:
    """Replaces a norm's method `train`.

    It is an attribute of the norm, so it works whichever parent calls it, and it does not run in a forward pass:
    compilers see a norm in evaluation mode. It is an object and not a closure, so it is copied and pickled with the
    norm.
    """

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm
        self.asked = norm.training

    def __call__(self, mode: bool = True) -> nn.Module:
        self.asked = mode
        self.norm.training = False
        for child in self.norm.children():  # timm's norms have activation and dropout inside
            child.train(mode)
        return self.norm


class _ThenThaw:
    """Replaces the methods of a tuner that remove the adapters."""

    def __init__(self, tuner: BaseTuner, name: str) -> None:
        self.tuner = tuner
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        before = list(self.tuner.modules())  # trained copies may replace norms
        model = getattr(type(self.tuner), self.name)(self.tuner, *args, **kwargs)
        for module in before:
            _thaw(module)
        thaw_norms(self.tuner)
        return model


class NormStatistics(ModulesToSaveWrapper):
    """A norm and its copy for each adapter, whose statistics are updated and saved. Weight and bias stay frozen."""

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Create a copy for an adapter, as in peft."""
        super().update(adapter_name, **kwargs)
        self.requires_grad_(False)

    def enable_adapters(self, enabled: bool) -> None:
        """As peft's."""
        super().enable_adapters(enabled)
        self.requires_grad_(False)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As peft's."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.requires_grad_(False)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Do nothing: no parameter here trains."""


def move_statistics(
    model: nn.Module,
    adapter_name: str,
    active: bool = True,
    acted_on: Collection[str] = (),
    copied: Collection[str] = (),
) -> None:
    """Give an adapter copies of the backbone's norms, whose running statistics are updated and saved.

    Args:
        model: to be adapted, in place.
        adapter_name: whose copies.
        active: whether that adapter is active.
        acted_on: full names of the norms that the adapter itself will act on.
        copied: full names of modules of which it will train copies; norms in them are updated with these copies.

    Raises:
        ValueError: there is no norm with running statistics, or one of them cannot be copied; the model is untouched.
    """
    found = [(path, module) for path, module in _of_base(model) if keeps_statistics(module)]
    if not found:
        raise ValueError(
            f"train_norm_statistics is True, but {type(model).__name__} has no norm with running statistics: leave it "
            "False."
        )
    moved = [
        (path, norm, model.get_submodule(path.rpartition(".")[0]))
        for path, norm in found
        if not any(f"{path}.".startswith(f"{module}.") for module in copied)
    ]
    for path, norm, parent in moved:
        _check_movable(path, norm, parent, adapter_name, acted_on)
    for path, norm, parent in moved:
        wrapper = parent
        if not isinstance(wrapper, ModulesToSaveWrapper):
            wrapper = NormStatistics(norm, adapter_name)
            wrapper.set_adapter([adapter_name] if active else [])
            setattr(parent, path.rpartition(".")[2], wrapper)
        elif adapter_name not in wrapper.modules_to_save:
            wrapper.update(adapter_name)
            if active:
                wrapper.set_adapter([adapter_name])


def _check_movable(
    path: str, norm: nn.Module, parent: nn.Module, adapter_name: str, acted_on: Collection[str]
) -> None:
    trained = isinstance(parent, ModulesToSaveWrapper) and adapter_name in parent.modules_to_save
    if path in acted_on or (isinstance(parent, BaseTunerLayer) and parent.get_base_layer() is norm):
        reason = "an adapter acts on that norm itself"
    elif isinstance(parent, ModulesToSaveWrapper) and not isinstance(parent, NormStatistics) and not trained:
        reason = "another adapter has it among its modules_to_save"
    elif norm._forward_hooks or norm._forward_pre_hooks:
        reason = "it has forward hooks, which a copy would share"
    else:
        return
    raise ValueError(
        f"train_norm_statistics is True, but {path!r} cannot update its statistics: {reason}. Leave it False, or "
        "remove that from the norm."
    )


def _of_base(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of the backbone with their full names, without those of adapters."""
    yield path, module
    only = None
    if isinstance(module, BaseTunerLayer):
        only = "base_layer"
    elif isinstance(module, AuxiliaryTrainingWrapper):
        only = "original_module"
    for name, child in module.named_children():
        if only is None or name == only:
            yield from _of_base(child, f"{path}.{name}" if path else name)


def _freeze(norm: nn.Module) -> None:
    if not isinstance(vars(norm).get("train"), _StaysInEval):
        norm.train = _StaysInEval(norm)  # type: ignore[method-assign]
    norm.training = False


def _thaw(norm: nn.Module) -> None:
    stays = vars(norm).get("train")
    if isinstance(stays, _StaysInEval):
        del norm.train
        norm.training = stays.asked
