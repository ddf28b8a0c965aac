"""Adapters and configs written when transformers called the modules of a backbone by other names."""

import json
import re

import pytest
import torch
import transformers as tf
from families import FAMILIES, WIDTH, images, liven, output_of
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import hf_visual_peft
from hf_visual_peft.backbones.key_renames import to_present_names
from hf_visual_peft.coverage.sizes import small_fields


# what transformers 4 called what it calls this today, written down from its modelling files; in this order
VIT = {
    r"\blayers\.(\d+)": r"encoder.layer.\1",
    r"attention\.([qkv])_proj": lambda m: "attention.attention." + {"q": "query", "k": "key", "v": "value"}[m[1]],
    r"attention\.o_proj": "attention.output.dense",
    r"mlp\.fc1": "intermediate.dense",
    r"mlp\.fc2": "output.dense",
}
DINOV2 = {pattern: VIT[pattern] for pattern in list(VIT)[1:3]}
SWIN = {
    r"attention\.([qkv])_proj": lambda m: "attention.self." + {"q": "query", "k": "key", "v": "value"}[m[1]],
    **{pattern: VIT[pattern] for pattern in list(VIT)[2:]},
}
CLIP = {r"^base_model\.model\.": "base_model.model.vision_model.", r"^encoder": "vision_model.encoder"}


def swin():
    config = tf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 2], num_heads=[2, 2], window_size=4, num_labels=3
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return liven(tf.SwinForImageClassification(config))


MODELS = {
    "vit": (FAMILIES["vit"].model, VIT),
    "vit_bare": (FAMILIES["vit"].backbone, VIT),
    "deit": (FAMILIES["deit"].model, VIT),
    "beit": (FAMILIES["beit"].model, VIT),
    "dinov2": (FAMILIES["dinov2"].model, DINOV2),
    "clip_bare": (FAMILIES["clip"].backbone, CLIP),
    "swin": (swin, SWIN),
}
METHODS = [name for name, method in hf_visual_peft.list_methods().items() if not method.video]
ALL_LINEAR = (
    "ssf",
    {"target_modules": "all-linear", "modules_to_save": ["classifier"], "exclude_modules": ["classifier"]},
)


