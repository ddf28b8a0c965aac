"""The sites at a single linear, norm or convolution."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from .exchange import Exchange
from .layer import Equation, Site, VisualTunerLayer, call_equation


@dataclass(frozen=True)
class OutputSite(Site):
    """The output of one module. The equation is called with it and returns what takes its place.

    Attributes:
        followers: full names of the linears that read the output, where the equation merges into them and not into
            the module. It then has `fold_input(weight, bias, *shared) -> (weight, bias)` in place of `fold`.
    """

    followers: tuple[str, ...] = ()


@dataclass(frozen=True)
class LinearSite(Site):
    """Beside and behind one module. The equation is called with its output and its input, and replaces the output."""


@dataclass(frozen=True)
class WeightSite(Site):
    """Weight and bias of one module. The equation is called with both and returns those that take their place.

    The bias may be None. That call is also how the equation merges.
    """


class _Weights(NamedTuple):
    """Weight and bias of one module."""

    module: nn.Module
    weight: Tensor
    bias: Tensor | None


class ModuleLayer(VisualTunerLayer, nn.Module):
    """A linear, norm or convolution with equations on its weight and bias and on its output.

    An equation that can be merged has `fold(weight, bias, *shared) -> (weight, bias)`, where `bias` may be None.

    Args:
        base_layer: the module.
        exchange: shared with the other adapter layers of the model.
    """

    def __init__(self, base_layer: nn.Module, exchange: Exchange) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._init_layer(exchange)
        self.followers: dict[str, nn.Module] = {}  # a plain dictionary: they are no submodules of the layer
        self._before_merge: list[_Weights] = []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output with the equations of the active adapters at work."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(*args, **kwargs)
        output = self._base_output(*args, **kwargs)
        for _, equation, site, shared in self._active():
            if not isinstance(site, WeightSite):
                read = args[:1] if isinstance(site, LinearSite) else ()
                output = call_equation(self, equation, output, *read, *shared)  # type: ignore[arg-type]
        return output

    def _base_output(self, *args: Any, **kwargs: Any) -> Tensor:
        equations = [e for e in self._active() if isinstance(e.site, WeightSite)]
        if not equations:
            return self.base_layer(*args, **kwargs)
        weights = _weights_of(self.get_base_layer())
        new = _apply(equations, weights)
        return _evaluate(weights.module, args[0], new.weight, new.bias)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into weight and bias of the module, or of the linears that follow it.

        Args:
            safe_merge: whether to check the result and leave the modules as they are if it is not finite.
            adapter_names: which, in this order; the active ones by default.

        Raises:
            ValueError: the result is not finite (with `safe_merge`), or a module has no place for it.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.plans]
        if not names:
            return
        equations = [e for name in (*self.merged_adapters, *names) for e in self.equations_of(name)]
        # all from the weights before any merge: what follows a module does not fold in the order it came in
        before = self._before_merge or [_weights_of(module) for module in self._merged_into(equations)]
        after = [self._fold(weights, equations) for weights in before]
        if safe_merge and not all(t.isfinite().all() for w in after for t in w[1:] if t is not None):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
        self._before_merge = before
        for weights in after:
            _set(weights)
        self.merged_adapters.extend(names)

    def _merged_into(self, equations: list[Equation]) -> list[nn.Module]:
        followers = [path for e in equations for path in getattr(e.site, "followers", ())]
        own = any(not getattr(e.site, "followers", ()) for e in equations)
        return [
            *([self.get_base_layer()] if own else []),
            *(self.followers[path] for path in dict.fromkeys(followers)),
        ]

    @torch.no_grad()
    def _fold(self, weights: _Weights, equations: list[Equation]) -> _Weights:
        if weights.module is not self.get_base_layer():
            behind = [e for e in equations if getattr(e.site, "followers", ())]
            weight, bias = weights.weight, weights.bias
            for _, equation, _, shared in reversed(behind):  # the last to act on the input is the next to the linear
                weight, bias = equation.fold_input(weight, bias, *shared)  # type: ignore[union-attr,operator]
            return _Weights(weights.module, weight, bias)
        new = _apply([e for e in equations if isinstance(e.site, WeightSite)], weights)
        weight, bias = new.weight, new.bias
        for _, equation, site, shared in equations:
            if not isinstance(site, WeightSite):
                weight, bias = equation.fold(weight, bias, *shared)  # type: ignore[union-attr,operator]
        return _Weights(weights.module, weight, bias)

    def unmerge(self) -> None:
        """Put back weights and biases exactly as they were before the first merge."""
        if not self._before_merge:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for module, weight, bias in self._before_merge:
            base: Any = module
            base.weight.data = weight.to(base.weight)
            if bias is None:
                base.bias = None
            else:
                base.bias.data = bias.to(base.bias)
        self._before_merge = []
        self.merged_adapters.clear()


def _weights_of(module: nn.Module) -> _Weights:
    """The tensors that an equation changes.

    Raises:
        ValueError: the module has no floating-point weight, as where it is quantised.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is None or not weight.is_floating_point():
        raise ValueError(f"Cannot merge an adapter into {module}: it has no floating-point weight.")
    return _Weights(module, weight.data, None if bias is None else bias.data)


def _apply(equations: Iterable[Equation], weights: _Weights) -> _Weights:
    """Weight and bias after equations that change them, in the dtype they have."""
    module, weight, bias = weights
    for _, equation, _, shared in equations:
        new_weight, new_bias = equation(weight, bias, *shared)  # type: ignore[misc]
        weight, bias = new_weight.to(weight.dtype), None if new_bias is None else new_bias.to(weight.dtype)
    return _Weights(module, weight, bias)


def _evaluate(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The module's output with another weight and bias.

    Raises:
        ValueError: it is not known how.
    """
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    if type(module) is nn.LayerNorm:
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module._conv_forward(x, weight, bias)
    raise ValueError(f"Cannot run {module} with another weight: valid are linears, layer norms and convolutions.")


def _set(weights: _Weights) -> None:
    """Give a module weight and bias, also one that it did not have.

    Raises:
        ValueError: modules of its class have no bias.
    """
    base: Any = weights.module
    base.weight.data = weights.weight
    if base.bias is not None:
        base.bias.data = weights.bias
    elif weights.bias is not None:
        if not isinstance(base, nn.Linear | nn.LayerNorm | nn.modules.conv._ConvNd):
            raise ValueError(f"Cannot merge a shift into {base}: modules of its class have no bias.")
        warnings.warn(
            f"{base} gets a bias by merging. Saved, the merged model needs a config that gives it one when loaded.",
            stacklevel=4,
        )
        base.bias = nn.Parameter(weights.bias, requires_grad=False)
