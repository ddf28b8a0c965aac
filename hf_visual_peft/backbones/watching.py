"""Run a copy of a model on a small input and record a graph of its operations and module calls."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .backbone import stands_in, unwrapped
from .paths import original


# Operations that return the same elements in another shape or order of dimensions.
_MOVES = frozenset(
    (
        "_to",
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "permute",
        "transpose",
        "t",
        "movedim",
        "unsqueeze",
        "squeeze",
        "flatten",
        "unflatten",
        "expand",
        "clone",
        "contiguous",
        "alias",
        "detach",
        "_to_copy",
        "to",
        "lift_fresh",
    )
)
# Operations that rearrange elements or leave some out.
_SELECTS = frozenset(("select", "slice", "split", "split_with_sizes", "chunk", "unbind", "roll", "index", "gather"))
_SELECTS |= {"constant_pad_nd"}

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_RANDOM = 1_000_003  # different random numbers in a tensor: more take long to make


@dataclass
class Node:
    """One value.

    Attributes:
        index: position in the graph, in the order of computation.
        op: name of the operation; `"parameter"`, `"input"` or `"constant"` if there is none.
        inputs: indices of its input values.
        owner: name of the innermost running module; for parameters their own name.
        shape: of the tensor.
        scalars: numbers among the operation's arguments.
    """

    index: int
    op: str
    inputs: tuple[int, ...]
    owner: str
    shape: tuple[int, ...]
    scalars: tuple[Any, ...] = ()

    @property
    def moves(self) -> bool:
        """Whether the value is its input in another shape."""
        return self.op in _MOVES

    @property
    def selects(self) -> bool:
        """Whether the value consists of elements of its input."""
        return self.op in _MOVES or self.op in _SELECTS


@dataclass
class Call:
    """One call of a module.

    Attributes:
        path: the module's name.
        start: number of nodes before it.
        inputs: indices of the tensors among its arguments, those of the first one first.
        stream: index of the first argument; None if that is not a tensor.
        named: keyword of this argument; empty if it was positional.
        outputs: indices of the tensors that it returned.
        end: number of nodes after it.
    """

    path: str
    start: int
    inputs: tuple[int, ...]
    stream: int | None
    named: str = ""
    outputs: tuple[int, ...] = ()
    end: int = 0


@dataclass
class Attention:
    """One softmax over logits that are products of queries and keys.

    Attributes:
        query: index of the queries.
        key: of the keys.
        value: of the values.
        output: of the values' weighted mean.
        owner: name of the innermost running module.
        keys: number of keys that each query attends to.
        fused: whether torch's own function computed it.
    """

    query: int
    key: int
    value: int
    output: int
    owner: str
    keys: int = 0
    fused: bool = False


@dataclass
class Trace:
    """The recorded graph.

    Attributes:
        nodes: in the order of computation.
        calls: of modules, in the order of their start.
        attentions: calls of torch's own function; attention that is written out is found among the nodes.
        parameters: index of each parameter that was used, by name.
        pixels: indices of the model's inputs.
        answers: indices of the model's output tensors.
        error: the error that stopped the run, if any.
        values: the tensors of all nodes, where they were asked for.
        overwritten: nodes whose tensor something writes into after.
    """

    nodes: list[Node] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    pixels: tuple[int, ...] = ()
    answers: tuple[int, ...] = ()
    values: dict[int, Tensor] = field(default_factory=dict)
    overwritten: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._users: list[list[int]] | None = None

    def users(self, index: int) -> list[int]:
        """The nodes that read a node."""
        if self._users is None:
            self._users = [[] for _ in self.nodes]
            for node in self.nodes:
                for each in dict.fromkeys(node.inputs):
                    self._users[each].append(node.index)
        return self._users[index]

    def first_calls(self) -> dict[str, Call]:
        """The first call of each module."""
        found: dict[str, Call] = {}
        for call in self.calls:
            found.setdefault(call.path, call)
        return found

    def same(self, index: int) -> set[int]:
        """A node and the nodes with the same elements in other shapes, before and after it."""
        found = {index}
        while self.nodes[index].moves and self.nodes[index].inputs:
            index = self.nodes[index].inputs[0]
            found.add(index)
        todo = list(found)
        while todo:
            for user in self.users(todo.pop()):
                if user not in found and self.nodes[user].moves:
                    found.add(user)
                    todo.append(user)
        return found

    def after(self, starts: set[int], stop: int | None = None) -> set[int]:
        """The nodes that depend on some nodes, including these, up to an index."""
        found = set(starts)
        first = min(starts, default=0)
        for node in self.nodes[first : None if stop is None else stop + 1]:
            if node.index not in found and any(each in found for each in node.inputs):
                found.add(node.index)
        return found

    def before(self, index: int, within: set[int] | None = None) -> set[int]:
        """The nodes that a node depends on, including itself, within a set."""
        found, todo = {index}, [index]
        while todo:
            for each in self.nodes[todo.pop()].inputs:
                if each not in found and (within is None or each in within):
                    found.add(each)
                    todo.append(each)
        return found


class _Recorder(TorchDispatchMode):
    """Records every operation in a trace."""

    def __init__(self, trace: Trace, keep: bool) -> None:
        super().__init__()
        self.trace, self.keep = trace, keep
        self.stack: list[str] = []
        self._of: dict[int, int] = {}
        self._held: list[Tensor] = []
        self._written: dict[int, list[int]] = {}
        self._stored: dict[int, list[int]] = {}

    def add(self, tensor: Tensor, op: str, inputs: tuple[int, ...] = (), owner: str = "", scalars: tuple = ()) -> int:
        """Record a value."""
        index = len(self.trace.nodes)
        self.trace.nodes.append(Node(index, op, inputs, owner, tuple(tensor.shape), scalars))
        self._of[id(tensor)] = index
        self._held.append(tensor)  # so that no other tensor gets its id
        if self.keep:
            self.trace.values[index] = tensor
            self._stored.setdefault(_storage(tensor), []).append(index)
        return index

    def index(self, tensor: Tensor) -> int:
        """The node of a tensor."""
        found = self._of.get(id(tensor))
        return self.add(tensor, "constant", owner=self.owner) if found is None else found

    @property
    def owner(self) -> str:
        """Name of the innermost running module."""
        return self.stack[-1] if self.stack else ""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.keep and func._schema.is_mutable and args and isinstance(args[0], Tensor):
            for index in self._stored.pop(_storage(args[0]), ()):  # these are written in place
                self.trace.values[index] = self.trace.values[index].clone()
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            self.trace.overwritten.add(self.index(args[0]))
        output = func(*args, **kwargs)
        read: list[int] = []
        for tensor in tensors_in((args, kwargs)):
            index = self.index(tensor)
            read.append(index)
            written = self._written.get(_storage(tensor)) if self._written else None
            read += [each for each in written or () if each > index]
        schema = func._schema
        name = schema.name.partition("::")[2].removesuffix("_copy") or schema.name
        in_place = schema.is_mutable
        if in_place:
            name = name.removesuffix("_")
        scalars = tuple(arg for arg in args if isinstance(arg, int | float | list | tuple) and not _holds_tensor(arg))
        inputs = tuple(dict.fromkeys(read))
        for tensor in tensors_in(output):
            new = self.add(tensor, name, inputs, self.owner, scalars)
            if in_place:
                self._written.setdefault(_storage(tensor), []).append(new)
        return output


class _Functions(TorchFunctionMode):
    """Records the calls of torch's own attention function."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        given = [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names)]
        query, key, value = (self.recorder.index(each) for each in given)
        owner = self.recorder.owner
        output = func(*args, **kwargs)
        index = self.recorder.add(output, "attention", (query, key, value), owner)
        self.recorder.trace.attentions.append(
            Attention(query, key, value, index, owner, keys=given[1].shape[-2], fused=True)
        )
        return output


