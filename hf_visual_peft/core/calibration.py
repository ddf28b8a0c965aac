"""Calibration of methods that choose from data what they train: one pass over images before training."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..backbones.backbone import VisionBackbone
from ..backbones.finding import find_backbone
from ..backbones.modes import in_eval_mode
from ..sites import VisualTunerLayer, layers_of
from .outcome import logits_of


class NotCalibratedError(RuntimeError):
    """A method that chooses from data was used before its calibration."""

    def __init__(self, method: str) -> None:
        super().__init__(
            f"{method} has not yet chosen what to train. Call hf_visual_peft.calibrate(model, dataloader) after "
            "get_peft_model, or load a trained adapter."
        )


class SetByData(nn.Module):
    """Base of equations with a parameter that starts from data; until `choose` sets it, it is not a number.

    Attributes:
        method: of which it is a part, for errors.
        chosen: name of the parameter.
    """

    method: ClassVar[str]
    chosen: ClassVar[str]

    def __init__(self, from_data: bool = False) -> None:
        super().__init__()
        self._known = not from_data

    def require_choice(self) -> None:
        """Look at the parameter until it is set, and not in every step.

        Raises:
            NotCalibratedError: it is not set yet.
        """
        if not self._known:
            self._known = not bool(getattr(self, self.chosen).isnan().any())
            if not self._known:
                raise NotCalibratedError(self.method)

    @torch.no_grad()
    def choose(self, values: Tensor) -> None:
        """Start from these values, of the parameter's shape."""
        getattr(self, self.chosen).copy_(values)
        self._known = True

    @torch.no_grad()
    def randomise(self) -> None:
        """Draw the parameter if no data have set it."""
        if not self._known:
            self.choose(self.drawn())

    def drawn(self) -> Tensor:
        """Values that the parameter has without data."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it starts from.")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        loaded = state_dict.get(f"{prefix}{self.chosen}")
        if isinstance(loaded, Tensor) and not loaded.is_meta:
            self._known = not bool(loaded.isnan().any())


@dataclass
class Calibration:
    """What a method can use to choose.

    Attributes:
        model: computes the same as the base model while the method chooses.
        backbone: in it.
        adapter: whose equations choose.
        layers: the adapter's layers by full name.
        max_batches: most batches to read; None for all.
        dataloader: gives mappings with `pixel_values` and `labels`.
        progress: whether to show a bar.
        part: what the slots of the method begin with, where it is a part of an adapter.
    """

    model: nn.Module
    backbone: VisionBackbone
    adapter: str
    layers: Mapping[str, VisualTunerLayer]
    max_batches: int | None
    dataloader: Iterable[Mapping[str, Any]]
    progress: bool
    part: str = ""

    def batches(self, default_max: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Batches on the model's device.

        Args:
            default_max: most batches that the method reads by default.

        Raises:
            ValueError: there is no batch, or one has no labels, or pixels that are not finite.
        """
        limit = self.max_batches or default_max
        device = next(self.model.parameters()).device
        total = limit
        with suppress(TypeError):  # no length: a loader of a stream
            length = len(self.dataloader)  # type: ignore[arg-type]
            total = min(length, limit or length)
        batches = islice(self.dataloader, limit)
        count = 0
        for batch in tqdm(batches, total=total, desc="Calibrating", disable=not self.progress):
            found = batch if isinstance(batch, Mapping) else {}
            if not all(isinstance(found.get(key), Tensor) for key in (self.input_name, "labels")):
                got = ", ".join(f"{key} ({type(value).__name__})" for key, value in found.items())
                raise ValueError(
                    f"dataloader: batch {count} must be a mapping with the tensors {self.input_name} and labels, got "
                    f"{got or type(batch).__name__}."
                )
            if not batch[self.input_name].isfinite().all():
                raise ValueError(f"dataloader: {self.input_name} of batch {count} are not finite (NaN or infinity).")
            yield {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
            count += 1
        if count == 0:
            raise ValueError("dataloader gives no batch: there is nothing to choose from.")

    def output(self, batch: Mapping[str, Tensor]) -> Any:
        """The model's output for a batch; models without an argument `pixel_values` get it as the first one."""
        if self.input_name in inspect.signature(self.model.forward).parameters:
            return self.model(**batch)
        return self.model(batch["pixel_values"])

    def loss(self, batch: dict[str, Tensor], purpose: str) -> Tensor:
        """The cross entropy of the model's output for a batch; the labels are removed from the batch.

        Binary cross entropy where the labels are 0 or 1 for each class, as fractions: (batch, classes).

        Args:
            batch: as `batches` gives it.
            purpose: which method measures what, for errors.

        Raises:
            ValueError: there is no head, it does not return (batch, classes) logits, or labels are out of range.
        """
        name = type(self.model).__name__
        if not self.backbone.heads:
            raise ValueError(f"{purpose} by a classifier's loss: {name} has no head.")
        labels = batch.pop("labels")
        logits = logits_of(self.output(batch))
        if logits is not None and logits.shape == labels.shape and labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits.float(), labels)
        if logits is None or logits.shape[:-1] != labels.shape:
            raise ValueError(f"{purpose} by a classifier's loss: {name} does not return (batch, classes) logits.")
        if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[-1]:
            raise ValueError(f"dataloader: labels must be from 0 to {logits.shape[-1] - 1}.")
        return F.cross_entropy(logits.float(), labels)

    def class_labels(self, batch: dict[str, Tensor], method: str, classes: int | None = None) -> Tensor:
        """The class of each image of a batch, (batch,); the labels are removed from the batch.

        Args:
            batch: as `batches` gives it.
            method: which needs them, for errors.
            classes: how many there are; None if that is not known.

        Raises:
            ValueError: labels have another form, or are out of range.
        """
        labels = batch.pop("labels")
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(
                f"dataloader: {method} compares classes: labels must be one class per image, (batch,), got shape "
                f"{tuple(labels.shape)}."
            )
        if classes is not None and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"dataloader: labels must be from 0 to {classes - 1}.")
        return labels

    def features(self, batch: Mapping[str, Tensor], method: str) -> Tensor:
        """The input of the task head, (batch, channels); without a head the first token, or the mean of patches.

        Args:
            batch: as `batches` gives it, without labels.
            method: which needs it, for errors.

        Raises:
            ValueError: the head does not read one feature vector per image.
        """
        backbone = self.backbone
        seen: list[Any] = []
        if not backbone.heads:
            output = self.output(batch)
            seen.append(output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None))
        else:
            head = self.model.get_submodule(backbone.heads[0])
            handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0] if args else None))
            try:
                self.output(batch)
            finally:
                handle.remove()
        if not seen or not isinstance(seen[0], Tensor) or seen[0].ndim < 2 or backbone.dense:
            raise ValueError(
                f"{method} needs one feature vector per image, and the head of {backbone.class_name} reads none."
            )
        features = seen[0]
        if features.ndim == 3 and backbone.prefix_tokens:
            return features[:, 0]
        if features.ndim == 3:
            mask = batch.get("pixel_attention_mask", features.new_ones(features.shape[:2])).to(features).unsqueeze(-1)
            return (features * mask).sum(dim=1) / mask.sum(dim=1)
        if features.ndim == 4:
            return features.mean(dim=(1, 2) if backbone.architecture.stream == "channels_last" else (2, 3))
        return features

    @property
    def input_name(self) -> str:
        """The key of the images in a batch: `pixel_values`, or `input_ids` if the model takes colours as tokens."""
        known = inspect.signature(self.model.forward).parameters
        return "input_ids" if "input_ids" in known and "pixel_values" not in known else "pixel_values"

    def equations(self, name: str) -> Iterator[tuple[str, Any]]:
        """The adapter's equations in the slot of that name, with the full names of their modules."""
        for path, layer in self.layers.items():
            for attribute in layer.adapter_layer_names:
                slot = getattr(layer, attribute)
                if attribute.endswith(f"_{self.part}{name}") and self.adapter in slot:
                    yield path, slot[self.adapter]


