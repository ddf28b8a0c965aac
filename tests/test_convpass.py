"""Convpass against its equation, and the grids of its convolutions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from equations import adapted, assert_equal, both, weights_of
from families import FAMILIES, WIDTH, images
from peft import get_peft_model
from plain import plain_parts

from hf_visual_peft import (
    ConvpassConfig,
)
from hf_visual_peft.sites import Grid


def quick_gelu(x):
    return x / (1 + torch.exp(-1.702 * x))


def convpass(x, w, prefix, height, width, scale):
    t = quick_gelu(x @ w["down.weight"].T + w["down.bias"])
    images_of_one = [
        F.conv2d(t[:, i, :, None, None], w["conv.weight"], w["conv.bias"], padding=1) for i in range(prefix)
    ]
    patches = t[:, prefix:].transpose(1, 2).reshape(len(x), -1, height, width)
    patches = F.conv2d(patches, w["conv.weight"], w["conv.bias"], padding=1).flatten(2).transpose(1, 2)
    t = torch.cat([*(image.flatten(1)[:, None] for image in images_of_one), patches], dim=1)
    return scale * (quick_gelu(t) @ w["up.weight"].T + w["up.bias"])


@both
@pytest.mark.parametrize("sublayers", [("attention", "mlp"), ("attention",), ("mlp",)], ids=str)
@torch.no_grad()
def test_convpass(name, sublayers):
    config = ConvpassConfig(r=4, scale=0.5, sublayers=sublayers, conv_init="xavier", init_weights=False)
    (blocks, x, norm), model, actual, family = adapted(name, config)
    beside = {s: weights_of(model, f"convpass_{s}") for s in ("attention", "mlp")}
    assert {s for s, w in beside.items() if w} == set(sublayers)
    for index, block in enumerate(blocks):
        n = block.norm(1, x)
        x = x + block.attention(n)
        if "attention" in sublayers:
            x = x + convpass(n, beside["attention"][index], family.prefix, 4, 4, 0.5)
        n = block.norm(2, x)
        x = x + block.mlp(n)
        if "mlp" in sublayers:
            x = x + convpass(n, beside["mlp"][index], family.prefix, 4, 4, 0.5)
    assert_equal(actual, norm(x))


@torch.no_grad()
def test_convpass_finds_the_grid_of_each_image():
    """24x40 pixels are 3x5 patches for a model made for 4x4."""
    base = FAMILIES["dinov2_registers"].model()
    pixels = images(2, height=24, width=40)["pixel_values"]
    blocks, x, norm = plain_parts("dinov2_registers", base, pixels)
    model = get_peft_model(base, ConvpassConfig(r=4, conv_init="xavier", init_weights=False)).eval()
    beside = {s: weights_of(model, f"convpass_{s}") for s in ("attention", "mlp")}
    for index, block in enumerate(blocks):
        n = block.norm(1, x)
        x = x + block.attention(n) + convpass(n, beside["attention"][index], 5, 3, 5, 1.0)
        n = block.norm(2, x)
        x = x + block.mlp(n) + convpass(n, beside["mlp"][index], 5, 3, 5, 1.0)
    actual = model.get_base_model().dinov2_with_registers(pixels).last_hidden_state
    assert_equal(actual, norm(x))
    square = model(**images(2))
    assert torch.equal(model(**images(2)).logits, square.logits)
    for name in ("vit", "clip"):
        family = FAMILIES[name]
        other = get_peft_model(family.model(), ConvpassConfig(r=4, init_weights=False)).eval()
        assert other(pixels, interpolate_pos_encoding=True).logits.isfinite().all()


def test_convpass_initialisation():
    torch.manual_seed(0)
    for conv_init in ("identity", "xavier"):
        model = get_peft_model(FAMILIES["vit"].model(), ConvpassConfig(r=6, conv_init=conv_init))
        for w in weights_of(model, "convpass_mlp").values():
            assert not any(w[zero].any() for zero in ("down.bias", "conv.bias", "up.weight", "up.bias"))
            bound = math.sqrt(6 / (WIDTH + 6))
            assert 0.8 * bound < w["down.weight"].abs().max() <= bound
            tap = torch.zeros(6, 6, 3, 3)
            tap[range(6), range(6), 1, 1] = 1.0
            assert torch.equal(w["conv.weight"], tap) == (conv_init == "identity")
    assert w["conv.weight"].abs().max() <= math.sqrt(6 / (6 * 9 * 2))


@torch.no_grad()
def test_convpass_drop_path_is_its_own():
    """The branch is dropped for whole images, at the block's rate, whether or not the sub-layer is."""
    family = FAMILIES["beit"]
    config = family.model().config
    config.drop_path_rate = 0.5
    torch.manual_seed(0)
    from transformers import BeitForImageClassification

    base = BeitForImageClassification(config)
    for name, parameter in base.named_parameters():
        if "lambda" in name:
            parameter.zero_()  # the blocks' own branches are silent
    settings = ConvpassConfig(r=4, sublayers="attention", dropout=0.0, init_weights=False, layers_to_transform=2)
    model = get_peft_model(base, settings).eval()
    layer = model.get_base_model().beit.layers[2]
    assert layer.adapters.drop_path_rate == pytest.approx(0.5)
    kept = []
    pixels = images(1)["pixel_values"].expand(400, -1, -1, -1)
    plain = model.get_base_model().beit.embeddings(pixels[:1])
    model.get_base_model().beit(pixels[:1])  # sets the grid
    delta = layer(plain, resolution=(32, 32)) - plain
    layer.train()
    out = layer(plain.expand(400, -1, -1), resolution=(32, 32)) - plain
    for sample in out:
        zero, doubled = torch.allclose(sample, torch.zeros(())), torch.allclose(sample, 2 * delta[0], atol=1e-5)
        assert zero != doubled
        kept.append(doubled)
    assert 0.4 < sum(kept) / 400 < 0.6


