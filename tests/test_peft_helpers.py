"""peft's public helpers on models with adapters of every method, as on one with LoRA."""

import copy
import re

import pytest
import torch
from families import FAMILIES, images
from peft import (
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import inspect_matched_modules
from peft.utils.hotswap import hotswap_adapter

import hf_visual_peft
from hf_visual_peft import SSFConfig
from hf_visual_peft.core.targets import TargetedConfig
from hf_visual_peft.sites import BlockAdapters


METHODS = {name: method for name, method in hf_visual_peft.list_methods().items() if not method.video}
# two sizes for a backbone of width 16; methods that are not here have no size to choose
SIZES = {
    "adapterplus": ({"r": 2}, {"r": 4}),
    "adaptformer": ({"r": 2}, {"r": 4}),
    "apla": ({"r": 2}, {"r": 4}),
    "apt": ({"num_virtual_tokens": 2}, {"num_virtual_tokens": 3}),
    "arc": ({"r": 2}, {"r": 4}),
    "autovp": ({"inner_size": 16}, {"inner_size": 24}),
    "bapat": ({"r": 2, "attention_r": 2}, {"r": 4, "attention_r": 4}),
    "biadaptformer": ({"r": 2}, {"r": 4}),
    "bilora": ({"r": 2}, {"r": 4}),
    "cara": ({"r": 2}, {"r": 4}),
    "colin": ({"rank": 2}, {"rank": 4}),
    "compacter": ({"r": 2, "n": 2}, {"r": 4, "n": 2}),
    "consolidator": ({"groups": 2}, {"groups": 4}),
    "convlora": ({"r": 2}, {"r": 4}),
    "convpass": ({"r": 2}, {"r": 4}),
    "cvpt": ({"num_virtual_tokens": 2}, {"num_virtual_tokens": 3}),
    "davpt": ({"num_virtual_tokens": 2}, {"num_virtual_tokens": 3}),
    "dtl": ({"r": 2}, {"r": 4}),
    "dyt": ({"r": 2}, {"r": 4}),
    "e2vpt": ({"num_virtual_tokens": 2, "pieces": 4}, {"num_virtual_tokens": 3, "pieces": 4}),
    "e3va": ({"r": 4, "rank": 2}, {"r": 8, "rank": 1}),
    "efft": ({"r": 2}, {"r": 4}),
    "ett": ({"num_virtual_tokens": 2, "reparam_dim": 3}, {"num_virtual_tokens": 2, "reparam_dim": 5}),
    "evp": ({"r": 2}, {"r": 4}),
    "evppixel": ({"width": 3}, {"width": 4}),
    "fact": ({"r": 2}, {"r": 4}),
    "gatedprompt": ({"num_virtual_tokens": 2}, {"num_virtual_tokens": 3}),
    "gist": ({"r": 2}, {"r": 4}),
    "gps": ({"k": 1}, {"k": 2}),
    "houlsby": ({"r": 2}, {"r": 4}),
    "hst": ({"num_virtual_tokens": 1}, {"num_virtual_tokens": 2}),
    "hydra": ({"r": 2}, {"r": 4}),
    "ilmvp": ({"inner_size": 16}, {"inner_size": 24}),
    "kadaptation": ({"n": 2}, {"n": 4}),
    "laeadapter": ({"r": 2}, {"r": 4}),
    "laelora": ({"r": 2}, {"r": 4}),
    "laeprefix": ({"num_virtual_tokens": 2}, {"num_virtual_tokens": 3}),
    "last": ({"r": 2}, {"r": 4}),
    "lorand": ({"r": 4, "rank": 2}, {"r": 8, "rank": 1}),
    "lorvp": ({"r": 2}, {"r": 4}),
    "lst": ({"r": 2}, {"r": 4}),
    "mam": ({"num_virtual_tokens": 2, "r": 2}, {"num_virtual_tokens": 3, "r": 4}),
    "mlae": ({"r": 2}, {"r": 4}),
    "mona": ({"r": 2}, {"r": 4}),
    "mosa": ({"r": 2}, {"r": 4}),
    "partial": ({"k": 1}, {"k": 2}),
    "patt": ({"r": 2}, {"r": 4}),
    "pfeiffer": ({"r": 2}, {"r": 4}),
    "prefix": ({"num_virtual_tokens": 2}, {"num_virtual_tokens": 3}),
    "provp": ({"num_virtual_tokens": 2}, {"num_virtual_tokens": 3}),
    "repadapter": ({"r": 2}, {"r": 4}),
    "restuning": ({"r": 2}, {"r": 4}),
    "sharedlora": ({"r": 2}, {"r": 4}),
    "sherl": ({"r": 4}, {"r": 6}),
    "sidetuning": ({"channels": 4}, {"channels": 8}),
    "snell": ({"r": 2}, {"r": 4}),
    "snf": ({"num_flows": 1}, {"num_flows": 2}),
    "sparsetuning": ({"r": 2, "inner": 1, "groups": 2}, {"r": 4, "inner": 1, "groups": 2}),
    "spt": ({"r": 2}, {"r": 4}),
    "unipt": ({"r": 4}, {"r": 8}),
    "vapt": ({"num_virtual_tokens": 2}, {"num_virtual_tokens": 3}),
    "vfpt": ({"num_virtual_tokens": 2}, {"num_virtual_tokens": 3}),
    "vp": ({"width": 3}, {"width": 4}),
    "vpt": ({"num_virtual_tokens": 2}, {"num_virtual_tokens": 3}),
    "vqt": ({"num_virtual_tokens": 2}, {"num_virtual_tokens": 3}),
}
every_method = pytest.mark.parametrize("name", METHODS)
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def vit():
    return FAMILIES["vit"].model()


def config_of(name, which=0, **fields):
    sizes = SIZES.get(name, ({}, {}))[which]
    return METHODS[name].config_cls(**sizes, **fields)


def adapted(name, which=0, seed=1, **kwargs):
    """The tiny ViT with an adapter of random weights."""
    torch.manual_seed(seed)
    return get_peft_model(vit(), config_of(name, which, init_weights=False), **kwargs).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(**images(2)).logits


def trainable(model):
    return {key for key, parameter in model.named_parameters() if parameter.requires_grad}


def of_method(name, named):
    return {key: tensor for key, tensor in named if f".{name}_" in key}


# ------------------------------------------------------------------ status


@every_method
def test_layer_and_model_status(name, capsys):
    model = adapted(name)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    status = get_model_status(model)
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.available_adapters == ["default"]
    assert status.requires_grad == {"default": True}
    assert status.devices == {"default": ["cpu"]}
    assert status.trainable_params == count > 0
    layers = get_layer_status(model)
    assert len(layers) == status.num_adapter_layers > 0
    assert {"default"} == {adapter for layer in layers for adapter in layer.available_adapters}
    holders = {key.rpartition(f".{name}_")[0] for key in of_method(name, model.named_parameters())}
    assert holders <= {f"base_model.model.{layer.name.removeprefix('model.')}" for layer in layers}
    model.print_trainable_parameters()
    assert f"trainable params: {count:,} || " in capsys.readouterr().out
    with model.disable_adapter():
        assert get_model_status(model).enabled is False
    assert get_model_status(model).enabled is True


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.mergeable])
def test_status_of_a_merged_model(name):
    model = get_peft_model(vit(), config_of(name, init_weights=False, modules_to_save=[]))  # the head does not merge
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["default"]
    assert {tuple(layer.merged_adapters) for layer in get_layer_status(model)} == {("default",)}
    model.unmerge_adapter()
    assert get_model_status(model).merged_adapters == []


