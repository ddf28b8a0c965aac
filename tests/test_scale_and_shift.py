"""What a scale and a shift keep for the backward pass, and that gradients are right whatever they keep."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from step_rounds import count_kept
from torch import nn
from torch.func import functional_call, grad, vmap
from transformers import ViTConfig, ViTModel

from hf_visual_peft import BitFitConfig, RLRRConfig, SSFConfig
from hf_visual_peft.methods.reparameter.ssf import SSF, ScaleAndShift, is_recoverable


WIDTH, MLP, BLOCKS, TOKENS, BATCH = 16, 64, 2, 5, 3


def vit():
    torch.manual_seed(0)
    return ViTModel(
        ViTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=BLOCKS,
            num_attention_heads=2,
            intermediate_size=MLP,
            image_size=8,
            patch_size=4,
        ),
        add_pooling_layer=False,
    )


def pixels():
    return torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def kept(config):
    model = get_peft_model(vit(), config)
    with count_kept(model) as total:
        out = model(pixel_values=pixels())
        bytes_kept = total()
    del out
    return bytes_kept


def test_gradients():
    torch.manual_seed(0)
    x, scale, shift = (torch.randn(s, dtype=torch.double) for s in ((2, 3, 4), (4,), (4,)))
    scale = scale.sign() * (scale.abs() + 0.2)
    inputs = tuple(t.requires_grad_() for t in (x, scale, shift))
    assert torch.autograd.gradcheck(ScaleAndShift.apply, inputs)


@pytest.mark.parametrize("smallest", [0.5, 1e-3, 0.0], ids=str)
@pytest.mark.parametrize("recover", [True, False], ids=str)
def test_gradients_with_scales_near_zero(smallest, recover):
    torch.manual_seed(0)
    equation = SSF(6, 0.02, recover=recover)
    with torch.no_grad():
        equation.scale[2] = smallest
    x, g = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    actual = x.clone().requires_grad_()
    y = equation(actual)
    assert ("ScaleAndShift" in type(y.grad_fn).__name__) == (recover and smallest == 0.5)
    y.backward(g)
    double = x.double().requires_grad_()
    scale, shift = (p.detach().double().requires_grad_() for p in (equation.scale, equation.shift))
    (double * scale + shift).backward(g.double())
    for found, expected in ((actual, double), (equation.scale, scale), (equation.shift, shift)):
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-5, atol=1e-5)


def test_gradients_of_single_samples():
    torch.manual_seed(0)
    equation, x = SSF(4, 0.02, recover=True), torch.randn(3, 5, 4)
    parameters = dict(equation.named_parameters())

    def loss(parameters, sample):
        return functional_call(equation, parameters, (sample,)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for index, sample in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, sample), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][index], gradient)


def test_what_is_recoverable():
    x, one, zero = torch.randn(2, 3), torch.ones(3), torch.zeros(3)
    assert is_recoverable(x, one, zero)
    assert not is_recoverable(x, torch.tensor([1.0, 0.05, 1.0]), zero)
    assert not is_recoverable(x, one, torch.tensor([0.0, 0.0, 11.0]))
    assert not is_recoverable(x.bfloat16(), one, zero)
    assert not is_recoverable(x, one * torch.nan, zero)


@pytest.mark.parametrize(
    "config", [SSFConfig(init_weights=False), RLRRConfig(init_weights=False)], ids=["ssf", "rlrr"]
)
def test_model_has_the_gradients_of_the_formula(config, monkeypatch):
    """Norms that scale and shift by themselves, and recovered inputs, against x * scale + shift everywhere."""
    model = get_peft_model(vit(), config)
    model(pixel_values=pixels()).last_hidden_state.square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    actual = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    seen = []
    monkeypatch.setattr(SSF, "forward", lambda self, x: seen.append(self) or x * self.scale + self.shift)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda module, args, output: None)  # is to be called: no short cut
    model(pixel_values=pixels()).last_hidden_state.square().mean().backward()
    assert set(seen) == {module for module in model.modules() if isinstance(module, SSF)}
    for name, parameter in trained.items():
        torch.testing.assert_close(actual[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_kept_memory():
    """Beside what BitFit keeps: what leaves each sub-layer, and the patches, before the scale."""
    patches = BATCH * (TOKENS - 1) * WIDTH
    further = 4 * (BLOCKS * 2 * BATCH * TOKENS * WIDTH + patches)
    # norms' weights, scales and shifts
    small = 4 * (2 * WIDTH * (2 * BLOCKS + 1) + BLOCKS * 2 * (5 * WIDTH + MLP) + 2 * WIDTH)
    extra = kept(SSFConfig(init_weights=False)) - kept(BitFitConfig())
    assert further <= extra <= further + small


def test_norm_in_another_precision_and_with_hooks():
    model = get_peft_model(vit().to(torch.bfloat16), SSFConfig())
    out = model(pixel_values=pixels().bfloat16()).last_hidden_state
    assert out.dtype == torch.bfloat16
    calls = []
    model.base_model.model.layernorm.base_layer.register_forward_hook(lambda *a: calls.append(1))
    model(pixel_values=pixels().bfloat16())
    assert calls == [1]


def test_two_adapters_at_one_norm():
    model = get_peft_model(vit(), SSFConfig(init_weights=False)).eval()
    model.add_adapter("second", SSFConfig(init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    layer = model.base_model.model.layernorm
    x = torch.randn(2, TOKENS, WIDTH)
    expected = F.layer_norm(x, (WIDTH,), layer.weight, layer.bias, layer.eps)
    for name in ("default", "second"):
        equation = layer.ssf_output[name]
        expected = expected * equation.scale + equation.shift
    torch.testing.assert_close(layer(x), expected)
