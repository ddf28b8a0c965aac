"""Auxiliary losses: what methods add to the loss of the task while they train.

An equation returns `WithLoss`: its output and a tensor for the loss. `VisualPeftConfig.auxiliary_loss` makes one
number of what the equations of an adapter left in a forward pass. Hooks at the model collect these tensors in every
pass that records gradients, and add the losses of the active adapters to the loss that the model returns, if it gets
labels. So `Trainer` needs no subclass. A loop that computes the loss of the task outside the model adds
`auxiliary_loss(model)` to it.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..sites import Exchange, Left, VisualTunerLayer
from ..sites.losses import require_finite
from .outcome import Outcome, TaskLoss, logits_of


if TYPE_CHECKING:
    from .config import VisualPeftConfig


@dataclass
class AuxiliaryLosses:
    """The hooks at a model whose adapters have auxiliary losses.

    Attributes:
        exchange: of the adapter layers of the model.
        configs: names and configs of these adapters, by method and adapter.
        outcomes: of the last pass, until its loss is taken.
        added: whether the model has added them to its loss.
        told: whether a warning was given.
        handles: the hooks.
    """

    exchange: Exchange
    configs: dict[str, tuple[str, VisualPeftConfig]] = field(default_factory=dict)
    outcomes: list[tuple[str, Outcome]] = field(default_factory=list)
    added: bool = False
    told: bool = False
    handles: list[Any] = field(default_factory=list)

    def hook(self, model: nn.Module) -> None:
        """Set the hooks."""
        if not self.handles:
            self.handles.append(model.register_forward_pre_hook(self.before))
            self.handles.append(model.register_forward_hook(self.after, with_kwargs=True))

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.configs.clear()
        self.outcomes = []

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and files, without tensors of the last pass."""
        return vars(self) | {"outcomes": []}

    def before(self, module: nn.Module, args: tuple) -> None:
        """Begin to collect."""
        self.outcomes, self.added = [], False
        collect = len(self.configs) > 0 and torch.is_grad_enabled() and self.exchange.mixed is None
        self.exchange.left = [] if collect else None

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Compute what needs the model, and add the losses to the one that the model returns."""
        left, self.exchange.left = self.exchange.left, None
        if left is None:
            return None
        labels = _labels(module, args, kwargs)
        found = []
        for owner, (adapter, config) in self.configs.items():
            mine = tuple(each for each in left if each.owner == owner)
            if not mine and not self._is_active(owner):
                continue
            _require_graph(adapter, mine)
            again = self._again(owner, config, module, args, kwargs, output)
            found.append((owner, Outcome(adapter, mine, logits_of(output), labels, again)))
        self.outcomes = found
        if not found:
            return None
        loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor) or loss.ndim:
            self._remind(logits_of(output))
            return None
        total = loss + self.take() * _share(module, labels, kwargs)
        self.added = True
        if isinstance(output, tuple):
            return (total, *output[1:])
        if isinstance(output, ModelOutput):
            return type(output)(**{**output, "loss": total})
        output.loss = total
        return output

    def _is_active(self, owner: str) -> bool:
        return any(each.owner == owner for layer in self.exchange.blocks.values() for each in layer._active())

    def _again(
        self, owner: str, config: VisualPeftConfig, module: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> Any:
        if logits_of(output) is None:
            return None
        # means, as the auxiliary loss is one; the share of the batch comes later
        kwargs = {key: value for key, value in kwargs.items() if key != "num_items_in_batch"}
        with config.extra_pass(self.exchange, owner) as wanted:
            return module.forward(*args, **kwargs) if wanted else None

    def take(self, labels: Tensor | None = None, task_loss: TaskLoss | None = None) -> Tensor:
        """The sum of the losses of the last pass, which is then forgotten.

        Args:
            labels: of the batch, if the model did not get them.
            task_loss: the loss of the task, if the model did not compute it.

        Raises:
            ValueError: a loss is not finite, or needs labels.
        """
        outcomes, self.outcomes = self.outcomes, []
        names: list[str] = []
        values: list[Tensor] = []
        terms = []
        for owner, outcome in outcomes:
            config = self.configs[owner][1]
            given = {} if labels is None else {"labels": labels}
            outcome = Outcome(**{**vars(outcome), "task_loss": task_loss, **given})
            for each in outcome.left:
                names.append(f"the adapter {outcome.adapter!r} ({type(config).__name__}) at {each.where!r}")
                values.append(each.value.detach().float().sum())
            names.append(f"the adapter {outcome.adapter!r} ({type(config).__name__})")
            values.append(config.auxiliary_loss(outcome).float())
            terms.append(len(values) - 1)
        checked = require_finite(torch.stack(values), "\n".join(names))
        return torch.stack([checked[index] for index in terms]).sum()

    def _remind(self, logits: Tensor | None) -> None:
        """Warn once if gradients are computed from the output and the losses are in none."""
        if logits is None or not logits.requires_grad or torch.compiler.is_compiling() or self.told:
            return
        outcomes = self.outcomes

        def warn(gradient: Tensor) -> None:
            if self.outcomes is outcomes and outcomes and not self.told:
                self.told = True
                names = ", ".join(repr(outcome.adapter) for _, outcome in outcomes)
                warnings.warn(
                    f"The auxiliary loss of {names} is not in the loss that gradients are computed from. Call the "
                    "model with labels, or add hf_visual_peft.auxiliary_loss(model) to the loss before backward.",
                    stacklevel=2,
                )

        logits.register_hook(warn)


def _labels(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    if "labels" in kwargs or not args:
        return kwargs.get("labels")
    names = list(inspect.signature(module.forward).parameters)
    return args[names.index("labels")] if "labels" in names[: len(args)] else None


def _require_graph(adapter: str, left: tuple[Left, ...]) -> None:
    """Refuse values without a graph, of equations that train.

    Raises:
        ValueError: there is one.
    """
    for each in left:
        if each.trains and not each.value.requires_grad:
            raise ValueError(
                f"The auxiliary loss of the adapter {adapter!r} at {each.where!r} has no gradient: it was computed in "
                "gradient checkpointing that re-enters autograd. Choose "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )


def _share(module: nn.Module, labels: Tensor | None, kwargs: Mapping[str, Any]) -> Tensor | float:
    """The share of the batch in all batches of a step, where the model's loss has it, as `Trainer` asks for."""
    count = kwargs.get("num_items_in_batch")
    kind = getattr(getattr(module, "config", None), "problem_type", None)
    if count is None or labels is None or kind != "single_label_classification":
        return 1.0  # other losses of transformers are means over the batch
    return labels.ne(-100).sum() / count


