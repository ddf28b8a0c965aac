"""Several methods as one adapter: equations, one file, order, and what is refused before weights are touched."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from equations import adapted, assert_equal, both, weights_of
from families import DEPTH, FAMILIES, WIDTH, images, output_of
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from test_prefix import with_prefixes

from hf_visual_peft import (
    AdaptFormerConfig,
    BiLoRAConfig,
    CoLinConfig,
    CompositeConfig,
    CoOpConfig,
    DyTConfig,
    GatedPromptConfig,
    GISTConfig,
    GPSConfig,
    HoulsbyConfig,
    HSTConfig,
    LinearProbeConfig,
    LSTConfig,
    MAMConfig,
    MonaConfig,
    PfeifferConfig,
    PrefixConfig,
    RepAdapterConfig,
    RLRRConfig,
    SharedLoRAConfig,
    SSFConfig,
    STAdapterConfig,
    VFPTConfig,
    VPTConfig,
    VQTConfig,
    list_methods,
    store_prefixes,
)
from hf_visual_peft.coverage.cell import tensors_of
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.coverage.sizes import small_fields


def composite(*parts, **fields):
    return CompositeConfig(parts=list(parts), init_weights=False, **fields)


def put(config, family="vit", seed=3):
    torch.manual_seed(seed)
    return get_peft_model(FAMILIES[family].model(), config).eval()


@torch.no_grad()
def run(model, family="vit"):
    return output_of(model, FAMILIES[family].inputs(2))


def one_by_one(model, parts, methods, family="vit"):
    """The same methods as adapters of their own, with the weights of the parts."""
    base = FAMILIES[family].model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in parts:
            part.modules_to_save = []
            get_peft_model(base, part)
    state = base.state_dict()
    given = {}
    for name, value in model.get_base_model().state_dict().items():
        if ".composite_" in name:
            for label in methods:
                name = name.replace(f".composite_{label}_", f".{label}_")
            given[name] = value
    assert given.keys() <= state.keys()
    base.load_state_dict(given, strict=False)
    return base.eval()


@both
@torch.no_grad()
def test_equation(name):
    """Prompts, LoRA on two linears and a bottleneck after the MLP, in plain torch."""
    lora = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "fc2"])
    config = composite(VPTConfig(num_virtual_tokens=2), lora, PfeifferConfig(r=3))
    (blocks, x, norm), model, actual, family = adapted(name, config)
    prompts, bottlenecks = weights_of(model, "composite_vpt_tokens"), weights_of(model, "composite_pfeiffer_mlp")
    updates = {
        head.removeprefix("base_model.model."): (module.down.weight, module.up.weight)
        for path, module in model.named_modules()
        for head, _, found in [path.partition(".composite_lora_update.default")]
        if found == "" and ".composite_lora_update.default" in path and hasattr(module, "down")
    }
    assert len(updates) == 2 * DEPTH
    for index, block in enumerate(blocks):
        (query,) = (pair for path, pair in updates.items() if f".{index}." in path and path.endswith("q_proj"))
        (last,) = (pair for path, pair in updates.items() if f".{index}." in path and path.endswith("fc2"))
        (weight, bias), *others = block.qkv
        block.qkv = ((weight + 3 * query[1] @ query[0], bias), *others)
        block.fc2 = (block.fc2[0] + 3 * last[1] @ last[0], block.fc2[1])
        p, new = family.prefix, prompts[index]["prompts"].expand(len(x), -1, -1)
        x = torch.cat([x[:, :p], new, x[:, p:]], dim=1)
        x = x + block.attention(block.norm(1, x))
        own, w = block.mlp(block.norm(2, x)), bottlenecks[index]
        hidden = torch.nn.functional.gelu(own @ w["down.weight"].T + w["down.bias"])
        x = x + own + hidden @ w["up.weight"].T + w["up.bias"]
        x = torch.cat([x[:, :p], x[:, p + 2 :]], dim=1)
    assert_equal(actual, norm(x))


SETS = {
    "prompts-low-branch": (
        lambda: [VPTConfig(num_virtual_tokens=2), SharedLoRAConfig(r=2), AdaptFormerConfig(r=3)],
        ("vpt", "sharedlora", "adaptformer"),
    ),
    "scales-prefix": (lambda: [SSFConfig(), PrefixConfig(num_virtual_tokens=2)], ("ssf", "prefix")),
    "shallow-and-deep": (
        lambda: [VPTConfig(num_virtual_tokens=2, deep=False), VFPTConfig(num_virtual_tokens=2)],
        ("vpt", "vfpt"),
    ),
    "tokens-for-a-pyramid": (
        lambda: [VPTConfig(num_virtual_tokens=2), HSTConfig(dims=(4, 6, 8), num_heads=(2, 2, 4))],
        ("vpt", "hst"),
    ),
    "gated": (
        lambda: [GatedPromptConfig(num_virtual_tokens=2), VPTConfig(num_virtual_tokens=3, biases=True)],
        ("gatedprompt", "vpt"),
    ),
    "ladder": (lambda: [AdaptFormerConfig(r=2), LSTConfig(r=4, init="random")], ("adaptformer", "lst")),
}


@pytest.mark.parametrize("parts", SETS.values(), ids=SETS)
@pytest.mark.parametrize("family", ["vit", "dinov2_registers"])
def test_parts_act_as_adapters_of_their_own(parts, family):
    build, methods = parts
    model = put(composite(*build(), modules_to_save=[]), family)
    reference = one_by_one(model, build(), methods, family)
    torch.testing.assert_close(run(model, family), run(reference, family), rtol=0, atol=2e-6)


CANNOT = "(it (trains whole modules|chooses from data|makes the head wider|takes videos)|its loss needs a second pass)"


@pytest.mark.parametrize("name", list_methods())
def test_every_method_is_a_part_or_says_why_not(name):
    """As a part it has the weights and the output that it has alone."""
    method = list_methods()[name]
    fields = small_fields(method.config_cls, method.counts[0][0], WIDTH)
    part = method.config_cls(**fields)
    plain = not (part.whole_modules or part.chooses_from_data or part.widened_head or part.video)
    twice = part.has_auxiliary_loss and "extra_pass" in vars(type(part))
    if not plain or twice:
        with pytest.raises(ValueError, match=rf"{type(part).__name__} cannot be a part: {CANNOT}"):
            CompositeConfig(parts=[part])
        return
    model = put(composite(part, modules_to_save=[]))
    alone = put(method.config_cls(**fields, modules_to_save=[]))
    given = {
        key.replace(f".composite_{name}_", f".{name}_"): value
        for key, value in model.state_dict().items()
        if ".composite_" in key
    }
    assert given.keys() == {key for key in alone.state_dict() if f".{name}_" in key}
    alone.load_state_dict(given, strict=False)
    torch.testing.assert_close(run(model), run(alone), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["swin", "pvt_v2"])
def test_parts_act_as_adapters_of_their_own_in_windows(name):
    entry = MODELS[name]
    parts = [VPTConfig(num_virtual_tokens=2), AdaptFormerConfig(r=3), SharedLoRAConfig(r=2)]
    torch.manual_seed(3)
    model = get_peft_model(entry.model(), composite(*parts, modules_to_save=[])).eval()
    found = tensors_of(entry.call(model, entry.arguments(2)))
    base = entry.model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in parts:
            part.modules_to_save = []
            get_peft_model(base, part)
    weights = {k: v for k, v in model.get_base_model().state_dict().items() if ".composite_" in k}
    base.load_state_dict({k.replace(".composite_", "."): v for k, v in weights.items()}, strict=False)
    expected = tensors_of(entry.call(base.eval(), entry.arguments(2)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_lora_is_that_of_peft():
    for fields in ({"r": 2, "lora_alpha": 5}, {"r": 4, "use_rslora": True, "layers_to_transform": [0, 2]}):
        lora = LoraConfig(**fields, target_modules=["q_proj", "v_proj", "fc1"])
        model = put(composite(lora, modules_to_save=[]))
        reference = get_peft_model(FAMILIES["vit"].model(), lora).eval()
        given = {}
        for name, value in model.state_dict().items():
            if ".composite_lora_update." in name:
                head, _, tail = name.partition(".composite_lora_update.default.")
                given[f"{head}.lora_{'A' if tail.startswith('down') else 'B'}.default.weight"] = value
        assert not reference.load_state_dict(given, strict=False).unexpected_keys
        assert sum("lora_" in name for name, _ in reference.named_parameters()) == len(given)
        torch.testing.assert_close(run(model), run(reference), rtol=0, atol=2e-6)


def test_one_file_one_name(tmp_path):
    """Saved, loaded, switched, disabled and unloaded as one adapter."""
    base = FAMILIES["vit"].model()
    before = run(base)
    model = put(composite(VPTConfig(num_virtual_tokens=2), LoraConfig(r=2), AdaptFormerConfig(r=3)))
    first = run(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "COMPOSITE"
    assert [part["peft_type"] for part in saved["parts"]] == ["VPT", "LORA", "ADAPTFORMER"]
    assert {"num_virtual_tokens": 2, "deep": True, "dropout": 0.0}.items() <= saved["parts"][0].items()
    assert {"r": 2, "lora_alpha": 8}.items() <= saved["parts"][1].items()
    card = (tmp_path / "README.md").read_text()
    assert "VPTConfig(num_virtual_tokens=2" in card
    loaded = PeftModel.from_pretrained(FAMILIES["vit"].model(), tmp_path)
    assert torch.equal(run(loaded), first)
    model.add_adapter("other", composite(SSFConfig(), PrefixConfig(num_virtual_tokens=2)))
    assert torch.equal(run(model), first)
    model.set_adapter("other")
    second = run(model.eval())
    assert not torch.allclose(first, second)
    with model.disable_adapter():
        assert torch.equal(run(model), before)
    with torch.no_grad():
        mixed = model(**images(2), adapter_names=["default", "other"]).logits
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]), rtol=0, atol=1e-5)
    model.set_adapter("default")
    assert torch.equal(run(model), first)
    model.delete_adapter("other")
    assert torch.equal(run(model), first)
    assert torch.equal(run(model.unload()), before)


def test_merges_if_all_parts_do():
    model = put(composite(SharedLoRAConfig(r=2), SSFConfig(), LoraConfig(r=2, target_modules=["fc1", "o_proj"])))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected = run(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(run(model.merge_and_unload()), expected, rtol=0, atol=1e-5)
    model = put(composite(SSFConfig(), AdaptFormerConfig(r=2)))
    with pytest.raises(ValueError, match="composite_adaptformer_mlp cannot be merged"):
        model.merge_and_unload()


def test_merges_what_reads_the_output_of_another_part():
    """RepAdapter before linears folds into them, after what others change there."""
    two = [RepAdapterConfig(r=2), SharedLoRAConfig(r=2)]
    for family, parts in (("vit", two), ("vit", two[::-1]), ("dinov2_registers", two)):
        model = put(composite(*parts), family)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        expected = run(model, family)
        model.merge_adapter()
        torch.testing.assert_close(run(model, family), expected, rtol=0, atol=1e-5)
        model.unmerge_adapter()
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_order_matters_where_parts_meet():
    """Scales before or after an update of the same linear."""
    lora, weights = LoraConfig(r=2, target_modules=["fc2"]), {}
    for parts in ((SSFConfig(), lora), (lora, SSFConfig())):
        model = put(composite(*parts, modules_to_save=[]))
        weights = weights or {n: p.data for n, p in model.named_parameters() if ".composite_" in n}
        model.load_state_dict(weights, strict=False)
        layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.fc2"))
        x = torch.randn(2, layer.in_features)
        update, (scale, shift) = (
            layer.composite_lora_update["default"],
            layer.composite_ssf_output["default"].parameters(),
        )
        delta = 4 * x @ (update.up.weight @ update.down.weight).T
        plain = layer.base_layer(x)
        expected = plain * scale + shift + delta if parts[1] is lora else (plain + delta) * scale + shift
        torch.testing.assert_close(layer(x), expected)
        logits = run(model)
        torch.testing.assert_close(run(model.merge_and_unload()), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([SSFConfig(), RLRRConfig()], r"SSFConfig \(ssf\) acts on the output of .* after RLRRConfig \(rlrr\)"),
        (
            [MonaConfig(r=2), AdaptFormerConfig(r=2)],
            r"MonaConfig \(mona\) reads the stream after the MLP .* after AdaptFormer",
        ),
        ([VPTConfig(layers_to_transform=[3])], r"VPTConfig.layers_to_transform has 3: .*has 3 blocks"),
        ([VPTConfig(layers_to_transform=[0], exclude_modules=["layers.0"])], "the part vpt has no block to act on"),
        ([LoraConfig(target_modules=["nothing"])], r"LoraConfig.target_modules is {'nothing'}: no linear .* has such"),
        ([AdaptFormerConfig(r=1000)], r"AdaptFormerConfig.r is 1000: must be an integer from 1 to"),
    ],
)
def test_refused_before_weights_are_touched(parts, message):
    model = FAMILIES["vit"].model()
    before = [(name, id(module), type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, CompositeConfig(parts=parts))
    assert before == [(name, id(module), type(module)) for name, module in model.named_modules()]
    assert not hasattr(model, "peft_config")


def test_a_part_that_does_not_fit_the_backbone_is_named():
    for name, part in (("resnet", VPTConfig()), ("poolformer", PrefixConfig())):
        with pytest.raises(ValueError, match=type(part).__name__):
            get_peft_model(MODELS[name].model(), CompositeConfig(parts=[SSFConfig(), part]))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], r"CompositeConfig.parts is \[\]: must be a non-empty list"),
        (None, "CompositeConfig.parts is None: must be a non-empty list"),
        ([VPTConfig(), 3], r"parts\[1\]: int cannot be a part, which is a config of a method on"),
        ([CoOpConfig()], r"parts\[0\]: CoOpConfig cannot be a part, which is a config of a method on vision backb"),
        ([LoHaConfig()], r"parts\[0\]: LoHaConfig cannot be a part, which is a config of"),
        ([{"method": "nope"}], r"parts\[0\]: no method 'nope'. Choose one of .*vpt"),
        ([{"method": "vpt", "tokens": 3}], r"parts\[0\]: VPTConfig got an unexpected keyword argument 'tokens'"),
        ([{"method": "vpt", "num_virtual_tokens": 0}], "VPTConfig.num_virtual_tokens is 0"),
        ([LinearProbeConfig()], r"parts\[0\]: LinearProbeConfig cannot be a part: it trains whole modules"),
        ([VPTConfig(init="data")], "VPTConfig cannot be a part: it chooses from data"),
        ([GISTConfig()], "GISTConfig cannot be a part: its loss needs a second pass of the model"),
        ([SSFConfig(), DyTConfig()], r"parts\[1\]: DyTConfig cannot be a part: its loss needs a second pass"),
        ([GPSConfig()], "GPSConfig cannot be a part: it chooses from data"),
        ([VQTConfig()], "VQTConfig cannot be a part: it makes the head wider"),
        ([STAdapterConfig()], "STAdapterConfig cannot be a part: it takes videos"),
        ([SSFConfig(target_modules=["fc1"])], "SSFConfig cannot be a part: it names target_modules"),
        ([VPTConfig(modules_to_save=[])], r"VPTConfig.modules_to_save is \[\], which concerns all parts: set Comp"),
        ([VPTConfig(init_weights=False)], "VPTConfig.init_weights is False, which concerns all parts"),
        ([LoraConfig(modules_to_save=["classifier"])], r"LoraConfig.modules_to_save is \['classifier'\]"),
        ([LoraConfig(use_dora=True)], "LoraConfig.use_dora is True: as a part of an adapter LoRA takes only r, lora_"),
        ([LoraConfig(init_lora_weights="gaussian")], "LoraConfig.init_lora_weights is 'gaussian'"),
    ],
)
def test_bad_parts(parts, message):
    with pytest.raises(ValueError, match=message):
        CompositeConfig(parts=parts)


def test_losses_of_parts_add_up():
    """Each from what its own equations left, also of two parts of one method, and beside parts without a loss."""
    parts = [
        AdaptFormerConfig(r=2),
        CoLinConfig(r=6, rank=3, orthogonality=0.5, layers_to_transform=[0]),
        CoLinConfig(r=4, rank=2, orthogonality=3.0, layers_to_transform=[1, 2]),
    ]
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), CompositeConfig(parts=parts, init_weights=False)).train()
    weights = {"composite_colin_": 0.5, "composite_colin2_": 3.0}
    expected = 0.0
    for name, parameter in model.named_parameters():
        label = next((label for label in weights if label in name), None)
        if label and name.endswith((".down.down", ".up.down", ".down.up", ".up.up")):
            gram = parameter.T @ parameter if name.endswith(".down") else parameter @ parameter.T
            expected = expected + weights[label] * (gram - torch.eye(len(gram))).square().sum()
    labels = torch.tensor([0, 1])
    out = model(**FAMILIES["vit"].inputs(2), labels=labels)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels) + expected)
    out.loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "composite_" in name)
    assert not CompositeConfig().has_auxiliary_loss
    assert not CompositeConfig(parts=[CoLinConfig(orthogonality=0.0)]).has_auxiliary_loss


def test_sizes_by_layer_and_mappings():
    """One method with several sizes is several parts."""
    parts = [
        {"method": "vpt", "num_virtual_tokens": 2, "layers_to_transform": [0, 1]},
        {"method": "VPT", "num_virtual_tokens": 5, "layers_to_transform": [2]},
        {"method": "houlsby", "r": 2, "exclude_modules": ["layers.1"]},
    ]
    model = put(CompositeConfig(parts=parts))
    first, second = weights_of(model, "composite_vpt_tokens"), weights_of(model, "composite_vpt2_tokens")
    assert {i: len(w["prompts"]) for i, w in (first | second).items()} == {0: 2, 1: 2, 2: 5}
    assert weights_of(model, "composite_houlsby_mlp").keys() == {0, 2}
    assert CompositeConfig(parts={"method": "houlsby", "r": 3}).parts == [HoulsbyConfig(r=3)]
    given = VPTConfig(num_virtual_tokens=4)
    assert CompositeConfig(parts=[given]).parts[0] is not given


def test_counts_and_unknown_fields_of_parts(tmp_path):
    model = put(composite(BiLoRAConfig(r=2, bits=2), VPTConfig(num_virtual_tokens=2)))
    model.save_pretrained(tmp_path)
    alone = put(BiLoRAConfig(r=2, bits=2, init_weights=False))
    config = model.peft_config["default"]
    part = config.parts[0]
    for name, value in alone.state_dict().items():
        if ".bilora_" in name:
            renamed = name.replace(".bilora_", ".composite_bilora_")
            assert config.trained_parameters(renamed, value.shape) == part.trained_parameters(name, value.shape)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    saved["parts"][1]["future"] = 1
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    with (
        pytest.warns(UserWarning, match="Unexpected keyword arguments"),
        pytest.raises(ValueError, match="has fields that CompositeConfig does not know: vpt: future"),
    ):
        PeftModel.from_pretrained(FAMILIES["vit"].model(), tmp_path)


def test_parts_start_from_the_backbone_where_their_method_does():
    """LST's side blocks are cut from the backbone's."""
    parts = [VPTConfig(num_virtual_tokens=2), LSTConfig(r=2, init="magnitude")]
    torch.manual_seed(1)
    model = get_peft_model(FAMILIES["vit"].model(), CompositeConfig(parts=parts))
    torch.manual_seed(2)
    alone = get_peft_model(FAMILIES["vit"].model(), LSTConfig(r=2, init="magnitude"))
    found, expected = weights_of(model, "composite_lst_rung"), weights_of(alone, "lst_rung")
    same = [n for n, w in expected[1].items() if w.ndim == 2 and torch.equal(found[1][n], w)]
    assert any("block" in name for name in same), expected[1].keys()
    assert model.peft_config["default"].gradients == "full"
    assert CompositeConfig(parts=[LSTConfig(init="magnitude")]).gradients == "none"


# ---- MAM ---------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("reparam_dim", [None, 5])
@torch.no_grad()
def test_mam(name, reparam_dim):
    config = MAMConfig(num_virtual_tokens=3, reparam_dim=reparam_dim, r=2, scale=1.5, init_weights=False)
    (blocks, x, norm), model, actual, _ = adapted(name, config)
    if reparam_dim is not None:
        store_prefixes(model)
        assert model.peft_config["default"].reparam_dim is None
    prefixes, bottlenecks = weights_of(model, "mam_prefix_heads"), weights_of(model, "mam_mlp_mlp")
    assert not weights_of(model, "mam_prefix_network")
    for index, block in enumerate(blocks):
        x = x + with_prefixes(block, block.norm(1, x), prefixes[index]["keys"], prefixes[index]["values"])
        read, w = block.norm(2, x), bottlenecks[index]
        hidden = torch.relu(read @ w["down.weight"].T + w["down.bias"])
        x = x + block.mlp(read) + 1.5 * (hidden @ w["up.weight"].T + w["up.bias"])
    assert_equal(actual, norm(x))


def test_prefixes_of_a_part_are_stored():
    parts = [PrefixConfig(num_virtual_tokens=2, reparam_dim=4), SharedLoRAConfig(r=2)]
    model = put(composite(*parts))
    expected = run(model)
    store_prefixes(model)
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-6)
    assert model.peft_config["default"].parts[0].reparam_dim is None
    assert parts[0].reparam_dim == 4
    with pytest.raises(ValueError, match="has no MLP that makes prefixes: its config is CompositeConfig"):
        store_prefixes(model)


@pytest.mark.parametrize(
    ("field", "value"), [("num_virtual_tokens", 0), ("reparam_dim", 0), ("r", 0), ("scale", "x"), ("dropout", 1.0)]
)
def test_bad_fields_of_mam(field, value):
    with pytest.raises(ValueError, match=rf"MAMConfig.{field} is {value!r}: must be"):
        MAMConfig(**{field: value})
