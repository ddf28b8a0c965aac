"""RLRR and SNELL against their equations, evaluated in plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from equations import LINEARS, OUTPUTS, assert_equal, both, weights_by_path
from families import DEPTH, FAMILIES, output_of
from peft import get_peft_model

from hf_visual_peft import RLRRConfig, SNELLConfig
from hf_visual_peft.methods.reparameter.snell import SNELL, threshold


@both
@torch.no_grad()
def test_rlrr(name):
    family = FAMILIES[name]
    inputs = family.inputs(2)
    base = family.model()
    torch.manual_seed(3)
    model = get_peft_model(family.model(), RLRRConfig(init_weights=False)).eval()
    linears, pairs = weights_by_path(model, "rlrr_weight"), weights_by_path(model, "rlrr_output")
    assert sorted(linears) == sorted(key for key, _ in base.named_modules() if key.endswith(LINEARS))
    kinds = torch.nn.LayerNorm | torch.nn.Conv2d
    assert sorted(pairs) == sorted(key for key, module in base.named_modules() if isinstance(module, kinds))
    for key, w in linears.items():
        module = base.get_submodule(key)
        module.weight += torch.outer(w["scale_out"][:, 0], w["scale_in"][0]) * module.weight
        module.bias += w["shift"]
    for key, w in pairs.items():
        shape = (-1, 1, 1) if isinstance(base.get_submodule(key), torch.nn.Conv2d) else (-1,)
        base.get_submodule(key).register_forward_hook(
            lambda module, args, out, w=w, shape=shape: out * w["scale"].view(shape) + w["shift"].view(shape)
        )
    expected = output_of(base, inputs)
    assert_equal(output_of(model, inputs), expected)
    assert_equal(output_of(model.merge_and_unload(safe_merge=True), inputs), expected)


def test_rlrr_initialisation():
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), RLRRConfig())
    for w in weights_by_path(model, "rlrr_weight").values():
        bound = math.sqrt(6 / w["scale_in"].shape[1])
        assert 0.7 * bound < w["scale_in"].abs().max() <= bound
        assert 0.7 * math.sqrt(6) < w["scale_out"].abs().max() <= math.sqrt(6)
        assert not w["shift"].any()
    pairs = weights_by_path(model, "rlrr_output")
    assert torch.cat([w["scale"] for w in pairs.values()]).mean().item() == pytest.approx(1.0, abs=0.01)
    for name in ("scale", "shift"):
        assert torch.cat([w[name] for w in pairs.values()]).std().item() == pytest.approx(0.02, rel=0.2)
    with pytest.raises(ValueError, match="init_std is -1: must be a finite number of at least 0"):
        RLRRConfig(init_std=-1)


@torch.no_grad()
def test_rlrr_gives_keys_without_bias_one():
    family = FAMILIES["beit"]
    model = get_peft_model(family.model(), RLRRConfig(init_weights=False)).eval()
    expected = output_of(model, family.inputs(2))
    with pytest.warns(UserWarning, match="gets a bias by merging"):
        merged = model.merge_and_unload()
    assert_equal(output_of(merged, family.inputs(2)), expected)


def snell_delta(w, sparsity, weighting):
    """Entry by entry."""
    rows, columns = w["rows"], w["columns"]
    distance = (rows[:, :, None] - columns[:, None, :]).square().sum(-1).sqrt()
    dense = 0.1 * distance[0] - 0.1 * distance[1]
    magnitude = dense.detach().abs()
    kept = magnitude > torch.quantile(magnitude, sparsity) if sparsity else torch.ones_like(magnitude)
    return dense * kept * (magnitude if weighting == "magnitude" else 1.0)


@both
@pytest.mark.parametrize("fields", [{}, {"sparsity": 0.3}, {"sparsity": 0.0}, {"weighting": "mask"}], ids=str)
@torch.no_grad()
def test_snell(name, fields):
    family = FAMILIES[name]
    inputs = family.inputs(2)
    base = family.model()
    torch.manual_seed(3)
    config = SNELLConfig(r=4, init_weights=False, **fields)
    model = get_peft_model(family.model(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(3.0)  # entries of the update are then of the size of the weights
        base.classifier.load_state_dict(model.get_base_model().classifier.modules_to_save["default"].state_dict())
    weights = weights_by_path(model, "snell_delta")
    assert sorted(weights) == sorted(key for key, _ in base.named_modules() if key.endswith(LINEARS))
    before = output_of(base, inputs)
    for key, w in weights.items():
        delta = snell_delta(w, config.sparsity, config.weighting)
        assert (delta == 0).float().mean().item() == pytest.approx(config.sparsity, abs=0.01)
        base.get_submodule(key).weight += delta
    expected = output_of(base, inputs)
    assert (expected - before).abs().max() > 1e-3 * before.abs().max()
    assert_equal(output_of(model, inputs), expected)
    assert_equal(output_of(model.merge_and_unload(safe_merge=True), inputs), expected)


@pytest.mark.parametrize("weighting", ["magnitude", "mask"])
def test_snell_gradients(weighting):
    """The factor |d| passes no gradient; that the update is computed twice changes nothing."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 5)
    equation = SNELL(linear, 4, 0.5, weighting, 0.0, 0.0)
    x = torch.randn(2, 3, 6, requires_grad=True)
    target = torch.randn(2, 3, 5)
    own = (*equation.parameters(), x)
    actual = torch.autograd.grad((equation(linear(x), x) * target).sum(), own)
    delta = snell_delta(dict(equation.named_parameters()), 0.5, weighting)
    expected = torch.autograd.grad(((linear(x) + x @ delta.T) * target).sum(), own)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_snell_dropout_and_drop_path():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 3)
    x, y = torch.ones(400, 1, 64), torch.zeros(400, 1, 3)
    equation = SNELL(linear, 4, 0.0, "mask", 0.5, 0.0).train()
    delta = equation.delta()
    seen = []
    equation.dropout.register_forward_hook(lambda module, args, output: seen.append(output))
    out = equation(y, x)
    assert set(seen[0].unique().tolist()) == {0.0, 2.0}, "dropout acts on the input"
    assert_equal(out, seen[0] @ delta.T)
    equation = SNELL(linear, 4, 0.0, "mask", 0.0, 0.5).train()
    plain = equation.eval()(y, x)
    out = equation.train()(y, x)
    dropped = (out == 0).flatten(1).all(dim=1)
    assert_equal(out[~dropped], 2 * plain[~dropped])
    assert 0.4 < dropped.float().mean() < 0.6
    model = get_peft_model(FAMILIES["vit"].model(), SNELLConfig(dropout=0.3, drop_path=0.2))
    for key, module in model.named_modules():
        if isinstance(module, SNELL):
            assert module.dropout.p == (0.0 if "o_proj" in key else 0.3)
            assert module.drop_path == 0.2


