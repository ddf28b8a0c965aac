"""Models between a backbone and the same with an adapter merged into it."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, get_peft_model
from test_conformance import VARIANTS, adapted, assert_close, run

import hf_visual_peft
from hf_visual_peft.training.interpolation import Interpolation, interpolate


VIT = FAMILIES["vit"]
ONE_EACH = {variant[0].name: variant for variant in VARIANTS}.values()
OWN = [pytest.param(m, f, id=name) for m, f, name in ONE_EACH if m.mergeable]
OTHERS = [pytest.param(m, f, id=name) for m, f, name in ONE_EACH if not m.mergeable]
TARGETS = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
OF_PEFT = {
    "lora": lambda: LoraConfig(r=4, init_lora_weights=False, **TARGETS),
    "dora": lambda: LoraConfig(r=4, use_dora=True, init_lora_weights=False, **TARGETS),
    "loha": lambda: LoHaConfig(r=4, init_weights=False, **TARGETS),
    "oft": lambda: OFTConfig(r=0, oft_block_size=4, init_weights=False, **TARGETS),
    "ia3": lambda: IA3Config(feedforward_modules=[], init_ia3_weights=False, **TARGETS),
}


def check(model):
    """alpha = 0 is the backbone and 1 the merged model, what is between lies on the line, the model is untouched."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    base = VIT.model().state_dict()
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    outputs = run(model, VIT)
    between = Interpolation(model)

    for alpha, end in ((0.0, base), (1.0, merged), (0, base), (1, merged)):
        state = between(alpha).state_dict()
        assert all(torch.equal(state[name], value) for name, value in end.items())
    assert torch.equal(run(between(0.0), VIT), run(VIT.model().requires_grad_(False), VIT))
    assert_close(run(between(1.0), VIT), outputs)

    state = between(0.25).state_dict()
    assert state.keys() == base.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, base[name] + 0.25 * (merged[name] - base[name]), rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(value, base[name]) for name, value in state.items())

    assert type(between(0.5)) is type(VIT.model())
    assert not between(0.5).training
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(run(model, VIT), outputs)


@pytest.mark.parametrize(("method", "fields"), OWN)
def test_methods_of_ours(method, fields):
    model = adapted(method, fields, VIT)
    check(model)


@pytest.mark.parametrize("name", OF_PEFT)
def test_methods_of_peft(name):
    torch.manual_seed(2)
    model = get_peft_model(VIT.model(), OF_PEFT[name]()).eval()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1.0)
    check(model)


def test_heads_lie_between():
    model = get_peft_model(VIT.model(), hf_visual_peft.SSFConfig())
    head = model.base_model.model.classifier
    with torch.no_grad():
        head.modules_to_save["default"].weight.add_(1.0)
    weight = interpolate(model, 0.5).classifier.weight
    torch.testing.assert_close(weight, head.original_module.weight + 0.5)


@pytest.mark.parametrize(("method", "fields"), OTHERS)
def test_what_cannot_be_merged(method, fields):
    model = adapted(method, fields, VIT)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"'default' of type {method.name.upper()} cannot be merged: "):
        interpolate(model, 0.5)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_one_of_several_adapters():
    model = get_peft_model(VIT.model(), hf_visual_peft.SSFConfig(init_weights=False))
    model.add_adapter("other", hf_visual_peft.SSFConfig(init_weights=False))
    one, other = (interpolate(model, 1.0, name) for name in ("default", "other"))
    assert model.active_adapters == ["default"]
    assert_close(run(one, VIT), run(model.eval(), VIT))
    model.set_adapter("other")
    assert_close(run(other, VIT), run(model.eval(), VIT))


def test_a_bias_that_merging_makes_starts_at_zero():
    family = FAMILIES["beit"]  # whose keys have none
    model = adapted(hf_visual_peft.get_method("ssf"), {}, family)
    with pytest.warns(UserWarning, match="gets a bias by merging"):
        between = Interpolation(model)
    assert_close(run(between(0.0), family), run(family.model(), family))
    assert_close(run(between(1.0), family), run(model, family))


def test_half_precision():
    base = VIT.model().bfloat16()
    model = get_peft_model(copy.deepcopy(base), hf_visual_peft.SSFConfig(init_weights=False))
    between = Interpolation(model)
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in between(0.0).state_dict().items() if "class" not in k)
    assert between(0.3).vit.layers[0].mlp.fc1.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan"), True, "0.5", None])
def test_bad_alpha(alpha):
    model = get_peft_model(VIT.model(), hf_visual_peft.SSFConfig())
    with pytest.raises(ValueError, match="alpha is .*: must be a number from 0 to 1"):
        interpolate(model, alpha)


def test_bad_models():
    with pytest.raises(TypeError, match="PeftModel with adapter layers, not ViTForImageClassification"):
        interpolate(VIT.model(), 0.5)
    model = get_peft_model(VIT.model(), hf_visual_peft.SSFConfig())
    with pytest.raises(ValueError, match="adapter_name is 'none': must be one of"):
        interpolate(model, 0.5, "none")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the model already"):
        interpolate(model, 0.5)
