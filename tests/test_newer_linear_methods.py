"""APLA, MLAE, SAM-PARSER, KRAdapter and CaRA at every linear that they act on, against plain torch; and bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, WIDTH, output_of
from peft import PeftModel, get_peft_model, get_peft_model_state_dict

from hf_visual_peft import APLAConfig, CaRAConfig, KRAdapterConfig, MLAEConfig, SAMPARSERConfig
from hf_visual_peft.coverage.cell import tensors_of
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.sites import ModuleLayer


ROLES = ("query", "key", "value", "output", "fc1", "fc2")


def apla(equation, x, weight, shared):
    added = torch.zeros(len(x), len(weight))
    for place, channel in enumerate(equation.channels.indices.tolist()):
        added[:, channel] = x @ equation.rows[place] + equation.shift[place]
    return added


def mlae(equation, x, weight, shared):
    experts = zip(equation.weights, equation.down, equation.up, strict=True)
    return sum(factor * torch.outer(x @ a, b) for factor, a, b in experts)


def samparser(equation, x, weight, shared):
    left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    return x @ (left @ (sigma + equation.delta).diag() @ right - weight).T


def kradapter(equation, x, weight, shared):
    rows = [torch.kron(b, a) for a, b in zip(equation.inner, equation.outer, strict=True)]
    product = torch.stack(rows)[:, : max(weight.shape)]
    return 2.0 * x @ (product if len(weight) <= weight.shape[1] else product.T).T


def cara(equation, x, weight, shared):
    if equation.bias is None:
        heads, channels = len(shared.heads), len(shared.channels)
        delta = torch.empty(heads, channels, weight.shape[1])
        for h in range(heads):
            for c in range(channels):
                factors = shared.ranks * equation.weights[0] * shared.heads[h] * shared.channels[c]
                delta[h, c] = shared.read @ factors
        update = x @ delta.flatten(0, 1).T
        return torch.nn.functional.pad(
            update, (equation.rows.start, len(weight) - equation.rows.start - heads * channels)
        )
    parts = [shared.rows @ (shared.ranks_of_others * k).diag() @ shared.columns.T for k in equation.weights]
    delta = torch.cat(parts)
    delta = delta.T if weight.shape[1] > len(weight) else delta
    return x @ delta.T + shared.biases[equation.bias]


METHODS = {
    "apla": (APLAConfig(r=3, init_weights=False), apla),
    "mlae": (MLAEConfig(r=3, roles=ROLES, init_weights=False), mlae),
    "samparser": (SAMPARSERConfig(init_weights=False), samparser),
    "kradapter": (KRAdapterConfig(roles=ROLES, init_weights=False), kradapter),
    "cara": (CaRAConfig(r=3, init_weights=False), cara),
}


@pytest.mark.parametrize("name", ["dinov2_with_registers", "swin", "timm_vit"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_every_linear_computes_the_equation(method, name):
    config, formula = METHODS[method]
    tiny = MODELS[name]
    torch.manual_seed(0)
    model = get_peft_model(tiny.model(), copy.deepcopy(config)).eval()
    compared = []

    def compare(layer, args, output):
        base = layer.get_base_layer()
        x = args[0].flatten(0, -2)
        expected = base(x)
        for equation in layer.equations_of("default"):
            expected = expected + formula(equation.module, x, base.weight, *(equation.shared or (None,)))
        scale = expected.abs().max().item()
        torch.testing.assert_close(output.flatten(0, -2), expected, rtol=0, atol=1e-5 * scale)
        compared.append((output.flatten(0, -2) - base(x)).abs().max() > 1e-3)

    for module in model.modules():
        if isinstance(module, ModuleLayer):
            module.register_forward_hook(compare)
    before = tensors_of(tiny.call(model, tiny.arguments(2)))
    assert len(compared) >= 2
    assert all(compared)
    merged = model.merge_and_unload(safe_merge=True)
    for actual, expected in zip(tensors_of(tiny.call(merged, tiny.arguments(2))), before, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_rows_of_apla_are_drawn_once_and_saved(tmp_path):
    family = FAMILIES["vit"]
    torch.manual_seed(0)
    models = [get_peft_model(family.model(), APLAConfig(r=3, init_weights=bool(n))).eval() for n in range(2)]
    chosen = [[b for name, b in model.named_buffers() if name.endswith("indices")] for model in models]
    assert len({tuple(indices.tolist()) for model in chosen for indices in model}) > 1
    models[0].save_pretrained(tmp_path)
    torch.manual_seed(1)
    for kwargs in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(family.model(), tmp_path, **kwargs).eval()
        with torch.no_grad():
            assert torch.equal(output_of(loaded, family.inputs(2)), output_of(models[0], family.inputs(2)))


def test_experts_of_mlae_are_masked_in_training_only():
    family = FAMILIES["vit"]
    torch.manual_seed(0)
    model = get_peft_model(family.model(), MLAEConfig(r=4, expert_dropout=0.5, init_weights=False))
    with torch.no_grad():
        assert not torch.equal(*(output_of(model.train(), family.inputs(1)) for _ in range(2)))
        assert torch.equal(*(output_of(model.eval(), family.inputs(1)) for _ in range(2)))


def test_changes_of_singular_values_fit_only_their_weight(tmp_path):
    family = FAMILIES["vit"]
    model = get_peft_model(family.model(), SAMPARSERConfig(init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = output_of(model, family.inputs(2))
        for kwargs in ({}, {"low_cpu_mem_usage": True}):
            loaded = PeftModel.from_pretrained(family.model(), tmp_path, **kwargs).eval()
            torch.testing.assert_close(output_of(loaded, family.inputs(2)), expected, rtol=1e-4, atol=1e-5)
    other = family.model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    with pytest.raises(ValueError, match="singular values belong to another weight"):
        PeftModel.from_pretrained(other, tmp_path)
    with pytest.raises(ValueError, match="singular values belong to another weight"):
        PeftModel.from_pretrained(family.model().to(torch.bfloat16), tmp_path)
    weights = get_peft_model_state_dict(model)
    size = sum(model.peft_config["default"].trained_parameters(k, tuple(v.shape)) for k, v in weights.items())
    assert size == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: APLAConfig(r=0), "APLAConfig.r is 0: must be an integer of at least 1"),
        (lambda: MLAEConfig(roles=("query", "gate")), "MLAEConfig.roles is .*must be one or more of 'query'"),
        (lambda: MLAEConfig(expert_dropout=1.0), "MLAEConfig.expert_dropout is 1.0"),
        (lambda: MLAEConfig(scale=float("inf")), "MLAEConfig.scale is inf"),
        (lambda: SAMPARSERConfig(roles=()), "SAMPARSERConfig.roles"),
        (lambda: KRAdapterConfig(roles="q"), "KRAdapterConfig.roles"),
        (lambda: KRAdapterConfig(scale="2"), "KRAdapterConfig.scale is '2'"),
        (lambda: CaRAConfig(std=-1.0), "CaRAConfig.std is -1.0: must be a finite number of at least 0"),
        (lambda: CaRAConfig(r=True), "CaRAConfig.r is True"),
        (lambda: CaRAConfig(dropout=-0.1), "CaRAConfig.dropout is -0.1"),
    ],
)
def test_bad_fields(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_more_rows_than_the_linear_has():
    model = FAMILIES["vit"].model()
    with pytest.raises(
        ValueError, match=rf"APLAConfig.r is {WIDTH + 1}: must be an integer from 1 to {WIDTH} \(the out"
    ):
        get_peft_model(model, APLAConfig(r=WIDTH + 1))
    assert not any(isinstance(module, ModuleLayer) for module in model.modules())