@every_method
def test_set_requires_grad(name):
    model = adapted(name)
    before = trainable(model)
    model.set_requires_grad("default", requires_grad=False)
    assert not trainable(model)
    assert get_model_status(model).requires_grad == {"default": False}
    model.set_requires_grad("default")
    assert trainable(model) == before


# ------------------------------------------------------------------ several adapters


@pytest.mark.parametrize("name", SIZES)
def test_two_adapters_of_different_size(name):
    """Each answers as it does alone; the second takes the first's place and goes without leaving a trace."""
    first, second = adapted(name), adapted(name, which=1, seed=2)
    model = adapted(name)
    assert torch.equal(logits(model), logits(first))
    model.add_adapter("second", copy.deepcopy(second.peft_config["default"]))
    assert model.active_adapters == ["default"]
    assert get_model_status(model).requires_grad == {"default": True, "second": False}
    set_peft_model_state_dict(model, get_peft_model_state_dict(second), adapter_name="second")
    assert torch.equal(logits(model), logits(first))
    model.set_adapter("second")
    assert model.active_adapters == ["second"]
    assert get_model_status(model).requires_grad == {"default": False, "second": True}
    assert torch.equal(logits(model), logits(second))
    assert not torch.equal(logits(first), logits(second))

    model.set_adapter("default")
    model.delete_adapter("second")
    assert get_model_status(model).available_adapters == ["default"]
    assert get_peft_model_state_dict(model).keys() == get_peft_model_state_dict(first).keys()
    assert not [key for key in model.state_dict() if ".second." in key]
    assert torch.equal(logits(model), logits(first))


