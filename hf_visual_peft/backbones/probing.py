"""Finds the parts that a model uses, by one backward pass through a copy that shares its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from .backbone import unwrapped
from .examples import images_of, named_for, of_samples


_SMALL = 50_000_000  # parameters up to which a model runs faster than its copy on the meta device
_ON_THE_WAY = ("hidden_states", "hidden_state", "attentions", "model_output")


@dataclass(frozen=True)
class Seen:
    """The use of some modules.

    Attributes:
        read: modules whose weights affect the output.
        called: modules that were called.
        whole: whether the whole model ran, and not only its image features.
    """

    read: frozenset[str]
    called: frozenset[str]
    whole: bool


def probe(model: nn.Module, paths: Iterable[str], tower: str = "") -> Seen | None:
    """Run a copy of a model on an image and find out which modules matter. The model itself is not changed.

    The copy shares the weights of the model; for a large model its tensors are on the meta device, where nothing is
    computed. If one of them does not run, the other is tried. Adapters are switched off.

    Args:
        model: takes images, or has the usual `get_image_features`.
        paths: names of the modules.
        tower: name of the module that takes the images.

    Returns:
        None where the model cannot be run on an image alone, or nothing in it can get a gradient.
    """
    paths = list(dict.fromkeys(paths))
    tensors = [*model.parameters(), *model.buffers()]
    small = sum(tensor.numel() for tensor in tensors) < _SMALL
    for on_meta in (False, True) if small else (True, False):
        if on_meta or not any(tensor.is_meta for tensor in tensors):
            seen = _run(model, paths, tower, on_meta)
            if seen is not None:
                return seen
    return None


def _run(model: nn.Module, paths: list[str], tower: str, on_meta: bool) -> Seen | None:
    devices = {p.device.index or 0 for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        # any error: an unknown model may not run on an image alone, which proves nothing
        try:
            twin = _copy(model, on_meta)
            layouts = list(images_of(twin.get_submodule(tower)))
        except Exception:
            return None
        for call, whole in (each for images in layouts for each in _calls(twin, tower, images)):
            try:
                seen = _look(twin, paths, call, whole)
            except Exception:
                continue
            if seen is not None:
                return seen
    return None


def _copy(model: nn.Module, on_meta: bool) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        value = torch.empty_like(parameter, device="meta") if on_meta else parameter.detach()
        memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta") if on_meta else buffer.clone()
    twin = copy.deepcopy(model, memo).eval()
    for module in twin.modules():
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            module.enable_adapters(False)
    return twin.requires_grad_(False)


def _calls(twin: nn.Module, tower: str, images: Mapping[str, Tensor]) -> Iterator[tuple[Callable[[], Any], bool]]:
    """Ways to run a model on images, and whether they run the whole model."""
    if hasattr(twin, "main_input_name"):  # of transformers
        yield lambda: twin(**images), True
    else:
        yield lambda: twin(*images.values()), True
    names = tower.split(".") if tower else []
    for depth in range(len(names) + 1):
        features = getattr(twin.get_submodule(".".join(names[:depth])), "get_image_features", None)
        if features is not None:
            for given in filter(None, (images, of_samples(images))):
                yield partial(features, **named_for(features, given)), False


def _look(twin: nn.Module, paths: list[str], call: Callable[[], Any], whole: bool) -> Seen | None:
    modules = {path: _base(twin.get_submodule(path)) for path in paths}
    weights = {
        path: [p.requires_grad_() for p in module.parameters() if p.is_floating_point()]
        for path, module in modules.items()
    }
    called: set[str] = set()
    for path, module in modules.items():
        module.register_forward_hook(lambda *_, path=path: called.add(path))
    output = call()
    if not whole:  # image features, beside intermediate states
        output = getattr(output, "pooler_output", output)
    outputs = [tensor.sum() for tensor in _tensors(output) if tensor.requires_grad]
    if not outputs:
        return None
    wanted = list({id(p): p for parameters in weights.values() for p in parameters}.values())
    gradients = torch.autograd.grad(torch.stack([o.float() for o in outputs]).sum(), wanted, allow_unused=True)
    reached = {id(p) for p, gradient in zip(wanted, gradients, strict=True) if gradient is not None}
    read = {path for path, parameters in weights.items() if any(id(p) in reached for p in parameters)}
    return Seen(frozenset(read), frozenset(called), whole)


def _base(module: nn.Module) -> nn.Module:
    return unwrapped(module.original_module if isinstance(module, ModulesToSaveWrapper) else module)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a model's output; of a mapping without the intermediate states."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        answers = [value for key, value in output.items() if not str(key).endswith(_ON_THE_WAY)]
        yield from _tensors(answers or list(output.values()))
    elif isinstance(output, list | tuple):
        for item in output:
            yield from _tensors(item)
