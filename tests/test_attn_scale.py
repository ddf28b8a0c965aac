"""AttnScale against its equation in plain torch, and the way to the logits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from equations import adapted, assert_equal, both, weights_of
from families import DEPTH, FAMILIES, WIDTH, images, output_of
from peft import get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_visual_peft import AttnScaleConfig
from hf_visual_peft.coverage.cell import tensors_of
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.sites import attention_of


def scaled_attention(block, x, factors):
    """The attention of a `PlainBlock` with factors (heads or 1, tokens, tokens) on its logits."""
    batch, tokens, width = x.shape
    q, k, v = ((x @ w.T + b).view(batch, tokens, block.heads, -1).transpose(1, 2) for w, b in block.qkv)
    logits = factors * (q @ k.transpose(-1, -2)) / (width // block.heads) ** 0.5
    mixed = (torch.softmax(logits, dim=-1) @ v).transpose(1, 2).reshape(batch, tokens, width)
    return block.scale1 * (mixed @ block.out[0].T + block.out[1])


@both
@pytest.mark.parametrize(("share_heads", "residual"), [(True, True), (False, True), (True, False)])
@torch.no_grad()
def test_equation(name, share_heads, residual):
    config = AttnScaleConfig(share_heads=share_heads, residual=residual, init_weights=False)
    (blocks, x, norm), model, actual, family = adapted(name, config)
    factors = weights_of(model, "attnscale_logits")
    offsets = {s: weights_of(model, f"attnscale_{s}") for s in ("attention", "mlp")}
    assert len(factors) == DEPTH
    assert {s for s, found in offsets.items() if found} == ({"attention", "mlp"} if residual else set())
    tokens = family.prefix + family.patches
    for index, block in enumerate(blocks):
        a = factors[index]["factors"]
        assert a.shape == (1 if share_heads else block.heads, tokens, tokens)
        x = x + scaled_attention(block, block.norm(1, x), a)
        x = x + (offsets["attention"][index]["offset"] if residual else 0)
        x = x + block.mlp(block.norm(2, x))
        x = x + (offsets["mlp"][index]["offset"] if residual else 0)
    assert_equal(actual, norm(x))


def test_initialisation_and_counts():
    model = get_peft_model(FAMILIES["vit"].model(), AttnScaleConfig())
    assert all((w["factors"] == 1).all() for w in weights_of(model, "attnscale_logits").values())
    assert not any(w["offset"].any() for w in weights_of(model, "attnscale_mlp").values())
    for fields, count in (
        ({"residual": False}, 12 * 197**2),
        ({"share_heads": False, "residual": False}, 12 * 12 * 197**2),
    ):
        with torch.device("meta"):
            vit = ViTForImageClassification(ViTConfig())
        model = get_peft_model(vit, AttnScaleConfig(**fields, modules_to_save=[]))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@torch.no_grad()
def test_position_biases_and_masks_still_count():
    """Factors of 1 leave BEiT's relative positions where they are; others scale the logits without them."""
    family = FAMILIES["beit"]
    base = family.model()
    before = output_of(base, family.inputs(2))
    model = get_peft_model(base, AttnScaleConfig(residual=False)).eval()
    torch.testing.assert_close(output_of(model, family.inputs(2)), before, rtol=0, atol=1e-5)
    for weights in weights_of(model, "attnscale_logits").values():
        weights["factors"].zero_()
    without_content = output_of(model, family.inputs(2))
    for name, parameter in base.named_parameters():
        if "relative_position_bias_table" in name:
            parameter.zero_()
    assert not torch.allclose(output_of(model, family.inputs(2)), without_content)


@pytest.mark.parametrize("name", ["data2vec-vision", "swinv2", "donut-swin"])
@torch.no_grad()
def test_factors_of_one_change_nothing_where_biases_and_masks_are_added(name):
    """Attention that is watched: the logits that factors see are those before position biases and masks."""
    base = MODELS[name].model()
    arguments = MODELS[name].arguments(2)
    before = tensors_of(MODELS[name].call(base, arguments))[0]
    model = get_peft_model(base, AttnScaleConfig(residual=False)).eval()
    torch.testing.assert_close(tensors_of(MODELS[name].call(model, arguments))[0], before, rtol=0, atol=1e-5)
    for parameter in [p for name, p in model.named_parameters() if name.endswith("factors")]:
        parameter.mul_(0.5)
    changed = tensors_of(MODELS[name].call(model, arguments))[0]
    model.unload()
    for module in base.modules():  # the scale of queries, or of cosines
        if hasattr(module, "logit_scale"):
            module.logit_scale.sub_(math.log(2))
        elif isinstance(getattr(module, "query", None), nn.Linear):
            for parameter in module.query.parameters():
                parameter.mul_(0.5)
    torch.testing.assert_close(changed, tensors_of(MODELS[name].call(base, arguments))[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_modules_own_attention_comes_back():
    base = FAMILIES["vit"].model()
    attention = attention_of(base.vit.layers[0], "attention.q_proj")
    config = attention.config
    model = get_peft_model(base, AttnScaleConfig(init_weights=False)).eval()
    assert attention.config is not config
    assert base.config._attn_implementation == config._attn_implementation == "sdpa"
    duplicate = copy.deepcopy(model)
    torch.testing.assert_close(output_of(duplicate, images(2)), output_of(model, images(2)), rtol=0, atol=0)
    model.unload()
    assert attention.config is config
    with pytest.raises(AssertionError):
        torch.testing.assert_close(output_of(duplicate, images(2)), output_of(base, images(2)))


def test_another_image_size():
    base = FAMILIES["dinov2_registers"].model()
    pixels = images(2, height=24, width=24)["pixel_values"]
    model = get_peft_model(base, AttnScaleConfig()).eval()
    with pytest.raises(ValueError, match="factors for 21 tokens, but the images have 14: set grid"):
        model(pixel_values=pixels)
    model = get_peft_model(FAMILIES["dinov2_registers"].model(), AttnScaleConfig(grid_size=3)).eval()
    assert model(pixel_values=pixels).logits.isfinite().all()
    assert weights_of(model, "attnscale_attention")[0]["offset"].shape == (WIDTH,)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("vit", {"grid_size": 0}, "AttnScaleConfig.grid_size is 0: must be an integer from 1 to 128"),
        ("vit", {"share_heads": 2}, "AttnScaleConfig.share_heads is 2"),
        ("siglip2", {}, "Siglip2VisionModel has no fixed number of tokens"),
        ("vit_mae", {}, "ViTMAEModel has no fixed number of tokens"),
    ],
)
def test_bad_input(family, fields, message):
    base = FAMILIES[family].model()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, AttnScaleConfig(**fields))
    assert names == [name for name, _ in base.named_modules()]