def losses_of(model: nn.Module) -> AuxiliaryLosses | None:
    """The hooks of a model for auxiliary losses; None if its adapters have none."""
    layers = (module for module in model.modules() if isinstance(module, VisualTunerLayer))
    return next((layer.exchange.losses for layer in layers if layer.exchange.losses is not None), None)


def auxiliary_loss(model: nn.Module, labels: Tensor | None = None, task_loss: TaskLoss | None = None) -> Tensor:
    """The sum of the auxiliary losses of the active adapters in the model's last forward pass.

    Only needed where the loss of the task is computed outside the model: a model that gets labels adds the auxiliary
    losses to its loss itself. Call it once after each forward pass, before backward.

    Args:
        model: with adapters, also wrapped for several processes.
        labels: of the batch, for losses that compare samples by their labels.
        task_loss: the loss of the task, a function of logits, for losses that hold it a second time.

    Returns:
        A number; zero if no active adapter has such a loss, or if the pass recorded no gradients.

    Raises:
        ValueError: a loss is not finite, the model has added it already, or it needs labels.
    """
    losses = losses_of(model)
    if losses is not None and losses.added:
        raise ValueError("auxiliary_loss: the model got labels and has added the auxiliary losses to its loss itself.")
    if losses is None or not losses.outcomes:
        return torch.zeros((), device=next(model.parameters()).device)
    return losses.take(labels, task_loss)
