"""What the card of a saved adapter says, and whose text it may replace."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import ViTConfig, ViTForImageClassification, ViTModel

import hf_visual_peft
from hf_visual_peft.sharing.card import Run, SavedAdapter, build_card, is_generated, is_hub_id
from hf_visual_peft.sharing.hub import add_usage_to_card, write_card


METHODS = hf_visual_peft.list_methods()
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
IN_CLASSIFIER = SavedAdapter("ViTForImageClassification", "transformers.models.vit.modeling_vit", 1_234, 195, 5_678, 3)


def vit(cls=ViTForImageClassification, name="google/vit-tiny"):
    model = cls(ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=3))
    model.name_or_path = name
    return model


def lora():
    return LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])


def config_of(name):
    config = lora() if name == "lora" else METHODS[name].config_cls()
    config.base_model_name_or_path = "google/vit-tiny"
    return config


def save(model, folder):
    """As peft does it, and what the configs of ours add to that."""
    model.save_pretrained(folder)
    add_usage_to_card(folder, model.peft_config["default"])
    return folder / "README.md"


def snippet_of(text):
    return re.search(r"```python\n(.*?)\n```", text, flags=re.DOTALL)[1]


@pytest.mark.parametrize("name", [*METHODS, "lora"])
def test_a_card_of_every_method(name):
    card = build_card(config_of(name), IN_CLASSIFIER, adapter="me/mine")
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    assert again.text == card.text
    assert card.data.base_model == "google/vit-tiny"
    assert card.data.base_model_relation == "adapter"
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "image-classification"
    assert {name, "base_model:adapter:google/vit-tiny"} <= set(card.data.tags)
    assert "1,234 in the adapter, 195 in the task head" in card.text
    assert "5,678 bytes" in card.text

    snippet = snippet_of(card.text)
    compile(snippet, "card", "exec")
    assert 'ViTForImageClassification.from_pretrained("google/vit-tiny", num_labels=3,' in snippet
    ours = "import hf_visual_peft" in snippet
    assert ours == ("hf_visual_peft" in card.data.tags) == (name in METHODS)
    if ours:
        assert snippet.index("import hf_visual_peft") < snippet.index('PeftModel.from_pretrained(base, "me/mine")')
        paper = METHODS[name].paper
        assert f"[{paper.title}]({paper.url}), {paper.venue}" in card.text
        assert "arXiv None" not in card.text
        assert METHODS[name].equation.replace("|", "\\|") in card.text
        assert f"KeyError: '{name.upper()}'" in card.text
    rows = [line for line in card.text.splitlines() if line.startswith("|")]
    assert len(rows) >= 6
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows), "two cells a row, also with | in them"


def test_the_configuration_can_be_typed_again():
    config = METHODS["vpt"].config_cls(num_virtual_tokens=7, layers_to_transform=[0, 1])
    typed = re.search(r"`(VPTConfig\(.*\))`", build_card(config).text)[1]
    assert eval(typed, {"VPTConfig": type(config)}).to_dict() == config.to_dict()
    typed = re.search(r"`(LoraConfig\(.*\))`", build_card(lora()).text)[1]
    assert eval(typed, {"LoraConfig": LoraConfig}).target_modules == lora().target_modules


def test_results_become_a_model_index():
    run = Run(metrics={"accuracy": 0.91234, "top5": 1}, dataset="ylecun/mnist", dataset_split="test", license="mit")
    card = build_card(config_of("ssf"), IN_CLASSIFIER, run, adapter="me/mine")
    metadata = yaml.safe_load(str(card).split("---")[1])
    (entry,) = metadata["model-index"]
    assert entry["name"] == "mine"
    assert [(metric["type"], metric["value"]) for metric in entry["results"][0]["metrics"]] == [
        ("accuracy", 0.91234),
        ("top5", 1.0),
    ]
    assert entry["results"][0]["dataset"] == {"name": "ylecun/mnist", "type": "ylecun/mnist", "split": "test"}
    assert metadata["metrics"] == ["accuracy", "top5"]
    assert metadata["license"] == "mit"
    assert "| accuracy | 0.9123 | ylecun/mnist, test split |" in card.text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.9", None, True])
def test_a_metric_must_be_a_number(value):
    with pytest.raises(ValueError, match=re.escape(f"metrics['accuracy']={value!r}: a card takes a finite number")):
        Run(metrics={"accuracy": value}, dataset="x")


def test_metrics_need_to_say_what_they_were_measured_on():
    with pytest.raises(ValueError, match="without dataset"):
        Run(metrics={"accuracy": 0.9})


@pytest.mark.parametrize("dataset", ["imagefolder", "digits", "digits of mine", "/data/digits"])
def test_only_ids_of_the_hub_are_listed_as_datasets(dataset):
    card = build_card(config_of("ssf"), run=Run(metrics={"accuracy": 0.9}, dataset=dataset))
    assert card.data.datasets is None
    assert card.data.eval_results[0].dataset_name == dataset


def test_a_name_is_an_id_unless_a_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("google/vit-tiny")
    assert not any(map(is_hub_id, ["/google/vit-tiny", "./vit", "a/b/c", "", None]))
    Path("google/vit-tiny").mkdir(parents=True)
    assert not is_hub_id("google/vit-tiny")


def test_folders_of_this_machine_are_not_told(tmp_path):
    config = config_of("vpt")
    config.base_model_name_or_path = str(tmp_path / "my-vit")
    card = build_card(config, IN_CLASSIFIER)
    assert str(tmp_path) not in str(card)
    assert card.data.base_model is None
    assert card.data.to_dict().get("base_model_relation") is None
    assert "for `my-vit`, a checkpoint that is not on the Hub" in card.text
    assert 'from_pretrained("path/to/my-vit", num_labels=3' in snippet_of(card.text)


def test_a_model_of_no_known_library_is_left_to_the_reader():
    snippet = snippet_of(build_card(config_of("ssf"), SavedAdapter("Net", "my.nets", 10, 0, 100)).text)
    assert "base = ...  # the my.nets.Net that the adapter was trained on" in snippet
    compile(snippet, "card", "exec")


def test_a_command_with_backticks_stays_in_its_block():
    command = "python train.py --name '```' \\\n  --lr 1e-3"
    text = build_card(config_of("ssf"), run=Run(command=command)).text
    assert f"````bash\n{command}\n````" in text


def test_labels_are_listed_up_to_a_limit():
    listed = build_card(config_of("ssf"), run=Run(labels=["cat", "dog"])).text
    assert "## Labels\n\n0. cat\n1. dog\n\n### Framework" in listed
    assert "## Labels" not in build_card(config_of("ssf"), run=Run(labels=[str(i) for i in range(1000)])).text


@pytest.mark.parametrize("name", [*METHODS, "lora"])
def test_files_tell_what_was_trained(name, tmp_path):
    model = get_peft_model(vit(), config_of(name))
    path = save(model, tmp_path)
    saved = SavedAdapter.read(tmp_path, model.peft_config["default"])
    trained = ((name, p.numel()) for name, p in model.named_parameters() if p.requires_grad)
    head = sum(size for name, size in trained if ".classifier." in name or ".head_columns." in name)
    further = 3 * saved.parameters if name == "vqt" else 0  # the head reads as many numbers more as its queries have
    assert saved.head_parameters == head == 64 * 3 + 3 + further
    assert saved.parameters + head == model.get_nb_trainable_parameters()[0]
    assert saved.num_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert saved.num_labels == 3
    assert f"{saved.parameters:,} in the adapter" in path.read_text()


def test_only_the_linear_of_a_head_tells_the_number_of_labels(tmp_path):
    config = METHODS["vpt"].config_cls(modules_to_save=["vit.layernorm"])
    save(get_peft_model(vit(), config), tmp_path)
    saved = SavedAdapter.read(tmp_path, config)
    assert saved.head_parameters == 2 * 64
    assert saved.num_labels is None


def test_a_truncated_adapter_is_named(tmp_path):
    save(get_peft_model(vit(), config_of("vpt")), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is truncated or not a safetensors file"):
        write_card(tmp_path, config_of("vpt"))
    add_usage_to_card(tmp_path, config_of("vpt"))
    assert "import hf_visual_peft" in (tmp_path / "README.md").read_text()


def test_a_bare_backbone_extracts_features(tmp_path):
    card = ModelCard.load(save(get_peft_model(vit(ViTModel), config_of("vpt")), tmp_path))
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert "ViTModel.from_pretrained" in snippet_of(card.text)
    assert "num_labels" not in card.text


def test_the_form_that_peft_saves_becomes_a_card(tmp_path):
    """Whatever the config itself does already, the outcome is one card with the metadata peft gave."""
    model = get_peft_model(vit(), config_of("vpt"))
    PeftModel.create_or_update_model_card(model, tmp_path)
    form = ModelCard.load(tmp_path / "README.md")
    assert "[More Information Needed]" in form.text
    form.data["license"] = "mit"
    form.save(tmp_path / "README.md")

    path = save(model, tmp_path)
    card = ModelCard.load(path)
    assert "[More Information Needed]" not in card.text
    assert "import hf_visual_peft" in card.text
    assert card.data.license == "mit"
    assert {"transformers", "vpt"} <= set(card.data.tags)
    assert is_generated(card.text)


def test_saving_again_changes_nothing(tmp_path):
    model = get_peft_model(vit(), config_of("vpt"))
    first = save(model, tmp_path).read_text()
    assert save(model, tmp_path).read_text() == first
    add_usage_to_card(tmp_path, model.peft_config["default"])
    assert (tmp_path / "README.md").read_text() == first
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_results_stay_until_other_weights_are_saved(tmp_path):
    model = get_peft_model(vit(), config_of("vpt"))
    save(model, tmp_path)
    path = write_card(tmp_path, model.peft_config["default"], metrics={"accuracy": 0.9}, dataset="x y", license="mit")
    card = ModelCard.load(path)
    assert card.data.eval_results[0].metric_value == 0.9
    assert "| accuracy | 0.9 | x y |" in card.text
    card = ModelCard.load(save(model, tmp_path))
    assert card.data.eval_results is None
    assert card.data.metrics is None
    assert "accuracy" not in card.text
    assert card.data.license == "mit"


def test_text_that_somebody_wrote_stays(tmp_path):
    model = get_peft_model(vit(), config_of("vpt"))
    path = save(model, tmp_path)
    path.write_text(path.read_text().replace("## The adapter", "Mind the cats.\n\n## The adapter"))
    add_usage_to_card(tmp_path, model.peft_config["default"])
    before = path.read_bytes()
    assert b"Mind the cats." in before
    save(model, tmp_path)
    assert "Mind the cats." in path.read_text()
    write_card(tmp_path, model.peft_config["default"], metrics={"accuracy": 0.9}, dataset="x y")
    card = ModelCard.load(path)
    assert "Mind the cats." in card.text
    assert card.data.eval_results[0].metric_value == 0.9


def test_a_card_by_somebody_else_is_told_how_to_load_once(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlibrary_name: peft\nlicense: mit  # chosen with care\n---\n# My adapter\n\nWords.\n")
    model = get_peft_model(vit(), config_of("vpt"))
    config = model.peft_config["default"]
    add_usage_to_card(tmp_path, config)
    text = path.read_text()
    assert "# My adapter\n\nWords.\n\n## Use\n" in text
    assert text.count("import hf_visual_peft\n") == 1
    assert "VPT adapter for" not in text
    add_usage_to_card(tmp_path, config)
    assert path.read_text() == text


@pytest.mark.parametrize(
    "text",
    [
        "# A project\n\nNot the card of an adapter.\n",
        "---\nlibrary_name: transformers\n---\n# A model\n",
        "---\nlibrary_name: [peft\n---\n# Broken\n",
        "---\nlibrary_name: peft\n# a comment\n---\n# Mine\n\nFirst import hf_visual_peft.\n",
        "",
    ],
)
def test_another_readme_is_left_alone(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    add_usage_to_card(tmp_path, config_of("vpt"))
    assert path.read_text() == text


def test_a_card_of_pefts_own_methods_gets_no_section_of_ours(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlibrary_name: peft\n---\n# Mine\n")
    add_usage_to_card(tmp_path, config_of("lora"))
    assert path.read_text() == "---\nlibrary_name: peft\n---\n# Mine\n"


def test_an_adapter_with_a_name_has_a_card_in_its_folder(tmp_path):
    model = get_peft_model(vit(), config_of("vpt"))
    model.add_adapter("other", METHODS["vpt"].config_cls(num_virtual_tokens=3))
    model.save_pretrained(tmp_path)
    for folder, name in [(tmp_path, "default"), (tmp_path / "other", "other")]:
        add_usage_to_card(folder, model.peft_config[name])
    assert "num_virtual_tokens=10" in (tmp_path / "README.md").read_text()
    card = ModelCard.load(tmp_path / "other" / "README.md")
    assert "num_virtual_tokens=3" in card.text
    assert "import hf_visual_peft" in card.text
    assert card.data.base_model == "google/vit-tiny"


def test_a_full_disk_leaves_the_card_that_was_there(tmp_path):
    model = get_peft_model(vit(), config_of("vpt"))
    path = save(model, tmp_path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_card(tmp_path, model.peft_config["default"], metrics={"accuracy": 0.9}, dataset="x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_a_configuration_alone_gets_a_card_too(tmp_path):
    config = config_of("vpt")
    add_usage_to_card(tmp_path, config)
    card = ModelCard.load(tmp_path / "README.md")
    assert "import hf_visual_peft" in snippet_of(card.text)
    assert "Trained parameters" not in card.text


def test_the_card_survives_another_version_of_peft(tmp_path):
    """peft adds its version at each save; that is not an edit."""
    model = get_peft_model(vit(), config_of("vpt"))
    path = save(model, tmp_path)
    path.write_text(re.sub(r"- PEFT \S+", "- PEFT 0.20.0", path.read_text()))
    PeftModel.create_or_update_model_card(model, tmp_path)
    assert is_generated(ModelCard.load(path).text)


def test_the_package_carries_the_template():
    template = Path(hf_visual_peft.__file__).parent / "sharing" / "card_template.md"
    assert "{{ usage }}" in template.read_text()
    saved = json.dumps(build_card(config_of("vpt")).data.to_dict())
    assert "{{" not in saved + build_card(config_of("vpt")).text
