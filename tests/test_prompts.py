"""Prompts that start from data, pass from block to block, or come with other parts: against their equations."""

from __future__ import annotations

import copy

import pytest
import torch
from equations import adapted, assert_equal, both, weights_of
from families import DEPTH, FAMILIES, images, liven, output_of
from peft import PeftModel, get_peft_model
from plain import plain_parts
from transformers import ViTConfig, ViTForImageClassification

from hf_visual_peft import (
    BitFitConfig,
    GatedPromptConfig,
    NotCalibratedError,
    ProVPConfig,
    VFPTConfig,
    VPTConfig,
    calibrate,
    find_backbone,
)
from hf_visual_peft.coverage.cell import tensors_of
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.methods.prompt.gated_prompt import Temperature
from hf_visual_peft.sites import to_tokens


COUNT = 3
LABELS = {"labels": torch.tensor([0, 1, 0, 1])}


def through(block, x, prefix, prompts, attend=None):
    """The tokens after a `PlainBlock` with prompts, and these."""
    x = torch.cat([x[:, :prefix], prompts, x[:, prefix:]], dim=1)
    x = x + (attend or block.attention)(block.norm(1, x))
    x = x + block.mlp(block.norm(2, x))
    end = prefix + prompts.shape[1]
    return torch.cat([x[:, :prefix], x[:, end:]], dim=1), x[:, prefix:end]


@both
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@torch.no_grad()
def test_progressive_prompts(name, alpha):
    config = ProVPConfig(num_virtual_tokens=COUNT, alpha=alpha, init_weights=False)
    (blocks, x, norm), model, actual, family = adapted(name, config)
    found, out = weights_of(model, "provp_tokens"), 0
    for index, block in enumerate(blocks):
        prompts = found[index]["prompts"].expand(2, -1, -1)
        if index > 0:
            prompts = alpha * out + (1 - alpha) * prompts
        x, out = through(block, x, family.prefix, prompts)
    assert_equal(actual, norm(x))


@both
@pytest.mark.parametrize("temperature", [True, False])
@torch.no_grad()
def test_gated_prompts(name, temperature):
    config = GatedPromptConfig(num_virtual_tokens=COUNT, gate_init=0.3, temperature=temperature, init_weights=False)
    (blocks, x, norm), model, actual, family = adapted(name, config)
    found, taus = weights_of(model, "gatedprompt_tokens"), weights_of(model, "gatedprompt_logits")
    assert len(taus) == (DEPTH if temperature else 0)
    prompts = found[0]["prompts"].expand(2, -1, -1)
    for index, block in enumerate(blocks):
        block.qkv[0] = tuple(part / (taus[index]["temperature"] if temperature else 1) for part in block.qkv[0])
        x, out = through(block, x, family.prefix, prompts)
        if index + 1 < DEPTH:
            gate = torch.sigmoid(found[index + 1]["logit"])
            prompts = gate * out + (1 - gate) * prompts
    assert_equal(actual, norm(x))


@torch.no_grad()
def test_gates_open_or_shut_are_other_prompts():
    """All of the output is shallow VPT, none of it the same prompts in every block."""
    pixels = images(2)
    model = get_peft_model(
        FAMILIES["vit"].model(), GatedPromptConfig(num_virtual_tokens=COUNT, gate_init=-100.0, temperature=False)
    )
    prompts = weights_of(model, "gatedprompt_tokens")[0]["prompts"]
    for logit, deep in ((100.0, False), (-100.0, True)):
        for weights in list(weights_of(model, "gatedprompt_tokens").values())[1:]:
            weights["logit"].fill_(logit)
        plain = get_peft_model(FAMILIES["vit"].model(), VPTConfig(num_virtual_tokens=COUNT, deep=deep))
        for weights in weights_of(plain, "vpt_tokens").values():
            weights["prompts"].copy_(prompts)
        assert_equal(output_of(model.eval(), pixels), output_of(plain.eval(), pixels))


def test_temperatures_count_as_their_limits():
    logits = torch.randn(1, 2, 3, 3, dtype=torch.double)
    for value, used in ((20.0, 10.0), (-3.0, 0.01), (0.7, 0.7)):
        equation = Temperature().double()
        torch.nn.init.constant_(equation.temperature, value)
        out = equation(logits, None)
        torch.testing.assert_close(out, logits / used)
        (gradient,) = torch.autograd.grad(out.sum(), equation.temperature)
        torch.testing.assert_close(gradient, -(logits.sum() / used**2).view(1))


