"""The targets of peft's own methods in a backbone, found in the model itself.

| method | acts on |
|---|---|
| LoRA and the other methods for linears | query and value, or the one linear that holds both; without them the linears of the MLP; without these the dense convolutions of the blocks |
| BEFT | value |
| OSF | all linears of attention and MLP |
| IA3 | key, value and the last linear of the MLP |
| LN tuning | all norms of the backbone but batch norms, and these where there are no others: on ViT-B/16 38,400 parameters |
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.ia3 import IA3Model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..backbones.architectures import Architecture
from ..backbones.backbone import LINEAR_ROLES, Block, VisionBackbone, unwrapped
from ..backbones.frozen_norms import keeps_statistics
from ..sites.affine import is_linear_in_weight


# methods of peft that also act on Conv2d
CONVOLUTIONAL_METHODS = frozenset({"ADALORA", "BOFT", "HIRA", "HRA", "IA3", "LOHA", "LOKR", "LORA", "OFT"})


def _find_tuners() -> dict[str, type[BaseTuner]]:
    """The tuners of peft that look up their targets by the type of the model, by `peft_type`."""
    found: dict[str, type[BaseTuner]] = {}
    for peft_type, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        of_peft = tuner.__module__.startswith("peft.")  # some methods have no such table, or find targets themselves
        if of_peft and (getattr(tuner, "target_module_mapping", None) or tuner is IA3Model):
            found[str(getattr(peft_type, "value", peft_type))] = tuner
    return found


TUNERS = _find_tuners()
METHODS = tuple(TUNERS)
"""The methods of peft that get targets here, by `peft_type`."""


def method_of(config: PeftConfig) -> str:
    """The `peft_type` of a config as in files."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def fill_targets(config: Any, model: nn.Module, backbone: VisionBackbone, short: bool = False) -> None:
    """Put the targets of a method into the fields of its config that are None.

    Args:
        config: of one of `METHODS`.
        model: with or without adapters.
        backbone: in the model.
        short: whether to use ends of names where these mean the same modules, so that they also fit larger models.

    Raises:
        ValueError: the method has nothing to act on.
    """
    method = method_of(config)
    given = config.target_modules is not None or getattr(config, "target_parameters", None) is not None
    if not given:
        part = backbone.select(_layers(config, backbone))
        paths = _TARGETS.get(method, _linears)(model, part, method in CONVOLUTIONAL_METHODS)
        if not paths:
            raise ValueError(
                f"{type(config).__name__} has nothing to act on in {backbone.class_name}: "
                f"{_REASONS.get(method, _NO_LINEARS)}. Name modules in target_modules, or choose another method."
            )
        config.target_modules = _named(model, paths, method, short)
        for name in ("layers_to_transform", "layers_pattern"):  # the names are those of the chosen blocks
            if hasattr(config, name):
                setattr(config, name, None)
    if method == "IA3" and config.feedforward_modules is None:
        paths = _of_roles(model, backbone, ("fc2",))
        targets = config.target_modules
        alike = isinstance(targets, set) and _ends(model, paths)
        config.feedforward_modules = alike if alike and alike <= targets else _pattern(paths)


def _named(model: nn.Module, paths: list[str], method: str, short: bool) -> set[str] | str:
    """Names by which peft finds exactly these modules; a regular expression if full names would find more."""
    if short and (ends := _ends(model, paths)):
        return ends
    # peft may shorten a set of names, and then refuses the file of IA3, because its two fields no longer agree
    return set(paths) if method != "IA3" and not _is_end(model, paths) else _pattern(paths)


def _ends(model: nn.Module, paths: Iterable[str]) -> set[str]:
    """The shortest ends of names that only these modules have; none if there are none."""
    wanted = set(paths)
    names = [path for path, _ in model.named_modules()]
    for count in range(1, max((path.count(".") for path in wanted), default=0)):
        ends = {".".join(path.split(".")[-count:]) for path in wanted}
        if not any(end[0].isdigit() for end in ends):
            dotted = tuple(f".{end}" for end in ends)
            if {name for name in names if f".{name}".endswith(dotted)} == wanted:
                return ends
    return set()


_NO_LINEARS = "its blocks have no linears that the method supports"
_REASONS = {
    "BEFT": "it has no linear for values",
    "IA3": "it has no keys, no values and no MLP",
    "LN_TUNING": "it has no norms with weights",
}


def _layers(config: Any, backbone: VisionBackbone) -> list[int] | None:
    given = getattr(config, "layers_to_transform", None)
    if given is None or given == []:
        return None
    layers = [given] if isinstance(given, int) else list(given)
    if not all(0 <= layer < backbone.depth for layer in layers):
        raise ValueError(
            f"{type(config).__name__}.layers_to_transform is {given!r}: {backbone.class_name} has the blocks 0 to "
            f"{backbone.depth - 1}."
        )
    return layers


