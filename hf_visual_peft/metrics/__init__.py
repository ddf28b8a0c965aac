"""Metrics for image classification that need no network.

Each is an `evaluate.Metric`: instantiate it, or `evaluate.load` its folder. They take scores or class ids in batches
and keep class ids only, so that a large test split with many classes stays small in memory:

    metrics = evaluate.combine([Accuracy(), TopKAccuracy(k=5), MeanPerClassAccuracy()])
    for batch in loader:
        metrics.add_batch(predictions=model(**batch).logits, references=labels)
    metrics.compute()  # {"accuracy": ..., "top_5_accuracy": ..., "mean_per_class_accuracy": ...}

`MeanAveragePrecision` and `MultilabelF1` are for samples with several classes, whose references are 0 or 1 for each.
"""

from .accuracy.accuracy import Accuracy
from .mean_average_precision.mean_average_precision import MeanAveragePrecision
from .mean_per_class_accuracy.mean_per_class_accuracy import MeanPerClassAccuracy
from .multilabel_f1.multilabel_f1 import MultilabelF1
from .top_k_accuracy.top_k_accuracy import TopKAccuracy


__all__ = ["Accuracy", "MeanAveragePrecision", "MeanPerClassAccuracy", "MultilabelF1", "TopKAccuracy"]
