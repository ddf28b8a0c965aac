"""The sites at a single linear, norm or convolution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from ..backbones.backbone import VisionBackbone, running
from ..tables import listed
from .site import ModuleSite


class OutputEquation(Protocol):
    """What an equation on the output of a module is called with."""

    def __call__(self, output: Tensor, *shared: nn.Module) -> Tensor:
        """The new output, (..., channels)."""
        ...


class LinearEquation(Protocol):
    """What an equation on the output and the input of a module is called with."""

    def __call__(self, output: Tensor, x: Tensor, *shared: nn.Module) -> Tensor:
        """The new output, (..., channels)."""
        ...


class WeightEquation(Protocol):
    """What an equation on the weight and the bias of a module is called with."""

    def __call__(self, weight: Tensor, bias: Tensor | None, *shared: nn.Module) -> tuple[Tensor, Tensor | None]:
        """The new ones."""
        ...


@dataclass(frozen=True)
class OutputSite(ModuleSite):
    """The output of one module. The equation is called with it, (..., channels), and returns the new output.

    Attributes:
        followers: full names of the linears and convolutions that read the output, if the equation merges into them
            and not into the module. It then has `fold_input(weight, bias, *shared) -> (weight, bias)` in place of
            `fold`. Empty if it is not known which modules read the output.
        channelwise: whether the equation is `scale * x + shift`, with these two parameters, one element per channel. A
            layer norm then applies it with its own weight and bias, which keeps no extra activations.
    """

    followers: tuple[str, ...] | None = None
    channelwise: bool = False
    around = True

    def connect(self, layer: Any, model: nn.Module, backbone: VisionBackbone | None) -> None:
        """Tell the layer which modules read the output."""
        for path in self.followers or ():
            layer.followers[path] = partial(running, model, path)

    def describe(self, names: Mapping[str, str]) -> str:
        """Whose output, and where it merges."""
        into = listed(list(dict.fromkeys(names[path] for path in self.followers or ())))
        return "output of {}" + (f", merging into {into}" if into else "")


@dataclass(frozen=True)
class LinearSite(ModuleSite):
    """Output and input of one module. The equation is called with both, and returns the new output."""

    around = True
    reads_input = True

    def describe(self, names: Mapping[str, str]) -> str:
        """Of which module."""
        return "input and output of {}"


@dataclass(frozen=True)
class WeightSite(ModuleSite):
    """Weight and bias of one module. The equation is called with both and returns the new ones.

    The bias may be None. The same call merges the equation.
    """

    def describe(self, names: Mapping[str, str]) -> str:
        """Of which module."""
        return "weight and bias of {}"
