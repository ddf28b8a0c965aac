"""Errors name the field, the value and what is valid, and come before the model is touched."""

from __future__ import annotations

import json
import tracemalloc

import pytest
import torch
from families import FAMILIES, WIDTH
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from hf_visual_peft import (
    AdaptFormerConfig,
    AttnScaleConfig,
    AutoVPConfig,
    BAPATConfig,
    CompositeConfig,
    ConvpassConfig,
    EVPPixelConfig,
    HSTConfig,
    ILMVPConfig,
    LAEAdapterConfig,
    LAELoRAConfig,
    LAEPrefixConfig,
    LoRVPConfig,
    MAMConfig,
    PATTConfig,
    SideTuningConfig,
    SSFConfig,
    VAPTConfig,
    ViTAdapterConfig,
    VPConfig,
    VPTConfig,
    get_method,
    list_language_methods,
    list_methods,
)
from hf_visual_peft.core.targets import default_of, own_fields
from hf_visual_peft.coverage.models import MODELS


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (VPTConfig, {"num_virtual_tokens": 0}, r"num_virtual_tokens is 0: must be an integer from 1 to 10000"),
        (VPTConfig, {"num_virtual_tokens": 10**9}, r"num_virtual_tokens is 1000000000: must be an integer from 1"),
        (VPTConfig, {"num_virtual_tokens": 2.5}, r"num_virtual_tokens is 2.5"),
        (VPTConfig, {"num_virtual_tokens": True}, r"num_virtual_tokens is True"),
        (VPTConfig, {"dropout": 1.0}, r"dropout is 1.0: must be a finite number of at least 0 and less than 1"),
        (VPTConfig, {"projection_dim": -1}, r"projection_dim is -1: must be an integer of at least 1"),
        (VPTConfig, {"deep": "no"}, r"deep is 'no': must be one of True, False"),
        (AdaptFormerConfig, {"r": 0}, r"AdaptFormerConfig.r is 0: must be an integer of at least 1"),
        (AdaptFormerConfig, {"r": "8"}, r"r is '8'"),
        (AdaptFormerConfig, {"scale": "large"}, r"scale is 'large': must be a finite number or \"learnable\""),
        (AdaptFormerConfig, {"scale": float("nan")}, r"scale is nan: must be a finite number"),
        (AdaptFormerConfig, {"layer_norm": "both"}, r"layer_norm is 'both': must be one of 'none', 'in', 'out'"),
        (ConvpassConfig, {"sublayers": ("attention", "fc1")}, r"sublayers is .*'fc1'.*'attention', 'mlp'"),
        (ConvpassConfig, {"sublayers": ()}, r"sublayers is \(\)"),
        (ConvpassConfig, {"conv_init": "zeros"}, r"conv_init is 'zeros': must be one of 'identity', 'xavier'"),
        (SSFConfig, {"init_std": -0.1}, r"init_std is -0.1: must be a finite number of at least 0"),
        (SSFConfig, {"layers_pattern": "layers"}, r"layers_pattern is 'layers'"),
        (SSFConfig, {"target_modules": ".*", "layers_to_transform": [0]}, r"layers_to_transform is \[0\]"),
        (VPTConfig, {"layers_to_transform": []}, r"layers_to_transform is \[\]"),
        (VPTConfig, {"layers_to_transform": [-1]}, r"layers_to_transform is \[-1\]: must be indices from 0"),
        (VPTConfig, {"layers_to_transform": "all"}, r"layers_to_transform is 'all'"),
        (VPTConfig, {"modules_to_save": "classifier"}, r"is 'classifier': must be None or a list of names, as \['cl"),
    ],
)
def test_fields_out_of_range(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


NAN, INF = float("nan"), float("inf")
WRONG = {  # by the type of a field's default: values that no field of that type takes
    int: (-1, 2.5, True, "x", NAN, [1]),
    float: (NAN, INF, -INF, True, "x", [1.0]),
    bool: ("yes", 2, None),
    str: ("nonsense", 3, [3]),
    tuple: (("nonsense",), (), 3, NAN, [["attention"]], None),
    list: ([], 3),
}


@pytest.mark.parametrize("name", [*list_methods(), *list_language_methods()])
def test_every_field_names_a_value_that_it_does_not_take(name):
    """Of the wrong kind, not finite, negative or empty."""
    config_cls = {**list_methods(), **list_language_methods()}[name].config_cls
    for each in own_fields(config_cls):
        words = each.name == "init_text"  # any words
        for value in WRONG.get(type(default_of(each)), ())[int(words) :]:
            with pytest.raises(ValueError, match=rf"\.{each.name}\b"):
                config_cls(**{each.name: value})


@pytest.mark.parametrize(
    ("config", "field"),
    [
        *[(HSTConfig, "num_virtual_tokens"), (SideTuningConfig, "channels"), (SideTuningConfig, "depth")],
        *[(ViTAdapterConfig, "num_points"), (ViTAdapterConfig, "channels")],
        *[(AttnScaleConfig, "grid_size"), (VAPTConfig, "grid_size")],
    ],
)
def test_absurd_sizes(config, field):
    with pytest.raises(ValueError, match=rf"{config.__name__}.{field} is 1000000000: must be an integer from 1 to"):
        config(**{field: 10**9})


@pytest.mark.parametrize("config", [AutoVPConfig, EVPPixelConfig, ILMVPConfig, LoRVPConfig, VPConfig])
@pytest.mark.parametrize("size", [10**9, [32, 10**9]])
def test_absurd_sizes_of_images(config, size):
    with pytest.raises(ValueError, match=rf"{config.__name__}.prompt_size is .*1000000000.*: must be None, a num"):
        config(prompt_size=size)


@pytest.mark.parametrize(
    ("config", "field", "advice"),
    [
        (VPTConfig, "num_tokens", "Did you mean 'num_virtual_tokens'"),
        (VPTConfig, "virtual", "Did you mean 'num_virtual_tokens'"),
        (AdaptFormerConfig, "layer_norms", "Did you mean 'layer_norm'"),
        (SSFConfig, "module_to_save", "Did you mean 'modules_to_save'"),
        (ConvpassConfig, "xyz", "Its fields are .*conv_init.*sublayers"),
    ],
)
def test_misspelt_fields(config, field, advice):
    with pytest.raises(TypeError, match=rf"{config.__name__}.* unexpected keyword argument '{field}'. {advice}"):
        config(**{field: 3})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            AdaptFormerConfig(r=10**9),
            rf"r is 1000000000: must be an integer from 1 to {WIDTH} \(the backbone's width\)",
        ),
        (ConvpassConfig(r=10**9), rf"r is 1000000000: must be an integer from 1 to {WIDTH}"),
        (VPTConfig(projection_dim=10**9), rf"projection_dim is 1000000000: must be an integer from 1 to {WIDTH}"),
        (VAPTConfig(r=10**9), rf"VAPTConfig.r is 1000000000: must be an integer from 1 to {WIDTH}"),
        (LAEPrefixConfig(depth=10**9), r"LAEPrefixConfig.depth is 1000000000: must be an integer from 1 to 5 \(the"),
        (LAEAdapterConfig(depth=6), r"LAEAdapterConfig.depth is 6: must be an integer from 1 to 5 \(the backbone's"),
        (LAELoRAConfig(depth=10**9), r"LAELoRAConfig.depth is 1000000000: must be an integer from 1 to 5 \(the"),
        (VPTConfig(layers_to_transform=[0, 3]), "layers_to_transform has 3: ViTModel has 3 blocks, 0 to 2"),
        (VPTConfig(deep=False, layers_to_transform=[0, 2]), r"consecutive, but they are \[0, 2\]"),
        (VPTConfig(deep=False, exclude_modules=["vit.layers.1"]), r"consecutive, but they are \[0, 2\]"),
        (VPTConfig(exclude_modules=r"vit\.layers\.\d"), "no block is left"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_fields_that_do_not_fit_the_model(config, message):
    model = FAMILIES["vit"].model()
    modules = {name: id(module) for name, module in model.named_modules()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert modules == {name: id(module) for name, module in model.named_modules()}
    assert trainable == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not hasattr(model, "peft_config")


def test_ssf_on_a_module_without_channels():
    with pytest.raises(
        ValueError, match=r"SSFConfig.target_modules: 'vit.*dropout' is a Dropout; valid are linears, conv"
    ):
        get_peft_model(FAMILIES["vit"].model(), SSFConfig(target_modules=["dropout"]))


@pytest.fixture
def saved(tmp_path):
    model = get_peft_model(FAMILIES["vit"].model(), AdaptFormerConfig(r=4, init_weights=False))
    model.peft_config["default"].base_model_name_or_path = "somebody/vit-tiny"
    model.save_pretrained(tmp_path)
    return tmp_path


def change(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_checkpoint_of_another_backbone(saved):
    """The message says which backbone the adapter was trained on."""

    def vit(width, depth):
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": 2}
        return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=3))

    with pytest.raises(ValueError, match=r"on somebody/vit-tiny.*has shape \(4, 16\) in the file and \(4, 24\)"):
        PeftModel.from_pretrained(vit(24, 3), saved)
    with pytest.raises(ValueError, match=r"on somebody/vit-tiny.*layers.3.*is missing \(and 7 more\)"):
        PeftModel.from_pretrained(vit(16, 5), saved)
    with pytest.raises(ValueError, match=r"on somebody/vit-tiny.*is not expected"):
        PeftModel.from_pretrained(vit(16, 1), saved)
    change(saved, r=6)
    with pytest.raises(ValueError, match=r"has shape \(4, 16\) in the file and \(6, 16\) in the model"):
        PeftModel.from_pretrained(FAMILIES["vit"].model(), saved)


def test_a_head_of_another_size_without_names_of_classes(saved):
    """With names the number of classes is taken from them."""
    change(saved, auto_mapping=None)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=9))
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"classifier.weight has shape \(\d, 16\) in the file and \(9, 16\) in the"):
        PeftModel.from_pretrained(model, saved)
    assert modules == [name for name, _ in model.named_modules()]


