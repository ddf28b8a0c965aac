"""Find the border between the frozen and the trained part of any model, by running it with hooks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.backbone import BackboneError, Block, VisionBackbone, unwrapped
from ..backbones.finding import find_backbone
from .calls import CallPoint, Forward, base_path, call_points, replaced
from .replay import Border, Output, Scaled, exchanges_of, leaves_of


ROWS = (3, 2)  # samples in the two batches whose shapes are compared
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative to the largest output; errors are far larger
_HALF_TOLERANCE = 5e-2


@dataclass(eq=False)
class _Call:
    """One call of a module.

    Attributes:
        point: the place of the call.
        first: its first argument.
        inner: the calls inside.
        output: its output.
    """

    point: CallPoint
    first: Any
    inner: list[_Call] = field(default_factory=list)
    output: Any = None

    @property
    def frozen(self) -> bool:
        """Whether nothing that trains took part in the call, or in the tensors that it returned."""
        tensors = [leaf for leaf in leaves_of(self.output)[0] if isinstance(leaf, Tensor)]
        if not tensors or any(tensor.requires_grad for tensor in tensors):
            return False
        # calls by hooks inside may have stored their result elsewhere
        return not any(call.point.trains for call in _all([self]))


class BorderFinder:
    """Runs a model with hooks and finds its frozen part.

    A module is frozen if nothing in it trains and nothing that trains affects its output; the outermost frozen modules
    are skipped later. A test shows which of their outputs the rest of the model reads: a tensor of NaN in place of an
    output reaches the model's output if and only if it is read. Where a task head reads something frozen, only its
    input is stored, which is smaller.

    Args:
        model: as it will be trained.
        run: calls it with a batch.
        device: of the model.
    """

    def __init__(self, model: nn.Module, run: Callable[[Mapping[str, Tensor]], Any], device: torch.device) -> None:
        self.model, self.run, self.device = model, run, device
        self.points = call_points(model)
        get_base: Any = getattr(model, "get_base_model", None)
        self.base: nn.Module = model if get_base is None else get_base()
        self.backbone: VisionBackbone | None = None
        with suppress(BackboneError):  # a model without a backbone that is known also has a border
            self.backbone = find_backbone(self.base)

    def find(self, batch: Mapping[str, Tensor]) -> Border:
        """Find the border.

        Args:
            batch: inputs of the model for `ROWS[0]` samples.

        Raises:
            ValueError: nothing is frozen, or the model cannot be run from stored features.
        """
        few = {name: value[: ROWS[1]] for name, value in batch.items()}
        with torch.enable_grad():
            calls, result = self._watch(batch)
            fewer_calls, fewer_results = self._watch(few)
        expected = _floats(result)
        # others do not depend on the images, such as features of class names
        by_row = [len(one) < len(all_) for one, all_ in zip(_floats(fewer_results), expected, strict=True)]
        if not any(tensor.requires_grad for tensor in expected):
            raise ValueError(f"{type(self.model).__name__}: nothing that trains affects its output.")
        expected = [tensor.detach() for tensor in expected]
        values: dict[str, Tensor] = {}
        border = self._outlined(calls, fewer_calls, batch, values)
        exchanges = exchanges_of(self.model)
        border.exchanges = exchanges
        border.grid = next((exchange.grid for exchange in exchanges if exchange.grid is not None), None)
        if border.grid is not None and border.grid.cells is not None:
            raise ValueError("The features of images whose patches differ in number or order cannot be cached.")
        with torch.no_grad():
            heads = {str(leaf.key) for leaf in border.readers.values()}
            needed = heads
            if not heads or not self._agrees(border, {key: values[key] for key in heads}, expected):
                needed = {key for key in values if self._is_read(border, values, key)}
            self._settle(border, values, needed)
            # in another order and number, to detect outputs that depend on the rest of the batch
            rows = [ROWS[0] - 1, 0]
            chosen = {key: values[key][rows] for key in needed}
            fewer = [tensor[rows] if each else tensor for each, tensor in zip(by_row, expected, strict=True)]
            if not self._agrees(border, chosen, fewer):
                raise ValueError(
                    f"{type(self.model).__name__} does not give the same output from stored features: it reads more "
                    "than its modules return, or mixes the images of a batch. Train it without a cache."
                )
        return border

    def _watch(self, batch: Mapping[str, Tensor]) -> tuple[list[_Call], Any]:
        root = _Call(self.points[0], None)
        stack = [root]

        def watched(point: CallPoint, forward: Forward, *args: Any, **kwargs: Any) -> Any:
            call = _Call(point, args[0] if args else None)
            stack[-1].inner.append(call)
            stack.append(call)
            try:
                output = forward(*args, **kwargs)
                call.output = point.seen(output)
            finally:
                stack.pop()
            return output

        with replaced({point: partial(watched, point, point.forward) for point in self.points}):
            result = self.run(batch)
        return root.inner, result

    def _outlined(
        self,
        calls: list[_Call],
        fewer_calls: list[_Call],
        batch: Mapping[str, Tensor],
        values: dict[str, Tensor],
    ) -> Border:
        """The modules that may be cut and the tensors that could be stored, with their values for the batch."""
        whole = _frozen_points(calls)
        blocks = {id(unwrapped(self.base.get_submodule(block.path))) for block in self._blocks}
        frozen, live = _outermost(calls, whole, blocks)
        again, _ = _outermost(fewer_calls, whole, blocks)
        by_point = _by_point(_all(fewer_calls))
        self._check_blocks(frozen)
        readers = {}
        dropping: set[nn.Module] = set()
        for head in self._heads():
            for call in live:
                if call.point.module is not head or not isinstance(call.first, Tensor) or call.first.requires_grad:
                    continue
                reader, first = call.point, call.first
                for point, of_point in list(frozen.items()):
                    # a dropout before the head stays active
                    if isinstance(point.module, nn.Dropout) and of_point[-1].output is first:
                        reader, first = point, of_point[-1].first
                        del frozen[point]
                        dropping.add(point.module)
                small = by_point[reader][-1].first
                leaf = Scaled.of(f"{reader.path} (input)", first, small, ROWS)
                if leaf is not None and leaf.sample is not None and len(by_point[reader]) == 1:
                    readers[reader] = leaf
                    values[str(leaf.key)] = first.detach()
        cuts = {point: self._outputs(point, of_point, again[point], values) for point, of_point in frozen.items()}
        inputs = {}
        for name, value in batch.items():
            leaf = Scaled.of(name, value, value[: ROWS[1]], ROWS)
            assert leaf is not None
            inputs[name] = leaf
            if value.is_floating_point():
                values[name] = value
        # the output of a module that is frozen in only some of its calls may reach a cut
        shared = {call.point.module for call in live if call.frozen} - dropping
        return Border(cuts, readers, inputs, {call.point.module for call in live} - shared | dropping)

    def _outputs(
        self, point: CallPoint, calls: list[_Call], again: list[_Call], values: dict[str, Tensor]
    ) -> list[Output]:
        outputs = []
        for number, (call, small) in enumerate(zip(calls, again, strict=True)):
            leaves, spec = leaves_of(call.output)
            small_leaves, _ = leaves_of(small.output)
            found: list[Any] = []
            for index, (leaf, other) in enumerate(zip(leaves, small_leaves, strict=True)):
                if not isinstance(leaf, Tensor):
                    found.append(leaf)
                    continue
                key = point.path + (f" (call {number})" if number else "") + (f" ({index})" if index else "")
                scaled = Scaled.of(key, leaf, other, ROWS)
                found.append(leaf if scaled is None else scaled)
                if scaled is not None and leaf.is_floating_point():
                    values[key] = leaf
            outputs.append(Output(spec, tuple(found)))
        return outputs

    @property
    def _blocks(self) -> tuple[Block, ...]:
        return () if self.backbone is None else self.backbone.blocks

    def _heads(self) -> list[nn.Module]:
        return [] if self.backbone is None else [self.base.get_submodule(path) for path in self.backbone.heads]

    def _check_blocks(self, frozen: Mapping[CallPoint, list[_Call]]) -> None:
        """Raise an error unless at least one block, or the whole backbone, is frozen."""
        blocks = [base_path(block.path) for block in self._blocks]
        cuts = [point for point in frozen if next(point.module.parameters(), None) is not None]
        if not (any(_within(block, cut.path) for block in blocks for cut in cuts) if blocks else cuts):
            raise ValueError(
                "No block of the backbone is frozen from the images on: trained parameters change what every block "
                "computes, so there are no features to cache. A linear probe, side networks, and methods on the last "
                "blocks only (layers_to_transform) have such features."
            )

    def _replayed(self, border: Border, features: Mapping[str, Tensor], rows: int) -> list[Tensor]:
        arguments = border.arguments(features, rows, self.device)
        with border.replay(features, arguments, rows, self.device):
            return _floats(self.run(arguments))

    def _agrees(self, border: Border, features: Mapping[str, Tensor], expected: list[Tensor]) -> bool:
        rows = len(next(iter(features.values()))) if features else ROWS[0]
        found = self._replayed(border, features, rows)
        for one, other in zip(found, expected, strict=True):
            tolerance = _TOLERANCE.get(other.dtype, _HALF_TOLERANCE) * float(other.abs().max())
            if not bool(torch.isfinite(one).all()) or float((one - other).abs().max()) > tolerance:
                return False
        return True

    def _is_read(self, border: Border, values: Mapping[str, Tensor], key: str) -> bool:
        others = {name: value for name, value in values.items() if name != key}
        return any(bool(torch.isnan(tensor).any()) for tensor in self._replayed(border, others, ROWS[0]))

    def _settle(self, border: Border, values: Mapping[str, Tensor], needed: set[str]) -> None:
        """Keep only the needed features in the border, and record their shapes."""
        leaves = [leaf for outputs in border.cuts.values() for output in outputs for leaf in output.leaves]
        known = {
            leaf.key: leaf for leaf in (*border.readers.values(), *leaves, *border.inputs.values()) if _is_key(leaf)
        }
        border.readers = {point: leaf for point, leaf in border.readers.items() if leaf.key in needed}
        for key in values:
            if key in needed:
                leaf = known[key]
                if leaf.sample is None:
                    raise ValueError(
                        f"{key} has the shape {tuple(values[key].shape)} for {ROWS[0]} images, which cannot be split "
                        "into one feature per image. Train without a cache."
                    )
                border.shapes[key] = leaf.sample


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, Scaled) and leaf.key is not None


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def _floats(result: Any) -> list[Tensor]:
    return [leaf for leaf in leaves_of(result)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _all(calls: list[_Call]) -> list[_Call]:
    return [one for call in calls for one in (call, *_all(call.inner))]


def _by_point(calls: list[_Call]) -> dict[CallPoint, list[_Call]]:
    found: dict[CallPoint, list[_Call]] = {}
    for call in calls:
        found.setdefault(call.point, []).append(call)
    return found


def _frozen_points(calls: list[_Call]) -> set[CallPoint]:
    """The calls of modules without trained parameters that are frozen in every call."""
    by_point = _by_point(_all(calls))
    return {point for point, some in by_point.items() if all(call.frozen for call in some)}


def _outermost(
    calls: list[_Call], frozen: Collection[CallPoint], blocks: Collection[int]
) -> tuple[dict[CallPoint, list[_Call]], list[_Call]]:
    """The outermost calls of frozen modules, by module, and all calls around and beside them.

    A block that is only partly frozen runs as a whole, because it has many inner tensors.
    """
    live = []
    found: list[_Call] = []
    waiting = calls[::-1]
    while waiting:
        call = waiting.pop()
        if call.point in frozen:
            found.append(call)
        else:
            live.append(call)
            if id(call.point.module) not in blocks:
                waiting += call.inner[::-1]
    return _by_point(found), live
