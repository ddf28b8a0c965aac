"""Adapters of two linears against their equations, in sequence and in parallel."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from equations import adapted, assert_equal, both, weights_of
from families import FAMILIES, WIDTH
from peft import get_peft_model

from hf_visual_peft import (
    AdapterPlusConfig,
    AdaptFormerConfig,
    HoulsbyConfig,
    PfeifferConfig,
)
from hf_visual_peft.sites import Grid


@both
@pytest.mark.parametrize(
    "fields", [{}, {"scale": "learnable"}, {"layer_norm": "in"}, {"layer_norm": "out", "scale": 0.7}], ids=str
)
@torch.no_grad()
def test_adaptformer(name, fields):
    config = AdaptFormerConfig(r=4, init_weights=False, **fields)
    (blocks, x, norm), model, actual, _ = adapted(name, config)
    for block, w in zip(blocks, weights_of(model, "adaptformer_mlp").values(), strict=True):
        z = x + block.attention(block.norm(1, x))
        y = F.layer_norm(z, (WIDTH,), w["norm_in.weight"], w["norm_in.bias"]) if config.layer_norm == "in" else z
        y = F.relu(y @ w["down.weight"].T + w["down.bias"]) @ w["up.weight"].T + w["up.bias"]
        y = y * (w["scale"] if config.scale == "learnable" else config.scale)
        if config.layer_norm == "out":
            y = F.layer_norm(y, (WIDTH,), w["norm_out.weight"], w["norm_out.bias"])
        x = z + block.mlp(block.norm(2, z)) + y
    assert_equal(actual, norm(x))


def test_adaptformer_initialisation():
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), AdaptFormerConfig(r=8, scale="learnable"))
    for w in weights_of(model, "adaptformer_mlp").values():
        assert not any(w[zero].any() for zero in ("down.bias", "up.weight", "up.bias"))
        assert w["scale"].item() == 1.0
        bound = math.sqrt(6 / ((1 + 5) * WIDTH))  # Kaiming-uniform, a = sqrt 5
        assert 0.9 * bound < w["down.weight"].abs().max() <= bound


@torch.no_grad()
def test_dropout_acts_inside_the_bottleneck():
    from hf_visual_peft.methods.adapter.adaptformer import AdaptFormer
    from hf_visual_peft.methods.adapter.convpass import Convpass
    from hf_visual_peft.sites import TokenLayout

    x = torch.randn(2, 5, 6)
    for equation, args in (
        (AdaptFormer(6, 64, 1.0, 0.5, "none"), ()),
        (Convpass(6, 64, 1.0, 0.5, "xavier"), (TokenLayout(1, Grid(2, 2)),)),
    ):
        for parameter in equation.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        seen = []
        equation.up.register_forward_pre_hook(lambda module, a, seen=seen: seen.append(a[0]))
        equation.eval()(x, *args)
        equation.train()(x, *args)
        before, after = seen
        assert ((after == 0) | torch.isclose(after, 2 * before, atol=1e-6)).all()
        assert 0.4 < (after[before != 0] == 0).float().mean() < 0.6


def bottleneck(x, w):
    return F.gelu(x @ w["down.weight"].T + w["down.bias"]) @ w["up.weight"].T + w["up.bias"]


@both
@torch.no_grad()
def test_houlsby(name):
    (blocks, x, norm), model, actual, _ = adapted(name, HoulsbyConfig(r=4, init_weights=False))
    after = {sublayer: weights_of(model, f"houlsby_{sublayer}") for sublayer in ("attention", "mlp")}
    for index, block in enumerate(blocks):
        a = block.attention(block.norm(1, x))
        x = x + a + bottleneck(a, after["attention"][index])
        m = block.mlp(block.norm(2, x))
        x = x + m + bottleneck(m, after["mlp"][index])
    assert_equal(actual, norm(x))


@both
@torch.no_grad()
def test_pfeiffer(name):
    (blocks, x, norm), model, actual, _ = adapted(name, PfeifferConfig(r=4, init_weights=False))
    for block, w in zip(blocks, weights_of(model, "pfeiffer_mlp").values(), strict=True):
        x = x + block.attention(block.norm(1, x))
        m = block.mlp(block.norm(2, x))
        x = x + m + bottleneck(m, w)
    assert_equal(actual, norm(x))


@both
@pytest.mark.parametrize("position", ["post", "pre", "parallel", "intermediate", "pfeiffer", "houlsby"])
@torch.no_grad()
def test_adapter_plus(name, position):
    config = AdapterPlusConfig(r=4, position=position, init_weights=False)
    (blocks, x, norm), model, actual, _ = adapted(name, config)
    weights = {sublayer: weights_of(model, f"adapterplus_{sublayer}") for sublayer in ("attention", "mlp")}
    sublayers = {"pre": {"attention"}, "houlsby": {"attention", "mlp"}}.get(position, {"mlp"})
    assert {sublayer for sublayer, found in weights.items() if found} == sublayers

    def f(x, w):
        if position == "pfeiffer":
            x = F.layer_norm(x, (WIDTH,), w["norm.weight"], w["norm.bias"])
        inner = {key.removeprefix("bottleneck."): value for key, value in w.items()}
        return w["scale"] * bottleneck(x, inner)

    for index, block in enumerate(blocks):
        at = {sublayer: found.get(index) for sublayer, found in weights.items()}
        a = block.attention(block.norm(1, x))
        x = x + a + (f(a, at["attention"]) if position == "houlsby" else 0)
        x = x + f(x, at["attention"]) if position == "pre" else x
        m = block.mlp(block.norm(2, x))
        beside = f(x, at["mlp"]) if position == "parallel" else 0
        x = x + m + beside + (f(m, at["mlp"]) if position in ("intermediate", "houlsby") else 0)
        x = x + f(x, at["mlp"]) if position in ("post", "pfeiffer") else x
    assert_equal(actual, norm(x))


def test_sequential_adapters_initialisation():
    torch.manual_seed(0)
    for config, slot, inner in (
        (HoulsbyConfig(r=8), "houlsby_attention", ""),
        (AdapterPlusConfig(r=8), "adapterplus_mlp", "bottleneck."),
        (PfeifferConfig(r=8), "pfeiffer_mlp", ""),
    ):
        model = get_peft_model(FAMILIES["vit"].model(), config)
        for w in weights_of(model, slot).values():
            assert not w[f"{inner}down.bias"].any()
            assert not w[f"{inner}up.bias"].any()
            up, down = w[f"{inner}up.weight"], w[f"{inner}down.weight"]
            if slot == "pfeiffer_mlp":
                assert not up.any()
                assert 0.9 * WIDTH**-0.5 < down.abs().max() <= WIDTH**-0.5  # Kaiming-uniform, a = sqrt 5
                continue
            for weight in (up, down):
                assert weight.abs().max() <= 0.02
                assert weight.std().item() == pytest.approx(0.0088, rel=0.2)  # 0.01, cut at two deviations
            if slot == "adapterplus_mlp":
                assert torch.equal(w["scale"], torch.ones(WIDTH))


@torch.no_grad()
def test_adapter_plus_drop_path_comes_before_the_channel_scale():
    from hf_visual_peft.methods.adapter.adapter_plus import AdapterPlus

    equation = AdapterPlus(6, 4, 0.5, layer_norm=False)
    equation.scale.uniform_(1.0, 2.0)
    x = torch.randn(1, 3, 6)
    delta = equation.eval()(x)
    out = equation.train()(x.expand(400, -1, -1))
    doubled = torch.stack([torch.allclose(sample, 2 * delta[0]) * torch.ones(()) for sample in out])
    assert (out[doubled == 0] == 0).all()  # whole samples
    assert 0.4 < doubled.mean() < 0.6


@torch.no_grad()
def test_two_branches_beside_a_sublayer_see_the_same_stream():
    model = get_peft_model(FAMILIES["vit"].model(), AdaptFormerConfig(r=4, init_weights=False, modules_to_save=[]))
    model.add_adapter("second", AdaptFormerConfig(r=4, init_weights=False, modules_to_save=[]))
    model.base_model.set_adapter(["default", "second"])
    layer = model.eval().get_base_model().vit.layers[0]
    x = torch.randn(2, 17, WIDTH)
    first, second = layer.adapters.adaptformer_mlp.values()
    seen = []
    handle = layer.layernorm_after.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    actual = layer(x)
    handle.remove()
    (z,) = seen
    assert_equal(actual, z + layer.mlp(layer.layernorm_after(z)) + first(z) + second(z))
