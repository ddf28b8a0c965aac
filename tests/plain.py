"""A pre-norm vision transformer in plain torch, for evaluating a method's equation without the library."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class PlainBlock:
    """The weights of one block. `scale1` and `scale2` are its layer scales, 1 where it has none."""

    norm1: tuple[Tensor, Tensor]
    qkv: list[tuple[Tensor, Tensor]]
    out: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, Tensor]
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]
    scale1: Tensor | float
    scale2: Tensor | float
    heads: int
    eps: float

    def norm(self, which: int, x: Tensor) -> Tensor:
        weight, bias = self.norm1 if which == 1 else self.norm2
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(var + self.eps) * weight + bias

    def attention(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = ((x @ w.T + b).view(batch, tokens, self.heads, -1).transpose(1, 2) for w, b in self.qkv)
        weights = torch.softmax(q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5, dim=-1)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, tokens, width)
        return self.scale1 * (mixed @ self.out[0].T + self.out[1])

    def mlp(self, x: Tensor) -> Tensor:
        hidden = F.gelu(x @ self.fc1[0].T + self.fc1[1])
        return self.scale2 * (hidden @ self.fc2[0].T + self.fc2[1])


def _pair(module: nn.Module) -> tuple[Tensor, Tensor]:
    return module.weight, module.bias


def vit_blocks(model: nn.Module) -> list[PlainBlock]:
    """Of an unadapted `ViTForImageClassification`."""
    return [
        PlainBlock(
            _pair(b.layernorm_before),
            [_pair(p) for p in (b.attention.q_proj, b.attention.k_proj, b.attention.v_proj)],
            _pair(b.attention.o_proj),
            _pair(b.layernorm_after),
            _pair(b.mlp.fc1),
            _pair(b.mlp.fc2),
            1.0,
            1.0,
            model.config.num_attention_heads,
            model.config.layer_norm_eps,
        )
        for b in model.vit.layers
    ]


def dinov2_blocks(model: nn.Module) -> list[PlainBlock]:
    """Of an unadapted `Dinov2WithRegistersForImageClassification`."""
    return [
        PlainBlock(
            _pair(b.norm1),
            [_pair(p) for p in (b.attention.q_proj, b.attention.k_proj, b.attention.v_proj)],
            _pair(b.attention.o_proj),
            _pair(b.norm2),
            _pair(b.mlp.fc1),
            _pair(b.mlp.fc2),
            b.layer_scale1.lambda1,
            b.layer_scale2.lambda1,
            model.config.num_attention_heads,
            model.config.layer_norm_eps,
        )
        for b in model.dinov2_with_registers.encoder.layer
    ]


PLAIN = {
    "vit": (vit_blocks, lambda m: m.vit.embeddings, lambda m: m.vit.layernorm),
    "dinov2_registers": (
        dinov2_blocks,
        lambda m: m.dinov2_with_registers.embeddings,
        lambda m: m.dinov2_with_registers.layernorm,
    ),
}


def plain_parts(name: str, model: nn.Module, pixels: Tensor) -> tuple[list[PlainBlock], Tensor, nn.Module]:
    """Blocks, the tokens before them, and the final norm."""
    blocks, embeddings, norm = PLAIN[name]
    return blocks(model), embeddings(model)(pixels), norm(model)
