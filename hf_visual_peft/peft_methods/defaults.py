"""Targets for peft's own methods on vision backbones, where peft has none.

`LoraConfig()` says nothing of where it acts; peft looks that up by the `model_type` of the model's config. Here the
model types of the role tables get their entries, as vision papers use these methods:

| method | acts on |
|---|---|
| LoRA and the other methods for linears | query and value, or where they are one linear, that; without them the linears of the MLP; without these the dense convolutions of the blocks |
| BEFT | value |
| OSF | all linears of attention and MLP |
| IA3 | key, value and the last linear of the MLP |
| LN tuning | all norms of the backbone but batch norms: on ViT-B/16 38,400 parameters |

peft knows no more than the model type, so that some things need naming in `target_modules`; `with_visual_targets`
(`methods.py`) looks at the model itself and leaves nothing to name. Of multimodal models peft has entries of its
own (BLIP-2, Gemma 4, Llama 4) or none; these stay, so that `LoraConfig()` adapts the language model there or asks for
`target_modules`, and `with_visual_targets(LoraConfig(), model)` the vision tower.
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as IA3_FEEDFORWARD
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_TARGETS

from ..backbones.architectures import Architecture, on_registration


Targets = list[str] | str | None

# methods of peft that act on Conv2d, too
CONVOLUTIONAL_METHODS = frozenset({"ADALORA", "BOFT", "HIRA", "HRA", "IA3", "LOHA", "LOKR", "LORA", "OFT"})
TIMM_WRAPPER = "timm_wrapper"
# models that hold any backbone, by model type, with where it is; IA3, which reads names only, has no entry for them
_HOLDERS = {
    "upernet": r"backbone",
    "maskformer": r"model\.pixel_level_module\.encoder",
    "mask2former": r"model\.pixel_level_module\.encoder",
    "detr": r"model\.backbone\.model",
    "conditional_detr": r"model\.backbone\.model",
    "deformable_detr": r"model\.backbone\.model",
    "rt_detr": r"model\.backbone\.model",
    "rt_detr_v2": r"model\.backbone\.model",
    "d_fine": r"model\.backbone\.model",
    "depth_anything": r"backbone",
    "prompt_depth_anything": r"backbone",
    "dpt": r"backbone",  # or one of its own
}
_HELD = "held"  # in place of a model type: a backbone in one of these
_FEEDFORWARD = "IA3 feedforward"  # beside its targets IA3 looks up which of them are in the MLP

# Dense convolutions of the blocks, by model type, where a table says "all" and a name would have to tell them from
# depthwise ones: patterns of what follows the list of blocks. (MobileNets read the convolutions' strides to pad as
# TensorFlow does, and peft's layers have none.)
_CONVOLUTIONS = {
    "resnet": r"\d+\.(?:layer\.\d+|shortcut(?:\.1)?)\.convolution",
    "regnet": r"\d+\.(?:layer\.[023]\.convolution|layer\.2\.attention\.[02]|shortcut\.convolution)",
    "bit": r"\d+\.(?:conv\d|downsample\.conv)",
    "efficientnet": r"\d+\.(?:expansion\.expand_conv|squeeze_excite\.(?:reduce|expand)|projection\.project_conv)",
    "hgnet_v2": r"\d+\.(?:layers\.\d+\.(?:conv1\.)?|aggregation\.[01]\.)convolution",
    "pp_lcnet": r"\d+\.(?:pointwise_convolution\.convolution|squeeze_excitation_module\.convolutions\.[02])",
    "textnet": r"\d+\.(?:main|vertical|horizontal)_conv",
}
# norms between lists of blocks, by model type or class, where a table says "all" of what lies there or has an
# `nn.Identity`
_NORMS_BETWEEN = {
    "convnext": (r"encoder\.stages\.\d+\.downsampling_layer\.0",),
    "convnextv2": (r"encoder\.stages\.\d+\.downsampling_layer\.0",),
    "ConvNextBackbone": (r"encoder\.stages\.\d+\.downsampling_layer\.0",),
    "dinov3_convnext": (r"model\.stages\.[1-9]\d*\.downsample_layers\.0",),  # in the first stage a convolution
    "mobilevit": (r"encoder\.layer\.\d+\.layernorm",),
    "mobilevitv2": (r"encoder\.layer\.\d+\.layernorm",),
    "poolformer": (),
}
# models with modules outside the blocks, in every task, whose names end as those of blocks: in SigLIP's pooling
_NAMED_ALIKE = frozenset({"perceiver", "siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"})
_TRANSPOSED = frozenset({"imagegpt"})  # its linears are `Conv1D`, which OSF passes by without a word
# models with a second tower or a decoder whose modules are called as those of the backbone
_AMBIGUOUS = _NAMED_ALIKE | {
    *("blip-2", "clip", "clipseg", "dpt", "hiera", "metaclip_2", "owlv2", "owlvit", "videomae", "vit_mae"),
}

_added: dict[tuple[str, str], Targets] = {}
_timm: dict[str, Architecture] = {}
_held: dict[str, dict[str, None]] = {}  # patterns by method
_owned: dict[tuple[str, str], str] = {}  # by method and model type, of holders that have backbones of their own, too


def add_defaults(architecture: Architecture) -> None:
    """Tell peft the targets in an architecture. What peft or the user has said about a model type stays.

    Args:
        architecture: whose `model_types` get entries, or new ones where the present ones are from here. Of timm's
            models all have the type of transformers' wrapper around them, whose entry is that of all their tables.
    """
    for model_type in architecture.model_types:
        for method, mapping, targets in _targets_by_method(architecture, model_type):
            if model_type in _HOLDERS and isinstance(targets, str):
                _owned[method, model_type] = targets
                targets = _in_holder(method, model_type)
            _add(method, mapping, model_type, targets)
    if any(name.endswith("Backbone") for name in architecture.backbones):
        for method, mapping, found in _targets_by_method(architecture, _HELD):
            patterns = _held.setdefault(method, {})
            if isinstance(found, str) and found not in patterns:
                patterns[found] = None
                for holder in _HOLDERS:
                    _add(method, mapping, holder, _in_holder(method, holder))
    names = [name for name in architecture.backbones if name.startswith("timm.") and ":" not in name]
    if names:
        _timm.update(dict.fromkeys(names, architecture))
        tables = [replace(table, model_types=(TIMM_WRAPPER,)) for table in _timm.values()]
        for together in zip(*(_targets_by_method(table, TIMM_WRAPPER) for table in tables), strict=True):
            method, mapping, _ = together[0]
            _add(method, mapping, TIMM_WRAPPER, _union([targets for _, _, targets in together]))


def _in_holder(method: str, holder: str) -> str:
    """The pattern of all backbones that a model may hold, and of its own where it has one."""
    patterns, own = _held.get(method), _owned.get((method, holder))
    held = rf"{_HOLDERS[holder]}\.{_one_of(patterns)}" if patterns else None
    return "|".join(filter(None, (own, held)))


def _targets_by_method(architecture: Architecture, model_type: str) -> Iterator[tuple[str, dict[str, Any], Targets]]:
    """Each method of peft with its dictionary and what belongs there; most have the same, which is found once."""
    known: dict[Any, Targets] = {}
    for method, (mapping, find) in _MAPPINGS.items():
        if find not in known:
            known[find] = find(architecture, model_type)
        yield method, mapping, known[find]


def _add(method: str, mapping: dict[str, Any], model_type: str, targets: Targets) -> None:
    if mapping.get(model_type) != _added.get((method, model_type)):
        return
    _added[method, model_type] = targets
    if targets is None:
        mapping.pop(model_type, None)
    else:
        mapping[model_type] = targets


def _union(found: Iterable[Targets]) -> Targets:
    """Lists joined; of patterns, which for wrapped models start at the wrapped one, any may match."""
    some = [targets for targets in found if targets is not None]
    names = [name for targets in some if isinstance(targets, list) for name in targets]
    patterns = [targets for targets in some if isinstance(targets, str)]
    return "|".join(dict.fromkeys(patterns)) or list(dict.fromkeys(names)) or None


def linears_of(architecture: Architecture, model_type: str, convolutional: bool = True) -> Targets:
    """Where LoRA and its like act: names where these are clear, else a regular expression.

    peft passes by `layers_to_transform` where it has a regular expression.

    Args:
        architecture: the role table.
        model_type: of these it has.
        convolutional: whether the method can act on convolutions.
    """
    for names in attention_or_mlp(architecture):
        if names:
            usable = tuple(name for name in names if convolutional or not _is_convolution(name))
            return _targets(architecture, model_type, usable)
    known = next((name for name in (model_type, *architecture.model_types) if name in _CONVOLUTIONS), None)
    if convolutional and known:
        return _pattern(architecture, _CONVOLUTIONS[known], model_type)
    return None


def attention_or_mlp(architecture: Architecture) -> tuple[tuple[str, ...], ...]:
    """Names of query and value (of key, where there is no value), and those of the MLP's linears; either may be none.

    Args:
        architecture: the role table.
    """
    attention = (*architecture.query, *(architecture.value or architecture.key)) if architecture.query else ()
    return tuple(dict.fromkeys(attention)), (*architecture.fc1, *architecture.fc2)


def _only_linears(architecture: Architecture, model_type: str) -> Targets:
    return linears_of(architecture, model_type, convolutional=False)


def _values(architecture: Architecture, model_type: str) -> Targets:
    names = tuple(name for name in architecture.value if not _is_convolution(name))
    return _targets(architecture, model_type, names)


def _all_linears(architecture: Architecture, model_type: str) -> Targets:
    if model_type in _TRANSPOSED:
        return None
    roles = ("query", "key", "value", "output", "fc1", "fc2")
    names = dict.fromkeys(name for role in roles for name in getattr(architecture, role))
    return _targets(architecture, model_type, tuple(name for name in names if not _is_convolution(name)))


def _ia3_targets(architecture: Architecture, model_type: str) -> Targets:
    """Where IA3 acts, as names, since it reads no regular expressions here: in a text tower, too.

    Where the name of fc2 is the end of that of the projection after attention, this one stands for the value: its
    input is a weighted mean of values, so scaling the one or the other is the same.
    """
    if model_type in _NAMED_ALIKE:
        return None
    fc2 = architecture.fc2
    output = tuple(name for name in architecture.output if name.endswith(tuple(f".{last}" for last in fc2)))
    value = () if output and fc2 else architecture.value
    return list(dict.fromkeys((*architecture.key, *value, *fc2))) or None


def _ia3_feedforward(architecture: Architecture, model_type: str) -> Targets:
    return list(architecture.fc2) if _ia3_targets(architecture, model_type) else None


def norms_of(architecture: Architecture, model_type: str = "") -> str | None:
    """A regular expression for the full names of all norms of the backbone, or None for one with batch norms alone.

    Names alone would not do: norms inside attention or a decoder may be called the same, and those in the text tower
    of CLIP and SigLIP are. A pattern cannot see a model's options, so these need naming in `target_modules`:

    - Norms of the pooled output match where the backbone is the whole model only. Inside another one image
      classification does not read them, and parameters without a gradient stop distributed training; contrastive
      training (`CLIPModel`) and `CLIPVisionModelWithProjection` do.
    - Of several norms behind the blocks the last one alone matches: BEiT and Data2Vec-Vision have one of two, and in
      place of the other an `nn.Identity`, which peft cannot wrap. With `use_mean_pooling=False`, which is not
      transformers' default, it is the other one, `layernorm`. Of timm's models, where it goes by the pooling, none.

    Args:
        architecture: the role table.
        model_type: of these it has.
    """
    operations = architecture.operations if isinstance(architecture.operations, tuple) else ()
    between = architecture.between if isinstance(architecture.between, tuple) else ()
    in_block = [*architecture.norm1, *architecture.norm2]
    if not in_block or model_type == TIMM_WRAPPER:
        return None
    in_block += [name for name in operations if _is_norm(name)]
    inside = rf"{_one_of(map(_escape, _lists(architecture)))}\.\w+\.{_one_of(map(_escape, in_block))}"
    near = [_escape(name) for name in (*architecture.input_norms, *architecture.norms[-1:])]
    known = next((name for name in (model_type, *architecture.backbones) if name in _NORMS_BETWEEN), "")
    near += _NORMS_BETWEEN.get(known, [_escape(name) for name in between if _is_norm(name)])
    anywhere = _one_of((inside, *dict.fromkeys(near)))
    if model_type == _HELD:
        return anywhere
    whole = "".join(f"|{_escape(name)}" for name in (*architecture.pooled_norms, *architecture.outer_norms))
    return rf"(?!(?:.*\.)?text_model\.)(?:.*\.)?{anywhere}{whole}"


def _targets(architecture: Architecture, model_type: str, names: tuple[str, ...]) -> Targets:
    """These modules of a block: by their names, or by a pattern where others have names with such ends."""
    if not names:
        return None
    roles = ("norm1", "query", "key", "value", "output", "norm2", "fc1", "fc2", "operations")
    tables = (getattr(architecture, role) for role in roles)
    others = {name for table in tables if isinstance(table, tuple) for name in table} - set(names)
    double = any(other.endswith(f".{name}") for other in others for name in names)
    if double or model_type in (*_AMBIGUOUS, TIMM_WRAPPER, _HELD) or any("*" in name for name in names):
        return _pattern(architecture, rf"\w+\.{_one_of(map(_escape, names))}", model_type)
    return list(names)


def _pattern(architecture: Architecture, rest: str, model_type: str) -> str:
    inside = rf"{_one_of(map(_escape, _lists(architecture)))}\.{rest}"
    if model_type == _HELD:
        return inside
    if TIMM_WRAPPER in architecture.model_types:
        return rf"(?:.*\.)?timm_model\.{inside}"
    return rf"(?!(?:.*\.)?text_model\.)(?:.*\.)?{inside}"


def _lists(architecture: Architecture) -> tuple[str, ...]:
    return (architecture.blocks,) if isinstance(architecture.blocks, str) else architecture.blocks


def _escape(name: str) -> str:
    return re.escape(name).replace(r"\*", r"\w+")


def _one_of(names: Iterable[str]) -> str:
    first, *others = names
    return f"(?:{'|'.join((first, *others))})" if others else first


def _is_norm(name: str) -> bool:
    return "norm" in name.rpartition(".")[2]


def _is_convolution(name: str) -> bool:
    """Whether a linear of a role table is a convolution of one pixel, going by what these are called."""
    return name.rpartition(".")[2].startswith("conv")


def _find_mappings() -> dict[str, tuple[dict[str, Any], Callable[[Architecture, str], Targets]]]:
    """The dictionaries of peft from model types to targets, by method, and what belongs in them."""
    special: Mapping[str, Callable[[Architecture, str], Targets]] = {
        "BEFT": _values,
        "LN_TUNING": norms_of,
        "OSF": _all_linears,
    }
    found: dict[str, tuple[dict[str, Any], Callable[[Architecture, str], Targets]]] = {}
    for peft_type, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        method = str(getattr(peft_type, "value", peft_type))
        mapping = getattr(tuner, "target_module_mapping", None)
        if mapping and tuner.__module__.startswith("peft."):  # some methods have none, or look for themselves
            usual = linears_of if method in CONVOLUTIONAL_METHODS else _only_linears
            found[method] = (mapping, special.get(method, usual))
    found["IA3"] = (IA3_TARGETS, _ia3_targets)
    found[_FEEDFORWARD] = (IA3_FEEDFORWARD, _ia3_feedforward)
    return found


_MAPPINGS = _find_mappings()
METHODS = tuple(name for name in _MAPPINGS if name != _FEEDFORWARD)
"""The methods of peft that get targets here, by `peft_type`."""

on_registration(add_defaults)
