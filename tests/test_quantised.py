"""Adapters on backbones with int8 and 4-bit weights of torchao, on the CPU."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from families import images, liven
from peft import LoraConfig, PeftModel, get_peft_model
from test_conformance import VARIANTS
from torch import nn

import hf_visual_peft
from hf_visual_peft.sites import VisualTunerLayer


quantization = pytest.importorskip("torchao.quantization")

CONFIGS = {
    "int8": lambda: quantization.Int8WeightOnlyConfig(),
    "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32)),
}
in_both = pytest.mark.parametrize("kind", list(CONFIGS))
WHOLE = [variant for variant in VARIANTS if variant[0].name == "partial"]
OTHERS = [variant for variant in VARIANTS if variant not in WHOLE]


def over(variants):
    return pytest.mark.parametrize(("method", "fields"), [pytest.param(m, f, id=name) for m, f, name in variants])


def vit(kind=None, seed=0):
    """All linears but the head with quantised weights, of sizes that groups of 32 divide."""
    torch.manual_seed(seed)
    config = tf.ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        num_labels=3,
    )
    model = liven(tf.ViTForImageClassification(config)).requires_grad_(False)
    if kind is not None:
        quantization.quantize_(model, CONFIGS[kind](), filter_fn=_is_quantised_linear)
        assert isinstance(model.vit.layers[0].mlp.fc1.weight, torch.Tensor)
        assert type(model.vit.layers[0].mlp.fc1.weight).__module__.startswith("torchao.")
    return model


def _is_quantised_linear(module, name):
    return isinstance(module, nn.Linear) and "classifier" not in name


def inputs(method):
    pixels = images(4)["pixel_values"]
    return {"pixel_values": pixels.unflatten(0, (2, 2)) if method is not None and method.video else pixels}


@torch.no_grad()
def logits(model, method=None):
    return model.eval()(**inputs(method)).logits


def train(model, method=None):
    model.train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.01)
    model(**inputs(method)).logits.square().mean().backward()
    optimizer.step()


@in_both
@over(OTHERS)
def test_trains_saves_loads_and_merges_or_says_why_not(kind, method, fields, tmp_path):
    config = method.config_cls(**fields, init_weights=False)
    base = vit(kind)
    torch.manual_seed(2)
    model = get_peft_model(base, config)
    start = logits(model, method)
    train(model, method)
    after = logits(model, method)
    assert after.isfinite().all()
    assert not torch.equal(start, after)
    if not method.video:
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(vit(kind)))

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vit(kind), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded, method), after)

    if method.name == "linearprobe":  # the head has floating-point weights
        assert torch.equal(logits(model.merge_and_unload()), after)
    elif method.mergeable and method.visual_tuning.startswith("prompt"):  # position embeddings have, too
        merged = model.merge_and_unload()
        assert not any(isinstance(module, VisualTunerLayer) for module in merged.modules())
        torch.testing.assert_close(logits(merged), after, rtol=0, atol=1e-5)
    elif method.mergeable:
        with pytest.raises(ValueError, match=r"Linear\(.*its weight is quantised. Keep the adapter beside"):
            model.merge_adapter()
        assert torch.equal(logits(model, method), after)  # nothing was merged half
        assert not any(module.merged for module in model.modules() if isinstance(module, VisualTunerLayer))
    else:
        with pytest.raises(ValueError, match="cannot be merged"):
            model.merge_adapter()


@in_both
@over(WHOLE)
def test_copies_of_quantised_modules_do_not_train(kind, method, fields):
    base = vit(kind)
    modules = dict(base.named_modules())
    with pytest.raises(ValueError, match="copy of ViTLayer: the weight of its attention.q_proj is quantised"):
        get_peft_model(base, method.config_cls(**fields))
    assert modules == dict(base.named_modules())


@in_both
@pytest.mark.parametrize("name", ["rlrr", "gps", "spt", "samparser"])
def test_weights_that_change_are_those_that_the_quantised_stand_for(kind, name):
    method = hf_visual_peft.get_method(name)
    quantised, plain = vit(kind), vit(kind)
    torch.manual_seed(2)
    model = get_peft_model(quantised, method.config_cls(init_weights=False))
    for module in plain.modules():
        if _is_quantised_linear(module, "") and type(module.weight).__module__.startswith("torchao."):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    base = logits(plain)
    torch.manual_seed(2)
    other = get_peft_model(plain, method.config_cls(init_weights=False))
    assert not torch.allclose(logits(other), base)
    torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=1e-5)


@in_both
@pytest.mark.parametrize("name", ["gps", "spt"])
def test_choosing_needs_floating_point(kind, name, tmp_path):
    method = hf_visual_peft.get_method(name)
    data = [inputs(None) | {"labels": torch.tensor([0, 1, 0, 1])}]
    model = get_peft_model(vit(kind), method.config_cls())
    with pytest.raises(ValueError, match=r"weight of shape \(64, 64\) is quantised"):
        hf_visual_peft.calibrate(model, data, progress=False)

    plain = get_peft_model(vit(), method.config_cls())
    hf_visual_peft.calibrate(plain, data, progress=False)
    plain.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vit(kind), tmp_path, is_trainable=True)
    start = logits(loaded)
    train(loaded)
    assert not torch.equal(logits(loaded), start)


def test_lora_of_peft_for_comparison(tmp_path):
    with pytest.warns(UserWarning, match="get_apply_tensor_subclass"):
        model = get_peft_model(vit("int8"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    train(model)
    with pytest.raises(ValueError, match="get_apply_tensor_subclass"):
        model.merge_adapter()
