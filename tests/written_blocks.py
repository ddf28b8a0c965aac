"""Blocks of hierarchical, windowed, map-shaped, post-norm and video backbones, written out of their own modules.

For evaluating an adapter's equation without the library: names of modules, the order of sub-layers and where tokens
lie in the image are written here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn
from transformers.models.hiera.modeling_hiera import unroll

from hf_visual_peft.coverage.models import MODELS


@dataclass(frozen=True)
class Layout:
    """Where tokens lie: prefix tokens, then grids of (height, width), all cells of one after those of the other.

    `order` holds the cell of each token where they do not come row by row; with `interleaved` grids take turns.
    """

    height: int
    width: int
    prefix: int = 0
    times: int = 1
    interleaved: bool = False
    order: Tensor | None = None

    def convolved(self, x: Tensor, convolve: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of maps at work on the tokens' grids, and on each prefix token as on an image of 1 x 1."""
        singles = [convolve(x[:, i, :, None, None]).flatten(1)[:, None] for i in range(self.prefix)]
        patches = x[:, self.prefix :]
        area = self.height * self.width
        # the cell, counted through all grids, in which each token lies
        if self.order is not None:
            cells = self.order
        elif self.interleaved:
            cells = torch.tensor([t * area + p for p in range(area) for t in range(self.times)])
        else:
            cells = torch.arange(self.times * area)
        assert len(cells) == patches.shape[1]
        canvas = torch.full_like(patches, torch.nan)
        canvas[:, cells] = patches
        maps = canvas.view(len(x) * self.times, self.height, self.width, -1).permute(0, 3, 1, 2)
        back = convolve(maps).permute(0, 2, 3, 1).reshape(len(x), self.times * area, -1)
        return torch.cat([*singles, back[:, cells]], dim=1)


# blocks: `step(sublayer, x, norm, run, layout)` is x + run(norm(x)) with the equation at its place


def same(x):
    return x


def tokens(maps):
    return maps.flatten(2).transpose(1, 2)


def maps(x, size):
    return x.transpose(1, 2).unflatten(2, size)


