"""Conv-LoRA: every linear against plain torch, in windows and maps; its router and loss; bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, images
from peft import get_peft_model

from hf_visual_peft import ConvLoRAConfig, VPTConfig, auxiliary_loss
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.sites import ModuleLayer


def config(**fields):
    return ConvLoRAConfig(**{"r": 2, "experts": 3, "alpha": 4.0, "init_weights": False} | fields)


def adapted(name, **fields):
    torch.manual_seed(0)
    model = get_peft_model(MODELS[name].model(), config(**fields))
    with torch.no_grad():  # routers that choose by the image
        for key, parameter in model.named_parameters():
            if "router" in key:
                parameter.copy_(30 * torch.randn_like(parameter))
    return model.eval()


def update(equation, x, prefix, side):
    """Of (batch, tokens, channels), image by image; and the experts."""
    h, chosen, results = x @ equation.down.T, [], []
    for tokens in h:
        patches = tokens[prefix:]
        maps = patches.T.reshape(1, -1, *side)
        expert = int((maps.mean(dim=(2, 3)) @ equation.router.choice).argmax())
        larger = F.interpolate(maps, scale_factor=expert + 1, mode="bicubic") if expert else maps
        mixed = F.gelu(F.conv2d(larger, equation.kernels[expert], equation.biases[expert], padding=1))
        mixed = F.interpolate(mixed, side, mode="bicubic") if expert else mixed
        results.append(torch.cat([tokens[:prefix], (maps + mixed)[0].flatten(1).T]))
        chosen.append(expert)
    return 2.0 * torch.stack(results) @ equation.up.T, chosen


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("dinov2_with_registers", 5), ("vit", 1), ("swin", 0), ("timm_swin", 0), ("sam", 0), ("pvt_v2", 0), ("beit", 1)],
)
@torch.no_grad()
def test_every_linear_computes_the_equation(name, prefix):
    model = adapted(name)
    experts, compared = [], []

    def compare(module, args, output):
        x = args[0]
        expected = module.get_base_layer()(x)
        side = tuple(x.shape[1:3]) if x.ndim == 4 else (math.isqrt(x.shape[1] - prefix),) * 2
        for equation in (each.module for each in module._active()):
            delta, chosen = update(equation, x.flatten(1, -2), prefix, side)
            rows = slice(equation.rows.start, equation.rows.start + equation.rows.size)
            expected[..., rows] += delta.reshape(*x.shape[:-1], -1)
            experts.extend(chosen)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        compared.append(module)

    for module in model.modules():
        if isinstance(module, ModuleLayer):
            module.register_forward_hook(compare)
    MODELS[name].call(model, MODELS[name].arguments(3))
    assert len(compared) > 1
    assert len(set(experts)) > 1


def test_loss_and_router():
    """The loss of a batch from the draws, which are made anew in each step."""
    model = adapted("vit", layers_to_transform=[1], roles=("value",), balance=0.3).train()
    equation = next(m for key, m in model.named_modules() if key.endswith("convlora_value")).default
    inputs = FAMILIES["vit"].inputs(4)
    labels = torch.tensor([0, 1, 2, 0])
    seen = []
    handle = equation.router.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    torch.manual_seed(4)
    out = model(**inputs, labels=labels)
    handle.remove()
    maps, (experts, factor, _) = seen[0]
    assert torch.equal(factor, torch.ones_like(factor))
    torch.manual_seed(4)
    means = maps.mean((2, 3))
    clean, deviation = means @ equation.router.choice, F.softplus(means @ equation.router.noise) + 0.01
    noisy = clean + torch.randn_like(clean) * deviation
    assert torch.equal(noisy.argmax(1), experts)
    load = torch.zeros(3)
    for row in range(4):
        for expert in range(3):
            others = torch.cat([noisy[row, :expert], noisy[row, expert + 1 :]]).max()
            normal = torch.distributions.Normal(0.0, 1.0)
            load[expert] += normal.cdf((clean[row, expert] - others) / deviation[row, expert])
    counts = torch.bincount(experts, minlength=3).float()
    expected = 0.3 * sum(x.var() / x.mean() ** 2 for x in (counts, load))
    torch.testing.assert_close(out.loss - F.cross_entropy(out.logits, labels), expected, rtol=1e-4, atol=1e-5)
    out.loss.backward()
    assert equation.router.choice.grad.any()
    assert equation.router.noise.grad.any()
    model.eval()
    out = model(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))
    model.train()(**inputs)
    assert auxiliary_loss(model) > 0


def test_one_expert_has_no_loss():
    model = get_peft_model(FAMILIES["vit"].model(), config(experts=1)).train()
    out = model(**FAMILIES["vit"].inputs(2), labels=torch.tensor([0, 1]))
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, torch.tensor([0, 1])))


@torch.no_grad()
def test_compiled_models_compute_all_experts(monkeypatch):
    model = adapted("vit")
    expected = model(**images(3)).logits
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    actual = model(**images(3)).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_prompts_are_prefix_tokens_and_images_of_other_sizes():
    model = FAMILIES["vit"].model()
    torch.manual_seed(0)
    model.add_adapter(config(modules_to_save=[]), "lora")
    before = model.eval()(**images(2)).logits
    model.add_adapter(VPTConfig(num_virtual_tokens=3, modules_to_save=[]), "prompts")
    model.set_adapter(["lora", "prompts"])
    both = model.eval()(**images(2)).logits
    assert both.isfinite().all()
    assert not torch.equal(both, before)
    model.set_adapter("lora")
    wide = model.eval()(**images(2, 48, 24), interpolate_pos_encoding=True).logits
    assert wide.isfinite().all()


@torch.no_grad()
def test_mixed_batches():
    for name in ("vit", "swin"):
        entry = MODELS[name]
        model = adapted(name)
        model.add_adapter("second", config())
        model.eval()
        arguments = entry.arguments(2)
        single = []
        for adapter in ("default", "second"):
            model.set_adapter(adapter)
            single.append(model.eval()(**arguments).logits)
        mixed = model(**arguments, adapter_names=["default", "second"]).logits
        expected = torch.stack([single[0][0], single[1][1]])
        torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_images_of_several_sizes_in_a_batch_are_refused():
    with pytest.raises(ValueError, match="does not fit Siglip2VisionModel: its images are padded"):
        adapted("siglip2")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "ConvLoRAConfig.r is 0"),
        ({"r": 17}, r"ConvLoRAConfig.r is 17: must be an integer from 1 to 16 \(the backbone's width\)"),
        ({"experts": 0}, "ConvLoRAConfig.experts is 0: must be an integer from 1 to 32"),
        ({"experts": 2.5}, "ConvLoRAConfig.experts is 2.5"),
        ({"roles": ("fc1",)}, "ConvLoRAConfig.roles is .*fc1"),
        ({"balance": -0.1}, "ConvLoRAConfig.balance is -0.1"),
        ({"alpha": float("nan")}, "ConvLoRAConfig.alpha is nan"),
        ({"dropout": 1.0}, "ConvLoRAConfig.dropout is 1.0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(FAMILIES["vit"].model(), ConvLoRAConfig(**fields))


@pytest.mark.parametrize(("name", "message"), [("hiera", "another order"), ("levit", "of different sizes")])
def test_refused_before_the_model_is_touched(name, message):
    model = MODELS[name].model()
    before = copy.deepcopy(list(model.state_dict()))
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config())
    assert before == list(model.state_dict())
