"""Follow the stream of a block through a run: the branches that add to it, and the projections in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from .operations import is_depthwise, is_projection
from .paths import is_in
from .watching import Attention, Call, Trace


_ADDS = ("add", "addcmul")
_PRODUCTS_WITH_WEIGHTS = ("mm", "addmm", "linear")


@dataclass(frozen=True)
class Branch:
    """A branch: a value that is added to the stream at one place of a block.

    Attributes:
        stream: index of the stream before.
        added: index of the added value; the last one if several are multiplied.
        sum: index of the stream after.
        nodes: all on the way from the stream to what is added.
        calls: of modules on this way, in order.
        attention: softmax attention in the branch; None if there is none, or if there are several.
    """

    stream: int
    added: int
    sum: int
    nodes: frozenset[int]
    calls: tuple[Call, ...]
    attention: Attention | None = None


class BlockRun:
    """One block in a run: what adds to its stream, and which projections a value comes from or goes to.

    Args:
        trace: of the run.
        modules: of the model, by name.
        path: the block's name.
    """

    def __init__(self, trace: Trace, modules: Mapping[str, nn.Module], path: str) -> None:
        self.trace, self.modules, self.path = trace, modules, path
        calls = [call for call in trace.calls if call.path == path]
        self.call = calls[0]
        self.several = len(calls) > 1
        self.calls = [
            each
            for each in trace.calls
            if each.path != path and is_in(each.path, path)
            if self.call.start <= each.start and each.end <= self.call.end
        ]
        self.projections: dict[int, str] = {}  # what they return
        for each in self.calls:
            module = modules[each.path]
            if is_projection(module) and each.outputs and not is_depthwise(module):
                self.projections[each.outputs[0]] = each.path
        self.uncalled = self._uncalled()
        self.projections |= self.uncalled
        self.why: list[str] = []
        self.whole = False  # whether the block adds to its stream from the start
        self._branches: list[Branch] | None = None

    def _uncalled(self) -> dict[int, str]:
        """Projections whose weight the block reads without calling them, by the node of their product with it."""
        called = {each.path for each in self.calls}
        weights = {
            index: name.removesuffix(".weight")
            for name, index in self.trace.parameters.items()
            if name.endswith(".weight") and is_in(name, self.path) and name.removesuffix(".weight") not in called
        }
        found = {}
        for node in self.trace.nodes[self.call.start : self.call.end]:
            if node.op not in _PRODUCTS_WITH_WEIGHTS:
                continue
            for each in node.inputs:
                while self.trace.nodes[each].moves:
                    each = self.trace.nodes[each].inputs[0]
                module = self.modules.get(weights.get(each, ""))
                if module is not None and is_projection(module):
                    found[node.index] = weights[each]
        return found

    def branches(self) -> list[Branch]:
        """The branches of the block, in order; none if its output is not such a sum."""
        if self._branches is None:
            self._branches = self._find_branches()
        return self._branches

    def _find_branches(self) -> list[Branch]:
        trace, call = self.trace, self.call
        assert call.stream is not None
        entered = {each for each in trace.same(call.stream) if each < call.end}
        reached = trace.after(entered, call.end - 1)
        memo: dict[int, tuple[tuple[int, int, int], ...] | None] = {}

        def chain(index: int) -> tuple[tuple[int, int, int], ...] | None:
            if index in entered:
                return ()
            if index in memo:
                return memo[index]
            memo[index] = None
            node = trace.nodes[index]
            if node.index < call.start or index not in reached:
                return None
            if node.moves:
                memo[index] = chain(node.inputs[0])
            elif node.op in _ADDS and len(node.inputs) > 1:
                for each in node.inputs if node.op == "add" else node.inputs[:1]:
                    before = chain(each)
                    others = [other for other in node.inputs if other != each]
                    if before is not None:
                        last = max(others, key=lambda other: (other in reached, other))
                        memo[index] = (*before, (each, last, index))
                        break
            return memo[index]

        found = chain(call.outputs[0])
        self.whole = found is not None
        if not found:
            found = self._last_sums(call.outputs[0])
        made = []
        for stream, added, total in found:
            same = {each for each in trace.same(stream) if each < call.end}
            nodes = trace.after(same, total) & trace.before(added)
            inside = [each for each in self.calls if any(out in nodes or out == added for out in each.outputs)]
            attentions = [each for each in trace.attentions if each.output in nodes]
            made.append(
                Branch(
                    stream,
                    added,
                    total,
                    frozenset(nodes - same),
                    tuple(each for each in inside if each.end <= total),
                    attentions[0] if len(attentions) == 1 else None,
                )
            )
            if len(attentions) > 1:
                self.why.append(f"{len(attentions)} attentions add to the stream at once")
        return made

    def _last_sums(self, index: int) -> tuple[tuple[int, int, int], ...]:
        """Sums at the end of a block that does something else first: of a value and of a function of it."""
        found: list[tuple[int, int, int]] = []
        nodes = self.trace.nodes
        while index >= self.call.start:
            node = nodes[index]
            if node.moves:
                index = node.inputs[0]
            elif node.op in _ADDS and len(node.inputs) == 2:
                one, other = node.inputs
                ways = [(s, a) for s, a in ((one, other), (other, one)) if self._leads(s, a)]
                if len(ways) != 1:
                    break
                found.insert(0, (*ways[0], index))
                index = ways[0][0]
            else:
                break
        return tuple(found)

    def _leads(self, stream: int, added: int) -> bool:
        return stream >= self.call.start and bool(self.trace.same(stream) & self.trace.before(added))

    def as_one_branch(self) -> Branch | None:
        """The block as one branch, to find attention in a block that adds to no stream."""
        inside = [each for each in self.trace.attentions if self.call.start <= each.output < self.call.end]
        if len(inside) != 1 or self.call.stream is None:
            return None
        nodes = self.trace.after({self.call.stream}, self.call.end - 1)
        return Branch(
            self.call.stream, self.call.outputs[0], self.call.end, frozenset(nodes), tuple(self.calls), inside[0]
        )

    def multiples(self, index: int) -> set[int]:
        """A node, and the node of which it is a multiple, by a parameter or number."""
        found: set[int] = set()
        while index not in found:
            found |= self.trace.same(index)
            found.add(index)
            while self.trace.nodes[index].moves:
                index = self.trace.nodes[index].inputs[0]
            node = self.trace.nodes[index]
            if node.op in ("mul", "div"):
                index = max(node.inputs)
        return found

    def reading(self, branch: Branch) -> list[int]:
        """The nodes of a branch that read the stream itself."""
        same = self.trace.same(branch.stream)
        return [
            index
            for index in branch.nodes
            if not self.trace.nodes[index].moves and any(each in same for each in self.trace.nodes[index].inputs)
        ]

    def projections_before(self, index: int, within: Iterable[int]) -> list[str]:
        """The nearest projections that a node comes from."""
        allowed, todo, seen, found = set(within), [index], {index}, []
        while todo:
            each = todo.pop()
            if each in self.projections:
                found.append(self.projections[each])
                continue
            for other in self.trace.nodes[each].inputs:
                if other not in seen and (other in allowed or other in self.projections):
                    seen.add(other)
                    todo.append(other)
        return list(dict.fromkeys(found))

    def projections_after(self, index: int, within: Iterable[int]) -> list[str]:
        """The first projections that read a node."""
        starts: dict[int, list[Call]] = {}
        inside: set[int] = set()  # nodes of projections themselves
        for each in self.calls:
            if each.outputs and self.projections.get(each.outputs[0]) == each.path and each.stream is not None:
                starts.setdefault(each.stream, []).append(each)
                inside.update(range(each.start, each.end))
        allowed, found = set(within), []
        todo = [each for each in self.trace.same(index) if each not in inside or each == index]
        seen = set(todo)
        while todo:
            node = todo.pop()
            found += [call.path for call in starts.get(node, ()) if call.outputs[0] in allowed]
            for user in self.trace.users(node):
                if user not in seen and user in allowed and user not in inside:
                    seen.add(user)
                    todo.append(user)
        return list(dict.fromkeys(found))
