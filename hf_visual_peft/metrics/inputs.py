"""Checks and conversions of a batch before a metric stores it: arrays, and class ids instead of scores."""

from __future__ import annotations

from typing import Any

import numpy as np


def class_ids(predictions: Any) -> np.ndarray:
    """The predicted class of each sample.

    Args:
        predictions: class ids (N,), or scores (N, classes) of any float type: array, tensor on any device or list.

    Returns:
        (N,) int64. If several classes have the highest score, the one with the lowest id.

    Raises:
        ValueError: the shape is neither of the two, class ids are not integers, or scores are NaN.
    """
    array = _array("predictions", predictions)
    if array.ndim == 2:
        return ranked_classes(array, 1)[:, 0]
    return _whole_numbers("predictions", array)


def ranked_classes(scores: Any, k: int) -> np.ndarray:
    """The k classes with the highest scores, best first; equal scores rank by class id.

    Args:
        scores: (N, classes).
        k: at most the number of classes.

    Returns:
        (N, k) int64.

    Raises:
        ValueError: wrong shape, fewer than k classes, or a score that is NaN.
    """
    array = _array("predictions", scores)
    if array.ndim != 2:
        raise ValueError(f"predictions must be scores of shape (N, classes), got shape {array.shape}.")
    if array.shape[1] < k:
        raise ValueError(f"k={k} needs scores of at least {k} classes, got predictions of shape {array.shape}.")
    if np.isnan(array).any():
        raise ValueError("predictions hold NaN: the model has diverged or its input was NaN.")
    return np.argsort(-array, axis=1, kind="stable")[:, :k].astype(np.int64)


def scores(predictions: Any) -> np.ndarray:
    """Scores, (N, classes) float32.

    Raises:
        ValueError: another shape, or NaN.
    """
    array = _array("predictions", predictions)
    if array.ndim != 2:
        raise ValueError(f"predictions must be scores of shape (N, classes), got shape {array.shape}.")
    if np.isnan(array).any():
        raise ValueError("predictions hold NaN: the model has diverged or its input was NaN.")
    return array.astype(np.float32)


def indicators(references: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Which classes each sample has, (N, classes) int64 of 0 and 1.

    Raises:
        ValueError: another shape than `shape`, that of the scores, or other values.
    """
    array = _array("references", references)
    if array.shape != shape:
        raise ValueError(f"references must be 0 or 1 of the shape of predictions, {shape}, got shape {array.shape}.")
    if not np.isin(array, (0, 1)).all():
        raise ValueError("references must be 0 or 1: whether a sample has a class.")
    return array.astype(np.int64)


def labels(references: Any) -> np.ndarray:
    """The true classes, (N,) int64.

    Raises:
        ValueError: not one whole number, 0 or greater, per sample. Data sets mark unlabelled samples by -1.
    """
    array = _whole_numbers("references", _array("references", references))
    if (array < 0).any():
        raise ValueError(f"references must be class ids of 0 or greater, got {array.min()}: unlabelled samples?")
    return array


def probabilities(predictions: Any) -> np.ndarray:
    """The probability of each class, (N, classes) float64.

    Raises:
        ValueError: another shape, or rows that are not probabilities: below 0, or with another sum than 1.
    """
    array = _array("predictions", predictions).astype(np.float64)
    if array.ndim != 2:
        raise ValueError(f"predictions must be probabilities of shape (N, classes), got shape {array.shape}.")
    if not ((array >= 0).all() and np.allclose(array.sum(1), 1, atol=1e-2)):
        raise ValueError("predictions must be probabilities, whose sum is 1 in each row: of logits, take the softmax.")
    return array


def confusion(predicted: np.ndarray, true: np.ndarray, classes: int) -> np.ndarray:
    """How many samples of each class, by row, were taken for which, by column: (classes, classes).

    Raises:
        ValueError: a class id is not below `classes`.
    """
    for name, array in (("predictions", predicted), ("references", true)):
        if array.size and array.max() >= classes:
            raise ValueError(f"{name} have the class {array.max()}: with classes={classes}, ids go to {classes - 1}.")
    return np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)


def per_class(hits: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall, F1 and number of samples of each class, from counts (classes,); 0 for 0 by 0.

    Args:
        hits: samples of a class that were taken for it.
        predicted: samples taken for it.
        true: samples of it.
    """

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)

    found = {"precision": share(hits, predicted), "recall": share(hits, true)}
    return {**found, "f1": share(2 * hits, predicted + true), "support": true}


def _array(name: str, values: Any) -> np.ndarray:
    if values is None:
        raise ValueError(f"{name} are missing.")
    if hasattr(values, "detach"):  # a tensor, which may be bfloat16 or lie on an accelerator
        values = values.detach()
        values = (values.float() if values.is_floating_point() else values).cpu().numpy()
    return np.asarray(values)


def _whole_numbers(name: str, array: np.ndarray) -> np.ndarray:
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
        raise ValueError(f"{name} must be class ids of shape (N,), got shape {array.shape} of type {array.dtype}.")
    return array.astype(np.int64)
