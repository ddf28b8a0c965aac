"""The image-classification recipe, in this process on a tiny ViT; launched for real twice."""

import dataclasses
import errno
import inspect
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate.tracking
import checkpoints
import datasets
import image_classification
import image_data
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import hf_visual_peft
from hf_visual_peft.peft_methods import PeftMethod, any_method
from hf_visual_peft.targets import TargetedConfig


RECIPES = Path(__file__).parents[1] / "recipes"

SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
LABELS = {"num_labels": 3, "id2label": {0: "blue", 1: "green", 2: "red"}}
IMAGE_METHODS = [name for name, method in hf_visual_peft.list_methods().items() if not method.video]
TEST_IMAGES = 11  # odd, so that two processes must pad


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("models") / "vit")
    ViTModel(ViTConfig(**SIZE, intermediate_size=128)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def paint(path, channel, rng):
    pixels = rng.integers(0, 200, (20, 24, 3))
    pixels[..., channel] += 12  # a hint of colour: learnable, and not at once
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, counts in {"train": (8, 8, 6), "validation": (5, 5, 5), "test": (4, 4, TEST_IMAGES - 8)}.items():
        for name, channel, count in zip(("red", "green", "blue"), range(3), counts, strict=True):
            for number in range(count):
                paint(folder / split / name / f"{number}.png", channel, rng)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A data set of lists of frames, from 3 to 9 of them; the number of the frame is its brightness."""
    folder = tmp_path_factory.mktemp("clips")
    encoded = {"bytes": None}

    def frame(number):
        file = io.BytesIO()
        Image.new("RGB", (20, 24), (20 * number,) * 3).save(file, "PNG")
        return encoded | {"bytes": file.getvalue()}

    features = datasets.Features(
        {"frames": datasets.List(datasets.Image()), "label": datasets.ClassLabel(names=["up", "down"])}
    )
    rows = {"frames": [], "label": []}
    for index in range(14):
        numbers = range(3 + index % 7)
        rows["frames"].append([frame(n) for n in (numbers if index % 2 == 0 else reversed(numbers))])
        rows["label"].append(index % 2)
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": whole, "validation": whole, "test": whole}).save_to_disk(folder)
    return folder


@pytest.fixture(autouse=True)
def _cpu_and_caches(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def run(vit, photos, tmp_path):
    def call(*flags, method="vpt", data=None, output="out"):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if data is None:
            data = [word for split in image_data.SPLITS for word in (f"--{split}_dir", str(photos / split))]
        common = ["--num_train_epochs", "2", "--per_device_train_batch_size", "4", "--learning_rate", "0.01"]
        common += ["--output_dir", str(tmp_path / output), *([] if method is None else ["--method", method])]
        words = ["--model_name_or_path", vit, *data, *common, *map(str, flags)]
        return SimpleNamespace(output=tmp_path / output, results=image_classification.main(words))

    return call


def fails(capsys, call, *flags, **more):
    """The message with which the parser refuses."""
    with pytest.raises(SystemExit) as stop:
        call(*flags, **more)
    assert stop.value.code == 2
    return capsys.readouterr().err


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def accuracy_by_hand(model, folder, processor, names=("blue", "green", "red")):
    hits = []
    for label, name in enumerate(names):
        for path in sorted((folder / name).iterdir()):
            inputs = processor(images=Image.open(path).convert("RGB"), return_tensors="pt")
            with torch.no_grad():
                hits.append(model.eval()(**inputs).logits.argmax().item() == label)
    return sum(hits) / len(hits)


# ------------------------------------------------------------ the main job


@pytest.mark.parametrize("method", [*IMAGE_METHODS, "dora", "ln_tuning"])
def test_saved_adapter_reloads_to_the_reported_accuracy(method, run, vit, photos):
    done = run("--num_train_epochs", 3, method=method)
    base = AutoModelForImageClassification.from_pretrained(vit, **LABELS)
    model = PeftModel.from_pretrained(base, done.output)
    processor = AutoImageProcessor.from_pretrained(done.output)
    assert accuracy_by_hand(model, photos / "test", processor) == done.results["test_accuracy"]
    on_disk = json.loads((done.output / "all_results.json").read_text())
    assert on_disk == done.results
    assert on_disk["steps"] == 3 * 6
    assert on_disk["num_processes"] == 1
    assert 1 <= on_disk["epoch"] <= 3
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
    done = run("--config", config, "--max_train_steps", 2, "--per_device_train_batch_size", 4, method=None, data=data)
    saved = json.loads((done.output / "adapter_config.json").read_text())
    method = any_method(content["method"])
    assert saved["peft_type"] == method.peft_type
    assert method.name == config.stem
    fields = {name: value for name, value in content.items() if name in saved}
    own = set(saved) - {field.name for field in dataclasses.fields(TargetedConfig)}
    if isinstance(method, PeftMethod):
        assert {name: saved[name] for name in method.chosen} == method.chosen
    else:
        assert bool(fields) == bool(own), "the file sets fields of the method, if it has any"
    assert {name: saved[name] for name in fields} == fields
    assert done.results["steps"] == 2


def test_videos_reach_the_model_as_lists_of_frames(run, clips):
    done = run("--clip_frames", 3, "--num_frames", 3, method="aim", data=["--dataset_name", str(clips)])
    model = AutoModelForImageClassification.from_pretrained(done.output)
    assert model.peft_config["default"].num_frames == 3
    processor = ViTImageProcessor.from_pretrained(done.output)
    hits = []
    for row in datasets.load_from_disk(clips)["test"]:
        length = len(row["frames"])
        middle = [row["frames"][int(length * (2 * part + 1) / 6)] for part in range(3)]
        pixels = processor(images=middle, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            hits.append(model.eval()(pixel_values=pixels[None]).logits.argmax().item() == row["label"])
    assert done.results["test_accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_frames_of_a_clip_get_the_same_crop_and_come_from_all_its_parts(clips, run, monkeypatch):
    seen = []
    real = image_data.Images.crop

    def crop(self, image, rng):
        seen.append((image.getpixel((0, 0))[0] // 20, rng.bit_generator.state["state"]["state"]))
        return real(self, image, rng)

    monkeypatch.setattr(image_data.Images, "crop", crop)
    run("--clip_frames", 3, "--max_train_steps", 1, method="stadapter", data=["--dataset_name", str(clips)])
    assert len(seen) >= 12
    for start in range(0, 12, 3):
        shades, draws = zip(*seen[start : start + 3], strict=True)
        assert len(set(shades)) == 3
        assert list(shades) in (sorted(shades), sorted(shades, reverse=True))
        assert len(set(draws)) == 1
    assert len({draws for _, draws in seen[:12]}) == 4


def test_bad_clips(run, clips, tmp_path, capsys):
    flags = ("--clip_frames", 2, "--max_train_steps", 1)
    with pytest.raises(ValueError, match="--clip_frames: the column 'image' must hold lists of images"):
        run(*flags, method="aim")
    broken = datasets.load_from_disk(clips)
    rows = broken["train"].cast_column("frames", datasets.List(datasets.Image(decode=False))).to_list()
    rows[5]["frames"][1]["bytes"] = b"no image"
    rows[6]["frames"] = []
    broken["train"] = datasets.Dataset.from_list(rows).cast(broken["train"].features)
    broken.save_to_disk(tmp_path / "broken")
    data = ["--dataset_name", str(tmp_path / "broken")]
    with pytest.raises(ValueError, match="sample 5 of the train split, 2 such images in all"):
        run(*flags, method="aim", data=data)
    run(*flags, "--skip_corrupt_images", method="aim", data=data, output="skipped")
    assert "2 corrupt ones skipped" in capsys.readouterr().out


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
    args, config = image_classification.parse_args(words)
    assert (config.r, tuple(config.sublayers), args.learning_rate) == (3, ("attention",), 0.01)
    assert args.gradient_checkpointing
    more = [*words, "--r", "5", "--learning_rate", "0.5", "--gradient_checkpointing", "false", "--dropout", "0"]
    args, config = image_classification.parse_args(more)
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
    with pytest.raises(ValueError, match="--interpolate_pos_encoding: Dinov2ForImageClassification takes no such"):
        run("--model_name_or_path", folder, "--interpolate_pos_encoding", output="dinov2-flag")
    run("--model_name_or_path", folder, "--image_size", 48, "--max_train_steps", 1, output="dinov2")


# ------------------------------------------------------------ which epoch, which split


def test_best_epoch_is_chosen_on_validation_and_test_is_used_once(run, photos, monkeypatch):
    """Scripted validation figures: the weights of the second of three epochs are kept, whatever test says."""
    seen = []

    def scripted(accelerator, model, loader, metrics, inputs, name):
        value = 0.0 if name == "test" else {0: 0.4, 1: 0.9, 2: 0.9}[len(seen)]
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
    kept, held = image_data.hold_out(ids, 0.15, seed=1)
    assert sorted([*kept, *held]) == list(range(160))
    assert np.bincount(ids[held]).tolist() == [6, 3, 15]
    assert not np.array_equal(held, image_data.hold_out(ids, 0.15, seed=2)[1])


# ------------------------------------------------------------ checkpoints


def killed_after(monkeypatch, step):
    """Let the checkpoint at a step be written and kill the run right after."""
    save = checkpoints.Checkpoints.save

    def save_and_die(self, progress, best_state):
        save(self, progress, best_state)
        if progress.step == step:
            raise KeyboardInterrupt

    return monkeypatch.setattr(checkpoints.Checkpoints, "save", save_and_die)


# 6 batches and 3 steps an epoch; the last epoch, as the best may be one from before the kill
EXACT = ["--num_train_epochs", 3, "--dropout", 0.3, "--gradient_accumulation_steps", 2, "--num_warmup_steps", 0.2]
EXACT += ["--select", "last"]


@pytest.mark.parametrize(
    ("every", "step", "workers", "select"),
    [
        pytest.param(1, 4, 0, "last", id="amid an epoch"),
        pytest.param(1, 4, 2, "last", id="with other workers"),
        pytest.param(3, 6, 0, "last", id="before evaluation"),
        pytest.param("epoch", 3, 0, "last", id="after evaluation"),
        pytest.param(1, 9, 0, "last", id="after the last step"),
        pytest.param("epoch", 6, 0, "best", id="best epoch before"),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(run, monkeypatch, every, step, workers, select):
    flags = [*EXACT, "--checkpointing_steps", every, "--select", select]
    whole = run(*flags, output="whole")
    with monkeypatch.context() as patch:
        killed_after(patch, step)
        with pytest.raises(KeyboardInterrupt):
            run(*flags, output="killed")
    assert not (whole.output.parent / "killed" / "all_results.json").exists()
    torch.manual_seed(99)  # as a new process would have other random numbers
    latest = run(*flags, "--dataloader_num_workers", workers, "--resume_from_checkpoint", "latest", output="killed")
    assert weights(latest.output) == weights(whole.output)
    differ = {"train_runtime", "command"}
    assert {k: v for k, v in latest.results.items() if k not in differ} == {
        k: v for k, v in whole.results.items() if k not in differ
    }


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("sct", ["--channels", 8]),
        ("gps", []),
        ("lst", ["--r", 4, "--init", "fisher"]),
        ("biadaptformer", ["--bits", 4]),
    ],
)
def test_methods_with_more_to_their_state_than_weights_resume_exactly(method, fields, run, monkeypatch):
    """What was chosen from data stays chosen, and a quantised weight goes on from its full precision."""
    flags = [*fields, "--max_train_steps", 2, "--checkpointing_steps", 1, "--select", "last"]
    whole = run(*flags, method=method, output="whole")
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run(*flags, method=method, output="killed")
    torch.manual_seed(99)
    resumed = run(*flags, "--resume_from_checkpoint", "latest", method=method, output="killed")
    assert weights(resumed.output) == weights(whole.output)
    last = "checkpoint-2/trainable.safetensors"
    assert (resumed.output / last).read_bytes() == (whole.output / last).read_bytes()
    first, second = (load_file(whole.output / f"checkpoint-{step}" / "trainable.safetensors") for step in (1, 2))
    chosen = {name for name in first if name.endswith(".indices")}
    assert bool(chosen) == (method != "biadaptformer")
    assert all((first[name] >= 0).all() and torch.equal(first[name], second[name]) for name in chosen)
    trained = {name for name, tensor in first.items() if not torch.equal(tensor, second[name])}
    assert any(f".{method}_" in name for name in trained), "the second step moves the adapter"
    if method == "biadaptformer":
        latent = {name for name in first if name.endswith((".down.weight", ".up.weight"))}
        assert latent <= trained
        saved = load_file(resumed.output / "adapter_model.safetensors")
        assert not any(name.endswith((".down.weight", ".up.weight")) for name in saved)


@pytest.mark.parametrize("method", ["sct", "gps"])
def test_what_is_chosen_depends_on_the_training_images_alone(method, run, photos):
    data = ["--train_dir", photos / "train", "--validation_dir", photos / "validation", "--test_dir"]
    fields = ["--channels", 8] if method == "sct" else []
    flags = [*fields, "--max_train_steps", 1, "--select", "last"]
    found = []
    for output, test, train in (("one", "test", "train"), ("two", "train", "train"), ("three", "test", "validation")):
        data[1], test_dir = photos / train, photos / test
        done = run(*flags, method=method, data=[*map(str, data), str(test_dir)], output=output)
        saved = load_file(done.output / "adapter_model.safetensors")
        found.append({name: tensor for name, tensor in saved.items() if name.endswith(".indices")})
    one, two, three = found
    assert one
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert not all(torch.equal(tensor, three[name]) for name, tensor in one.items())


def test_dropout_and_crops_matter_to_the_test_above(run):
    """Another seed changes the weights, so that equal bits mean that the random states came back."""
    assert weights(run(*EXACT, output="a").output) != weights(run(*EXACT, "--seed", 43, output="b").output)


def test_checkpoints_hold_only_what_trains(run, vit):
    done = run("--checkpointing_steps", 4, "--save_total_limit", 2, method="adaptformer")
    found = sorted(path.name for path in done.output.glob("checkpoint-*"))
    assert found == ["checkpoint-12", "checkpoint-8"], "the oldest is gone"
    folder = done.output / "checkpoint-12"
    trained = load_file(folder / "trainable.safetensors")
    assert all("adaptformer_" in name or "classifier.modules_to_save" in name for name in trained)
    assert sum(tensor.numel() for tensor in trained.values()) == done.results["trainable_parameters"]
    assert load_file(folder / "best.safetensors").keys() == trained.keys()
    base = {tensor.numpy().tobytes() for tensor in load_file(Path(vit) / "model.safetensors").values() if tensor.any()}
    assert not any(tensor.numpy().tobytes() in base for tensor in trained.values() if tensor.unique().numel() > 1)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("trainable.safetensors", "best.safetensors", "progress.json"),
        *("optimizer.bin", "scheduler.bin", "random_states_0.pkl"),
    }
    small = run("--checkpointing_steps", "epoch", "--num_virtual_tokens", 1, output="small")
    for file in small.output.glob("checkpoint-*/*"):
        assert file.stat().st_size < (Path(vit) / "model.safetensors").stat().st_size / 4, file


@pytest.mark.parametrize("what", ["trainable.safetensors", "optimizer.bin", "progress.json", "file size limit"])
def test_full_disk_leaves_the_checkpoint_before_whole(run, monkeypatch, what):
    """The second checkpoint cannot be written: the error says so, nothing half stays, and the first still resumes."""
    resource = pytest.importorskip("resource") if what == "file size limit" else None
    flags = [*EXACT, "--checkpointing_steps", 3]
    whole = run(*flags, output="whole")
    writes, limits = [], None

    def out_of_space(write, position):
        def limited(*args, **kwargs):
            writes.append(Path(args[position]).name)
            if "checkpoint-6" in str(args[position]) and (what is None or Path(args[position]).name == what):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[position]))
            return write(*args, **kwargs)

        return limited

    with monkeypatch.context() as patch:
        if resource:  # writes that fail in the kernel, as on a full disk
            save = checkpoints.Checkpoints.save

            def save_in_little_space(self, progress, best_state):
                if progress.step == 6:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
                save(self, progress, best_state)

            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            patch.setattr(checkpoints.Checkpoints, "save", save_in_little_space)
        else:
            patch.setattr(checkpoints, "save_file", out_of_space(checkpoints.save_file, 1))
            patch.setattr(torch, "save", out_of_space(torch.save, 1))
            patch.setattr(Path, "write_text", out_of_space(Path.write_text, 0))
        try:
            with pytest.raises(
                OSError, match=r"Cannot write .*checkpoint-6: .* last whole checkpoint is .*checkpoint-3"
            ):
                run(*flags, output="full")
        finally:
            if resource:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder = whole.output.parent / "full"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-3"]
    resumed = run(*flags, "--resume_from_checkpoint", "latest", output="full")
    assert weights(resumed.output) == weights(whole.output)


def test_a_kill_while_writing_is_cleared_away(run, monkeypatch):
    run("--max_train_steps", 2, "--checkpointing_steps", 2, "--select", "last")
    done = run("--overwrite_output_dir", "--checkpointing_steps", 2)
    broken = done.output / ".checkpoint-14.tmp"
    shutil.copytree(done.output / "checkpoint-12", broken)
    (broken / "progress.json").unlink()
    again = run("--checkpointing_steps", 2, "--resume_from_checkpoint", str(done.output / "checkpoint-10"))
    assert not broken.exists()
    assert again.results["test_loss"] == done.results["test_loss"]


def test_what_cannot_be_resumed_says_why(run, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"latest: no checkpoint in"):
        run("--resume_from_checkpoint", "latest")
    done = run("--max_train_steps", 2, "--checkpointing_steps", 2)
    with pytest.raises(ValueError, match=r"comes from a run with learning_rate 0\.01 \(now 0\.5\)"):
        run("--max_train_steps", 2, "--learning_rate", 0.5, "--resume_from_checkpoint", "latest")
    with pytest.raises(ValueError, match=r"out is no checkpoint of this recipe"):
        run("--max_train_steps", 2, "--resume_from_checkpoint", done.output)
    message = fails(capsys, run, "--max_train_steps", 2)
    assert "has a run (checkpoint-2, all_results.json)" in message
    assert "--overwrite_output_dir" in message
    run("--max_train_steps", 1, "--checkpointing_steps", "no", "--overwrite_output_dir")
    assert not list(done.output.glob("checkpoint-*"))


# ------------------------------------------------------------ bad input


def test_data_set_without_labels_lists_its_columns(run, photos, tmp_path):
    for number in range(3):
        paint(tmp_path / "flat" / f"{number}.png", 0, np.random.default_rng(number))
    with pytest.raises(
        ValueError, match=r"no label column 'label': choose by --label_column_name among image \(Image\)"
    ):
        run(data=["--train_dir", str(tmp_path / "flat")])
    with pytest.raises(ValueError, match=r"no label column 'colour'.* among image \(Image\), label \(ClassLabel\)"):
        run("--label_column_name", "colour")
    with pytest.raises(ValueError, match=r"no image column 'photo'.* --image_column_name"):
        run("--image_column_name", "photo")


def test_unlabelled_and_unknown_classes_are_named(run, photos, tmp_path):
    for split, labels in {"train": [0, 1, 0, 1], "test": [-1, -1], "odd": [0, 2]}.items():
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=["a", "b", "c"][: 3 if split == "odd" else 2]),
            }
        )
        images = [str(photos / "train" / "red" / "0.png")] * len(labels)
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(tmp_path / f"{split}.parquet")
    train = ["--train_file", str(tmp_path / "train.parquet"), "--select", "last", "--max_train_steps", "1"]
    with pytest.raises(ValueError, match=r"test split has samples without label \(-1\)\. --test_split none drops it"):
        run(data=[*train, "--test_file", str(tmp_path / "test.parquet")])
    run(data=[*train, "--test_file", str(tmp_path / "test.parquet"), "--test_split", "none"])
    with pytest.raises(ValueError, match=r"Class 'c' of the test split is none of the training split's: \['a', 'b'\]"):
        run("--overwrite_output_dir", data=[*train, "--test_file", str(tmp_path / "odd.parquet")])


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_corrupt_image_is_named_or_skipped_and_counted(run, photos, tmp_path, damage):
    for split in ("train", "test"):
        shutil.copytree(photos / split, tmp_path / "data" / split)
    bad = tmp_path / "data" / "test" / "green" / "1.png"
    bad.write_bytes({"truncated": bad.read_bytes()[:-700], "text": b"not an image", "empty": b""}[damage])
    data = [w for split in ("train", "test") for w in (f"--{split}_dir", str(tmp_path / "data" / split))]
    with pytest.raises(
        image_data.CorruptImageError, match=r"Cannot decode .*test/green/1\.png .*1 such images in all"
    ):
        run(data=data)
    assert list((tmp_path / "out").iterdir()) == [], "found before anything was trained"
    with pytest.raises(
        image_data.CorruptImageError, match=r"Cannot decode .*test/green/1\.png \(sample \d+ of the test"
    ):
        run("--check_images", "false", "--max_train_steps", 1, data=data, output="unchecked")
    assert (tmp_path / "unchecked" / "adapter_model.safetensors").exists(), "the training is not lost"
    done = run("--skip_corrupt_images", data=data, output="skipped")
    assert done.results["skipped_images"] == 1
    base = tmp_path / "base"
    bad.unlink()
    clean = run(data=data, output=base.name)
    assert clean.results["test_loss"] == done.results["test_loss"]


def test_corrupt_image_within_a_parquet_file(run, photos, tmp_path):
    paths = sorted((photos / "train").glob("*/*.png"))
    rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}, "label": path.parent.name} for path in paths]
    rows[5]["image"]["bytes"] = rows[5]["image"]["bytes"][:100]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "train.parquet")
    data = ["--train_file", str(tmp_path / "train.parquet")]
    with pytest.raises(image_data.CorruptImageError, match=rf"Cannot decode {paths[5].name} \(sample \d+ of the"):
        run(data=data)
    done = run("--skip_corrupt_images", "--max_train_steps", 1, data=data, output="skipped")
    assert done.results["skipped_images"] == 1
    config = json.loads((done.output / "checkpoint-1" / "progress.json").read_text())
    assert config["run"]["classes"] == ["blue", "green", "red"], "text labels are classes in alphabetical order"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "vpd"], f"--method vpd: choose one of {', '.join(hf_visual_peft.list_methods())}, linear, full"),
        (["--method", "adalora"], "--method adalora: choose one of "),
        (["--method", "aim"], "--method aim takes videos: give --clip_frames"),
        (["--method", "STAdapter"], "--method STAdapter takes videos: give --clip_frames"),
        (["--clip_frames", "4"], "--method vpt takes single images: leave --clip_frames out"),
        (["--num_virtual_tokens", "0"], "num_virtual_tokens"),
        (["--r", "4"], "unknown: --r 4. --help lists the flags; those of --method vpt are: --"),
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
    monkeypatch.setattr(image_classification, "get_available_trackers", list)
    monkeypatch.setattr(image_classification, "load_processor", lambda args: pytest.fail("loaded"))
    assert message in fails(capsys, run, *flags)


def other_processor(folder):
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder / "other")
    return folder / "other"


def test_data_errors(run, photos, tmp_path):
    with pytest.raises(ValueError, match="--top_k 4: there are 3 classes"):
        run("--top_k", 4)
    with pytest.raises(
        ValueError, match=r"--validation_split dev: the data set has the splits train, validation, test"
    ):
        run("--validation_split", "dev")
    train = ["--train_dir", str(photos / "train")]
    with pytest.raises(ValueError, match=r"--test_split test: the data set has the splits train\."):
        run("--test_split", "test", data=train)
    done = run("--image_processor_name", str(other_processor(tmp_path)), "--max_train_steps", 1, output="other")
    assert list(AutoImageProcessor.from_pretrained(done.output).image_mean) == [0.1, 0.2, 0.3]


# ------------------------------------------------------------ data sets and pixels


def test_saved_data_sets_and_slices(run, photos, tmp_path, capsys):
    rows = datasets.load_dataset("imagefolder", data_files={"train": str(photos / "train" / "**")})
    for name, saved in (("dict", rows), ("one", rows["train"])):
        saved.save_to_disk(tmp_path / name)
        run("--max_train_steps", 1, data=["--dataset_name", str(tmp_path / name)], output=f"from-{name}")
        assert "19 train, 3 validation images" in capsys.readouterr().out
    sliced = ["--dataset_name", str(photos), "--train_split", "train[:80%]", "--validation_split", "train[80%:]"]
    run("--max_train_steps", 1, "--test_split", "none", data=sliced, output="slices")
    assert "18 train, 4 validation images" in capsys.readouterr().out


def test_number_of_samples_is_limited_at_random(run, capsys):
    run("--max_train_steps", 1, "--max_train_samples", 9, "--max_eval_samples", 4)
    assert "9 train, 4 validation, 4 test images of 3 classes" in capsys.readouterr().out


def test_pixels(photos):
    rows = datasets.load_dataset("imagefolder", data_files={"train": str(photos / "train" / "**")}, split="train")
    rows = rows.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    processor = ViTImageProcessor(size={"height": 32, "width": 32})

    def images(split="train", **changes):
        args = {"seed": 1, "train_crop": "random_resized", "crop_scale": 0.08, "horizontal_flip": 0.5}
        args |= {"clip_frames": None, **changes}
        return image_data.Images(rows, np.zeros(len(rows), int), split, processor, SimpleNamespace(**args))

    plain = processor(images=Image.open(rows[3]["image"]["path"]), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(images("test")[3]["pixel_values"], plain)
    assert torch.equal(images(train_crop="none", horizontal_flip=0)[3]["pixel_values"], plain)
    assert torch.equal(images(train_crop="none", horizontal_flip=1)[3]["pixel_values"], plain.flip(-1))
    for crop in image_data.CROPS:
        augmented = images(train_crop=crop)
        first = [augmented[i]["pixel_values"] for i in range(22)]
        assert all(pixels.shape == (3, 32, 32) for pixels in first)
        assert all(torch.equal(a, augmented[i]["pixel_values"]) for i, a in enumerate(first)), "no hidden state"
        augmented.epoch = 1
        assert not all(torch.equal(a, augmented[i]["pixel_values"]) for i, a in enumerate(first))


def test_trackers_get_the_curves_and_no_secret(run, monkeypatch):
    logged, configs = [], []

    class Recorder(GeneralTracker):
        name = "tensorboard"
        requires_logging_directory = True
        tracker = None

        def __init__(self, run_name, logging_dir, **kwargs):
            super().__init__()

        def store_init_configuration(self, values):
            configs.append(values)

        def log(self, values, step=None, **kwargs):
            logged.append((step, values))

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    for module in (accelerate.tracking, image_classification):
        monkeypatch.setattr(module, "get_available_trackers", lambda: [LoggerType.TENSORBOARD, "tensorboard"])
    done = run("--report_to", "tensorboard", "--logging_steps", 3, "--hub_token", "hf_secret")
    assert [step for step, values in logged if "train_loss" in values] == [3, 6, 9, 12]
    curve = [(step, values["eval_accuracy"]) for step, values in logged if "eval_accuracy" in values]
    assert [step for step, _ in curve] == [6, 12]
    assert max(value for _, value in curve) == done.results["eval_accuracy"]
    assert logged[-1] == (12, {k: v for k, v in done.results.items() if k.startswith("test_")})
    assert configs[0]["learning_rate"] == "0.01"
    assert "hf_secret" not in str(configs)


def test_each_epoch_crops_every_image_anew(run, monkeypatch):
    boxes = []
    resize = Image.Image.resize

    def watched(self, size, resample=None, box=None, **kwargs):
        boxes.append(box)
        return resize(self, size, resample, box, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    run()
    crops = [box for box in boxes if box is not None]
    assert len(crops) == len(set(crops)) == 2 * 22


# ------------------------------------------------------------ the Hub


def test_push_hands_over_the_run_and_no_secret(run, monkeypatch, photos):
    calls = []

    def push(*args, **kwargs):
        calls.append(inspect.signature(real_push).bind(*args, **kwargs).arguments)
        return SimpleNamespace(commit_url="https://hub/commit")

    real_push = hf_visual_peft.hub.push
    monkeypatch.setattr(hf_visual_peft.hub, "push", push)
    monkeypatch.setattr(image_classification, "HfApi", lambda token: SimpleNamespace(whoami=lambda: token))
    done = run("--push_to_hub", "--hub_model_id", "me/x", "--hub_private_repo", "--hub_token", "hf_secret")
    (call,) = calls
    assert isinstance(call["model"], PeftModel)
    assert (call["repo_id"], call["private"], call["token"]) == ("me/x", True, "hf_secret")
    assert (call["dataset"], call["dataset_split"]) == (photos.name, "test")
    card = ModelCard.load(done.output / "README.md")
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == call["metrics"]
    assert call["metrics"] == {
        k.removeprefix("test_"): v for k, v in done.results.items() if "test_" in k and "acc" in k
    }
    assert "--method vpt" in call["command"]
    for file in done.output.rglob("*"):
        assert file.is_dir() or b"hf_secret" not in file.read_bytes(), file


def test_push_without_access_fails_before_training(run, monkeypatch):
    def refuse():
        raise PermissionError("no token")

    monkeypatch.setattr(image_classification, "HfApi", lambda token: SimpleNamespace(whoami=refuse))
    monkeypatch.setattr(image_classification, "load_processor", lambda args: pytest.fail("loaded"))
    with pytest.raises(PermissionError):
        run("--push_to_hub", "--hub_model_id", "me/x")


FROM_HUB_TO_HUB = """
import sys
sys.path[:0] = sys.argv[1:2]
import datasets, image_classification
from huggingface_hub import HfApi
from peft import AutoPeftModel

_, recipes, vit, photos, output = sys.argv
HfApi().create_repo("tester/tiny-vit")
HfApi().upload_folder(repo_id="tester/tiny-vit", folder_path=vit)
datasets.load_dataset("imagefolder", data_dir=photos).push_to_hub("tester/photos")
flags = "--model_name_or_path tester/tiny-vit --dataset_name tester/photos --method ssf --num_train_epochs 1"
flags += f" --push_to_hub --hub_model_id tester/adapted --hub_private_repo --output_dir {output}"
image_classification.main([*flags.split(), "--hub_token", "hf_test"])
assert AutoPeftModel.from_pretrained("tester/adapted", num_labels=3).peft_config["default"].peft_type == "SSF"
"""


@pytest.mark.slow
def test_from_the_hub_to_the_hub(vit, photos, tmp_path):
    """Model and data set come from a Hub on this machine, adapter and card go there."""
    with LoopbackHub() as hub:
        done = subprocess.run(
            [sys.executable, "-c", FROM_HUB_TO_HUB, str(RECIPES), vit, str(photos), str(tmp_path / "out")],
            env=os.environ | hub.environment(tmp_path / "home") | {"ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        files = hub.model("tester/adapted").at("main").files
        assert not hub.unknown
    card = files["README.md"].data.decode()
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    for needed in ("base_model: tester/tiny-vit", "tester/photos", "import hf_visual_peft", results["command"]):
        assert needed in card
    assert ModelCard(card).data.eval_results[0].metric_value == pytest.approx(results["test_accuracy"], abs=1e-4)
    assert "hf_test" not in card
    weights = next(blob for name, blob in files.items() if name == "adapter_model.safetensors")
    assert len(weights.data) == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size


# ------------------------------------------------------------ real launches

TWO = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "processes"), [("--cpu --num_processes 1", 1), (TWO, 2)])
def test_launched(launch, processes, vit, photos, tmp_path):
    """On two processes the figures are those of all test images, each once, as one process finds them."""
    output = tmp_path / "out"
    data = [word for split in image_data.SPLITS for word in (f"--{split}_dir", str(photos / split))]
    flags = "--method convpass --num_train_epochs 2 --per_device_train_batch_size 4 --per_device_eval_batch_size 2"
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
    assert results["steps"] == (12 if processes == 1 else 6)
    model = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(vit, **LABELS), output)
    processor = AutoImageProcessor.from_pretrained(output)
    for split, name in (("test", "test_accuracy"), ("validation", "eval_accuracy")):
        assert accuracy_by_hand(model, photos / split, processor) == pytest.approx(results[name], abs=1e-12)
    schedule = torch.load(output / f"checkpoint-{results['steps']}" / "scheduler.bin", weights_only=True)
    assert schedule["last_epoch"] == results["steps"], "the schedule counts optimizer steps on any number of processes"
    assert {path.name for path in (output / "checkpoint-6").glob("random*")} == {
        f"random_states_{rank}.pkl" for rank in range(processes)
    }
