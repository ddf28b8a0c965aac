"""The recipe for few-shot classification: its draws, its table, what it saves, and what it refuses."""

import json
from types import SimpleNamespace

import few_shot
import few_shot_runs
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from draws import draw, halves, text_names
from dual_encoders import saved
from few_shot_features import PENALTY, linear_probe
from few_shot_flags import epochs_by_shots
from PIL import Image
from recipe_runs import RECIPES, accuracy_by_hand, fails
from transformers import AutoImageProcessor, CLIPImageProcessor, SiglipImageProcessor

import hf_visual_peft


CLASSES = {"big_cat": (200, 0, 0), "dog": (0, 200, 0), "pie": (0, 0, 200), "sea": (90, 90, 90)}
METHODS = ["clap", "tip_adapter", "cocoop", "clip_lora", "vpt", "two_sfs", "maple"]  # one of each kind of run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    for family, processor in (
        ("siglip", SiglipImageProcessor(size={"height": 16, "width": 16})),
        ("clip", CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)),
    ):
        saved(family, folder / family)
        processor.save_pretrained(folder / family)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten images a class."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, color in CLASSES.items():
        (folder / name).mkdir()
        for number in range(10):
            pixels = (np.array(color) + rng.integers(0, 50, (20, 24, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def shoot(models, pictures, tmp_path):
    def call(*flags, method="proker", family="clip", data=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        data = ["--train_dir", str(pictures)] if data is None else data
        words = ["--model_name_or_path", str(models / family), *data, "--output_dir", str(tmp_path / "out")]
        words += ["--progress", "none", *([] if method is None else ["--method", method]), *map(str, flags)]
        return SimpleNamespace(output=tmp_path / "out", results=few_shot.main(words))

    return call


def test_siglip_learns_from_a_folder_and_is_loaded_again(shoot, pictures, capsys):
    flags = ["--shots", 2, 4, "--seeds", 1, 2, "--max_train_steps", 3, "--test_dir", pictures]
    output, results = shoot(*flags, method="taskres", family="siglip").__dict__.values()
    rows = results["results"]
    assert [(row["method"], row["shots"], row["seed"]) for row in rows] == [
        ("zero-shot", 0, None),
        *(("linear probe", shots, seed) for shots in (2, 4) for seed in (1, 2)),
        *(("taskres", shots, seed) for shots in (2, 4) for seed in (1, 2)),
    ]
    model = hf_visual_peft.load_classifier(str(output / "shots_4_seed_2"))
    assert model.base_model.model.class_names == list(CLASSES)
    processor = AutoImageProcessor.from_pretrained(output / "shots_4_seed_2")
    by_hand = [accuracy_by_hand(each, pictures, processor, list(CLASSES)) for each in (model.base_model.model, model)]
    assert rows[-1]["accuracy"] == pytest.approx(by_hand[1])
    with model.disable_adapter():
        assert rows[0]["accuracy"] == pytest.approx(accuracy_by_hand(model, pictures, processor, list(CLASSES)))
    lines = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * (2 + 4) * len(CLASSES)
    assert {line["label"] for line in lines} == set(CLASSES)
    assert all(line["label"] in line["image"] for line in lines)
    printed = capsys.readouterr().out
    assert "| zero-shot " in printed
    assert "±" in printed
    assert json.loads((output / "all_results.json").read_text()) == results


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_method(shoot, method):
    flags = ["--shots", 1, "--seeds", 1, "--max_train_steps", 1, "--split", "base"]
    flags += {"cocoop": ["--init_text", "ab"], "vpt": ["--num_virtual_tokens", 2], "maple": ["--init_text", "ab"]}.get(
        method, []
    )
    output, results = shoot(*flags, method=method).__dict__.values()
    (row,) = [row for row in results["results"] if row["method"] == method]
    assert set(row) >= {"base", "new", "harmonic_mean"}
    model = hf_visual_peft.load_classifier(str(output / "shots_1_seed_1"))
    assert model.base_model.model.class_names == list(CLASSES)[:2]
    assert (output / "features").exists() == (method not in ("clip_lora", "vpt", "two_sfs", "maple"))


ONLY_TEXT = {
    "ssf": ["--tower", "text", "--train_logit_scale"],
    "lora": ["--r", 2, "--target_modules", ".*text_model.*q_proj", "--train_crop", "none"],
}


@pytest.mark.parametrize("method", ONLY_TEXT)
def test_features_are_kept_where_only_texts_are_adapted(shoot, pictures, monkeypatch, method):
    read, loss_of = [], few_shot_runs.FewShotTraining.loss_of
    monkeypatch.setattr(
        few_shot_runs.FewShotTraining,
        "loss_of",
        lambda training, batch, labels: read.append(set(batch)) or loss_of(training, batch, labels),
    )
    flags = ["--shots", 1, "--seeds", 1, 2, "--max_train_steps", 2, "--learning_rate", 0.1, "--test_dir", pictures]
    output, results = shoot(*flags, *ONLY_TEXT[method], method=method).__dict__.values()
    assert read == [{"image_features"}] * 4
    model = hf_visual_peft.load_classifier(str(output / "shots_1_seed_2"))
    processor = AutoImageProcessor.from_pretrained(output / "shots_1_seed_2")
    assert results["results"][-1]["accuracy"] == pytest.approx(
        accuracy_by_hand(model, pictures, processor, list(CLASSES))
    )


@pytest.mark.parametrize("method", ["taskres", "clip_lora"])
def test_each_run_learns_the_scale_anew(shoot, monkeypatch, method):
    starts, run = [], few_shot_runs.FewShotTraining.run

    def spy(training):
        starts.append(sum(p.item() for n, p in training.model.named_parameters() if n.endswith("default.offset")))
        run(training)

    monkeypatch.setattr(few_shot_runs.FewShotTraining, "run", spy)
    flags = ["--shots", 1, "--seeds", 1, 2, "--max_train_steps", 1, "--test_split", "none"]
    output, _ = shoot(*flags, "--train_logit_scale", "--learning_rate", 0.1, method=method).__dict__.values()
    assert starts == [0.0, 0.0]
    for seed in (1, 2):
        model = hf_visual_peft.load_classifier(str(output / f"shots_1_seed_{seed}"))
        assert model.base_model.model.logit_scale.modules_to_save["default"].offset.abs() > 0.01


@pytest.mark.parametrize(("method", "flags"), [("clip_lora", []), ("ssf", ["--tower", "both"])])
def test_features_that_change_are_not_kept(shoot, method, flags):
    flags = [
        "--shots",
        1,
        "--seeds",
        1,
        *flags,
        "--train_crop",
        "none",
        "--horizontal_flip",
        0,
        "--cache_features",
        "x",
    ]
    with pytest.raises(ValueError, match=f"--method {method} changes the features of images"):
        shoot(*flags, method=method)


@pytest.mark.parametrize(("views", "steps"), [([], [6, 4]), (["--horizontal_flip", 0.5], [6, 4])])
def test_two_stages_share_the_steps(shoot, monkeypatch, views, steps):
    ran, inputs = [], []
    run = few_shot_runs.FewShotTraining.run

    def spy(training):
        ran.append(training.max_steps)
        run(training)
        inputs.append(set(training.batch))

    monkeypatch.setattr(few_shot_runs.FewShotTraining, "run", spy)
    output, _ = shoot("--shots", 2, "--seeds", 1, "--steps_per_shot", 5, *views, method="two_sfs").__dict__.values()
    assert ran == steps
    # where images never change, the second stage reads each of them once
    assert inputs == [{"pixel_values"}, {"pixel_values"} if views else {"image_features"}]
    model = hf_visual_peft.load_classifier(str(output / "shots_2_seed_1"))
    assert model.peft_config["default"].stage == 2


@pytest.mark.parametrize("method", ["wise_ft", "clip_lora"])
def test_weights_between_are_measured(shoot, pictures, method):
    flags = ["--shots", 2, "--seeds", 1, "--max_train_steps", 2, "--learning_rate", 1e-2, "--interpolate", 0, 0.5, 1]
    output, results = shoot(*flags, "--test_dir", pictures, method=method).__dict__.values()
    rows = {row["method"]: row.get("accuracy") for row in results["results"]}
    assert list(rows)[2:] == [method, *(f"{method}, alpha {alpha}" for alpha in ("0", "0.5", "1"))]
    assert rows[f"{method}, alpha 0"] == rows["zero-shot"]
    assert rows[f"{method}, alpha 1"] == rows[method]
    model = hf_visual_peft.load_classifier(str(output / "shots_2_seed_1"))
    half = hf_visual_peft.interpolate(model, 0.5)
    processor = AutoImageProcessor.from_pretrained(output / "shots_2_seed_1")
    assert rows[f"{method}, alpha 0.5"] == pytest.approx(accuracy_by_hand(half, pictures, processor, list(CLASSES)))


def test_nothing_trains_where_nothing_lies_between(shoot):
    with pytest.raises(ValueError, match="CoOpConfig starts from random weights"):
        shoot("--shots", 1, "--seeds", 1, "--interpolate", 0.5, method="coop")


@pytest.mark.parametrize("name", sorted(path.stem for path in (RECIPES / "configs" / "few_shot").glob("*.yaml")))
def test_settings_of_authors_are_flags(models, pictures, tmp_path, name):
    words = ["--config", f"few_shot/{name}", "--model_name_or_path", str(models / "clip"), "--shots", "1", "16"]
    words += ["--train_dir", str(pictures), "--output_dir", str(tmp_path)]
    args, config = few_shot.parse_args(words, None, few_shot.RECIPE)
    assert name.startswith(args.method)
    assert config is not None


def test_every_method_for_class_texts_has_its_settings():
    files = {path.stem for path in (RECIPES / "configs" / "few_shot").glob("*.yaml")}
    assert files >= {*hf_visual_peft.list_language_methods(), "clip_lora"}


def test_base_and_new_are_measured_among_themselves(shoot, pictures):
    _, results = shoot("--shots", 2, "--seeds", 1, "--split", "base", "--test_dir", pictures).__dict__.values()
    assert results["classes"] == {"learned": ["big_cat", "dog"], "new": ["pie", "sea"]}
    row = results["results"][-1]
    assert row["harmonic_mean"] == pytest.approx(2 * row["base"] * row["new"] / (row["base"] + row["new"]))
    zero_shot = results["results"][0]
    assert row["new"] == zero_shot["new"]  # the kernel knows none of these classes


def test_texts_from_a_file_and_no_test(shoot, tmp_path):
    (tmp_path / "names.txt").write_text("cat\na dog\napple pie\nopen sea\n")
    flags = ["--shots", 10, "--seeds", 1, "--class_names", tmp_path / "names.txt", "--test_split", "none"]
    output, results = shoot(*flags).__dict__.values()
    assert results["classes"]["learned"] == ["cat", "a dog", "apple pie", "open sea"]
    assert [row["method"] for row in results["results"]] == ["proker"]
    assert "accuracy" not in results["results"][0]
    assert hf_visual_peft.load_classifier(str(output / "shots_10_seed_1")).base_model.model.class_names[1] == "a dog"


def test_draws_depend_on_seed_and_class_only():
    ids, names = np.array([0, 1, 2] * 8), ["a", "b", "c"]
    four = draw(ids, names, range(3), 4, 1)
    assert (np.bincount(ids[four]) == 4).all()
    assert set(draw(ids, names, range(3), 2, 1)) < set(four)
    assert set(draw(ids, names, range(2), 4, 1)) == {row for row in four if ids[row] < 2}
    assert set(draw(ids, names, range(3), 4, 2)) != set(four)


def test_linear_probe_is_logistic_regression():
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(30, 6, generator=generator), dim=-1)
    labels = torch.arange(30) % 3
    weight = linear_probe(features, labels, 3).requires_grad_()
    logits = torch.cat([features, torch.ones(30, 1)], 1).double() @ weight
    penalty = weight[:-1].square().sum() / (2 * PENALTY)
    (gradient,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum") + penalty, weight
    )
    assert gradient.abs().max() < 1e-3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "zero_shot"], "zero-shot and a linear probe are in every table"),
        (["--method", "linear"], "zero-shot and a linear probe are in every table"),
        (["--method", "nothing"], "Choose one of"),
        (["--method", "proker", "--shots", "2", "2"], "one of them is there twice"),
        (["--method", "proker", "--shots", "0"], "must be 1 or greater"),
        (["--method", "proker", "--select", "best"], "--select: not in few-shot runs"),
        (["--method", "proker", "--top_k", "2", "--mixup", "0.2"], "--top_k, --mixup: not in few-shot runs"),
        (["--method", "lp_plus_plus", "--train_logit_scale"], "not with --method lp_plus_plus: its logits have"),
        (["--method", "coop", "--train_crop", "random"], "give --cache_views N"),
        (["--method", "coop", "--shots", "1", "2", "--epochs_by_shots", "1=5"], "no epochs for --shots 2"),
        (["--method", "coop", "--epochs_by_shots", "one"], "write SHOTS=EPOCHS"),
        (["--method", "coop", "--steps_per_shot", "5", "--max_train_steps", "5"], "Give one of"),
        (["--method", "coop", "--position", "left"], "position"),
        (["--method", "flyp", "--interpolate", "1.5"], "must be from 0 to 1"),
    ],
)
def test_wrong_flags(shoot, capsys, flags, message):
    assert message in " ".join(fails(capsys, shoot, *flags, method=None).split())


