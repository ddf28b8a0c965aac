"""Derive the roles of a block's modules from a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from .backbone import WIDTH_ROLES, linear_sizes
from .branches import BlockRun, Branch
from .operations import channels_read, is_norm, is_operation
from .paths import is_in, join
from .watching import Call, first_argument


@dataclass(frozen=True)
class BlockRoles:
    """Roles in one block; the fields have the names and the meaning of those of `Architecture`.

    Two are not of it:

    Attributes:
        patches: whether the sub-layers read the tokens that enter the block, and not only others, such as a class
            token that comes as a second argument.
        seen: why methods at blocks cannot act; empty if they can.
    """

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
    uncalled: tuple[str, ...] = ()
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
    patches: bool = True
    seen: str = field(default="", compare=False)

    def as_fields(self) -> dict[str, Any]:
        """The fields of an `Architecture`."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("patches", "seen")}


class BlockReader(BlockRun):
    """Reads the roles of one block.

    Attributes:
        width: channels of its stream, once they are known.
    """

    width: int | None = None

    def read(self) -> BlockRoles:
        """All roles that can be derived."""
        operations = self._operations()
        shape = self._stream_shape()
        if shape is None:
            return BlockRoles(operations=operations, drop_path=self._drop_paths(), seen=self._seen())
        branches = self.branches()
        if not branches:
            self.why.append("what comes out is not a sum of what came in and of what modules add")
            attention: dict[str, Any] = dict(self._attention_inside())
            used = {path for paths in attention.values() for path in paths}
            stream, self.width = self._layout(self.trace.nodes[self.call.outputs[0]].shape, []) or ("tokens", None)
            return BlockRoles(
                operations=tuple(path for path in operations if path not in used),
                drop_path=self._drop_paths(),
                stream=stream,
                pools=self._pools(),
                width=self.width,
                seen=self._seen(),
                **attention,
            )
        result = self.trace.nodes[self.call.outputs[0]].shape
        layout = self._layout(result, branches) if len(result) == len(shape) else None
        if layout is None:
            self.why.append(f"which dimension of {result} holds the channels is not clear")
            return BlockRoles(operations=operations, drop_path=self._drop_paths(), seen=self._seen())
        stream, self.width = layout
        return self._additive(branches, operations, stream, self.width)

    def _seen(self) -> str:
        return "; ".join(self.why)

    def _stream_shape(self) -> tuple[int, ...] | None:
        """Shape of the input; None if it is not a stream that can be followed."""
        call = self.call
        if call.stream is None:
            self.why.append("its first argument is not a tensor")
        elif not call.outputs:
            self.why.append("it returns no tensor")
        elif self.several:
            self.why.append("it is called more than once")
        elif call.named not in ("", first_argument(self.modules[self.path])):
            self.why.append(f"its stream comes as the keyword {call.named!r}")
        else:
            shape = self.trace.nodes[call.stream].shape
            if len(shape) in (2, 3, 4):
                return shape
            self.why.append(f"its input has {len(shape)} dimensions")
        return None

    def _layout(self, shape: tuple[int, ...], branches: list[Branch]) -> tuple[str, int] | None:
        """Layout and channels of the stream, according to the modules at its entrances and exits."""
        widths: list[int] = []
        for branch in branches:
            for call in branch.calls:
                module = self.modules[call.path]
                if call.stream is not None and call.stream in self.trace.same(branch.stream):
                    widths += channels_read(module)
        found = self._from_sums(branches) if branches else self._from_result()
        candidates = [each for each in dict.fromkeys((*widths, *found)) if each in shape[1:]]
        if not candidates:
            return None
        width = candidates[0]
        if len(shape) == 2:
            return ("packed", width) if shape[1] == width else None
        if len(shape) == 3:
            # methods do not support a stream of (batch, channels, positions)
            return ("tokens", width) if shape[2] == width else None
        first, last = shape[1] == width, shape[3] == width
        if first and last:
            inside = [call for branch in branches for call in branch.calls] or self.calls
            convolved = any(isinstance(self.modules[call.path], nn.Conv2d) for call in inside)
            return ("channels_first" if convolved else "channels_last", width)
        if first or last:
            return ("channels_first" if first else "channels_last", width)
        return None

    def _from_sums(self, branches: list[Branch]) -> list[int]:
        widths = []
        for branch in branches:
            for path in self.projections_before(branch.added, branch.nodes):
                sizes = linear_sizes(self.modules[path])
                weight: Any = self.modules[path].weight
                widths.append(sizes[0] if sizes else weight.shape[0])
        return widths

    def _from_result(self) -> list[int]:
        """Channels of what a block returns that adds to no stream, by the projections that it comes from."""
        everything = range(self.call.start, self.call.end)
        found = []
        for path in self.projections_before(self.call.outputs[0], everything):
            sizes = linear_sizes(self.modules[path])
            weight: Any = self.modules[path].weight
            found.append(sizes[0] if sizes else weight.shape[0])
        return found

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
            if not self._is_wide(branch, width):
                self.why.append(f"{name}: its stream has other channels than what comes out")
                continue
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
                roles |= self._attention_inside()
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
            patches=self._reads_patches(branches),
            width=None if self._told_width(roles) == width else width,
            seen=self._seen(),
        )

    def _is_wide(self, branch: Branch, width: int) -> bool:
        """Whether the stream after a branch has these channels, in either layout."""
        shape = self.trace.nodes[branch.sum].shape
        return width == shape[-1] or (len(shape) == 4 and width == shape[1])

    def _told_width(self, roles: Mapping[str, tuple[str, ...]]) -> int | None:
        """The channels that the first module in a role writes, by which a table without a width tells them."""
        first = next((roles[role][0] for role in WIDTH_ROLES if roles.get(role)), None)
        if first is None:
            return None
        module = self.modules[join(self.path, first)]
        sizes = linear_sizes(module)
        return sizes[0] if sizes else len(module.weight)  # type: ignore[arg-type]

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
        first = self.projections_after(branch.stream, branch.nodes)
        last = self.projections_before(branch.added, branch.nodes)
        return bool(first) and bool(last) and not set(first) & set(last)

    def _mlp_roles(self, branch: Branch, width: int) -> dict[str, tuple[str, ...]]:
        first, last = (
            self.projections_after(branch.stream, branch.nodes),
            self.projections_before(branch.added, branch.nodes),
        )
        sizes = [linear_sizes(self.modules[path]) for path in (*first, *last)]
        written = {path for out, path in self.projections.items() if out in self.trace.overwritten}
        if written & {*first, *last}:  # what methods keep of a linear's output would change
            return {}
        if not set(last).isdisjoint(self.uncalled.values()):  # nothing at that module would have an effect
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
            last = self.projections_before(branch.added, branch.nodes)
            fits = len(last) == 1 and linear_sizes(self.modules[last[0]]) is not None
            fits = fits and last[0] not in self.uncalled.values()
            return {"output": (self._relative(last[0]),)} if fits else {}
        wide = self.trace.nodes[seen.query].shape
        parts = {
            "query": self.projections_before(seen.query, branch.nodes),
            "key": self.projections_before(seen.key, branch.nodes),
            "value": self.projections_before(seen.value, branch.nodes),
            "output": self.projections_after(seen.output, branch.nodes),
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

    def _attention_inside(self) -> dict[str, tuple[str, ...]]:
        """Projections and norm of attention that adds to no stream that can be followed."""
        roles = self._attention_roles(self.as_one_branch())
        if not roles.get("query"):
            return roles
        reader = next(each for each in self.calls if self._relative(each.path) == roles["query"][0])
        read = self.trace.same(reader.stream) if reader.stream is not None else set()
        norms = [each for each in self.calls if is_norm(self.modules[each.path]) and set(each.outputs) & read]
        return {**roles, "norm1": (self._relative(norms[0].path),)} if norms else roles

    def _norm(self, branch: Branch) -> tuple[str, bool] | None:
        """The branch's norm and whether it follows; the one at its entrance, or else the one at its end."""
        entered, left = self.trace.same(branch.stream), self.multiples(branch.added)
        norms = [each for each in branch.calls if is_norm(self.modules[each.path])]
        for call in norms:
            if call.stream in entered:
                return call.path, False
        for call in norms:
            if any(each in left for each in call.outputs):
                return call.path, True
        return None

    def _entrance(self, branch: Branch, branches: list[Branch]) -> Call | str | None:
        """The only module call through which a branch reads the stream; None for the block's own; else a reason."""
        same = self.trace.same(branch.stream)
        readers = self.reading(branch)
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

    def _reads_patches(self, branches: list[Branch]) -> bool:
        """Whether the stream to which the branches add is the block's first argument or made of it."""
        others = {same for each in self.call.inputs if each != self.call.stream for same in self.trace.same(each)}
        stream = branches[0].stream
        return self.whole or others.isdisjoint({stream, *self.trace.nodes[stream].inputs})

    def _pools(self) -> bool:
        nodes = self.trace.nodes
        return nodes[self.call.stream or 0].shape != nodes[self.call.outputs[0]].shape

    def _rest(self, branch: Branch) -> Call | None:
        """The module that continues with the stream: everything that reads the stream, also the sum, is in it."""
        same, readers = self.trace.same(branch.stream), self.reading(branch)
        for call in self.calls:
            if call.stream in same and not call.named and call.start <= branch.sum < call.end:
                return call if all(call.start <= index < call.end for index in readers) else None
        return None

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
