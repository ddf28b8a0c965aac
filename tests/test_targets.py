"""Explicit targets: which modules they name, what stands there, and what is not a target."""

import copy
import re

import pytest
import torch
from families import DEPTH, FAMILIES, WIDTH, images
from peft import PeftConfig, PeftModel, get_layer_status, get_peft_model, inject_adapter_in_model
from torch import nn

import hf_visual_peft
from hf_visual_peft import RepAdapterConfig, SSFConfig
from hf_visual_peft.core.targets import ANY_CHANNELS, LINEARS, TargetedConfig


METHODS = {
    name: method.config_cls
    for name, method in hf_visual_peft.list_methods().items()
    if issubclass(method.config_cls, TargetedConfig)
}
LINEAR_ONLY = {name: config for name, config in METHODS.items() if config.valid_targets == LINEARS}
ON_CHANNELS = {name: config for name, config in METHODS.items() if config.valid_targets == ANY_CHANNELS}
every_method = pytest.mark.parametrize("config_cls", METHODS.values(), ids=METHODS)
MLP = 2 * WIDTH
LINEAR_PATHS = r"vit\.layers\.\d\.(attention\.[qkvo]_proj|mlp\.fc[12])"


def vit():
    return FAMILIES["vit"].model()


def linears():
    return [path for path, module in vit().named_modules() if isinstance(module, nn.Linear)]


def adapted(config_cls, base=None, **fields):
    torch.manual_seed(1)
    return get_peft_model(vit() if base is None else base, config_cls(**fields)).eval()


def logits(model):
    with torch.no_grad():
        return model(**images(2)).logits


