"""What equations leave for the auxiliary losses of their adapters."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class WithLoss(NamedTuple):
    """What an equation returns in place of its output if its adapter has an auxiliary loss.

    Attributes:
        output: of the equation.
        loss: a term of the loss, or a tensor from which `VisualPeftConfig.auxiliary_loss` computes it.
    """

    output: Any
    loss: Tensor


class Left(NamedTuple):
    """A tensor that an equation left in one forward pass.

    Attributes:
        owner: method and adapter.
        where: full name of the module or block of the equation.
        trains: whether the equation has trainable parameters.
        value: the tensor.
        slot: name of the equation there, without its method.
    """

    owner: str
    where: str
    trains: bool
    value: Tensor
    slot: str = ""


def left_by(owner: str, where: str, module: nn.Module, value: Tensor) -> Left:
    """Describe a tensor that an equation leaves.

    Args:
        owner: method and adapter.
        where: full name of the module or block.
        module: the equation.
        value: the tensor.
    """
    return Left(owner, where, any(p.requires_grad for p in module.parameters()), value)


@torch.library.custom_op("hf_visual_peft::require_finite", mutates_args=())
def require_finite(values: Tensor, names: str) -> Tensor:
    """Copy a tensor if it is finite; one operator, so that compiled models check it, too.

    Args:
        values: (count,).
        names: of the values, one a line.

    Raises:
        ValueError: a value is not finite.
    """
    if not bool(values.isfinite().all()):
        number = int(values.isfinite().logical_not().nonzero()[0])
        raise ValueError(
            f"The auxiliary loss of {names.splitlines()[number]} is not finite ({float(values[number])}). Nothing was "
            "trained in this step. Lower the learning rate, clip the gradients, or lower the weight of this loss in "
            "the adapter's config."
        )
    return values.clone()


@require_finite.register_fake
def _(values: Tensor, names: str) -> Tensor:
    return torch.empty_like(values)


def _backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return gradient, None


require_finite.register_autograd(_backward)
