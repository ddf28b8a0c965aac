"""Precision, recall, F1 and number of samples of each class, as an `evaluate.Metric`."""

from typing import Any

# `evaluate.load` copies this file and reads its imports line by line: one module a line, and no relative import
import datasets
import evaluate
import numpy as np

from hf_visual_peft.metrics.inputs import class_ids, confusion, labels, per_class


class PerClassScores(evaluate.Metric):
    """Lists with an entry per class: `"precision"`, `"recall"`, `"f1"`, from 0 to 1, and `"support"`, its samples.

    A figure that would divide by zero is 0: the precision of a class never predicted, the recall of one without
    sample. `predictions` are class ids (N,) or scores (N, classes), `references` class ids (N,).

    Args:
        classes: how many there are.
    """

    def __init__(self, *args: Any, classes: int, **kwargs: Any) -> None:
        self.classes = classes
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Precision, recall, F1 and number of samples of each class.",
            citation="",
            inputs_description="predictions: class ids (N,) or scores (N, classes); references: class ids (N,).",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
            format="numpy",
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Store one sample."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Store a batch; of scores only the best class is kept."""
        super().add_batch(predictions=class_ids(predictions), references=labels(references), **kwargs)

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, list[Any]]:
        matrix = confusion(predictions, references, self.classes)
        found = per_class(matrix.diagonal(), matrix.sum(0), matrix.sum(1))
        return {name: values.tolist() for name, values in found.items()}