def test_every_method_with_a_size_is_there():
    sized = {"r", "rank", "k", "num_virtual_tokens", "num_flows", "groups"}
    assert {name for name, m in METHODS.items() if sized & m.config_cls.__dataclass_fields__.keys()} <= SIZES.keys()


@every_method
def test_delete_the_only_adapter(name):
    """What is left computes as the base model; as with peft's methods, the PeftModel cannot be called any more."""
    model = adapted(name)
    model.delete_adapter("default")
    assert not of_method(name, model.state_dict().items())
    assert torch.equal(logits(model.base_model.model), logits(vit()))


@every_method
def test_hotswap_is_refused_by_peft(name, tmp_path):
    model = adapted(name)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"Hotswapping only supports LORA but {name.upper()} was passed"):
        hotswap_adapter(model, str(tmp_path), "default")
    native = vit()
    native.load_adapter(str(tmp_path))
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        native.load_adapter(str(tmp_path), adapter_name="default", hotswap=True)


# ------------------------------------------------------------------ ways in


@every_method
def test_inject_adapter_in_model(name):
    """As in a PeftModel, and its weights go from model to model without one."""
    torch.manual_seed(1)
    model = inject_adapter_in_model(config_of(name, init_weights=False), vit())
    assert type(model) is type(vit())
    own = of_method(name, adapted(name).named_parameters())
    assert {f"base_model.model.{key}" for key in of_method(name, model.named_parameters())} == own.keys()
    again = inject_adapter_in_model(copy.deepcopy(model.peft_config["default"]), vit())
    found = set_peft_model_state_dict(again, get_peft_model_state_dict(model))
    assert not found.unexpected_keys
    assert torch.equal(logits(again), logits(model))


@every_method
def test_low_cpu_mem_usage(name, tmp_path):
    """Weights are made without memory, copies of whole modules aside, and loaded into it."""
    model = adapted(name, low_cpu_mem_usage=True)
    devices = {parameter.device.type for parameter in of_method(name, model.named_parameters()).values()}
    assert devices == {"cpu" if METHODS[name].whole_modules else "meta"}
    saved = adapted(name)
    set_peft_model_state_dict(model, get_peft_model_state_dict(saved), low_cpu_mem_usage=True)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert torch.equal(logits(model), logits(saved))
    saved.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(vit(), tmp_path, low_cpu_mem_usage=True)), logits(saved))


