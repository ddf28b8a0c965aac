"""Prediction and evaluation with what the recipe saved, and what its card says."""

import ast
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import datasets
import image_classification
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from arguments import shown
from peft import PeftModel
from PIL import Image, ImageOps
from recipe_runs import RECIPES, SIZE, fails
from safetensors.torch import load_file, save_file
from sklearn.metrics import f1_score, precision_recall_fscore_support
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from hf_visual_peft.cli.main import main as cli


NAMES = ["blue", "green", "red"]
KINDS = ["vpt", "lora", "linear"]


def call(*flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return image_classification.main([*map(str, flags)])


@pytest.fixture(scope="module")
def trained(vit, photos, tmp_path_factory):
    """Folders of runs on images of another size than the checkpoint's, by method."""
    root = tmp_path_factory.mktemp("trained")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    flags = ["--model_name_or_path", vit, "--train_dir", photos / "train", "--test_dir", photos / "test"]
    flags += ["--num_train_epochs", 1, "--per_device_train_batch_size", 4, "--learning_rate", 0.01, "--select", "last"]
    flags += ["--image_size", 48, "--interpolate_pos_encoding", "--checkpointing_steps", "no"]
    for method in KINDS:
        call(*flags, "--method", method, "--output_dir", root / method)
    return root


@pytest.fixture
def predict(trained, tmp_path):
    def run(*flags, kind="vpt", output="out"):
        found = call("--model_name_or_path", trained / kind, "--output_dir", tmp_path / output, *flags)
        with (tmp_path / output / "predictions.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        listed = json.loads((tmp_path / output / "predictions.json").read_text())
        assert listed["classes"] == NAMES
        for row, again in zip(rows, listed["predictions"], strict=True):
            assert (int(row["row"]), row["file"] or None, row["prediction"]) == tuple(
                again[key] for key in ("row", "file", "prediction")
            )
            for name, value in again["probabilities"].items():
                assert float(row[f"probability of {name}"]) == pytest.approx(value, abs=1e-6)
        return found, listed["predictions"]

    return run


def by_hand(folder, kind, images, vit):
    """The probabilities of upright images, with plain peft and transformers."""
    if kind == "linear":
        model = AutoModelForImageClassification.from_pretrained(folder)
    else:
        model = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(vit), folder)
    assert list(model.config.id2label.values()) == NAMES
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = [processor(ImageOps.exif_transpose(image).convert("RGB"), return_tensors="pt") for image in images]
    assert pixels[0]["pixel_values"].shape[-1] == 48
    with torch.no_grad():
        logits = [model.eval()(**x, interpolate_pos_encoding=True).logits[0] for x in pixels]
    return torch.stack(logits).softmax(-1).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_repeats_the_run_and_every_figure(predict, trained, photos, vit, kind):
    found, rows = predict("--eval_only", "--test_dir", photos / "test", kind=kind)
    results = json.loads((trained / kind / "all_results.json").read_text())
    for name in ("accuracy", "mean_per_class_accuracy", "loss"):
        assert found[name] == pytest.approx(results[f"test_{name}"], abs=1e-6)
    assert [row["file"] for row in rows] == sorted(
        str(path.relative_to(photos / "test")) for path in (photos / "test").rglob("*.png")
    )
    labels = [row["file"].split("/")[0] for row in rows]
    assert [row["label"] for row in rows] == labels
    chances = by_hand(trained / kind, kind, [Image.open(photos / "test" / row["file"]) for row in rows], vit)
    np.testing.assert_allclose([list(row["probabilities"].values()) for row in rows], chances, atol=1e-5)
    predicted = [NAMES[best] for best in chances.argmax(1)]
    assert [row["prediction"] for row in rows] == predicted
    columns = precision_recall_fscore_support(labels, predicted, labels=NAMES, zero_division=0)
    for number, name in enumerate(NAMES):
        figures = [found["per_class"][name][key] for key in ("precision", "recall", "f1", "support")]
        assert figures == pytest.approx([column[number] for column in columns])
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))
    assert np.array(found["confusion_matrix"]).sum(1).tolist() == [labels.count(name) for name in NAMES]
    assert np.trace(found["confusion_matrix"]) == sum(map(str.__eq__, labels, predicted))
    assert 0 <= found["calibration_error"] <= 1


