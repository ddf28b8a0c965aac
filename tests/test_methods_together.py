"""Methods of any kinds on one model, in any order: each by itself as if the others were part of the backbone."""

from __future__ import annotations

import copy
import io
import itertools
import warnings

import accelerate
import pytest
import torch
from families import FAMILIES, images, liven
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import SwinConfig, SwinForImageClassification, Swinv2Config, Swinv2ForImageClassification

from hf_visual_peft import AdaptFormerConfig, BitFitConfig, LSTConfig, SSFConfig, ViTAdapterConfig, VPTConfig
from hf_visual_peft.sites import BlockAdapters, ModuleLayer


LINEARS = {
    "vit": ["q_proj", "v_proj", "fc1"],
    "swin": ["q_proj", "v_proj", "fc1"],
    "swinv2": ["query", "value", "intermediate.dense"],  # whose MLP has no norm at its entrance
}
SSF_TARGETS = {
    "vit": ["layernorm_before", "layernorm_after", "o_proj", "fc2"],
    "swin": ["layernorm_before", "layernorm_after", "o_proj", "fc2"],
    "swinv2": ["layernorm_before", "layernorm_after", "output.dense"],
}
METHODS = ("prompts", "scales", "lora", "branches")


def model_of(family):
    if family in FAMILIES:
        return FAMILIES[family].model()
    config, kind = {
        "swin": (SwinConfig, SwinForImageClassification),
        "swinv2": (Swinv2Config, Swinv2ForImageClassification),
    }[family]
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2]}
    torch.manual_seed(0)
    return liven(kind(config(**sizes, window_size=4, num_labels=3)))


