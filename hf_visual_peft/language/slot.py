"""The place in a classifier where a method acts, and the layer that peft puts there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .rows import by_name
from .view import Outcome, View, normalised


class AdapterSlot(nn.Module):
    """Turns what a classifier sees into logits: without a method by the templates alone."""

    def forward(self, view: View) -> Outcome:
        """The zero-shot result."""
        return view.zero_shot()

    def objective(self, view: View, outcome: Outcome, loss: Tensor, labels: Tensor) -> Tensor:
        """The loss to train with."""
        return loss


class Linear(NamedTuple):
    """A method as a linear.

    Attributes:
        names: of its classes.
        weight: (classes, width).
        bias: (classes,).
        raw: whether names that it does not know get the mean of features that are not normalised.
        biased: whether they get the dual encoder's bias.
    """

    names: list[str]
    weight: Tensor
    bias: Tensor
    raw: bool
    biased: bool


class StoredClasses(AdapterSlot):
    """A linear on normalised features of images. The text tower runs only for names that it does not know.

        logits_k = W_k . image / |image| + b_k

    Args:
        names: of the classes with a row.
        width: of the features.
        raw: whether other names get the mean of features that are not normalised.
        biased: whether other names get the dual encoder's bias.
    """

    def __init__(self, names: Sequence[str], width: int, raw: bool, biased: bool) -> None:
        super().__init__()
        self.names = list(names)
        self.raw = raw
        self.biased = biased
        self.weight = nn.Parameter(torch.zeros(len(names), width))
        self.bias = nn.Parameter(torch.zeros(len(names)))

    def fields(self) -> dict[str, Any]:
        """The arguments that make it again, for the classifier's config."""
        return {"names": self.names, "width": self.weight.shape[1], "raw": self.raw, "biased": self.biased}

    def forward(self, view: View) -> Outcome:
        """The logits of the linear."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if list(view.names) != self.names:
            scale, added = view.classifier.scale()
            text = scale * normalised(view.raw_text if self.raw else view.text)
            other = torch.zeros(len(view.names), device=bias.device)
            if self.biased and added is not None:
                other = other + added
            weight = by_name(weight, self.names, view.names, text)
            bias = by_name(bias, self.names, view.names, other)
        image = normalised(view.image).to(weight)
        return Outcome(image @ weight.T + bias, view.image, weight)


def classes_of(classifier: Any, names: Sequence[str], text: Tensor) -> Linear:
    """Features of classes that are compared by their cosine, as a linear.

    Args:
        classifier: with scale and bias.
        names: of the classes.
        text: their features, not normalised.
    """
    scale, added = classifier.scale()
    bias = torch.zeros(len(text), device=text.device) if added is None else added.expand(len(text))
    return Linear(list(names), scale * normalised(text), bias, raw=True, biased=True)


class LanguageEquation(nn.Module):
    """Base of the modules that hold a method's weights and compute its logits."""

    def forward(self, view: View) -> Outcome:
        """The method's result."""
        raise NotImplementedError

    def objective(self, view: View, outcome: Outcome, loss: Tensor, labels: Tensor) -> Tensor:
        """The loss to train with, from the one of the logits."""
        return loss

    why_not_merged = "what it has learned acts beside the dual encoder, and gives no class a row of fixed weights"

    def linear(self, classifier: Any) -> Linear:
        """The method as a linear on normalised features of images, where it is one.

        Args:
            classifier: that it adapts.

        Raises:
            ValueError: it is none.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be merged: {self.why_not_merged}. Save the adapter, or take it out with "
            "unload(). Methods that merge: TaskRes, CLAP, LP++ and cross-modal adaptation."
        )


class LanguageLayer(nn.Module, BaseTunerLayer):
    """The slot with the equations of a method's adapters.

    Args:
        slot: the classifier's.
        prefix: of the method's parameter names.
        classifier: that has the slot.
    """

    def __init__(self, slot: AdapterSlot, prefix: str, classifier: nn.Module) -> None:
        super().__init__()
        self.base_layer = slot
        self._slot, self._classifier = (slot,), (classifier,)  # tuples, so that they are no submodules
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
        if self.merged and self.disable_adapters:
            self.unmerge()
        if self.merged:
            return None
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
        """Put weights for each class in the place of the adapter, where it is a linear on features of images.

        Args:
            safe_merge: whether to refuse weights that are not finite.
            adapter_names: the adapter; by default the active one.

        Raises:
            ValueError: the method is no such linear, there are several adapters, or a weight is not finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.equations]
        if len(names) + len(self.merged_adapters) > 1:
            raise ValueError(f"Adapters {', '.join(map(repr, names))}: their logits do not add. Merge one.")
        active: Any = self.active_adapters
        for name in names:
            if name not in active and self._classifier[0].scale_is_learned:
                raise ValueError(
                    f"The adapter {name!r} is not active, and one of the adapters has learned the scale of the "
                    f"logits. Make it active: model.set_adapter({name!r})."
                )
            found = self.linear_of(name)
            if safe_merge and not (found.weight.isfinite().all() and found.bias.isfinite().all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            stored = StoredClasses(found.names, found.weight.shape[1], found.raw, found.biased)
            stored.weight, stored.bias = nn.Parameter(found.weight), nn.Parameter(found.bias)
            self.base_layer = stored.requires_grad_(False).train(self.training)
            self._config.stored_classes = stored.fields()
            self.merged_adapters.append(name)

    def linear_of(self, name: str) -> Linear:
        """An adapter as a linear.

        Raises:
            ValueError: it is none.
        """
        with torch.no_grad():
            found: Linear = self.equations[name].linear(self._classifier[0])
            return found._replace(weight=found.weight.float().clone(), bias=found.bias.float().clone())

    def unmerge(self) -> None:
        """Undo it."""
        self.merged_adapters.clear()
        self.base_layer = self._slot[0]
        self._config.stored_classes = None

    @property
    def _config(self) -> Any:
        return self._classifier[0].config
