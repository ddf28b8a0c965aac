"""Networks beside the backbone in plain torch, for reference vectors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from reference_backbone import DEPTH, GRID, HEADS, Vit, Weights, attend, to_maps, to_tokens
from torch import Tensor


def with_stream(v: Vit, x: Tensor) -> Tensor:
    """Logits of what takes the place of the last block's output."""
    return v.w.linear("head", v.norm("norm", x)[:, 0])


def dtl(v: Vit, w: Weights) -> Tensor:
    """That adds from the second block on, and DTL+ where there is a kernel."""
    x, h = v.embed(), 0.0
    kernel = next((value for name, value in w.items() if "dtl_conv" in name), None)
    for index in range(DEPTH):
        h = h + x @ w[f"{index}.dtl_piece.down"].T @ w[f"{index}.dtl_piece.up"].T
        x = v.plain_block(index, x)
        if index >= 1:
            added = h * torch.sigmoid(100.0 * h)
            if kernel is not None:
                maps = F.conv2d(to_maps(added[:, 1:]), kernel, padding=1, groups=len(kernel))
                added = torch.cat([added[:, :1], to_tokens(maps)], dim=1)
            x = x + added
    return with_stream(v, x)


def e3va(v: Vit, w: Weights) -> Tensor:
    def adapter(own: Weights, x: Tensor) -> Tensor:
        hidden = F.gelu(own.linear("down.1", own.linear("down.0", x)))
        return own.linear("up.1", own.linear("up.0", hidden))

    x, h = v.embed(), 0.0
    for index in range(DEPTH):
        own = w.of(f"{index}.e3va_piece.")
        z = x + v.attended(index, x)
        x = z + v.fed(index, z)
        h = h + adapter(own.of("attention."), z) + adapter(own.of("mlp."), x)
    return with_stream(v, x + h)


def hst(v: Vit, w: Weights) -> Tensor:
    x, maps, rate = v.embed(), v.pixels, 0.2
    for index, heads in enumerate((2, 2, 4)):
        own, bridge = w.of(f"{index}.hst_rung."), w.of(f"{index}.hst_bridge{index}.")
        for number in (1, 2):
            for kind in ("weight", "bias"):
                name = f"{index}.norm{number}.{kind}"
                v.w[name] = v.w[name] + w[f"{index}.hst_norm{number}.{kind}.values"]
        meta = w[f"{index}.hst_tokens.tokens"].expand(len(x), -1, -1)
        out = v.plain_block(index, torch.cat([x[:, :1], meta, x[:, 1:]], dim=1))
        tokens, x = out[:, 1:2], torch.cat([out[:, :1], out[:, 2:]], dim=1)
        if index == 0:
            maps = F.conv2d(maps, own["enter.0.weight"], stride=2, padding=1)
            stats = None if v.training else torch.zeros(4), None if v.training else torch.ones(4)
            maps = F.relu(F.batch_norm(maps, *stats, own["enter.1.weight"], own["enter.1.bias"], v.training))
            maps = F.conv2d(maps, own["enter.3.weight"], own["enter.3.bias"], stride=2)
        else:
            maps = F.conv2d(maps, own["enter.weight"], own["enter.bias"], stride=2, padding=1)
        size = (maps.shape[2], maps.shape[3])
        s = own.norm("enter_norm", to_tokens(maps))
        resized = F.interpolate(to_maps(x[:, 1:]), size, mode="bilinear")
        features = F.linear(to_tokens(resized), bridge["weight"], bridge["bias"])
        tokens = own.norm("token_norm", F.linear(tokens, bridge["weight"], bridge["bias"]))
        seen, block = torch.cat([tokens, features.mean(1, keepdim=True)], dim=1), own.of("block.")
        query = block.linear("query", block.norm("norm1", s, 1e-6))
        mixed = attend(query, block.linear("key", seen), block.linear("value", seen), heads)
        s = s + v.drop_path(block.linear("proj", mixed), rate * index / (DEPTH - 1)) + features
        fed = block.linear("fc2", F.gelu(block.linear("fc1", block.norm("norm2", s, 1e-6))))
        s = own.norm("norm", s + v.drop_path(fed, rate * index / (DEPTH - 1)), 1e-6)
        maps = to_maps(s, size)
    patches = to_tokens(F.interpolate(maps, GRID, mode="bilinear"))
    return with_stream(v, own.linear("up", torch.cat([s.mean(1, keepdim=True), patches], dim=1)))


def last(v: Vit, w: Weights) -> Tensor:
    """With the u of the paper, and its correction at the end."""
    x = v.embed()
    u, correction = x, 0.0
    for index in range(DEPTH):
        own = w.of(f"{index}.last_piece.attention.")
        correction, x = correction + x, v.plain_block(index, x)
        qkv = own.linear("qkv", own.linear("down", own.norm("norm", u)))
        u = u + own.linear("up", attend(*qkv.chunk(3, dim=-1), 1)) + x
    return with_stream(v, u - correction)


