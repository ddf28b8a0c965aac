"""Damaged or foreign files of adapters: one line that names the file, and the model stays as it was."""

from __future__ import annotations

import json

import pytest
import torch
from families import FAMILIES
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save

from hf_visual_peft import AdaptFormerConfig, VPTConfig, load_classifier
from hf_visual_peft.cli.main import main
from hf_visual_peft.core.adapter_files import check_config


CONFIGS = {"vpt": VPTConfig(num_virtual_tokens=2), "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter of this library and one of peft, with the base beside them."""
    found = tmp_path_factory.mktemp("adapters")
    FAMILIES["vit"].model().save_pretrained(found / "base")
    for name, config in CONFIGS.items():
        model = get_peft_model(FAMILIES["vit"].model(), config)
        model.peft_config["default"].base_model_name_or_path = str(found / "base")
        model.save_pretrained(found / name)
    return found


@pytest.fixture
def adapter(folders, tmp_path, request):
    for file in (folders / request.param).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


both = pytest.mark.parametrize("adapter", CONFIGS, indirect=True)


def opened_everywhere(folder, capsys=None):
    """The message of every way to open the adapter, each of which must leave its model alone."""
    messages = []
    model = FAMILIES["vit"].model()
    names = [name for name, _ in model.named_modules()]
    for opening in (
        lambda: PeftModel.from_pretrained(model, folder),
        lambda: model.load_adapter(str(folder)),
        lambda: load_classifier(str(folder)),
    ):
        with pytest.raises(ValueError, match="adapter_") as error:
            opening()
        messages.append(str(error.value))
        assert [name for name, _ in model.named_modules()] == names
        assert not getattr(model, "peft_config", None)
    adapted = get_peft_model(model, AdaptFormerConfig(r=2))
    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    with pytest.raises(ValueError, match="adapter_") as error:
        adapted.load_adapter(folder, adapter_name="second")
    messages.append(str(error.value))
    assert list(adapted.peft_config) == ["default"]
    assert before.keys() == adapted.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in adapted.state_dict().items())
    return messages


@both
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "is not readable JSON, perhaps cut short"),
        ("empty", "is an empty file"),
        ("bytes", "is not readable JSON"),
        ("list", "holds a list, not the fields"),
        ("null", "holds null, not the fields"),
    ],
)
def test_configurations_that_are_no_json_object(adapter, damage, message):
    path = adapter / "adapter_config.json"
    whole = path.read_bytes()
    path.write_bytes(
        {"cut": whole[:-20], "empty": b"", "bytes": b"\xff\x00\xd8", "list": b"[%s]" % whole, "null": b"null"}[damage]
    )
    for told in opened_everywhere(adapter):
        assert told.startswith(f"{path} {message}")
        assert "\n" not in told


@pytest.mark.parametrize(
    ("adapter", "field", "value", "message"),
    [
        ("vpt", "peft_type", "vpt", "peft_type is 'vpt', a method that .* Did you mean 'VPT'"),
        ("lora", "peft_type", "somebody's", 'peft_type is "somebody\'s", a method that neither'),
        ("lora", "peft_type", None, "has no peft_type"),
        ("vpt", "peft_type", 3, "peft_type is 3"),
        ("vpt", "num_virtual_tokens", "many", "VPTConfig.num_virtual_tokens is 'many': must be an integer from 1"),
        ("vpt", "num_virtual_tokens", None, "VPTConfig.num_virtual_tokens is None: must be"),
        ("vpt", "modules_to_save", "head", "VPTConfig.modules_to_save is 'head': must be None or a list"),
        ("vpt", "dropout", [0.1], r"VPTConfig.dropout is \[0.1\]: must be a finite number"),
        ("vpt", "task_type", "EVERYTHING", "Invalid task type: 'EVERYTHING'"),
        ("lora", "r", "8", "LoraConfig.r is '8': must be a number"),
        ("lora", "r", None, "LoraConfig.r is None: must be a number"),
        ("lora", "lora_dropout", "0.1", "LoraConfig.lora_dropout is '0.1': must be a number"),
        ("lora", "target_modules", 7, "LoraConfig.target_modules is 7: must be a list or a text or null"),
        ("lora", "modules_to_save", {"head": True}, "LoraConfig.modules_to_save is .* must be a list or null"),
        ("lora", "auto_mapping", ["a"], "LoraConfig.auto_mapping is .* must be an object or null"),
    ],
    indirect=["adapter"],
)
def test_fields_of_a_wrong_type(adapter, field, value, message):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    for told in opened_everywhere(adapter):
        assert told.startswith(str(path))
        assert "\n" not in told
    with pytest.raises(ValueError, match=message):
        PeftConfig.from_pretrained(adapter)


@both
@pytest.mark.parametrize("damage", ["cut", "empty", "pickle"])
def test_weights_that_are_no_safetensors_file(adapter, damage):
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "pickle": b"PK\x03\x04" + whole[4:]}[damage])
    for told in opened_everywhere(adapter):
        assert told.startswith(f"{path} is truncated or not a safetensors file")
        assert "\n" not in told


@both
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_weights_that_torch_wrote(adapter, damage):
    """peft reads `adapter_model.bin` where there are no safetensors."""
    weights = adapter / "adapter_model.safetensors"
    path = adapter / "adapter_model.bin"
    torch.save(load_file(weights), path)
    weights.unlink()
    PeftModel.from_pretrained(FAMILIES["vit"].model(), adapter)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"version https://git-lfs"}[damage])
    for told in opened_everywhere(adapter):
        assert told.startswith(f"{path} is truncated or was not written by torch.save")
        assert "\n" not in told


@both
def test_weights_that_are_missing(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    model = FAMILIES["vit"].model()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"has adapter_config.json, but no adapter_model.safetensors: the"):
        PeftModel.from_pretrained(model, adapter)
    assert [name for name, _ in model.named_modules()] == names
    assert PeftConfig.from_pretrained(adapter).peft_type in ("VPT", "LORA")  # the configuration alone can be read


@pytest.mark.parametrize("adapter", ["vpt"], indirect=True)
def test_weights_of_something_else(adapter):
    (adapter / "adapter_model.safetensors").write_bytes(save({"embeddings.weight": torch.zeros(2, 2)}))
    model = FAMILIES["vit"].model()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"embeddings.weight.* is not expected|is missing"):
        PeftModel.from_pretrained(model, adapter)
    assert [name for name, _ in model.named_modules()] == names


@both
def test_the_command_line_says_so_in_one_line(adapter, tmp_path, capsys):
    (adapter / "adapter_config.json").write_text("{")
    image = tmp_path / "image.png"
    image.write_bytes(b"")
    for command in (["inspect", str(adapter)], ["predict", str(adapter), str(image)]):
        assert main(command) != 0
        told = capsys.readouterr().err.strip().splitlines()
        assert "adapter_config.json is not readable JSON" in told[-1]
        assert not any("Traceback" in line for line in told)


def test_what_peft_writes_itself_is_accepted(tmp_path):
    """Every config of peft that can be built without arguments, as it writes it."""
    for config_cls in {cls for cls in PEFT_TYPE_TO_CONFIG_MAPPING.values() if cls.__module__.startswith("peft.")}:
        try:
            config = config_cls()
        except (ValueError, TypeError, ImportError):
            continue
        config.save_pretrained(tmp_path)
        check_config(json.loads((tmp_path / "adapter_config.json").read_text()), "here")
    LoraConfig(target_modules={"q", "v"}, lora_dropout=0, rank_pattern={"a": 2}).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).target_modules == {"q", "v"}
