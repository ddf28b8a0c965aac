"""The place in a classifier where a method acts, and the layer that peft puts there."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .view import Outcome, View


class AdapterSlot(nn.Module):
    """Turns what a classifier sees into logits: without a method by the templates alone."""

    def forward(self, view: View) -> Outcome:
        """The zero-shot result."""
        return view.zero_shot()

    def objective(self, view: View, outcome: Outcome, loss: Tensor, labels: Tensor) -> Tensor:
        """The loss to train with."""
        return loss


class LanguageEquation(nn.Module):
    """Base of the modules that hold a method's weights and compute its logits."""

    def forward(self, view: View) -> Outcome:
        """The method's result."""
        raise NotImplementedError

    def objective(self, view: View, outcome: Outcome, loss: Tensor, labels: Tensor) -> Tensor:
        """The loss to train with, from the one of the logits."""
        return loss


class LanguageLayer(nn.Module, BaseTunerLayer):
    """The slot with the equations of a method's adapters.

    Args:
        slot: the classifier's.
        prefix: of the method's parameter names.
    """

    def __init__(self, slot: AdapterSlot, prefix: str) -> None:
        super().__init__()
        self.base_layer = slot
        self.attribute = f"{prefix}equation"
        self.adapter_layer_names = (self.attribute,)
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        setattr(self, self.attribute, nn.ModuleDict())

    @property
    def equations(self) -> Any:
        """By adapter."""
        return getattr(self, self.attribute)

    def active(self) -> LanguageEquation | None:
        """The equation of the active adapter.

        Raises:
            ValueError: several are active.
        """
        adapters: Any = self.active_adapters
        names = [name for name in adapters if name in self.equations]
        if self.disable_adapters or not names:
            return None
        if len(names) > 1:
            raise ValueError(f"Adapters {', '.join(map(repr, names))} are active: their logits do not add. Set one.")
        return self.equations[names[0]]

    def forward(self, view: View) -> Outcome:
        """The result of the active adapter, or the zero-shot one."""
        equation = self.active()
        return self.base_layer(view) if equation is None else equation(view)

    def objective(self, view: View, outcome: Outcome, loss: Tensor, labels: Tensor) -> Tensor:
        """The loss of the active adapter."""
        equation = self.active()
        return loss if equation is None else equation.objective(view, outcome, loss, labels)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "Methods for class texts do not merge: their weights stand beside those of the dual encoder. Save the "
            "adapter, or take it out with unload()."
        )
