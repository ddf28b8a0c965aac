"""`hf-visual-peft compare`: which method for these images."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import compare
import comparison
import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import patch_environment
from fingerprints import fingerprint
from PIL import Image
from recipe_runs import RECIPES, paint
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_visual_peft.cli.main import main as cli
from hf_visual_peft.report.statistics import calibration, pareto, sign_test, wilson
from hf_visual_peft.report.table import advice, comparison_table


SMALL = ["--budget", "0.01", "--per_device_train_batch_size", "4"]


def call(*words):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return cli(["compare", *map(str, words)])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Class folders without splits."""
    folder, rng = tmp_path_factory.mktemp("pictures") / "photos", np.random.default_rng(1)
    for channel, name in enumerate(("red", "green", "blue")):
        for number in range(14):
            paint(folder / name / f"{number}.png", channel, rng)
    return folder


@pytest.fixture(scope="module")
def finished(vit, pictures, tmp_path_factory):
    """A whole comparison with the default methods."""
    with patch_environment(ACCELERATE_USE_CPU="true"):
        folder = tmp_path_factory.mktemp("finished") / "out"
        assert call(pictures, "--model_name_or_path", vit, "--output_dir", folder, *SMALL) == 0
    return folder


@pytest.fixture
def state(finished):
    return json.loads((finished / "comparison.json").read_text())


def test_every_image_is_in_one_part_and_classes_are_in_all(finished, pictures, state):
    splits = datasets.load_from_disk(finished / "data")
    found = {}
    for split, data in splits.items():
        encoded = data.cast_column("image", datasets.Image(decode=False))
        found[split] = [row["bytes"] for row in encoded["image"]]
        assert set(data["label"]) == {0, 1, 2}
        assert data.features["label"].names == ["blue", "green", "red"]
        assert state["data"]["images"][split] == len(data)
    whole = [content for split in found.values() for content in split]
    assert sorted(whole) == sorted(path.read_bytes() for path in pictures.rglob("*.png"))
    assert set(found) == {"train", "validation", "test"}


def test_rounds_keep_the_better_half_on_validation(state):
    plan, rows = state["plan"], state["rows"]
    assert plan[0]["methods"] == [m for m in comparison.METHODS if m != "knn"]
    assert [round_["steps"] for round_ in plan] == sorted(round_["steps"] for round_ in plan)
    for number, (now, then) in enumerate(itertools.pairwise(plan)):
        runs = {m: next(run for run in rows[m]["runs"] if run["round"] == number) for m in now["methods"]}
        rank = {method: (run["accuracy"], -run["loss"]) for method, run in runs.items()}
        others = [method for method in now["methods"] if method != "linear"]
        kept = {method for method in then["methods"] if method != "linear"}
        assert len(kept) == math.ceil(len(others) / 2)
        assert min(map(rank.get, kept)) >= max(map(rank.get, set(others) - kept))
        assert "linear" in then["methods"]
    assert len(plan[-1]["methods"]) <= 3
    assert state["choice"] in plan[-1]["methods"]


def test_predictions_are_those_of_the_saved_models(finished, state, vit):
    """Evaluated with plain transformers, from the images in the folder."""
    data = datasets.load_from_disk(finished / "data")["test"]
    assert data["label"][:] == state["data"]["labels"]
    for method in ("linear", state["plan"][0]["methods"][-1]):
        run = state["rows"][method]["runs"][-1]
        folder = finished / run["folder"]
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        processor = AutoImageProcessor.from_pretrained(folder)
        with torch.no_grad():
            pixels = processor(images=[image.convert("RGB") for image in data["image"]], return_tensors="pt")
            chances = model(**pixels).logits.softmax(-1)
        assert run["predicted"] == chances.argmax(-1).tolist()
        np.testing.assert_allclose(run["confidence"], chances.amax(-1), atol=1e-4)


def test_neighbours_are_those_of_frozen_features(finished, state, vit):
    data = datasets.load_from_disk(finished / "data")
    folder = finished / state["rows"]["linear"]["runs"][-1]["folder"]
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    seen = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for split in ("train", "test"):
            images = [image.convert("RGB") for image in data[split]["image"]]
            model(**processor(images=images, return_tensors="pt"))
    train, test = (torch.nn.functional.normalize(x) for x in seen)
    k = state["rows"]["knn"]["neighbours"]["k"]
    nearest = (test @ train.T).topk(k).indices
    labels = torch.tensor(data["train"]["label"][:])
    votes = torch.nn.functional.one_hot(labels[nearest], 3).sum(1)
    for row, chosen in zip(votes, state["rows"]["knn"]["neighbours"]["predicted"], strict=True):
        assert row[chosen] == row.max()


