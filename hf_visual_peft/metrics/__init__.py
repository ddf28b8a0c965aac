"""Metrics for image classification that need no network.

Each is an `evaluate.Metric`: instantiate it, or `evaluate.load` its folder. They take scores or class ids in batches
and keep class ids only, so that a large test split with many classes stays small in memory:

    metrics = evaluate.combine([Accuracy(), TopKAccuracy(k=5), MeanPerClassAccuracy()])
    for batch in loader:
        metrics.add_batch(predictions=model(**batch).logits, references=labels)
    metrics.compute()  # {"accuracy": ..., "top_5_accuracy": ..., "mean_per_class_accuracy": ...}

`ConfusionMatrix` and `PerClassScores` give a figure for each class, `CalibrationError` takes probabilities.
`MeanAveragePrecision` and `MultilabelF1` are for samples with several classes, whose references are 0 or 1 for each.
"""

from .accuracy.accuracy import Accuracy
from .calibration_error.calibration_error import CalibrationError
from .confusion_matrix.confusion_matrix import ConfusionMatrix
from .macro_f1.macro_f1 import MacroF1
from .mean_average_precision.mean_average_precision import MeanAveragePrecision
from .mean_per_class_accuracy.mean_per_class_accuracy import MeanPerClassAccuracy
from .multilabel_f1.multilabel_f1 import MultilabelF1
from .per_class_scores.per_class_scores import PerClassScores
from .top_k_accuracy.top_k_accuracy import TopKAccuracy


__all__ = [
    "Accuracy",
    "CalibrationError",
    "ConfusionMatrix",
    "MacroF1",
    "MeanAveragePrecision",
    "MeanPerClassAccuracy",
    "MultilabelF1",
    "PerClassScores",
    "TopKAccuracy",
]
