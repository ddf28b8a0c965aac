"""The sites at a single linear, norm or convolution."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from .layer import Site, VisualTunerLayer, call_equation


@dataclass(frozen=True)
class OutputSite(Site):
    """The output of one module. The equation is called with it and returns what takes its place."""


@dataclass(frozen=True)
class LinearSite(Site):
    """Beside and behind one module. The equation is called with its output and its input, and replaces the output."""


class ModuleLayer(VisualTunerLayer, nn.Module):
    """A linear, norm or convolution with equations on its output, which may also read its input.

    An equation that can be merged has `fold(weight, bias) -> (weight, bias)`, where `bias` may be None.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._init_layer()
        self._before_merge: tuple[Tensor, Tensor | None] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output with the equations of the active adapters on it."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        output = self.base_layer(*args, **kwargs)
        if self.merged:
            return output
        for name in self.active_adapters:
            for equation, site in self.equations_of(name):
                read = args[:1] if isinstance(site, LinearSite) else ()
                output = call_equation(self, equation, output, *read)  # type: ignore[arg-type]
        return output

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into weight and bias of the module.

        Args:
            safe_merge: whether to check the result and leave the module as it is if it is not finite.
            adapter_names: which, in this order; the active ones by default.

        Raises:
            ValueError: the result is not finite (with `safe_merge`), or the module has no place for it.
        """
        base = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.plans:
                continue
            weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
            if weight is None or not weight.is_floating_point():
                raise ValueError(f"Cannot merge adapter {name!r} into {base}: it has no floating-point weight.")
            new_weight, new_bias = weight.data, None if bias is None else bias.data
            for equation, _ in self.equations_of(name):
                new_weight, new_bias = equation.fold(new_weight, new_bias)  # type: ignore[union-attr,operator]
            if safe_merge and not all(t.isfinite().all() for t in (new_weight, new_bias) if t is not None):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            if self._before_merge is None:
                self._before_merge = weight.data, None if bias is None else bias.data
            weight.data = new_weight
            if bias is not None:
                bias.data = new_bias
            elif new_bias is not None:
                self._add_bias(base, new_bias)
            self.merged_adapters.append(name)

    def _add_bias(self, base: nn.Module, bias: Tensor) -> None:
        if not isinstance(base, nn.Linear | nn.LayerNorm | nn.modules.conv._ConvNd):
            raise ValueError(f"Cannot merge a shift into {base}: modules of its class have no bias.")
        warnings.warn(
            f"{base} gets a bias by merging. Saved, the merged model needs a config that gives it one when loaded.",
            stacklevel=3,
        )
        base.bias = nn.Parameter(bias, requires_grad=False)

    def unmerge(self) -> None:
        """Put back weight and bias exactly as they were before the first merge."""
        if self._before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base: Any = self.get_base_layer()
        weight, bias = self._before_merge
        base.weight.data = weight.to(base.weight)
        if bias is None:
            base.bias = None
        else:
            base.bias.data = bias.to(base.bias)
        self._before_merge = None
        self.merged_adapters.clear()
