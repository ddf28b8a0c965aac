"""Modules that several equations of an adapter share: kept, saved and trained once, and each adapter's own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from equations import assert_equal
from families import DEPTH, FAMILIES, WIDTH, output_of
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_backbone import OWN, OwnClassifier
from test_reparameter import kronecker
from torch import nn

from hf_visual_peft import (
    ARCConfig,
    EFFTConfig,
    FacTConfig,
    KAdaptationConfig,
    SharedLoRAConfig,
    get_method,
    parameter_groups,
)
from hf_visual_peft.backbones.architectures.table import _ARCHITECTURES


FAMILY = FAMILIES["vit"]
# config; shared modules in a model of three blocks, and in one block of it
SHARING = {
    "fact-tt": (FacTConfig(r=4), {"factors"}, {"factors"}),
    "fact-tk": (FacTConfig(variant="tk", r=4), {"factors"}, {"factors"}),
    "sharedlora": (SharedLoRAConfig(r=4), {"down0", "down1", "down2"}, {"down1"}),
    "efft": (EFFTConfig(r=4), {"attention", "mlp"}, {"attention", "mlp"}),
    "arc": (ARCConfig(r=4), {"attention", "mlp"}, {"attention", "mlp"}),
    "kadaptation": (KAdaptationConfig(n=4), {"rules"}, {"rules"}),
}
every_sharing = pytest.mark.parametrize(("config", "names", "in_one_block"), SHARING.values(), ids=SHARING)


def random_config(config, **fields):
    return dataclasses.replace(config, init_weights=False, **fields)


def adapted(config, **fields):
    torch.manual_seed(3)
    return get_peft_model(FAMILY.model(), random_config(config, **fields)).eval()


@torch.no_grad()
def run(model):
    return output_of(model, FAMILY.inputs(2))


def holders(names, method, shared):
    """{shared module: modules of the backbone under which names of its weights stand}."""
    found = {}
    for name in names:
        head, _, tail = name.partition(f".{method}_")
        if tail.partition(".")[0] in shared:
            found.setdefault(tail.partition(".")[0], set()).add(head)
    return found


def shared_parameters(model, method, shared, adapter="default"):
    return [
        p for n, p in model.named_parameters() for s in shared if f".{method}_{s}.{adapter}." in n and p.numel() > 0
    ]


@every_sharing
@pytest.mark.parametrize("layers", [None, [1]], ids=["all", "one"])
def test_saved_once(config, names, in_one_block, layers, tmp_path):
    names = names if layers is None else in_one_block
    method = config.method_type.lower()
    model = adapted(config, layers_to_transform=layers)
    expected = run(model)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    found = holders(weights, method, names)
    assert found.keys() == names
    assert all(len(paths) == 1 for paths in found.values())
    assert sum(t.numel() for t in weights.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    if layers:
        assert all(".layers.1." in path for paths in found.values() for path in paths)
    loaded = PeftModel.from_pretrained(FAMILY.model(), tmp_path).eval()
    assert torch.equal(run(loaded), expected)
    native = FAMILY.model()
    native.load_adapter(str(tmp_path))
    assert_equal(run(native), expected)
    # what was loaded is what the equations use
    for loaded_model in (loaded, native):
        before = run(loaded_model)
        with torch.no_grad():
            for parameter in shared_parameters(loaded_model, method, names):
                parameter.zero_()
        assert not torch.allclose(run(loaded_model), before)


@every_sharing
def test_trained_once(config, names, in_one_block):
    """One parameter in the optimizer, with the gradient of all its uses."""
    method = config.method_type.lower()
    model = adapted(config)
    parameters = shared_parameters(model, method, names)
    optimized = [id(p) for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert len(optimized) == len(set(optimized))
    assert {id(p) for p in parameters} <= set(optimized)
    output_of(model, FAMILY.inputs(2)).square().sum().backward()
    whole = {id(p): p.grad.clone() for p in parameters}
    assert all(gradient.any() for gradient in whole.values())
    # what belongs to one block has nothing from others
    common = [p for p in parameters if method != "sharedlora" and p.ndim > 1]
    last = model.get_base_model().vit.layers[-1]
    last.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
    model.zero_grad()
    output_of(model, FAMILY.inputs(2)).square().sum().backward()
    for parameter in common:
        assert parameter.grad.any()  # the last block has its part of the gradient
        assert not torch.allclose(parameter.grad, whole[id(parameter)])  # and it is not all


@every_sharing
def test_two_adapters_have_their_own(config, names, in_one_block):
    method = config.method_type.lower()
    model = adapted(config, modules_to_save=[], layers_to_transform=[0, 1])
    first = run(model)
    size = {"n": 2} if method == "kadaptation" else {"r": 3}
    model.add_adapter("second", random_config(config, modules_to_save=[], layers_to_transform=[1, 2], **size))
    assert torch.equal(run(model), first)
    model.base_model.set_adapter(["default", "second"])
    both = run(model.eval())
    model.set_adapter("second")
    second = run(model.eval())
    assert not torch.allclose(both, first)
    assert not torch.allclose(both, second)
    with torch.no_grad():
        for parameter in shared_parameters(model, method, names, "second"):
            parameter.add_(0.5)
    assert not torch.allclose(run(model), second)
    model.set_adapter("default")
    assert torch.equal(run(model.eval()), first)
    # gone with its adapter: another of the same name gets a new one
    model.delete_adapter("second")
    assert not shared_parameters(model, method, names, "second")
    model.add_adapter("second", random_config(config, modules_to_save=[]))
    model.set_adapter("second")
    assert run(model.eval()).isfinite().all()
    model.base_model.set_adapter(["default", "second"])
    merged = run(model.eval())
    assert_equal(run(model.merge_and_unload(safe_merge=True)), merged)


@every_sharing
def test_dtype_and_copies_follow(config, names, in_one_block):
    method = config.method_type.lower()
    model = adapted(config)
    expected = run(model)
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    inputs = {"pixel_values": FAMILY.inputs(2)["pixel_values"].to(torch.bfloat16)}
    with torch.no_grad():
        half = output_of(model, inputs)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.1 * expected.abs().max().item())
    model.to(torch.float64)
    inputs = {"pixel_values": FAMILY.inputs(2)["pixel_values"].double()}
    with torch.no_grad():
        before = output_of(model, inputs)
        assert before.dtype == torch.float64
        for parameter in shared_parameters(model, method, names):
            parameter.zero_()
        assert not torch.allclose(output_of(model, inputs), before)


@every_sharing
def test_the_next_keeps_it_where_the_first_is_excluded(config, names, in_one_block):
    method = config.method_type.lower()
    first = ["layers.0.layernorm_before", "layers.0.attention.q_proj", "layers.0.mlp.fc1"]
    model = adapted(config, exclude_modules=first)
    found = holders((n for n, _ in model.named_parameters()), method, names)
    assert found.keys() == names
    assert all(len(paths) == 1 and not next(iter(paths)).endswith(tuple(first)) for paths in found.values())
    assert not torch.allclose(run(model), run(FAMILY.model()))


def test_counts_are_of_what_is_shared_once():
    """By hand for the tiny model: width 16, MLP of `hidden` channels, three blocks."""
    hidden = FAMILY.model().config.intermediate_size
    ratio = hidden // WIDTH
    expected = {
        "fact-tt": 2 * WIDTH * 4 + DEPTH * (4 + 2 * ratio) * 4 * 4,
        "fact-tk": 2 * WIDTH * 4 + 4**3 + DEPTH * (4 + 2 * ratio) * 4,
        "sharedlora": DEPTH * (WIDTH + 3 * WIDTH) * 4,
        "efft": 2 * WIDTH * 4 + 4 * 4**2 + (WIDTH + hidden) * 4 + 2 * 4**2,
        "arc": 2 * WIDTH * 4 + 2 * DEPTH * (4 + WIDTH),
        "kadaptation": DEPTH * (2 * 4 * (4 + 4) + WIDTH) + 4 * 4**2,
    }
    for name, (config, _, _) in SHARING.items():
        model = get_peft_model(FAMILY.model(), dataclasses.replace(config, modules_to_save=[]))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected[name], name
    assert all(get_method(name.partition("-")[0]).mergeable for name in SHARING)


@pytest.fixture
def _own_architecture(monkeypatch):
    monkeypatch.setitem(_ARCHITECTURES["vision"], "OwnViT", OWN)


@pytest.mark.usefixtures("_own_architecture")
@torch.no_grad()
def test_fused_projections():
    """The rows of queries, keys and values, in this order, get the updates that separate linears get."""
    width = 8

    def merged_update(config):
        torch.manual_seed(1)
        base = OwnClassifier().eval()
        old = base.vit.body[1].qkv.weight.clone(), base.vit.body[1].qkv.bias.clone()
        model = get_peft_model(base, config).eval()
        pixels = torch.randn(2, 3, 16, 8)
        expected = model(pixels)
        names = {key.removeprefix("base_model.model."): p.clone() for key, p in model.named_parameters()}
        merged = model.merge_and_unload()
        assert_equal(merged(pixels), expected)
        qkv = merged.vit.body[1].qkv
        return names, qkv.weight - old[0], qkv.bias - old[1]

    def close(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)

    for variant in ("tt", "tk"):
        p, weight, bias = merged_update(FacTConfig(variant=variant, r=4, init_weights=False))
        u, v = (p[f"vit.body.0.qkv.fact_factors.default.{f}.weight"] for f in "uv")
        if variant == "tt":
            inner = p["vit.body.1.qkv.fact_slices.default.s.weight"].split(4)
        else:
            core = p["vit.body.0.qkv.fact_factors.default.core"]
            inner = [(core @ k).T for k in p["vit.body.1.qkv.fact_slices.default.p"].T]
        close(weight, torch.cat([v @ s @ u for s in inner]))
        assert len(inner) == 3
        assert not bias.any()

    p, weight, _ = merged_update(SharedLoRAConfig(r=4, init_weights=False))
    b, a = p["vit.body.1.qkv.sharedlora_up.default.up.weight"], p["vit.body.1.qkv.sharedlora_down1.default.weight"]
    assert b.shape == (3 * width, 4)
    close(weight, b @ a)

    p, weight, _ = merged_update(EFFTConfig(r=4, init_weights=False))
    u, core, v = (p[f"vit.body.0.qkv.efft_attention.default.{f}"] for f in ("u", "core", "v"))
    close(weight, torch.cat([(u @ core[..., k] @ v).T for k in range(3)]))

    p, weight, bias = merged_update(KAdaptationConfig(n=2, init_weights=False))
    rules = {k.partition(".default.")[2]: w for k, w in p.items() if "kadaptation_rules" in k}
    for role, start in (("query", 0), ("value", 2 * width)):
        own = {side: p[f"vit.body.1.qkv.kadaptation_{role}.default.{side}"] for side in ("left", "right")}
        close(weight[start : start + width], 160 * kronecker(rules, role, own).T)
        close(bias[start : start + width], rules["bias.1"])
    assert weight[:width].any()
    assert not weight[width : 2 * width].any()
    assert not bias[width : 2 * width].any()


@torch.no_grad()
def test_efft_is_one_update_for_all_blocks():
    base, model = FAMILY.model(), get_peft_model(FAMILY.model(), EFFTConfig(r=4, init_weights=False))
    merged = model.merge_and_unload()
    for name in ("attention.q_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"):
        pairs = [
            (m.get_submodule(name).weight, b.get_submodule(name).weight)
            for m, b in zip(merged.vit.layers, base.vit.layers, strict=True)
        ]
        first, *others = (new - old for new, old in pairs)
        assert first.any()
        for other in others:
            torch.testing.assert_close(other, first, rtol=0, atol=1e-6)


def test_blocks_that_cannot_share():
    model = FAMILIES["vit"].model()
    model.vit.layers[1].mlp.fc1, model.vit.layers[1].mlp.fc2 = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
    with pytest.raises(ValueError, match=r"share is \(32, 16\), and vit.layers.1.mlp.fc1 has 32 rows of 16|8 rows"):
        get_peft_model(model, EFFTConfig(r=4))
    model.vit.layers[1].attention.v_proj = nn.Linear(WIDTH, 8)
    with pytest.raises(ValueError, match=r"v_proj has 8 rows; the shared bias has 16"):
        get_peft_model(model, KAdaptationConfig(n=4))
