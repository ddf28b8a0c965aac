"""Finds a place for a merged shift if its own module has no bias.

Many models have linears and convolutions without a bias, and no field of their configs adds one. The module before or
after often has a tensor that can hold the same shift exactly: the running mean of a batch norm, the position
embeddings that are added next, or the bias of the norm before. `torch.fx` reads the flow of values from the model's
code, module by module; if it cannot read the code, no place is found.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, fx, nn

from ..backbones.backbone import unwrapped


# Methods and functions that rearrange values or pass them on unchanged.
_LAYOUT = ("flatten", "unflatten", "reshape", "view", "permute", "transpose", "movedim", "contiguous", "to", "float")
# Attributes of a tensor that do not depend on its values.
_SHAPES = ("size", "dim", "reshape_as", "view_as", "expand_as", "type_as", "to")
_LARGEST = 1e3  # of a shift in another place, relative to the shift: beyond that, rounding matters


def put(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Replace a parameter or buffer; a module that is tied to this one keeps the old one."""
    old = getattr(module, name, None)
    if tensor is None or isinstance(tensor, nn.Parameter) or not (old is None or isinstance(old, nn.Parameter)):
        setattr(module, name, tensor)
    else:
        setattr(module, name, nn.Parameter(tensor, requires_grad=old is not None and old.requires_grad))


@dataclass
class Place:
    """A tensor of another module that can hold a shift of a module's output.

    Attributes:
        module: whose tensor it is.
        name: of the tensor.
        moved: function of the tensor, the shift and the weight of the shifted module, which returns the tensor that
            holds the shift, or None if it cannot.
    """

    module: nn.Module
    name: str
    moved: Callable[[Tensor, Tensor, Tensor], Tensor | None]

    def __post_init__(self) -> None:
        self._first: Tensor = getattr(self.module, self.name)
        self._under = self._first
        self._put: Tensor | None = None

    def take(self, shift: Tensor, weight: Tensor) -> bool:
        """Hold a shift, in place of an earlier one; return whether that is possible.

        Args:
            shift: of the output, (channels,).
            weight: of the module whose output it is.
        """
        now = getattr(self.module, self.name)
        if now is not self._put:  # another merge has replaced it since
            self._under = now
        new = self.moved(self._under.detach(), shift, weight)
        if new is None:
            return False
        put(self.module, self.name, new)
        self._put = getattr(self.module, self.name)
        return True

    def free(self) -> None:
        """Restore the tensor from before any merge."""
        if self._put is not None:
            self._first.data = self._first.to(getattr(self.module, self.name))
            setattr(self.module, self.name, self._first)
            self._put = None


def place_for_shift(flow: Flow, path: str) -> Place | None:
    """A place that can hold a shift of a module's output exactly; None if no such place is known.

    Args:
        flow: of values in the module's model.
        path: full name of the module, or of the adapter layer around it.
    """
    weight: Any = unwrapped(flow.model.get_submodule(path)).weight
    place = _in_what_follows(flow, path, weight.shape[0]) or _in_norm_before(flow, path)
    return None if place is None or weight.is_meta or getattr(place.module, place.name).is_meta else place


def _in_what_follows(flow: Flow, path: str, channels: int) -> Place | None:
    """The batch norm, or the position embeddings, that alone read the output."""
    module = unwrapped(flow.model.get_submodule(path))
    samples = [_numbered(module, channels, ndim) for ndim in _ndims(module)]
    prefix = 0
    for scope, value, user in flow.onward(path):
        holder = flow.model.get_submodule(scope)
        if user.op == "call_module":
            reader = _working(holder.get_submodule(str(user.target)))
            if isinstance(reader, nn.Identity):
                continue
            if reader is None or not flow.called_once(scope, user) or prefix != 0:
                return None
            # of the possible numbers of dimensions, those that the norm takes
            fit = [sample for sample in samples if sample.ndim > 1 and sample.shape[1] == channels]
            in_place = fit and all(_lies_along(sample, 1) for sample in fit) and _has_mean(reader, channels)
            return Place(reader, "running_mean", _less) if in_place else None
        if _name_of(user) == "cat":
            before = _tokens_before(holder, user, value, channels)
            if before is None:
                return None
            prefix += before
        elif _is_sum(user):
            if not all(_lies_along(sample, 2) for sample in samples):
                return None
            (other,) = [argument for argument in user.args if argument is not value]
            found = _table(flow, scope, other)
            if found is None or found[0].shape[-1] != channels:
                return None
            return Place(*found[1:], partial(_rows_moved, prefix))
        else:
            try:
                samples = [_again(user, value, sample) for sample in samples]
            except (RuntimeError, TypeError, IndexError):
                return None
    return None


