"""Derive the roles of a block's modules from a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .backbone import linear_sizes
from .paths import is_in
from .watching import Attention, Call, Trace


_ADDS = ("add", "addcmul")
_PROJECTIONS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


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


@dataclass(frozen=True)
class BlockRoles:
    """Roles in one block; the fields have the names and the meaning of those of `Architecture`."""

    norm1: tuple[str, ...] = ()
    query: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    value: tuple[str, ...] = ()
    output: tuple[str, ...] = ()
    norm2: tuple[str, ...] = ()
    fc1: tuple[str, ...] = ()
    fc2: tuple[str, ...] = ()
    norm1_readers: tuple[str, ...] | None = None
    norm2_readers: tuple[str, ...] | None = None
    operations: tuple[str, ...] = ()
    drop_path: tuple[str, ...] = ()
    sublayers: tuple[str, ...] = ()
    post_norm: bool = False
    reads_attention: str | None = None
    reads_mlp: str | None = None
    reads_result: tuple[str, ...] = ()
    stream: str = "tokens"
    stream_inside: str | None = None
    softmax: bool = False
    prompts: str | None = None
    equal_parts: bool = True
    pools: bool = False
    prefix_tokens: int = 0
    width: int | None = None
    seen: str = field(default="", compare=False)

    def as_fields(self) -> dict[str, Any]:
        """The fields of an `Architecture`."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "seen"}