def own_parameters(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_methods_that_have_targets():
    of_all = {"adapterbias", "bilora", "consolidator", "fact", "hydra", "kradapter", "mlae", "repadapter", "samparser"}
    assert LINEAR_ONLY.keys() == {*of_all, "snell"}
    assert ON_CHANNELS.keys() == {"bitfit", "rlrr", "ssf"}


# ------------------------------------------------------------------ which modules


@every_method
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["q_proj", "mlp.fc2"]}, r"vit\.layers\.\d\.(attention\.q_proj|mlp\.fc2)"),
        ({"target_modules": r"vit\.layers\.[02]\..*fc1"}, r"vit\.layers\.[02]\.mlp\.fc1"),
        ({"target_modules": "all-linear"}, rf"{LINEAR_PATHS}|classifier"),
        ({"target_modules": "all-linear", "modules_to_save": ["classifier"]}, LINEAR_PATHS),
        ({"target_modules": "all-linear", "exclude_modules": ["fc2", "classifier"]}, r"vit.*(_proj|fc1)"),
        ({"target_modules": "all-linear", "exclude_modules": r".*fc\d"}, r"vit.*_proj|classifier"),
        ({"target_modules": ["fc1"], "layers_to_transform": [1, 2]}, r"vit\.layers\.[12]\.mlp\.fc1"),
        (
            {"target_modules": ["fc1"], "layers_to_transform": 2, "layers_pattern": "layers"},
            r"vit\.layers\.2\.mlp\.fc1",
        ),
    ],
)
def test_named_modules(config_cls, fields, expected, tmp_path):
    model = adapted(config_cls, **fields, init_weights=False)
    wanted = [path for path in linears() if re.fullmatch(expected, path)]
    kept = fields.get("modules_to_save", [])
    assert wanted
    assert [layer.name.removeprefix("model.") for layer in get_layer_status(model)] == [*wanted, *kept]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(vit(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


@every_method
def test_all_linear_names_the_linears_of_the_first_adapter_again(config_cls):
    model = adapted(config_cls, target_modules="all-linear", init_weights=False)
    model.add_adapter("second", config_cls(target_modules="all-linear", init_weights=False))
    layers = get_layer_status(model)
    assert [layer.name.removeprefix("model.") for layer in layers] == linears()
    assert {tuple(layer.available_adapters) for layer in layers} == {("default", "second")}


@every_method
def test_models_without_roles_and_by_injection(config_cls):
    base = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    model = inject_adapter_in_model(config_cls(target_modules=["0"], init_weights=False), copy.deepcopy(base))
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert not torch.allclose(model(x), base(x))


# ------------------------------------------------------------------ what stands there


@every_method
def test_the_identity_at_the_start_trains_switches_off_and_merges(config_cls):
    base = logits(vit())
    fields = {"target_modules": "all-linear", "exclude_modules": ["classifier"]}
    assert torch.allclose(logits(adapted(config_cls, **fields)), base, rtol=1e-5, atol=1e-6)
    model = adapted(config_cls, **fields)
    optimizer = torch.optim.Adam(own_parameters(model).values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**images(2)).logits.square().sum().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in own_parameters(model).values())
    trained = logits(model)
    assert not torch.allclose(trained, base, rtol=1e-3, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(".base_layer" in name for name, _ in merged.named_modules())
    assert torch.allclose(logits(merged), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "fields", "each"),
    [
        ("adapterbias", {}, (WIDTH + 1) + MLP),
        ("bilora", {"r": 3}, 3 * (WIDTH + MLP) + 1),
        ("bitfit", {}, MLP),
        ("consolidator", {}, WIDTH * MLP // (WIDTH // 2) + MLP),
        ("consolidator", {"groups": 4}, WIDTH * MLP // 4 + MLP),
        ("fact", {"r": 3}, 2 * 3 * 3 + 2 * 3 * WIDTH / DEPTH),
        ("fact", {"r": 3, "variant": "tk"}, 2 * 3 + (2 * 3 * WIDTH + 3**3) / DEPTH),
        ("hydra", {"r": 3}, (3 * (WIDTH + MLP) + 3 + MLP) + (3 * (MLP + MLP) + 3 + MLP)),
        ("repadapter", {"r": 4, "groups": 2}, 4 * WIDTH + 4 + 4 * WIDTH // 2 + WIDTH),
        ("rlrr", {}, WIDTH + MLP + MLP),
        ("snell", {"r": 4}, 4 * (WIDTH + MLP) + 1),
        ("ssf", {}, 2 * MLP),
    ],
)
def test_counts_at_one_linear(name, fields, each):
    model = adapted(METHODS[name], target_modules=["fc1"], **fields)
    assert sum(p.numel() for p in own_parameters(model).values()) == DEPTH * each


@pytest.mark.parametrize(("size", "groups"), [((6, 4), 1), ((12, 8), 2), ((9, 3), 3), ((8, 8), 4)])
def test_groups_of_a_consolidator(size, groups):
    model = adapted(METHODS["consolidator"], nn.Sequential(nn.Linear(*size)), target_modules=["0"])
    assert {len(p) for name, p in own_parameters(model).items() if name.endswith("weight")} == {groups}


@pytest.mark.parametrize("variant", ["tt", "tk"])
def test_fact_at_all_linears_of_the_blocks_is_fact_by_role(variant):
    fields = {"variant": variant, "r": 4, "init_weights": False, "modules_to_save": []}
    by_role = adapted(METHODS["fact"], **fields)
    named = adapted(METHODS["fact"], target_modules="all-linear", exclude_modules=["classifier"], **fields)
    weights = {name.replace("factors", f"factors{WIDTH}"): p for name, p in own_parameters(by_role).items()}
    named.load_state_dict(weights, strict=False)
    assert weights.keys() == own_parameters(named).keys()
    assert torch.equal(logits(named), logits(by_role))


def test_fact_shares_among_linears_of_one_width():
    base = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 9))
    model = adapted(METHODS["fact"], base, target_modules="all-linear", r=2)
    factors = {name.partition("fact_")[2] for name in own_parameters(model) if "factors" in name}
    assert factors == {f"factors{width}.default.{part}.weight" for width in (4, 6) for part in "uv"}


@torch.no_grad()
def test_repadapter_maps_the_input_and_several_compose():
    linear = nn.Linear(6, 4)
    config = RepAdapterConfig(r=4, target_modules=["0"], init_weights=False)
    model = adapted(RepAdapterConfig, nn.Sequential(copy.deepcopy(linear)), **config_fields(config))
    model.add_adapter("second", config)
    layer = model.base_model.model[0]
    first, second = (layer.repadapter_input[name].equation for name in ("default", "second"))
    x = torch.randn(2, 5, 6)
    assert torch.equal(model(x), linear(first(x)))
    model.base_model.set_adapter(["default", "second"])
    expected = linear(first(second(x)))
    assert torch.equal(model(x), expected)
    for names in (["default"], ["second"]):
        model.merge_adapter(adapter_names=names)
    assert torch.allclose(model(x), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, linear.weight)


def config_fields(config):
    return {"r": config.r, "target_modules": config.target_modules, "init_weights": config.init_weights}


@torch.no_grad()
def test_repadapter_beside_another_method_on_the_same_linear():
    """Whatever the order in which they come, the output is that of the merged model."""
    repadapter = RepAdapterConfig(r=4, target_modules=["0"], init_weights=False)
    rlrr = METHODS["rlrr"](target_modules=["0"], init_weights=False)
    x = torch.randn(2, 6)
    for configs in ((repadapter, rlrr), (rlrr, repadapter)):
        model = nn.Sequential(nn.Linear(6, 4))
        for number, config in enumerate(configs):
            model = inject_adapter_in_model(copy.deepcopy(config), model, adapter_name=f"adapter{number}")
        model = model.eval()
        model[0].set_adapter(["adapter0", "adapter1"])
        expected = model(x)
        assert not torch.allclose(expected, model[0].get_base_layer()(x), atol=1e-2)
        model[0].merge()
        assert torch.allclose(model(x), expected, atol=1e-5)


def test_repadapter_by_role_and_by_target_does_not_merge_into_one_linear():
    model = adapted(RepAdapterConfig, modules_to_save=[], init_weights=False)
    model.add_adapter("named", RepAdapterConfig(target_modules=["q_proj"], init_weights=False))
    with pytest.raises(ValueError, match="by role and by target_modules both fold into Linear"):
        model.merge_adapter()
    model.delete_adapter("named")
    model.merge_adapter()


@pytest.mark.filterwarnings("ignore:.*gets a bias by merging")
@pytest.mark.parametrize("config_cls", LINEAR_ONLY.values(), ids=LINEAR_ONLY)
@torch.no_grad()
def test_convolutions_that_are_linears(config_cls):
    convolution = nn.Conv2d(6, 4, 1, bias=False)
    linear = nn.Linear(6, 4, bias=False)
    linear.weight.copy_(convolution.weight.flatten(1))
    x = torch.randn(2, 6, 5, 3)
    outputs = []
    for base, given in ((convolution, x), (linear, x.movedim(1, -1))):
        model = adapted(config_cls, nn.Sequential(base), target_modules=["0"], init_weights=False)
        outputs.append(model(given))
        merged = model.merge_and_unload()
        assert torch.allclose(merged(given), outputs[-1], atol=1e-5)
    assert torch.allclose(outputs[0].movedim(1, -1), outputs[1], atol=1e-5)


@pytest.mark.parametrize("config_cls", ON_CHANNELS.values(), ids=ON_CHANNELS)
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (lambda: nn.Conv1d(3, 4, 2), (2, 3, 5)),
        (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), (2, 4, 5, 5)),
        (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
        (lambda: nn.LayerNorm(6), (2, 5, 6)),
        (lambda: nn.BatchNorm2d(3), (2, 3, 4, 4)),
        (lambda: nn.GroupNorm(2, 4), (2, 4, 3, 3)),
    ],
)
@torch.no_grad()
def test_convolutions_and_norms(config_cls, module, shape):
    base, x = nn.Sequential(nn.Identity(), module()).eval(), torch.randn(shape)
    expected = base(x)
    assert torch.allclose(adapted(config_cls, copy.deepcopy(base), target_modules=["1"])(x), expected)
    model = adapted(config_cls, base, target_modules=["1"], init_weights=False)
    output = model(x)
    assert output.shape == expected.shape
    assert not torch.allclose(output, expected, atol=1e-3)
    assert torch.allclose(model.merge_and_unload()(x), output, atol=1e-5)