@pytest.mark.parametrize("damage", ["truncated", "empty", "zip"])
def test_damaged_weights(saved, damage):
    path = saved / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "zip": b"PK\x03\x04" + whole[4:]}[damage])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is truncated or not a safetensors file"):
        PeftModel.from_pretrained(FAMILIES["vit"].model(), saved)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize("load", [AdaptFormerConfig.from_pretrained, PeftConfig.from_pretrained], ids=["own", "peft"])
def test_unknown_field_in_a_file(saved, load):
    change(saved, gate="sigmoid", r=4)
    config = load(saved)
    model = FAMILIES["vit"].model()
    with pytest.raises(ValueError, match="fields that AdaptFormerConfig does not know: gate"):
        get_peft_model(model, config)
    with pytest.raises(ValueError, match="fields that AdaptFormerConfig does not know: gate"):
        PeftModel.from_pretrained(model, saved)
    with pytest.raises(ValueError, match="fields that AdaptFormerConfig does not know: gate"):
        model.load_adapter(str(saved))


def test_absurd_size_in_a_file(saved):
    change(saved, r=10**9)
    tracemalloc.start()
    with pytest.raises(ValueError, match="r is 1000000000"):
        PeftModel.from_pretrained(FAMILIES["vit"].model(), saved)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    change(saved, r="many")
    with pytest.raises(ValueError, match="r is 'many'"):
        PeftModel.from_pretrained(FAMILIES["vit"].model(), saved)


