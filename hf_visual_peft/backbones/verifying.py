"""Check the roles of a block numerically, on a copy with other weights and another input."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import BLOCK_ROLES, BackboneError, linear_sizes
from .operations import channels_read, is_norm
from .roles import BlockReader, BlockRoles
from .running import Ran
from .watching import Attention, Trace, first_argument, valued, watch


_TOLERANCE = 1e-5
_NEARLY = 0.05  # a smaller difference is one of precision, and not of what adds to the stream
_FEW = 8  # tokens for a block that takes any number of tokens
_PREFIX = 3  # tokens that are put before the block's tokens


def verified(ran: Ran, path: str, roles: BlockRoles) -> BlockRoles:
    """The roles, completed by numerical tests; unchanged if there is nothing to test.

    The block runs again in full precision, with random weights and a random stream: the same roles must be found, and
    the outputs of the sub-layers must add up to the block's output.

    Args:
        ran: the run.
        path: name of the block.
        roles: that were derived.

    Raises:
        BackboneError: they do not add up.
    """
    if not (roles.sublayers or roles.query):
        return roles
    block = ran.twin.get_submodule(path)
    if path not in ran.given:
        return _unverified(roles, "it was not called by itself")
    twin, args, kwargs = _other(block, *ran.given[path])
    try:
        trace = watch(twin, args, kwargs, keep=True)
    except Exception as error:  # it needs what only the whole model has
        return _unverified(roles, f"it does not run by itself: {type(error).__name__}")
    reader = BlockReader(trace, dict(twin.named_modules()), "")
    again = reader.read()
    # parts that blocks share have their names in the first of them
    if again != replace(roles, prompts=again.prompts, operations=again.operations):
        different = [name for name, value in roles.as_fields().items() if value != again.as_fields()[name]]
        return _unverified(roles, f"it shows other roles on another input: {', '.join(different)}")
    wrong = _difference(reader, trace)
    if wrong > _TOLERANCE and (roles.sublayers or wrong < _NEARLY):
        raise BackboneError(
            f"{type(block).__name__} ({path!r}): its input and what {len(reader.branches())} sub-layers add differ "
            f"from its output by {wrong:.1e} of its size, more than {_TOLERANCE:.0e}"
        )
    if not roles.query:
        return roles
    (seen,) = _attentions(reader, trace)
    if not _is_of_tokens(twin, args, kwargs, reader, roles.query[0], seen):
        attending = [path for role in ("query", "key", "value") for path in getattr(roles, role)]
        return replace(
            roles,
            query=(),
            key=(),
            value=(),
            operations=tuple(dict.fromkeys((*attending, *roles.operations))),
            softmax=False,
            seen="; ".join(filter(None, (roles.seen, "its attention is not one of tokens"))),
        )
    mixes = _mixes_heads(reader, trace, seen)
    softmax = not mixes and not _is_cosine(trace, seen)
    equal = _equal_parts(trace, reader, roles, seen)
    prompts = None
    plain = "attention" in roles.sublayers and roles.stream == "tokens" and not roles.post_norm
    if plain and _takes_more(twin, args, kwargs):
        prompts = "sequence"
    elif (
        roles.stream != "packed"  # keys would join those of each image apart
        and not mixes
        and (equal or _by_head(trace, reader, roles, seen))
        and _reads_stream(reader, roles)
        and _values_known(trace, reader, roles, seen)
    ):
        prompts = "keys"  # those that join a cosine attention are normalised as its own are
    roles = replace(roles, softmax=softmax, equal_parts=equal, prompts=prompts)
    projections = (*roles.query, *roles.key, *roles.value)
    if set(projections).isdisjoint(reader.uncalled.values()):
        return roles
    # only what acts where queries meet keys works there: the modules are never called
    return replace(roles, query=(), key=(), value=(), uncalled=tuple(dict.fromkeys(projections)))


def _reads_stream(reader: BlockReader, roles: BlockRoles) -> bool:
    """Whether attention reads vectors of the stream's width, so that its keys can also be those of prompts."""
    read = {width for path in (*roles.key, *roles.value) for width in channels_read(reader.modules[path])}
    norms = [reader.modules[path] for path in roles.norm1]
    return read == {reader.width} and all(_acts_on_tokens(norm, reader.width) for norm in norms)