class BlockReader:
    """Reads one block.

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
            if isinstance(module, _PROJECTIONS) and each.outputs and _groups(module) == 1:
                self.projections[each.outputs[0]] = each.path
        self.why: list[str] = []
        self.whole = False  # whether the block adds to its stream from the start

    def read(self) -> BlockRoles:
        """All roles that can be derived."""
        operations = self._operations()
        shape = self._stream_shape()
        if shape is None:
            return BlockRoles(operations=operations, drop_path=self._drop_paths(), seen=self._seen())
        branches = self.branches()
        if not branches:
            self.why.append("what comes out is no sum of what came in and of what modules add")
            attention: dict[str, Any] = dict(self._attention_roles(self._whole()))
            used = {path for paths in attention.values() for path in paths}
            return BlockRoles(
                operations=tuple(path for path in operations if path not in used),
                drop_path=self._drop_paths(),
                seen=self._seen(),
                **attention,
            )
        result = self.trace.nodes[self.call.outputs[0]].shape
        layout = self._layout(result, branches) if len(result) == len(shape) else None
        if layout is None:
            self.why.append(f"which dimension of {result} holds the channels is not clear")
            return BlockRoles(operations=operations, drop_path=self._drop_paths(), seen=self._seen())
        stream, width = layout
        return self._additive(branches, operations, stream, width)

    def _seen(self) -> str:
        return "; ".join(self.why)

    def _stream_shape(self) -> tuple[int, ...] | None:
        """Shape of the input; None if it is not a stream that can be followed."""
        call = self.call
        if call.stream is None:
            self.why.append("its first argument is no tensor")
        elif not call.outputs:
            self.why.append("it returns no tensor")
        elif self.several:
            self.why.append("it is called more than once")
        elif call.named not in ("", "hidden_states"):
            self.why.append(f"its stream comes as the keyword {call.named!r}")
        else:
            shape = self.trace.nodes[call.stream].shape
            if len(shape) in (2, 3, 4):
                return shape
            self.why.append(f"its input has {len(shape)} dimensions")
        return None

    def branches(self) -> list[Branch]:
        """The branches of the block, in order; none if its output is not such a sum."""
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

    def _whole(self) -> Branch | None:
        """The block as one branch, to find attention in a block that adds to no stream."""
        inside = [each for each in self.trace.attentions if self.call.start <= each.output < self.call.end]
        if len(inside) != 1 or self.call.stream is None:
            return None
        nodes = self.trace.after({self.call.stream}, self.call.end - 1)
        return Branch(
            self.call.stream, self.call.outputs[0], self.call.end, frozenset(nodes), tuple(self.calls), inside[0]
        )

    def _layout(self, shape: tuple[int, ...], branches: list[Branch]) -> tuple[str, int] | None:
        """Layout and channels of the stream, according to the modules at its entrances and exits."""
        widths: list[int] = []
        for branch in branches:
            for call in branch.calls:
                module = self.modules[call.path]
                if call.stream is not None and call.stream in self.trace.same(branch.stream):
                    widths += _channels(module)
        found = self._from_sums(branches)
        candidates = [each for each in dict.fromkeys((*widths, *found)) if each in shape[1:]]
        if not candidates:
            return None
        width = candidates[0]
        if len(shape) == 2:
            return ("tokens", width) if shape[1] == width else None
        if len(shape) == 3:
            # methods do not support a stream of (batch, channels, positions)
            return ("tokens", width) if shape[2] == width else None
        first, last = shape[1] == width, shape[3] == width
        if first and last:
            convolved = any(isinstance(self.modules[call.path], nn.Conv2d) for b in branches for call in b.calls)
            return ("channels_first" if convolved else "channels_last", width)
        if first or last:
            return ("channels_first" if first else "channels_last", width)
        return None

    def _from_sums(self, branches: list[Branch]) -> list[int]:
        widths = []
        for branch in branches:
            for path in self._back(branch.added, branch.nodes):
                sizes = linear_sizes(self.modules[path])
                weight: Any = self.modules[path].weight
                widths.append(sizes[0] if sizes else weight.shape[0])
        return widths

    def _additive(self, branches: list[Branch], operations: tuple[str, ...], stream: str, width: int) -> BlockRoles:
        attention, mlp = self._which(branches)
        roles: dict[str, Any] = {}
        sublayers: list[str] = []
        entrances: dict[str, Call | None] = {}
        norms: dict[str, tuple[str, bool]] = {}
        for name, branch in (("attention", attention), ("mlp", mlp)):
            if branch is None:
                continue
            roles |= self._attention_roles(branch) if name == "attention" else self._mlp_roles(branch, width)
            norm = self._norm(branch)
            if norm is not None:
                norms[name] = norm
                roles["norm1" if name == "attention" else "norm2"] = (self._relative(norm[0]),)
            entered = self._entrance(branch, branches)
            if isinstance(entered, str):
                self.why.append(f"{name}: {entered}")
                continue
            sublayers.append(name)
            entrances[name] = entered
        posts = {after for _, after in norms.values()}
        if len(posts) > 1:  # one follows, one precedes: there is no field for that
            for role in ("norm1", "norm2"):
                roles.pop(role, None)
            norms, posts = {}, set()
            self.why.append("one norm follows its sub-layer, one precedes it")
        post_norm = posts == {True}
        if not self.whole:
            self.why.append("it does something else with its input before it adds to it")
            sublayers = [name for name in sublayers if name == "mlp" and entrances[name] is not None]
            if attention is None:
                roles |= self._attention_roles(self._whole())
        if attention is not None and mlp is not None and {"attention", "mlp"} <= set(sublayers):
            between = branches[branches.index(attention) + 1 : branches.index(mlp)]
            if between:
                self.why.append("something else adds to the stream between attention and MLP")
                sublayers.remove("attention")
            elif mlp.stream not in self.trace.same(attention.sum):
                sublayers = []
                self.why.append("attention and MLP read the same stream")
        rest: tuple[str, ...] = ()
        if sublayers:
            last = mlp if "mlp" in sublayers else attention
            assert last is not None
            following = branches[branches.index(last) + 1 :]
            if following:
                entered = self._rest(following[0])
                if entered is not None:
                    rest = (self._relative(entered.path),)
                else:
                    sublayers = []
                    self.why.append("the stream after the MLP is read by no module that could be watched")
        if len(self.trace.nodes[self.call.outputs[0]].shape) == 2:
            self.why.append("its stream has no dimension for the batch")
            sublayers = []
        inside = self._inside(sublayers, entrances, stream)
        if inside is None:
            sublayers = []
        given = {}
        for name in sublayers:
            call = entrances[name]
            norm = norms.get(name)
            if call is None:
                given[name] = "" if name == "mlp" or (norm and not post_norm) else None
            elif norm and not post_norm and call.path == norm[0]:
                given[name] = None
            else:
                given[name] = self._relative(call.path)
        used = {path for role, paths in roles.items() for path in paths}
        readers = {
            role: self._readers(branch, norms[name][0])
            for role, name, branch in (("norm1_readers", "attention", attention), ("norm2_readers", "mlp", mlp))
            if branch is not None and name in norms and not norms[name][1]
        }
        linears = tuple(dict.fromkeys(path for role in ("query", "key", "value") for path in roles.get(role, ())))
        usual = {"norm1_readers": linears, "norm2_readers": roles.get("fc1", ())}
        told: dict[str, Any] = {r: None if set(p) == set(usual[r]) else p for r, p in readers.items()}
        return BlockRoles(
            **roles,
            **told,
            operations=tuple(path for path in operations if path not in used),
            drop_path=self._drop_paths(),
            sublayers=tuple(sublayers),
            post_norm=post_norm,
            reads_attention=given.get("attention"),
            reads_mlp=given.get("mlp"),
            reads_result=rest,
            stream=stream,
            stream_inside=inside if inside != stream else None,
            softmax=bool(roles.get("query")),
            pools=self._pools(),
            width=None if any(roles.get(role) for role in ("norm1", "norm2", "fc2", "output")) else width,
            seen=self._seen(),
        )

    def _which(self, branches: list[Branch]) -> tuple[Branch | None, Branch | None]:
        """The branches of attention (or another mixer of tokens) and of the MLP."""
        attending = [each for each in branches if each.attention is not None]
        if len(attending) > 1:
            self.why.append(f"{len(attending)} attentions follow each other")
            return None, None
        if attending:
            later = [b for b in branches[branches.index(attending[0]) + 1 :] if self._is_mlp(b)]
            return attending[0], later[0] if later else None
        modules = [each for each in branches if each.calls]
        if len(modules) == 1:
            return None, modules[0]
        mlps = [each for each in modules if self._is_mlp(each)]
        if not mlps:
            return None, None
        mlp = mlps[-1]
        before = branches[: branches.index(mlp)]
        return (before[-1] if before and before[-1].calls else None), mlp

    def _is_mlp(self, branch: Branch) -> bool:
        first = self._forward(branch.stream, branch.nodes)
        last = self._back(branch.added, branch.nodes)
        return bool(first) and bool(last) and not set(first) & set(last)

    def _mlp_roles(self, branch: Branch, width: int) -> dict[str, tuple[str, ...]]:
        first, last = self._forward(branch.stream, branch.nodes), self._back(branch.added, branch.nodes)
        sizes = [linear_sizes(self.modules[path]) for path in (*first, *last)]
        written = {path for out, path in self.projections.items() if out in self.trace.overwritten}
        if written & {*first, *last}:  # what methods keep of a linear's output would change
            return {}
        fits = len(last) == 1 and 1 <= len(first) <= 2 and not set(first) & set(last) and all(sizes)
        if not fits or sizes[-1][0] != width or any(size[1] != width for size in sizes[:-1]):  # type: ignore[index]
            return {}
        order = {each.path: each.start for each in self.calls}
        return {
            "fc1": tuple(self._relative(path) for path in sorted(first, key=order.__getitem__)),
            "fc2": (self._relative(last[0]),),
        }

    def _attention_roles(self, branch: Branch | None) -> dict[str, tuple[str, ...]]:
        """Query, key, value and output projections of softmax attention; or the last projection of another mixer."""
        if branch is None:
            return {}
        seen = branch.attention
        if seen is None:
            last = self._back(branch.added, branch.nodes)
            fits = len(last) == 1 and linear_sizes(self.modules[last[0]]) is not None
            return {"output": (self._relative(last[0]),)} if fits else {}
        wide = self.trace.nodes[seen.query].shape
        parts = {
            "query": self._back(seen.query, branch.nodes),
            "key": self._back(seen.key, branch.nodes),
            "value": self._back(seen.value, branch.nodes),
            "output": self._forward(seen.output, branch.nodes),
        }
        if any(len(paths) != 1 for paths in parts.values()):
            described = ", ".join(f"{role}: {len(paths)}" for role, paths in parts.items())
            self.why.append(f"not one projection each of its attention was found ({described})")
            return {}
        sizes = linear_sizes(self.modules[parts["query"][0]])
        if sizes is None or sizes[0] % wide[-1] or self.trace.nodes[seen.output].shape[-2] != wide[-2]:
            self.why.append("its attention is not one of tokens")
            return {}
        return {role: (self._relative(paths[0]),) for role, paths in parts.items()}

    def _norm(self, branch: Branch) -> tuple[str, bool] | None:
        """The branch's norm and whether it follows; the one at its entrance, or else the one at its end."""
        entered, left = self.trace.same(branch.stream), self._scaled_back(branch.added)
        norms = [each for each in branch.calls if is_norm(self.modules[each.path])]
        for call in norms:
            if call.stream in entered:
                return call.path, False
        for call in norms:
            if any(each in left for each in call.outputs):
                return call.path, True
        return None

    def _scaled_back(self, index: int) -> set[int]:
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

    def _entrance(self, branch: Branch, branches: list[Branch]) -> Call | str | None:
        """The only module call through which a branch reads the stream; None for the block's own; else a reason."""
        same = self.trace.same(branch.stream)
        readers = self._reading(branch)
        shape = self.trace.nodes[self.call.outputs[0]].shape
        fitting = [
            call
            for call in branch.calls
            if call.stream in same and call.end <= branch.sum and not call.named
            if all(call.start <= index < call.end for index in readers)
            if len(self.trace.nodes[call.stream].shape) in (3, len(shape))
        ]
        if fitting:  # a norm between the stream and the sub-layer
            return next((call for call in fitting if is_norm(self.modules[call.path])), fitting[0])
        if branch is branches[0]:
            return None
        return "no module alone reads the stream there"

    def _pools(self) -> bool:
        nodes = self.trace.nodes
        return nodes[self.call.stream or 0].shape != nodes[self.call.outputs[0]].shape

    def _rest(self, branch: Branch) -> Call | None:
        """The module that continues with the stream: everything that reads the stream, also the sum, is in it."""
        same, readers = self.trace.same(branch.stream), self._reading(branch)
        for call in self.calls:
            if call.stream in same and not call.named and call.start <= branch.sum < call.end:
                return call if all(call.start <= index < call.end for index in readers) else None
        return None

    def _reading(self, branch: Branch) -> list[int]:
        same = self.trace.same(branch.stream)
        return [
            index
            for index in branch.nodes
            if not self.trace.nodes[index].moves and any(each in same for each in self.trace.nodes[index].inputs)
        ]

    def _inside(self, sublayers: Iterable[str], entrances: Mapping[str, Call | None], stream: str) -> str | None:
        """The layout of the stream at the entrances of the sub-layers; None if they differ."""
        outer = self.trace.nodes[self.call.outputs[0]].shape
        found = set()
        for name in sublayers:
            call = entrances[name]
            if call is None:
                found.add(stream)
                continue
            assert call.stream is not None
            shape = self.trace.nodes[call.stream].shape
            if shape == outer or len(shape) == 3:
                found.add(stream)
            elif shape == (outer[0], *outer[2:], outer[1]):
                found.add("channels_last")
            elif shape == (outer[0], outer[-1], *outer[1:-1]):
                found.add("channels_first")
            else:
                self.why.append(f"{name} reads the stream as {shape}, the block as {outer}")
                return None
        if len(found) > 1:
            self.why.append("attention and MLP read the stream in different layouts")
            return None
        return found.pop() if found else stream

    def _readers(self, branch: Branch, norm: str) -> tuple[str, ...]:
        """The linears that read a norm; none if other operations also read it."""
        call = next(each for each in branch.calls if each.path == norm)
        if not call.outputs:
            return ()
        todo, seen, found = [call.outputs[0]], {call.outputs[0]}, []
        starts = {each.path: each for each in self.calls if each.path in self.projections.values()}
        while todo:
            index = todo.pop()
            inside = [path for path, each in starts.items() if each.stream == index]
            for path in inside:
                module: Any = self.modules[path]
                if linear_sizes(module) is None and any(getattr(module, "padding", (0,))):
                    return ()
            found += inside
            for user in self.trace.users(index):
                if user in seen or any(starts[path].start <= user < starts[path].end for path in inside):
                    continue
                seen.add(user)
                node = self.trace.nodes[user]
                padded = node.op == "constant_pad_nd" and node.shape != self.trace.nodes[index].shape
                if not node.selects or padded:
                    return ()
                todo.append(user)
        order = {path: each.start for path, each in starts.items()}
        return tuple(self._relative(path) for path in sorted(dict.fromkeys(found), key=order.__getitem__))

    def _back(self, index: int, within: Iterable[int]) -> list[str]:
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

    def _forward(self, index: int, within: Iterable[int]) -> list[str]:
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

    def _operations(self) -> tuple[str, ...]:
        """Linears, convolutions and norms that were called, in the order of the block's modules."""
        called = {each.path for each in self.calls} | {self.path}
        return tuple(
            self._relative(path)
            for path, module in self.modules.items()
            if is_in(path, self.path) and path in called and is_operation(module)
        )

    def _drop_paths(self) -> tuple[str, ...]:
        names = [
            path
            for path, module in self.modules.items()
            if is_in(path, self.path) and (hasattr(module, "drop_prob") or "drop_path" in path.rpartition(".")[2])
        ]
        return tuple(self._relative(path) for path in names)

    def _relative(self, path: str) -> str:
        return path.removeprefix(self.path).removeprefix(".")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of features with a weight; a batch norm belongs to the convolution before it."""
    weight = getattr(module, "weight", None)
    return (
        "norm" in type(module).__name__.lower()
        and not isinstance(module, _BATCH_NORMS)
        and getattr(weight, "ndim", 0) == 1
        and not any(True for _ in module.children())
    )


def is_operation(module: nn.Module) -> bool:
    """Whether a module is a linear, convolution or norm that methods can act on."""
    kinds = (*_PROJECTIONS, nn.LayerNorm, nn.GroupNorm, _BATCH_NORMS)
    return isinstance(module, kinds) and getattr(module, "weight", None) is not None


def is_projection(module: nn.Module) -> bool:
    """Whether a module is a linear or convolution."""
    return isinstance(module, _PROJECTIONS)


def _groups(module: nn.Module) -> int:
    groups = getattr(module, "groups", 1)
    return 1 if groups == 1 or groups < getattr(module, "in_channels", 0) else groups


def _channels(module: nn.Module) -> list[int]:
    """Channels that a module reads, by its weight."""
    sizes = linear_sizes(module)
    if sizes is not None:
        return [sizes[1]]
    if isinstance(module, nn.modules.conv._ConvNd):
        return [module.in_channels]
    weight = getattr(module, "weight", None)
    if "norm" in type(module).__name__.lower() and getattr(weight, "ndim", 0) == 1:
        return [weight.shape[0]]  # type: ignore[union-attr]
    return []
