"""What an auxiliary loss is computed from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..sites import Left


TaskLoss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """What an auxiliary loss is computed from.

    Attributes:
        adapter: its name.
        left: what its equations left, in the order of their calls.
        logits: of the model; None if it returns none.
        labels: that the model, or `auxiliary_loss`, got; None without.
        again: the output of the extra pass, see `VisualPeftConfig.extra_pass`; None without one.
        task_loss: the loss of the task, a function of logits; None if the model computes it.
    """

    adapter: str
    left: tuple[Left, ...]
    logits: Tensor | None = None
    labels: Tensor | None = None
    again: Any = None
    task_loss: TaskLoss | None = None

    @property
    def values(self) -> list[Tensor]:
        """The tensors that the equations left."""
        return [each.value for each in self.left]

    @property
    def logits_again(self) -> Tensor | None:
        """The logits of the extra pass."""
        return logits_of(self.again)

    @property
    def loss_again(self) -> Tensor:
        """The loss of the task in the extra pass.

        Raises:
            ValueError: there are no labels.
        """
        loss = getattr(self.again, "loss", None)
        if self.task_loss is not None and self.logits_again is not None:
            return self.task_loss(self.logits_again)
        if loss is None:
            raise ValueError(
                f"The auxiliary loss of the adapter {self.adapter!r} holds the loss of the task a second time. Call "
                "the model with labels, or auxiliary_loss(model, labels=..., task_loss=...)."
            )
        return loss


def logits_of(output: Any) -> Tensor | None:
    """The logits in the output of a model; None if there are none."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):  # return_dict=False: after the loss, if there is one
        return next((each for each in output if isinstance(each, Tensor) and each.ndim > 1), None)
    return getattr(output, "logits", None)