def lst(v: Vit, w: Weights) -> Tensor:
    """The encoder's side network of T5 with blocks of a vision transformer, and T5's dropouts."""
    x = v.embed()
    s = w.of("0.lst_rung.").linear("enter", v.drop(x, 0.1))
    for index in range(DEPTH):
        own = w.of(f"{index}.lst_rung.")
        x = v.plain_block(index, x)
        gate = torch.sigmoid(own["gate"] / 0.1)
        s, block = gate * s + (1 - gate) * own.linear("down", x), own.of("block.")
        qkv = block.linear("qkv", block.norm("norm1", s)).chunk(3, -1)
        parts = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in qkv]
        weights = v.drop((parts[0] @ parts[1].mT / parts[0].shape[-1] ** 0.5).softmax(-1), 0.1)
        s = s + v.drop(block.linear("proj", (weights @ parts[2]).transpose(1, 2).flatten(2)), 0.1)
        hidden = v.drop(F.gelu(block.linear("fc1", block.norm("norm2", s))), 0.1)
        s = s + v.drop(block.linear("fc2", hidden), 0.1)
    return with_stream(v, own.linear("up", v.drop(own.norm("norm", s), 0.1)))


def restuning(v: Vit, w: Weights) -> Tensor:
    """Res-Tuning-Bypass."""

    def adapter(own: Weights, x: Tensor) -> Tensor:
        return x + own.linear("up", F.gelu(own.linear("down", x)))

    x = s = v.embed()
    for index in range(DEPTH):
        own, x = w.of(f"{index}.restuning_bypass."), v.plain_block(index, x)
        share = torch.sigmoid(own["gate"])
        s = share * adapter(own.of("horizontal."), x) + (1 - share) * adapter(own.of("vertical."), s)
    return with_stream(v, s)


def collected(v: Vit, w: Weights, name: str, inputs: bool) -> tuple[list[Tensor], Tensor]:
    """The reduced streams, and the last whole one."""

    def reduced(own: Weights, x: Tensor) -> Tensor:
        return own.norm("norm", own.linear("down", x))

    x, states = v.embed(), []
    for index in range(DEPTH):
        own = w.of(f"{index}.{name}_piece.")
        if inputs and index == 0:
            states.append(reduced(own.of("before."), x))
        x = v.plain_block(index, x)
        states.append(reduced(own.of("behind."), x))
    return states, x


def sherl(v: Vit, w: Weights) -> Tensor:
    (*others, guide), x = collected(v, w, "sherl", inputs=False)
    own, shares = w.of(f"{DEPTH - 1}.sherl_piece."), []
    for u in others:
        repeated = sum(F.relu(F.cosine_similarity(u, other, dim=-1)) for other in others)
        shares.append(F.relu(own.linear("use", u * guide)) / repeated[..., None])
    total = sum(shares)
    mixed = guide + sum(share / (total + 1e-8) * u for share, u in zip(shares, others, strict=True))
    out = v.drop(own.norm("norm", own.linear("up", F.relu(mixed)), 1e-12), 0.1)
    return with_stream(v, out + torch.tanh(own["gate"] / 0.1) * x)


def unipt(v: Vit, w: Weights) -> Tensor:
    (*others, anchor), _ = collected(v, w, "unipt", inputs=True)
    own = w.of(f"{DEPTH - 1}.unipt_piece.")
    confidence = torch.stack([own.linear("gate", anchor.mean(1) * u.mean(1)) for u in others]).softmax(0)
    mixed = torch.zeros(())
    for share, u in zip(confidence, others, strict=True):
        likeness = F.relu(torch.einsum("bnc,bmc->bnm", anchor, u))
        likeness = F.normalize(likeness, p=1, dim=-1, eps=1e-8) + torch.eye(u.shape[1])
        mixed = mixed + share[:, None] * torch.einsum("bnm,bmc->bnc", likeness, u)
    project = own.of("project.")
    merged = anchor + project.norm("norm", project.linear("down", mixed))
    return with_stream(v, own.linear("up", F.relu(merged)))


def sidetuning(v: Vit, w: Weights) -> Tensor:
    own, maps = w.of(f"{DEPTH - 1}.sidetuning_side."), v.pixels
    for layer in range(2):
        maps = F.conv2d(maps, own[f"features.{3 * layer}.weight"], stride=2, padding=1)
        norm = own.of(f"features.{3 * layer + 1}.")
        maps = F.relu(F.group_norm(maps, 1, norm["weight"], norm["bias"]))
    tokens = to_tokens(F.conv2d(F.adaptive_avg_pool2d(maps, GRID), own["proj.weight"]))
    s, share = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1), torch.sigmoid(own["alpha"])
    return with_stream(v, share * v.stream() + (1 - share) * s)