def test_image_classification_names_the_recipe_for_texts(run, capsys):
    assert "hf-visual-peft few-shot" in fails(capsys, run, method="coop")


def test_what_does_not_fit_the_data(shoot, pictures, tmp_path):
    with pytest.raises(ValueError, match=r"--shots 8: .*'big_cat' \(7\).*--shots of at most 7"):
        shoot("--shots", 8)
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="has 2 names, and the data set 4 classes"):
        shoot("--class_names", tmp_path / "names.txt", "--shots", 1)
    (tmp_path / "half").mkdir()
    for name in list(CLASSES)[:3]:
        (tmp_path / "half" / name).symlink_to(pictures / name)
    with pytest.raises(ValueError, match="3 classes, of which 1 would be new"):
        shoot("--shots", 1, "--split", "base", data=["--train_dir", str(tmp_path / "half")])
    with pytest.raises(ValueError, match="No image to test is of the learned classes"):
        shoot("--shots", 1, "--split", "new", "--test_dir", tmp_path / "half", "--test_split", "test[:10]")
    assert not list((tmp_path / "out").iterdir())


def test_a_class_without_images():
    with pytest.raises(ValueError, match=r"'b' \(0\).*take the class out"):
        draw(np.array([0, 0]), ["a", "b"], range(2), 1, 1)


def test_names_in_json(tmp_path):
    file = tmp_path / "names.json"
    file.write_text('{"b": "bee", "a": "ant"}')
    assert text_names(str(file), ["a", "b"]) == ["ant", "bee"]
    with pytest.raises(ValueError, match="has no text for c"):
        text_names(str(file), ["a", "b", "c"])
    with pytest.raises(ValueError, match="names b, which are not classes"):
        text_names(str(file), ["a"])
    file.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        text_names(str(file), ["a"])
    with pytest.raises(ValueError, match="there is no such file"):
        text_names(str(tmp_path / "none.txt"), ["a"])


def test_halves_round_up():
    assert halves(5, "base") == (range(3), range(3, 5))
    assert halves(5, "new") == (range(3, 5), None)
    assert halves(3, "all") == (range(3), None)
    assert epochs_by_shots(["1=5", "2=7"], [1]) == {1: 5, 2: 7}