def test_images_without_labels(predict, trained, photos, vit, tmp_path, capsys):
    """Anywhere in a folder, turned by a phone, one broken file left out, in folders that are not classes."""
    source = tmp_path / "holiday"
    (source / "day 1").mkdir(parents=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture = Image.open(photos / "test" / "red" / "0.png").crop((0, 0, 24, 10))
    picture.save(source / "a.jpg", exif=turned, quality=95)
    picture.save(source / "day 1" / "b.png")
    (source / "c.png").write_bytes(b"no image")
    (source / "notes.txt").write_text("sunny")
    with pytest.raises(ValueError, match=r"c\.png"):
        predict("--do_predict", source)
    assert not (tmp_path / "out").exists()
    found, rows = predict("--do_predict", source, "--skip_corrupt_images")
    assert found == {}
    assert not (tmp_path / "out" / "evaluation.json").exists()
    assert [(row["row"], row["file"], row["label"]) for row in rows] == [(0, "a.jpg", None), (2, "day 1/b.png", None)]
    upright = [Image.open(source / row["file"]) for row in rows]
    chances = by_hand(trained / "vpt", "vpt", upright, vit)
    np.testing.assert_allclose([list(row["probabilities"].values()) for row in rows], chances, atol=1e-5)
    assert "day 1 is not a class of the model" in capsys.readouterr().out
    _, (row,) = predict("--do_predict", source / "a.jpg", output="one")
    assert row["probabilities"] == pytest.approx(rows[0]["probabilities"], abs=1e-6)


def test_sources_of_all_kinds(predict, photos, tmp_path, monkeypatch):
    """Class folders, a table with relative paths and a label missing, and a data set on disk give the same."""
    _, folders = predict("--do_predict", photos / "test", output="folders")
    assert all(row["label"] for row in folders)
    lines = [f"{photos / 'test' / row['file']},{row['label'] if number else ''}" for number, row in enumerate(folders)]
    (tmp_path / "table.csv").write_text("\n".join(["image,label", *lines]))
    found, table = predict("--do_predict", tmp_path / "table.csv", output="table")
    assert found["samples"] == len(folders) - 1
    assert table[0]["label"] is None
    whole = datasets.Dataset.from_dict({"image": [str(photos / "test" / row["file"]) for row in folders]})
    splits = datasets.DatasetDict({"new": whole.cast_column("image", datasets.Image())})
    splits.save_to_disk(tmp_path / "saved")
    found, on_disk = predict("--do_predict", tmp_path / "saved", output="saved-out")
    assert found == {}
    for rows in (table, on_disk):
        assert [row["probabilities"] for row in rows] == [
            pytest.approx(row["probabilities"], abs=1e-6) for row in folders
        ]


def test_several_classes_at_once(trained, photos, tmp_path):
    """An adapter for samples with several classes: each has a probability of its own."""
    folder = shutil.copytree(trained / "vpt", tmp_path / "several")
    saved = json.loads((folder / "adapter_config.json").read_text())
    saved["auto_mapping"]["problem_type"] = "multi_label_classification"
    (folder / "adapter_config.json").write_text(json.dumps(saved))
    files = sorted((photos / "test" / "red").iterdir())[:2]
    data = datasets.Dataset.from_dict({"image": [str(f) for f in files], "label": [["red", "blue"], []]})
    data.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "data")
    found = call("--model_name_or_path", folder, "--do_predict", tmp_path / "data", "--output_dir", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"]
    for row in rows:
        assert sum(row["probabilities"].values()) != pytest.approx(1, abs=1e-3)
        assert row["prediction"] == [name for name, value in row["probabilities"].items() if value >= 0.5]
    assert rows[0]["label"] == ["red", "blue"]
    assert [found["per_class"][name]["support"] for name in NAMES] == [1, 0, 1]
    assert {"micro_f1", "macro_f1", "mean_average_precision", "loss"} <= set(found)


@pytest.mark.parametrize("kind", ["vpt", "lora"])
def test_the_code_of_the_card_does_what_was_evaluated(trained, photos, vit, tmp_path, monkeypatch, capsys, kind):
    card = (trained / kind / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]
    for folder in (vit, trained, photos):
        assert str(folder) not in card
    assert f"--train_dir {photos.name}/train" in card
    assert str(photos) not in (trained / kind / "all_results.json").read_text()
    turned = Image.Exif()
    turned[0x0112] = 6
    picture = Image.open(photos / "test" / "red" / "0.png").crop((0, 0, 24, 10))
    picture.save(tmp_path / "image.jpg", exif=turned, quality=95)
    code = code.replace("path/to/this/adapter", str(trained / kind)).replace("path/to/vit", vit)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    printed = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    (expected,) = by_hand(trained / kind, kind, [Image.open(tmp_path / "image.jpg")], vit)
    assert list(printed) == NAMES
    assert list(printed.values()) == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", ["vpt", "lora"])
def test_the_code_of_the_readme_does_what_was_evaluated(trained, photos, vit, monkeypatch, capsys, kind):
    text = (RECIPES / "README.md").read_text()
    code = textwrap.dedent(re.search(r"( +)```python\n(.*?)```", text, flags=re.DOTALL)[2])
    for name, here in {"google/vit-base-patch16-224-in21k": vit, "out/vpt-beans": str(trained / kind)}.items():
        assert name in code
        code = code.replace(name, here)
    code = code.replace("model(**inputs)", "model(**inputs, interpolate_pos_encoding=True)")  # as its comment says
    monkeypatch.chdir(photos / "test" / "green")
    names = {}
    exec(compile(code.replace("photo.jpg", "1.png"), "README", "exec"), names)
    (expected,) = by_hand(trained / kind, kind, [Image.open("1.png")], vit)
    assert names["logits"].softmax(-1)[0].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert capsys.readouterr().out.splitlines()[-1] == NAMES[expected.argmax()]


@pytest.mark.parametrize(
    ("word", "seen"),
    [
        ("/home/me/photos/train", "photos/train"),
        ("--test_file=/home/me/photos/test.csv", "--test_file=photos/test.csv"),
        ("/home/me/models/my vit", "'my vit'"),
        ("~/out", "out"),
        ("--output_dir=/out", "--output_dir=out"),
        ("photos/train", "photos/train"),
        ("google/vit-base-patch16-224", "google/vit-base-patch16-224"),
        ("--method=vpt", "--method=vpt"),
    ],
)
def test_a_command_is_shown_without_folders_of_this_machine(word, seen):
    command = shown(["--a", word, "--hub_token", "hf_secret", "--token=hf_other"])
    assert command == f"accelerate launch recipes/image_classification.py --a {seen}"


def test_a_pipeline_has_the_names(trained, photos):
    for kind in ("vpt", "lora"):
        classify = pipeline("image-classification", model=str(trained / kind))
        assert {found["label"] for found in classify(str(photos / "test" / "red" / "0.png"))} == set(NAMES)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--do_predict", "x", "--eval_only"], "give one"),
        (["--do_predict", "x", "--test_dir", "y"], "remove --test_dir"),
        (["--eval_only", "--push_to_hub"], "--push_to_hub: nothing trains"),
        (["--eval_only", "--trust_remote_code"], "--trust_remote_code"),
        (["--eval_only", "--tset_dir", "x"], "unknown: --tset_dir x"),
    ],
)
def test_flags_that_do_not_go_together(predict, capsys, flags, message):
    assert message in fails(capsys, predict, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_only"], "no test split and no validation split"),
        (["--do_predict", "/nowhere/photos"], "no such folder"),
        (["--do_predict", "{vit}"], "."),
        (["--eval_only", "--test_dir", "{others}"], "sample 0 has the label 'cat', 2 such samples"),
        (
            ["--eval_only", "--test_dir", "{others}", "--model_name_or_path", "{vit}"],
            "lacks weights that would be random",
        ),
        (["--do_predict", "{others}", "--model_name_or_path", "{others}"], "neither adapter_config.json nor config"),
        (["--do_predict", "{others}", "--base_model_name_or_path", "/nowhere/vit"], "--base_model_name_or_path says"),
        (["--do_predict", "{others}", "--clip_frames", "4"], "takes single images: remove --clip_frames"),
    ],
)
def test_what_cannot_be_done_is_named_and_nothing_is_written(predict, vit, photos, tmp_path, flags, message):
    others = tmp_path / "others"
    for name, colour in (("cat", "red"), ("dog", "blue")):
        (others / name).mkdir(parents=True)
        shutil.copy(photos / "test" / colour / "0.png", others / name)
    with pytest.raises((ValueError, OSError), match=message):
        predict(*(flag.format(vit=vit, others=others) for flag in flags))
    assert not (tmp_path / "out").exists()