@both
@pytest.mark.parametrize("stages", [1, DEPTH])
@torch.no_grad()
def test_prompts_of_stages(name, stages):
    config = VPTConfig(num_virtual_tokens=COUNT, deep=False, stages=stages, init_weights=False)
    (blocks, x, norm), model, actual, family = adapted(name, config)
    found = weights_of(model, "vpt_tokens")
    assert list(found) == list(range(0, DEPTH, DEPTH // stages))
    for index, block in enumerate(blocks):
        if index in found:
            out = found[index]["prompts"].expand(2, -1, -1)
        x, out = through(block, x, family.prefix, out)
    assert_equal(actual, norm(x))


@torch.no_grad()
def test_prompts_pass_from_block_to_block_within_a_stage():
    """Of seven blocks, six in three stages of two."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 7, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    base = liven(ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8)).eval())
    pixels = images(2)["pixel_values"]
    blocks, x, norm = plain_parts("vit", copy.deepcopy(base), pixels)
    config = VPTConfig(num_virtual_tokens=COUNT, deep=False, stages=3, layers_to_transform=[*range(1, 7)])
    model = get_peft_model(base, config).eval()
    actual = model.get_base_model().vit(pixels).last_hidden_state
    found = weights_of(model, "vpt_tokens")
    assert list(found) == [1, 3, 5]
    for index, block in enumerate(blocks):
        if index in found:
            out = found[index]["prompts"].expand(2, -1, -1)
        x, out = through(block, x, 1, out if index else x[:, :0])
    assert_equal(actual, norm(x))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (VPTConfig(num_virtual_tokens=50, biases=True), 563_712),
        (VPTConfig(num_virtual_tokens=10, deep=False, stages=4), 30_720),
        (VPTConfig(num_virtual_tokens=20, init="data"), 184_320),
        (VPTConfig(num_virtual_tokens=100, deep=False, init="data"), 76_800),
    ],
)
def test_counts_of_options(config, count):
    with torch.device("meta"):
        model = get_peft_model(ViTForImageClassification(ViTConfig()), config)
    names = [n for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n]
    assert sum(model.get_parameter(n).numel() for n in names) == count


@pytest.mark.parametrize("name", ["vit", "swin"])
@torch.no_grad()
def test_biases_are_those_of_bitfit(name):
    """With prompts that the model lacks, VPT with biases would be BitFit; their effects do not disturb each other."""
    entry = MODELS[name]
    base, arguments = entry.model(), entry.arguments(2)
    torch.manual_seed(0)
    model = get_peft_model(base, VPTConfig(num_virtual_tokens=COUNT, biases=True, init_weights=False)).eval()
    found = tensors_of(entry.call(model, arguments))
    biases = {n: p for n, p in model.named_parameters() if ".vpt_bias." in n}
    assert biases
    bitfit = get_peft_model(entry.model(), BitFitConfig())
    names = dict(bitfit.named_parameters())
    assert {n.replace(".vpt_bias.", ".bitfit_bias.") for n in biases} == {n for n in names if ".bitfit_bias." in n}
    for key, value in biases.items():
        names[key.replace(".vpt_bias.", ".bitfit_bias.")].copy_(value)
    merged = bitfit.merge_and_unload()
    prompted = get_peft_model(merged, VPTConfig(num_virtual_tokens=COUNT)).eval()
    own = dict(model.named_parameters())
    for key, value in prompted.named_parameters():
        if ".vpt_tokens." in key:
            value.copy_(own[key])
    for actual, expected in zip(found, tensors_of(entry.call(prompted, arguments)), strict=True):
        assert_equal(actual, expected)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    for actual, expected in zip(tensors_of(entry.call(model, arguments)), found, strict=True):
        assert torch.equal(actual, expected)


# ---- prompts from data -------------------------------------------------------------------------------------------


def inputs_of_blocks(entry, base, arguments):
    """The tokens before each block, by its name."""
    backbone, seen, handles = find_backbone(base), {}, []
    for block in backbone.blocks:
        keep = lambda module, args, kwargs, path=block.path: seen.update({path: args[0]})  # noqa: E731
        handles.append(base.get_submodule(block.path).register_forward_pre_hook(keep, with_kwargs=True))
    entry.call(base, arguments)
    for handle in handles:
        handle.remove()
    table = backbone.architecture
    return {path: to_tokens(x, table.stream).flatten(0, 1) for path, x in seen.items()}


@pytest.mark.parametrize("name", ["vit", "dinov2_with_registers", "swin", "timm_swin", "siglip2"])
@pytest.mark.parametrize("deep", [True, False])
@torch.no_grad()
def test_prompts_are_tokens_of_the_inputs_of_their_blocks(name, deep, tmp_path):
    entry = MODELS[name]
    if not deep and "swin" in name:
        pytest.skip("windows have deep prompts only")
    arguments = entry.arguments(4)
    base = entry.model()
    tokens = inputs_of_blocks(entry, base, arguments)
    model = get_peft_model(base, VPTConfig(num_virtual_tokens=COUNT, deep=deep, init="data")).eval()
    with pytest.raises(NotCalibratedError, match='VPT with init="data" has not yet chosen'):
        entry.call(model, arguments)
    found = []
    for seed in (0, 1, 0):
        calibrate(model, [arguments | LABELS, arguments | LABELS], seed=seed, progress=False)
        prompts = {n: p.clone() for n, p in model.named_parameters() if "vpt_tokens" in n}
        assert len(prompts) == (len(tokens) if deep else 1)
        for key, value in prompts.items():
            path = key.removeprefix("base_model.model.").partition(".adapters.")[0]
            distances = torch.cdist(value, tokens[path], compute_mode="donot_use_mm_for_euclid_dist")
            assert distances.min(dim=1).values.max() < 1e-6
        found.append(prompts)
    same = [all(torch.equal(found[0][k], each[k]) for k in found[0]) for each in found[1:]]
    assert same == [False, True]
    before = tensors_of(entry.call(model, arguments))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(entry.model(), tmp_path).eval()
    for actual, expected in zip(tensors_of(entry.call(loaded, arguments)), before, strict=True):
        assert torch.equal(actual, expected)


@torch.no_grad()
def test_every_token_is_as_likely_and_padding_is_not_drawn():
    entry = MODELS["siglip2"]
    arguments = entry.arguments(4)
    mask = arguments["pixel_attention_mask"]
    assert not mask.all()
    base = entry.model()
    tokens = next(iter(inputs_of_blocks(entry, base, arguments).values()))
    real = int(mask.sum())
    model = get_peft_model(base, VPTConfig(num_virtual_tokens=real, deep=False, init="data"))
    calibrate(model, [arguments | LABELS], progress=False)
    (prompts,) = (p for n, p in model.named_parameters() if "vpt_tokens" in n)
    nearest = torch.cdist(prompts, tokens, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
    assert sorted(nearest.tolist()) == mask.flatten().nonzero().flatten().tolist(), "each once"


def test_too_few_tokens():
    model = get_peft_model(FAMILIES["vit"].model(), VPTConfig(num_virtual_tokens=100, init="data"))
    with pytest.raises(ValueError, match=r"has 68 tokens, fewer than VPTConfig.num_virtual_tokens, 100. Give more im"):
        calibrate(model, [images(4) | LABELS], progress=False)
    with pytest.raises(NotCalibratedError):
        output_of(model, images(2))
    calibrate(model, [images(4) | LABELS, images(4) | LABELS], progress=False)
    assert output_of(model, images(2)).isfinite().all()


@torch.no_grad()
def test_fourier_prompts_from_data():
    model = get_peft_model(FAMILIES["vit"].model(), VFPTConfig(num_virtual_tokens=4, init="data")).eval()
    with pytest.raises(NotCalibratedError):
        output_of(model, images(2))
    calibrate(model, [images(4) | LABELS], progress=False)
    assert output_of(model, images(2)).isfinite().all()


# ---- bad fields --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config_cls", "fields", "message"),
    [
        (VPTConfig, {"init": "kmeans"}, "init is 'kmeans': must be one of 'random', 'data'"),
        (VPTConfig, {"init": "data", "projection_dim": 4}, "init is 'data': must be 'random' with projection_dim"),
        (VPTConfig, {"stages": 2}, "stages is 2: must be None with deep=True"),
        (VPTConfig, {"stages": 0, "deep": False}, "stages is 0: must be an integer of at least 1"),
        (VPTConfig, {"biases": 1}, "biases is 1: must be one of True, False"),
        (ProVPConfig, {"alpha": 1.5}, "alpha is 1.5: must be a number from 0 to 1"),
        (ProVPConfig, {"alpha": float("nan")}, "alpha is nan: must be a finite number"),
        (ProVPConfig, {"num_virtual_tokens": 0}, "num_virtual_tokens is 0: must be an integer from 1"),
        (ProVPConfig, {"dropout": 1.0}, "dropout is 1.0: must be"),
        (GatedPromptConfig, {"gate_init": "shut"}, "gate_init is 'shut': must be a finite number"),
        (GatedPromptConfig, {"temperature": 0.5}, "temperature is 0.5: must be one of True, False"),
        (GatedPromptConfig, {"num_virtual_tokens": 2.0}, "num_virtual_tokens is 2.0: must be an integer"),
    ],
)
def test_bad_fields(config_cls, fields, message):
    with pytest.raises(ValueError, match=rf"{config_cls.__name__}\.{message}"):
        config_cls(**fields)


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (VPTConfig(deep=False, stages=2), "vit", r"VPTConfig.stages is 2: must be a divisor of 3, the number of bl"),
        (VPTConfig(deep=False, stages=7), "vit", r"VPTConfig.stages is 7: must be a divisor of 3"),
        (ProVPConfig(layers_to_transform=[0, 2]), "vit", r"ProVPConfig: prompts pass .* consecutive, .* \[0, 2\]"),
        (GatedPromptConfig(layers_to_transform=[0, 2]), "vit", r"GatedPromptConfig: prompts pass .* consecutive"),
        (ProVPConfig(), "swin", "ProVPConfig does not fit .* can only join its attention"),
        (GatedPromptConfig(), "swin", "GatedPromptConfig does not fit .* can only join its attention"),
    ],
)
def test_models_that_do_not_fit_are_left_as_they_were(config, name, message):
    model = MODELS[name].model()
    before = {key: id(module) for key, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert before == {key: id(module) for key, module in model.named_modules()}
