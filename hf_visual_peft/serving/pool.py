"""One backbone with the adapters that were used last.

The weights of the backbone exist once. Each method has a structure of modules of its own around them, because methods
on one structure would change each other's inputs; adapters of one method stand in one structure and go through it in
one batch.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..backbones.input_size import size_to_tell
from ..core.config import VisualPeftConfig
from ..core.labels import Labels
from ..sites import WholeLayer
from .catalogue import Base, Entry


class AdapterError(Exception):
    """An adapter cannot be loaded or used; the message says why."""


class Backbone:
    """A model whose weights all structures share.

    Args:
        base: which.
        device: to compute on.
        dtype: of the weights.

    Raises:
        ValueError: it cannot be loaded.
    """

    def __init__(self, base: Base, device: torch.device, dtype: torch.dtype) -> None:
        self.base, self.device, self.dtype = base, device, dtype
        self.model, missing = self._load()
        self.random = missing  # weights that the checkpoint lacks, such as those of a head
        self.values = sum(parameter.numel() for parameter in self.model.parameters())
        self.size = size_to_tell(self.model)
        self._sums = self._summed()

    def _load(self) -> tuple[Any, list[str]]:
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # a random head is an error below, where an adapter has none
        try:
            model, loading = transformers.AutoModelForImageClassification.from_pretrained(
                self.base.name, revision=self.base.revision or "main", dtype=self.dtype, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"--model {self.base.name} cannot be loaded: {error}") from error
        finally:
            transformers.logging.set_verbosity(verbosity)
        return model.eval().requires_grad_(False).to(self.device), sorted(loading["missing_keys"])

    def structure(self) -> Any:
        """New modules around the same weights."""
        weights = [*self.model.parameters(), *self.model.buffers()]
        return copy.deepcopy(self.model, {id(tensor): tensor for tensor in weights})

    def changed(self) -> bool:
        """Whether something changed the weights since the start."""
        return self._summed() != self._sums

    def restore(self) -> None:
        """Read the weights anew, in place."""
        fresh, _ = self._load()
        with torch.no_grad():
            own = dict(self.model.named_parameters())
            for name, parameter in fresh.named_parameters():
                if name not in self.random:
                    own[name].data.copy_(parameter)
        self._sums = self._summed()

    @torch.no_grad()
    def _summed(self) -> list[tuple[float, float]]:
        return [(float(p.double().sum()), float(p.double().abs().sum())) for p in self.model.parameters()]


@dataclass
class Loaded:
    """An adapter in memory.

    Attributes:
        entry: of the catalogue.
        group: that it stands in.
        classes: their names.
        several: whether an image may have several of them.
        alone: why it cannot share a batch with others; "" if it can.
        values: numbers that it keeps in memory.
    """

    entry: Entry
    group: Group
    classes: tuple[str, ...]
    several: bool
    alone: str = ""
    values: int = 0

    def batch_key(self, shape: torch.Size) -> tuple[Any, ...]:
        """Images with equal keys may go through the model together."""
        own = self.entry.key if self.alone else ""
        return id(self.group), len(self.classes), tuple(shape), own


@dataclass(eq=False)
class Group:
    """Adapters of one method in one structure."""

    kind: str
    model: PeftModel
    active: str = ""
    keys: set[str] = field(default_factory=set)


class Pool:
    """The adapters in memory; the one that was used least recently goes first.

    Args:
        backbone: of all.
        most: how many adapters are kept.
    """

    def __init__(self, backbone: Backbone, most: int) -> None:
        self.backbone, self.most = backbone, most
        self.loaded: OrderedDict[str, Loaded] = OrderedDict()
        self.groups: list[Group] = []
        self.loads = self.evictions = 0

    def get(self, entry: Entry, shape: torch.Size, keep: Collection[str] = ()) -> Loaded:
        """An adapter, loaded if it is not there.

        Args:
            entry: of the catalogue; its weights are on this machine.
            shape: of an image of it, to try it with.
            keep: names of adapters that must stay.

        Raises:
            AdapterError: it cannot be loaded; the others are as before.
        """
        found = self.loaded.get(entry.name)
        if found is not None:
            self.loaded.move_to_end(entry.name)
            return found
        while len(self.loaded) >= self.most:
            self.drop(next(name for name in self.loaded if name not in keep))
            self.evictions += 1
        try:
            found = self._load(entry, shape)
        except Exception as error:  # files of others: peft and safetensors raise all kinds of errors
            self._clear_away(entry.key)
            raise AdapterError(f"The adapter {entry.name} cannot be used: {_line(error)}") from error
        finally:
            self._check_backbone(entry)
        self.loaded[entry.name] = found
        self.loads += 1
        return found

    def drop(self, name: str) -> None:
        """Remove an adapter from memory."""
        self._clear_away(self.loaded.pop(name).entry.key)

    def run(self, loaded: Sequence[Loaded], pixels: Tensor) -> Tensor:
        """The logits of images, each with an adapter of its own; all have the same `batch_key`.

        Raises:
            AdapterError: an adapter gives logits that are not finite.
        """
        group = loaded[0].group
        keys = [one.entry.key for one in loaded]
        size = self.backbone.size
        inputs: dict[str, Any] = {"pixel_values": pixels.to(self.backbone.device, self.backbone.dtype)}
        if size is not None and tuple(pixels.shape[-2:]) != size:
            inputs["interpolate_pos_encoding"] = True
        if len(set(keys)) > 1:
            inputs["adapter_names"] = keys
        elif group.active != keys[0]:
            group.model.set_adapter(keys[0])
            group.active = keys[0]
        with torch.inference_mode():
            logits = group.model(**inputs).logits.float().cpu()
        return logits

    # ---- loading

    def _load(self, entry: Entry, shape: torch.Size) -> Loaded:
        config = PeftConfig.from_pretrained(str(entry.folder))
        kind = str(config.peft_type)
        group = next((one for one in self.groups if one.kind == kind), None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's about several adapters; missing weights are errors below
            if group is None:
                whole = self.backbone.structure()
                model = PeftModel.from_pretrained(
                    whole, str(entry.folder), adapter_name=entry.key, torch_device=str(self.backbone.device)
                )
                group = Group(kind, model)
                self.groups.append(group)
            else:
                group.model.load_adapter(
                    str(entry.folder), adapter_name=entry.key, torch_device=str(self.backbone.device)
                )
            group.keys.add(entry.key)
            group.model.eval()
            group.model.set_adapter(entry.key)
            group.active = entry.key
        self._check_complete(entry, group)
        labels = Labels.of_mapping(group.model.peft_config[entry.key].auto_mapping)
        labels = labels or Labels.of_model(group.model.get_base_model())
        blank = torch.zeros(2, *shape)
        one = Loaded(entry, group, (), False)
        outputs = self.run([one, one], blank).shape[-1]
        names = labels.names if labels is not None and len(labels.names) == outputs else ()
        one.classes = names or tuple(f"LABEL_{index}" for index in range(outputs))
        one.several = labels is not None and labels.problem_type == "multi_label_classification"
        one.alone = self._why_alone(one)
        one.values = sum(p.numel() for p in _own(group.model, entry.key))
        return one

    def _check_complete(self, entry: Entry, group: Group) -> None:
        """Refuse weights that would stay random: of the adapter in its file, or of the head in the base."""
        config = group.model.peft_config[entry.key]
        if not isinstance(config, VisualPeftConfig):  # ours has compared them
            names = get_peft_model_state_dict(group.model, adapter_name=entry.key, save_embedding_layers=False)
            lacking = sorted(set(names) - set(entry.header.tensors or names))
            if lacking:
                raise AdapterError(f"its file lacks {lacking[0]} and {len(lacking) - 1} more")
        base = group.model.get_base_model()
        own = tuple(f"{name}." for name, module in base.named_modules() if _has_copy(module, entry.key))
        random = [key for key in self.backbone.random if not key.startswith(own)]
        if random:
            raise AdapterError(
                f"neither it nor {self.backbone.base.name} has {', '.join(random[:3])}: it was trained without a "
                "head, so its classes would be random"
            )

    def _why_alone(self, one: Loaded) -> str:
        """Why an adapter cannot share a batch; "" if it can."""
        tuner: Any = one.group.model.base_model
        config: Any = one.group.model.peft_config[one.entry.key]
        if not isinstance(config, VisualPeftConfig):
            if not hasattr(type(tuner), "_enable_peft_forward_hooks"):
                return f"peft does not mix adapters of {one.group.kind} in a batch"
            if getattr(config, "use_dora", False):
                return "peft does not mix adapters with DoRA in a batch"
        return ""

    def _clear_away(self, key: str) -> None:
        for group in [one for one in self.groups if key in one.model.peft_config or key in one.keys]:
            group.keys.discard(key)
            if not group.keys:
                self.groups.remove(group)
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peft's about the adapter that becomes active
                group.model.set_adapter(group.active if group.active in group.keys else next(iter(group.keys)))
                if key in group.model.peft_config:
                    group.model.delete_adapter(key)
            group.active = ""

    def _check_backbone(self, entry: Entry) -> None:
        if not self.backbone.changed():
            return
        self._clear_away(entry.key)
        self.backbone.restore()
        raise AdapterError(
            f"The adapter {entry.name} cannot be used: loading it changes the weights of the backbone, which other "
            "adapters share. Convert it to one that does not, as peft does for PiSSA and OLoRA."
        )


def _has_copy(module: nn.Module, key: str) -> bool:
    """Whether an adapter trains a copy of this module."""
    if isinstance(module, ModulesToSaveWrapper):
        return key in module.modules_to_save
    return isinstance(module, WholeLayer) and bool(module.equations_of(key))


def _own(model: nn.Module, key: str) -> list[nn.Parameter]:
    """The parameters of an adapter."""
    return [parameter for name, parameter in model.named_parameters() if key in name.split(".")]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
