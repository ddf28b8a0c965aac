"""Search spaces of several methods in one adapter, with a size for each block, as NOAH's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from ..backbones.finding import find_backbone
from ..methods.unified.composite import CompositeConfig
from ..sites import layers_of
from .spaces import Space, check_keys, check_options
from .subnets import ADAPTER, Choice, Gene, Subnets, weights_of


SIZE_MUTATION, DEPTH_MUTATION = 0.2, 0.4  # NOAH's
_OWN = ("method", "sizes", "depths")
_MEASURED = "measured"  # name of adapters that exist for a moment
_PREFIX = CompositeConfig.method_type.lower() + "_"


@dataclass(frozen=True)
class PartSpace:
    """One method of the space.

    Attributes:
        method: its name.
        fields: of its config, the same in all subnets.
        size: name of the field that differs.
        sizes: options for it; 0: the block goes without.
        depths: options for the number of blocks from the first; None: all blocks.
    """

    method: str
    fields: dict[str, Any]
    size: str
    sizes: tuple[int, ...]
    depths: tuple[int, ...] | None

    def mapping(self, size: int, layers: Sequence[int] | None) -> dict[str, Any]:
        """A part of a composite config.

        Args:
            size: of all its blocks.
            layers: the blocks; None for all.
        """
        chosen = {} if layers is None else {"layers_to_transform": list(layers)}
        return {"method": self.method, **self.fields, self.size: size, **chosen}


@dataclass(frozen=True)
class CompositeSpace(Space):
    """Several methods, each with a size for every block and a number of blocks.

    Attributes:
        parts: the methods.
        labels: of the parts in the supernet.
    """

    parts: tuple[PartSpace, ...]
    labels: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        config = CompositeConfig(parts=[part.mapping(part.sizes[-1], None) for part in self.parts])
        object.__setattr__(self, "labels", tuple(part.label for part in config.adapter_parts()))
        for label, part, read in zip(self.labels, self.parts, config.parts, strict=True):
            if isinstance(read, LoraConfig):
                raise ValueError(
                    f"search space, part {label}: LoRA's factor is lora_alpha / r, so ranks share no weights. Take "
                    "sharedlora (queries, keys and values) instead, whose factor does not depend on r."
                )
            for size in part.sizes[:-1]:
                if size:
                    CompositeConfig(parts=[part.mapping(size, None)])

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> CompositeSpace:
        """From `parts`."""
        check_keys(given, ("method", "parts"), "search space")
        parts = given.get("parts")
        if not isinstance(parts, list | tuple) or not parts:
            raise ValueError(f"search space: parts is {parts!r}: must be a list of methods with their options.")
        return cls(tuple(_read_part(index, part) for index, part in enumerate(parts)))

    def supernet(self, model: nn.Module) -> CompositeConfig:
        """The largest size in the largest number of blocks."""
        parts = []
        for part in self.parts:
            layers = None if part.depths is None else range(part.depths[-1])
            parts.append(part.mapping(part.sizes[-1], layers))
        depth = find_backbone(model).depth
        for label, part in zip(self.labels, self.parts, strict=True):
            if part.depths is not None and part.depths[-1] > depth:
                raise ValueError(
                    f"search space, part {label}: depths goes up to {part.depths[-1]}, but {type(model).__name__} has "
                    f"{depth} blocks. Lower it, or leave depths out for all blocks."
                )
        return CompositeConfig(parts=parts)

    def subnets(self, model: PeftModel) -> CompositeSubnets:
        """On this model."""
        return CompositeSubnets(self, model)


def _read_part(index: int, given: Any) -> PartSpace:
    where = f"search space, parts[{index}]"
    if not isinstance(given, Mapping) or not isinstance(given.get("method"), str):
        raise ValueError(f"{where} is {given!r}: must be a mapping with a method, as {{method: vpt, sizes: ...}}.")
    fields = {key: value for key, value in given.items() if key not in _OWN}
    sizes, depths = given.get("sizes"), given.get("depths")
    if not isinstance(sizes, Mapping) or len(sizes) != 1:
        raise ValueError(f"{where}: sizes is {sizes!r}: must name one field and its options, as {{r: [5, 10, 50]}}.")
    ((size, options),) = sizes.items()
    for name in (size, "layers_to_transform"):
        if name in fields:
            raise ValueError(f"{where}: {name} is searched, so it cannot be set. Remove it.")
    found = check_options(options, f"{where}: sizes.{size}", 0)
    if found[-1] == 0:
        raise ValueError(f"{where}: sizes.{size} is [0]: give it a size above 0.")
    depth_options = None if depths is None else check_options(depths, f"{where}: depths", 0)
    if depth_options is not None and depth_options[-1] == 0:
        raise ValueError(f"{where}: depths is [0]: give it a depth above 0.")
    return PartSpace(given["method"], fields, str(size), found, depth_options)


class CompositeSubnets(Subnets):
    """The subnets of a `CompositeSpace` on one model.

    Weights are shared as in NOAH: a subnet of size k has the first k rows or columns of the supernet's tensors.

    Args:
        space: declares them.
        model: with the supernet.

    Raises:
        ValueError: a method's smaller sizes are not parts of its largest, or its blocks depend on each other.
    """

    def __init__(self, space: CompositeSpace, model: PeftModel) -> None:
        self.space = space
        backbone = find_backbone(model.get_base_model())
        self._blocks = backbone.blocks
        self._depths = [part.depths or (backbone.depth,) for part in space.parts]
        # by part, size and block: names of the supernet's weights, with the shapes of the subnet's
        self._shapes: list[dict[int, dict[int, dict[str, torch.Size]]]] = []
        for index in range(len(space.parts)):
            self._shapes.append(self._measured(index, model))
        self._require_whole(model)
        self._layers = [
            (layer, self._block_of(path), layer.plans[ADAPTER])
            for path, layer in layers_of(model.get_base_model()).items()
            if ADAPTER in layer.plans
        ]
        self._present: list[list[int]] = []  # blocks of each part that have something to choose
        genes = []
        for label, part, depths, shapes in zip(space.labels, space.parts, self._depths, self._shapes, strict=True):
            blocks = sorted(shapes[part.sizes[-1]])
            self._present.append(blocks)
            genes.append(Gene(f"{label}.depth", depths, DEPTH_MUTATION))
            genes += [Gene(f"{label}.{part.size}[{block}]", part.sizes, SIZE_MUTATION) for block in blocks]
        super().__init__(genes)
        self._costs = [
            {size: {block: sum(map(math.prod, own.values())) for block, own in blocks.items()}
             for size, blocks in shapes.items()}
            for shapes in self._shapes
        ]  # fmt: skip

    def canonical(self, choice: Choice) -> Choice:
        """With the first size in blocks that the depth leaves out."""
        result: list[int] = []
        for genes, blocks, depths in zip(self._split(choice), self._present, self._depths, strict=True):
            depth = depths[genes[0]]
            result += [genes[0], *(own if block < depth else 0 for own, block in zip(genes[1:], blocks, strict=True))]
        return tuple(result)

    def sizes(self, choice: Choice) -> list[dict[int, int]]:
        """For each part, the size by block; blocks without it are left out."""
        found = []
        rows = zip(self._split(choice), self.space.parts, self._present, self._depths, strict=True)
        for genes, part, blocks, depths in rows:
            chosen = {block: part.sizes[own] for own, block in zip(genes[1:], blocks, strict=True)}
            found.append({block: size for block, size in chosen.items() if size and block < depths[genes[0]]})
        return found

    def parameters(self, choice: Choice) -> int:
        """The sum over parts and blocks."""
        return sum(
            costs[size][block]
            for costs, sizes in zip(self._costs, self.sizes(choice), strict=True)
            for block, size in sizes.items()
        )

    def smallest(self) -> Choice:
        """The first option of all genes, or of all but one part."""
        first = self.canonical((0,) * len(self.genes))
        if self.parameters(first):
            return first
        found: list[Choice] = []
        start = 0
        for blocks, depths, part in zip(self._present, self._depths, self.space.parts, strict=True):
            # one block more than none, in every way
            for depth, own, size in product(range(len(depths)), range(len(blocks)), range(len(part.sizes))):
                choice = [0] * len(self.genes)
                choice[start], choice[start + 1 + own] = depth, size
                found.append(self.canonical(tuple(choice)))
            start += 1 + len(blocks)
        return min((each for each in found if self.parameters(each)), key=self.parameters)

    def describe(self, choice: Choice) -> dict[str, Any]:
        """Parts of one size each."""
        return {"method": "composite", "parts": self._mappings(choice)}

    def config(self, choice: Choice) -> CompositeConfig:
        """Parts of one size each."""
        return CompositeConfig(parts=self._mappings(choice))

    def tensors(self, choice: Choice, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first rows and columns."""
        found: dict[str, Tensor] = {}
        for shapes, sizes in zip(self._shapes, self.sizes(choice), strict=True):
            for block, size in sizes.items():
                found |= {name: _first(weights[name], shape) for name, shape in shapes[size][block].items()}
        return found

    def own_weights(self, choice: Choice, weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The same tensors under the labels of the subnet's parts."""
        labels = {}
        own = [part.label for part in self.config(choice).adapter_parts()]
        for label, (index, _, _) in zip(own, self._groups(choice), strict=True):
            labels[label] = self.space.labels[index]
        parts = self.tensors(choice, weights)
        return {name: parts[_renamed(name, labels)] for name, _ in model.named_parameters() if _has_own(name)}

    @contextmanager
    def alone(self, choice: Choice) -> Iterator[None]:
        """Leave the equations of parts out in blocks that lack them."""
        sizes = dict(zip(self.space.labels, self.sizes(choice), strict=True))
        try:
            for layer, block, plan in self._layers:
                layer.plans[ADAPTER] = tuple(
                    planned for planned in plan if block in sizes[_label(planned.attribute, self.space.labels)]
                )
            yield
        finally:
            for layer, _, plan in self._layers:
                layer.plans[ADAPTER] = plan

    def _split(self, choice: Choice) -> list[Choice]:
        """The genes of each part."""
        found: list[Choice] = []
        start = 0
        for blocks in self._present:
            found.append(choice[start : start + 1 + len(blocks)])
            start += 1 + len(blocks)
        return found

    def _groups(self, choice: Choice) -> list[tuple[int, int, list[int]]]:
        """Part, size and blocks, in the order of the config's parts."""
        groups = []
        for index, sizes in enumerate(self.sizes(choice)):
            for size in sorted(set(sizes.values())):
                groups.append((index, size, [block for block, own in sizes.items() if own == size]))
        return groups

    def _mappings(self, choice: Choice) -> list[dict[str, Any]]:
        return [self.space.parts[index].mapping(size, blocks) for index, size, blocks in self._groups(choice)]

    def _block_of(self, path: str) -> int:
        inside = [block.index for block in self._blocks if f"{path}.".startswith(f"{block.path}.")]
        return inside[0] if inside else -1

    def _measured(self, index: int, model: PeftModel) -> dict[int, dict[int, dict[str, torch.Size]]]:
        """Names and shapes of a part's weights, by size and block."""
        part, label, depth = self.space.parts[index], self.space.labels[index], self._depths[index][-1]
        layers, where = range(depth), f"search space, part {label}"
        found = {size: self._names(index, size, layers, model) for size in part.sizes if size}
        largest = found[part.sizes[-1]]
        whole = {name: shape for own in largest.values() for name, shape in own.items()}
        for size, blocks in found.items():
            small = {name: shape for own in blocks.values() for name, shape in own.items()}
            fits = small.keys() == whole.keys() and all(
                len(shape) == len(whole[name]) and all(a <= b for a, b in zip(shape, whole[name], strict=True))
                for name, shape in small.items()
            )
            if not fits:
                raise ValueError(
                    f"{where}: with {part.size}={size}, the weights of {part.method} are not parts of those with "
                    f"{part.size}={part.sizes[-1]}, so sizes cannot share weights. Choose another method."
                )
        last = layers[-1]
        try:
            alone = self._names(index, part.sizes[-1], [last], model)
        except ValueError:  # nothing to act on
            alone = {}
        if alone != ({last: largest[last]} if last in largest else {}):
            raise ValueError(
                f"{where}: the weights of {part.method} in a block depend on which other blocks have it, so blocks "
                "cannot choose by themselves. Choose another method, or fields with which every block has its own."
            )
        return found

    def _require_whole(self, model: PeftModel) -> None:
        """Refuse weights that belong to no block."""
        largest = [shapes[part.sizes[-1]] for part, shapes in zip(self.space.parts, self._shapes, strict=True)]
        known = {name for blocks in largest for block, own in blocks.items() if block >= 0 for name in own}
        outside = [name for name in weights_of(model) if name not in known]
        if outside:
            raise ValueError(
                f"search space: {outside[0].removeprefix('base_model.model.')} is outside of the blocks, so no block "
                "can choose it. Choose another method, or fields without it."
            )

    def _names(
        self, index: int, size: int, layers: Sequence[int], model: PeftModel
    ) -> dict[int, dict[str, torch.Size]]:
        """Names in the supernet and shapes of the weights of a part, by block, with one size in some blocks."""
        config = CompositeConfig(parts=[self.space.parts[index].mapping(size, layers)], modules_to_save=[])
        (part,) = config.adapter_parts()
        with torch.random.fork_rng(devices=[]):
            model.add_adapter(_MEASURED, config, low_cpu_mem_usage=True)
        try:
            _require_own_blocks(model, self._block_of, self.space.labels[index])
            found: dict[int, dict[str, torch.Size]] = {}
            for name, parameter in model.named_parameters():
                if f".{_PREFIX}" in name and f".{_MEASURED}." in name:
                    block = self._block_of(name.removeprefix("base_model.model."))
                    own = _renamed(name, {part.label: self.space.labels[index]})
                    found.setdefault(block, {})[own.replace(f".{_MEASURED}.", f".{ADAPTER}.")] = parameter.shape
        finally:
            model.delete_adapter(_MEASURED)
        return found


def _require_own_blocks(model: PeftModel, block_of: Any, label: str) -> None:
    """Refuse weights that blocks share."""
    homes: dict[str, int] = {}
    for path, layer in layers_of(model.get_base_model()).items():
        for planned in layer.plans.get(_MEASURED, ()):
            if planned.shared is None:
                continue
            home = homes.setdefault(planned.shared, block_of(path))
            if home != block_of(path):
                raise ValueError(
                    f"search space, part {label}: its blocks share weights, so they cannot choose by themselves. "
                    "Choose another method."
                )


def _first(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The first entries along each dimension."""
    for dim, size in enumerate(shape):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, 0, size)
    return tensor


def _label(attribute: str, labels: Sequence[str]) -> str:
    """The label of the part to which a slot belongs."""
    return next(label for label in labels if attribute.startswith(f"{_PREFIX}{label}_"))


def _has_own(name: str) -> bool:
    return f".{_PREFIX}" in name and f".{ADAPTER}." in name.rpartition(f".{_PREFIX}")[2]


def _renamed(name: str, labels: Mapping[str, str]) -> str:
    """A weight's name with another label of its part."""
    head, _, tail = name.rpartition(f".{_PREFIX}")
    label = next(label for label in labels if tail.startswith(f"{label}_"))
    return f"{head}.{_PREFIX}{labels[label]}{tail.removeprefix(label)}"
