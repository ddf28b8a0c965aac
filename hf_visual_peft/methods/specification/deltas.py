"""Dense and sparse additions to weight and bias of a module, for methods that train existing parameters.

The parameters themselves stay frozen, and the additions start at zero. That is equivalent to training the parameters,
and the additions switch off, merge and are saved like any adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from ...core.calibration import NotCalibratedError
from ...sites.module import is_quantised_weight


UNSET = -1  # index of an entry that is not chosen yet
FEW = 1 / 16  # share of a weight's entries up to which their gradients are cheaper one by one than all by a product


class Chosen(nn.Module):
    """The indices of the entries that a part acts on, chosen from data and saved with the weights.

    Args:
        count: number of indices.
        size: indices are below it.
        method: name, for errors.
    """

    indices: Tensor

    def __init__(self, count: int, size: int, method: str) -> None:
        super().__init__()
        self.register_buffer("indices", torch.full((count,), UNSET, dtype=torch.int32))
        self.size = size
        self.method = method
        self._known = False  # so that a compiled forward need not check the indices

    def forward(self) -> Tensor:
        """(count,), int64.

        Raises:
            NotCalibratedError: nothing is chosen yet.
        """
        if not self._known:
            self._known = self._is_choice(self.indices, "its choice")
            if not self._known:
                raise NotCalibratedError(self.method)
        return self.indices.long()

    def choose(self, indices: Tensor) -> None:
        """Choose these indices, (count,)."""
        self._known = self._is_choice(indices, "the choice")
        self.indices.copy_(indices)

    def randomise(self) -> None:
        """Choose indices at random."""
        device = self.indices.device
        self.indices.copy_(torch.randperm(self.size, device=device)[: len(self.indices)].sort().values)
        self._known = True

    def _is_choice(self, indices: Tensor, name: str) -> bool:
        """Whether these are valid indices; False if nothing is chosen yet.

        Raises:
            ValueError: some indices are invalid.
        """
        if len(indices) and bool((indices == UNSET).all()):
            return False
        wrong = indices[(indices < 0) | (indices >= self.size)]
        if len(wrong):
            raise ValueError(
                f"{self.method}: {name} has {len(wrong)} indices outside 0 to {self.size - 1}, the first is "
                f"{int(wrong[0])}: it was made for another model, or is damaged."
            )
        if len(indices.unique()) < len(indices):
            raise ValueError(f"{self.method}: {name} has the same index twice: it is damaged.")
        return True

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        name = f"{prefix}indices"
        loaded = state_dict.get(name)
        known = self._is_choice(loaded, name) if isinstance(loaded, Tensor) else self._known
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._known = known


class Addend(nn.Module):
    """A value for each entry of a tensor, zero at the start: w + values.

    Args:
        size: entries of the tensor.
    """

    no_weight_decay = ("values",)

    def __init__(self, size: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(size))

    def forward(self, tensor: Tensor) -> Tensor:
        """The values, in the shape of the tensor."""
        return tensor + self.values.to(tensor.dtype).view_as(tensor)


class SparseAddend(nn.Module):
    """A value for each chosen entry of a tensor, zero at the start: w[indices] + values.

    Args:
        size: entries of the tensor.
        count: number of chosen entries, in row-major order.
        method: name, for errors.
    """

    no_weight_decay = ("values",)

    def __init__(self, size: int, count: int, method: str) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(count))
        self.entries = Chosen(count, size, method)

    def forward(self, tensor: Tensor) -> Tensor:
        """The values, in the shape of the tensor."""
        return _with_values(tensor, self.values, self.entries())


class _SparseLinear(torch.autograd.Function):
    """A linear with values added to some entries of its weight.

    The gradient of an added value is a sum over tokens of one output's gradient times one input; autograd would
    compute the gradient of the whole weight first.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor) -> Tensor:
        """The output, (..., out), from x (..., in), weight (out, in), and values at indices (count,) of the weight."""
        return F.linear(x, _with_values(weight, values, indices), bias)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the backward pass reads: no second weight."""
        x, weight, _, values, indices = inputs
        ctx.save_for_backward(x, weight, values, indices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, bias and values."""
        x, weight, values, indices = ctx.saved_tensors
        of_x = of_bias = of_values = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ _with_values(weight, values, indices)
        gradient = gradient.reshape(-1, weight.shape[0])
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(dim=0)
        if ctx.needs_input_grad[3]:
            rows, columns = indices // weight.shape[1], indices % weight.shape[1]
            read = (
                x.reshape(-1, weight.shape[1]).index_select(1, columns).to(values.dtype)
            )  # products of halves are not rounded
            of_values = (gradient.index_select(1, rows) * read).sum(dim=0)
        return of_x, None, of_bias, of_values, None


def _with_values(weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    return weight.flatten().scatter_add(0, indices, values.to(weight.dtype)).view_as(weight)


class Deltas(nn.Module):
    """Additions to weight and bias of one module.

    Args:
        weight: maps the old weight to the new one; None for no change.
        bias: the same for the bias.
    """

    def __init__(self, weight: nn.Module | None, bias: nn.Module | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The new weight and bias, from the old ones."""
        new_weight = weight if self.weight is None else self.weight(weight)
        return new_weight, bias if bias is None or self.bias is None else self.bias(bias)

    def linear_output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A linear's output (..., out) with the new weight and bias, from its input (..., in)."""
        part = self.weight
        if (
            not isinstance(part, SparseAddend)
            or len(part.values) > FEW * weight.numel()
            or not torch.is_grad_enabled()
        ):
            return F.linear(x, *self(weight, bias))
        if bias is not None and self.bias is not None:
            bias = self.bias(bias)
        if torch.is_autocast_enabled(x.device.type):  # which a function of its own has to do by itself
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return _SparseLinear.apply(x, weight, bias, part.values, part.entries())


@contextmanager
def summed_gradients(
    parameters: Sequence[nn.Parameter], of: Callable[[Tensor], Tensor]
) -> Iterator[Mapping[nn.Parameter, Tensor]]:
    """Sum a function of the gradients over all backward passes, in float32.

    Each gradient is freed as soon as it is added, so only the sums are kept.

    Args:
        parameters: to be summed over; they require gradients from now on.
        of: the function.
    """
    for parameter in parameters:
        if is_quantised_weight(parameter):
            raise ValueError(
                f"Cannot choose by gradients: a weight of shape {tuple(parameter.shape)} is quantised and has none. "
                "Choose on the backbone in floating point, then load the adapter into the quantised one."
            )
    sums = {parameter: torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters}

    def add(parameter: Tensor, total: Tensor) -> None:
        assert parameter.grad is not None
        total += of(parameter.grad.float())
        parameter.grad = None

    handles = []
    for parameter, total in sums.items():
        parameter.requires_grad_(True)
        handles.append(parameter.register_post_accumulate_grad_hook(partial(add, total=total)))
    try:
        with torch.enable_grad():
            yield sums
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.grad = None
