"""Adapters with weights of a few bits: the levels, the equations in plain torch, and two ways to hold the weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from equations import adapted, assert_equal, both, weights_of
from families import DEPTH, FAMILIES, WIDTH, output_of
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_visual_peft import BiAdaptFormerConfig, BiLoRAConfig
from hf_visual_peft.methods.adapter.binary import BinaryWeight, gaussian_levels, pack, unpack


every_bits = pytest.mark.parametrize("bits", [1, 2, 4])
both_methods = pytest.mark.parametrize("config_cls", [BiAdaptFormerConfig, BiLoRAConfig])


def levels_of_the_paper(bits, steps=500):
    """Each level the inverse CDF of the mean CDF of its cell's bounds, again and again; all start at zero."""
    levels = torch.zeros(2**bits, dtype=torch.float64)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for _ in range(steps):
        bounds = torch.cat([zero, torch.special.ndtr((levels[1:] + levels[:-1]) / 2), one])
        levels = torch.special.ndtri((bounds[1:] + bounds[:-1]) / 2)
    return levels


def quantised(weight, bits):
    levels = levels_of_the_paper(bits).float()
    mean, std = weight.mean(), weight.std()
    normal = (weight - mean) / (std + 1e-5)
    return levels[(normal.unsqueeze(-1) - levels).abs().argmin(dim=-1)] * std + mean


def binary_weights(model):
    return [module for module in model.modules() if isinstance(module, BinaryWeight)]


def skewed(*shape):
    """Unlike a normal distribution: most numbers are small, a few are large, and the mean is not zero."""
    return 0.05 * torch.randn(*shape) ** 5 + 0.3


def small(*shape):
    """As B is at the start: so small that the constant of the division shows."""
    return torch.nn.init.trunc_normal_(torch.empty(*shape), std=1e-3, a=-2e-3, b=2e-3)


@every_bits
def test_levels_are_those_of_the_paper(bits):
    levels = torch.tensor(gaussian_levels(bits), dtype=torch.float64)
    assert len(levels) == 2**bits
    torch.testing.assert_close(levels, levels_of_the_paper(bits), rtol=0, atol=1e-6)
    bounds = F.pad(torch.special.ndtr((levels[1:] + levels[:-1]) / 2), (1, 1))
    bounds[-1] = 1.0
    torch.testing.assert_close(levels, torch.special.ndtri((bounds[1:] + bounds[:-1]) / 2), rtol=0, atol=1e-9)
    torch.testing.assert_close(levels, -levels.flip(0), rtol=0, atol=1e-9)


def test_levels_of_one_bit_are_medians_of_the_half_normal():
    low, high = 0.0, 5.0  # half of a half-normal variable's mass is below the x with erf(x / sqrt 2) = 1/2
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if math.erf(middle / math.sqrt(2)) < 0.5 else (low, middle)
    assert low == pytest.approx(0.6745, abs=5e-5)
    assert gaussian_levels(1) == pytest.approx((-low, low), abs=1e-9)


@every_bits
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 5), (2, 3, 3)])
def test_packing(bits, shape):
    codes = torch.randint(2**bits, shape)
    codes.view(-1)[0] = 2**bits - 1
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(codes.numel() * bits / 8),)
    assert torch.equal(unpack(packed, bits, shape).long(), codes)


