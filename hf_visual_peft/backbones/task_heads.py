"""The task head of a model: by name if a table has it, else by its place in the model."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .architectures import Architecture, architecture_of, heads_of
from .paths import is_in, join, lookup, original, trainable


_LIBRARIES = ("open_clip", "timm", "torchvision", "transformers")
_OTHERWISE = "name modules in modules_to_save to train others, [] for none"


@dataclass(frozen=True)
class TaskHeads:
    """The heads that were found.

    Attributes:
        paths: names of the heads in the model.
        dense: whether they belong to a model with outputs for positions in the image, not for the whole image.
        known: whether a table names them.
        of_library: whether their model is from a library.
        missing_in: class of the model without heads.
        note: a note for users on how they were found, or that none was; empty if not needed.
    """

    paths: tuple[str, ...] = ()
    dense: bool = False
    known: bool = True
    of_library: bool = True
    missing_in: str = ""
    note: str = ""


def announce(note: str) -> None:
    """Warn how heads were found, if nobody has named them."""
    if note:
        warnings.warn(note, UserWarning, stacklevel=3)


def heads_around(model: nn.Module, path: str, table: Architecture) -> TaskHeads:
    """The heads of the nearest model around a backbone that has heads, or of the backbone.

    Heads that the user has registered or a table names are taken without a search. Else, in a class of transformers
    for a task: modules that it has beside its base model or adds to it, and modules with a row for each label. In a
    model of timm: its classifier. In a user's own module: all modules beside the backbone that are not pretrained
    models themselves.

    Args:
        model: the whole model.
        path: name of the backbone in it.
        table: of the backbone.
    """
    own = _own_heads(model, path, table)
    searched: list[nn.Module] = []
    unnamed = ""
    holders = list(_holders(path))
    for index, outer in enumerate(holders):
        module = model.get_submodule(outer)
        registered = heads_of(type(module))
        if registered == ():
            return TaskHeads()
        known = trainable(model, outer, registered or table.heads)
        of_labels: tuple[str, ...] = ()
        if _is_of_library(module):
            found, of_labels = ((), ()) if known or own else _of_task_model(model, outer, path)
            searched += [module] if _has_task(module) else []
        else:
            found = () if registered and known else tuple(_beside(model, outer, path))
            if all(any(is_in(head, part) for head in known) for part in found):
                found = ()
            searched.append(module)
        parts, found = found, _nameable(model, found)
        unnamed = _unnamed(model, parts, found)
        if found:
            beside = type(model.get_submodule(path)).__name__
            note = (
                f"No table names the task head of {type(module).__name__}. {_listed(found)}: trained with the "
                f"adapter, as what is new beside {beside}; {_OTHERWISE}.{unnamed}"
            )
            return TaskHeads(found, _is_dense(model, module, found), known=False, note="" if of_labels else note)
        if known:
            note = _left_out(model, path, holders[index + 1 :], known)
            return TaskHeads(known, bool(registered), of_library=_is_of_library(module), note=note)
    if own:
        backbone = original(model.get_submodule(path))
        dense = _has_task(backbone) and _is_dense(model, backbone, own)
        note = _left_out(model, path, holders, own)
        if not note and len(own) > 1 and not _is_of_library(backbone) and architecture_of(backbone) is None:
            name = type(backbone).__name__
            note = f"{_listed(own)} of {name}: all are outputs, and all train with the adapter; {_OTHERWISE}."
        return TaskHeads(own, dense, note=note)
    if not searched:
        return TaskHeads()
    name = type(searched[-1]).__name__
    note = (
        f"No task head was found in {name}: nothing but the adapter trains. Name modules that shall train, too, in "
        f"modules_to_save (for all adapters: hf_visual_peft.register_heads({name!r}, ...)), or set it to [].{unnamed}"
    )
    return TaskHeads(known=False, missing_in=name, note=note)


def _own_heads(model: nn.Module, path: str, table: Architecture) -> tuple[str, ...]:
    """Heads that are part of the backbone: those of its table, or those that a model of timm tells."""
    known = trainable(model, path, table.own_heads)
    backbone: Any = original(model.get_submodule(path))
    if known:
        return known
    if _has_task(backbone):  # a class for a task that holds no base model
        return _nameable(model, _with_labels(model, path))
    if not isinstance(getattr(backbone, "get_classifier", None), MethodType):
        return known
    told = (getattr(backbone, "pretrained_cfg", None) or {}).get("classifier") or ()
    found = trainable(model, path, [told] if isinstance(told, str) else told)
    if found:
        return found
    heads = backbone.get_classifier()
    heads = set(heads) if isinstance(heads, list | tuple) else {heads}
    return trainable(model, path, [name for name, module in backbone.named_modules() if module in heads])


def _holders(path: str) -> Iterator[str]:
    """Names of the modules around one, the nearest first."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _unnamed(model: nn.Module, parts: Sequence[str], found: Sequence[str]) -> str:
    """A sentence on parts that peft cannot tell from others, empty where there are none but norms."""
    left = [part for part in parts if not any(is_in(path, part) for path in found)]
    left = [part for part in left if "Norm" not in type(original(model.get_submodule(part))).__name__]
    if not left:
        return ""
    why = f"{_listed(left)}: frozen, as names of other modules end in the same"
    return f" {why}; to train them, give them names of their own (in nn.Sequential by an OrderedDict)."


