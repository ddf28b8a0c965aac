"""The recipe: its main job, which epoch and split it takes, its options, and real launches."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import arguments
import checkpoints
import image_classification
import image_sources
import labels
import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel
from recipe_runs import LABELS, RECIPES, SIZE, accuracy_by_hand, fails, weights
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2Model,
    ViTImageProcessor,
)

import hf_visual_peft
from hf_visual_peft.core.targets import TargetedConfig
from hf_visual_peft.coverage.sizes import tiny_fields
from hf_visual_peft.peft_methods.methods import PeftMethod, any_method


IMAGE_METHODS = [name for name, method in hf_visual_peft.list_methods().items() if not method.video]
TWO = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"


@pytest.mark.parametrize("method", [*IMAGE_METHODS, "dora", "ln_tuning"])
def test_saved_adapter_reloads_to_the_reported_accuracy(method, run, vit, photos):
    done = run(method=method)
    base = AutoModelForImageClassification.from_pretrained(vit, **LABELS)
    model = PeftModel.from_pretrained(base, done.output)
    processor = AutoImageProcessor.from_pretrained(done.output)
    assert accuracy_by_hand(model, photos / "test", processor) == done.results["test_accuracy"]
    on_disk = json.loads((done.output / "all_results.json").read_text())
    assert on_disk == done.results
    assert on_disk["steps"] == 2 * 6
    assert on_disk["num_processes"] == 1
    assert 1 <= on_disk["epoch"] <= 2
    assert not list(done.output.glob(".*")), "nothing is left of writing aside"


def test_training_learns(run):
    """Twelve epochs tell colours apart that no untrained head does."""
    done = run("--num_train_epochs", 12, "--train_crop", "none", method="adaptformer")
    assert done.results["test_accuracy"] >= 0.8


def test_linear_and_full_train_what_they_say(run, vit):
    before = load_file(Path(vit) / "model.safetensors")
    changed = {}
    for method in ("linear", "full"):
        done = run("--max_train_steps", 2, method=method, output=method)
        after = load_file(done.output / "model.safetensors")
        changed[method] = {
            n for n, t in after.items() if not torch.equal(t, before.get(n.removeprefix("vit."), t + 1))
        }
        model = AutoModelForImageClassification.from_pretrained(done.output)
        assert model.config.id2label == LABELS["id2label"]
    assert changed["linear"] == {"classifier.weight", "classifier.bias"}
    assert len(changed["full"]) > 30


@pytest.mark.parametrize("config", sorted((RECIPES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_runs_and_its_fields_arrive(config, run, clips):
    content = yaml.safe_load(config.read_text())
    data = ["--dataset_name", str(clips)] if "clip_frames" in content else None
    method = any_method(content["method"])
    small = {} if isinstance(method, PeftMethod) else tiny_fields(method.config_cls)  # as the images are small
    words = [word for name in small.keys() & content.keys() for word in (f"--{name}", small[name])]
    quick = ("--max_train_steps", 2, "--per_device_train_batch_size", 4)
    done = run("--config", config, *quick, *words, method=None, data=data)
    saved = json.loads((done.output / "adapter_config.json").read_text())
    assert saved["peft_type"] == method.peft_type
    assert method.name == config.stem
    fields = {name: small.get(name, value) for name, value in content.items() if name in saved}
    own = set(saved) - {field.name for field in dataclasses.fields(TargetedConfig)}
    if isinstance(method, PeftMethod):
        assert {name: saved[name] for name in method.chosen} == method.chosen
    else:
        assert bool(fields) == bool(own), "the file sets fields of the method, if it has any"
    if "parts" in fields:  # files have all fields of each
        parts, asked = (method.config_cls(parts=each.pop("parts")).parts for each in (saved, fields))
        assert parts == asked
    assert {name: saved[name] for name in fields} == fields
    assert done.results["steps"] == 2


def test_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    content = ["method: convpass", "sublayers: [attention]", "r: 3", "learning_rate: 1e-2", "report_to: [none]"]
    file.write_text("\n".join([*content, "gradient_checkpointing: true", "seed: null"]))
    words = [
        "--config",
        str(file),
        "--model_name_or_path",
        "m",
        "--train_dir",
        "d",
        "--output_dir",
        str(tmp_path / "o"),
    ]
    args, config = arguments.parse_args(words)
    assert (config.r, tuple(config.sublayers), args.learning_rate) == (3, ("attention",), 0.01)
    assert args.gradient_checkpointing
    more = [*words, "--r", "5", "--learning_rate", "0.5", "--gradient_checkpointing", "false", "--dropout", "0"]
    args, config = arguments.parse_args(more)
    assert (config.r, config.dropout, args.learning_rate, args.gradient_checkpointing) == (5, 0, 0.5, False)


def test_options_of_training_run_together(run):
    done = run(
        *(
            "--mixed_precision",
            "bf16",
            "--gradient_checkpointing",
            "--gradient_accumulation_steps",
            2,
            "--optim",
            "sgd",
        ),
        *("--max_grad_norm", 1, "--label_smoothing_factor", 0.1, "--num_warmup_steps", 0.5, "--top_k", 2),
        *(
            "--metric_for_best_model",
            "mean_per_class_accuracy",
            "--dataloader_num_workers",
            1,
            "--train_crop",
            "random",
        ),
    )
    assert done.results["steps"] == 2 * 3
    assert done.results["test_top_2_accuracy"] >= done.results["test_accuracy"]


def test_other_image_sizes(run, tmp_path):
    done = run("--image_size", 48, "--interpolate_pos_encoding", "--max_train_steps", 1)
    assert AutoImageProcessor.from_pretrained(done.output).size["height"] == 48
    with pytest.raises(ValueError, match=r"[Ii]nput image size"):
        run("--image_size", 48, "--max_train_steps", 1, output="without")
    folder = str(tmp_path / "dinov2")
    Dinov2Model(Dinov2Config(**SIZE, mlp_ratio=2)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    with pytest.raises(ValueError, match="--interpolate_pos_encoding: Dinov2ForImageClassification has no such"):
        run("--model_name_or_path", folder, "--interpolate_pos_encoding", output="dinov2-flag")
    run("--model_name_or_path", folder, "--image_size", 48, "--max_train_steps", 1, output="dinov2")


def test_best_epoch_is_chosen_on_validation_and_test_is_used_once(run, photos, monkeypatch):
    """Scripted validation figures: the weights of the second of three epochs are kept, whatever test says."""
    seen = []

    def scripted(accelerator, model, loader, metrics, inputs, name):
        value = 0.0 if name == "test" else {0: 0.4, 1: 0.9, 2: 0.8}[len(seen)]
        seen.append((name, checkpoints.trainable_state(model)))
        return {"accuracy": value, "mean_per_class_accuracy": value, "loss": 1.0}

    monkeypatch.setattr(image_classification, "evaluate_split", scripted)
    done = run("--num_train_epochs", 3)
    assert [name for name, _ in seen] == ["validation"] * 3 + ["test"]
    assert (done.results["epoch"], done.results["eval_accuracy"], done.results["test_accuracy"]) == (2, 0.9, 0.0)
    second, third, tested = seen[1][1], seen[2][1], seen[3][1]
    assert all(torch.equal(second[name], tested[name]) for name in second)
    assert not any(torch.equal(second[name], third[name]) for name in second)
    saved = load_file(done.output / "adapter_model.safetensors")
    head = "base_model.model.classifier.weight"
    assert torch.equal(saved[head], second["base_model.model.classifier.modules_to_save.default.weight"])
    seen.clear()
    last = run("--num_train_epochs", 3, "--select", "last", output="last")
    assert last.results["epoch"] == 3
    assert weights(last.output) != weights(done.output)


def test_other_test_images_leave_the_adapter_alone(run, photos):
    data = ["--train_dir", photos / "train", "--validation_dir", photos / "validation", "--test_dir"]
    one = run(data=[*map(str, data), str(photos / "test")], output="one")
    other = run(data=[*map(str, data), str(photos / "train")], output="other")
    assert weights(one.output) == weights(other.output)
    assert one.results["test_loss"] != other.results["test_loss"]


def test_validation_is_held_out_of_train_where_there_is_none(run, photos, capsys):
    data = ["--train_dir", str(photos / "train")]
    done = run("--max_train_steps", 1, "--train_val_split", 0.3, data=data)
    assert "16 train, 6 validation images of 3 classes" in capsys.readouterr().out
    assert "eval_accuracy" in done.results
    assert not any(name.startswith("test") for name in done.results)
    last = run("--max_train_steps", 1, "--select", "last", data=data, output="last")
    assert "22 train images of 3 classes" in capsys.readouterr().out
    assert not any(name.startswith("eval") for name in last.results)
    with pytest.raises(ValueError, match="--select best needs a validation split"):
        run("--train_val_split", 0, data=data, output="none")


def test_hold_out_takes_the_same_share_of_each_class():
    ids = np.repeat([0, 1, 2], [40, 20, 100])
    kept, held = labels.hold_out(ids, 0.15, seed=1)
    assert sorted([*kept, *held]) == list(range(160))
    assert np.bincount(ids[held]).tolist() == [6, 3, 15]
    assert not np.array_equal(held, labels.hold_out(ids, 0.15, seed=2)[1])


@pytest.mark.parametrize(
    ("field", "words", "value"),
    [
        ("modules_to_save", ["classifier"], ["classifier"]),
        ("modules_to_save", ["classifier", "layernorm"], ["classifier", "layernorm"]),
        ("modules_to_save", [[]], []),
        ("modules_to_save", [None], None),
        ("layers_to_transform", [3], 3),
        ("exclude_modules", [r".*fc1"], r".*fc1"),
        ("sublayers", ["mlp"], ["mlp"]),
    ],
)
def test_one_word_is_a_list_where_only_lists_are_allowed(field, words, value):
    found = {each.name: each for each in dataclasses.fields(hf_visual_peft.ConvpassConfig)}[field]
    assert arguments.field_value(found, words) == value


def test_one_word_is_a_list_for_methods_of_peft():
    fields = {each.name: each for each in dataclasses.fields(LoraConfig)}
    assert arguments.field_value(fields["modules_to_save"], ["classifier"]) == ["classifier"]
    assert arguments.field_value(fields["target_modules"], [".*query"]) == ".*query"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--method", "vpd"],
            "--method vpd: Did you mean 'vp' or 'vpt'? Choose one of "
            f"{', '.join(hf_visual_peft.list_methods())}, linear",
        ),
        (["--method", "adalora"], "--method adalora: Did you mean "),
        (["--method", "xyz"], "--method xyz: choose one of "),
        (["--method", "aim"], "--method aim takes videos: give --clip_frames"),
        (["--method", "STAdapter"], "--method STAdapter takes videos: give --clip_frames"),
        (["--clip_frames", "4"], "--method vpt takes single images: remove --clip_frames"),
        (["--num_virtual_tokens", "0"], "num_virtual_tokens"),
        (["--r", "4"], "unknown: --r 4. --help lists the flags; those of --method vpt are: --"),
        (["--num_virtual_token", "4"], "unknown: --num_virtual_token 4. Did you mean '--num_virtual_tokens"),
        (["--learning_rte=1"], "unknown: --learning_rte=1. Did you mean '--learning_rate"),
        (["--train_file", "x.parquet"], "one of --dataset_name, --train_dir and --train_file is needed, got 2"),
        (["--learning_rate", "-1"], "argument --learning_rate: must be 0 or greater, got -1"),
        (["--learning_rate", "fast"], "argument --learning_rate: invalid float value: 'fast'"),
        (["--horizontal_flip", "2"], "--horizontal_flip must be between 0 and 1"),
        (["--checkpointing_steps", "0"], "--checkpointing_steps must be epoch, no, or a number, got 0"),
        (["--report_to", "papyrus"], "--report_to papyrus: choose none, or some of aim, all, clearml"),
        (["--report_to", "wandb"], "--report_to wandb: the package 'wandb' is not installed: pip install wandb"),
        (["--push_to_hub"], "--push_to_hub needs --hub_model_id"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_bad_flags_end_before_anything_is_loaded(run, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(arguments, "get_available_trackers", list)
    monkeypatch.setattr(image_classification, "load_processor", lambda args: pytest.fail("loaded"))
    assert message in fails(capsys, run, *flags)


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "processes"), [("--cpu --num_processes 1", 1), (TWO, 2)])
def test_launched(launch, processes, run, vit, photos, tmp_path):
    """On two processes the figures are those of all test images, each once, as one process finds them.

    There, an epoch of 16 images is one step of two batches on each process, where up to nine are asked for: the run
    is that of one process with batches of 16.
    """
    output = tmp_path / "out"
    data = [word for split in image_sources.SPLITS for word in (f"--{split}_dir", str(photos / split))]
    flags = "--method convpass --num_train_epochs 2 --per_device_train_batch_size 4 --per_device_eval_batch_size 2"
    flags += " --learning_rate 0.01"
    if processes == 2:
        flags += " --max_train_samples 16 --gradient_accumulation_steps 9 --select last --optim sgd --dropout 0"
    script = [str(RECIPES / "image_classification.py"), "--model_name_or_path", vit, *data, *flags.split()]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), *script, "--output_dir", str(output)],
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((output / "all_results.json").read_text())
    assert results["num_processes"] == processes
    assert results["steps"] == (12 if processes == 1 else 2)
    if processes == 2:
        flags = ["--max_train_samples", 16, "--per_device_train_batch_size", 16, "--select", "last"]
        flags += ["--optim", "sgd", "--dropout", 0]
        one = load_file(run(*flags, method="convpass", output="one").output / "adapter_model.safetensors")
        two = load_file(output / "adapter_model.safetensors")
        assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    model = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(vit, **LABELS), output)
    processor = AutoImageProcessor.from_pretrained(output)
    for split, name in (("test", "test_accuracy"), ("validation", "eval_accuracy")):
        assert accuracy_by_hand(model, photos / split, processor) == pytest.approx(results[name], abs=1e-12)
    schedule = torch.load(output / f"checkpoint-{results['steps']}" / "scheduler.bin", weights_only=True)
    assert schedule["last_epoch"] == results["steps"], "the schedule counts optimizer steps on any number of processes"
    assert {path.name for path in (output / f"checkpoint-{results['steps']}").glob("random*")} == {
        f"random_states_{rank}.pkl" for rank in range(processes)
    }
