"""The site before a single linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .layer import Equation, call_equation
from .module import ModuleLayer, _Weights, channel_dim, moved
from .module_sites import WeightSite


@dataclass(frozen=True)
class InputSite(WeightSite):
    """The input of one linear. The equation is an `OnInput`."""

    def describe(self, names: Mapping[str, str]) -> str:
        """Of which linear."""
        return "input of {}"


class OnInput(nn.Module):
    """An affine map on the input of a linear, which can be folded into its weight and bias.

    Args:
        equation: called with the input, (..., in_features); returns the new input. It has `fold_input(weight, bias) ->
            (weight, bias)`.
    """

    def __init__(self, equation: nn.Module) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The new weight and bias, from the old ones."""
        fold: Any = self.equation.fold_input
        return fold(weight, bias)


class InputLayer(ModuleLayer):
    """A linear, or a convolution that is one, with equations also on its input.

    With several adapters the last one acts first on the input, as when they are merged one after the other.
    """

    def _base_output(self, *args: Any, **kwargs: Any) -> Tensor:
        equations = [e for e in self._active() if not e.site.around]
        on_input = [e for e in equations if e.site.own_layer is InputLayer]
        if not on_input:
            return super()._base_output(*args, **kwargs)
        x, *rest = args
        base = self.get_base_layer()
        dim = channel_dim(base, x.ndim)
        x = moved(x, dim, -1)
        for equation in reversed(on_input):
            x = call_equation(self, equation.module.equation, x)
        x = moved(x, -1, dim)
        return self._changed_output([e for e in equations if e not in on_input], x, *rest, **kwargs)

    def _fold(self, weights: _Weights, equations: list[Equation]) -> _Weights:
        return super()._fold(weights, sorted(equations, key=lambda e: e.site.own_layer is InputLayer))


InputSite.own_layer = InputLayer