def test_an_adapter_comes_in_the_mode_of_the_model():
    config = RepAdapterConfig(target_modules=["fc1"], dropout=0.5, init_weights=False)
    model = get_peft_model(vit().eval(), config)
    assert torch.equal(logits(model), logits(model))
    model = get_peft_model(vit().train(), config)
    assert not torch.equal(logits(model), logits(model))


# ------------------------------------------------------------------ no targets


@every_method
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": []}, r"target_modules is set\(\): must be None or not empty"),
        ({"target_modules": ""}, r"target_modules is '': must be None or not empty"),
        ({"target_modules": 3}, r"target_modules is 3: must be None, names, a regular expression, or"),
        ({"target_modules": ["fc1", 3]}, r"target_modules is \['fc1', 3\]"),
        ({"target_modules": "*fc1"}, r"target_modules is '\*fc1': must be a regular expression"),
        ({"target_modules": ".*fc1", "layers_to_transform": [0]}, r"layers_to_transform is \[0\]: must be None where"),
        ({"target_modules": ["fc1"], "layers_pattern": "layers"}, r"layers_pattern is 'layers': must be None"),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, r"layers_pattern is 'layers': must be None"),
    ],
)
def test_fields_that_are_no_targets(config_cls, fields, message):
    with pytest.raises(ValueError, match=rf"{config_cls.__name__}\.{message}"):
        config_cls(**fields)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        *((name, {"target_modules": ["fc1", "dropout"]}, "is a Dropout; valid are") for name in METHODS),
        *(
            (name, {"target_modules": ["fc1", "projection"]}, f"is a Conv2d; valid are {LINEARS}")
            for name in LINEAR_ONLY
        ),
        ("ssf", {"target_modules": ["vit"]}, "'vit' is a ViTModel; valid are linears, convolutions"),
        ("ssf", {"target_modules": ["no_such"]}, "no_such"),
        ("ssf", {"target_modules": ["fc1"], "exclude_modules": ["mlp.fc1"]}, "excluded"),
        (
            "ssf",
            {"target_modules": ["fc1"], "layers_to_transform": [0, 3]},
            "layers_to_transform has 3: no list of blocks has any of fc1",
        ),
        (
            "ssf",
            {"target_modules": ["fc1"], "layers_to_transform": [0], "layers_pattern": "blocks"},
            "layers_to_transform has 0: no list of blocks 'blocks' has any of fc1",
        ),
        ("repadapter", {"target_modules": ["fc1"], "groups": 3, "r": 6}, "groups is 3: must be a divisor of in_feat"),
        ("consolidator", {"target_modules": ["fc1"], "groups": 3}, "groups is 3: must divide in_features 16"),
    ],
)
def test_targets_that_do_not_fit_leave_the_model_as_it_is(name, fields, message):
    model = vit()
    modules = {path: id(module) for path, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, METHODS[name](**fields))
    assert modules == {path: id(module) for path, module in model.named_modules()}