def test_snell_initialisation():
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), SNELLConfig(r=8))
    weights = weights_by_path(model, "snell_delta")
    assert len(weights) == 6 * DEPTH
    for w in weights.values():
        for factor in w.values():
            bound = 1 / math.sqrt(factor.shape[1] * factor.shape[2])
            assert factor.shape[::2] == (2, 4)
            assert 0.9 * bound < factor.abs().max() <= bound
    assert any(key.endswith(OUTPUTS) for key in weights)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.995])
@pytest.mark.parametrize("numbers", [torch.linspace(0, 1, 97), torch.arange(60) // 7 * 1.0], ids=["distinct", "ties"])
def test_threshold_keeps_what_is_above_the_quantile(numbers, sparsity):
    numbers = numbers[torch.randperm(len(numbers))]
    assert torch.equal(numbers > threshold(numbers, sparsity), numbers > torch.quantile(numbers, sparsity))


def test_threshold_has_no_limit_of_size():
    numbers = torch.arange(2**24 + 3, dtype=torch.int32).flip(0)
    assert threshold(numbers, 0.5) == 2**23 + 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 7}, "r is 7: must be even"),
        ({"r": 0}, "r is 0: must be an integer of at least 2"),
        ({"sparsity": 1.0}, "sparsity is 1.0: must be a finite number of at least 0 and less than 1"),
        ({"weighting": "soft"}, "weighting is 'soft': must be one of 'magnitude', 'mask'"),
    ],
)
def test_snell_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        SNELLConfig(**fields)


def test_snell_rank_fits_the_backbone():
    with pytest.raises(ValueError, match="r is 18: must be an integer from 2 to 16"):
        get_peft_model(FAMILIES["vit"].model(), SNELLConfig(r=18))
