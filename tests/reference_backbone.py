"""A tiny vision transformer in plain torch with weights by a formula, on which reference vectors are computed.

Nothing here comes from the library, from transformers or from a generator of random numbers: the figures are the same
on every machine and with every version of torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


WIDTH, DEPTH, HEADS, HIDDEN, SIZE, PATCH, CLASSES, EPS = 16, 3, 2, 32, 32, 8, 3, 1e-12
GRID = (SIZE // PATCH, SIZE // PATCH)
TOKENS = 1 + GRID[0] * GRID[1]
ROLES = ("query", "key", "value", "output", "fc1", "fc2")
AROUND_ONE = ("norm.weight", "norm1.weight", "norm2.weight", "scale", "gamma", "gamma_x", "factors")


def numbers(name: str, shape: tuple[int, ...], size: float = 0.25) -> Tensor:
    """Numbers from -size to size, or around 1, that depend on the name: samples of a sine whose pitch rises."""
    count = torch.Size(shape).numel()
    salt = zlib.crc32(name.encode()) % 10_007 / 10_007
    index = torch.arange(1, count + 1, dtype=torch.float64)
    values = size * torch.sin(0.31 * index**2 + (1 + 2 * salt) * index + 6.28 * salt)
    return (values + name.endswith(AROUND_ONE)).float().view(shape)


def shapes_of_backbone() -> dict[str, tuple[int, ...]]:
    """Of all weights, by role."""
    found: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, WIDTH),
        "position": (1, TOKENS, WIDTH),
        "patch.weight": (WIDTH, 3, PATCH, PATCH),
        "patch.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        "head.weight": (CLASSES, WIDTH),
        "head.bias": (CLASSES,),
    }
    for index in range(DEPTH):
        for role in ("norm1", "norm2"):
            found |= {f"{index}.{role}.weight": (WIDTH,), f"{index}.{role}.bias": (WIDTH,)}
        for role in ROLES:
            rows, columns = HIDDEN if role == "fc1" else WIDTH, HIDDEN if role == "fc2" else WIDTH
            found |= {f"{index}.{role}.weight": (rows, columns), f"{index}.{role}.bias": (rows,)}
    return found


def images(count: int) -> Tensor:
    """(count, channels, height, width)."""
    return numbers("images", (count, 3, SIZE, SIZE), 1.0)


class Weights(dict[str, Tensor]):
    """Weights by name."""

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self[f"{name}.weight"], self.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"], eps)

    def of(self, prefix: str) -> Weights:
        """Those whose names start so, by the rest of their names."""
        return Weights({name[len(prefix) :]: value for name, value in self.items() if name.startswith(prefix)})


def backbone_weights() -> Weights:
    return Weights({name: numbers(name, shape) for name, shape in shapes_of_backbone().items()})


def dropped(x: Tensor, p: float) -> Tensor:
    """What stands for dropout, so that its place, its order and its rate show in figures."""
    return x + p * torch.sin(3 * x)


def dropped_path(x: Tensor, rate: float) -> Tensor:
    """What stands for stochastic depth."""
    return x + rate * torch.cos(2 * x)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, factors: Tensor | float = 1.0) -> Tensor:
    """(batch, tokens, channels) each, head by head, with factors on the logits."""
    parts = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value)]
    logits = factors * (parts[0] @ parts[1].mT) / parts[0].shape[-1] ** 0.5
    return (logits.softmax(-1) @ parts[2]).transpose(1, 2).flatten(2)


class Vit:
    """The transformer. A method puts functions of its own in the place of those that are attributes here.

    Args:
        training: whether dropout and stochastic depth are at work, as `dropped` and `dropped_path`.
        frames: images that make one video; 1 for images.
        early: whether frames become one before the last norm, or behind it.
    """

    def __init__(self, training: bool, frames: int = 1, early: bool = False) -> None:
        self.training, self.frames, self.early = training, frames, early
        self.w = backbone_weights()
        self.pixels = images(2 * frames)
        self.at_linear: Callable[[str, Tensor, Tensor], Tensor] = lambda name, x, y: y
        self.at_norm: Callable[[str, Tensor], Tensor] = lambda name, y: y
        self.block: Callable[[int, Tensor], Tensor] = self.plain_block
        self.tokens_at_end: Callable[[Tensor], Tensor] = lambda x: x

    def drop(self, x: Tensor, p: float) -> Tensor:
        return dropped(x, p) if self.training else x

    def drop_path(self, x: Tensor, rate: float) -> Tensor:
        return dropped_path(x, rate) if self.training else x

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.at_linear(name, x, self.w.linear(name, x))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return self.at_norm(name, self.w.norm(name, x, EPS))

    def attention(self, index: int, n: Tensor, factors: Tensor | float = 1.0) -> Tensor:
        """Of a block, on what its norm returns."""
        query, key, value = (self.linear(f"{index}.{role}", n) for role in ("query", "key", "value"))
        return self.linear(f"{index}.output", attend(query, key, value, HEADS, factors))

    def mlp(self, index: int, n: Tensor) -> Tensor:
        return self.linear(f"{index}.fc2", F.gelu(self.linear(f"{index}.fc1", n)))

    def attended(self, index: int, x: Tensor) -> Tensor:
        """What attention adds to the stream."""
        return self.attention(index, self.norm(f"{index}.norm1", x))

    def fed(self, index: int, z: Tensor) -> Tensor:
        """What the MLP adds to it."""
        return self.mlp(index, self.norm(f"{index}.norm2", z))

    def plain_block(self, index: int, x: Tensor) -> Tensor:
        z = x + self.attended(index, x)
        return z + self.fed(index, z)

    def embed(self) -> Tensor:
        maps = F.conv2d(self.pixels, self.w["patch.weight"], self.w["patch.bias"], stride=PATCH)
        patches = self.at_linear("patch", self.pixels, maps.flatten(2).transpose(1, 2))
        return torch.cat([self.w["cls"].expand(len(patches), -1, -1), patches], dim=1) + self.w["position"]

    def stream(self) -> Tensor:
        """The tokens before the last norm."""
        x = self.embed()
        for index in range(DEPTH):
            x = self.block(index, x)
        return self.tokens_at_end(x)

    def features(self) -> Tensor:
        """What the head reads, (batch, channels)."""
        x = self.stream()
        if self.early:
            x = x.unflatten(0, (-1, self.frames)).mean(1)
        x = self.norm("norm", x)
        return x[:, 0] if self.early else x[:, 0].unflatten(0, (-1, self.frames)).mean(1)

    def logits(self) -> Tensor:
        return self.w.linear("head", self.features())


def to_maps(x: Tensor, grid: tuple[int, int] = GRID) -> Tensor:
    return x.transpose(1, 2).unflatten(2, grid)


def to_tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)


def loss_of(logits: Tensor) -> Tensor:
    """Of which the gradients are taken."""
    return (logits * numbers("direction", tuple(logits.shape), 1.0)).sum() + 0.1 * logits.square().sum()


def checksum(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]) -> tuple[float, float]:
    """One number for the gradients to all weights, and the size that it could have had."""
    parts = [
        (gradient * numbers(f"gradient {name}", tuple(weights[name].shape), 1.0)).double()
        for name, gradient in sorted(gradients.items())
        if gradient is not None
    ]
    return sum(p.sum().item() for p in parts), sum(p.abs().sum().item() for p in parts)


def deterministic_training(patch: Callable[[object, str, object], None]) -> None:
    """Let torch's dropout be `dropped`, its draws of an integer 1, of a share 0.75, and of noise numbers 0, 1, 2, ...

    Args:
        patch: sets an attribute of an object until the test ends.
    """
    attention = F.scaled_dot_product_attention

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return dropped(x, p) if training and p else x

    def attention_with_dropout(query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> Tensor:
        p = kwargs.pop("dropout_p", 0.0)
        if not p:
            return attention(query, key, value, *args, **kwargs)
        return dropped((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1), p) @ value

    patch(F, "dropout", dropout)
    patch(F, "scaled_dot_product_attention", attention_with_dropout)
    patch(torch, "rand_like", lambda x, dtype=None: torch.full_like(x, 0.75, dtype=dtype))
    patch(torch, "randn_like", lambda x: torch.arange(x.numel(), dtype=x.dtype).view_as(x))
    patch(torch, "randint", lambda *args, device=None, **kwargs: torch.tensor(1, device=device))