def _in_norm_before(flow: Flow, path: str) -> Place | None:
    """The bias of a norm that only this linear reads, if a change of it can produce every shift of the linear."""
    linear = unwrapped(flow.model.get_submodule(path))
    if type(linear) is not nn.Linear or linear.in_features < linear.out_features:
        return None
    scope, name = flow.parent(path)
    call = flow.only_call(scope, name)
    source = call.args[0] if call is not None and len(call.args) == 1 else None
    if not isinstance(source, fx.Node) or source.op != "call_module" or list(source.users) != [call]:
        return None
    norm = _working(flow.model.get_submodule(scope).get_submodule(str(source.target)))
    if type(norm) is not nn.LayerNorm or norm.bias is None or not flow.called_once(scope, source):
        return None
    if norm.normalized_shape != (linear.in_features,):
        return None
    return Place(norm, "bias", _before_linear)


def _less(mean: Tensor, shift: Tensor, _: Tensor) -> Tensor:
    return mean - shift.to(mean)


def _rows_moved(prefix: int, table: Tensor, shift: Tensor, _: Tensor) -> Tensor:
    new = table.clone()
    new[..., prefix:, :] += shift.to(table)
    return new


def _before_linear(bias: Tensor, shift: Tensor, weight: Tensor) -> Tensor | None:
    """The bias with the smallest change that the linear maps to the shift; None if rounding would matter."""
    matrix, target = (tensor.detach().double().cpu() for tensor in (weight, shift))
    change = torch.linalg.lstsq(matrix, target[:, None], driver="gelsd").solution[:, 0]
    size = target.abs().max()
    exact = (matrix @ change - target).abs().max() <= 1e-9 * size
    return bias + change.to(bias) if exact and change.abs().max() <= _LARGEST * size else None


def _has_mean(norm: nn.Module, channels: int) -> bool:
    mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    return isinstance(mean, Tensor) and isinstance(variance, Tensor) and mean.shape == (channels,)


def _working(module: nn.Module) -> nn.Module | None:
    """The innermost module under wrappers; None if there are several."""
    module = unwrapped(module)
    if not isinstance(module, AuxiliaryTrainingWrapper):
        return module
    active = [name for name in module.active_adapters if name in getattr(module, "modules_to_save", {})]
    if not active:
        return module.original_module
    return module.modules_to_save[active[0]] if len(active) == 1 else None


# ------------------------------------------------------------------ where the channels lie


def _ndims(module: nn.Module) -> tuple[int, ...]:
    """The possible numbers of dimensions of the module's output."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return (len(module.kernel_size) + 2,)
    return (2, 3)


def _numbered(module: nn.Module, channels: int, ndim: int) -> Tensor:
    """A stand-in for a module's output, in which every entry is the index of its channel."""
    dim = 1 if isinstance(module, nn.modules.conv._ConvNd) else ndim - 1
    sizes = (2, 3, 5, 7, 11)[:ndim]  # all different
    shape = [channels if index == dim else size for index, size in enumerate(sizes)]
    numbers = torch.arange(channels).view([-1 if index == dim else 1 for index in range(ndim)])
    return numbers.expand(shape)


def _lies_along(sample: Tensor, dim: int) -> bool:
    """Whether that dimension is the one of the channels."""
    if sample.ndim <= dim:
        return False
    numbers = torch.arange(sample.shape[dim])
    return bool((sample.movedim(dim, -1) == numbers).all())


def _again(user: fx.Node, value: fx.Node, sample: Tensor) -> Tensor:
    """Apply a node that only rearranges values to the stand-in.

    Raises:
        TypeError: the node does more, or its effect is not known.
    """
    name = _name_of(user)
    if name not in _LAYOUT or not user.args or user.args[0] is not value:
        raise TypeError(name)
    if name in ("to", "float", "contiguous"):
        return sample

    def size(argument: Any) -> Any:
        """Replace an argument that is a size of the value itself."""
        if not isinstance(argument, fx.Node):
            return argument
        if _name_of(argument) == "getitem" and _name_of(argument.args[0]) == "getattr":  # type: ignore[arg-type]
            owner, attribute = argument.args[0].args[:2]  # type: ignore[union-attr]
            if owner is value and attribute == "shape":
                return sample.shape[argument.args[1]]  # type: ignore[index]
        raise TypeError(name)

    arguments = fx.node.map_aggregate(user.args[1:], size)
    return getattr(sample, name)(*arguments, **user.kwargs)


# ------------------------------------------------------------------ what a model's code does with values


class _Proxy(fx.Proxy):
    """A value whose size, if code needs a number, is divisible by all strides."""

    def __int__(self) -> int:
        return 64