def centres(sizes: list[tuple[int, int]]) -> Tensor:
    """x and y of all cells, 0 to 1 from edge to edge."""
    cells = [[((j + 0.5) / w, (i + 0.5) / h) for i in range(h) for j in range(w)] for h, w in sizes]
    return torch.tensor([cell for each in cells for cell in each])


def bilinear(maps: Tensor, points: Tensor) -> Tensor:
    """Values of (batch, channels, height, width) at (batch, points, 2), zero outside: (batch, points, channels)."""
    height, width = maps.shape[2:]
    column, row = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    total = torch.zeros(())
    for i in (0, 1):
        for j in (0, 1):
            y, x = row.detach().floor() + i, column.detach().floor() + j
            share = (1 - (row - y).abs()) * (1 - (column - x).abs())
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            cell = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).long()
            value = maps.flatten(2).gather(2, cell[:, None].expand(-1, maps.shape[1], -1)).transpose(1, 2)
            total = total + value * (share * inside)[..., None]
    return total


def deformable(own: Weights, queries: Tensor, places: Tensor, values: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
    """Multi-scale deformable attention with 2 points: their `ms_deform_attn_core_pytorch`, cell by cell."""
    levels, points = len(sizes), 2
    offsets = own.linear("offsets", queries).unflatten(-1, (HEADS, levels, points, 2))
    weights = own.linear("weights", queries).unflatten(-1, (HEADS, -1)).softmax(-1)
    weights = weights.unflatten(-1, (levels, points))
    parts = own.linear("to_value", values).split([h * w for h, w in sizes], dim=1)
    mixed = []
    for head in range(HEADS):
        total = torch.zeros(())
        for level, (part, (h, w)) in enumerate(zip(parts, sizes, strict=True)):
            maps = to_maps(part.chunk(HEADS, dim=-1)[head], (h, w))
            for point in range(points):
                where = places + offsets[:, :, head, level, point] / torch.tensor([w, h])
                total = total + weights[:, :, head, level, point, None] * bilinear(maps, where)
        mixed.append(total)
    return own.linear("from_value", torch.cat(mixed, dim=-1))


def vitadapter(v: Vit, w: Weights) -> Tensor:
    """Two interactions: around the first block, and before the two others."""

    def step(own: Weights, maps: Tensor, stride: int) -> Tensor:
        maps = F.conv2d(maps, own["0.weight"], stride=stride, padding=1)
        channels = maps.shape[1]
        groups = math.gcd(32, channels)
        groups = groups if groups < channels else max(1, channels // 4)
        return F.relu(F.group_norm(maps, groups, own["1.weight"], own["1.bias"]))

    prior, maps, tokens = w.of("0.vitadapter_interaction.prior."), v.pixels, []
    for index, stride in enumerate((2, 1, 1)):
        maps = step(prior.of(f"stem.{index}."), maps, stride)
    maps, sizes = F.max_pool2d(maps, 3, 2, 1), []
    for index in range(3):
        maps = step(prior.of(f"steps.{index}."), maps, 2)
        to = prior.of(f"to_width.{index}.")
        tokens.append(to_tokens(F.conv2d(maps, to["weight"], to["bias"])) + prior["levels"][index])
        sizes.append((maps.shape[2], maps.shape[3]))
    c = torch.cat(tokens, dim=1)

    def inject(own: Weights, x: Tensor) -> Tensor:
        query, values = own.norm("query_norm", x[:, 1:], 1e-6), own.norm("value_norm", c, 1e-6)
        found = deformable(own.of("deformable."), query, centres([GRID]), values, sizes)
        return torch.cat([x[:, :1], x[:, 1:] + own["gamma"] * found], dim=1)

    x = v.plain_block(0, inject(w.of("0.vitadapter_interaction.injector."), v.embed()))
    own = w.of("0.vitadapter_interaction.extractors.0.")
    query, values = own.norm("query_norm", c, 1e-6), own.norm("value_norm", x[:, 1:], 1e-6)
    c = c + deformable(own.of("deformable."), query, centres(sizes), values, [GRID])
    hidden = own.linear("ffn.fc1", own.norm("ffn_norm", c, 1e-6)).split([h * w for h, w in sizes], dim=1)
    ffn = own.of("ffn.convolution.")
    parts = [
        to_tokens(F.conv2d(to_maps(part, size), ffn["weight"], ffn["bias"], padding=1, groups=part.shape[-1]))
        for part, size in zip(hidden, sizes, strict=True)
    ]
    c = c + v.drop_path(own.linear("ffn.fc2", F.gelu(torch.cat(parts, dim=1))), 0.1)
    x = inject(w.of("1.vitadapter_interaction.injector."), x)
    return with_stream(v, v.plain_block(2, v.plain_block(1, x)))
