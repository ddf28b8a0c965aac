"""Adapters that are made of several methods, their parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from ..backbones.backbone import VisionBackbone
from ..sites import BranchSite, LinearSite, OutputSite, Placement, SideSite, TokenSite, WeightSite
from .calibration import Calibration
from .config import VisualPeftConfig
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
        shared, site = placement.shared, placement.site
        if shared is not None:
            shared = replace(shared, name=f"{self.label}_{shared.name}")
        if isinstance(site, TokenSite | SideSite):
            site = replace(site, part="/".join(filter(None, (self.label, site.part))))
        return replace(placement, slot=f"{self.label}_{placement.slot}", site=site, shared=shared)


@dataclass
class PartedConfig(VisualPeftConfig):
    """Base of the configs of adapters that are made of several methods."""

    def adapter_parts(self) -> Sequence[Part]:
        """The methods, in the order in which they act where that matters."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it is made of.")

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
        ValueError: a part acts before another that is listed before it, whatever the order of the list.
    """
    meeting: dict[tuple[str, str], list[tuple[Part, Placement]]] = {}
    for part, placement in placed:
        site = placement.site
        if isinstance(site, WeightSite | OutputSite | LinearSite):
            meeting.setdefault((placement.path, ""), []).append((part, placement))
        elif isinstance(site, BranchSite):
            meeting.setdefault((placement.path, site.sublayer), []).append((part, placement))
    for (path, sublayer), those in meeting.items():
        for (first, one), (second, other) in combinations(those, 2):
            if first is second or _rank(one) <= _rank(other):
                continue
            if sublayer:
                place = "MLP" if sublayer == "mlp" else sublayer
                reason = f"reads the stream after the {place} of {path!r} with all that other branches add there"
            else:
                reason = f"acts on the output of {path!r}, and {_named(second)} on its weight or bias"
            raise ValueError(
                f"{type(config).__name__}: {_named(first)} {reason}, so it comes after {_named(second)}, which is "
                "listed later. List them in the order in which they act."
            )


def _rank(placement: Placement) -> int:
    """Where an equation comes among those at its module or sub-layer, by the kind of its site."""
    site = placement.site
    return int(site.reads == "sum" if isinstance(site, BranchSite) else not isinstance(site, WeightSite))


def _named(part: Part) -> str:
    return f"{type(part.config).__name__} ({part.label})"
