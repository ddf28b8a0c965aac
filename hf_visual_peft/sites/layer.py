"""What all adapter layers have in common: peft's contract for a layer, and the equations it holds by adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


RANDOM_STD = 0.05  # of what `init_weights=False` adds to every weight


class Site:
    """Where in a block or module an equation acts; the subclasses stand beside the layers that serve them."""


@dataclass(frozen=True)
class Placement:
    """One equation at one site of one module.

    Attributes:
        path: full name of the module in the model.
        slot: name of the equation within the module; part of the parameter names.
        site: where it acts.
        build: makes the equation from the module it stands at; None where the site needs none.
        shared: makes a module that all layers of the adapter use. The first layer keeps and saves it.
    """

    path: str
    slot: str
    site: Site
    build: Callable[[nn.Module], nn.Module] | None
    shared: Callable[[], nn.Module] | None = None


class VisualTunerLayer(BaseTunerLayer):
    """Mixin of `ModuleLayer` and `BlockLayer`.

    Equations stand in one `nn.ModuleDict` a slot, keyed by adapter, so that parameter names read
    `<module>.<method>_<slot>.<adapter>.<parameter>`, which is what peft and transformers expect. `plans` tells which
    slots an adapter fills and at which sites.
    """

    base_layer: nn.Module
    other_param_names = ("plans",)

    def _init_layer(self) -> None:
        # peft declares these on the class; a layer needs its own
        self.adapter_layer_names: tuple[str, ...] = ()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.plans: dict[str, tuple[tuple[str, Site], ...]] = {}

    def __getattr__(self, name: str) -> Any:
        """Attributes that the layer lacks are those of the module it stands around."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not there yet, as while unpickling
                raise
            return getattr(self.base_layer, name)

    def add_equation(
        self, adapter_name: str, prefix: str, slot: str, site: Site, equation: nn.Module | None, init_weights: bool
    ) -> None:
        """Put an equation of an adapter into a slot.

        Args:
            adapter_name: whose equation it is.
            prefix: of the method, e.g. `"vpt_"`.
            slot: which slot of the method.
            site: where it acts.
            equation: None where the site only passes something on.
            init_weights: whether the weights stay as they are; else random numbers are added to all.
        """
        attribute = f"{prefix}{slot}"
        self.plans[adapter_name] = (*self.plans.get(adapter_name, ()), (attribute, site))
        if equation is not None:
            if not init_weights:
                with torch.no_grad():
                    for parameter in equation.parameters():
                        parameter.add_(torch.randn_like(parameter), alpha=RANDOM_STD)
            if attribute not in self.adapter_layer_names:
                setattr(self, attribute, nn.ModuleDict())
                self.adapter_layer_names = (*self.adapter_layer_names, attribute)
            getattr(self, attribute)[adapter_name] = equation
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def equations_of(self, adapter_name: str) -> Iterator[tuple[nn.Module | None, Site]]:
        """The equations of one adapter at this layer, each with its site."""
        for attribute, site in self.plans.get(adapter_name, ()):
            slot: Any = getattr(self, attribute, ())
            yield (slot[adapter_name] if adapter_name in slot else None), site  # noqa: SIM401 - ModuleDict has no get

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        for parameter in base_layer.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
        return None, None

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise RuntimeError(
            f"{type(self).__name__} cannot run under torch.nn.DataParallel, whose copies of a layer share its state. "
            "Start one process a GPU instead: `accelerate launch` or torchrun (DistributedDataParallel)."
        )


def call_equation(layer: VisualTunerLayer, equation: nn.Module, x: Tensor, *args: Any) -> Tensor:
    """Evaluate an equation in its own dtype, as peft's layers do, and return the result in that of `x`.

    Args:
        layer: whose `cast_input_dtype_enabled` says whether the input is cast.
        equation: to be called.
        x: its first argument.
        args: the others.
    """
    if not torch.is_autocast_enabled(x.device.type):
        dtype = next((p.dtype for p in equation.parameters()), x.dtype)
        cast = (layer._cast_input_dtype(a, dtype) if isinstance(a, Tensor) else a for a in (x, *args))
        return equation(*cast).to(x.dtype)
    return equation(x, *args).to(x.dtype)
