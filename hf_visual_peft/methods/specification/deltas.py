"""What methods that train existing parameters add to them: dense or sparse, to weight and bias of one module.

The parameters themselves stay frozen, and what trains starts at zero. That is the same as training them, and yet it
switches off, merges and travels like any adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.calibration import NotCalibratedError
from ...sites.module import is_quantised_weight


UNSET = -1  # index of an entry that is not chosen yet


class Chosen(nn.Module):
    """Which entries a part works on: numbers that are chosen from data and saved with the weights.

    Args:
        count: how many.
        size: numbers are from 0 to less than that.
        method: name, for errors.
    """

    indices: Tensor

    def __init__(self, count: int, size: int, method: str) -> None:
        super().__init__()
        self.register_buffer("indices", torch.full((count,), UNSET, dtype=torch.int32))
        self.size = size
        self.method = method
        self._known = False  # so that a compiled forward need not look at the numbers

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
        """Choose these, (count,)."""
        self._known = self._is_choice(indices, "the choice")
        self.indices.copy_(indices)

    def randomise(self) -> None:
        """Choose at random."""
        device = self.indices.device
        self.indices.copy_(torch.randperm(self.size, device=device)[: len(self.indices)].sort().values)
        self._known = True

    def _is_choice(self, indices: Tensor, name: str) -> bool:
        """Whether these are indices; False for none yet.

        Raises:
            ValueError: some are neither.
        """
        if len(indices) and bool((indices == UNSET).all()):
            return False
        wrong = indices[(indices < 0) | (indices >= self.size)]
        if len(wrong):
            raise ValueError(
                f"{self.method}: {name} has {len(wrong)} indices outside 0 to {self.size - 1}, the first of them "
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
    """A number for each entry of a tensor, zero at the start: w + values.

    Args:
        size: entries of the tensor.
    """

    no_weight_decay = ("values",)

    def __init__(self, size: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(size))

    def forward(self, tensor: Tensor) -> Tensor:
        """Same shape as the tensor."""
        return tensor + self.values.to(tensor.dtype).view_as(tensor)


class SparseAddend(nn.Module):
    """A number for each of some chosen entries of a tensor, zero at the start: w[indices] + values.

    Args:
        size: entries of the tensor.
        count: how many of them are chosen, in the order of rows.
        method: name, for errors.
    """

    no_weight_decay = ("values",)

    def __init__(self, size: int, count: int, method: str) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(count))
        self.entries = Chosen(count, size, method)

    def forward(self, tensor: Tensor) -> Tensor:
        """Same shape as the tensor."""
        added = tensor.flatten().scatter_add(0, self.entries(), self.values.to(tensor.dtype))
        return added.view_as(tensor)


class Deltas(nn.Module):
    """What is added to weight and bias of one module.

    Args:
        weight: makes the new weight of the old, or None.
        bias: likewise.
    """

    def __init__(self, weight: nn.Module | None, bias: nn.Module | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that take the place of these."""
        new_weight = weight if self.weight is None else self.weight(weight)
        return new_weight, bias if bias is None or self.bias is None else self.bias(bias)


@contextmanager
def summed_gradients(
    parameters: Sequence[nn.Parameter], of: Callable[[Tensor], Tensor]
) -> Iterator[Mapping[nn.Parameter, Tensor]]:
    """Sum a function of the gradients over all backward passes, in float32.

    Each gradient is freed as soon as it is added, so no more than the sums is kept.

    Args:
        parameters: they get gradients from now on.
        of: the function.
    """
    for parameter in parameters:
        if is_quantised_weight(parameter):
            raise ValueError(
                f"Cannot choose by gradients: a weight of shape {tuple(parameter.shape)} is quantised and has none. "
                "Choose on the backbone in floating point, and load the adapter beside the quantised one."
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
