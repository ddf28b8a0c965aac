"""Class names that are saved with an adapter.

An adapter with a copy of the head for image classification belongs to the classes it was trained on. They are saved in
its `adapter_config.json`, under `auto_mapping`, a dictionary that peft does not change. `PeftModel.from_pretrained`,
`AutoModelForImageClassification.from_pretrained` and `pipeline` then load the adapter with a head of that many classes
and put their names into `model.config`, with any head of the base. Each adapter of a model keeps its own names, and
so does the base: switching or disabling adapters also switches the names.

With methods of this library all that happens automatically. Adapters of peft's own methods have the names in their
file if `with_visual_targets` or the recipe prepared them, or `hub.push` uploaded them; `import hf_visual_peft` makes
peft read them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftModel
from peft.config import PeftConfigMixin
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..backbones.backbone import unwrapped
from ..backbones.finding import find_backbone
from ..backbones.key_renames import to_present_names
from ..sites import ModelAdapters, VisualTunerLayer, WholeLayer
from .copies import TrainedCopy


NAMES = "id2label"
PROBLEM = "problem_type"
TEMPLATES = "templates"  # of a model whose classes are texts


@dataclass(frozen=True)
class Labels:
    """The classes of a head.

    Attributes:
        names: by index.
        problem_type: of transformers' config; None if the labels decide it at the first loss.
    """

    names: tuple[str, ...]
    problem_type: str | None = None

    @classmethod
    def of_model(cls, model: nn.Module) -> Labels | None:
        """The classes in the config of a transformers model; `None` if there are none."""
        return cls.of_config(getattr(model, "config", None))

    @classmethod
    def of_config(cls, config: Any) -> Labels | None:
        """The classes in the config of a transformers model; `None` if there are none."""
        names = getattr(config, NAMES, None)
        if not isinstance(names, dict):
            return None
        # keys may be texts, as JSON has them
        by_index = {int(key) if str(key).isdecimal() else key: name for key, name in names.items()}
        if set(by_index) != set(range(len(names))):
            return None
        return cls(tuple(str(by_index[index]) for index in range(len(names))), getattr(config, PROBLEM, None))

    @classmethod
    def of_mapping(cls, mapping: Mapping[str, Any] | None) -> Labels | None:
        """The classes in the `auto_mapping` of an adapter; `None` if there are none.

        Raises:
            ValueError: they are not a mapping of 0, 1, ... to names.
        """
        names = (mapping or {}).get(NAMES)
        if mapping is None or names is None:
            return None
        valid = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
        if not valid or not names or set(names) != {str(index) for index in range(len(names))}:
            raise ValueError(
                f"auto_mapping[{NAMES!r}] of the adapter's config is {names!r}: must map '0', '1', ... to the names "
                "of the classes. Correct adapter_config.json, or remove it there and load the base with num_labels."
            )
        return cls(tuple(names[str(index)] for index in range(len(names))), mapping.get(PROBLEM))

    @property
    def made_up(self) -> bool:
        """Whether they are the numbered names that transformers makes up."""
        return self.names == tuple(f"LABEL_{index}" for index in range(len(self.names)))

    def tell_model(self, config: Any) -> None:
        """Put them into the config of a transformers model."""
        config.id2label = dict(enumerate(self.names))
        config.label2id = {name: index for index, name in enumerate(self.names)}
        config.problem_type = self.problem_type
        if hasattr(config, "label_names"):  # timm's wrapper saves them under this name
            config.label_names = list(self.names)

    def tell_adapter(self, config: PeftConfig, model: nn.Module) -> None:
        """Put them into the config of an adapter for a model, beside the entries of peft."""
        base = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
        own: dict[str, Any] = {NAMES: {str(index): name for index, name in enumerate(self.names)}}
        if self.problem_type is not None:
            own[PROBLEM] = self.problem_type
        others = {key: value for key, value in (config.auto_mapping or {}).items() if key not in (NAMES, PROBLEM)}
        config.auto_mapping = {**base, **others, **own}


@dataclass
class _Owners:
    """Whose classes a model's config currently has.

    Attributes:
        config: of the model.
        base: classes of the base.
        by_adapter: classes of the adapters that have other ones.
        owner: the adapter, None for the base.
    """

    config: Any
    base: Labels
    by_adapter: dict[str, Labels] = field(default_factory=dict)
    owner: str | None = None

    def of(self, adapter_name: str | None) -> Labels:
        return self.base if adapter_name is None else self.by_adapter.get(adapter_name, self.base)

    def tell(self, holder: Any) -> None:
        """Put the classes of the active head into the model's config."""
        if isinstance(holder, ModulesToSaveWrapper):
            active = next((name for name in holder.active_adapters if name in holder.modules_to_save), None)
            owner = None if holder.disable_adapters else active
        else:
            owner = holder.active_name
        if owner == self.owner:
            return
        self.keep()
        self.of(owner).tell_model(self.config)
        self.owner = owner

    def keep(self) -> None:
        """Keep changes that a user made in the model's config since."""
        now = Labels.of_config(self.config)
        if now is None or now == self.of(self.owner):
            return
        if self.owner is None:
            self.base = now
        else:
            self.by_adapter[self.owner] = now