def _left_out(model: nn.Module, path: str, outside: Iterable[str], heads: Sequence[str]) -> str:
    """A note of what stands in modules of the user's own further out, and stays frozen; empty where nothing does."""
    own = (outer for outer in outside if not _is_of_library(model.get_submodule(outer)))
    left = [part for outer in own for part in _beside(model, outer, path)]
    return f"{_listed(left)}: frozen, {_listed(heads)}: trained with the adapter; {_OTHERWISE}." if left else ""


def _is_of_library(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] in _LIBRARIES


def _has_task(module: nn.Module) -> bool:
    """Whether a class of transformers is for a task; what its base models hold beside a backbone is pretrained."""
    return isinstance(module, PreTrainedModel) and re.search("For[A-Z]", type(module).__name__) is not None


def _of_task_model(model: nn.Module, outer: str, path: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Heads of a model of transformers, and those modules of them that have a row for each label."""
    module: Any = model.get_submodule(outer)
    if not _has_task(module) or module.get_output_embeddings() is not None:  # its head is that of a language model
        return (), ()
    inner = path.removeprefix(f"{outer}.").partition(".")[0]
    prefix = module.base_model_prefix
    base = getattr(module, prefix, None) if prefix else None
    composed = hasattr(getattr(module, inner), "out_features")  # of a backbone for maps and what reads these
    beside: list[str] = []
    if composed or base is getattr(module, inner):
        beside = _beside(model, outer, path)
        own = {id(parameter) for name in beside for parameter in model.get_submodule(name).parameters()}
        added = _added_to(model, join(outer, prefix), path)
        beside += [n for n in added if not all(id(p) in own for p in model.get_submodule(n).parameters())]
    labels = _with_labels(model, outer, path)
    return _nameable(model, [*beside, *labels]), tuple(labels)


def _added_to(model: nn.Module, base: str, path: str) -> list[str]:
    """Names of the modules that a class for a task has put into its base model, as RT-DETR the heads of its decoder.

    A second base model is made, on the meta device, and compared.
    """
    if not isinstance(lookup(model, base), PreTrainedModel) or base == path:
        return []
    module: Any = original(model.get_submodule(base))
    other = _on_meta(type(module), module.config)
    if other is None:
        return []
    there = {name for name, _ in other.named_parameters(remove_duplicate=False)}
    names = [_plain(name) for name, _ in module.named_parameters(remove_duplicate=False)]
    added = {join(base, name): None for name in names if name not in there}
    found: dict[str, None] = {}
    for name in added:
        outermost, around = "", name.rpartition(".")[0]
        while is_in(around, base) and around != base and not is_in(path, around):
            inside = model.get_submodule(around).named_parameters(remove_duplicate=False)
            if not all(join(around, _plain(each)) in added for each, _ in inside):
                break
            outermost, around = around, around.rpartition(".")[0]
        if outermost:
            found[outermost] = None
    return list(found)


def _on_meta(kind: type[nn.Module], config: Any) -> nn.Module | None:
    """Another model of a class, without weights; None where it cannot be made from its config alone."""
    try:
        with torch.device("meta"):
            return kind(copy.deepcopy(config))
    except Exception:  # it then tells nothing of this kind
        return None


def _plain(name: str) -> str:
    """The name of a parameter without what adapters have put around its module."""
    return name.replace(".original_module", "").replace(".base_layer", "")


def _beside(model: nn.Module, outer: str, path: str) -> list[str]:
    """Names of the trainable modules in one beside the backbone, without pretrained models."""
    module = model.get_submodule(outer)
    embeddings = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
    return [
        name
        for child, part in module.named_children()
        if not is_in(path, name := join(outer, child))
        and part is not embeddings
        and _computes(part)
        and not any(_is_pretrained(inside) for inside in part.modules())
    ]


def _computes(part: nn.Module) -> bool:
    """Whether a module has a weight for features, and not only numbers as losses have them."""
    return "Norm" in type(part).__name__ or any(parameter.ndim > 1 for parameter in part.parameters())


def twins(model: nn.Module, heads: Sequence[str]) -> dict[str, list[str]]:
    """Other modules with the very parameters of heads, by head: of two only one may be called."""
    owners: dict[frozenset[int], list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own = frozenset(id(parameter) for parameter in module.parameters())
        if own:
            owners.setdefault(own, []).append(name)
    found = {}
    for head in heads:
        own = frozenset(id(parameter) for parameter in model.get_submodule(head).parameters())
        # each by its own index, where parameters are those of a whole list, too
        number = head.rpartition(".")[2]
        found[head] = [name for name in owners[own] if name != head and name.rpartition(".")[2] == number]
    return found


def _is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a model of its own: one of timm, or one of transformers that takes images or words."""
    if isinstance(module, PreTrainedModel):  # parts of larger ones, as CLIPSeg's decoder, take hidden states
        return module.main_input_name in inspect.signature(module.forward).parameters
    return hasattr(module, "pretrained_cfg")


def _with_labels(model: nn.Module, outer: str, path: str | None = None) -> list[str]:
    """Names of the modules in a model of transformers, outside the backbone, whose size is that of the labels.

    A second one is made for other labels, on the meta device, and compared.
    """
    module = model.get_submodule(outer)
    assert isinstance(module, PreTrainedModel)
    config = copy.deepcopy(module.config)
    try:
        config.num_labels = module.config.num_labels + 1
    except Exception:  # a config without labels
        return []
    other = _on_meta(type(module), config)
    if other is None:
        return []
    shapes = {name: parameter.shape for name, parameter in other.named_parameters(remove_duplicate=False)}
    names: dict[str, None] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        plain = _plain(name)
        owner = join(outer, plain.rpartition(".")[0])
        if shapes.get(plain, parameter.shape) == parameter.shape or owner == outer:
            continue
        if path is not None and is_in(owner, path):
            continue
        if not isinstance(original(model.get_submodule(owner)), nn.Embedding):
            names[owner] = None
    return list(names)


def _nameable(model: nn.Module, paths: Sequence[str]) -> tuple[str, ...]:
    """The same modules, or their parts, so that peft can copy them: no lists, and no name in which another's ends."""
    found: dict[str, None] = {}
    for path in paths:
        if any(is_in(path, other) for other in found):
            continue
        module = original(model.get_submodule(path))
        others = [
            name
            for name, other in model.named_modules()
            if name != path and name.endswith(path) and (is_in(name, path) or any(True for _ in other.parameters()))
        ]
        others = [name for name in others if not any(is_in(name, each) for each in paths if each != path)]
        inside = [name for name, part in module.named_children() if any(True for _ in part.parameters())]
        if isinstance(module, nn.ModuleList | nn.ModuleDict) or (inside and _clash(model, path, others)):
            for part in _nameable(model, [join(path, name) for name in inside]):
                found[part] = None
        elif not _clash(model, path, others):
            found[path] = None
    return tuple(found)


def _clash(model: nn.Module, path: str, others: Iterable[str]) -> bool:
    """Whether peft would copy other modules by this name: those inside it, and those with parameters of their own."""
    own = {id(p) for p in model.get_submodule(path).parameters()}
    return any(
        is_in(other, path) or {id(p) for p in model.get_submodule(other).parameters()} != own for other in others
    )


def _is_dense(model: nn.Module, holder: nn.Module, paths: Sequence[str]) -> bool:
    if isinstance(holder, PreTrainedModel) and _is_of_library(holder):
        return "Classification" not in type(holder).__name__
    parts = (part for path in paths for part in model.get_submodule(path).modules())
    return any(isinstance(part, nn.modules.conv._ConvNd) for part in parts)


def _listed(paths: Sequence[str]) -> str:
    shown = ", ".join(map(repr, paths[:4]))
    return shown if len(paths) <= 4 else f"{shown} and {len(paths) - 4} more"