def test_costs_are_those_of_the_methods(finished, state, vit):
    rows = state["rows"]
    for method in ("lora", "last", "ssf", "vpt", "adaptformer", "bitfit", "linear"):
        folder = finished / rows[method]["runs"][-1]["folder"]
        assert rows[method]["runs"][-1]["bytes"] == max(path.stat().st_size for path in folder.glob("*.safetensors"))
        results = json.loads((folder / "all_results.json").read_text())
        assert rows[method]["cost"]["trained"] == results["trainable_parameters"]
    assert {m for m in rows if m != "knn" and rows[m]["cost"]["merges"]} == {"lora", "ssf", "bitfit"}
    # what does not send gradients through the backbone keeps least
    assert rows["linear"]["cost"]["step_bytes"] < rows["last"]["cost"]["step_bytes"]
    assert rows["last"]["cost"]["step_bytes"] < rows["adaptformer"]["cost"]["step_bytes"]


def test_table_fits_80_columns_and_the_advice_has_two_sentences(state, capsys, finished, pictures, vit):
    text = comparison_table(state)
    assert max(map(len, text.splitlines())) <= 80
    lines = text.splitlines()
    assert {line.split()[0].rstrip("*") for line in lines[1:9]} == set(comparison.METHODS)
    row = state["rows"][state["choice"]]
    hits = np.mean(np.array(row["runs"][-1]["predicted"]) == state["data"]["labels"])
    (line,) = [line for line in lines if line.startswith(f"{state['choice']} ")]
    assert f" {100 * hits:.1f} (" in line
    said = advice(state)
    assert said.startswith(f"I would take {state['choice']}: ")
    assert len([part for part in said.split(". ") if part]) == 2
    # a finished comparison is shown again, and nothing trains
    before = (finished / "comparison.json").read_bytes()
    capsys.readouterr()
    assert call(pictures, "--model_name_or_path", vit, "--output_dir", finished, *SMALL) == 0
    assert capsys.readouterr().out.startswith(text)
    assert (finished / "comparison.json").read_bytes() == before


def test_the_command_trains_the_choice(state):
    words = state["command"].split()
    assert words[:4] == ["hf-visual-peft", "train", "--method", state["choice"]]
    assert "--num_train_epochs" in words


def test_a_killed_comparison_continues_where_it_was(vit, pictures, tmp_path, monkeypatch, capsys):
    words = [pictures, "--model_name_or_path", vit, "--output_dir", tmp_path / "out", *SMALL]
    words += ["--methods", "linear", "bitfit", "ssf", "lora"]
    trained = []

    def counting(setting, method, steps, seed, folder):
        trained.append((method, steps))
        if len(trained) == 4:  # as a kill: nothing more is written
            raise KeyboardInterrupt
        return train(setting, method, steps, seed, folder)

    train = compare.train
    monkeypatch.setattr(compare, "train", counting)
    for _ in range(2):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        try:
            compare.main([*map(str, words)])
        except KeyboardInterrupt:
            assert "choice" not in json.loads((tmp_path / "out" / "comparison.json").read_text())
    state = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert trained[3] == trained[4]
    done = trained[:3] + trained[4:]
    planned = [(method, round_["steps"]) for round_ in state["plan"] for method in round_["methods"]]
    assert done == planned
    assert "choice" in state
    # other settings do not continue it
    capsys.readouterr()
    assert call(*words, "--seeds", "1") == 1
    assert "has a comparison with seeds [0], now [1]" in capsys.readouterr().err