@every_bits
def test_gradient_is_that_of_the_straight_through_estimator(bits):
    """With c = nearest level - w~ held fixed, q = mean + std (c + (w - mean) / (std + eps))."""
    start = skewed(6, 7).double()
    module = BinaryWeight(start.clone(), bits)
    out = torch.randn(6, 7, dtype=torch.float64)
    (module() * out).sum().backward()
    std = start.std()
    normal = (start - start.mean()) / (std + 1e-5)
    levels = levels_of_the_paper(bits)
    off = levels[(normal.unsqueeze(-1) - levels).abs().argmin(dim=-1)] - normal
    of_std = (out * off).sum() + (out * (start - start.mean())).sum() * 1e-5 / (std + 1e-5) ** 2
    expected = out.mean() + (out - out.mean()) * std / (std + 1e-5)
    expected += of_std * (start - start.mean()) / ((start.numel() - 1) * std)
    torch.testing.assert_close(module.weight.grad, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(expected, out, atol=1e-3)  # the part through the standard deviation is seen


@every_bits
@pytest.mark.parametrize("draw", [torch.randn, torch.rand, skewed, small], ids=lambda draw: draw.__name__)
@torch.no_grad()
def test_parameter_made_from_codes_gives_the_same_weight(bits, draw):
    saved = BinaryWeight(draw(16, 33), bits)
    expected = quantised(saved.weight, bits)
    assert saved.codes.numel() == math.ceil(16 * 33 * bits / 8)
    for loaded in (BinaryWeight(torch.randn(16, 33), bits) for _ in range(3)):
        loaded.load_state_dict(saved.state_dict())
        for mode in (True, False, True, False):
            torch.testing.assert_close(loaded.train(mode)(), expected, rtol=0, atol=1e-5)
        assert loaded.state_dict().keys() == {"codes", "stats"}
        assert torch.equal(loaded.codes, saved.codes), "the same bits after any number of saves"
        torch.testing.assert_close(loaded.stats, saved.stats, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_levels_lie_in_standard_deviations_without_a_constant():
    """The constant keeps the division from zero; the product, and what is saved, have none."""
    weight = small(768, 32)
    module = BinaryWeight(weight.clone(), 1)
    for mode in (True, False):
        level = (module.train(mode)().max() - weight.mean()) / (weight.std() * 0.67449)
        assert level.item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(module.state_dict()["stats"], torch.stack([weight.mean(), weight.std()]))


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@torch.no_grad()
def test_what_is_loaded_counts_more_than_what_was_written_before(mode, assign):
    saved, module = BinaryWeight(torch.randn(16, 32), 2), BinaryWeight(torch.randn(16, 32), 2).train(mode)
    module()
    module.weight.data.add_(1.0)
    module.load_state_dict(saved.state_dict(), assign=assign)
    for again in (mode, not mode, mode):
        torch.testing.assert_close(module.train(again)(), saved(), rtol=0, atol=1e-5)


@torch.no_grad()
def test_parameter_stays_where_codes_were_made_from_it():
    """Rounding, as of another device or of half precision, does not make the parameter jump to the levels."""
    module = BinaryWeight(torch.randn(16, 32), 2).eval()
    before = module.weight.clone()
    module.codes[3] ^= 1  # ... unless codes differ by more than rounding does
    module.train()
    assert not torch.equal(module.weight, before)
    module = BinaryWeight(before.clone(), 2).eval()
    module.stats.mul_(1 + 1e-4)
    assert torch.equal(module.train().weight, before)
    module.to(torch.bfloat16)
    assert torch.equal(module.eval().train().weight, before.to(torch.bfloat16))


def swap_in_place(module, new):
    module.weight.copy_(new)


def through_data(module, new):
    module.weight.data.copy_(new)


def another_storage(module, new):
    module.weight.data = new.clone()


def another_parameter(module, new):
    module.weight = torch.nn.Parameter(new.clone())


def by_elements(module, new):
    """As an initialisation does, which touches no more than it needs."""
    module.weight.data.view(-1)[::2] = new.view(-1)[::2]
    module.weight.data[:, 1::2] = new[:, 1::2]


def through_a_state_dict(module, new):
    module.load_state_dict({"weight": new, **module.state_dict()})


def through_numpy(module, new):
    module.weight.numpy()[...] = new.numpy()


def of_an_average(module, new):
    torch._foreach_lerp_([module.weight], [new], 1.0)


WRITES = [
    swap_in_place, through_data, another_storage, another_parameter, by_elements, through_a_state_dict, through_numpy,
    of_an_average,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("history", ["new", "eval", "train", "used", "loaded", "saved", "half"])
@torch.no_grad()
def test_what_is_written_to_the_parameter_counts(write, history):
    """Whatever was done before, and by whichever way past torch's bookkeeping."""
    module = BinaryWeight(torch.randn(16, 32), 2)
    if history == "loaded":
        module.load_state_dict(BinaryWeight(torch.randn(16, 32), 2).state_dict())
    elif history == "used":
        module(), module.eval()(), module.train()(), module.eval()()
    elif history == "saved":
        module.state_dict()
    elif history == "half":
        module.eval().half().float()
    elif history != "new":
        module.train(history == "train")
    before, old = module.weight.clone(), module().clone()
    new = 0.3 * torch.randn(16, 32) + 0.1
    write(module, new)
    expected = quantised(new, 2)
    for mode in (module.training, False, True, False):
        torch.testing.assert_close(module.train(mode)(), expected, rtol=0, atol=1e-6)
    assert torch.equal(module.weight, new)
    loaded = BinaryWeight(torch.randn(16, 32), 2)
    loaded.load_state_dict(module.state_dict())
    assert torch.equal(loaded.eval()(), module())
    write(module, before)  # weights that were swapped in for an evaluation go out again
    if history == "half":  # whose codes were those of more digits
        old = quantised(before, 2)
    torch.testing.assert_close(module(), old, rtol=0, atol=1e-6)
    torch.testing.assert_close(module.train()(), old, rtol=0, atol=1e-6)


@every_bits
@torch.no_grad()
def test_small_writes_count_as_large_ones_do(bits):
    """An average of weights differs from the last ones by little."""
    module = BinaryWeight(torch.randn(16, 32), bits).eval()
    module.weight.data.mul_(1 + 1e-6)
    assert torch.equal(module(), BinaryWeight(module.weight.clone(), bits).eval()())


@both_methods
@pytest.mark.parametrize("use_buffers", [True, False])
def test_averages_of_weights_are_what_is_evaluated(config_cls, use_buffers):
    """torch's averaging takes buffers along, or copies them."""
    family = FAMILIES["vit"]
    inputs = family.inputs(2)
    model = get_peft_model(family.model(), config_cls(r=8, bits=2, init_weights=False, dropout=0.0)).train()
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=use_buffers)
    optimizer = torch.optim.SGD([module.weight for module in binary_weights(model)], lr=0.5)
    sums = [0.0] * len(binary_weights(model))
    for _ in range(3):
        output_of(model, inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.eval()(**inputs)
            averaged.eval().update_parameters(model)
        sums = [total + module.weight.detach() for total, module in zip(sums, binary_weights(model), strict=True)]
        model.train()
    with torch.no_grad():
        for total, module in zip(sums, binary_weights(averaged), strict=True):
            torch.testing.assert_close(module(), quantised(total / 3, 2), rtol=0, atol=1e-5)


@torch.no_grad()
def test_constant_weight():
    """A matrix of one number has no deviation; it stays finite and is that number."""
    module = BinaryWeight(torch.full((4, 4), 0.5), 1)
    for mode in (True, False):
        torch.testing.assert_close(module.train(mode)(), torch.full((4, 4), 0.5), rtol=0, atol=1e-6)
    loaded = BinaryWeight(torch.randn(4, 4), 1)
    loaded.load_state_dict(module.state_dict())
    torch.testing.assert_close(loaded.train()(), module(), rtol=0, atol=1e-6)


@both
@every_bits
@torch.no_grad()
def test_biadaptformer(name, bits):
    config = BiAdaptFormerConfig(r=4, bits=bits, scale=0.7, init_weights=False)
    (blocks, x, norm), model, actual, _ = adapted(name, config)
    weights = weights_of(model, "biadaptformer_mlp")
    assert len(weights) == DEPTH
    for index, block in enumerate(blocks):
        assert weights[index].keys() == {"down.weight", "up.weight"}, "no biases"
        down, up = (quantised(weights[index][f"{part}.weight"], bits) for part in ("down", "up"))
        assert 2 ** (bits - 1) < len(down.unique()) <= 2**bits
        z = x + block.attention(block.norm(1, x))
        x = z + block.mlp(block.norm(2, z)) + 0.7 * F.relu(z @ down.T) @ up.T
    assert_equal(actual, norm(x))


@both
@every_bits
@torch.no_grad()
def test_bilora(name, bits):
    config = BiLoRAConfig(r=4, bits=bits, scale=0.7, init_weights=False)
    (blocks, x, norm), model, actual, _ = adapted(name, config)
    weights = list(weights_of(model, "bilora_update").values())
    assert len(weights) == 2 * DEPTH
    for index, block in enumerate(blocks):
        for which, factors in zip((0, 2), weights[2 * index : 2 * index + 2], strict=True):
            update = quantised(factors["up.weight"], bits) @ quantised(factors["down.weight"], bits)
            block.qkv[which] = (block.qkv[which][0] + 0.7 * update, block.qkv[which][1])
        x = x + block.attention(block.norm(1, x))
        x = x + block.mlp(block.norm(2, x))
    assert_equal(actual, norm(x))


@both_methods
def test_initialisation(config_cls):
    model = get_peft_model(FAMILIES["vit"].model(), config_cls(r=16))
    slot = {"BiAdaptFormerConfig": "biadaptformer_mlp", "BiLoRAConfig": "bilora_update"}[config_cls.__name__]
    for weights in weights_of(model, slot).values():
        down, up = weights["down.weight"], weights["up.weight"]
        bound = 1 / math.sqrt(WIDTH)  # Kaiming-uniform with a = sqrt 5: sqrt(6 / (1 + 5) / fan_in)
        assert 0.9 * bound < down.abs().max() <= bound
        assert down.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
        assert 1.5e-3 < up.abs().max() <= 2e-3  # cut at two standard deviations ...
        assert up.std().item() == pytest.approx(0.88e-3, rel=0.15)  # ... which leaves 0.88 of one


def test_dropout_acts_in_the_bottleneck():
    model = get_peft_model(FAMILIES["vit"].model(), BiAdaptFormerConfig(r=8, dropout=0.5, init_weights=False))
    equation = model.get_base_model().vit.layers[0].adapters.biadaptformer_mlp["default"].train()
    x = torch.randn(2, 5, WIDTH)
    torch.manual_seed(4)
    actual = equation(x)
    torch.manual_seed(4)
    hidden = F.dropout(F.relu(x @ quantised(equation.down.weight, 1).T), 0.5)
    assert_equal(actual, hidden @ quantised(equation.up.weight, 1).T)


def test_dropout_acts_between_the_factors():
    model = get_peft_model(FAMILIES["vit"].model(), BiLoRAConfig(r=8, scale=0.7, dropout=0.5, init_weights=False))
    equation = model.get_base_model().vit.layers[0].attention.q_proj.bilora_update["default"].train()
    x, y = torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)
    torch.manual_seed(4)
    actual = equation(y, x)
    torch.manual_seed(4)
    hidden = F.dropout(x @ quantised(equation.down.weight, 1).T, 0.5)
    assert_equal(actual, y + 0.7 * hidden @ quantised(equation.up.weight, 1).T)
    assert BiLoRAConfig().dropout == 0.1, "as in the authors' code"


@both_methods
@every_bits
def test_modes_agree_and_a_save_while_training_is_up_to_date(config_cls, bits, tmp_path):
    family = FAMILIES["vit"]
    inputs = family.inputs(2)
    model = get_peft_model(family.model(), config_cls(r=8, bits=bits, init_weights=False, dropout=0.0)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    before = [module.weight.detach().clone() for module in binary_weights(model)]
    for step in range(3):
        output_of(model, inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.save_pretrained(tmp_path / str(step))
    assert all(module.training for module in binary_weights(model))
    assert not any(torch.equal(a, module.weight) for a, module in zip(before, binary_weights(model), strict=True))
    latent = [module.weight.detach().clone() for module in binary_weights(model)]
    with torch.no_grad():
        training = output_of(model, inputs)
        evaluation = output_of(model.eval(), inputs)
        assert_equal(evaluation, training)
        assert_equal(output_of(model.train(), inputs), training)
        loaded = PeftModel.from_pretrained(family.model(), tmp_path / "2").eval()
        assert torch.equal(output_of(loaded, inputs), evaluation)
        earlier = PeftModel.from_pretrained(family.model(), tmp_path / "1").eval()
        assert not torch.allclose(output_of(earlier, inputs), evaluation)
    for start, module in zip(latent, binary_weights(model), strict=True):
        assert torch.equal(start, module.weight), "what trains is not rounded by looking at it"
    names = load_file(tmp_path / "2" / "adapter_model.safetensors").keys()
    assert {name.rpartition(".")[2] for name in names if "classifier" not in name} == {"codes", "stats"}


@both_methods
def test_training_in_evaluation_mode(config_cls, tmp_path):
    """Some train with dropout off by `eval`: gradients come, too, and what is evaluated follows each step."""
    family = FAMILIES["vit"]
    inputs = family.inputs(2)
    model = get_peft_model(family.model(), config_cls(r=8, bits=2, init_weights=False)).eval()
    trained = [module.weight for module in binary_weights(model)]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    outputs = []
    for step in range(3):
        output = output_of(model, inputs)
        output.square().sum().backward()
        assert all(weight.grad is not None and weight.grad.any() for weight in trained)
        with torch.no_grad():
            assert_equal(output_of(model, inputs), output.detach())
        model.save_pretrained(tmp_path / "before")
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            outputs.append(output_of(model, inputs))
            assert not torch.allclose(outputs[-1], output)
            model.save_pretrained(tmp_path / str(step))
            loaded = PeftModel.from_pretrained(family.model(), tmp_path / str(step)).eval()
            assert torch.equal(output_of(loaded, inputs), outputs[-1])
    assert torch.equal(output_of(model.train().eval().requires_grad_(False), inputs), outputs[-1])


def by_peft(family, folder):
    return PeftModel.from_pretrained(family.model(), folder, is_trainable=True)


def by_peft_without_memory(family, folder):
    return PeftModel.from_pretrained(family.model(), folder, is_trainable=True, low_cpu_mem_usage=True)


def by_transformers(family, folder):
    native = family.model()
    native.load_adapter(str(folder))
    return native


def by_transformers_to_train(family, folder):
    native = family.model()
    native.load_adapter(str(folder), is_trainable=True)
    return native


LOADERS = [by_peft, by_peft_without_memory, by_transformers, by_transformers_to_train]


@both_methods
@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("switch", [True, False], ids=["train", "as-loaded"])
def test_training_goes_on_from_what_was_saved(config_cls, load, switch, tmp_path):
    family = FAMILIES["vit"]
    inputs = family.inputs(2)
    torch.manual_seed(2)
    model = get_peft_model(family.model(), config_cls(r=8, bits=2, init_weights=False, dropout=0.0)).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = output_of(model, inputs)
    torch.manual_seed(7)
    loaded = load(family, tmp_path)
    if switch:
        loaded.train()
    output = output_of(loaded, inputs)
    assert_equal(output.detach(), expected)
    with torch.no_grad():
        assert_equal(output_of(loaded.eval(), inputs), expected)
    if load is by_transformers:
        return
    loaded.train()
    trained = [module.weight for module in binary_weights(loaded)]
    assert all(weight.requires_grad for weight in trained)
    optimizer = torch.optim.SGD(trained, lr=0.5)
    output_of(loaded, inputs).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        moved = output_of(loaded, inputs)
        assert not torch.allclose(moved, expected)
        # the step is large, and so is what rounding makes of it; another code of one weight would be far more
        difference = (output_of(loaded.eval(), inputs) - moved).abs().max()
        assert difference <= 1e-4 * moved.abs().max()


def test_what_memory_held_before_is_not_taken_for_the_parameter(tmp_path, monkeypatch):
    """New memory may have held the same matrix, and a part of it may be overwritten."""
    family = FAMILIES["vit"]
    inputs = family.inputs(2)
    model = get_peft_model(family.model(), BiAdaptFormerConfig(r=8, bits=2, init_weights=False, dropout=0.0)).eval()
    model.save_pretrained(tmp_path)
    matrices = [module.weight.detach().clone() for module in binary_weights(model)]
    for matrix in matrices:
        matrix.view(-1)[matrix.abs().view(-1).argsort()[:4]] = 0  # no code changes by that
    empty_like = torch.empty_like

    def used_before(tensor, **kwargs):
        return matrices.pop(0) if tensor.is_meta and "device" in kwargs else empty_like(tensor, **kwargs)

    monkeypatch.setattr(torch, "empty_like", used_before)
    loaded = by_peft_without_memory(family, tmp_path).train()
    assert matrices == []
    with torch.no_grad():
        assert_equal(output_of(loaded, inputs), output_of(model, inputs))


def test_loaded_for_inference_nothing_trains(tmp_path):
    family = FAMILIES["vit"]
    get_peft_model(family.model(), BiAdaptFormerConfig(r=8)).save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(family.model(), tmp_path, low_cpu_mem_usage=low).train()
        assert not any(p.requires_grad for p in loaded.parameters())
        assert not any(p.is_meta for p in loaded.parameters())


@torch.no_grad()
def test_automatic_loading_then_training_mode(tmp_path):
    family = FAMILIES["vit"]
    family.model().save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, BiAdaptFormerConfig(r=8, dropout=0.0, init_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    whole = AutoModelForImageClassification.from_pretrained(str(tmp_path / "adapter"))
    for mode in (True, False):
        assert_equal(output_of(whole.train(mode), family.inputs(2)), output_of(model, family.inputs(2)))


@torch.no_grad()
def test_copies_keep_parameters_and_codes_together():
    family = FAMILIES["vit"]
    model = get_peft_model(family.model(), BiLoRAConfig(r=8, dropout=0.0, init_weights=False)).train()
    expected = output_of(model, family.inputs(2))
    duplicate = copy.deepcopy(model)
    assert_equal(output_of(duplicate.eval(), family.inputs(2)), expected)
    for module in binary_weights(duplicate):
        module.weight.mul_(3).add_(1)
    assert not torch.allclose(output_of(duplicate.eval(), family.inputs(2)), expected)
    assert_equal(output_of(model.eval(), family.inputs(2)), expected)


@both
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@torch.no_grad()
def test_bilora_merges(name, mode):
    family = FAMILIES[name]
    inputs = family.inputs(2)
    config = BiLoRAConfig(r=4, scale=-1.7, dropout=0.0, init_weights=False)
    model = get_peft_model(family.model(), config).train(mode)
    expected = output_of(model, inputs)
    model.merge_adapter()
    assert_equal(output_of(model, inputs), expected)
    model.unmerge_adapter()
    assert_equal(output_of(model, inputs), expected)
    factors = binary_weights(model)[:2]
    query = model.get_base_model().get_submodule(next(iter(weights_of(model, "bilora_update"))).split("model.", 2)[2])
    weight, bias = query.base_layer.weight.clone(), query.base_layer.bias.clone()
    merged = model.merge_and_unload()
    assert_equal(output_of(merged, inputs), expected)
    query = next(m for n, m in merged.named_modules() if n.endswith("q_proj"))
    update = quantised(factors[1].weight, 1) @ quantised(factors[0].weight, 1)
    assert_equal(query.weight, weight - 1.7 * update)
    assert torch.equal(query.bias, bias)


@both_methods
@pytest.mark.parametrize("bits", [0, 3, 8, "1", 1.0, True, None])
def test_bits(config_cls, bits):
    with pytest.raises(ValueError, match=rf"{config_cls.__name__}.bits is {bits!r}: must be one of 1, 2, 4"):
        config_cls(bits=bits)


@both_methods
def test_other_errors(config_cls):
    with pytest.raises(ValueError, match=r"r is 0: must be an integer of at least 1"):
        config_cls(r=0)
    with pytest.raises(ValueError, match=r"scale is nan: must be a finite number"):
        config_cls(scale=float("nan"))
    with pytest.raises(ValueError, match=rf"r is 17: must be an integer from 1 to {WIDTH} \(the backbone's width\)"):
        get_peft_model(FAMILIES["vit"].model(), config_cls(r=17))
    with pytest.raises(ValueError, match=r"dropout is 1\.0: must be a finite number"):
        config_cls(dropout=1.0)


def test_codes_of_another_number_of_bits_are_refused(tmp_path):
    family = FAMILIES["vit"]
    get_peft_model(family.model(), BiAdaptFormerConfig(r=8, bits=2)).save_pretrained(tmp_path)
    config = BiAdaptFormerConfig.from_pretrained(tmp_path)
    config.bits = 1
    with pytest.raises(ValueError, match=r"codes has shape \(32,\) in the file and \(16,\) in the model"):
        PeftModel.from_pretrained(family.model(), tmp_path, config=config)


def test_file_of_vit_b16_is_small(tmp_path):
    """589,824 weights of one bit are 73,728 bytes; 24 means and deviations and the names come on top."""
    with torch.device("meta"):
        vit = ViTForImageClassification(ViTConfig())
    model = get_peft_model(vit, BiAdaptFormerConfig(r=32, bits=1, modules_to_save=[]), low_cpu_mem_usage=True)
    for module in binary_weights(model):
        module.to_empty(device="cpu")
        torch.nn.init.normal_(module.weight)
        module.randomise()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.numel() * value.element_size() for value in weights.values()) == 589_824 // 8 + 24 * 2 * 4
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 100_000
    assert all(len(value.unique()) > 2 for value in weights.values() if value.dtype == torch.uint8)
