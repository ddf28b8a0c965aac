"""Derive the modules before, between and after the blocks, and the layout of tokens, from a run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .operations import is_norm, is_operation, is_projection
from .paths import is_in
from .roles import BlockRoles
from .running import Ran, StopRun
from .watching import tensors_in


@dataclass(frozen=True)
class Outside:
    """The modules outside the blocks; the fields have the meaning of those of `Architecture`."""

    patch_embedding: tuple[str, ...]
    embeddings: str
    input_norms: tuple[str, ...]
    final_norms: tuple[str, ...]
    between: tuple[str, ...]


def input_modules(
    ran: Ran, modules: Mapping[str, nn.Module], lists: Mapping[str, Sequence[str]], heads: Collection[str]
) -> Outside:
    """Derive them from the order of calls and from dependencies."""
    trace = ran.trace
    blocks = [path for names in lists.values() for path in names]
    calls = ran.calls()
    first = calls[next(path for path in calls if path in set(blocks))]
    last = max((calls[path] for path in blocks), key=lambda call: call.end)
    entered = {each for index in first.inputs for each in trace.before(index)}
    stem = [
        call
        for path, call in calls.items()
        if is_projection(modules[path])
        and call.start < first.start
        and any(out in entered for out in call.outputs)
        and not any(is_in(path, block) for block in blocks)
    ]
    pixels = trace.after(set(trace.pixels))
    stem = [call for call in stem if any(each in pixels for each in call.inputs)]
    patch = (stem[-1].path,) if stem else ()
    between, before, behind = [], [], []
    for path, module in modules.items():
        if path not in calls or (not is_operation(module) and not is_norm(module)):
            continue
        if any(is_in(path, block) for block in (*blocks, *heads)) or path in patch:
            continue
        call = calls[path]
        if is_norm(module) and call.start < first.start:
            before.append(path)
        elif is_norm(module) and call.start >= last.end:
            behind.append(path)
        elif is_operation(module):
            between.append(path)
    same = {each for index in first.inputs[:1] for each in trace.same(index)}
    makers = [
        path
        for path, call in calls.items()
        if path
        and call.outputs
        and call.outputs[0] in same
        and call.start < first.start
        and not isinstance(modules[path], nn.Dropout | nn.Identity)
        and any(True for _ in modules[path].parameters())
    ]
    return Outside(patch, makers[0] if makers else "", tuple(before), tuple(behind), tuple(between))


def grid_of(
    ran: Ran, patch_embedding: Sequence[str], blocks: Sequence[str], roles: Mapping[str, BlockRoles]
) -> tuple[Any, int]:
    """The layout of the tokens in the image, and the number of prefix tokens.

    Cells of the patch embedding's output are changed one by one to find the token of the first block that changes.
    """
    streams = {role.stream for role in roles.values() if role.sublayers}
    if not streams or "packed" in streams:
        return None, 0
    if streams != {"tokens"}:
        return ("map" if "tokens" not in streams and _are_maps(ran, blocks, roles) else None), 0
    unknown = (None, prefix_joined(ran, blocks[0]))
    if any(parameter.is_meta for parameter in ran.twin.parameters()):
        return unknown  # nothing has numbers
    patch = [ran.twin.get_submodule(path) for path in patch_embedding]
    if not patch or not isinstance(patch[0], nn.Conv2d | nn.Conv3d):
        return unknown
    base, size = _entering(ran, patch_embedding[0], blocks[0], None)
    if base is None or size is None or base.ndim != 3 or size[0] != base.shape[0]:
        return unknown
    sides = size[2:]
    prefix = None
    for cell in ([0 for _ in sides], [side - 1 for side in sides], [side // (2 + i) for i, side in enumerate(sides)]):
        place = 0
        for index, side in zip(cell, sides, strict=True):
            place = place * side + index
        other, _ = _entering(ran, patch_embedding[0], blocks[0], tuple(cell))
        if other is None or other.shape != base.shape:
            return unknown
        changed = (other != base).any(dim=-1)[0].nonzero().flatten().tolist()
        if len(changed) != 1 or prefix not in (None, changed[0] - place):
            return unknown
        prefix = changed[0] - place
    assert prefix is not None
    calls = ran.calls()
    lengths = {base.shape[1]: prefix}
    for path in blocks:
        length = ran.trace.nodes[calls[path].stream or 0].shape[1]
        if roles[path].sublayers and roles[path].patches and length not in lengths:
            lengths[length] = prefix_joined(ran, path)
    patches = {length - before for length, before in lengths.items()}
    return ("full" if len(patches) == 1 and prefix >= 0 else None), prefix


def _are_maps(ran: Ran, blocks: Sequence[str], roles: Mapping[str, BlockRoles]) -> bool:
    """Whether the streams have the layout of the image: convolutions read them so, or they change where pixels do."""
    index = next((i for i, each in enumerate(ran.args) if isinstance(each, Tensor) and each.ndim == 4), None)
    name = next((n for n, each in ran.kwargs.items() if isinstance(each, Tensor) and each.ndim == 4), None)
    pixels = ran.args[index] if index is not None else ran.kwargs.get(name or "")
    if pixels is None or pixels.is_meta:
        return False
    watched = [path for path in dict.fromkeys(map(ran.as_run, blocks)) if roles[path].sublayers]
    maps = {_place(ran, path) for path in watched if _is_convolved(ran, path, roles[path].stream)}
    watched = [path for path in watched if _place(ran, path) not in maps]
    base = _streams(ran, watched, index, name, pixels)
    height, width = pixels.shape[-2:]
    for row, column in ((0.25, 0.75), (0.75, 0.25)):
        changed = pixels.clone()
        top, left = int(row * height), int(column * width)
        size = max(1, height // 16)
        changed[..., top - size : top + size, left - size : left + size] += 3.0
        after = _streams(ran, watched, index, name, changed)
        for path, before in base.items():
            other = after.get(path)
            if other is None or other.shape != before.shape:
                return False
            first = roles[path].stream == "channels_first"
            moved = (other - before).abs().sum(dim=1 if first else 3)[0]
            rows, columns = moved.shape
            found = [
                (float(amounts.argmax()) + 0.5) / len(amounts) for amounts in (moved.sum(dim=1), moved.sum(dim=0))
            ]
            if any(
                abs(at - share) > max(0.22, 0.75 / side)
                for at, share, side in zip(found, (row, column), (rows, columns), strict=True)
            ):
                return False
    return True


def _place(ran: Ran, path: str) -> tuple[str, tuple[int, ...]]:
    """The list of a block and the shape of its stream: blocks with the same have the same layout."""
    return path.rpartition(".")[0], ran.trace.nodes[ran.calls()[path].stream or 0].shape


def _is_convolved(ran: Ran, path: str, stream: str) -> bool:
    """Whether a convolution of neighbours in a block reads its stream, or something of the same rows and columns."""
    nodes, call = ran.trace.nodes, ran.calls()[path]
    shape = nodes[call.stream or 0].shape
    sides = shape[2:] if stream == "channels_first" else shape[1:3]
    inside = ((each, ran.twin.get_submodule(each.path)) for each in ran.trace.calls if is_in(each.path, path))
    return any(
        isinstance(module, nn.Conv2d)
        and max(module.kernel_size) > 1
        and each.stream is not None
        and nodes[each.stream].shape[2:] == sides
        for each, module in inside
    )


def _streams(ran: Ran, paths: Sequence[str], index: int | None, name: str | None, pixels: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def note(path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.setdefault(path, next(tensors_in((args, kwargs))).clone())

    handles = [
        ran.twin.get_submodule(path).register_forward_pre_hook(partial(note, path), with_kwargs=True) for path in paths
    ]
    args = tuple(pixels if i == index else each for i, each in enumerate(ran.args))
    kwargs = {**ran.kwargs, **({name: pixels} if index is None and name else {})}
    try:
        with torch.no_grad():
            ran.twin(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def prefix_joined(ran: Ran, block: str) -> int:
    """The number of tokens from parameters alone that are put before the others on the way to a block."""
    trace, call = ran.trace, ran.calls()[block]
    if call.stream is None or len(trace.nodes[call.stream].shape) != 3:
        return 0
    depends, length = trace.after(set(trace.pixels)), trace.nodes[call.stream].shape[1]
    for index in sorted(trace.before(call.stream), reverse=True):
        node = trace.nodes[index]
        if node.op != "cat" or len(node.shape) != 3 or node.shape[1] != length:
            continue
        count = 0
        for each in node.inputs:
            if each in depends:
                return count
            count += trace.nodes[each].shape[1]
    return 0


def _entering(
    ran: Ran, patch_embedding: str, block: str, cell: tuple[int, ...] | None
) -> tuple[Tensor | None, torch.Size | None]:
    """The input of the first block after a change of a cell of the patch embedding's output, and the output's size."""
    seen: dict[str, Any] = {}

    def change(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        seen["size"] = output.shape
        if cell is None:
            return output
        output = output.clone()
        # different for each channel, because a norm would remove a common change
        place: tuple[Any, ...] = (slice(None), slice(None), *cell)
        output[place] += torch.linspace(1.0, 9.0, output.shape[1]).to(output)
        return output

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen["stream"] = next(tensors_in((args, kwargs)), None)
        raise StopRun

    handles = [
        ran.twin.get_submodule(patch_embedding).register_forward_hook(change),
        ran.twin.get_submodule(block).register_forward_pre_hook(stop, with_kwargs=True),
    ]
    try:
        with torch.no_grad():
            ran.twin(*ran.args, **ran.kwargs)
    except StopRun:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen.get("stream"), seen.get("size")
