import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from hf_visual_peft.metrics import MeanAveragePrecision, MultilabelF1


@pytest.fixture(autouse=True)
def _cache_of_our_own(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))


def tagged(rounded):
    rng = np.random.default_rng(5)
    truths = (rng.random((67, 5)) < (0.1, 0.3, 0.5, 0.9, 0.0)).astype(int)
    scores = rng.standard_normal((67, 5)) + 0.8 * truths
    scores[:, 4] = -9  # neither given nor there
    return np.round(scores, 1) if rounded else scores.astype("float32"), truths


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("keep_in_memory", [False, True])
def test_figures_are_those_of_scikit_learn(rounded, keep_in_memory):
    scores, truths = tagged(rounded)
    given = scores.astype("float32") >= np.float32(0.3)
    metrics = evaluate.combine(
        [
            MeanAveragePrecision(keep_in_memory=keep_in_memory),
            MultilabelF1(threshold=0.3, keep_in_memory=keep_in_memory),
        ]
    )
    for start in range(0, 67, 20):
        rows = slice(start, start + 20)
        metrics.add_batch(
            predictions=torch.from_numpy(scores[rows]), references=torch.from_numpy(truths[rows]).float()
        )
    assert metrics.compute() == pytest.approx(
        {
            "mean_average_precision": average_precision_score(truths[:, :4], scores[:, :4], average="macro"),
            "micro_f1": f1_score(truths, given, average="micro"),
            "macro_f1": f1_score(truths[:, :4], given[:, :4], average="macro"),
        },
        abs=1e-6,
    )


def test_by_hand_one_sample_and_nothing_given():
    found = MeanAveragePrecision().compute(
        predictions=[[3.0, 0], [2.0, 1], [1.0, 2]], references=[[1, 0], [0, 0], [1, 1]]
    )
    assert found["mean_average_precision"] == pytest.approx(((1 / 2 + 2 / 3 / 2) + 1) / 2)
    metric = MultilabelF1()
    metric.add(prediction=[-1.0, -2.0], reference=[0, 0])
    assert metric.compute() == {"micro_f1": 0.0, "macro_f1": 0.0}


@pytest.mark.parametrize("metric", [MeanAveragePrecision, MultilabelF1])
@pytest.mark.parametrize(
    ("scores", "truths", "message"),
    [
        ([1.0, 2.0], [[1, 0]], r"scores of shape \(N, classes\)"),
        ([[float("nan"), 2.0]], [[1, 0]], "NaN"),
        ([[1.0, 2.0]], [1], r"shape of predictions, \(1, 2\), got shape \(1,\)"),
        ([[1.0, 2.0]], [[1, 2]], "references must be 0 or 1"),
        ([[1.0, 2.0]], [[1, 0.5]], "references must be 0 or 1"),
    ],
)
def test_bad_values(metric, scores, truths, message):
    with pytest.raises(ValueError, match=message):
        metric().compute(predictions=scores, references=truths)


def test_bad_thresholds_and_no_class_at_all():
    for threshold in (None, float("nan"), True, "0.5"):
        with pytest.raises(ValueError, match="threshold must be a finite number"):
            MultilabelF1(threshold=threshold)
    with pytest.raises(ValueError, match="no class at all"):
        MeanAveragePrecision().compute(predictions=[[1.0, 2.0]], references=[[0, 0]])
