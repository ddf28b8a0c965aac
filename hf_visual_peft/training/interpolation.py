"""Ensembles of backbone and adapter in the space of weights, as in WiSE-FT.

A fine-tuned model is often better on what it was tuned for and worse on everything else. Weights between those of the
backbone and those of the adapted model keep most of both (Robust fine-tuning of zero-shot models, CVPR 2022, arXiv
2109.01903, equation 1):

    w(alpha) = w_base + alpha * (w_adapted - w_base)
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn


class Interpolation:
    """A plain model between a backbone and the same backbone with an adapter merged into it.

    The adapter is merged once; every call then sets the weights of one model, so a sweep over alpha costs little:

        between = Interpolation(model)
        accuracy = {alpha: evaluate(between(alpha)) for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)}

    The weights of modules that train as a whole (the task head) are interpolated too. If the backbone's head was never
    trained, small alphas are of little use; give such a backbone a trained head, for example from a linear probe,
    before the adapter trains.

    Methods for class texts do not merge. If they start from the texts, the weights of the adapter itself are
    interpolated, between those it started from and those it learned; the result has the adapter and can be saved.

    It keeps two copies of the weights that change.

    Args:
        model: with an adapter that can be merged, of this library or of peft, or one for class texts. It is not
            changed.
        adapter_name: which adapter; the active one by default.

    Raises:
        TypeError: `model` is not a `PeftModel` with adapter layers.
        ValueError: there is no such adapter, it can neither be merged nor starts from the texts, or more or fewer
            than one is active.
    """

    def __init__(self, model: PeftModel, adapter_name: str | None = None) -> None:
        if not isinstance(model, PeftModel) or not isinstance(model.base_model, BaseTuner):
            raise TypeError(f"Interpolation needs a PeftModel with adapter layers, not {type(model).__name__}.")
        name = _adapter(model, adapter_name)
        if any(getattr(module, "merged", False) for module in model.modules()):
            raise ValueError("An adapter is merged into the model already: call unmerge_adapter() first.")
        starting = getattr(model.base_model, "starting_weights", None)  # of methods for class texts
        if starting is not None:
            start = {f"base_model.model.{key}": value for key, value in starting(name).items()}
            between: Any = copy.deepcopy(model)
            between.set_adapter(name)
            self._model: nn.Module = between.requires_grad_(False).eval()
            self._ends = {
                key: (start[key].to(value), value.clone())
                for key, value in _state(between).items()
                if key in start and value.is_floating_point()
            }
            return
        base = base_of(copy.deepcopy(model))
        adapted = copy.deepcopy(model)
        adapted.set_adapter(name)
        try:
            merged = adapted.merge_and_unload()
        except (ValueError, NotImplementedError, AttributeError) as error:
            kind = model.peft_config[name].peft_type.value
            raise ValueError(f"The adapter {name!r} of type {kind} cannot be merged: {error}") from error
        before, after = _state(base), _state(merged)
        _check_shapes(before, after)
        self._model = merged.requires_grad_(False).eval()
        # a bias that merging added counts as zero in the backbone
        self._ends = {
            key: (before[key] if key in before else torch.zeros_like(value), value.clone())
            for key, value in after.items()
            if key not in before or not torch.equal(before[key], value)
        }

    @torch.no_grad()
    def __call__(self, alpha: float) -> nn.Module:
        """The model with the weights for alpha, in eval mode. Every call returns the same object.

        Args:
            alpha: from 0, the backbone bit for bit, to 1, the merged model bit for bit.

        Raises:
            ValueError: alpha is not in this range.
        """
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha!r}: must be a number from 0 to 1.")
        if isinstance(self._model, PeftModel):
            tuner: Any = self._model.base_model
            tuner.enable_adapter_layers() if alpha else tuner.disable_adapter_layers()
            self._model.requires_grad_(False)
        state = _state(self._model)
        for key, (base, adapted) in self._ends.items():
            state[key].copy_(_between(base, adapted, alpha))
        return self._model


def interpolate(model: PeftModel, alpha: float, adapter_name: str | None = None) -> nn.Module:
    """A model with the weights `base + alpha * (adapted - base)`; see `Interpolation`, which serves many alphas.

    Args:
        model: with an adapter that can be merged, or one for class texts. It is not changed.
        alpha: from 0, the backbone, to 1, the merged model.
        adapter_name: which adapter; the active one by default.

    Returns:
        A new model in eval mode, of the backbone's class; with an adapter for class texts, it has this adapter.

    Raises:
        TypeError: as of `Interpolation`.
        ValueError: as of `Interpolation`, or alpha is not from 0 to 1.
    """
    return Interpolation(model, adapter_name)(alpha)


def _between(base: Tensor, adapted: Tensor, alpha: float) -> Tensor:
    if alpha in (0, 1) or not base.is_floating_point():  # integers, such as counts of batches, cannot be interpolated
        return base if alpha < 0.5 else adapted
    wide = torch.promote_types(base.dtype, torch.float32)
    return torch.lerp(base.to(wide), adapted.to(wide), float(alpha))


def _adapter(model: PeftModel, adapter_name: str | None) -> str:
    if adapter_name is None:
        active = list(model.active_adapters)
        if len(active) != 1:
            raise ValueError(f"The active adapters are {active}: say adapter_name, one of {list(model.peft_config)}.")
        return active[0]
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name is {adapter_name!r}: must be one of {list(model.peft_config)}.")
    return adapter_name


def base_of(model: PeftModel) -> nn.Module:
    """Take the adapters out of a model: its own modules stand in the place of those that one trains as a whole."""
    originals = [
        (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module.original_module)
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    ]
    base: Any = model.unload()
    for parent, child, original in originals:
        setattr(parent, child, original)
    return base


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _check_shapes(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Raise an error if the weights cannot be interpolated."""
    for key, value in before.items():
        if key not in after or after[key].shape != value.shape or after[key].dtype != value.dtype:
            found = "nothing" if key not in after else f"{tuple(after[key].shape)}, {after[key].dtype}"
            raise ValueError(
                f"{key} is {tuple(value.shape)}, {value.dtype}, in the backbone and {found} in the merged model: "
                "these cannot be interpolated."
            )
    more = [key for key in after if key not in before and not key.endswith("bias")]
    if more:
        raise ValueError(f"Merging gives the model {more[0]}, which the backbone does not have.")