@torch.no_grad()
def _acts_on_tokens(norm: nn.Module, width: int | None) -> bool:
    """Whether a norm takes vectors of that width, or maps of them, and normalises each by itself."""
    tokens = torch.randn(1, 3, width or 1, generator=torch.Generator().manual_seed(2))
    other = torch.cat([tokens[:, :1] + tokens[:, 1:2].flip(-1), tokens[:, 1:]], dim=1)
    for as_map in (False, True):
        given = [each.mT.unsqueeze(-1) if as_map else each for each in (tokens, other)]
        try:
            one, two = (norm(each) for each in given)
        except Exception:  # any: it takes the other layout
            continue
        place = (slice(None), slice(None), slice(1, None)) if as_map else (slice(None), slice(1, None))
        return one.shape == given[0].shape and torch.allclose(one[place], two[place], rtol=1e-4, atol=1e-5)
    return False


def _unverified(roles: BlockRoles, why: str) -> BlockRoles:
    """A block whose roles are not sure: all that is left are operations."""
    named = [path for role in BLOCK_ROLES for path in getattr(roles, role)]
    operations = tuple(dict.fromkeys((*named, *roles.operations)))
    seen = "; ".join(filter(None, (roles.seen, why)))
    return BlockRoles(operations=operations, drop_path=roles.drop_path, pools=roles.pools, seen=seen)


def _attentions(reader: BlockReader, trace: Trace) -> list[Attention]:
    with_branch = [branch.attention for branch in reader.branches() if branch.attention is not None]
    return with_branch or list(trace.attentions)


