"""The places where calls of a model's modules can be recorded and replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..backbones.backbone import own_children
from ..sites import BlockAdapters


Forward = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class CallPoint:
    """The place where a module's forward can be replaced.

    Attributes:
        path: name of the module in the base model, without adapter layers around it.
        module: the module.
        holder: the object whose attribute the forward is.
        attribute: its name.
    """

    path: str
    module: nn.Module
    holder: nn.Module
    attribute: str

    @property
    def forward(self) -> Forward:
        """The current forward."""
        given = self.holder.__dict__.get(self.attribute)
        return given or partial(type(self.module).forward, self.module)

    def seen(self, output: Any) -> Any:
        """The result of a call: its output, and for a block what its layer recorded inside for side networks."""
        if self.attribute == "forward" or not isinstance(self.holder, BlockAdapters):
            return output
        current = self.holder._pass
        return output, None if current is None else current.between

    def shown(self, seen: Any) -> Any:
        """The output of a skipped call, from what `seen` recorded."""
        if self.attribute == "forward" or not isinstance(self.holder, BlockAdapters):
            return seen
        output, between = seen
        if self.holder._pass is not None:
            self.holder._pass.between = between
        return output

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those in the module, apart from what adapters have in it as a block."""
        own = [p for _, child in own_children(self.module) for p in child.parameters()]
        return [*self.module.parameters(recurse=False), *own]

    @property
    def trains(self) -> bool:
        """Whether anything in the module trains."""
        return any(parameter.requires_grad for parameter in self.parameters)


def call_points(model: nn.Module) -> list[CallPoint]:
    """The points of all modules below the model itself, but for those that take no images (`text_modules`).

    Inside the forward that `BlockAdapters` give their block, the block's own is called: that one is replaced, so that
    the equations around it still run.
    """
    layers = {id(m.get_base_layer()): m for m in model.modules() if isinstance(m, BlockAdapters)}
    texts = [part for m in model.modules() for part in getattr(m, "text_modules", ())]
    of_texts = {id(module) for part in texts for module in part.modules()}
    points = []
    for path, module in model.named_modules():
        if not path or id(module) in of_texts:
            continue
        layer = layers.get(id(module))
        holder, attribute = (module, "forward") if layer is None else (layer, "_forward_before")
        points.append(CallPoint(base_path(path), module, holder, attribute))
    return points


def base_path(path: str) -> str:
    """The name that a module of an adapted model has in the base model."""
    return path.removeprefix("base_model.model.").replace(".base_layer", "")


@contextmanager
def replaced(forwards: Mapping[CallPoint, Forward]) -> Iterator[None]:
    """Replace the forwards of some modules inside the context."""
    before = {point: point.holder.__dict__.get(point.attribute) for point in forwards}
    try:
        for point, forward in forwards.items():
            setattr(point.holder, point.attribute, forward)
        yield
    finally:
        for point, earlier in before.items():
            if earlier is None and point.attribute == "forward":
                point.holder.__dict__.pop(point.attribute, None)
            else:
                setattr(point.holder, point.attribute, earlier)
