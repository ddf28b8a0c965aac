"""Run a copy of a backbone in which repeated blocks are skipped."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import NotRunError
from .examples import inputs_for
from .paths import is_in
from .watching import Call, Trace, shared_copy, watch


_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_MANY = 20_000_000  # parameters from which repeated blocks are skipped


_SHOWN = 6  # arguments in a message
_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class StopRun(Exception):  # noqa: N818 - not an error
    """Ends a run early."""


@dataclass
class Ran:
    """A recorded run.

    Attributes:
        twin: the copy, with the weights of the model.
        args: that it was run with.
        kwargs: of the run.
        trace: the recorded graph.
        kinds: of items of lists: equal for items of equal structure.
        skipped: skipped items, each with the item of equal structure that has run, by name.
        given: arguments of the items of lists, by name.
        pretrained: whether the model is one of timm or transformers.
    """

    twin: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    trace: Trace
    kinds: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    given: dict[str, tuple[tuple, dict]] = field(default_factory=dict)
    pretrained: bool = False

    def calls(self) -> dict[str, Call]:
        """The first call of each module, in order; for skipped items that of the item that has run."""
        found = self.trace.first_calls()
        order = {path: (float(position), 0) for position, path in enumerate(found)}
        for skipped, like in self.skipped.items():
            call = found[skipped]
            inner = [path for path in found if path != like and is_in(path, like)]
            for position, path in enumerate(inner, start=1):
                name = skipped + path.removeprefix(like)
                found[name] = replace(found[path], start=call.start, end=call.end)
                order[name] = (order[skipped][0], position)
        return dict(sorted(found.items(), key=lambda item: order[item[0]]))

    def as_run(self, path: str) -> str:
        """The module that has run in place of a module; itself if it has run."""
        return next((like + path.removeprefix(s) for s, like in self.skipped.items() if is_in(path, s)), path)

    def alike(self, path: str) -> list[str]:
        """A module and the skipped modules that it represents."""
        return [path, *(s + path.removeprefix(like) for s, like in self.skipped.items() if is_in(path, like))]


def run_shallow(backbone: nn.Module, example_inputs: Any = None) -> Ran:
    """Run a copy and record it.

    Raises:
        NotRunError: it does not run on any of the inputs that could be made.
    """
    twin = shared_copy(backbone)
    reasons = []
    for args, kwargs in inputs_for(twin, example_inputs):
        kinds = _kinds(twin)
        given: dict[str, tuple[tuple, dict]] = {}
        skipped: dict[str, str] = {}
        handles = _pass_by(twin, kinds, given, skipped)
        devices = {p.device.index or 0 for p in twin.parameters() if p.is_cuda}
        try:
            with torch.random.fork_rng(devices), torch.inference_mode(False):
                trace = watch(twin, args, kwargs)
        except Exception as error:  # any error of an unknown model
            reasons.append((_described(args, kwargs), error))
            continue
        finally:
            for undo in handles:
                undo()
        pretrained = hasattr(twin, "pretrained_cfg") or hasattr(twin, "base_model_prefix")
        return Ran(twin, args, kwargs, trace, kinds, skipped, given, pretrained)
    raise NotRunError(_not_run(backbone, reasons))


def _not_run(backbone: nn.Module, reasons: list[tuple[str, Exception]]) -> str:
    name = type(backbone).__name__
    named = [each for each in inspect.signature(backbone.forward).parameters.values() if each.kind in _NAMED]
    wanted = [each.name for each in named if each.default is each.empty] or [each.name for each in named][:_SHOWN]
    shown = reasons if len(reasons) < 3 else [reasons[0], reasons[-1]]  # the most likely input comes first
    tried = "; ".join(f"{what}: {_said(error)}" for what, error in shown)
    return (
        f"{name} could not be run to see what its modules do. Its forward takes {', '.join(wanted) or 'nothing'}. "
        f"Tried: {tried or 'nothing, because no image size is known'}. Give arguments that it takes: "
        "hf_visual_peft.find_backbone(model, example_inputs={'name': tensor}) before get_peft_model."
    )


def _said(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__} {first[:160]}"


def _described(args: tuple, kwargs: Mapping[str, Any]) -> str:
    parts = [str(tuple(each.shape)) for each in args if isinstance(each, Tensor)]
    parts += [f"{name} {tuple(each.shape)}" for name, each in kwargs.items() if isinstance(each, Tensor)]
    return ", ".join(parts)


def _kinds(twin: nn.Module) -> dict[str, Any]:
    """The structure of the items of lists: classes, sizes and settings of all modules in them."""
    made = {}
    for path, module in twin.named_modules():
        if not isinstance(module, _LISTS):
            continue
        for name, part in module.named_children():
            if any(True for _ in part.children()):
                made[f"{path}.{name}" if path else name] = tuple(
                    (inside, type(each), *_settings(each)) for inside, each in part.named_modules()
                )
    return made


def _settings(module: nn.Module) -> tuple:
    plain = tuple(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, bool | int | str | tuple | type(None))
        and not name.startswith("_")
        and _hashable(value)
        and not name.endswith(("layer_idx", "layer_index"))
    )
    sizes = tuple((name, tuple(p.shape)) for name, p in module._parameters.items() if p is not None)
    return (plain, sizes)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _pass_by(twin: nn.Module, kinds: Mapping[str, Any], given: dict, skipped: dict[str, str]) -> list[Any]:
    """Make items of lists return their input, if an item of equal structure has run and kept the shape."""
    large = sum(p.numel() for p in twin.parameters()) > _MANY
    shapes: dict[Any, tuple[Any, ...]] = {}
    undo: list[Any] = []

    def note(path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given.setdefault(path, (args, kwargs))

    def run(path: str, module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        key = (path.rpartition(".")[0], kinds[path])
        first = args[0] if args else None
        known = shapes.get(key)
        if known is not None and isinstance(first, Tensor) and tuple(first.shape) == known[0]:
            skipped[path] = known[2]
            return first if known[1] is None else (first, *known[1])
        output = forward(*args, **kwargs)
        result = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and isinstance(result, Tensor) and result.shape == first.shape:
            shapes[key] = (tuple(first.shape), output[1:] if isinstance(output, tuple) else None, path)
        return output

    for path, module in twin.named_modules():
        if any(True for _ in module.children()):
            undo.append(module.register_forward_pre_hook(partial(note, path), with_kwargs=True).remove)
    for path in kinds if large else ():
        part: Any = twin.get_submodule(path)
        before = vars(part).get("forward")
        part.forward = partial(run, path, part, part.forward)
        undo.append(partial(_restore, part, before))
    return undo


def _restore(module: Any, before: Any) -> None:
    del module.forward
    if before is not None:
        module.forward = before
