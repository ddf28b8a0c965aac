"""Macro F1 as an `evaluate.Metric`."""

from typing import Any

# `evaluate.load` copies this file and reads its imports line by line: one module a line, and no relative import
import datasets
import evaluate
import numpy as np

from hf_visual_peft.metrics.inputs import class_ids, confusion, labels, per_class


class MacroF1(evaluate.Metric):
    """Mean over the classes of F1, the harmonic mean of precision and recall, as `"macro_f1"`.

    Classes neither in `references` nor in `predictions` do not count. `predictions` are class ids (N,) or scores
    (N, classes), `references` class ids (N,).
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean over the classes of F1.",
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

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        matrix = confusion(predictions, references, int(max(predictions.max(), references.max())) + 1)
        predicted, true = matrix.sum(0), matrix.sum(1)
        return {"macro_f1": float(np.mean(per_class(matrix.diagonal(), predicted, true)["f1"][predicted + true > 0]))}