def test_data_parallel_is_refused():
    model = get_peft_model(FAMILIES["vit"].model(), VPTConfig())
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):  # replicate goes through all modules
        [module._replicate_for_data_parallel() for module in model.modules()]


def test_masks_that_are_no_tensors():
    model = get_peft_model(FAMILIES["vit"].model(), VPTConfig())
    layer = model.get_base_model().vit.layers[0]
    with pytest.raises(ValueError, match="attention_mask: a object cannot be extended to inserted tokens"):
        layer(torch.zeros(1, 17, WIDTH), object())


def test_merge_error_names_the_method():
    for name in ("vpt", "adaptformer", "convpass"):
        config_cls = get_method(name).config_cls
        model = get_peft_model(FAMILIES["vit"].model(), config_cls(**({} if name == "vpt" else {"r": 4})))
        with pytest.raises(ValueError, match=rf"{name}.* cannot be merged.*unload\(\)"):
            model.merge_and_unload()
        with pytest.raises(ValueError, match="cannot be merged"):
            model.unmerge_adapter()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            BAPATConfig(attention_r=10**6),
            rf"^BAPATConfig.attention_r is 1000000: must be an integer from 1 to {WIDTH}",
        ),
        (BAPATConfig(attention_r=4, r=10**6), rf"^BAPATConfig.r is 1000000: must be an integer from 1 to {WIDTH}"),
        (MAMConfig(r=10**6), rf"^MAMConfig.r is 1000000: must be an integer from 1 to {WIDTH}"),
        (
            CompositeConfig(parts=[PATTConfig(r=10**6)]),
            rf"^PATTConfig.r is 1000000: must be an integer from 1 to {WIDTH}",
        ),
    ],
)
def test_errors_name_the_config_that_the_user_gave(config, message):
    """Not that of a part which the method makes; the parts of a composite are the user's own."""
    with pytest.raises(ValueError, match=message):
        get_peft_model(FAMILIES["vit"].model(), config)


@pytest.mark.parametrize("config", [BAPATConfig(attention_r=4, r=4), MAMConfig(r=4)])
def test_what_does_not_fit_names_the_config_that_the_user_gave(config):
    with pytest.raises(ValueError, match=rf"^{type(config).__name__}\b") as error:
        get_peft_model(MODELS["poolformer"].model(), config)
    assert "PATTConfig" not in str(error.value).partition("Methods that work")[0]
    assert "whole" not in config.to_dict()