@every_method
@pytest.mark.parametrize(("cast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_autocast_adapter_dtype(name, cast, dtype, tmp_path):
    torch.manual_seed(1)
    config = config_of(name, init_weights=False)
    model = get_peft_model(vit().bfloat16(), config, autocast_adapter_dtype=cast).eval()
    assert {parameter.dtype for parameter in of_method(name, model.named_parameters()).values()} == {dtype}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(vit().bfloat16(), tmp_path, autocast_adapter_dtype=cast).eval()
    pixels = images(2)["pixel_values"].bfloat16()
    with torch.no_grad():
        assert torch.equal(again(pixel_values=pixels).logits, model(pixel_values=pixels).logits)


# ------------------------------------------------------------------ targets


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.chooses_blocks])
@pytest.mark.parametrize("excluded", [["layers.0"], r".*layers\.0"])
def test_exclude_modules(name, excluded):
    everywhere = with_equations(adapted(name))
    left = with_equations(get_peft_model(vit(), config_of(name, exclude_modules=excluded)))
    expected = {path for path in everywhere if not re.search(r"\.layers\.0(\.|$)", path)}
    if name == "gist":  # whose token enters before the first block that is left
        expected |= {path.replace("layers.0", "layers.1") for path in everywhere - expected}
    assert left == expected
    assert left != everywhere or name == "sidetuning"  # which stands at the last block only


def with_equations(model):
    """Names of the layers, without those that only hand on what side networks bring along."""
    passages = (module for module in model.modules() if isinstance(module, BlockAdapters))
    passages = {id(module) for module in passages if not module.adapter_layer_names}
    names = {layer.name for layer in get_layer_status(model)}
    return {name for name in names if id(model.base_model.get_submodule(name)) not in passages}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["q_proj", "mlp.fc2"]}, r"layers\.\d\.(attention\.q_proj|mlp\.fc2)"),
        ({"target_modules": r"vit\.layers\.[02]\..*fc1"}, r"layers\.[02]\.mlp\.fc1"),
        ({"target_modules": "all-linear"}, r"layers\.\d\.(attention\.[qkvo]_proj|mlp\.fc[12])"),
        ({"target_modules": "all-linear", "exclude_modules": r".*fc\d"}, r"layers\.\d\.attention\.[qkvo]_proj"),
        ({"target_modules": ["fc1"], "layers_to_transform": [1]}, r"layers\.1\.mlp\.fc1"),
        ({"target_modules": ["fc1"], "layers_to_transform": 2, "layers_pattern": "layers"}, r"layers\.2\.mlp\.fc1"),
    ],
)
def test_targets_of_a_method_that_has_them(fields, expected):
    model = get_peft_model(vit(), SSFConfig(**fields, modules_to_save=["classifier"]))
    linears = [path for path, module in vit().named_modules() if isinstance(module, torch.nn.Linear)]
    wanted = [path for path in linears if re.fullmatch(rf"vit\.{expected}", path)]
    assert wanted
    found = [layer.name.removeprefix("model.") for layer in get_layer_status(model)]
    assert found == [*wanted, "classifier"]
    assert inspect_matched_modules(model.base_model)["matched"] == wanted


@every_method
def test_target_modules_are_a_field_only_where_the_method_has_targets(name):
    config_cls = METHODS[name].config_cls
    if issubclass(config_cls, TargetedConfig):
        model = get_peft_model(vit(), config_cls(target_modules=["fc1"], layers_to_transform=[1]))
        assert [layer.name for layer in get_layer_status(model)] == ["model.vit.layers.1.mlp.fc1"]
    else:
        with pytest.raises(TypeError, match="target_modules"):
            config_cls(target_modules=["fc1"])


def test_a_pattern_that_no_block_list_has_is_an_error():
    fields = {"target_modules": ["fc1"], "layers_to_transform": [1], "layers_pattern": "blocks"}
    with pytest.raises(ValueError, match="fc1"):
        get_peft_model(vit(), SSFConfig(**fields))
