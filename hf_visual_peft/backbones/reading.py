"""Derives a role table for a backbone without one from a run of a copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .architectures import Architecture
from .backbone import BackboneError
from .examples import is_video, reads_words
from .operations import is_operation, is_projection
from .outside import grid_of, input_modules, prefix_joined
from .paths import existing, is_in, join
from .roles import BlockReader, BlockRoles
from .running import Ran, run_shallow
from .verifying import verified
from .watching import Call, Trace


_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_WHOLE = ("stream", "stream_inside", "softmax", "prompts")


@dataclass(frozen=True)
class Found:
    """A role table derived from a run, and its restrictions.

    Attributes:
        table: the role table.
        seen: by the name of a block, why methods at blocks cannot act on it; empty if they can.
    """

    table: Architecture
    seen: Mapping[str, str]


def read_backbone(backbone: nn.Module, example_inputs: Any = None) -> Found:
    """Derive the role table of a backbone by running a copy of it.

    Args:
        backbone: the backbone; it is not changed.
        example_inputs: arguments of its forward, if none can be made: a tensor, tuple or mapping.

    Raises:
        BackboneError: it cannot be run, or the parts found in a block do not add up to the block's output.
    """
    ran = run_shallow(backbone, example_inputs)
    modules = dict(ran.twin.named_modules())
    lists = find_blocks(ran, modules)
    roles: dict[str, BlockRoles] = {}
    for path in (path for paths in lists.values() for path in paths):
        run = ran.as_run(path)
        if run not in roles:
            roles[run] = verified(ran, run, BlockReader(ran.trace, modules, run).read())
        roles[path] = roles[run]
    table = _table(ran, modules, lists, roles)
    return Found(table, {path: role.seen for path, role in roles.items() if role.seen})


def find_blocks(ran: Ran, modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The blocks by the name of their list, in the order of their calls.

    A block is an item of a list that adds something to its input; other items of the same list and class are also
    blocks. If nothing is added anywhere, the items of lists, then all parts of the model, then single layers.
    """
    trace, called = ran.trace, ran.calls()
    # a row of tokens without a batch is a stream only where there is no other: heads add to such rows, too
    sums = _sums(trace) or _sums(trace, 2)
    parts = (_listed(owner, modules) for owner in sums)
    found = {path for path in parts if path is not None and path in called}
    in_lists = {path for path in found if isinstance(modules[path.rpartition(".")[0]], _LISTS)}
    found = in_lists or found  # a single one beside lists is not a block but a head or a neck
    found = _outermost(ran, modules, found)
    found = _split(trace, modules, found, called, sums)
    found = {other for path in found for other in ran.alike(path)}
    found = found or _units(modules, called)
    kinds = {type(modules[path]) for path in found}
    for path in called:
        if not path or type(modules[path]) not in kinds or not isinstance(modules[path.rpartition(".")[0]], _LISTS):
            continue
        if not any(is_in(block, path) or is_in(path, block) for block in found):
            found.add(path)
    if not found:
        raise BackboneError(f"{type(ran.twin).__name__} has no parts that could be blocks.")
    lists: dict[str, list[str]] = {}
    for path in (path for path in called if path in found):
        lists.setdefault(path.rpartition(".")[0], []).append(path)
    order = {name: position for position, (name, _) in enumerate(ran.twin.named_modules())}
    return {name: sorted(paths, key=order.__getitem__) for name, paths in lists.items()}


def _outermost(ran: Ran, modules: Mapping[str, nn.Module], found: set[str]) -> set[str]:
    """The innermost blocks that add to a stream; a module that holds others and adds nothing itself is a stage."""
    kept = set(found)
    for path in sorted(found, key=lambda path: path.count(".")):
        inner = {other for other in kept if is_in(other, path) and other != path}
        if path not in kept or not inner:
            continue
        reader = BlockReader(ran.trace, modules, path)
        adds = (
            reader.call.stream is not None and bool(reader.call.outputs) and bool(reader.branches()) and reader.whole
        )
        kept -= inner if adds else {path}
    return kept


def _sums(trace: Trace, least: int = 3) -> list[str]:
    """Owners of the additions of two values that both depend on the input, of at least that many dimensions."""
    depends = trace.after(set(trace.pixels))
    owners = []
    for node in trace.nodes:
        if node.op != "add" or len(node.inputs) < 2 or len(node.shape) < least:
            continue
        if all(each in depends for each in node.inputs[:2]):
            owners.append(node.owner)
    return list(dict.fromkeys(owners))


