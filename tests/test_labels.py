"""The names of the classes go where an adapter goes."""

import copy
import io
import json

import pytest
import torch
import transformers
from peft import AutoPeftModel, LoraConfig, PeftConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

import hf_visual_peft
from hf_visual_peft.peft_methods.methods import any_method


NAMES = ["blue", "green", "red"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
MODELS = {
    "vit": (transformers.ViTConfig, {**SIZES, "image_size": 16, "patch_size": 8}),
    "resnet": (transformers.ResNetConfig, {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}),
    "convnext": (transformers.ConvNextConfig, {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2}),
    "swin": (
        transformers.SwinConfig,
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
    ),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of each model: without head, and with one of 1000 classes."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("checkpoints")
    for name, (config, sizes) in MODELS.items():
        whole = AutoModelForImageClassification.from_config(config(**sizes, num_labels=1000))
        whole.save_pretrained(root / name / "big")
        whole.config.num_labels = 2
        whole.base_model.save_pretrained(root / name / "bare")
        for kind in ("big", "bare"):
            size = {"height": 32, "width": 32} if name != "vit" else {"height": 16, "width": 16}
            transformers.ViTImageProcessor(size=size).save_pretrained(root / name / kind)
    yield root
    transformers.logging.set_verbosity_warning()


def pixels(name="vit"):
    size = 16 if name == "vit" else 32
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def logits(model, name="vit"):
    with torch.no_grad():
        return model.eval()(pixel_values=pixels(name)).logits


def named(folder, names, **more):
    """The checkpoint with a head for these classes."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    return AutoModelForImageClassification.from_pretrained(folder, ignore_mismatched_sizes=True, **labels, **more)


def adapted(folder, method, names=NAMES, **more):
    """A model with an adapter all of whose weights are random, trained for these names."""
    base = named(folder, names, **more)
    config = hf_visual_peft.with_visual_targets(any_method(method).config_cls(), base)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def names_of(model):
    found = model.config.id2label
    assert model.config.label2id == {name: index for index, name in found.items()}
    assert model.config.num_labels == len(found)
    return [found[index] for index in range(len(found))]


CASES = [
    *(("vit", method) for method in ("vpt", "linearprobe", "vqt", "lst", "lora")),
    *(("resnet", "linearprobe"), ("resnet", "lora"), ("convnext", "bitfit"), ("swin", "ia3")),
]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_names_and_number_of_classes_come_back_by_every_way_of_loading(checkpoints, tmp_path, name, method):
    model = adapted(checkpoints / name / "bare", method)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, name)
    for kind, classes in (("bare", 2), ("big", 1000)):
        base = AutoModelForImageClassification.from_pretrained(checkpoints / name / kind, num_labels=classes)
        before, given = logits(base, name), names_of(base)
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert names_of(loaded) == NAMES
        assert torch.equal(logits(loaded, name), expected)
        assert loaded(pixel_values=pixels(name), labels=torch.tensor([0, 2])).loss.isfinite()
        with loaded.disable_adapter():
            assert names_of(loaded) == given
            torch.testing.assert_close(logits(loaded, name), before)
        assert names_of(loaded) == NAMES
    for loaded in (
        AutoPeftModel.from_pretrained(tmp_path / "adapter"),
        AutoModelForImageClassification.from_pretrained(tmp_path / "adapter"),
    ):
        assert names_of(loaded) == NAMES
        torch.testing.assert_close(logits(loaded, name), expected)
    image = Image.effect_noise((40, 30), 80).convert("RGB")
    classify = pipeline("image-classification", model=str(tmp_path / "adapter"))
    inputs = transformers.AutoImageProcessor.from_pretrained(checkpoints / name / "bare")(image, return_tensors="pt")
    with torch.no_grad():
        scores = loaded(**inputs).logits[0].softmax(-1)
    assert {found["label"]: found["score"] for found in classify(image)} == pytest.approx(
        dict(zip(NAMES, scores.tolist(), strict=True)), abs=1e-5
    )


@pytest.mark.parametrize("method", ["vpt", "linearprobe", "lora"])
def test_each_adapter_of_a_model_keeps_its_classes(checkpoints, tmp_path, method):
    folder = checkpoints / "vit" / "bare"
    classes = {"first": NAMES, "second": ["cat", "dog"], "third": list("abcd"), "fourth": ["x", "y", "z"]}
    expected = {}
    for name, names in classes.items():
        model = adapted(folder, method, names)
        model.save_pretrained(tmp_path / name)
        expected[name] = logits(model)
    base = named(folder, ["no", "yes"])
    model = PeftModel.from_pretrained(base, tmp_path / "first", adapter_name="first")
    for name in ("second", "third", "fourth"):
        model.load_adapter(tmp_path / name, name)
        assert names_of(model) == NAMES, "loading does not switch"
    for name in ("second", "fourth", "first", "third"):
        model.set_adapter(name)
        assert names_of(model) == classes[name]
        assert torch.equal(logits(model), expected[name])
    model.config.id2label[0], model.config.label2id = "A", {"A": 0, "b": 1, "c": 2, "d": 3}  # renamed by the user
    model.set_adapter("second")
    model.set_adapter("third")
    assert names_of(model) == ["A", "b", "c", "d"]
    model.save_pretrained(tmp_path / "again")
    for name, names in {**classes, "third": ["A", "b", "c", "d"]}.items():
        saved = json.loads((tmp_path / "again" / name / "adapter_config.json").read_text())
        assert list(saved["auto_mapping"]["id2label"].values()) == (classes[name] if method == "lora" else names)
    for again in (copy.deepcopy(model), pickled(model)):
        again.set_adapter("fourth")
        assert names_of(again) == ["x", "y", "z"]
        assert names_of(model) == ["A", "b", "c", "d"]
    model.delete_adapter("third")
    assert names_of(model) == NAMES
    merged = copy.deepcopy(model).merge_and_unload() if method != "vpt" else model.unload()
    assert names_of(merged) == (NAMES if method != "vpt" else ["no", "yes"])
    assert logits(merged).shape[1] == len(names_of(merged))


def test_heads_of_other_sizes_do_not_mix_in_a_batch(checkpoints, tmp_path):
    folder = checkpoints / "vit" / "bare"
    for name, names in {"a": NAMES, "b": ["cat", "dog"], "c": ["x", "y", "z"]}.items():
        adapted(folder, "vpt", names).save_pretrained(tmp_path / name)
    base = AutoModelForImageClassification.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, tmp_path / "a", adapter_name="a").eval()
    for name in "bc":
        model.load_adapter(tmp_path / name, name)
    for names, told in ((["a", "b"], "a has 3, b has 2"), (["__base__", "c"], "__base__ has 2, c has 3")):
        with pytest.raises(ValueError, match=f"different numbers of classes do not mix in a batch .{told}"):
            model(pixel_values=pixels(), adapter_names=names)
    with torch.no_grad():
        assert model(pixel_values=pixels(), adapter_names=["a", "c"]).logits.shape == (2, 3)
        assert model(pixel_values=pixels(), adapter_names=["__base__", "b"]).logits.shape == (2, 2)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("method", ["vpt", "lora"])
def test_training_goes_on_under_the_names_it_began_with(checkpoints, tmp_path, method):
    folder = checkpoints / "vit" / "bare"
    adapted(folder, method).save_pretrained(tmp_path / "a")
    base = AutoModelForImageClassification.from_pretrained(folder, num_labels=3)
    model = PeftModel.from_pretrained(base, tmp_path / "a", is_trainable=True)
    assert names_of(model) == NAMES
    model.save_pretrained(tmp_path / "b")
    assert names_of(AutoPeftModel.from_pretrained(tmp_path / "b")) == NAMES


@pytest.mark.parametrize("method", ["vpt", "lora"])
@pytest.mark.parametrize("names", [["cat", "dog"], ["cat", "dog", "eel"]])
def test_a_config_from_a_file_trains_on_the_classes_of_its_new_base(checkpoints, tmp_path, method, names):
    folder = checkpoints / "vit" / "bare"
    adapted(folder, method).save_pretrained(tmp_path / "a")
    config = PeftConfig.from_pretrained(tmp_path / "a")
    config.inference_mode = False
    model = get_peft_model(named(folder, names), config)
    assert names_of(model) == names
    model.save_pretrained(tmp_path / "b")
    assert names_of(AutoPeftModel.from_pretrained(tmp_path / "b")) == names


def test_several_labels_at_once_stay_that(checkpoints, tmp_path):
    model = adapted(checkpoints / "vit" / "bare", "vpt", problem_type="multi_label_classification")
    model.save_pretrained(tmp_path / "several")
    adapted(checkpoints / "vit" / "bare", "vpt", ["cat", "dog"]).save_pretrained(tmp_path / "one")
    loaded = PeftModel.from_pretrained(
        AutoModelForImageClassification.from_pretrained(checkpoints / "vit" / "bare"), tmp_path / "one"
    )
    loaded.load_adapter(tmp_path / "several", "several")
    assert loaded.config.problem_type is None
    loaded.set_adapter("several")
    assert loaded.config.problem_type == "multi_label_classification"
    scores = pipeline("image-classification", model=str(tmp_path / "several"))(Image.new("RGB", (16, 16)))
    assert sum(found["score"] for found in scores) != pytest.approx(1, abs=1e-3)


def test_without_a_head_of_its_own_an_adapter_has_no_names(checkpoints, tmp_path):
    base = named(checkpoints / "vit" / "big", ["cat", "dog"])
    for config in (hf_visual_peft.VPTConfig(modules_to_save=[]), LoraConfig(target_modules=["q_proj"])):
        get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / config.peft_type)
        saved = json.loads((tmp_path / config.peft_type / "adapter_config.json").read_text())
        assert "id2label" not in saved["auto_mapping"]
        other = named(checkpoints / "vit" / "big", ["no", "yes"])
        assert names_of(PeftModel.from_pretrained(other, tmp_path / config.peft_type)) == ["no", "yes"]


def test_made_up_names_give_the_number_and_replace_no_real_ones(checkpoints, tmp_path):
    adapted(checkpoints / "vit" / "bare", "vpt", [f"LABEL_{i}" for i in range(3)]).save_pretrained(tmp_path)
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.num_labels == 3
    base = named(checkpoints / "vit" / "bare", NAMES)
    assert names_of(PeftModel.from_pretrained(base, tmp_path)) == NAMES


@pytest.mark.parametrize("names", [["猫", "Ä ö", "a\nb"], ["", "1", "0"], ["same", "same", "other"]])
@pytest.mark.parametrize("keys", [int, str])
def test_odd_names_and_keys_come_back(checkpoints, tmp_path, names, keys):
    """Keys are texts where somebody read them from JSON."""
    base = named(checkpoints / "vit" / "bare", NAMES)
    base.config.id2label = {keys(index): name for index, name in enumerate(names)}
    get_peft_model(base, hf_visual_peft.VPTConfig()).save_pretrained(tmp_path)
    other = AutoModelForImageClassification.from_pretrained(checkpoints / "vit" / "bare")
    assert names_of(PeftModel.from_pretrained(other, tmp_path)) == names


@pytest.mark.parametrize("damaged", [["blue"], {"0": "blue", "2": "red"}, {"0": 1}, {}, "blue"])
@pytest.mark.parametrize("method", ["vpt", "lora"])
def test_damaged_names_are_refused_and_the_base_stays(checkpoints, tmp_path, method, damaged):
    adapted(checkpoints / "vit" / "bare", method).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    saved["auto_mapping"]["id2label"] = damaged
    path.write_text(json.dumps(saved))
    base = AutoModelForImageClassification.from_pretrained(checkpoints / "vit" / "bare")
    before = logits(base)
    with pytest.raises(ValueError, match=r"auto_mapping\['id2label'\] of the adapter's config is .* must map '0'"):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(base), before)
    assert names_of(base) == ["LABEL_0", "LABEL_1"]


def test_a_head_that_does_not_go_in_leaves_the_base_as_it_was(checkpoints, tmp_path):
    adapted(checkpoints / "vit" / "bare", "vpt").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers_to_transform": [7]}))
    base = AutoModelForImageClassification.from_pretrained(checkpoints / "vit" / "bare")
    before = logits(base)
    with pytest.raises(ValueError, match="layers_to_transform has 7"):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(base), before)
    assert base.classifier.out_features == 2
    assert names_of(base) == ["LABEL_0", "LABEL_1"]