def _other(block: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[nn.Module, tuple, dict[str, Any]]:
    """A copy of a block in full precision with random weights, and arguments with a random stream."""
    memo = {id(p): nn.Parameter(torch.empty(0), requires_grad=False) for p in block.parameters()}
    twin = copy.deepcopy(block, memo).eval()
    generator = torch.Generator().manual_seed(0)
    made: dict[int, nn.Parameter] = {}
    for name, parameter in block.named_parameters(remove_duplicate=False):
        owner, _, last = name.rpartition(".")
        if id(parameter) not in made:
            made[id(parameter)] = _random(parameter, generator)
        setattr(twin.get_submodule(owner), last, made[id(parameter)])
    for module in twin.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = valued(buffer).cpu().float()
    memory: dict[int, Tensor] = {}

    def full(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in memory:
                here = valued(value.detach()).cpu()
                memory[id(value)] = here.float() if here.is_floating_point() else here
            return memory[id(value)]
        if isinstance(value, tuple | list):
            return type(value)(map(full, value)) if type(value) in (tuple, list) else value
        return value

    given = [full(each) for each in args]
    named = {name: full(each) for name, each in kwargs.items()}
    if not given:
        given = [named.pop(first_argument(block))]
    given[0] = torch.randn(given[0].shape, generator=generator)
    return twin, tuple(given), named


def _random(parameter: nn.Parameter, generator: torch.Generator) -> nn.Parameter:
    value = torch.randn(parameter.shape, generator=generator)
    fan = parameter.numel() / parameter.shape[0] if parameter.ndim > 1 else 1.0
    return nn.Parameter(value / fan**0.5 if parameter.ndim > 1 else 1.0 + 0.3 * value, requires_grad=False)


def _difference(reader: BlockReader, trace: Trace) -> float:
    """The relative difference between a block's output and the sum of its input and the branches that were found.

    It is 0 for a block in which no branch was found.
    """
    values, call = trace.values, reader.call
    branches = reader.branches()
    if not branches:
        return 0.0
    assert call.stream is not None
    rebuilt = values[call.stream] if reader.whole else values[branches[0].stream]
    for branch in branches:
        stream = values[branch.stream]
        rebuilt = rebuilt if rebuilt.shape == stream.shape else stream  # reshaped on the way
        plain = trace.nodes[branch.sum].op == "add"
        rebuilt = rebuilt + (values[branch.added] if plain else values[branch.sum] - stream)
    out = values[call.outputs[0]]
    moved = rebuilt.shape != out.shape  # then values are compared without their positions
    one, other = (each.flatten().sort().values if moved else each for each in (rebuilt, out))
    if one.shape != other.shape:
        return math.inf
    error = ((one - other).norm() / other.norm()).item()
    return math.inf if math.isnan(error) else error


def _is_of_tokens(
    twin: nn.Module, args: tuple, kwargs: Mapping[str, Any], reader: BlockReader, path: str, seen: Attention
) -> bool:
    """Whether queries are those of tokens, and not of channels.

    It is tested by a change of one token after the query projection, if the numbers of queries and of channels leave
    it open.
    """
    query = reader.trace.values[seen.query]
    count = query.shape[-2]
    sizes = linear_sizes(reader.modules[path])
    if count == 1 or sizes is None or sizes[0] % count:
        return True

    def change(module: nn.Module, given: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        token = output[0].flatten(1)[:, 0] if isinstance(module, nn.Conv2d) else output.flatten(0, -2)[0]
        token += torch.linspace(1.0, 9.0, len(token))
        return output

    handle = twin.get_submodule(path).register_forward_hook(change)
    try:
        trace = watch(twin, args, kwargs, keep=True)
    finally:
        handle.remove()
    again = BlockReader(trace, reader.modules, reader.path)
    others = _attentions(again, trace)
    other = trace.values[others[0].query] if len(others) == 1 else query
    if other.shape != query.shape:
        return False
    changed = (other != query).flatten(0, -3)
    return int(changed.any(dim=0).any(dim=-1).sum()) < count


def _is_cosine(trace: Trace, seen: Attention) -> bool:
    """Whether queries and keys are normalised."""
    query = trace.values[seen.query]
    key = trace.values[seen.key]
    if not seen.fused:  # the keys stand in columns
        key = key.transpose(-1, -2)
    return all(_constant(each.norm(dim=-1)) for each in (query, key))


def _constant(lengths: Tensor) -> bool:
    return lengths.shape[-1] > 1 and bool((lengths.std(dim=-1) < 1e-4 * lengths.mean(dim=-1)).all())


def _mixes_heads(reader: BlockReader, trace: Trace, seen: Attention) -> bool:
    """Whether heads are mixed, or something else than a product with the values reads the weights of attention."""
    made = trace.after({seen.query, seen.key}, seen.output) & trace.before(seen.output)
    if any(trace.nodes[index].owner in reader.projections.values() for index in made):
        return True
    weights = [index for index in made if trace.nodes[index].op in ("_softmax", "_safe_softmax")]
    after = trace.after(set(weights), seen.output) & made if weights else set()
    return any(not trace.nodes[i].moves and trace.nodes[i].op != "mul" for i in after - {seen.output, *weights})


def _equal_parts(trace: Trace, reader: BlockReader, roles: BlockRoles, seen: Attention) -> bool:
    """Whether queries, keys and values of one projection are its three parts of equal size, in this order."""
    parts = {"query": seen.query, "key": seen.key, "value": seen.value}
    shared = [role for role in parts if getattr(roles, role) == roles.value]
    if len(shared) < 2:
        return True
    (path,) = roles.value
    output = next(out for out, each in reader.projections.items() if each == path)
    made = trace.values[output]
    convolved = isinstance(reader.modules[path], nn.Conv2d)
    channels = made.movedim(1, -1) if convolved else made
    if channels.shape[-1] % len(shared):
        return False
    pieces = channels.chunk(len(shared), dim=-1)
    for piece, role in zip(pieces, [role for role in ("query", "key", "value") if role in shared], strict=True):
        raw = _raw(trace, output, parts[role], piece.numel())
        if raw is None:
            return False
        # the same values, in any order
        if not torch.allclose(raw.double().square().sum(), piece.double().square().sum(), rtol=1e-9):
            return False
    return True


def _values_known(trace: Trace, reader: BlockReader, roles: BlockRoles, seen: Attention) -> bool:
    """Whether values are what their projection returns, or visibly not, by another number of channels."""
    output = next(out for out, path in reader.projections.items() if path == roles.value[0])
    index = seen.value
    while index != output:
        node = trace.nodes[index]
        if not node.selects or not node.inputs:
            norm = next((call for call in reader.calls if index in call.outputs), None)
            if norm is None or not is_norm(reader.modules[norm.path]) or norm.stream is None:
                break
            index = norm.stream
        else:
            index = node.inputs[0]
    else:
        return True
    made, read = (linear_sizes(reader.modules[path]) for path in (roles.value[0], roles.output[0]))
    return roles.key != roles.value and made is not None and read is not None and made[0] > read[1]


def _by_head(trace: Trace, reader: BlockReader, roles: BlockRoles, seen: Attention) -> bool:
    """Whether the output of one projection has the query, key and value of one head, then those of the next."""
    if not roles.query == roles.key == roles.value:
        return False
    output = next(out for out, path in reader.projections.items() if path == roles.value[0])
    made = trace.values[output]
    made = made.movedim(1, -1) if isinstance(reader.modules[roles.value[0]], nn.Conv2d) else made
    wide, deep = trace.values[seen.query].shape[-1], trace.values[seen.value].shape[-1]
    if made.shape[-1] % (2 * wide + deep):
        return False
    parts = made.unflatten(-1, (-1, 2 * wide + deep)).split([wide, wide, deep], dim=-1)
    for part, index in zip(parts, (seen.query, seen.key, seen.value), strict=True):
        raw = _raw(trace, output, index, part.numel())
        if raw is None or not torch.allclose(raw.double().square().sum(), part.double().square().sum(), rtol=1e-9):
            return False
    return True


def _raw(trace: Trace, output: int, part: int, count: int) -> Tensor | None:
    """The last value on the way to a part that has exactly the elements of a projection's output."""
    way = trace.before(part)
    found: set[int] = {output}
    last = -1
    for node in trace.nodes[output + 1 : part + 1]:
        if node.index in way and node.selects and node.inputs and node.inputs[0] in found:
            found.add(node.index)
            last = node.index if math.prod(node.shape) == count else last
    return trace.values.get(last)


def _takes_more(block: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether prompts can join the block's sequence: it takes more tokens, in any order, and all attend to them."""
    if not args:
        return False
    # few tokens if the block takes any number; more than the patches if it recognises patches by their number
    return any(_takes_more_than(block, stream, args[1:], kwargs) for stream in (args[0][:, :_FEW], args[0]))


def _takes_more_than(block: nn.Module, stream: Tensor, rest: tuple, kwargs: Mapping[str, Any]) -> bool:
    generator = torch.Generator().manual_seed(1)
    more = torch.randn(stream.shape[0], _PREFIX, stream.shape[-1], generator=generator, dtype=stream.dtype)
    try:
        with torch.no_grad():
            plain = _first(block(stream, *rest, **kwargs))
            longer = _first(block(torch.cat([more, stream], dim=1), *rest, **kwargs))
            swapped = _first(block(torch.cat([more.flip(1), stream], dim=1), *rest, **kwargs))
    except Exception:  # any error: it takes no other number of tokens
        return False
    if longer.shape[1] != stream.shape[1] + _PREFIX:
        return False
    kept = torch.allclose(longer[:, _PREFIX:], swapped[:, _PREFIX:], rtol=1e-3, atol=1e-4)
    moved = torch.allclose(longer[:, :_PREFIX], swapped[:, :_PREFIX].flip(1), rtol=1e-3, atol=1e-4)
    differs = not torch.allclose(longer[:, _PREFIX:], plain, rtol=1e-3, atol=1e-4)
    return kept and moved and differs


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
