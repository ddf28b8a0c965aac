"""Weights of a few bits, which the quantised adapters share."""

from __future__ import annotations

import functools
import math
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn


EPSILON = 1e-5
SOLVER_STEPS = 500
FITTING_STEPS = 200
TOLERANCE = 1e-2  # of w~: rounding on another device or in half precision is less, another matrix is more


@functools.cache
def gaussian_levels(bits: int) -> tuple[float, ...]:
    """The 2^bits numbers that stand best for a standard normal variable, in rising order.

    Each is the median of the part of the normal distribution for which it is the nearest; found by repeating that, as
    the authors do, 500 times, from evenly spaced quantiles (theirs starts with all of them at zero).
    """
    count = 2**bits
    normal = NormalDist()
    levels = [normal.inv_cdf((index + 0.5) / count) for index in range(count)]
    for _ in range(SOLVER_STEPS):
        bounds = [0.0, *(normal.cdf((low + high) / 2) for low, high in pairwise(levels)), 1.0]
        levels = [normal.inv_cdf((low + high) / 2) for low, high in pairwise(bounds)]
    return tuple(levels)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers below 2^bits, of any shape, to bytes, (ceil(count x bits / 8),)."""
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


def packed_numbers(name: str, shape: tuple[int, ...], bits: int) -> int | None:
    """How many weights a saved tensor of a `BinaryWeight` stands for; None for other tensors."""
    if name.endswith(".codes"):
        return math.prod(shape) * 8 // bits
    return 0 if name.endswith(".stats") else None


class BinaryWeight(nn.Module):
    """A weight matrix that is used and saved with a few bits a number.

        w~ = (w - mean) / (std + 1e-5);  weight = std * nearest level of w~ + mean

    In training, and with gradients also in evaluation mode, the levels are those of the full-precision parameter,
    which gets their gradient as if it were used itself (straight through, also through mean and std). Otherwise they
    come from `codes` and `stats`, which are all that is saved. Each is made from the other where it is the older of
    the two, so that both give the same.

    Args:
        weight: the matrix at the start.
        bits: 1, 2 or 4.
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
        self.codes_are_old = False
        self.randomise()

    def forward(self) -> Tensor:
        """The weight with few bits, in the shape of the parameter."""
        if not self.training and not (self.weight.requires_grad and torch.is_grad_enabled()):
            if self.codes_are_old:
                self.randomise()
                self.codes_are_old = True  # an optimizer may be at work in evaluation mode
            return self._from_codes()
        if not self.codes_are_old and not torch.compiler.is_compiling():
            self._follow_codes()  # transformers loads codes unseen, and need not call `train`
        self.codes_are_old = True
        mean, std = self.weight.mean(), self.weight.std() + EPSILON
        normal = (self.weight - mean) / std
        levels = self._levels(normal)
        nearest = levels[self._nearest(normal, levels)]
        return (normal + (nearest - normal).detach()) * std + mean

    def randomise(self) -> None:
        """Make codes and stats from the parameter."""
        if self.weight.is_meta:  # they will be loaded
            return
        with torch.no_grad():
            weight = self.weight.float()
            mean, std = weight.mean(), weight.std() + EPSILON
            normal = (weight - mean) / std
            self.codes.copy_(pack(self._nearest(normal, self._levels(normal)), self.bits))
            self.stats.copy_(torch.stack([mean, std]))
        self.codes_are_old = False

    def train(self, mode: bool = True) -> BinaryWeight:
        """Switch between parameter and codes, and bring up to date what is used from now on."""
        if not mode and self.codes_are_old:
            self.randomise()
        if mode and not self.codes_are_old:
            self._follow_codes()
        return super().train(mode)

    def _levels(self, like: Tensor) -> Tensor:
        return torch.tensor(self.levels, dtype=like.dtype, device=like.device)

    @staticmethod
    def _nearest(normal: Tensor, levels: Tensor) -> Tensor:
        return torch.bucketize(normal.detach(), (levels[1:] + levels[:-1]) / 2)

    def _from_codes(self) -> Tensor:
        codes = unpack(self.codes, self.bits, tuple(self.weight.shape)).long()
        mean, std = self.stats.to(self.weight.dtype)
        return self._levels(self.weight)[codes] * std + mean

    @torch.no_grad()
    def _follow_codes(self) -> None:
        """Make a parameter from codes and stats that gives just these, unless they were made from it.

        The levels themselves would not do: neither is their mean that of `stats`, nor their standard deviation.
        """
        if self.codes.is_meta:  # they will be loaded
            return
        if self.weight.is_meta:
            empty = torch.empty_like(self.weight, device=self.codes.device)
            self.weight = nn.Parameter(empty, requires_grad=self.weight.requires_grad)
        codes = unpack(self.codes, self.bits, tuple(self.weight.shape)).long()
        mean, std = self.stats.float()
        levels = self._levels(mean)
        end = levels.new_tensor([torch.inf])
        bounds = torch.cat([-end, (levels[1:] + levels[:-1]) / 2, end])
        low, high = bounds[codes], bounds[codes + 1]
        normal = (self.weight.float() - mean) / std
        own = normal.mean().abs() <= TOLERANCE and (normal.std() + EPSILON / std - 1).abs() <= TOLERANCE
        if own and ((normal >= low - TOLERANCE) & (normal <= high + TOLERANCE)).all():
            return
        normal = levels[codes]
        for _ in range(FITTING_STEPS):
            normal = (normal - normal.mean()) / normal.std().clamp(min=EPSILON)
            if torch.equal(self._nearest(normal, levels), codes):
                break
            normal = normal.clamp(low + TOLERANCE, high - TOLERANCE)
        self.weight.copy_(normal * (std - EPSILON) + mean)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.codes_are_old:
            self.randomise()
            self.codes_are_old = True  # the next step of the optimizer makes them so again
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
            self.codes_are_old = False
            self._follow_codes()
