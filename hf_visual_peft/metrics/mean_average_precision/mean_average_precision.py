"""Mean average precision of samples with several classes, as an `evaluate.Metric`."""

from typing import Any

# `evaluate.load` copies this file and reads its imports line by line: one module a line, and no relative import
import datasets
import evaluate
import numpy as np

from hf_visual_peft.metrics.inputs import indicators, scores


class MeanAveragePrecision(evaluate.Metric):
    """Mean over the classes of the area under precision over recall, as `"mean_average_precision"`.

    A class's samples are ranked by its score, equal scores together; its average precision is the sum over ranks of
    the precision times the gain in recall, without interpolation (scikit-learn's `average_precision_score`). Classes
    that no sample has do not count.

    `predictions` are scores (N, classes), logits or probabilities; `references` are 0 or 1 (N, classes).
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean over the classes of the area under precision over recall.",
            citation="",
            inputs_description="predictions: scores (N, classes); references: 0 or 1 (N, classes).",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Store one sample."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Store a batch."""
        found = scores(predictions)
        super().add_batch(predictions=found, references=indicators(references, found.shape), **kwargs)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        values, truths = np.asarray(predictions), np.asarray(references)
        found = [
            average_precision(values[:, column], truths[:, column])
            for column in range(truths.shape[1])
            if truths[:, column].any()
        ]
        if not found:
            raise ValueError("references have no class at all: the mean average precision of nothing is not defined.")
        return {"mean_average_precision": float(np.mean(found))}


def average_precision(values: np.ndarray, truths: np.ndarray) -> float:
    """Of one class, which a sample at least has; both (N,)."""
    order = np.argsort(-values, kind="stable")
    hits = np.cumsum(truths[order])
    last = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)  # of each run of equal scores
    precision = hits[last] / (last + 1)
    gain = np.diff(hits[last], prepend=0) / hits[-1]
    return float(np.sum(precision * gain))