def test_a_sublayer_is_no_choice_beside_targets():
    with pytest.raises(ValueError, match=r"sublayers is \('mlp',\): must be left out where target_modules is given"):
        RepAdapterConfig(target_modules=["fc1"], sublayers="mlp")


def test_modules_that_others_hold_or_use_without_calling():
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(ValueError, match=r"'0\.out_proj' belongs to a MultiheadAttention.*exclude_modules"):
        get_peft_model(nn.Sequential(attention, nn.Linear(4, 4)), SSFConfig(target_modules="all-linear"))
    transposed = nn.Sequential(nn.ConvTranspose2d(4, 4, 2))
    with pytest.raises(ValueError, match="'0' is a ConvTranspose2d; valid are"):
        get_peft_model(transposed, SSFConfig(target_modules=["0"]))


def test_bitfit_where_no_target_has_a_bias():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="BitFitConfig: nothing of Sequential would train"):
        get_peft_model(net, METHODS["bitfit"](target_modules=["0"]))
    model = get_peft_model(net, METHODS["bitfit"](target_modules=["0", "1"]))
    assert [p.numel() for p in own_parameters(model).values()] == [4]


@every_method
def test_a_config_comes_back_from_its_file(config_cls, tmp_path):
    config = config_cls(target_modules=["fc1", "fc2"], layers_to_transform=[0], layers_pattern="layers")
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert again == config
    assert again.target_modules == {"fc1", "fc2"}
