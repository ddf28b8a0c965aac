"""Blocks of a side network that start as parts of the backbone's own blocks (structural pruning)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ...backbones.backbone import BLOCK_ROLES, Block, VisionBackbone, unwrapped
from ...sites import as_matrix


PROJECTIONS = ("query", "key", "value")


def why_not(backbone: VisionBackbone, num_heads: int, width: int, hidden: int) -> str | None:
    """Why side blocks of this shape cannot be parts of a backbone's blocks; None if they can.

    Args:
        backbone: with blocks of one width.
        num_heads: of the side block.
        width: of its stream.
        hidden: of its MLP.
    """
    if not backbone.architecture.softmax:
        return "their attention is not the softmax attention of projected tokens"
    for block in backbone.blocks:
        if block.post_norm:
            return "their norms follow the sub-layers"
        paths = {role: block.roles[role] for role in BLOCK_ROLES}
        wrong = [role for role, found in paths.items() if len(found) != 1]
        if wrong:
            return f"not every one has exactly one {', '.join(wrong)}"
        if block.num_heads is None:
            return "their number of heads is not known"
        shared = [paths[role] for role in PROJECTIONS]
        if len(set(shared)) < 3 and not backbone.architecture.equal_parts:
            return "queries, keys and values are not equal parts of one projection"
        sizes = {role: backbone.linears.get(paths[role][0]) for role in (*PROJECTIONS, "output", "fc1", "fc2")}
        rows = {role: (sizes[role] or (0,))[0] // shared.count(paths[role]) for role in PROJECTIONS}
        inner, mlp = (sizes["output"] or (0, 0))[1], (sizes["fc2"] or (0, 0))[1]
        expected = dict.fromkeys(PROJECTIONS, (inner, block.width)) | {
            "output": (block.width, inner),
            "fc1": (mlp, block.width),
            "fc2": (block.width, mlp),
        }
        actual = {role: size and (rows.get(role, size[0]), size[1]) for role, size in sizes.items()}
        wrong = [role for role in expected if actual[role] != expected[role]]
        if wrong or inner % block.num_heads:
            return f"not every one has, in the shapes of a plain block, {', '.join(wrong) or 'equal heads'}"
        if num_heads > block.num_heads or width // num_heads > inner // block.num_heads or hidden > mlp:
            return (
                f"they have {block.num_heads} heads of {inner // block.num_heads} channels and an MLP of {mlp}, less "
                f"than the side blocks' {num_heads} heads of {width // num_heads} and {hidden}"
            )
    return None


def parts_of(block: Block, model: nn.Module, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """A tensor for each weight and bias of a block, as `query.weight` (out, in) and so on.

    Args:
        block: one for which `why_not` returns None.
        model: it belongs to.
        of: maps a parameter to a tensor of the same shape, for example its values.
    """
    paths = [block.roles[role][0] for role in PROJECTIONS]
    parts = {}
    for role in BLOCK_ROLES:
        path = block.roles[role][0]
        module = unwrapped(model.get_submodule(path))
        for name, parameter in module.named_parameters(recurse=False):
            tensor = as_matrix(module, of(parameter))
            if role in PROJECTIONS:
                before = paths[: PROJECTIONS.index(role)].count(path)
                tensor = tensor.chunk(paths.count(path))[before]
            parts[f"{role}.{name}"] = tensor
    return parts


def best_stream(importances: Iterable[Mapping[str, Tensor]], count: int) -> Tensor:
    """The channels of the stream whose weights matter most in all blocks, ascending, (count,).

    Args:
        importances: of the blocks' weights, as `parts_of` returns them.
        count: how many channels.
    """
    scores = []
    for part in importances:
        scores += [part[f"{role}.weight"].sum(dim=0) for role in (*PROJECTIONS, "fc1")]
        scores += [part[f"{role}.weight"].sum(dim=1) for role in ("output", "fc2")]
    return torch.stack(scores).sum(dim=0).topk(count).indices.sort().values


def pruned(
    values: Mapping[str, Tensor],
    importance: Mapping[str, Tensor],
    stream: Tensor,
    num_heads: int,
    kept_heads: int,
    hidden: int,
) -> dict[str, Tensor]:
    """The parts of a block that matter most, as the state of a `SideBlock`.

    The most important heads are kept. In each, queries and keys keep the channels that matter most to both, and so do
    values and the output projection. The MLP keeps the channels that matter most to both of its linears.

    Args:
        values: weights and biases of the block.
        importance: of each weight and bias.
        stream: channels of the stream to keep, (width,).
        num_heads: of the block.
        kept_heads: number of heads to keep.
        hidden: number of channels of the MLP to keep.
    """

    def rows(role: str) -> Tensor:
        return importance[f"{role}.weight"][:, stream].sum(dim=1)

    def columns(role: str) -> Tensor:
        return importance[f"{role}.weight"][stream].sum(dim=0)

    in_query_and_key = (rows("query") + rows("key")).unflatten(0, (num_heads, -1))
    in_value_and_output = (rows("value") + columns("output")).unflatten(0, (num_heads, -1))
    head_size = in_query_and_key.shape[1]
    heads = (in_query_and_key + in_value_and_output).sum(dim=1).topk(kept_heads).indices.sort().values

    def channels(scores: Tensor) -> Tensor:
        kept = scores[heads].topk(len(stream) // kept_heads, dim=1).indices.sort(dim=1).values
        return (kept + head_size * heads.unsqueeze(1)).flatten()

    matched, mixed = channels(in_query_and_key), channels(in_value_and_output)
    mlp = (rows("fc1") + columns("fc2")).topk(hidden).indices.sort().values
    kept = {"query": matched, "key": matched, "value": mixed, "fc1": mlp, "output": stream, "fc2": stream}
    read = {"output": mixed, "fc2": mlp}

    def linear(role: str) -> tuple[Tensor, Tensor]:
        weight, bias = values[f"{role}.weight"], values.get(f"{role}.bias")
        part = weight[kept[role]][:, read.get(role, stream)]
        return part, part.new_zeros(len(part)) if bias is None else bias[kept[role]]

    state = {}
    for role in ("norm1", "norm2"):
        for name, start in (("weight", 1.0), ("bias", 0.0)):
            found = values.get(f"{role}.{name}")
            state[f"{role}.{name}"] = (
                torch.full(stream.shape, start, device=stream.device) if found is None else found[stream]
            )
    weights, biases = zip(*map(linear, PROJECTIONS), strict=True)
    state |= {"qkv.weight": torch.cat(weights), "qkv.bias": torch.cat(biases)}
    for role, name in (("output", "proj"), ("fc1", "fc1"), ("fc2", "fc2")):
        state[f"{name}.weight"], state[f"{name}.bias"] = linear(role)
    return state