def model_of(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return liven(MODELS[name][0]())


def small(method):
    return small_fields(hf_visual_peft.get_method(method).config_cls, {}, WIDTH)


def old(text, table):
    for pattern, name in table.items():
        text = re.sub(pattern, name, text)
    return text


def written_by(name, method, folder, **fields):
    """Save an adapter with random weights, its keys as they were before; returns the model it was saved from."""
    torch.manual_seed(2)
    config = hf_visual_peft.get_method(method).config_cls(**fields, init_weights=False)
    model = get_peft_model(model_of(name), config).eval()
    model.save_pretrained(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    renamed = {old(key, MODELS[name][1]): value for key, value in weights.items()}
    assert len(renamed) == len(weights)
    in_blocks = any(re.search(r"\blayers\.\d", key) for key in weights)  # the head and pixels kept their names
    assert renamed.keys() != weights.keys() or not in_blocks
    save_file(renamed, folder / "adapter_model.safetensors")
    return model


def assert_same_adapter(loaded, saved):
    expected = saved.state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    inputs = images(2)
    with torch.no_grad():
        assert torch.equal(output_of(loaded, inputs), output_of(saved, inputs))


@pytest.mark.parametrize("method", METHODS)
def test_old_keys_of_every_method_load(method, tmp_path):
    saved = written_by("vit", method, tmp_path, **small(method))
    assert_same_adapter(PeftModel.from_pretrained(model_of("vit"), tmp_path).eval(), saved)


@pytest.mark.parametrize(
    ("name", "method", "fields"),
    [
        *((name, "ssf", {}) for name in MODELS if name != "swin"),
        *((name, "adaptformer", {"r": 4}) for name in MODELS if name not in ("swin", "dinov2")),
        *((name, "partial", {}) for name in ("deit", "dinov2", "clip_bare")),
        ("swin", *ALL_LINEAR),
    ],
)
def test_old_keys_load_in_every_family(name, method, fields, tmp_path):
    saved = written_by(name, method, tmp_path, **fields)
    assert_same_adapter(PeftModel.from_pretrained(model_of(name), tmp_path).eval(), saved)


@pytest.mark.parametrize("method", ["ssf", "vpt", "fact"])
def test_old_keys_load_in_a_model_inside_another(method, tmp_path):
    """The tables belong to the transformers model, wherever it stands."""

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = model_of("vit")

        def forward(self, **inputs):
            return self.encoder(**inputs)

    torch.manual_seed(2)
    config = hf_visual_peft.get_method(method).config_cls(**small(method), init_weights=False)
    saved = get_peft_model(Wrapped(), config).eval()
    saved.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file({old(key, VIT): value for key, value in weights.items()}, tmp_path / "adapter_model.safetensors")
    assert_same_adapter(PeftModel.from_pretrained(Wrapped(), tmp_path).eval(), saved)


@pytest.mark.parametrize("method", ["ssf", "adaptformer", "fact", "partial"])
def test_old_keys_load_by_transformers(method, tmp_path):
    saved = written_by("vit", method, tmp_path, **small(method))
    model = model_of("vit")
    model.load_adapter(str(tmp_path))
    inputs = images(2)
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, saved(**inputs).logits)


def test_what_fits_no_table_is_still_refused(tmp_path):
    written_by("vit", "ssf", tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    strange = {key.replace("encoder.layer.", "encoder.stage."): value for key, value in weights.items()}
    save_file(strange, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit this ViTForImageClassification: .*layers\.0.* is missing"):
        PeftModel.from_pretrained(model_of("vit"), tmp_path)


def test_a_file_with_old_and_present_keys_of_one_weight_is_refused(tmp_path):
    written_by("vit", "ssf", tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    both = weights | {key.replace("encoder.layer.", "layers."): value.clone() for key, value in weights.items()}
    save_file(both, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="is not expected"):
        PeftModel.from_pretrained(model_of("vit"), tmp_path)


# ------------------------------------------------------------------ fields that name modules


@pytest.mark.parametrize(
    ("before", "today"),
    [
        (["query", "value"], r".*\.(q_proj|v_proj)"),
        (["attention.output.dense"], r".*o_proj"),
        (["intermediate.dense", "fc2"], r".*\.fc[12]"),
        ({"attention.attention.key"}, r".*k_proj"),
        (r"vit\.encoder\.layer\.1\..*\.(query|key)", r"vit\.layers\.1\.attention\.(q|k)_proj"),
        (r".*\.intermediate\.dense", r".*\.fc1"),
    ],
)
def test_old_targets_act_on_the_same_modules(before, today):
    def targets(names):
        fields = {"target_modules": names, "modules_to_save": ["classifier"]}
        model = get_peft_model(model_of("vit"), hf_visual_peft.SSFConfig(**fields))
        return set(model.targeted_module_names)

    assert targets(before) == targets(today) != set()


@pytest.mark.parametrize("excluded", [["encoder.layer.1"], r"vit\.encoder\.layer\.1", ["vit.encoder.layer.1"]])
def test_old_exclusions_exclude_the_same_modules(excluded, tmp_path):
    model = get_peft_model(model_of("vit"), hf_visual_peft.AdaptFormerConfig(r=4, exclude_modules=excluded))
    assert {n.split(".")[4] for n, p in model.named_parameters() if "adaptformer" in n} == {"0", "2"}
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["exclude_modules"] == ["vit.layers.1"], "it is saved with the names of today"


@pytest.mark.parametrize("names", [None, [], ["q_proj"], r".*fc1", "all-linear", ["no_such"], r"no\.such", {"q_proj"}])
def test_names_of_today_and_unknown_ones_stay(names):
    assert to_present_names(model_of("vit"), names) is names


@pytest.mark.parametrize("mapping", [None, {r"encoder\.layer\.": "layers.", r"output\.dense": "mlp.fc2"}])
def test_old_modules_to_save_load(mapping, tmp_path):
    torch.manual_seed(2)
    names = ["vit.encoder.layer.2.output.dense", "classifier"]
    saved = get_peft_model(model_of("vit"), hf_visual_peft.AdaptFormerConfig(r=4, modules_to_save=names)).eval()
    assert saved.peft_config["default"].modules_to_save == ["vit.layers.2.mlp.fc2", "classifier"]
    copied = saved.get_base_model().vit.layers[2].mlp.fc2.modules_to_save["default"]
    with torch.no_grad():
        copied.weight.add_(0.1)
    saved.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    plain = {key.replace(".base_layer.", "."): value for key, value in weights.items()}
    assert "base_model.model.vit.layers.2.mlp.fc2.weight" in plain
    save_file({old(key, VIT): value for key, value in plain.items()}, tmp_path / "adapter_model.safetensors")
    assert_same_adapter(PeftModel.from_pretrained(model_of("vit"), tmp_path, key_mapping=mapping).eval(), saved)
