"""EVP: prompts of patches and high frequencies, against plain torch. (On ViT: reference vectors.)"""

from __future__ import annotations

import cmath

import pytest
import torch
import torch.nn.functional as F
from equations import adapted, assert_equal, weights_by_path
from families import FAMILIES, images
from peft import get_peft_model

from hf_visual_peft import EVPConfig, find_backbone
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.methods.prompt.evp import high_frequencies


def config(**fields):
    return EVPConfig(**{"r": 3, "init_weights": False} | fields)


@pytest.mark.parametrize(("height", "width", "share"), [(6, 6, 0.25), (5, 8, 0.25), (7, 5, 0.5), (4, 6, 0.0)])
def test_high_frequencies_by_sums(height, width, share):
    """The discrete Fourier transform written out, without those whose row and column lie in the square."""
    torch.manual_seed(0)
    x = torch.randn(height, width)
    half = int((height * width * share) ** 0.5 // 2)
    expected = torch.zeros(height, width)
    spectrum = {}
    for u in range(height):
        for v in range(width):
            row, column = ((k + size // 2) % size - size // 2 for k, size in ((u, height), (v, width)))
            if -half <= row < half and -half <= column < half:
                continue
            spectrum[u, v] = sum(
                x[i, j].item() * cmath.exp(-2j * cmath.pi * (u * i / height + v * j / width))
                for i in range(height)
                for j in range(width)
            ) / (height * width)
    for i in range(height):
        for j in range(width):
            waves = (c * cmath.exp(2j * cmath.pi * (u * i / height + v * j / width)) for (u, v), c in spectrum.items())
            expected[i, j] = abs(sum(waves, 0j).real)
    torch.testing.assert_close(high_frequencies(x[None, None], share)[0, 0], expected, rtol=1e-4, atol=1e-5)


def prompts(w, up, features):
    return F.gelu(features @ w["mix.weight"].T + w["mix.bias"]) @ up["weight"].T + up["bias"]


@torch.no_grad()
def test_equation_on_dinov2():
    """Patches after the registers get prompts, CLS and registers none."""
    (blocks, x, norm), model, actual, family = adapted("dinov2_registers", config())
    pixels = family.inputs(2)["pixel_values"]
    found = list(weights_by_path(model, "evp_prompts").values())
    (up,) = weights_by_path(model, "evp_up").values()
    patches = family.model().get_submodule(find_backbone(family.model()).patch_embedding[0])(pixels)
    first = found[0]
    e = patches.flatten(2).mT @ first["features.embedding.weight"].T + first["features.embedding.bias"]
    kernel, bias = first["features.frequencies.weight"], first["features.frequencies.bias"]
    f = F.conv2d(high_frequencies(pixels, 0.25), kernel, bias, stride=kernel.shape[-1]).flatten(2).mT
    for block, w in zip(blocks, found, strict=True):
        x = torch.cat([x[:, : family.prefix], x[:, family.prefix :] + prompts(w, up, e + f)], dim=1)
        x = x + block.attention(block.norm(1, x))
        x = x + block.mlp(block.norm(2, x))
    assert_equal(actual, norm(x))


@pytest.mark.parametrize("name", ["sam", "vit_mae"])
@torch.no_grad()
def test_maps_and_masked_patches(name):
    """What enters each block is what left the one before, and the prompts of the cells that there are."""
    entry = MODELS[name]
    torch.manual_seed(0)
    model = get_peft_model(entry.model(), config()).eval()
    inner, entered, came = model.get_base_model(), {}, {}
    backbone = find_backbone(entry.model())
    (up,) = weights_by_path(model, "evp_up").values()
    found = weights_by_path(model, "adapters.evp_prompts")
    norms = [block.roles["norm1"][0] for block in backbone.blocks]
    for path, norm in zip((block.path for block in backbone.blocks), norms, strict=True):
        layer = inner.get_submodule(path)
        adapters = layer.adapters
        inner.get_submodule(norm).register_forward_pre_hook(lambda m, a, p=path: entered.update({p: a[0]}))
        around = adapters._enter
        adapters._enter = lambda current, x, around=around, p=path: (
            came.update({p: (x, current.grid, current.pixels, current.patches)}) or around(current, x)
        )
    entry.call(model, entry.arguments(2))
    first = found[backbone.blocks[0].path]
    for path, (x, grid, pixels, patches) in came.items():
        kernel = first["features.frequencies.weight"]
        f = F.conv2d(
            high_frequencies(pixels, 0.25), kernel, first["features.frequencies.bias"], stride=kernel.shape[-1]
        )
        e = patches.flatten(2).mT @ first["features.embedding.weight"].T + first["features.embedding.bias"]
        added = prompts(found[path], up, e + f.flatten(2).mT)
        if x.ndim == 4:
            expected = x + added.view(x.shape)
        else:
            if grid.cells is not None:
                added = added.gather(1, grid.cells.unsqueeze(-1).expand(-1, -1, added.shape[-1]))
            expected = torch.cat([x[:, :1], x[:, 1:] + added], dim=1)
        torch.testing.assert_close(entered[path], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert len(came) > 1


@torch.no_grad()
def test_other_sizes_of_images():
    model = get_peft_model(FAMILIES["vit"].model(), config()).eval()
    assert model(**images(2, 48, 24), interpolate_pos_encoding=True).logits.isfinite().all()
    state = model.base_model.model.vit.layers[0].adapters.exchange
    assert state.patches is not None
    model.unload()
    assert state.patches is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "EVPConfig.r is 0"),
        ({"r": 17}, r"EVPConfig.r is 17: must be an integer from 1 to 16 \(the backbone's width\)"),
        ({"share": 1.5}, "EVPConfig.share is 1.5: must be a share from 0 to 1"),
        ({"share": float("nan")}, "EVPConfig.share is nan"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(FAMILIES["vit"].model(), EVPConfig(**fields))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin", "stages of several widths"),
        ("siglip2", "not images"),
        ("videomae", "frames"),
        ("mobilevitv2", "overlap"),
    ],
)
def test_refused_before_the_model_is_touched(name, message):
    model = MODELS[name].model()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config())
    assert before == list(model.state_dict())