def calibrate(
    model: Any,
    dataloader: Iterable[Mapping[str, Any]],
    *,
    adapter_name: str = "default",
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Let an adapter choose from data what it trains.

    Call it between `get_peft_model` and training. The choice is part of the adapter and is saved with its weights. In
    a distributed run give every process the same batches, so that all make the same choice.

    Args:
        model: a `PeftModel`, or a transformers model with the adapter added.
        dataloader: gives mappings with `pixel_values` (batch, channels, height, width) and `labels` (batch,).
        adapter_name: of the adapter.
        max_batches: most batches to read; by default as many as in the method's paper.
        seed: of everything random; the state of the random generators is restored afterwards.
        progress: whether to show a bar.

    Raises:
        ValueError: the adapter chooses nothing from data, or the data are invalid; the adapter is then unchanged.
    """
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"adapter_name is {adapter_name!r}: the model has {', '.join(configs) or 'no adapter'}.")
    if max_batches is not None and (type(max_batches) is not int or max_batches < 1):
        raise ValueError(f"max_batches is {max_batches!r}: must be None or an integer of at least 1.")
    config = configs[adapter_name]
    if not getattr(config, "chooses_from_data", False):  # of our methods that choose
        raise ValueError(f"{type(config).__name__} chooses nothing from data: train it without calibration.")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    prefix = f"{config.peft_type.lower()}_"
    layers = {path: layer for path, layer in layers_of(base).items() if prefix in layer.methods_of(adapter_name)}
    with _as_base_model(base, seed):
        backbone = find_backbone(base, config.backbone)
        config.choose(Calibration(base, backbone, adapter_name, layers, max_batches, dataloader, progress))


@contextmanager
def _as_base_model(model: nn.Module, seed: int) -> Iterator[None]:
    """Switch adapters off inside the context, and restore everything afterwards."""
    switches = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    disabled = [module.disable_adapters for module in switches]
    gradients = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    random_states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with in_eval_mode(model), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            for module in switches:
                module._disable_adapters = True
            for parameter, _, _ in gradients:
                parameter.requires_grad_(False)
                parameter.grad = None
            yield
    finally:
        random.setstate(random_states[0])
        np.random.set_state(random_states[1])
        for module, was in zip(switches, disabled, strict=True):
            module._disable_adapters = was
        for parameter, requires_grad, gradient in gradients:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