def watch(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], keep: bool = False) -> Trace:
    """Run a module and record what it computes. It must be a copy: hooks are set, nothing else is changed.

    Args:
        model: the copy.
        args: of its forward.
        kwargs: of its forward.
        keep: whether to keep the values.
    """
    trace = Trace()
    recorder = _Recorder(trace, keep)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in recorder._of:
            trace.parameters[name] = recorder.add(parameter, "parameter", owner=name)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if id(buffer) not in recorder._of:
            recorder.add(buffer, "parameter", owner=name)
    inputs = [each for each in tensors_in((args, kwargs)) if each.is_floating_point()]
    trace.pixels = tuple(recorder.add(each, "input") for each in inputs)
    handles: list[Any] = []
    open_calls: list[Call] = []

    def before(path: str, module: nn.Module, given: tuple, named: dict) -> None:
        found = [recorder.index(each) for each in tensors_in((given, named))]
        name = "" if given else first_argument(module)
        name = name if given or name in named else next(iter(named), "")
        first = given[0] if given else named.get(name)
        stream = recorder.index(first) if isinstance(first, Tensor) else None
        call = Call(path, len(trace.nodes), tuple(found), stream, name)
        trace.calls.append(call)
        open_calls.append(call)
        recorder.stack.append(path)

    def after(path: str, module: nn.Module, given: tuple, output: Any) -> None:
        recorder.stack.pop()
        call = open_calls.pop()
        call.outputs, call.end = tuple(recorder.index(each) for each in tensors_in(output)), len(trace.nodes)

    for path, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(
                lambda module, given, named, path=path: before(path, module, given, named), with_kwargs=True
            )
        )
        handles.append(
            module.register_forward_hook(lambda module, given, output, path=path: after(path, module, given, output))
        )
    try:
        with torch.no_grad(), _Functions(recorder), recorder:
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    trace.answers = tuple(recorder._of[id(each)] for each in tensors_in(output) if id(each) in recorder._of)
    trace.attentions += _written_out(trace)
    return trace


