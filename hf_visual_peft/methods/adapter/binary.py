"""Weights of a few bits, for the quantised adapters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn


EPSILON = 1e-5
SOLVER_STEPS = 500
FITTING_STEPS = 200
TOLERANCE = 1e-2  # of w~: more than rounding on another device or in half precision, less than another matrix


@functools.cache
def gaussian_levels(bits: int) -> tuple[float, ...]:
    """The 2^bits values that best represent a standard normal variable, in ascending order.

    Each is the median of the part of the distribution to which it is the nearest. As in the authors' code, 500
    iterations find them, here from evenly spaced quantiles (theirs starts with all at zero).
    """
    count = 2**bits
    normal = NormalDist()
    levels = [normal.inv_cdf((index + 0.5) / count) for index in range(count)]
    for _ in range(SOLVER_STEPS):
        bounds = [0.0, *(normal.cdf((low + high) / 2) for low, high in pairwise(levels)), 1.0]
        levels = [normal.inv_cdf((low + high) / 2) for low, high in pairwise(bounds)]
    return tuple(levels)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integers below 2^bits, of any shape, into bytes, (ceil(count x bits / 8),)."""
    per_byte = 8 // bits
    flat = codes.flatten().to(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % per_byte)]).view(-1, per_byte)
    shifts = torch.arange(per_byte, device=flat.device, dtype=torch.uint8) * bits
    return (flat << shifts).sum(dim=1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`."""
    shifts = torch.arange(8 // bits, device=packed.device, dtype=torch.uint8) * bits
    codes = (packed.unsqueeze(1) >> shifts) & (2**bits - 1)
    return codes.flatten()[: math.prod(shape)].view(shape)


def packed_weights(name: str, shape: tuple[int, ...], bits: int) -> int | None:
    """How many weights a saved tensor of a `BinaryWeight` stands for; None for other tensors."""
    if name.endswith(".codes"):
        return math.prod(shape) * 8 // bits
    return 0 if name.endswith(".stats") else None


class BinaryWeight(nn.Module):
    """A weight matrix that is used and saved with a few bits per element.

        w~ = (w - mean) / (std + 1e-5);  weight = std * nearest level of w~ + mean

    Gradients pass straight through the rounding, and also through mean and std. Only `codes` and `stats` are saved. In
    evaluation mode without gradients the weight is decoded from them as long as the parameter has not changed since
    they last matched, so that a loaded adapter gives exactly what was saved, in every precision. If the parameter was
    written to since, in whatever way, the weight is computed from the parameter.

    Args:
        weight: the matrix at the start.
        bits: per element: 1, 2 or 4.
    """

    codes: Tensor
    stats: Tensor

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.weight = nn.Parameter(weight)
        self.register_buffer("codes", torch.empty(-(-weight.numel() * bits // 8), dtype=torch.uint8))
        self.register_buffer("stats", torch.empty(2))
        self.levels = gaussian_levels(bits)
        self.follows = False  # whether the parameter is known to match the codes, or has been trained since
        # The parameter when it last matched the codes. Flags and version counters miss writes through `.data`. It is
        # not a buffer, because code that averages or copies buffers would include it.
        self.fitted = self.weight.detach()
        self.randomise()

    def forward(self) -> Tensor:
        """The quantised weight, in the shape of the parameter."""
        if not self.training and not (self.weight.requires_grad and torch.is_grad_enabled()):
            if self.fitted.is_meta:  # codes were loaded directly into a module on the meta device
                self._follow_codes()
            # not an `if`, which would wait for the device
            return torch.where(
                self._differs(), self._decoded(*self._encoded()), self._decoded(self._codes(), self.stats)
            )
        if not self.follows and not torch.compiler.is_compiling():
            self._follow_codes()  # transformers loads codes directly, and may not call `train`
        mean, std = self.weight.mean(), self.weight.std()
        normal = (self.weight - mean) / (std + EPSILON)
        levels = self._levels(normal)
        nearest = levels[self._nearest(normal, levels)]
        return (normal + (nearest - normal).detach()) * std + mean

    def randomise(self) -> None:
        """Compute codes and stats from the parameter."""
        if self.weight.is_meta:  # they will be loaded
            return
        with torch.no_grad():
            codes, stats = self._encoded()
            self.codes.copy_(pack(codes, self.bits))
            self.stats.copy_(stats)
        self._fit()

    def train(self, mode: bool = True) -> BinaryWeight:
        """Switch the mode, and make parameter and codes match."""
        if mode:
            self._follow_codes()
        elif self._is_written():
            self.randomise()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BinaryWeight:
        super()._apply(fn, recurse)
        self.fitted = fn(self.fitted)  # another device or precision: parameter and codes match as before
        return self

    def _fit(self) -> None:
        self.fitted = self.weight.detach().clone()

    def _is_written(self) -> bool:
        """Whether the parameter has changed since it last matched the codes."""
        return not self.weight.is_meta and not self.fitted.is_meta and bool(self._differs())

    def _differs(self) -> Tensor:
        # offloading of weights leaves attributes where they are
        return (self.weight != self.fitted.to(self.weight.device)).any()

    def _levels(self, like: Tensor) -> Tensor:
        # filled in on the device: a copy from the host would make it wait
        return torch.stack([like.new_full((), level) for level in self.levels])

    @staticmethod
    def _nearest(normal: Tensor, levels: Tensor) -> Tensor:
        return torch.bucketize(normal.detach(), (levels[1:] + levels[:-1]) / 2)

    def _encoded(self) -> tuple[Tensor, Tensor]:
        """The index of each element's level, and mean and standard deviation of the parameter."""
        weight = self.weight.detach().float()
        mean, std = weight.mean(), weight.std()
        normal = (weight - mean) / (std + EPSILON)
        return self._nearest(normal, self._levels(normal)), torch.stack([mean, std])

    def _codes(self) -> Tensor:
        return unpack(self.codes, self.bits, tuple(self.weight.shape)).long()

    def _decoded(self, codes: Tensor, stats: Tensor) -> Tensor:
        mean, std = stats.to(self.weight.dtype)
        return self._levels(self.weight)[codes] * std + mean

    @torch.no_grad()
    def _follow_codes(self) -> None:
        """Set the parameter so that it gives these codes and stats, unless they were computed from it.

        The levels themselves would not do: their mean and standard deviation differ from those in `stats`.
        """
        if self.codes.is_meta:  # they will be loaded
            return
        self.follows = True
        if self._is_written():  # they are older
            return
        if self.fitted.is_meta:  # the parameter was never set, even if what is in its memory looks like this matrix
            if self.weight.is_meta:
                empty = torch.empty_like(self.weight, device=self.codes.device)
                self.weight = nn.Parameter(empty, requires_grad=self.weight.requires_grad)
            self.weight.fill_(torch.nan)
        codes = self._codes()
        mean, std = self.stats.float()
        levels = self._levels(mean)
        end = levels.new_full((1,), torch.inf)
        bounds = torch.cat([-end, (levels[1:] + levels[:-1]) / 2, end])
        low, high = bounds[codes], bounds[codes + 1]
        shrunk = std / (std + EPSILON)  # the deviation of w~
        normal = (self.weight.float() - mean) / (std + EPSILON)
        own = normal.mean().abs() <= TOLERANCE and (normal.std() - shrunk).abs() <= TOLERANCE
        if not own or not ((normal >= low - TOLERANCE) & (normal <= high + TOLERANCE)).all():
            normal = levels[codes]
            for _ in range(FITTING_STEPS):
                normal = (normal - normal.mean()) / normal.std().clamp(min=EPSILON) * shrunk
                if torch.equal(self._nearest(normal, levels), codes):
                    break
                normal = normal.clamp(low + TOLERANCE, high - TOLERANCE)
            self.weight.copy_(normal * (std + EPSILON) + mean)
        self._fit()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._is_written():
            self.randomise()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}weight"]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list, *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        key = f"{prefix}weight"
        if key in missing_keys:
            missing_keys.remove(key)
        if key not in state_dict and f"{prefix}codes" in state_dict:
            self._fit()  # the loaded codes count, not earlier ones
            self._follow_codes()
