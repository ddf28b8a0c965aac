"""Top-k accuracy as an `evaluate.Metric`."""

from typing import Any

# `evaluate.load` copies this file and reads its imports line by line: one module a line, and no relative import
import datasets
import evaluate
import numpy as np

from hf_visual_peft.metrics.inputs import labels, ranked_classes


class TopKAccuracy(evaluate.Metric):
    """Share of the samples whose true class is among the k with the highest scores, as `f"top_{k}_accuracy"`.

    `predictions` are scores (N, classes) with at least k classes, `references` class ids (N,). Equal scores rank by
    class id, so that k=1 is `Accuracy`. With `evaluate.load`, k is an argument of `load`.

    Args:
        k: number of classes, 1 or greater.

    Raises:
        ValueError: k is not an integer of at least 1.
    """

    def __init__(self, *args: Any, k: int = 5, **kwargs: Any) -> None:
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"k must be a whole number of 1 or greater, got {k!r}.")
        self.k = k
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of the samples whose true class is among the k with the highest scores.",
            citation="",
            inputs_description="predictions: scores (N, classes); references: class ids (N,).",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Store one sample."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Store a batch; of the scores only the k best classes are kept."""
        super().add_batch(predictions=ranked_classes(predictions, self.k), references=labels(references), **kwargs)

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        hits = np.asarray(predictions) == np.asarray(references)[:, None]
        return {f"top_{self.k}_accuracy": float(np.mean(hits.any(axis=1)))}
