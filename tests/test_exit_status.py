"""The exit status of every command: 0 done, 1 the work failed, 2 the arguments make no sense."""

import json

import pytest
import torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_visual_peft import SSFConfig
from hf_visual_peft.cli.commands import COMMANDS
from hf_visual_peft.cli.main import main


TRAIN = ["--method", "vpt", "--model_name_or_path", "nowhere", "--output_dir", "{out}"]
# words that can be read, and fail at work: each names a folder or repository that is not there
FAIL = {
    "demo": ["--method", "vtp", "--output_dir", "{out}"],
    "train": [*TRAIN, "--train_dir", "{nowhere}"],
    "few-shot": ["--method", "kgcoop", *TRAIN[2:], "--train_dir", "{nowhere}", "--test_dir", "{nowhere}"],
    "predict": ["{nowhere}", "{nowhere}"],
    "compare": ["{nowhere}", "--output_dir", "{out}"],
    "merge": ["{nowhere}", "{out}"],
    "methods": ["vtp"],
    "coverage": ["--methods", "vtp"],
    "roles": ["{nowhere}"],
    "explain": ["{nowhere}"],
    "inspect": ["{nowhere}"],
    "report": ["{nowhere}"],
    "push": ["someone/adapters", "{nowhere}"],
    "serve": ["--model", "{nowhere}", "--adapters", "{nowhere}"],
}
NEEDS_HUB = {"pull", "search-hub"}  # on the loopback Hub in test_hub.py
ARGUMENTS_ONLY = {"benchmark", "completion", "sweep"}  # what they are given is checked as an argument


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    base = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8))
    base.save_pretrained(folder / "base")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "base")
    named = ViTForImageClassification.from_pretrained(folder / "base")  # so that the adapter names it
    get_peft_model(named, SSFConfig()).save_pretrained(folder / "adapter")
    return folder


def status(words):
    """What a shell would see."""
    try:
        return main(words)
    except SystemExit as stop:
        return stop.code


def test_every_command_is_tried():
    assert {*FAIL, *NEEDS_HUB, *ARGUMENTS_ONLY} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_flag_is_status_2(command, capsys):
    assert status([command, *FAIL.get(command, []), "--no_such_flag"]) == 2
    error = capsys.readouterr().err
    assert "--no_such_flag" in error or "the following arguments are required" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("command", FAIL)
def test_work_that_fails_is_status_1_and_tells_why_in_its_last_line(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"out": str(tmp_path / "out"), "nowhere": str(tmp_path / "nowhere")}
    assert status([command, *(word.format(**places) for word in FAIL[command])]) == 1
    error = capsys.readouterr().err
    assert error.strip().splitlines()[-1]
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "words",
    [
        ["methods", "vpt"],
        ["completion", "bash"],
        ["inspect", "adapter"],
        ["roles", "base", "--json"],
        ["explain", "base", "--json"],
        ["merge", "adapter", "merged"],
    ],
)
def test_work_that_is_done_is_status_0(words, adapter, capsys, monkeypatch):
    monkeypatch.chdir(adapter)
    assert status(words) == 0
    assert capsys.readouterr().out


def test_one_of_several_adapters_that_fails_is_told_by_the_status(adapter, capsys, monkeypatch):
    monkeypatch.chdir(adapter)
    assert status(["inspect", "adapter", "nowhere", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["method"]