def _listed(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The innermost item of a list around a module, which may be the module; the module itself if it is in no list."""
    start = path
    while path:
        parent = path.rpartition(".")[0]
        module = modules[path]
        if isinstance(modules[parent], _LISTS) and not isinstance(module, _LISTS) and _is_block(module):
            return path
        path = parent
    return start if start and _is_block(modules[start]) else None


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(is_projection(each) for each in module.modules())


def _split(
    trace: Trace, modules: Mapping[str, nn.Module], found: set[str], called: Mapping[str, Call], sums: Sequence[str]
) -> set[str]:
    """The blocks; a block with several attentions in separate parts is replaced by these parts."""
    made: set[str] = set()
    for path in found:
        call = called[path]
        owners = {a.owner for a in trace.attentions if call.start <= a.output < call.end}
        parts = [
            join(path, name)
            for name, part in modules[path].named_children()
            if join(path, name) in called and _is_block(part)
        ]
        holding = [part for part in parts if any(is_in(owner, part) for owner in owners)]
        inside = [owner for owner in sums if is_in(owner, path)]
        within = all(any(is_in(owner, part) for part in parts) for owner in inside)
        made |= set(parts) if len(owners) > 1 and len(holding) > 1 and within else {path}
    return made


def _units(modules: Mapping[str, nn.Module], called: Mapping[str, Call]) -> set[str]:
    """Blocks of a model without a stream: the smallest items of lists with several layers, or all its parts."""
    parts = {
        path
        for path in called
        if path and isinstance(modules[path.rpartition(".")[0]], _LISTS) and not isinstance(modules[path], _LISTS)
    }
    for least in (2, 1):
        units = {path for path in parts if sum(map(is_projection, modules[path].modules())) >= least}
        if least == 1:
            units = {path for path in units if _is_block(modules[path])}
        units -= {path for path in units if any(is_in(other, path) and other != path for other in units)}
        if len(units) > 1:
            return units
    top = {path for path in called if path and "." not in path and _is_block(modules[path])}
    if len(top) > 2:
        return top
    layers = {path for path in parts if is_projection(modules[path])}
    held = Counter(path.rpartition(".")[0] for path in layers)
    most = max(held, key=held.__getitem__, default=None)
    return {path for path in layers if path.rpartition(".")[0] == most} or top


def _table(
    ran: Ran, modules: Mapping[str, nn.Module], lists: Mapping[str, Sequence[str]], roles: Mapping[str, BlockRoles]
) -> Architecture:
    backbone = ran.twin
    blocks = [path for names in lists.values() for path in names]
    names, skipped = _patterns(backbone, lists)
    heads = _heads(ran, modules, blocks)
    outside = input_modules(ran, modules, lists, heads)
    grid, prefix = grid_of(ran, outside.patch_embedding, blocks, roles)
    roles = _settled(ran, blocks, roles, prefix)
    kinds = Counter(roles.values())
    common = max(kinds, key=lambda role: (bool(role.sublayers), bool(role.query), kinds[role]))
    variants = _variants(modules, blocks, roles, common)
    every = {path for path, module in modules.items() if is_operation(module)}
    other = every - {path for path in every if any(is_in(path, block) for block in blocks)}
    used = {*outside.patch_embedding, *outside.input_norms, *outside.final_norms}
    other -= used | {path for path in every if any(is_in(path, head) for head in heads)}
    return Architecture(
        backbones=(class_name(backbone),),
        blocks=names[0] if len(names) == 1 else names,
        patch_embedding=outside.patch_embedding,
        embeddings=outside.embeddings,
        input_norms=outside.input_norms,
        norms=outside.final_norms,
        between="all" if other == set(outside.between) and outside.between else outside.between,
        skipped_blocks=skipped,
        heads=(),
        own_heads=heads,
        # where words may stand among the tokens, their number tells where patches begin, and differs
        grid=grid if common.patches and not reads_words(backbone) else None,
        video=any(is_video(backbone, ran.trace.nodes[index].shape) for index in ran.trace.pixels),
        variants=variants,
        **common.as_fields(),
    )


def _settled(ran: Ran, blocks: Sequence[str], roles: Mapping[str, BlockRoles], prefix: int) -> dict[str, BlockRoles]:
    """The roles with properties common to all blocks: how prompts join, and a layout if there is no stream."""
    joining = {role.prompts for role in roles.values() if role.prompts}
    streams = [role for role in roles.values() if role.sublayers]
    calls, nodes = ran.calls(), ran.trace.nodes
    made: dict[str, BlockRoles] = {}
    lengths: dict[int, int] = {}
    for path in blocks:
        role = roles[path]
        if len(joining) > 1 and role.prompts:
            role = replace(role, prompts="keys")
        stream = calls[path].stream
        if role.stream == "tokens" and stream is not None and len(nodes[stream].shape) == 3:
            length = nodes[stream].shape[1]
            if length not in lengths:
                lengths[length] = prefix_joined(ran, path) if lengths else prefix
            role = replace(role, prefix_tokens=lengths[length])
        if not role.sublayers and not streams:  # nothing adds to a stream anywhere
            role = replace(role, width=None)
        elif not role.sublayers and role.width is None:
            role = replace(role, stream=streams[0].stream, stream_inside=streams[0].stream_inside)
        made[path] = role
    return made


def class_name(module: nn.Module) -> str:
    """The full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _patterns(backbone: nn.Module, lists: Mapping[str, Sequence[str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the lists, or a pattern for them, and items that are not blocks: names of classes or modules."""
    blocks = {path for paths in lists.values() for path in paths}
    inside = [join(path, name) for path in lists for name, _ in backbone.get_submodule(path).named_children()]
    kinds = {type(backbone.get_submodule(path)).__name__ for path in blocks}
    left = {path: type(backbone.get_submodule(path)).__name__ for path in inside if path not in blocks}
    skipped = tuple(sorted({path if kind in kinds else kind for path, kind in left.items()}))
    paths = list(lists)
    parts = [path.split(".") for path in paths]
    if len(paths) > 1 and len({len(each) for each in parts}) == 1:
        pattern = ".".join(names[0] if len(set(names)) == 1 else "*" for names in zip(*parts, strict=True))
        if list(existing(backbone, "", [pattern])) == paths:
            return (pattern,), skipped
    return tuple(paths), skipped


def _variants(
    modules: Mapping[str, nn.Module], blocks: Sequence[str], roles: Mapping[str, BlockRoles], common: BlockRoles
) -> dict[str, dict[str, Any]]:
    """Differences of blocks from the common roles, by class or, if blocks of a class differ, by name."""
    by_class: dict[str, Counter[BlockRoles]] = {}
    for path in blocks:
        by_class.setdefault(type(modules[path]).__name__, Counter())[roles[path]] += 1
    usual = {
        name: common if common in counts else max(counts, key=counts.__getitem__) for name, counts in by_class.items()
    }
    made = {name: _difference(role, common) for name, role in usual.items()}
    for path in blocks:
        if roles[path] != usual[type(modules[path]).__name__]:
            made[path] = _difference(roles[path], common)
    return {name: fields for name, fields in made.items() if fields or "." in name}


def _difference(role: BlockRoles, common: BlockRoles) -> dict[str, Any]:
    usual = common.as_fields()
    made = {name: value for name, value in role.as_fields().items() if value != usual[name]}
    flattened = common.stream.startswith("channels") and not role.stream.startswith("channels")
    # tokens that are not patches have no place in the image, and the rows of maps do not tell that of other tokens
    return {**made, "grid": None} if flattened or not role.patches else made


def _heads(ran: Ran, modules: Mapping[str, nn.Module], blocks: Sequence[str]) -> tuple[str, ...]:
    """The head: the one that timm names, or the last linear after the blocks."""
    told = getattr(ran.twin, "default_cfg", {}) or {}
    names = told.get("classifier") if isinstance(told, Mapping) else None
    names = (names,) if isinstance(names, str) else tuple(names or ())
    found = tuple(n for n in names if n in modules and any(True for _ in modules[n].parameters()))
    if names or ran.pretrained:
        return found
    calls = ran.calls()
    last = max(calls[path].end for path in blocks)
    made = {
        out: call.path
        for call in ran.trace.calls
        if call.start >= last and is_projection(modules[call.path])
        for out in call.outputs
    }
    answers = [made[each] for each in ran.trace.answers if each in made]
    return tuple(dict.fromkeys(answers)) if len(answers) == len(ran.trace.answers) else ()
