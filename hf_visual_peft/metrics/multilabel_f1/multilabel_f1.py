"""F1 of samples with several classes, as an `evaluate.Metric`."""

from typing import Any

# `evaluate.load` copies this file and reads its imports line by line: one module a line, and no relative import
import datasets
import evaluate
import numpy as np

from hf_visual_peft.metrics.inputs import indicators, scores


class MultilabelF1(evaluate.Metric):
    """F1 of the classes whose score is at least a threshold, as `"micro_f1"` and `"macro_f1"`.

    Micro counts all pairs of sample and class together. Macro is the mean of each class's F1, without classes that
    occur neither in references nor in predictions. If there are none at all, F1 is 0.

    `predictions` are scores (N, classes), `references` are 0 or 1 (N, classes).

    Args:
        threshold: of the scores. 0, a probability of one half, fits logits; 0.5 fits probabilities.

    Raises:
        ValueError: the threshold is not a finite number.
    """

    def __init__(self, *args: Any, threshold: float = 0.0, **kwargs: Any) -> None:
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not np.isfinite(threshold):
            raise ValueError(f"threshold must be a finite number, got {threshold!r}.")
        self.threshold = threshold
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1 of the classes whose score is at least a threshold.",
            citation="",
            inputs_description="predictions: scores (N, classes); references: 0 or 1 (N, classes).",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Store one sample."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Store a batch; of the scores it keeps only whether they reach the threshold."""
        found = scores(predictions)
        truths = indicators(references, found.shape)
        super().add_batch(predictions=(found >= self.threshold).astype(np.int64), references=truths, **kwargs)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        given, truths = np.asarray(predictions), np.asarray(references)
        hits, either = (given * truths).sum(0), given.sum(0) + truths.sum(0)
        there = either > 0
        return {
            "micro_f1": float(2 * hits.sum() / max(either.sum(), 1)),
            "macro_f1": float(np.mean(2 * hits[there] / either[there])) if there.any() else 0.0,
        }
