"""Adapters that are made of several methods, their parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor

from ..backbones.backbone import VisionBackbone
from ..sites import Placement
from .calibration import Calibration
from .config import VisualPeftConfig
from .outcome import Outcome
from .registry import get_method


@dataclass(frozen=True)
class Part:
    """One method of an adapter that is made of several.

    Attributes:
        label: tells the parts of an adapter apart; begins the slots of its equations.
        config: of the method.
    """

    label: str
    config: VisualPeftConfig

    def renamed(self, placement: Placement) -> Placement:
        """A placement of the method as one of the whole adapter.

        Args:
            placement: with the slot that the method alone would give it.
        """
        shared, site = placement.shared, placement.site.in_part(self.label)
        if shared is not None:
            shared = replace(shared, name=f"{self.label}_{shared.name}")
        return replace(placement, slot=f"{self.label}_{placement.slot}", site=site, shared=shared)


@dataclass
class PartedConfig(VisualPeftConfig):
    """Base of the configs of adapters that are made of several methods."""

    def adapter_parts(self) -> Sequence[Part]:
        """The methods, in the order in which they act where that matters."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it is made of.")

    def _part(self, label: str, config: VisualPeftConfig, **names: str) -> Part:
        """A part whose config users do not see, so that errors must name this one.

        Args:
            label: of the part.
            config: of the method, made from fields of this config.
            names: what this config calls fields of that one, where it has another name.
        """
        hidden: Any = config  # not fields, so that nothing saves them
        hidden.whole, hidden.fields_of_whole = type(self).__name__, names
        return Part(label, config)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """The equations of all parts."""
        for part in self.adapter_parts():
            yield from map(part.renamed, part.config.placements(backbone.select(part.config.layers)))

    def initialise(self, adapter: Calibration) -> None:
        """Set the initial weights of each part that depend on the backbone's."""
        for part in self.adapter_parts():
            part.config.initialise(replace(adapter, part=f"{adapter.part}{part.label}_"))

    def trained_parameters(self, name: str, shape: tuple[int, ...]) -> int:
        """As the part counts to which the tensor belongs."""
        slot = name.rpartition(f".{self.method_type.lower()}_")[2]
        for part in self.adapter_parts():
            if slot.startswith(f"{part.label}_"):
                return part.config.trained_parameters(name, shape)
        return super().trained_parameters(name, shape)

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether one of the parts has a loss of its own."""
        return any(part.config.has_auxiliary_loss for part in self.adapter_parts())

    def auxiliary_loss(self, outcome: Outcome) -> Tensor:
        """The sum of the losses of the parts, each of what its own equations left."""
        total = []
        for part in self.adapter_parts():
            if part.config.has_auxiliary_loss:
                left = tuple(each for each in outcome.left if each.slot.startswith(f"{part.label}_"))
                total.append(part.config.auxiliary_loss(replace(outcome, left=left)))
        return torch.stack(total).sum()

    @property
    def gradients(self) -> Literal["full", "partial", "none"]:
        """As far as those of the part whose gradients go the farthest."""
        found = {part.config.gradients for part in self.adapter_parts()} or {get_method(self.method_type).gradients}
        return "full" if "full" in found else "partial" if "partial" in found else "none"


def unknown_fields_of(config: VisualPeftConfig) -> list[str]:
    """Fields of a config's file that its class does not know, those of its parts too.

    Args:
        config: of a whole adapter.
    """
    inner = [f"{part.label}: {name}" for part in config.adapter_parts() for name in unknown_fields_of(part.config)]
    return [*config.unknown_fields, *inner]


def check_order(config: VisualPeftConfig, placed: Sequence[tuple[Part, Placement]]) -> None:
    """Refuse parts in an order in which they cannot act where they meet.

    Args:
        config: of the whole adapter.
        placed: each part with each of its placements, in the order of the parts.

    Raises:
        ValueError: a part acts before another that is listed before it.
    """
    meeting: dict[tuple[str, str], list[tuple[Part, Placement, int]]] = {}
    for part, placement in placed:
        if (turn := placement.site.turn()) is not None:
            meeting.setdefault((placement.path, turn[0]), []).append((part, placement, turn[1]))
    for those in meeting.values():
        for (first, one, when), (second, _, other) in combinations(those, 2):
            if first is not second and when > other:
                raise ValueError(
                    f"{type(config).__name__}: {_named(first)} {one.site.why_late(one.path)}, so it comes after "
                    f"{_named(second)}, which is listed later. List them in the order in which they act."
                )


def _named(part: Part) -> str:
    return f"{part.config.title} ({part.label})"