def _tells_which_is_active(cls: type) -> type:
    """Make a class that holds a head and its copies update the model's config whenever the active one changes."""

    def told(name: str) -> Callable[..., None]:
        change = getattr(cls, name)

        @functools.wraps(change)
        def change_and_tell(self: Any, *args: Any, **kwargs: Any) -> None:
            change(self, *args, **kwargs)
            self.owners.tell(self)

        return change_and_tell

    for name in ("set_adapter", "enable_adapters", "delete_adapter"):
        setattr(cls, name, told(name))
    return cls


@_tells_which_is_active
class LabelledCopies(ModulesToSaveWrapper):
    """A head with copies that peft keeps, whose classes differ."""

    owners: _Owners


@_tells_which_is_active
class LabelledTrainedCopy(TrainedCopy):
    """A head with copies that the tuner of this library keeps, whose classes differ."""

    owners: _Owners


class LabelledWholeLayer(WholeLayer):
    """A head with copies that a method of this library trains, whose classes differ."""

    owners: _Owners

    def _changed(self) -> None:
        super()._changed()
        self.owners.tell(self)


class LabelledModelAdapters(ModelAdapters):
    """What adapters have at a head's output, where it has other classes than the head."""

    owners: _Owners

    def _changed(self) -> None:
        super()._changed()
        self.owners.tell(self)


_LABELLED = {
    TrainedCopy: LabelledTrainedCopy,
    ModulesToSaveWrapper: LabelledCopies,
    WholeLayer: LabelledWholeLayer,
    ModelAdapters: LabelledModelAdapters,
}


def _owners_in(model: nn.Module) -> _Owners | None:
    labelled: Any = (module for module in model.modules() if isinstance(module, tuple(_LABELLED.values())))
    return next((module.owners for module in labelled), None)


def record(model: nn.Module, adapter_name: str) -> None:
    """Put the class names of the model's config into an adapter's config.

    Nothing happens if the adapter has no copy of a head for these classes.

    Args:
        model: with adapters; a `PeftModel`, or a transformers model that they were added to.
        adapter_name: which of them.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    configs: Any = model.peft_config
    labels, config = Labels.of_model(base), configs[adapter_name]
    holders = [module for module in base.modules() if isinstance(module, ModulesToSaveWrapper | WholeLayer)]
    owners = _owners_in(base)
    if owners is not None:
        owners.keep()
        labels = owners.of(adapter_name)
    counts = {_outputs(_copy_in(holder, adapter_name)) for holder in holders}
    counts.add(getattr(config, "output_classes", None))
    if labels is not None and len(labels.names) in counts:
        labels.tell_adapter(config, base)


def name_classes(config: PeftConfig, model: nn.Module) -> None:
    """Put a model's class names into the config of an adapter that will train a copy of its head.

    Args:
        config: of any method; not changed if the adapter copies no head for these classes.
        model: without or with adapters.
    """
    labels = Labels.of_model(model)
    if labels is not None and _heads(model, config, len(labels.names)):
        labels.tell_adapter(config, model)


@contextmanager
def fitted(model: nn.Module, config: PeftConfig, adapter_name: str) -> Iterator[None]:
    """Give the head of the base the number of classes of an adapter that is put in and copies it, inside the context.

    Afterwards the head is restored, and the model's config has the adapter's class names while it is active. An
    adapter that will be trained gets the classes of the base, unless these are equally many and have no names.

    Args:
        model: in which the adapter is put.
        config: of the adapter.
        adapter_name: of the adapter.
    """
    labels, own = Labels.of_mapping(config.auto_mapping), Labels.of_model(model)
    owners = _owners_in(model)
    base = own if owners is None else owners.base
    mapped = getattr(config, "output_classes", None)
    if mapped is not None and base is not None:
        yield
        if labels is None or len(labels.names) != mapped:
            labels = Labels(tuple(f"LABEL_{index}" for index in range(mapped)))
        owners = owners or _Owners(model.config, base)
        owners.by_adapter[adapter_name] = labels
        _label([module for module in model.modules() if isinstance(module, ModelAdapters)], owners)
        return
    heads = [] if labels is None or base is None else _heads(model, config, len(base.names))
    if own is not None and getattr(model, "classes_are_texts", False) and not config.inference_mode:
        own.tell_adapter(config, model)
        config.auto_mapping = {**config.auto_mapping, TEMPLATES: list(model.config.templates)}  # type: ignore
    if labels is None or base is None or not heads:
        yield
        return
    others = len(labels.names) != len(base.names)
    if not config.inference_mode and (others or not base.made_up):
        base.tell_adapter(config, model)
        yield
        return
    with _resized([_last(unwrapped_head(model, path)) for path in heads], len(labels.names) if others else None):
        yield
    if labels.made_up and not others:
        labels = base
    if labels == base and owners is None:
        return
    owners = owners or _Owners(model.config, base)
    owners.by_adapter[adapter_name] = labels
    holders: Any = [model.get_submodule(path) for path in heads]
    _label([holder for holder in holders if isinstance(holder, ModulesToSaveWrapper | WholeLayer)], owners)


def _label(holders: Iterable[Any], owners: _Owners) -> None:
    """Let what holds heads tell the model's config whose classes are active."""
    for holder in holders:
        holder.__class__ = next(labelled for kind, labelled in _LABELLED.items() if isinstance(holder, kind))
        holder.owners = owners
        owners.tell(holder)