def _linears(model: nn.Module, backbone: VisionBackbone, convolutional: bool) -> list[str]:
    """Query and value (or key), else the MLP, else dense convolutions: the first that the method supports."""
    tables = [_table(block, backbone) for block in backbone.blocks]
    values = "value" if any(table.value for table in tables) else "key"
    attention = ("query", values) if any(table.query for table in tables) else ()
    for roles in (attention, ("fc1", "fc2")):
        found = _of_roles(model, backbone, roles, convolutional)
        if found:
            return found
    operations = (path for block in backbone.blocks for path in block.roles["operations"])
    return [
        path
        for path in operations
        if convolutional
        and _is_dense(unwrapped(model.get_submodule(path)))
        and not _is_read(model.get_submodule(path.rpartition(".")[0]))
    ]


def _values(model: nn.Module, backbone: VisionBackbone, convolutional: bool) -> list[str]:
    return _of_roles(model, backbone, ("value",), convolutional)


def _all_linears(model: nn.Module, backbone: VisionBackbone, convolutional: bool) -> list[str]:
    found = _of_roles(model, backbone, LINEAR_ROLES, convolutional)
    return [path for path in found if not isinstance(unwrapped(model.get_submodule(path)), Conv1D)]  # OSF passes by


def _ia3(model: nn.Module, backbone: VisionBackbone, convolutional: bool) -> list[str]:
    return _of_roles(model, backbone, ("key", "value", "fc2"), convolutional)


def _norms(model: nn.Module, backbone: VisionBackbone, convolutional: bool) -> list[str]:
    roles = ("norm1", "norm2", "further_norms")
    paths = [*(path for block in backbone.blocks for path in block.modules(roles)), *backbone.norms]
    norms = {path: unwrapped(model.get_submodule(path)) for path in paths}
    weighted = {path: norm for path, norm in norms.items() if any(True for _ in norm.parameters(recurse=False))}
    # peft trains copies of norms, for batch norms with their statistics, which are noisy after few batches
    return [path for path, norm in weighted.items() if not keeps_statistics(norm)] or list(weighted)


_TARGETS: Mapping[str, Callable[[nn.Module, VisionBackbone, bool], list[str]]] = {
    "BEFT": _values,
    "IA3": _ia3,
    "LN_TUNING": _norms,
    "OSF": _all_linears,
}


def _of_roles(
    model: nn.Module, backbone: VisionBackbone, roles: Iterable[str], convolutional: bool = True
) -> list[str]:
    """Full names of the linears in some roles, including those of attention that pools tokens."""
    found = []
    for block in backbone.blocks:
        names = [name for role in roles for name in getattr(_table(block, backbone), role)]
        wanted = re.compile("|".join(re.escape(name).replace(r"\*", r"\w+") for name in names) or "(?!)")
        found += [
            f"{block.path}.{name}"
            for name, module in model.get_submodule(block.path).named_modules()
            if wanted.fullmatch(name)
            and (isinstance(base := unwrapped(module), nn.Linear | Conv1D) or (convolutional and _is_dense(base)))
        ]
    return found


def _table(block: Block, backbone: VisionBackbone) -> Architecture:
    """The role table of a block; blocks may have their own."""
    return getattr(block, "table", None) or backbone.architecture


def _is_dense(module: nn.Module) -> bool:
    """Whether a module is a convolution without groups that peft's layers support.

    peft's layers copy kernel, stride and padding, but not dilation or padding modes other than zeros. They merge by
    adding weights, which a convolution that standardises its weight would rescale.
    """
    if not isinstance(module, nn.Conv2d) or module.groups != 1:
        return False
    dilated = any(step > 1 < size for step, size in zip(module.dilation, module.kernel_size, strict=True))
    return not dilated and module.padding_mode == "zeros" and is_linear_in_weight(module)


def _is_read(parent: nn.Module) -> bool:
    """Whether a module reads the stride of its convolution, to pad as in TensorFlow; peft's layers have no stride."""
    names = ("MobileNetV1ConvLayer", "MobileNetV2ConvLayer")
    return type(parent).__name__ in names and bool(getattr(parent.config, "tf_padding", False))


def _is_end(model: nn.Module, paths: Iterable[str]) -> bool:
    """Whether another module's name ends in one of these, so that peft would also take it as a target."""
    names = set(paths)
    others = (path.split(".") for path, _ in model.named_modules() if path not in names)
    return any(".".join(parts[start:]) in names for parts in others for start in range(1, len(parts)))


def _pattern(paths: Iterable[str]) -> str:
    return "|".join(map(re.escape, paths))
