"""VPT against its equation, and its prompts among a backbone's masks and biases."""

from __future__ import annotations

import math

import pytest
import torch
from equations import adapted, assert_equal, both, weights_of
from families import DEPTH, FAMILIES, PATCH, WIDTH, output_of
from peft import get_peft_model

from hf_visual_peft import (
    VPTConfig,
)


@both
@pytest.mark.parametrize("projection_dim", [None, 5])
@torch.no_grad()
def test_vpt_deep(name, projection_dim):
    config = VPTConfig(num_virtual_tokens=3, init_weights=False, projection_dim=projection_dim)
    (blocks, x, norm), model, actual, family = adapted(name, config)
    prompts = weights_of(model, "vpt_tokens")
    assert len(prompts) == DEPTH
    shared = weights_of(model, "vpt_shared")
    assert len(shared) == (projection_dim is not None)  # one projection for all blocks
    for index, block in enumerate(blocks):
        p = prompts[index]["prompts"]
        if projection_dim:
            assert p.shape == (3, projection_dim)
            p = p @ shared[0]["weight"].T + shared[0]["bias"]
        p = p.expand(2, -1, -1)
        x = torch.cat([x[:, : family.prefix], p, x[:, family.prefix :]], dim=1)
        x = x + block.attention(block.norm(1, x))
        x = x + block.mlp(block.norm(2, x))
        x = torch.cat([x[:, : family.prefix], x[:, family.prefix + 3 :]], dim=1)
    assert_equal(actual, norm(x))


@both
@pytest.mark.parametrize("layers", [None, [1, 2], [0, 1]])
@torch.no_grad()
def test_vpt_shallow(name, layers):
    config = VPTConfig(num_virtual_tokens=3, deep=False, init_weights=False, layers_to_transform=layers)
    (blocks, x, norm), model, actual, family = adapted(name, config)
    layers = layers or list(range(DEPTH))
    ((first, weights),) = weights_of(model, "vpt_tokens").items()
    assert first == layers[0]
    for index, block in enumerate(blocks):
        if index == layers[0]:
            x = torch.cat([x[:, : family.prefix], weights["prompts"].expand(2, -1, -1), x[:, family.prefix :]], dim=1)
        x = x + block.attention(block.norm(1, x))
        x = x + block.mlp(block.norm(2, x))
        if index == layers[-1]:
            x = torch.cat([x[:, : family.prefix], x[:, family.prefix + 3 :]], dim=1)
    assert_equal(actual, norm(x))


def test_vpt_initialisation_and_dropout():
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), VPTConfig(num_virtual_tokens=100, dropout=0.5))
    prompts = weights_of(model, "vpt_tokens")[0]["prompts"]
    bound = math.sqrt(6 / (3 * PATCH * PATCH + WIDTH))
    assert prompts.abs().max() <= bound
    assert prompts.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    equation = model.get_base_model().vit.layers[0].adapters.vpt_tokens["default"]
    tokens = equation.train()(2)
    kept = tokens != 0
    assert 0.4 < kept.float().mean() < 0.6
    assert not torch.equal(kept[0], kept[1])  # every image has its own mask
    assert torch.allclose(tokens[kept], (2 * prompts.expand(2, -1, -1))[kept])
    projected = get_peft_model(FAMILIES["vit"].model(), VPTConfig(projection_dim=8))
    weight = weights_of(projected, "vpt_shared")[0]["weight"]
    assert weight.shape == (WIDTH, 8)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / WIDTH), rel=0.3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["beit", "beit_shared_bias", "data2vec", "data2vec_shared_bias"])
def test_prompts_leave_position_biases_right(name):
    """A bias on attention logits belongs to pairs of the backbone's tokens; prompts have none.

    With zero queries and keys, attention is the softmax of the bias alone: each token's share of a prompt is the same
    as with a bias of zero for it.
    """
    family = FAMILIES[name]
    base = family.model()
    size = 1 + family.patches
    seen = []

    def watch(module, args, kwargs, output):
        seen.append(output)

    for key, module in base.named_modules():
        if key.endswith(("relative_position_bias", "shared_position_bias")):
            module.register_forward_hook(watch, with_kwargs=True)
    output_of(base, family.inputs(1))
    own = [bias.clone() for bias in seen]
    seen.clear()
    model = get_peft_model(base, VPTConfig(num_virtual_tokens=3, init_weights=False)).eval()
    model(**family.inputs(1), interpolate_pos_encoding=False)
    assert len(seen) == len(own)
    for bias, expected in zip(seen, own, strict=True):
        keep = [i for i in range(bias.shape[-1]) if bias.shape[-1] == size or not 1 <= i < 4]
        assert bias.shape[-1] in (size, size + 3)
        assert torch.equal(bias[..., keep, :][..., keep], expected)
        if bias.shape[-1] > size:
            assert not bias[..., 1:4, :].any()
            assert not bias[..., :, 1:4].any()


@torch.no_grad()
def test_prompts_attend_only_to_unmasked_tokens():
    """SigLIP 2 pads: with prompts, too, an image's features do not depend on the padding."""
    family = FAMILIES["siglip2"]
    for deep, attention in ((True, "sdpa"), (False, "sdpa"), (True, "eager")):
        model = get_peft_model(family.model(), VPTConfig(num_virtual_tokens=3, deep=deep, init_weights=False)).eval()
        model.get_base_model().set_attn_implementation(attention)
        inputs = family.inputs(2)
        before = model(**inputs).logits
        padded = inputs | {"pixel_values": inputs["pixel_values"].clone()}
        padded["pixel_values"][inputs["pixel_attention_mask"] == 0] = 100.0
        assert_equal(model(**padded).logits, before)


@torch.no_grad()
def test_attention_maps_show_the_prompts():
    family = FAMILIES["vit"]
    model = get_peft_model(family.model(), VPTConfig(num_virtual_tokens=3)).eval()
    model.get_base_model().set_attn_implementation("eager")
    maps = model(**family.inputs(1), output_attentions=True).attentions
    assert [tuple(a.shape) for a in maps] == [(1, 2, 20, 20)] * DEPTH