def test_a_comparison_that_is_killed_by_the_system_continues(vit, pictures, tmp_path):
    """`kill -9` gives no time to write anything; what was measured before is kept."""
    out = tmp_path / "out"
    words = [str(pictures), "--model_name_or_path", vit, "--output_dir", str(out), *SMALL]
    words += ["--methods", "linear", "bitfit", "ssf"]
    code = "import sys; from hf_visual_peft.cli.main import main; sys.exit(main(['compare', *sys.argv[1:]]))"
    path = os.pathsep.join(filter(None, [str(RECIPES.parent), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], env={**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:  # one for each step that is written
        if "on validation after" in line:
            process.kill()
            break
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL
    before = json.loads((out / "comparison.json").read_text())
    assert "choice" not in before
    done = {method: row["runs"] for method, row in before["rows"].items() if row["runs"]}
    assert done
    assert call(*words) == 0
    after = json.loads((out / "comparison.json").read_text())
    assert after["choice"]
    assert after["plan"][0] == before["plan"][0]
    for method, (first, *_) in done.items():  # a second training would have taken another time
        assert after["rows"][method]["runs"][0]["seconds"] == first["seconds"]
    for method, row in before["rows"].items():
        assert after["rows"][method]["cost"] == row["cost"]


def test_a_kill_while_the_parts_are_written_does_not_block_the_folder(vit, pictures, tmp_path, monkeypatch):
    words = [pictures, "--model_name_or_path", vit, "--output_dir", tmp_path / "out", *SMALL, "--methods", "linear"]

    def killed(parts, folder):
        (folder / "train").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(datasets.DatasetDict, "save_to_disk", killed)
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(KeyboardInterrupt):
            compare.main([*map(str, words)])
    assert call(*words) == 0


def test_a_method_that_is_not_possible_is_told_and_the_others_go_on(vit, pictures, tmp_path, monkeypatch, capsys):
    words = [pictures, "--model_name_or_path", vit, *SMALL, "--methods", "ssf", "bitfit"]
    measure = compare.measure

    def failing(accelerator, setting, method):
        if method in broken:
            raise ValueError(f"{method} has nothing to act on.")
        return measure(accelerator, setting, method)

    monkeypatch.setattr(compare, "measure", failing)
    broken = {"ssf"}
    AcceleratorState._reset_state(reset_partial_state=True)
    state = compare.main([*map(str, words), "--output_dir", str(tmp_path / "one")])
    shown = capsys.readouterr()
    assert state["choice"] == "bitfit"
    assert "ssf: ssf has nothing to act on." in shown.out
    broken = {"ssf", "bitfit"}
    with pytest.raises(ValueError, match="No method could train. The first of them, ssf: ssf has nothing to act on."):
        compare.main([*map(str, words), "--output_dir", str(tmp_path / "all")])


def test_splits_of_the_user_are_kept(vit, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "MOST_EPOCHS", 1)
    words = [
        photos,
        "--model_name_or_path",
        vit,
        *SMALL,
        "--methods",
        "linear",
        "knn",
        "--output_dir",
        tmp_path / "out",
    ]
    AcceleratorState._reset_state(reset_partial_state=True)
    state = compare.main([*map(str, words)])
    assert state["data"]["images"] == {"train": 22, "validation": 15, "test": 11}
    assert sorted(state["data"]["files"]) == sorted(path.name for path in (photos / "test").rglob("*.png"))


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "required: PHOTOS"),
        (["{photos}", "--methods", "vtp"], 2, "Unknown method 'vtp'"),
        (["{photos}", "--methods", "aim"], 2, "--methods aim takes videos"),
        (["{photos}", "--methods", "vpt", "vpt"], 2, "each is given once"),
        (["{photos}", "--seeds", "0", "0"], 2, "each is given once"),
        (["{photos}", "--budget", "-1"], 2, "must be 0 or greater"),
        (["{photos}", "--no_such_flag"], 2, "unknown: --no_such_flag"),
        (["/nowhere/photos"], 1, "there is no such folder"),
        (["{one}"], 1, "The train split has one class"),
        (["{photos}", "--output_dir", "{photos}"], 1, "holds no comparison"),
        (["{photos}", "--output_dir", "{broken}"], 1, "is not readable"),
        (["{photos}", "--model_name_or_path", "/nowhere/model"], 1, "/nowhere/model"),
    ],
)
def test_bad_input_is_one_line(vit, pictures, tmp_path, capsys, words, status, message):
    places = {"photos": pictures, "one": tmp_path / "one", "broken": tmp_path / "broken"}
    shutil.copytree(pictures / "red", tmp_path / "one" / "red")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "comparison.json").write_text('{"settings": []}')
    given = [word.format(**places) for word in words]
    given += [] if "--output_dir" in given or not given else ["--output_dir", str(tmp_path / "out")]
    given += [] if "--model_name_or_path" in given or not given else ["--model_name_or_path", vit]
    assert call(*given) == status
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error


def test_fingerprints_know_images_and_classes_but_not_files(tmp_path):
    def of(files, ids, names=("a", "b")):
        rows = datasets.Dataset.from_dict({"image": [str(file) for file in files]})
        return fingerprint(rows.cast_column("image", datasets.Image(decode=False)), np.array(ids), names)

    for number in range(3):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    files = [tmp_path / f"{number}.png" for number in range(3)]
    shutil.copy(files[0], tmp_path / "copy.png")
    first = of(files, [0, 1, 0])
    assert of([files[2], tmp_path / "copy.png", files[1]], [0, 0, 1]) == first
    assert of(files, [1, 0, 1], ("b", "a")) == first
    assert of(files, [0, 1, 1]) != first
    assert of(files[:2], [0, 1]) != first
    assert of([*files, files[0]], [0, 1, 0, 0]) != first


def test_statistics():
    # values of R's binom::binom.confint(method = "wilson") and binom.test
    assert wilson(0.9, 100) == pytest.approx((0.8256343, 0.9447709), abs=1e-6)
    assert wilson(1.0, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    assert wilson(0.0, 1)[0] == 0
    with pytest.raises(ValueError, match="at least one image"):
        wilson(0.5, 0)
    assert sign_test([True] * 8 + [False], [False] * 8 + [True]) == pytest.approx(0.0390625)
    assert sign_test([True, False], [True, False]) == 1.0
    assert pareto([(1, 0.5), (2, 0.4), (3, 0.9), (1, 0.6), (3, 0.9)]) == [3, 2]
    bins = calibration([0.05, 0.95, 1.0, 0.96], [False, True, True, False])
    assert [(one["images"], round(one["accuracy"], 3)) for one in bins] == [(1, 0.0), (3, 0.667)]
