"""Runs on samples with several classes, with weights of classes and with balanced draws."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from labels import BalancedSampler
from recipe_runs import paint, weights
from sklearn.metrics import average_precision_score, f1_score
from transformers import AutoModelForImageClassification, ViTImageProcessor


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """Tables of 20 and 7 images with lists of tags, and with a column for each."""
    folder, rng = tmp_path_factory.mktemp("tagged"), np.random.default_rng(0)
    for name, count in (("train", 20), ("test", 7)):
        rows = []
        for number in range(count):
            paint(folder / "img" / f"{name}{number}.png", number % 3, rng)
            tags = [tag for tag, on in zip("abc", (number % 2, number % 3 == 0, number < 3), strict=True) if on]
            bits = {tag: int(tag in tags) for tag in "abc"}
            rows.append({"image": f"img/{name}{number}.png", "tags": tags, **bits})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def files(folder):
    return ["--train_file", str(folder / "train.jsonl"), "--test_file", str(folder / "test.jsonl")]


def test_lists_and_columns_train_alike_and_figures_are_those_of_scikit_learn(run, tagged):
    lists = run("--label_column_name", "tags", "--threshold", 0.4, data=files(tagged))
    columns = run("--label_column_name", "a", "b", "c", "--threshold", 0.4, data=files(tagged), output="columns")
    assert weights(lists.output) == weights(columns.output)
    figures = [key for key in lists.results if key.startswith(("eval_", "test_"))]
    assert {key.removeprefix("test_") for key in figures if key.startswith("test_")} == {
        "mean_average_precision", "micro_f1", "macro_f1", "loss"
    }  # fmt: skip
    assert all(lists.results[key] == columns.results[key] for key in figures)

    model = AutoModelForImageClassification.from_pretrained(lists.output, num_labels=3).eval()
    processor = ViTImageProcessor.from_pretrained(lists.output)
    table = datasets.load_dataset("json", data_files=str(tagged / "test.jsonl"), split="train")
    images = [datasets.Image().decode_example({"path": str(tagged / row["image"]), "bytes": None}) for row in table]
    with torch.no_grad():
        logits = model(**processor(images=images, return_tensors="pt")).logits
    truths = np.array([[row[tag] for tag in "abc"] for row in table])
    given = logits.sigmoid().numpy() >= 0.4
    expected = {
        "mean_average_precision": average_precision_score(truths, logits.numpy(), average="macro"),
        "micro_f1": f1_score(truths, given, average="micro"),
        "loss": torch.nn.BCEWithLogitsLoss()(logits, torch.from_numpy(truths).float()).item(),
    }
    assert {key: lists.results[f"test_{key}"] for key in expected} == pytest.approx(expected, abs=1e-5)


def test_what_does_not_go_with_several_classes(run, tagged):
    for flags, message in [
        (["--sampler", "balanced"], "--sampler balanced: does not work with samples that may have several classes"),
        (["--top_k", 2], "--top_k 2: does not work with"),
        (["--label_smoothing_factor", 0.1], r"--label_smoothing_factor 0\.1: does not work with"),
        (["--sampler", "balanced", "--top_k", 1], "--sampler balanced, --top_k 1: does not work with"),
        (
            ["--metric_for_best_model", "accuracy"],
            "--metric_for_best_model accuracy: samples that may .* have mean_av",
        ),
        (["--threshold", 1], r"--threshold must be between 0 and 1, got 1\.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            run("--label_column_name", "tags", *flags, data=files(tagged))
    for flags, message in [
        (["--threshold", 0.3], r"--threshold 0\.3: samples of one class each get the class with the highest score"),
        (
            ["--metric_for_best_model", "micro_f1"],
            "--metric_for_best_model micro_f1: samples of one class each have acc",
        ),
        (["--sampler", "balanced", "--class_weights", "balanced"], "both balance the classes; give one"),
        (
            ["--class_weights", "violet=2"],
            "--class_weights violet=2: write balanced, or CLASS=NUMBER. Classes: blue",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            run(*flags)


def test_cached_features_weights_and_methods_that_choose_from_data(run, tagged):
    flags = ("--label_column_name", "tags", "--class_weights", "balanced", "--train_crop", "none")
    flags += ("--horizontal_flip", 0)
    plain = run(*flags, method="linear", data=files(tagged))
    cached = run(
        *flags, "--cache_features", plain.output.parent / "cache", method="linear", data=files(tagged), output="c"
    )
    assert cached.results["test_loss"] == pytest.approx(plain.results["test_loss"], abs=1e-5)
    run(*flags, "--max_train_steps", 1, method="spt", data=files(tagged), output="spt")
    with pytest.raises(ValueError, match=r"GPS contrasts classes: .* got shape \(4, 3\)"):
        run(*flags, "--max_train_steps", 1, method="gps", data=files(tagged), output="gps")


def test_weights_of_classes_enter_the_loss(run):
    plain, same = run(), run("--class_weights", "blue=1", output="same")
    assert weights(plain.output) == weights(same.output)
    other = run("--class_weights", "balanced", output="other")
    assert weights(plain.output) != weights(other.output)
    only = run("--class_weights", "blue=0", "red=0", "--num_train_epochs", 5, "--learning_rate", 0.1, output="only")
    assert only.results["test_mean_per_class_accuracy"] == pytest.approx(1 / 3), "only green counts, and all are green"


def test_balanced_draws_train_and_resume(run, monkeypatch):
    seen = []
    draws = BalancedSampler.__iter__

    def watched(self):
        numbers = list(draws(self))
        seen.append(numbers)
        yield from numbers

    monkeypatch.setattr(BalancedSampler, "__iter__", watched)
    flags = ("--sampler", "balanced", "--checkpointing_steps", 4)
    whole = run(*flags)
    assert len(seen) == 2
    assert seen[0] != seen[1]
    again = run(*flags, output="again")
    assert weights(again.output) == weights(whole.output)
    part = run(*flags, "--save_total_limit", 9, output="part")
    for folder in part.output.glob("checkpoint-*"):
        if folder.name != "checkpoint-4":
            shutil.rmtree(folder)
    del seen[:]
    resumed = run(*flags, "--resume_from_checkpoint", "latest", output="part")
    assert weights(resumed.output) == weights(whole.output)