class _Tracer(fx.Tracer):
    """Reads the code of one module; its children are single steps."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return False  # checks of the input: whether its size differs from that of training, or is wrong


class Flow:
    """The flow of values in the modules of a model; each module is read once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._graphs: dict[str, fx.Graph | None] = {}

    def graph(self, scope: str) -> fx.Graph | None:
        """The steps of a module's forward with its defaults; None if its code cannot be read."""
        if scope not in self._graphs:
            module = unwrapped(self.model.get_submodule(scope))
            parameters = inspect.signature(type(module).forward).parameters.values()
            defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
            if "interpolate_pos_encoding" in defaults:
                defaults["interpolate_pos_encoding"] = False  # interpolation does not change a shift of all rows
            try:
                self._graphs[scope] = _Tracer().trace(module, concrete_args=defaults)
            except Exception:
                self._graphs[scope] = None
        return self._graphs[scope]

    def only_call(self, scope: str, name: str) -> fx.Node | None:
        """The one call of a child in a module's forward; None if there is not exactly one."""
        graph = self.graph(scope)
        calls = [node for node in graph.nodes if node.op == "call_module" and node.target == name] if graph else []
        return calls[0] if len(calls) == 1 else None

    def parent(self, path: str) -> tuple[str, str]:
        """The module in whose forward a module is called, and its name there; lists are not called themselves."""
        scope, _, name = path.rpartition(".")
        while scope and isinstance(self.model.get_submodule(scope), nn.ModuleList | nn.ModuleDict):
            scope, _, last = scope.rpartition(".")
            name = f"{last}.{name}"
        return scope, name

    def called_once(self, scope: str, call: fx.Node) -> bool:
        """Whether a module is called nowhere else in its parent's forward."""
        return self.only_call(scope, str(call.target)) is call

    def onward(self, path: str) -> Iterator[tuple[str, fx.Node, fx.Node]]:
        """Follow the output of a module as long as only one step reads it.

        Yields:
            The module whose forward has the step, the value, and the step that reads it.
        """
        scope, name = self.parent(path)
        value = self.only_call(scope, name)
        while value is not None:
            users = [user for user in value.users if not _reads_shape(user, value)]
            if len(users) != 1:
                return
            (user,) = users
            if user.op == "output":
                if user.args[0] is not value or not scope:
                    return
                scope, name = self.parent(scope)
                value = self.only_call(scope, name)
                continue
            yield scope, value, user
            value = user


def _name_of(node: fx.Node) -> str:
    if not isinstance(node, fx.Node):
        return ""
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def _reads_shape(user: fx.Node, value: fx.Node) -> bool:
    """Whether a step does not depend on the elements of the value."""
    name = _name_of(user)
    if name == "getattr":
        return user.args[1] in ("shape", "dtype", "device", "ndim")
    if name in ("size", "dim"):
        return True
    return name in _SHAPES and user.args[0] is not value


def _is_sum(user: fx.Node) -> bool:
    return user.op == "call_function" and user.target in (operator.add, torch.add, operator.iadd) and not user.kwargs


def _source(node: Any) -> Any:
    """The node that a value comes from, without steps that reshape or expand it."""
    while isinstance(node, fx.Node) and (_name_of(node) in (*_LAYOUT, "expand", "unsqueeze", "repeat")):
        node = node.args[0]
    return node


def _tensor(holder: nn.Module, node: Any) -> tuple[Tensor, nn.Module, str] | None:
    """The tensor of a module that a node reads, with its owner and name."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    scope, _, name = str(node.target).rpartition(".")
    owner = holder.get_submodule(scope)
    tensor = getattr(owner, name, None)
    return (tensor, owner, name) if isinstance(tensor, Tensor) else None


def _table(flow: Flow, scope: str, node: Any) -> tuple[Tensor, nn.Module, str] | None:
    """The embedding table of a node that returns all its rows in order."""
    holder, node = flow.model.get_submodule(scope), _source(node)
    if isinstance(node, fx.Node) and node.op == "call_module" and flow.called_once(scope, node):
        embedding = holder.get_submodule(str(node.target))
        indices = _tensor(holder, _source(node.args[0]))
        if type(embedding) is not nn.Embedding or indices is None:
            return None
        if not torch.equal(indices[0].flatten().cpu(), torch.arange(embedding.num_embeddings)):
            return None
        return embedding.weight, embedding, "weight"
    found = _tensor(holder, node)
    if found is None or len([user for user in node.users if not _reads_shape(user, node)]) != 1:
        return None
    return found


def _tokens_before(holder: nn.Module, user: fx.Node, value: fx.Node, channels: int) -> int | None:
    """Number of tokens that a concatenation puts before a value; None if it is not known, or if some follow it."""
    parts: Any = user.args[0]
    dim = user.kwargs.get("dim", user.args[1] if len(user.args) > 1 else 0)
    if dim != 1 or parts[-1] is not value or list(parts).count(value) != 1:
        return None
    found = [_tensor(holder, _source(part)) for part in parts[:-1]]
    if any(each is None for each in found):
        return None
    return sum(each[0].numel() // channels for each in found if each is not None)
