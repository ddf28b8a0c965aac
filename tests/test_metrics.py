from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    recall_score,
    top_k_accuracy_score,
)

import hf_visual_peft.metrics
from hf_visual_peft.metrics import (
    Accuracy,
    CalibrationError,
    ConfusionMatrix,
    MacroF1,
    MeanPerClassAccuracy,
    PerClassScores,
    TopKAccuracy,
)


CLASSES = 7
FOLDER = Path(hf_visual_peft.metrics.__file__).parent


@pytest.fixture(autouse=True)
def _caches_of_our_own(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def scored():
    rng = np.random.default_rng(3)
    labels = rng.choice([0, 1, 1, 1, 2, 4, 5, 6], size=91)  # unbalanced, and nothing of class 3
    scores = rng.standard_normal((91, CLASSES)).astype("float32")
    scores[np.arange(91), labels] += 0.7
    return scores, labels


@pytest.fixture
def metrics():
    return evaluate.combine([Accuracy(), TopKAccuracy(k=3), MeanPerClassAccuracy()])


def expected(scores, labels):
    return {
        "accuracy": accuracy_score(labels, scores.argmax(1)),
        "top_3_accuracy": top_k_accuracy_score(labels, scores, k=3, labels=range(CLASSES)),
        "mean_per_class_accuracy": recall_score(labels, scores.argmax(1), average="macro", labels=np.unique(labels)),
    }


def test_figures_are_those_of_scikit_learn(scored, metrics):
    scores, labels = scored
    found = metrics.compute(predictions=scores, references=labels)
    assert found == pytest.approx(expected(scores, labels), abs=1e-12)
    assert len(set(found.values())) == 3, "the data must tell the three metrics apart"


def test_batches_make_the_whole_and_compute_starts_afresh(scored, metrics):
    scores, labels = scored
    for start in range(0, 91, 20):
        metrics.add_batch(predictions=scores[start : start + 20], references=labels[start : start + 20])
    assert metrics.compute() == pytest.approx(expected(scores, labels), abs=1e-12)
    assert metrics.compute(predictions=np.eye(CLASSES), references=range(CLASSES)) == {
        "accuracy": 1.0,
        "top_3_accuracy": 1.0,
        "mean_per_class_accuracy": 1.0,
    }


@pytest.mark.parametrize("keep_in_memory", [False, True])
def test_single_samples_and_class_ids(scored, keep_in_memory):
    scores, labels = scored
    for metric in (Accuracy(keep_in_memory=keep_in_memory), MeanPerClassAccuracy(keep_in_memory=keep_in_memory)):
        from_scores = metric.compute(predictions=scores, references=labels)
        assert metric.compute(predictions=scores.argmax(1).tolist(), references=labels.tolist()) == from_scores
        for row, label in zip(scores, labels, strict=True):
            metric.add(prediction=row, reference=label)
        assert metric.compute() == from_scores


def test_tensors_of_any_float_type(scored, metrics):
    scores, labels = (torch.from_numpy(array) for array in scored)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        rounded = scores.to(dtype)
        metrics.add_batch(predictions=rounded.requires_grad_(), references=labels)
        exact = metrics.compute(predictions=None, references=None)
        assert exact["accuracy"] == accuracy_score(labels, rounded.detach().float().argmax(1))


def test_equal_scores_rank_by_class():
    scores = [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [1.0, 1.0, 1.0]]
    assert TopKAccuracy(k=1).compute(predictions=scores, references=[0, 1, 0]) == {"top_1_accuracy": 1.0}
    assert TopKAccuracy(k=1).compute(predictions=scores, references=[1, 2, 2]) == {"top_1_accuracy": 0.0}
    assert TopKAccuracy(k=2).compute(predictions=scores, references=[1, 2, 2])["top_2_accuracy"] == pytest.approx(
        2 / 3
    )
    assert Accuracy().compute(predictions=scores, references=[0, 1, 0]) == {"accuracy": 1.0}


def test_evaluate_loads_each_folder_without_network():
    scores = [[0.1, 0.5, 0.4], [0.9, 0.02, 0.08], [0.2, 0.5, 0.3]]
    found = {}
    for name, arguments in (("accuracy", {}), ("top_k_accuracy", {"k": 2}), ("mean_per_class_accuracy", {})):
        metric = evaluate.load(str(FOLDER / name), **arguments)
        assert isinstance(metric, evaluate.Metric)
        found |= metric.compute(predictions=scores, references=[1, 2, 1])
    assert found == pytest.approx({"accuracy": 2 / 3, "top_2_accuracy": 1, "mean_per_class_accuracy": 0.5})
    for name in ("mean_average_precision", "multilabel_f1"):
        assert evaluate.load(str(FOLDER / name)).compute(predictions=[[2.0, -1.0]], references=[[1, 0]])
    of_classes = {"classes": 3}
    for name, arguments in (("confusion_matrix", of_classes), ("per_class_scores", of_classes), ("macro_f1", {})):
        assert evaluate.load(str(FOLDER / name), **arguments).compute(predictions=scores, references=[1, 2, 1])
    found = evaluate.load(str(FOLDER / "calibration_error"), bins=1).compute(predictions=scores, references=[1, 2, 1])
    assert found["calibration_error"] == pytest.approx(2 / 3 - 1.9 / 3)


def test_figures_of_single_classes_are_those_of_scikit_learn(scored):
    scores, labels = scored
    predicted = scores.argmax(1)
    predicted[predicted == 5] = 6  # a class that is there and never predicted
    every = {"labels": range(CLASSES), "zero_division": 0}
    found = PerClassScores(classes=CLASSES).compute(predictions=predicted, references=labels)
    for values, name in zip(
        precision_recall_fscore_support(labels, predicted, **every),
        ("precision", "recall", "f1", "support"),
        strict=True,
    ):
        np.testing.assert_allclose(found[name], values)
    matrix = ConfusionMatrix(classes=CLASSES).compute(predictions=predicted, references=labels)["confusion_matrix"]
    np.testing.assert_array_equal(matrix, confusion_matrix(labels, predicted, labels=range(CLASSES)))
    predicted[predicted == 3] = 0  # neither there nor predicted: does not count
    found = MacroF1().compute(predictions=predicted, references=labels)["macro_f1"]
    assert found == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_calibration_error_by_hand():
    """By its definition, sample by sample, also on the edges of the intervals."""
    rng = np.random.default_rng(0)
    scores = rng.dirichlet([0.5, 0.5, 0.5], size=57)
    scores[:4] = [[1, 0, 0], [0.6, 0.4, 0], [0.4, 0.6, 0], [0.5, 0.5, 0]]
    labels = rng.integers(0, 3, size=57)
    for bins in (1, 5, 10):
        metric = CalibrationError(bins=bins)
        for start in range(0, 57, 20):
            metric.add_batch(predictions=scores[start : start + 20], references=labels[start : start + 20])
        best, hits = scores.max(1), scores.argmax(1) == labels
        expected = 0.0
        for low in range(bins):
            inside = [i for i in range(57) if low / bins < best[i] <= (low + 1) / bins]
            if inside:
                expected += len(inside) / 57 * abs(best[inside].mean() - hits[inside].mean())
        assert metric.compute()["calibration_error"] == pytest.approx(expected)
    assert CalibrationError().compute(predictions=np.eye(3), references=[0, 1, 2]) == {"calibration_error": 0.0}


def test_every_metric_folder_is_exported():
    folders = {path.name for path in FOLDER.iterdir() if (path / f"{path.name}.py").exists()}
    assert folders == {
        "accuracy",
        "top_k_accuracy",
        "mean_per_class_accuracy",
        "mean_average_precision",
        "multilabel_f1",
        "calibration_error",
        "confusion_matrix",
        "macro_f1",
        "per_class_scores",
    }
    assert len(hf_visual_peft.metrics.__all__) == len(folders)


@pytest.mark.parametrize(
    ("metric", "predictions", "references", "message"),
    [
        (Accuracy(), [[0.1, float("nan")]], [0], "NaN"),
        (TopKAccuracy(k=2), [[float("nan"), 0.1]], [0], "NaN"),
        (TopKAccuracy(), [[0.1, 0.9]], [0], "k=5 needs scores of at least 5 classes"),
        (TopKAccuracy(k=1), [0, 1], [0, 1], r"scores of shape \(N, classes\)"),
        (Accuracy(), [0.2, 0.8], [0, 1], "class ids of shape .* float64"),
        (Accuracy(), np.zeros((2, 2, 2)), [0, 1], r"shape \(2, 2, 2\)"),
        (MeanPerClassAccuracy(), [0, 1], [0, -1], "got -1: unlabelled"),
        (Accuracy(), [0, 1], [0.0, 1.0], "references must be class ids"),
        (Accuracy(), [0, 1], [0], "Mismatch in the number of predictions"),
        (Accuracy(), [0, 1], None, "references are missing"),
        (CalibrationError(), [[2.0, -1.0]], [0], "must be probabilities, whose sum is 1"),
        (CalibrationError(), [[0.9, 0.9]], [0], "must be probabilities, whose sum is 1"),
        (CalibrationError(), [0, 1], [0, 1], r"of shape \(N, classes\), got shape \(2,\)"),
        (CalibrationError(), [[0.9, 0.1]], [0, 1], "1 predictions and 2 references"),
    ],
)
def test_bad_input_is_named(metric, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        metric.add_batch(predictions=predictions, references=references)


@pytest.mark.parametrize("bins", [0, 1.5, True])
def test_bad_bins_are_named(bins):
    with pytest.raises(ValueError, match="bins must be a whole number of 1 or greater"):
        CalibrationError(bins=bins)


@pytest.mark.parametrize("metric", [ConfusionMatrix, PerClassScores])
def test_a_class_beyond_the_number_of_classes_is_named(metric):
    with pytest.raises(ValueError, match="references have the class 4: with classes=3, ids go to 2"):
        metric(classes=3).compute(predictions=[0, 1], references=[0, 4])


@pytest.mark.parametrize("k", [0, -1, 2.0, "3", True])
def test_bad_k_is_named(k):
    with pytest.raises(ValueError, match="k must be a whole number of 1 or greater"):
        TopKAccuracy(k=k)