@pytest.fixture(autouse=True)
def _second_adapters():
    """peft warns whenever a model gets a second adapter, which is what these tests are about."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*(for a second time|Already found a `peft_config`|multiple adapters).*"
        )
        yield


def config(method, family="vit"):
    torch.manual_seed(METHODS.index(method))
    plain = {"init_weights": False, "modules_to_save": []}
    return {
        "prompts": lambda: VPTConfig(num_virtual_tokens=2, **plain),
        "scales": lambda: SSFConfig(target_modules=SSF_TARGETS[family], init_weights=False),
        "lora": lambda: LoraConfig(r=2, target_modules=LINEARS[family], init_lora_weights=False),
        "branches": lambda: AdaptFormerConfig(r=3, **plain),
    }[method]()


def put(base, methods, family="vit"):
    """One `PeftModel` a method around the same base; the weights of a method depend on nothing but the method."""
    models = {}
    for method in methods:
        chosen = config(method, family)
        torch.manual_seed(10 + METHODS.index(method))
        models[method] = get_peft_model(base, chosen).eval()
        generator = torch.Generator().manual_seed(METHODS.index(method))
        prefix = {"prompts": "vpt_", "scales": "ssf_", "lora": "lora_", "branches": "adaptformer_"}[method]
        for name, parameter in base.named_parameters():
            if f".{prefix}" in name:
                start = 1.0 if name.endswith("scale") else 0.0
                parameter.data = start + 0.2 * torch.randn(parameter.shape, generator=generator)
    return models


def run(base, family="vit"):
    with torch.no_grad():
        return base.eval()(**images(2)).logits


def state(base):
    return (
        [(name, id(module), type(module)) for name, module in base.named_modules()],
        {name: value.clone() for name, value in base.state_dict().items()},
        {name: sorted(vars(module)) for name, module in base.named_modules()},
    )


def assert_same_state(base, before):
    modules, weights, attributes = state(base)
    assert modules == before[0]
    assert attributes == before[2]
    assert weights.keys() == before[1].keys()
    assert all(torch.equal(weights[name], value) for name, value in before[1].items())
    for module in base.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def merged_in(methods, family="vit"):
    """The base with these methods merged into its weights by peft, or taken as they are, one after the other."""
    base = model_of(family)
    for method in methods:
        base = put(base, [method], family)[method].merge_and_unload()
    return base


@pytest.mark.parametrize("order", itertools.permutations(METHODS), ids="-".join)
def test_every_order_gives_the_same_answers_and_leaves_the_base(order):
    base = model_of("vit")
    before, expected = state(base), run(base)
    models = put(base, order)
    reference = merged_in(["scales", "lora"])
    put(reference, [method for method in order if method in ("prompts", "branches")])
    torch.testing.assert_close(run(base), run(reference), rtol=0, atol=2e-6)
    for method in order[1:] + order[:1]:
        models[method].unload()
    assert_same_state(base, before)
    assert torch.equal(run(base), expected)


@pytest.mark.parametrize("family", ["swin", "swinv2"])
@pytest.mark.parametrize("order", [("branches", "scales", "lora"), ("lora", "branches", "scales")], ids="-".join)
def test_branches_read_what_other_methods_make_of_the_block(order, family):
    """Also where they came first, and where the MLP reads the stream without a norm."""
    base = model_of(family)
    put(base, order, family)
    reference = merged_in(["scales", "lora"], family)
    put(reference, ["branches"], family)
    torch.testing.assert_close(run(base, family), run(reference, family), rtol=0, atol=5e-6)


def test_each_is_switched_off_and_taken_out_by_itself():
    base = model_of("vit")
    models = put(base, METHODS)
    for method in ("prompts", "branches", "scales"):
        without = put(model_of("vit"), [m for m in METHODS if m != method])["lora"]
        expected = run(without)
        together = run(base)
        with models[method].disable_adapter():
            torch.testing.assert_close(run(base), expected, rtol=0, atol=0)
        assert torch.equal(run(base), together)
        c = copy.deepcopy(models[method])
        c.unload()
        assert torch.equal(run(c.get_base_model()), expected)
    assert any(isinstance(m, BlockAdapters) for m in base.modules())
    models["lora"].unload()
    assert not any("lora" in name for name, _ in base.named_modules())
    torch.testing.assert_close(
        run(base), run(put(model_of("vit"), ["prompts", "scales", "branches"])["prompts"]), rtol=0, atol=0
    )


def test_each_is_saved_and_loaded_by_itself(tmp_path):
    base = model_of("vit")
    models = put(base, METHODS)
    expected = run(base)
    for method in ("prompts", "scales", "branches"):
        models[method].save_pretrained(tmp_path / method)
        alone = PeftModel.from_pretrained(model_of("vit"), tmp_path / method)
        assert torch.equal(run(alone), run(put(model_of("vit"), [method])[method]))
    again = model_of("vit")
    put(again, ["lora"])
    for method in ("branches", "prompts", "scales"):
        PeftModel.from_pretrained(again, tmp_path / method)
    torch.testing.assert_close(run(again), expected, rtol=0, atol=2e-6)


def test_each_is_merged_by_itself():
    base = model_of("vit")
    models = put(base, ["prompts", "scales", "branches"])
    expected = run(base)
    models["scales"].merge_adapter()
    torch.testing.assert_close(run(base), expected, rtol=0, atol=2e-6)
    models["scales"].unmerge_adapter()
    assert torch.equal(run(base), expected)
    assert models["scales"].merge_and_unload() is base
    assert not any(isinstance(module, ModuleLayer) for module in base.modules())
    torch.testing.assert_close(run(base), expected, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="cannot be merged: it is not an affine change"):
        models["prompts"].merge_and_unload()
    torch.testing.assert_close(run(base), expected, rtol=0, atol=2e-6)
    models["branches"].unload()
    torch.testing.assert_close(run(base), run(put(merged_in(["scales"]), ["prompts"])["prompts"]), rtol=0, atol=2e-6)


def test_merging_one_of_two_on_the_same_linear_is_refused():
    base = model_of("vit")
    scales = get_peft_model(base, SSFConfig(init_weights=False, modules_to_save=[])).eval()
    get_peft_model(base, BitFitConfig(init_weights=False, modules_to_save=[]), adapter_name="biases").eval()
    expected = run(base)
    with pytest.raises(ValueError, match="Cannot merge: bitfit_biases acts on .*too, and the result depends"):
        scales.merge_and_unload()
    assert torch.equal(run(base), expected)


def test_a_layer_of_peft_between_this_librarys_and_the_linear():
    """SSF acts on what LoRA makes of a linear; LoRA is merged and taken out from under it."""
    base = model_of("vit")
    lora = put(base, ["lora"])["lora"]
    scales = get_peft_model(base, SSFConfig(init_weights=False, modules_to_save=[]), adapter_name="scales")
    expected = run(base)
    weights = {name: p for name, p in scales.state_dict().items() if ".ssf_" in name}
    reference = get_peft_model(merged_in(["lora"]), SSFConfig(modules_to_save=[]), adapter_name="scales")
    reference.load_state_dict(weights, strict=False)
    torch.testing.assert_close(run(reference), expected, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="Cannot merge: Linear acts on Linear"):
        scales.merge_and_unload()
    assert torch.equal(run(base), expected)
    again = copy.deepcopy(scales)
    lora.merge_and_unload()
    assert not any("lora" in name for name, _ in base.named_modules())
    torch.testing.assert_close(run(base), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(run(scales.merge_and_unload()), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(run(again.unload()), run(put(model_of("vit"), ["lora"])["lora"]), rtol=0, atol=0)


def test_layers_of_peft_go_inside_whichever_came_first():
    """A linear with SSF and LoRA is the same in both orders, and each leaves by itself."""
    first, second = model_of("vit"), model_of("vit")
    lora = LoraConfig(r=2, target_modules=["o_proj", "fc2"], init_lora_weights=False)
    plain = SSFConfig(target_modules=SSF_TARGETS["vit"], init_weights=False)
    torch.manual_seed(6)
    put(first, ["scales"])
    expected = run(first)
    after = get_peft_model(first, copy.deepcopy(lora), adapter_name="low")
    assert {name for name, p in first.named_parameters() if p.requires_grad} == {
        name for name, _ in first.named_parameters() if "lora_" in name or ".ssf_" in name
    }
    weights = {name: value for name, value in first.state_dict().items() if "lora_" in name or ".ssf_" in name}
    get_peft_model(second, copy.deepcopy(lora), adapter_name="low")
    get_peft_model(second, copy.deepcopy(plain))
    assert not second.load_state_dict(weights, strict=False).unexpected_keys
    together = run(first)
    assert not torch.allclose(together, expected, atol=1e-4)
    assert torch.equal(run(second), together)
    after.merge_adapter()
    torch.testing.assert_close(run(first), together, rtol=0, atol=2e-6)
    after.unmerge_adapter()
    torch.testing.assert_close(run(first), together, rtol=0, atol=2e-6)
    after.unload()
    assert any(isinstance(module, ModuleLayer) for module in first.modules())
    torch.testing.assert_close(run(first), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("order", [("scales", "low"), ("low", "scales")], ids="-".join)
def test_a_file_of_peft_has_the_same_names_whatever_is_around(tmp_path, order):
    def add(base, name):
        torch.manual_seed(8)
        if name == "low":
            lora = LoraConfig(r=2, target_modules=["o_proj", "fc2"], init_lora_weights=False)
            return get_peft_model(base, lora, adapter_name="low")
        return get_peft_model(base, SSFConfig(init_weights=False, modules_to_save=[]))

    base, alone = model_of("vit"), model_of("vit")
    models = {name: add(base, name) for name in order}
    expected = add(alone, "low")
    models["low"].save_pretrained(tmp_path)
    expected.save_pretrained(tmp_path / "alone")
    saved, plain = (load_file(folder / "low/adapter_model.safetensors") for folder in (tmp_path, tmp_path / "alone"))
    assert saved.keys() == plain.keys()
    assert all(torch.equal(saved[name], plain[name]) for name in saved)
    again = model_of("vit")
    add(again, "scales")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        PeftModel.from_pretrained(again, tmp_path / "low", adapter_name="low")
    assert torch.equal(run(again), run(base))


def test_an_adapter_of_peft_waits_until_others_are_unmerged():
    base = model_of("vit")
    scales = put(base, ["scales"])["scales"]
    scales.merge_adapter()
    merged, before = run(base), state(base)
    with pytest.raises(ValueError, match="An adapter is merged into .* before 'low' is added"):
        get_peft_model(base, LoraConfig(target_modules=["fc2"]), adapter_name="low")
    assert state(base)[0] == before[0]
    assert torch.equal(run(base), merged)


def test_a_layer_of_peft_inside_one_that_two_modules_hold():
    """The module that is listed first is not the one that is held first."""
    torch.manual_seed(0)
    shared, x = torch.nn.Linear(3, 3), torch.randn(2, 3)
    net = torch.nn.Sequential(torch.nn.Sequential(shared), torch.nn.Tanh(), shared)
    get_peft_model(net, SSFConfig(target_modules=["0.0"], init_weights=False))
    assert net[2] is net[0][0]
    get_peft_model(net, LoraConfig(r=2, target_modules=["0.0"], init_lora_weights=False), adapter_name="low")
    assert net[2] is net[0][0]
    lora, scales = net[2].base_layer, net[2]
    delta = lora.get_delta_weight("low")
    assert delta.any()
    weight, bias = shared.weight + delta, shared.bias

    def expected(x):
        scale, shift = (p for name, p in scales.named_parameters() if ".ssf_output." in f".{name}")
        return (x @ weight.T + bias) * scale + shift

    torch.testing.assert_close(net(x), expected(torch.tanh(expected(x))))


def test_layers_stay_where_they_were_where_peft_refuses():
    base = model_of("vit")
    scales = put(base, ["scales"])["scales"]
    before = state(base)
    with pytest.raises(ValueError, match="Target modules .*nothing.* not found"):
        get_peft_model(base, LoraConfig(target_modules=["nothing"]), adapter_name="low")
    assert state(base)[0] == before[0]
    assert torch.equal(run(base), run(scales))


def test_weights_of_a_linear_change_with_a_layer_of_peft_around_it():
    base = model_of("vit")
    put(base, ["lora"])
    torch.manual_seed(5)
    biases = get_peft_model(base, BitFitConfig(init_weights=False, modules_to_save=[]), adapter_name="biases")
    weights = {name: p for name, p in biases.state_dict().items() if ".bitfit_" in name}
    reference = get_peft_model(merged_in(["lora"]), BitFitConfig(modules_to_save=[]), adapter_name="biases")
    reference.load_state_dict(weights, strict=False)
    torch.testing.assert_close(run(reference), run(base), rtol=0, atol=2e-6)


def test_adapters_of_one_name_are_told_apart():
    """All are called "default"; a second one of a method replaces the first of that method only."""
    base = model_of("vit")
    models = put(base, ["prompts", "branches"])
    expected = run(base)
    models["prompts"].add_adapter("more", VPTConfig(num_virtual_tokens=3, init_weights=False, modules_to_save=[]))
    assert torch.equal(run(base), expected)
    models["prompts"].set_adapter("more")
    switched = run(base)
    assert not torch.allclose(switched, expected)
    models["branches"].set_adapter("default")
    assert torch.equal(run(base), switched)
    models["prompts"].set_adapter("default")
    assert torch.equal(run(base), expected)
    models["prompts"].delete_adapter("default")
    assert models["prompts"].active_adapters == ["more"]
    assert torch.equal(run(base), switched)
    assert all("default" in m.adaptformer_mlp for m in base.modules() if isinstance(m, BlockAdapters))


def test_two_methods_train_one_copy_of_the_head():
    base = model_of("vit")
    before = state(base)
    prompts = get_peft_model(base, VPTConfig(num_virtual_tokens=2))
    scales = get_peft_model(base, SSFConfig())
    copies = [name for name, p in base.named_parameters() if "modules_to_save" in name and p.requires_grad]
    assert copies == ["classifier.modules_to_save.default.weight", "classifier.modules_to_save.default.bias"]
    prompts.unload()
    assert copies == [name for name, p in base.named_parameters() if "modules_to_save" in name and p.requires_grad]
    scales.unload()
    assert_same_state(base, before)


@pytest.mark.parametrize("first", ["side", "scales"])
def test_gradients_cross_blocks_beside_a_side_network_where_something_in_them_trains(first):
    fields = {"init_weights": False, "modules_to_save": []}
    configs = {"side": LSTConfig(r=2, **fields), "scales": SSFConfig(**fields)}
    torch.manual_seed(0)
    base = model_of("vit")
    for name in (first, *configs.keys() - {first}):
        model = get_peft_model(base, configs[name])
    model.train()
    base(**images(2)).logits.square().sum().backward()
    gradients = {name: p.grad for name, p in base.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    inside = [g for name, g in gradients.items() if "layers.0." in name and ".ssf_" in name]
    assert len(inside) > 0
    assert all(gradient.any() for gradient in inside)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(reentrant):
    found = []
    for checkpointing in (False, True):
        base = model_of("vit")
        put(base, METHODS)
        base.train()
        if checkpointing:
            base.enable_input_require_grads()
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        base(**images(2)).logits.square().sum().backward()
        found.append({name: p.grad for name, p in base.named_parameters() if p.requires_grad})
    prefixes = ("vpt_", "ssf_", "lora_", "adaptformer_")
    assert all(any(f".{prefix}" in name for name in found[0]) for prefix in prefixes)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_compiled_copied_and_pickled():
    base = model_of("vit")
    models = put(base, METHODS)
    expected = run(base)
    again = copy.deepcopy(base)
    assert torch.equal(run(again), expected)
    theirs, ours = ({id(m) for m in model.modules()} for model in (again, base))
    assert not theirs & ours
    file = io.BytesIO()
    torch.save(models["branches"], file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(run(loaded), expected)
    assert type(loaded.get_base_model().vit.layers[0]).__name__ == "ViTLayer"
    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(base, fullgraph=True, backend="eager")), expected)
    models["scales"].unload()
    assert torch.equal(run(again), expected), "a copy has hooks of its own"


def test_a_model_is_not_compiled_with_hooks_in_old_places():
    base = model_of("vit")
    put(base, ["branches"])
    layer = base.vit.layers[0]
    get_peft_model(
        base, LoraConfig(target_modules=["layernorm_after"], init_lora_weights=False) if False else config("lora")
    )
    layer.layernorm_after = torch.nn.Sequential(layer.layernorm_after)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="Call the model once before it is compiled"):
        run(torch.compile(base, fullgraph=True, backend="eager"))
    run(base)
    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(base, fullgraph=True, backend="eager")), run(base))


@pytest.mark.parametrize("first", [False, True], ids=["adapters first", "hooks first"])
def test_offloading_by_accelerate(first):
    base = model_of("vit")
    expected = run(put(model_of("vit"), METHODS)["lora"])
    plain = run(base)
    models = {} if first else put(base, METHODS)
    accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    if first:
        assert torch.equal(run(base), plain)
        accelerate.hooks.remove_hook_from_submodules(base)
        models = put(base, METHODS)
        accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    torch.testing.assert_close(run(base), expected)
    accelerate.hooks.remove_hook_from_submodules(base)
    for method in reversed(METHODS):
        models[method].unload()
    assert torch.equal(run(base), plain)
    assert "forward" not in vars(base.vit.layers[0])


def test_hooks_that_accelerate_puts_around_a_block():
    """Before adapters, after them, and taken off while they are there."""

    class Seen(accelerate.hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Seen.calls += 1
            return args, kwargs

    for before in (True, False):
        base = model_of("vit")
        plain, block = run(base), base.vit.layers[1]
        if before:
            accelerate.hooks.add_hook_to_module(block, Seen())
        models = put(base, ["prompts", "branches"])
        expected = run(put(model_of("vit"), ["prompts", "branches"])["prompts"])
        if not before:
            accelerate.hooks.add_hook_to_module(block, Seen())
        Seen.calls = 0
        assert torch.equal(run(base), expected)
        assert Seen.calls == 1
        models["prompts"].unload()
        models["branches"].unload()
        assert torch.equal(run(base), plain)
        assert Seen.calls == 2
        accelerate.hooks.remove_hook_from_module(block)
        assert torch.equal(run(base), plain)
        assert Seen.calls == 2


def test_by_transformers_own_methods(tmp_path):
    """`add_adapter`, `set_adapter`, `delete_adapter` and `load_adapter`, with methods of three kinds."""
    base = model_of("vit")
    plain = run(base)
    names = {"scales": "scales", "prompts": "prompts", "branches": "branches"}
    alone = {}
    for method in names:
        base.add_adapter(config(method), adapter_name=method)
        alone[method] = run(base)
    base.set_adapter(list(names))
    together = run(base)
    for method, expected in alone.items():
        base.set_adapter(method)
        assert torch.equal(run(base), expected)
        base.save_pretrained(tmp_path / method)
    base.disable_adapters()
    assert torch.equal(run(base), plain)
    base.enable_adapters()
    base.set_adapter(list(names))
    assert torch.equal(run(base), together)
    base.delete_adapter("prompts")
    base.delete_adapter("branches")
    base.set_adapter("scales")
    assert torch.equal(run(base), alone["scales"])
    again = model_of("vit")
    for method in ("branches", "scales", "prompts"):
        again.load_adapter(str(tmp_path / method), adapter_name=method)
        again.set_adapter(method)
        assert torch.equal(run(again), alone[method])


def test_the_whole_block_trains_beside_others():
    """All parameters of a block as differences, with other layers around some of them."""
    fields = {"channels": 4, "train_backbone": True, "modules_to_save": []}
    for family in ("vit", "dinov2"):
        base = model_of(family)
        plain = run(base, family)
        model = get_peft_model(base, LoraConfig(target_modules=r".*(query|q_proj)"))
        get_peft_model(base, ViTAdapterConfig(**fields))
        assert torch.equal(run(base, family), plain)
        base(**images(2)).logits.square().sum().backward()
        addends = {n: p for n, p in base.named_parameters() if ".vitadapter_block." in n}
        assert not any("base_layer" in name or "lora" in name for name in addends)
        assert all(
            p.grad is not None and p.grad.any()
            for n, p in addends.items()
            if "k_proj__bias" not in n and "key__bias" not in n
        )
        assert model is not None
