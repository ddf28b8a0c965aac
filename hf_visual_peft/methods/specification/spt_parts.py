"""The parts that sensitivity-aware tuning (SPT) puts at a module, and the search for the largest entries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from ...backbones.backbone import ALL_ROLES, VisionBackbone
from ...core.calibration import NotCalibratedError
from ...sites import drop_path
from .deltas import Addend, Deltas, SparseAddend


LORA, WHOLE = "lora", "whole"


class SPTEntries(Deltas):
    """Additions to the sensitive entries of weight and bias: to some entries, or to a whole vector.

    Args:
        module: linear or norm.
        name: of the module in `SPTConfig.chosen`.
        chosen: that field.
    """

    def __init__(self, module: nn.Module, name: str, chosen: Mapping[str, int | str] | None) -> None:
        super().__init__(None, None)
        self.sizes = {kind: (tensor.shape, f"{name}.{kind}") for kind, tensor in tensors_of(module).items()}
        self.undecided: nn.Parameter | None = None
        if chosen is None:  # a placeholder, with the dtype that the additions will have
            self.undecided = nn.Parameter(torch.empty(0))
        else:
            self.decide(chosen)

    def decide(self, chosen: Mapping[str, int | str], like: Tensor | None = None) -> None:
        """Make the additions, with the device and dtype of a tensor."""
        self.undecided = None
        for kind, (shape, key) in self.sizes.items():
            part: nn.Module | None = None
            choice, size = chosen.get(key), shape.numel()
            if choice == WHOLE and len(shape) == 1:
                part = Addend(size)
            elif type(choice) is int and 0 < choice <= size:
                part = SparseAddend(size, choice, "SPT")
            elif choice is not None and not (choice == LORA and len(shape) == 2):
                name = WHOLE if len(shape) == 1 else LORA
                raise ValueError(f"chosen has {choice!r} for {key}: must be {name!r} or an integer from 1 to {size}.")
            setattr(self, kind, part if part is None or like is None else part.to(like))

    def forward(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The new weight and bias, from the old ones.

        Raises:
            NotCalibratedError: nothing is chosen yet.
        """
        if self.undecided is not None:
            raise NotCalibratedError("SPT")
        return super().forward(weight, bias)


class SPTLoRA(nn.Module):
    """A low-rank branch beside a linear whose weight is sensitive; nothing beside other modules.

        f(y, x) = y + DP(B A dropout(x))

    A is drawn as in `nn.Linear`, B is zero.

    Args:
        linear: the linear, for its sizes.
        r: rank.
        dropout: probability, on the input.
        drop_path: rate of the branch's stochastic depth.
        structured: whether the branch is there.
    """

    def __init__(self, linear: nn.Linear, r: int, dropout: float, drop_path: float, structured: bool) -> None:
        super().__init__()
        self.sizes = (linear.in_features, r, linear.out_features)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = drop_path
        self.decide(structured)

    def decide(self, structured: bool, like: Tensor | None = None) -> None:
        """Make the branch, with the device and dtype of a tensor, or none."""
        self.down: nn.Linear | None = None
        self.up: nn.Linear | None = None
        if structured:
            size_in, r, size_out = self.sizes
            self.down, self.up = nn.Linear(size_in, r, bias=False), nn.Linear(r, size_out, bias=False)
            nn.init.zeros_(self.up.weight)
            if like is not None:
                self.to(like)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The new output (..., out_features), from the linear's output and its input (..., in_features)."""
        if self.down is None or self.up is None:
            return y
        return y + drop_path(self.up(self.down(self.dropout(x))), self.drop_path, self.training)

    @torch.no_grad()
    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the linear with the branch folded in."""
        if self.down is None or self.up is None:
            return weight, bias
        return weight + (self.up.weight @ self.down.weight).to(weight), bias


def tensors_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Weight and bias of a module, without those that it lacks."""
    pairs = ((kind, getattr(module, kind, None)) for kind in ("weight", "bias"))
    return {kind: tensor for kind, tensor in pairs if tensor is not None}


def named_modules(backbone: VisionBackbone) -> dict[str, str]:
    """Full names of the modules that SPT may train, by the names that they have in `SPTConfig.chosen`."""
    names = {path: f"norms.{index}" for index, path in enumerate(backbone.norms)}
    names |= {path: f"between.{index}" for index, path in enumerate(backbone.between)}
    for block in backbone.blocks:
        for role in ALL_ROLES:
            for index, path in enumerate(block.roles[role]):
                names.setdefault(path, f"{block.index}.{role}" + (f".{index}" if index else ""))
    return {name: path for path, name in names.items()}


def largest(scores: Iterable[Tensor], count: int) -> tuple[Tensor, list[Tensor]]:
    """The largest entries of some tensors together, and their indices in each flattened tensor, in order.

    At any time it holds only one tensor beside the entries found so far.
    """
    best, where, ends = torch.empty(0), torch.empty(0, dtype=torch.long), [0]
    for score in scores:
        flat = score.flatten()
        positions = torch.arange(ends[-1], ends[-1] + flat.numel(), device=flat.device)
        ends.append(ends[-1] + flat.numel())
        best, where = torch.cat([best.to(flat), flat]), torch.cat([where.to(flat.device), positions])
        if len(best) > count:
            best, kept = best.topk(count)
            where = where[kept]
    where = where.sort().values
    return best, [where[(where >= start) & (where < end)] - start for start, end in pairwise(ends)]