def test_earlier_predictions_are_replaced_only_when_asked(predict, photos, tmp_path, capsys):
    predict("--do_predict", photos / "test")
    before = (tmp_path / "out" / "predictions.csv").read_bytes()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "has predictions.csv" in fails(capsys, predict, "--do_predict", photos / "test" / "red")
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == before
    _, rows = predict("--do_predict", photos / "test" / "red", "--overwrite_output_dir")
    assert len(rows) < len(before.splitlines()) - 1
    assert not (tmp_path / "out" / "evaluation.json").exists(), "it belonged to the others"
    assert (tmp_path / "out" / "mine.txt").exists()


@pytest.mark.slow
def test_two_processes_predict_as_one(predict, trained, photos, tmp_path):
    found, rows = predict("--do_predict", photos / "test")
    words = ["--num_processes", "2", "--cpu", str(RECIPES / "image_classification.py")]
    words += ["--model_name_or_path", str(trained / "vpt"), "--do_predict", str(photos / "test")]
    words += ["--per_device_eval_batch_size", "2", "--output_dir", str(tmp_path / "two")]
    run = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    again = json.loads((tmp_path / "two" / "predictions.json").read_text())["predictions"]
    assert [row["file"] for row in again] == [row["file"] for row in rows]
    for row, other in zip(rows, again, strict=True):
        assert other["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)
    evaluation = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert evaluation["confusion_matrix"] == found["confusion_matrix"]
    assert evaluation["samples"] == len(rows)


# ---------------------------------------------------------------------------------------------- hf-visual-peft predict


@pytest.fixture
def command(trained, monkeypatch, capsys):
    def call(*words, kind="vpt", stdin=b""):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        capsys.readouterr()
        status = cli(["predict", *map(str, [trained / kind, *words])])
        return (status, *capsys.readouterr())

    return call


def test_command_prints_what_the_recipe_writes(command, predict, photos, tmp_path):
    _, expected = predict("--do_predict", photos / "test")
    status, out, _ = command(photos / "test", "--format", "jsonl")
    assert status == 0
    assert [json.loads(line) for line in out.splitlines()] == expected
    status, out, err = command(photos / "test", "--output", tmp_path / "new.csv")
    assert (status, out) == (0, "")
    assert (tmp_path / "new.csv").read_bytes() == (tmp_path / "out" / "predictions.csv").read_bytes()
    assert "macro_f1" in err
    assert json.loads(command(photos / "test", "--format", "json")[1])["classes"] == NAMES


def test_sources_of_all_kinds_give_the_same_rows(command, photos, tmp_path, monkeypatch):
    root = photos / "test"
    files = sorted(root.glob("*/*.png"))
    (tmp_path / "in").mkdir()
    for number, file in enumerate(files):
        shutil.copy(file, tmp_path / "in" / f"[{number:02}] é.png")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    named = "\n".join(map(str, files)).encode()
    ways = [
        ([root], b""),
        (files, b""),
        ([root / "blue", root / "green", *(root / "red").iterdir()], b""),
        ([root / "*" / "*.png"], b""),
        ([root / "b*", root / "[!b]*"], b""),
        ([root / "**"], b""),
        (["-"], named),
        ([files[0], "-"], b"\n".join(named.splitlines()[1:]) + b"\n\n"),
        (["in"], b""),
        (["in/*"], b""),
        (sorted(map(str, (tmp_path / "in").glob("*.png"))), b""),
    ]
    found = []
    for words, stdin in ways:
        status, out, err = command(*words, "--format", "jsonl", stdin=stdin)
        assert status == 0, err
        rows = [json.loads(line) for line in out.splitlines()]
        found.append(sorted(tuple(row["probabilities"].values()) for row in rows))
    for rows in found:
        np.testing.assert_allclose(rows, found[0], atol=1e-6)
    status, out, _ = command("-", "--format", "jsonl", stdin=files[0].read_bytes())
    (row,) = map(json.loads, out.splitlines())
    assert row["file"] == "standard input"
    assert min(np.abs(np.array(found[0]) - list(row["probabilities"].values())).max(1)) < 1e-6


def test_tables_fit_the_terminal(command, photos, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    long = photos / ("photographs " * 8)
    shutil.copytree(photos / "test", long, dirs_exist_ok=True)
    status, out, _ = command(long, photos / "test" / "red" / "0.png")
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert status == 0
    assert max(map(len, lines)) <= 80
    assert lines[2].split("|")[1].strip().endswith("blue/0.png")
    assert len({line.split("|")[1] for line in lines[2:]}) == len(lines) - 2
    shutil.rmtree(long)


@pytest.mark.parametrize(
    ("words", "stdin", "message"),
    [
        (["nowhere.png", "{photos}"], b"", "nowhere.png: there is no such file or folder"),
        (["{photos}/*.gif"], b"", "no file has such a name"),
        (["{photos}/*.gif", "{photos}"], b"", "no file has such a name"),
        (["-"], b"", "has no names of files"),
        (["-"], b"-\n", "names itself"),
        (["-"], b"nowhere.png\n", "nowhere.png: there is no such file or folder"),
        (["-"], b"\xff\xfe\x00\x80", "neither an image nor names"),
        (["{empty}", "{photos}"], b"", "the folder has no image"),
        (["{table}", "{photos}"], b"", "a table of images is given alone"),
    ],
)
def test_command_refuses_sources_in_one_line(command, photos, tmp_path, words, stdin, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("image\nx.png\n")
    places = {"photos": photos / "test", "empty": tmp_path / "empty", "table": tmp_path / "table.csv"}
    status, out, err = command(*(word.format(**places) for word in words), stdin=stdin)
    assert (status, out) == (1, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_an_adapter_of_another_backbone_is_refused_by_name(command, photos, tmp_path):
    torch.manual_seed(0)
    other = ViTConfig(**SIZE | {"hidden_size": 32}, intermediate_size=128)
    ViTForImageClassification(other).save_pretrained(tmp_path / "other")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "other")
    for kind in ("vpt", "lora"):
        status, _, err = command(photos / "test", "--base_model_name_or_path", tmp_path / "other", kind=kind)
        assert status == 1
        assert "the adapter was trained on" in err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["vpt", "lora"])
@pytest.mark.parametrize("lost", ["layers.1", "", "classifier"])
def test_an_adapter_that_lacks_weights_is_refused(command, trained, photos, tmp_path, kind, lost):
    folder = shutil.copytree(trained / kind, tmp_path / "cut")
    weights = load_file(folder / "adapter_model.safetensors")
    if kind == "vpt" and lost == "layers.1":
        lost = "prompt"
    kept = {key: value for key, value in weights.items() if lost and lost not in key}
    assert len(kept) < len(weights)
    save_file(kept or {"other.weight": torch.zeros(2)}, folder / "adapter_model.safetensors")
    status, out, err = command(photos / "test", kind=folder)
    assert (status, out) == (1, "")
    assert re.search("lacks|is missing|Missing", err.splitlines()[-1]), err
    assert "Traceback" not in err


# ------------------------------------------------------------------------------------------------ hf-visual-peft merge


@pytest.fixture
def merge(trained, tmp_path, capsys):
    def call(*words, kind="lora"):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        capsys.readouterr()
        status = cli(["merge", str(trained / kind), str(tmp_path / "merged"), *map(str, words)])
        return status, tmp_path / "merged", capsys.readouterr().err

    return call


@pytest.mark.parametrize("kind", ["lora", "linear"])
def test_a_merged_model_is_one_of_transformers_alone(merge, trained, photos, vit, kind):
    status, folder, err = merge(kind=kind)
    assert status == 0, err
    assert not (folder / "adapter_config.json").exists()
    images = [Image.open(path) for path in sorted((photos / "test").rglob("*.png"))]
    expected = by_hand(trained / kind, kind, images, vit)
    np.testing.assert_allclose(by_hand(folder, "linear", images, vit), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vpt"])  # which does not merge
def test_exports_give_the_same_for_any_number_of_images(merge, trained, photos, vit, kind):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    status, folder, err = merge("--format", "onnx", "torch_export", kind=kind)
    assert status == 0, err
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.pt2"}
    images = [Image.open(path).convert("RGB") for path in sorted((photos / "test").rglob("*.png"))]
    expected = by_hand(trained / kind, kind, images, vit)
    pixels = AutoImageProcessor.from_pretrained(trained / kind)(images, return_tensors="pt")["pixel_values"]
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(folder / "model.pt2").module()
    for logits in (torch.tensor(session.run(None, {"pixel_values": pixels.numpy()})[0]), program(pixels)):
        np.testing.assert_allclose(logits.softmax(-1).detach(), expected, atol=1e-4)


def test_what_does_not_merge_or_does_not_fit_leaves_nothing(merge, tmp_path, monkeypatch):
    status, folder, err = merge(kind="vpt")
    assert status == 1
    assert "VPT does not merge into the backbone" in err.splitlines()[-1]
    monkeypatch.setattr(
        "peft.tuners.tuners_utils.BaseTuner.merge_and_unload", lambda tuner: tuner.unload()
    )  # loses the adapter
    status, folder, err = merge()
    assert status == 1
    assert "gives other outputs than the adapted model" in err.splitlines()[-1]
    assert not folder.exists()
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()
    assert merge()[0] == 2
