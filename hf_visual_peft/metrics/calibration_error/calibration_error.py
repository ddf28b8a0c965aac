"""The expected calibration error as an `evaluate.Metric`."""

from typing import Any

# `evaluate.load` copies this file and reads its imports line by line: one module a line, and no relative import
import datasets
import evaluate
import numpy as np

from hf_visual_peft.metrics.inputs import class_ids, labels, probabilities


class CalibrationError(evaluate.Metric):
    """The distance between the probability of the predicted class and its accuracy, as `"calibration_error"`.

    The expected calibration error (ECE, Guo et al. 2017, arXiv 1706.04599): samples are sorted into intervals of equal
    width (a, b] by the probability of their predicted class; the result is the mean of the absolute differences
    between mean probability and accuracy, weighted by the number of samples. 0 is perfect.

    `predictions` are probabilities (N, classes), `references` class ids (N,).

    Args:
        bins: number of intervals, 1 or greater.

    Raises:
        ValueError: bins is not an integer of at least 1.
    """

    def __init__(self, *args: Any, bins: int = 15, **kwargs: Any) -> None:
        if not isinstance(bins, int) or isinstance(bins, bool) or bins < 1:
            raise ValueError(f"bins must be a whole number of 1 or greater, got {bins!r}.")
        self.bins = bins
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Distance between predicted probabilities and accuracy.",
            citation="",
            inputs_description="predictions: probabilities (N, classes); references: class ids (N,).",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
            format="numpy",
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Store one sample."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Store a batch; kept are the probability of the predicted class and whether it is the true one."""
        found = probabilities(predictions)
        predicted, true = class_ids(found), labels(references)
        if len(predicted) != len(true):
            raise ValueError(f"There are {len(predicted)} predictions and {len(true)} references: give one each.")
        super().add_batch(predictions=found.max(1), references=(predicted == true).astype(np.int64), **kwargs)

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        place = np.clip(np.ceil(predictions * self.bins).astype(int) - 1, 0, self.bins - 1)
        gap = np.bincount(place, weights=predictions - references, minlength=self.bins)
        return {"calibration_error": float(np.abs(gap).sum() / len(predictions))}