@torch.no_grad()
def test_grid_of_images_in_one_batch_differs():
    """Padded (SigLIP 2) and shuffled (ViT-MAE) tokens: a convolution over cells equals one over each image."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(2, 2, 3, padding=1)
    tokens = torch.randn(2, 7, 2)
    cells = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 3, 4, 9, 9, 9]])  # 3x3 without two; 2x2 in 3x3, padded
    grid = Grid(3, 3, cells)
    out = grid.to_tokens(conv(grid.to_map(tokens)))
    canvas = torch.zeros(1, 2, 9)
    canvas[0, :, :7] = tokens[0].T
    assert torch.allclose(out[0], conv(canvas.view(1, 2, 3, 3)).flatten(2)[0, :, :7].T, atol=1e-6)
    small = conv(tokens[1, :4].T.reshape(1, 2, 2, 2)).flatten(2)[0].T
    assert torch.allclose(out[1, :4], small, atol=1e-6)
    assert not out[1, 4:].any()
    with pytest.raises(ValueError, match="7 patch tokens do not fill a grid of 2 x 3"):
        Grid(2, 3).to_map(tokens)


@torch.no_grad()
def test_convpass_sees_only_an_images_own_patches():
    """SigLIP 2: the features of an image do not depend on what it is batched with."""
    family = FAMILIES["siglip2"]
    model = get_peft_model(family.model(), ConvpassConfig(r=4, conv_init="xavier", init_weights=False)).eval()
    inputs = family.inputs(2)
    together = model(**inputs).logits
    for index in range(2):
        alone = model(**{name: value[index : index + 1] for name, value in inputs.items()}).logits
        assert_equal(together[index : index + 1], alone)


@torch.no_grad()
def test_convpass_on_masked_images_follows_the_shuffle():
    """ViT-MAE with nothing masked: the order in which patches were drawn makes no difference to CLS."""
    family = FAMILIES["vit_mae"]
    base = family.model()
    base.config.mask_ratio = 0.0
    model = get_peft_model(base, ConvpassConfig(r=4, conv_init="xavier", init_weights=False)).eval()
    pixels = images(2)["pixel_values"]
    outs = [model(pixels, noise=torch.rand(2, 16)).last_hidden_state[:, 0] for _ in range(2)]
    assert_equal(outs[0], outs[1])