def first_argument(module: nn.Module) -> str:
    """The first argument of a module's forward, by which its stream may also be given; empty if it has no name."""
    arguments = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return arguments[0].name if arguments and arguments[0].kind in _NAMED else ""


def _written_out(trace: Trace) -> list[Attention]:
    """Attention that is written out: a softmax between two products of matrices."""
    found = []
    inside = {each.output: each for each in trace.attentions}
    skipped = {
        node.index
        for each in inside.values()
        for node in trace.nodes[max(each.query, each.key, each.value) + 1 : each.output]
    }
    for node in trace.nodes:
        if node.op not in ("_softmax", "_safe_softmax") or node.index in skipped or len(node.shape) < 3:
            continue
        logits = _product_before(trace, node.index)
        mixed = _product_after(trace, node.index)
        if logits is None or mixed is None:
            continue
        weights = trace.after({node.index}, mixed)
        left, right = trace.nodes[logits].inputs[-2:]
        others = [each for each in trace.nodes[mixed].inputs if each not in weights]
        if len(others) == 1:
            found.append(Attention(left, right, others[0], mixed, trace.nodes[mixed].owner, keys=node.shape[-1]))
    return found


_PRODUCTS = ("bmm", "baddbmm", "matmul")


def _product_before(trace: Trace, index: int) -> int | None:
    todo, seen = [index], set()
    while todo:
        for each in trace.nodes[todo.pop(0)].inputs:
            if each in seen:
                continue
            seen.add(each)
            node = trace.nodes[each]
            if node.op in _PRODUCTS:
                return each
            if node.op in ("parameter", "input", "constant") or len(seen) > 40:
                continue
            todo.append(each)
    return None


def _product_after(trace: Trace, index: int) -> int | None:
    todo, seen = [index], set()
    while todo:
        for each in trace.users(todo.pop(0)):
            if each in seen:
                continue
            seen.add(each)
            if trace.nodes[each].op in _PRODUCTS:
                return each
            if len(seen) > 40:
                return None
            todo.append(each)
    return None


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode that shares the weights of a model, without its hooks and with its own buffers.

    What has no values, on the meta device, gets some on the CPU: random weights, one tensor for all of one shape.
    """
    memo: dict[int, Any] = {}
    made: dict[Any, Tensor] = {}
    for parameter in model.parameters():
        value = parameter.detach()
        if value.is_meta:
            kind = (value.shape, value.dtype)
            value = made[kind] = made[kind] if kind in made else _random_like(value)
        memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = valued(buffer.detach()).clone()
    twin = copy.deepcopy(model, memo).eval()
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if stands_in(child):
                child.detach()  # type: ignore[operator]
                continue
            plain = original(unwrapped(child))
            if plain is not child:
                setattr(module, name, plain)
    for module in twin.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            # those by which transformers collects what its models return are a part of them
            for key in [key for key, hook in hooks.items() if not _of_transformers(hook)]:
                del hooks[key]
    return twin


def valued(buffer: Tensor) -> Tensor:
    """A buffer; without values, the same with some: ones, by which models can divide, or zeros as indices."""
    if not buffer.is_meta:
        return buffer
    return torch.full(buffer.shape, int(buffer.is_floating_point()), dtype=buffer.dtype)


def _random_like(value: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(min(value.numel(), _RANDOM), generator=generator) + 0.5
    random = random.repeat(-(-value.numel() // _RANDOM))[: value.numel()].view(value.shape)
    if value.ndim > 1:
        random = (random - 1.0) / (value.numel() / max(len(value), 1)) ** 0.5
    return random.to(value.dtype)


def _of_transformers(hook: Any) -> bool:
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("transformers.")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples, mappings and outputs of models."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)


def _holds_tensor(value: Any) -> bool:
    return any(True for _ in tensors_in(value))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