def in_windows(attend, x, size, window, shift=0):
    """Attention inside windows of a map that is padded at the end and turned by `shift`."""
    x = x.unflatten(1, size)
    rows, columns = (-(-side // window) * window for side in size)
    x = F.pad(x, (0, 0, 0, columns - size[1], 0, rows - size[0]))
    # what a turn brings from one end to the other may not see what it comes to lie beside
    wrapped = 2 * (torch.arange(rows)[:, None] < shift) + (torch.arange(columns) < shift)

    def cut(y):
        y = y.roll((-shift, -shift), (1, 2)).unflatten(1, (-1, window)).unflatten(3, (-1, window))
        return y.transpose(2, 3).flatten(0, 2)

    regions = cut(wrapped[None, :, :, None].float()).flatten(1)
    mask = -100.0 * (regions[:, None] != regions[:, :, None]) if shift else None
    out = attend(cut(x), mask).unflatten(0, (len(x), rows // window, columns // window)).transpose(2, 3)
    out = out.flatten(3, 4).flatten(1, 2).roll((shift, shift), (1, 2))
    return out[:, : size[0], : size[1]].flatten(1, 2)


def windows_of_tokens(attention, window=2):
    """Swin's attention wants the tokens of a window in a row."""
    return lambda x, mask: attention(x.flatten(1, 2), mask)[0].unflatten(1, (window, window))


def swin(block, path, step, x, size, **_):
    def attention(n):
        return in_windows(windows_of_tokens(block.attention), n, size, 2, shift=int(path[-1]) % 2)

    x = step("attention", x, block.layernorm_before, attention, Layout(*size))
    return step("mlp", x, block.layernorm_after, block.mlp, Layout(*size)), None


def swinv2(block, path, step, x, size, *_):
    def attention(n):
        n = in_windows(windows_of_tokens(block.attention), n, size, 2, shift=int(path[-1]) % 2)
        return block.layernorm_before(n)

    x = step("attention", x, same, attention, Layout(*size))
    x = step("mlp", x, same, lambda n: block.layernorm_after(block.output(block.intermediate(n))), Layout(*size))
    return (x,)


def hiera(block, path, step, x, **_):
    def layout(x):
        stage = {96: 0, 24: 1, 6: 2}[x.shape[1]]
        size = (8 >> stage, 12 >> stage)
        cells = torch.arange(x.shape[1]).view(1, -1, 1)
        return Layout(*size, order=unroll(cells, size, (1, 1), [[2, 2]] * (2 - stage)).flatten())

    if re.search(r"stages\.[12]\.layers\.0$", path):  # the first of these stages pools by 2 x 2
        n = block.layernorm_before(x)
        x = block.proj(n).unflatten(1, (4, -1)).amax(1) + block.attn(n)[0]
    else:
        x = step("attention", x, block.layernorm_before, lambda n: block.attn(n)[0], layout(x))
    return step("mlp", x, block.layernorm_after, block.mlp, layout(x)), None


def pvt(block, path, step, x, height, width, *_):
    layout = Layout(height, width, prefix=int(".block.3." in path))
    x = step("attention", x, block.layer_norm_1, lambda n: block.attention(n, height, width)[0], layout)
    return (step("mlp", x, block.layer_norm_2, block.mlp, layout),)


def cvt(block, path, step, x, height, width):
    layout = Layout(height, width, prefix=int(".stages.2." in path))
    x = step("attention", x, block.layernorm_before, lambda n: block.attention(n, height, width), layout)
    return step("mlp", x, block.layernorm_after, lambda n: block.output.dense(block.intermediate(n)), layout)


def poolformer(block, path, step, x):
    size = x.shape[2:]

    def on_maps(function):
        return lambda t: tokens(function(maps(t, size)))

    def pooling(n):
        return block.layer_scale_1 * on_maps(block.pooling)(n)

    def mlp(n):
        return block.layer_scale_2 * on_maps(block.output)(n)

    x = step("attention", tokens(x), on_maps(block.before_norm), pooling, Layout(*size))
    return (maps(step("mlp", x, on_maps(block.after_norm), mlp, Layout(*size)), size),)


def windows_or_all(attention, x, size, window):
    """Attention of maps, channels last."""
    if window:
        return in_windows(lambda y, _: attention(y)[0], x, size, window)
    return attention(x.unflatten(1, size))[0].flatten(1, 2)


def sam(block, path, step, x):
    size = x.shape[1:3]
    window = 0 if path.endswith(".2") else 3

    def attention(n):
        return windows_or_all(block.attn, n, size, window)

    x = step("attention", x.flatten(1, 2), block.layer_norm1, attention, Layout(*size))
    return step("mlp", x, block.layer_norm2, block.mlp, Layout(*size)).unflatten(1, size)


def vitdet(block, path, step, x, *_):
    size = x.shape[2:]
    window = 0 if path.endswith(".2") else 3

    def attention(n):
        return windows_or_all(block.attention, n, size, window)

    x = step("attention", tokens(x), block.norm1, attention, Layout(*size))
    x = maps(step("mlp", x, block.norm2, block.mlp, Layout(*size)), size)
    return (block.residual(x) if path.endswith(".1") else x,)


def modulation(block, size):
    return lambda n: block.modulation(n.unflatten(1, size)).flatten(1, 2)


def focalnet(block, path, step, x, size):
    x = step("attention", x, block.norm1, modulation(block, size), Layout(*size))
    return step("mlp", x, block.norm2, block.mlp, Layout(*size))


def focalnet_post_norm(block, path, step, x, size):
    x = step("attention", x, same, lambda n: block.norm1(modulation(block, size)(n)), Layout(*size))
    return step("mlp", x, same, lambda n: block.norm2(block.mlp(n)), Layout(*size))


def levit(block, path, step, x):
    """Attention and MLP are blocks of their own, which take turns."""
    side = {16: 4, 4: 2, 1: 1}[x.shape[1]]
    sublayer = "mlp" if hasattr(block.module, "linear_up") else "attention"
    return step(sublayer, x, same, block.module, Layout(side, side))


def swiftformer(block, path, step, x):
    x = block.local_representation(x)
    size = x.shape[2:]

    def attention(n):
        return block.layer_scale_1.flatten() * block.attn(n)

    def mlp(n):
        return block.layer_scale_2.flatten() * tokens(block.linear(maps(n, size)))

    x = step("attention", tokens(x), same, attention, Layout(*size))
    return maps(step("mlp", x, same, mlp, Layout(*size)), size)


def timesformer(block, path, step, x, *_):
    """4 frames of 6 x 4 patches; the frames of a patch stand side by side. Time and space are one sub-layer."""

    def attention(_):
        cls, patches = x[:, :1], x[:, 1:].unflatten(1, (24, 4))
        times = block.temporal_layernorm(patches.flatten(0, 1))
        new = patches + block.temporal_dense(block.temporal_attention(times)[0]).view_as(patches)
        frames = torch.cat([cls.repeat_interleave(4, 0), new.transpose(1, 2).flatten(0, 1)], dim=1)
        spaces = block.attention(block.layernorm_before(frames))[0].unflatten(0, (-1, 4))
        new = new + spaces[:, :, 1:].transpose(1, 2)
        return torch.cat([spaces[:, :, 0].mean(1, keepdim=True), (new - patches).flatten(1, 2)], dim=1)

    layout = Layout(6, 4, prefix=1, times=4, interleaved=True)
    x = step("attention", x, block.layernorm_before, attention, layout)
    return (step("mlp", x, block.layernorm_after, lambda n: block.output(block.intermediate(n)), layout),)


def videomae(block, path, step, x, **_):
    layout = Layout(4, 4, times=2)
    x = step("attention", x, block.layernorm_before, block.attention, layout)
    return step("mlp", x, block.layernorm_after, lambda n: block.output.dense(block.intermediate(n)), layout)


def mobilevit(block, path, step, x):
    """Each cell of a patch has a sequence of its own: four times as many as there are images."""
    assert len(x) == 8
    layout = Layout(*{24: (6, 4), 6: (3, 2), 2: (2, 1)}[x.shape[1]])
    x = step("attention", x, block.layernorm_before, block.attention, layout)
    return step("mlp", x, block.layernorm_after, lambda n: block.output.dense(block.intermediate(n)), layout)


def dinov3(block, path, step, x, position_embeddings, **_):
    """Its patches have rotary positions, its five prefix tokens none."""
    rows = (x.shape[1] - 5) // 4
    layout = Layout(rows, 4, prefix=5)

    def attention(n):
        return block.layer_scale1(block.attention(n, position_embeddings=position_embeddings)[0])

    x = step("attention", x, block.norm1, attention, layout)
    return step("mlp", x, block.norm2, lambda n: block.layer_scale2(block.mlp(n)), layout)


def timm_vit(block, path, step, x, **_):
    layout = Layout(4, 4, prefix=5)
    x = step("attention", x, block.norm1, lambda n: block.ls1(block.attn(n)), layout)
    return step("mlp", x, block.norm2, lambda n: block.ls2(block.mlp(n)), layout)


def timm_swin(block, path, step, x):
    size = x.shape[1:3]

    def attention(n):
        return in_windows(
            lambda t, mask: block.attn(t.flatten(1, 2), mask=mask).unflatten(1, (2, 2)),
            n,
            size,
            2,
            shift=int(path[-1]) % 2,
        )

    x = step("attention", x.flatten(1, 2), block.norm1, attention, Layout(*size))
    return step("mlp", x, block.norm2, block.mlp, Layout(*size)).unflatten(1, size)


HIERA = {
    "embed_dim": 8,
    "depths": [1, 2, 1],
    "num_heads": [1, 2, 4],
    "image_size": [32, 48],
    "masked_unit_size": [4, 4],
    "masked_unit_attention": [True, True, False],
    "num_query_pool": 2,
}
PLAIN = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "window_size": 3,
}
SAM = PLAIN | {"global_attn_indexes": [2], "output_channels": 16, "mlp_dim": 32}
VITDET = PLAIN | {
    "pretrain_image_size": 32,
    "window_block_indices": [0, 1],
    "residual_block_indices": [1],
    "use_relative_position_embeddings": True,
    "drop_path_rate": 0.0,
}
FOCALNET = {
    "image_size": 32,
    "embed_dim": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 2],
    "focal_levels": [2, 2],
    "focal_windows": [3, 3],
    "drop_path_rate": 0.0,
    "use_post_layernorm": True,
}
# the tiny models of the coverage matrix, but for those that have no such norms, images, or windows that need padding
MODELS_OF = dict(MODELS) | {
    "hiera": replace(
        MODELS["hiera"],
        build=lambda: tf.HieraForImageClassification(tf.HieraConfig(**HIERA)),
        size=(32, 48),
        interpolates=False,
    ),
    "sam": replace(MODELS["sam"], build=lambda: tf.SamVisionModel(tf.SamVisionConfig(**SAM))),
    "vitdet": replace(MODELS["vitdet"], build=lambda: tf.VitDetModel(tf.VitDetConfig(**VITDET))),
    "focalnet_post_norm": replace(
        MODELS["focalnet"], build=lambda: tf.FocalNetForImageClassification(tf.FocalNetConfig(**FOCALNET))
    ),
}

# blocks by a pattern of their names, and the size of the images
BACKBONES: dict[str, tuple[Callable, str, tuple[int, int]]] = {
    "swin": (swin, r"swin\.encoder\.layers\.\d\.blocks\.\d", (40, 32)),
    "swinv2": (swinv2, r"swinv2\.encoder\.layers\.\d\.blocks\.\d", (40, 32)),
    "hiera": (hiera, r"hiera\.encoder\.stages\.\d\.layers\.\d", (32, 48)),
    "pvt": (pvt, r"pvt\.encoder\.block\.\d\.\d", (32, 32)),
    "cvt": (cvt, r"cvt\.encoder\.stages\.\d\.layers\.\d", (96, 64)),
    "poolformer": (poolformer, r"poolformer\.encoder\.block\.\d\.\d", (96, 64)),
    "sam": (sam, r"vision_encoder\.layers\.\d", (32, 32)),
    "vitdet": (vitdet, r"encoder\.layer\.\d", (48, 32)),
    "focalnet": (focalnet, r"focalnet\.encoder\.stages\.\d\.layers\.\d", (48, 32)),
    "focalnet_post_norm": (focalnet_post_norm, r"focalnet\.encoder\.stages\.\d\.layers\.\d", (48, 32)),
    "levit": (levit, r"levit\.encoder\.stages\.\d\.layers\.\d", (64, 64)),
    "swiftformer": (swiftformer, r"swiftformer\.encoder\.network\.\d\.blocks\.\d", (96, 64)),
    "timesformer": (timesformer, r"timesformer\.encoder\.layer\.\d", (48, 32)),
    "videomae": (videomae, r"videomae\.encoder\.layer\.\d", (32, 32)),
    "mobilevit": (mobilevit, r"mobilevit\.encoder\.layer\.\d\.transformer\.layer\.\d", (96, 64)),
    "dinov3_vit": (dinov3, r"backbone\.model\.layer\.\d", (48, 32)),
    "timm_vit_registers": (timm_vit, r"blocks\.\d", (32, 32)),
    "timm_swin": (timm_swin, r"layers\.\d\.blocks\.\d", (48, 32)),
}
# modules under such names that are not blocks with attention or MLP
NO_BLOCKS = ("LevitAttentionSubsample", "SwiftFormerConvEncoder", "PatchMerging")


def rewritten(base: nn.Module, name: str, weights: dict[str, dict[str, dict[str, Tensor]]], equation: Any) -> list:
    """Let the blocks run as they are written here, with the weights of an adapter; the places that come by."""
    seen = []

    def step(path, sublayer, x, norm, run, layout):
        normed = norm(x)
        added = run(normed)
        if sublayer not in weights:
            return x + added
        seen.append((path, sublayer))
        return x + added + equation(weights[sublayer][path], x, normed, added, layout)

    run_written(base, name, step)
    return seen


def run_written(base: nn.Module, name: str, step: Callable) -> None:
    """Let the blocks run as they are written here, each sub-layer by `step(path, sublayer, x, norm, run, layout)`."""
    forward, pattern, _ = BACKBONES[name]
    paths = [path for path, _ in base.named_modules() if re.fullmatch(pattern, path)]
    for path in paths:
        block = base.get_submodule(path)
        if type(block).__name__ not in NO_BLOCKS:
            block.forward = partial(forward, block, path, partial(step, path))