def forget(model: nn.Module) -> None:
    """Put the classes of the base back into a model's config when its adapters are removed."""
    owners = _owners_in(model)
    if owners is not None and owners.owner is not None:
        owners.keep()
        owners.base.tell_model(owners.config)


def check_mixed(model: nn.Module, names: Iterable[str]) -> None:
    """Raise an error if the logits of a batch that mixes adapters would have different lengths.

    Args:
        model: with adapters.
        names: of the adapters that the batch mixes; other names mean the base.
    """
    owners = _owners_in(model)
    counts = {} if owners is None else {name: len(owners.of(name).names) for name in dict.fromkeys(names)}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ValueError(
            f"adapter_names: heads for different numbers of classes do not mix in a batch ({told}). Use set_adapter "
            "and one batch for each."
        )


def teach_peft() -> None:
    """Make peft's own methods read class names from an adapter's config, and save them.

    Both affect only configs that have such names.
    """
    inject, save = BaseTuner.inject_adapter, PeftConfigMixin.save_pretrained

    @functools.wraps(inject)
    def inject_adapter(self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        ours = self.tuner_layer_cls is VisualTunerLayer  # these have done it in their own inject_adapter
        with nullcontext() if ours else fitted(model, self.peft_config[adapter_name], adapter_name):
            inject(self, model, adapter_name, *args, **kwargs)

    @functools.wraps(save)
    def save_pretrained(self: PeftConfigMixin, save_directory: str, **kwargs: Any) -> None:
        kept = (NAMES, PROBLEM, TEMPLATES)
        names = {key: value for key, value in (self.auto_mapping or {}).items() if key in kept}
        if names and kwargs.get("auto_mapping_dict") is not None:
            kwargs["auto_mapping_dict"] = {**kwargs["auto_mapping_dict"], **names}
        save(self, save_directory, **kwargs)

    BaseTuner.inject_adapter = inject_adapter
    PeftConfigMixin.save_pretrained = save_pretrained


def unwrapped_head(model: nn.Module, path: str) -> nn.Module:
    """A head of the base, without the copies that adapters put beside it."""
    module = model.get_submodule(path)
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else unwrapped(module)


def _heads(model: nn.Module, config: Any, count: int) -> list[str]:
    """The heads of the base with that many classes of which an adapter will train copies."""
    names = to_present_names(model, list(getattr(config, "modules_to_save", None) or ()))
    names = [
        *(names or ()),
        *(find_backbone(model, config.backbone).heads if getattr(config, "copied_head", "") else ()),
    ]
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{head}.") for head in found)
        if inside or not any(path.endswith(name) for name in names):  # as peft compares them
            continue
        if not isinstance(module, BaseTunerLayer) or isinstance(module, WholeLayer):
            found.append(path)
    return [path for path in found if _outputs(unwrapped_head(model, path)) == count]


def _copy_in(holder: Any, adapter_name: str) -> nn.Module | None:
    """The copy that an adapter has of a module."""
    if isinstance(holder, ModulesToSaveWrapper):
        copies = holder.modules_to_save
        return copies[adapter_name] if adapter_name in copies else None  # noqa: SIM401 - ModuleDict has no get
    return next((equation.module for equation in holder.equations_of(adapter_name)), None)


def _last(head: nn.Module | None) -> Any:
    """The linear or convolution in a head that computes the logits; `None` if there is none."""
    layers = [] if head is None else [m for m in head.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return layers[-1] if layers and layers[-1].weight.is_floating_point() else None


def _outputs(head: nn.Module | None) -> int | None:
    layer = _last(head)
    return None if layer is None else len(layer.weight)


@contextmanager
def _resized(layers: list[Any], outputs: int | None) -> Iterator[None]:
    """Give the layers zero weights for that many outputs inside the context; nothing happens for `None`."""
    before = []
    for layer in layers if outputs is not None else ():
        size = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
        parameters = {name: p for name, p in layer.named_parameters(recurse=False) if p is not None}
        before.append((layer, size, getattr(layer, size), parameters))
        setattr(layer, size, outputs)
        for name, p in parameters.items():
            setattr(layer, name, nn.Parameter(p.new_zeros(outputs, *p.shape[1:]), requires_grad=p.requires_grad))
    try:
        yield
    finally:
        for layer, size, number, parameters in before:
            setattr(layer, size, number)
            for name, p in parameters.items():
                p.requires_grad_(getattr(layer, name).requires_grad)
                setattr(layer, name, p)
