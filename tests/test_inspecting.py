"""`hf-visual-peft inspect`: what an adapter is, from headers alone."""

import json
import pickle
import struct
import sys

import pytest
import torch
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import hf_visual_peft
from hf_visual_peft.cli.main import main
from hf_visual_peft.sharing.inspecting import MAX_JSON, inspect_adapter


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name, config in {
        "ssf": hf_visual_peft.SSFConfig(),
        "vpt": hf_visual_peft.VPTConfig(num_virtual_tokens=7),
    }.items():
        get_peft_model(FAMILIES["vit"].model(), config).save_pretrained(folder / name)
    base = FAMILIES["vit"].model()
    config = hf_visual_peft.with_visual_targets(LoraConfig(r=3, use_dora=True), base)
    get_peft_model(base, config).save_pretrained(folder / "dora")
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    for file in (saved / "vpt").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def changed(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", ["ssf", "vpt", "dora"])
def test_facts_are_those_of_the_files(saved, name, capsys):
    weights = load_file(saved / name / "adapter_model.safetensors")
    header = inspect_adapter(str(saved / name))
    assert header.method.startswith(f"{name} of ")
    assert header.tensors == {key: list(value.shape) for key, value in weights.items()}
    assert header.values == sum(value.numel() for value in weights.values())
    assert header.num_bytes == (saved / name / "adapter_model.safetensors").stat().st_size
    assert header.dtypes == {"F32": len(weights)}
    assert header.notes == []
    assert main(["inspect", str(saved / name), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["values"] == header.values


def test_only_fields_other_than_the_defaults_are_shown(saved, capsys):
    head = {"modules_to_save": ["classifier"]}  # found in the model
    assert inspect_adapter(str(saved / "ssf")).fields == {"init_std": 0.02, **head}  # as is the former
    assert inspect_adapter(str(saved / "vpt")).fields == {"num_virtual_tokens": 7, **head}
    assert inspect_adapter(str(saved / "dora")).fields["r"] == 3
    assert main(["inspect", str(saved / "vpt"), str(saved / "ssf")]) == 0
    out = capsys.readouterr().out
    assert "num_virtual_tokens=7" in out
    assert out.count("method:") == 2


class Bomb:
    def __reduce__(self):
        return (sys.exit, ("unpickled",))


def test_nothing_of_the_files_runs(copied, capsys, monkeypatch):
    (copied / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    (copied / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(copied))
    monkeypatch.setattr(torch, "load", None)
    changed(copied, auto_mapping={"base_model_class": "X", "parent_library": "evil"})
    header = inspect_adapter(str(copied))
    assert "evil" not in sys.modules
    assert any("adapter_model.bin, evil.py" in note for note in header.notes)
    assert any("imports the Python module evil" in note for note in header.notes)


def test_control_characters_do_not_reach_the_terminal(copied, capsys):
    changed(copied, base_model_name_or_path="\x1b]0;owned\x07\x1b[2J" + "x" * 500, num_virtual_tokens=["\x9b2J\n"])
    assert main(["inspect", str(copied)]) == 0
    out = capsys.readouterr().out
    assert "\\x1b]0;owned" in out
    assert all(sign.isprintable() or sign == "\n" for sign in out)
    assert max(map(len, out.splitlines())) < 250


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"peft_type": "NOVEL"}, "Neither this version"),
        ({"peft_type": ["a"]}, "Neither this version"),
        ({"peft_type": None}, "Neither this version"),
        ({"a_new_field": 1}, "does not have: a_new_field"),
        ({"auto_mapping": "x"}, None),
        ({"auto_mapping": {"id2label": ["a"]}}, None),
    ],
)
def test_unknown_contents_are_told(copied, fields, note):
    changed(copied, **fields)
    notes = inspect_adapter(str(copied)).notes
    assert any(note in one for one in notes) if note else notes == []


def header_of(length, content=b""):
    return struct.pack("<Q", length) + content


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", b"{", "not readable JSON"),
        ("adapter_config.json", b"[1]", "holds a list, not"),
        ("adapter_config.json", b"[" * 100_000, "not readable JSON"),
        ("adapter_config.json", b"\xff\xfe", "not readable JSON"),
        ("adapter_config.json", b" " * (MAX_JSON + 1), "too many"),
        ("adapter_config.json", None, "no adapter_config.json"),
        ("adapter_model.safetensors", b"", "truncated or not a safetensors"),
        ("adapter_model.safetensors", header_of(2**62), "truncated or not a safetensors"),
        ("adapter_model.safetensors", header_of(10, b"{}"), "truncated or not a safetensors"),
        (
            "adapter_model.safetensors",
            header_of(62, b'{"a":{"dtype":"F32","shape":[999999],"data_offsets":[0,3999996]}}'[:62]),
            "truncated or not a safetensors",
        ),
        ("adapter_model.safetensors", pickle.dumps({"a": 1}), "truncated or not a safetensors"),
    ],
)
def test_damaged_files_are_one_line_and_the_others_are_shown(copied, saved, capsys, name, content, message):
    (copied / name).unlink()
    if content is not None:
        (copied / name).write_bytes(content)
    assert main(["inspect", str(copied), str(saved / "ssf")]) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert "method:" in shown.out


def test_a_path_that_is_nothing(capsys, tmp_path):
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "neither a folder nor a repository id" in capsys.readouterr().err
