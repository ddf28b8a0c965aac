"""Labels for the recipes: class names, one or several per sample, held-out samples, weights, balanced sampling."""

from __future__ import annotations

import argparse
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from image_folders import some
from torch import Tensor

from hf_visual_peft.tables import close_names, did_you_mean


FLAG = "--label_column_name"
BITS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
Rows = list[Any]  # the class name of each sample, or a list of its classes; None without a label


def clean(value: Any) -> str | None:
    """The name of a class; None if there is none."""
    if value is None or value != value:  # the latter: NaN
        return None
    return unicodedata.normalize("NFC", str(value)).strip() or None


def find_label_columns(data: datasets.Dataset, given: Sequence[str] | None) -> list[str]:
    """The columns that were named, else the only one of class labels, else the one with a usual name."""
    kinds = {name: getattr(feature, "feature", feature) for name, feature in data.features.items()}
    of_kind = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    usual = [name for name in ("label", "labels", "cls") if name in kinds]  # the last one: in tar files
    found = list(given) if given else (of_kind if len(of_kind) == 1 else (usual or ["label"])[:1])
    if missing := [name for name in found if name not in kinds]:
        columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in data.features.items())
        raise ValueError(f"The data set has no label column {missing[0]!r}: choose with {FLAG} among {columns}.")
    return found


def read_labels(data: datasets.Dataset, columns: Sequence[str]) -> tuple[Rows, list[str] | None]:
    """The classes of each sample, and the names of all classes if the data set has them.

    Args:
        data: any split.
        columns: one that holds a class or a list of classes, or one for each class that holds 0 or 1.

    Returns:
        Strings if a sample has one class, lists of strings if it may have several.
    """
    values = [data.select_columns([column]).with_format(None)[column][:] for column in columns]
    if len(columns) > 1:
        return from_bits(list(zip(*values, strict=True)), list(columns), ", ".join(columns)), list(columns)
    feature, (rows,) = data.features[columns[0]], values
    inner = getattr(feature, "feature", feature)  # of a list
    several = inner is not feature
    floats = isinstance(inner, datasets.Value) and inner.dtype.startswith(("float", "double"))
    if several and are_bits(rows, getattr(feature, "length", -1), floats, inner):
        names = [str(number) for number in range(max((len(row) for row in rows if row is not None), default=0))]
        return from_bits(rows, names, columns[0]), names
    label = isinstance(inner, datasets.ClassLabel)
    if not label and (not isinstance(inner, datasets.Value) or floats or inner.dtype.startswith("binary")):
        missing = sum(value is None or value != value for value in rows)
        more = f"; {missing} values are missing" if missing else ""
        raise ValueError(f"{FLAG} {columns[0]}: labels must be class names or whole numbers, got {feature}{more}.")

    def name_of(value: Any) -> str | None:
        if not label:
            return clean(value)
        return clean(inner.names[value]) if value is not None and value >= 0 else None

    flat = {value for row in rows if row is not None for value in row} if several else set(rows)
    known = {value: name_of(value) for value in flat}
    declared = list(dict.fromkeys(filter(None, map(clean, inner.names)))) if label else None
    if not several:
        return [known[value] for value in rows], declared
    named = [None if row is None else [known[value] for value in row] for row in rows]
    return [None if row is None or None in row else row for row in named], declared


def are_bits(rows: list[Any], length: int, floats: bool, inner: Any) -> bool:
    """Whether lists hold 0 or 1 for each class, and not class ids, of which a list has each at most once."""
    rows = [row for row in rows if row is not None]
    if isinstance(inner, datasets.ClassLabel) or not rows or not rows[0] or len({len(row) for row in rows}) > 1:
        return False
    if not all(not isinstance(value, str) and value in (0, 1) for row in rows for value in row):
        return False
    return floats or inner.dtype == "bool" or length > 1 or any(len(set(row)) < len(row) for row in rows)


def from_bits(rows: list[Any], names: list[str], column: str) -> Rows:
    found: Rows = []
    for number, row in enumerate(rows):
        if row is None or any(clean(value) is None for value in row):
            found.append(None)
            continue
        for value in row:
            if str(value).strip().lower() not in BITS:
                raise ValueError(
                    f"{FLAG} {column}: sample {number} has {value!r}; columns for single classes hold 0 or 1."
                )
        found.append([name for name, value in zip(names, row, strict=True) if BITS[str(value).strip().lower()]])
    return found


def class_names(rows: Rows, declared: list[str] | None) -> list[str]:
    """The names of the classes: those of the data set, else those that occur, numbers in ascending order."""
    if declared is not None:
        return declared
    names = {name for row in rows for name in (row if isinstance(row, list) else [row]) if name is not None}
    numbers = all(name.lstrip("-").isdecimal() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if numbers else None)


def class_ids(rows: Rows, split: str, names: list[str], several: bool) -> np.ndarray:
    """The class of each sample as an index into `names`, (N,), or 0 and 1 for each sample and class, (N, classes)."""
    missing = [number for number, row in enumerate(rows) if row is None]
    if missing:
        way = "Label them or take them out" if split == "train" else f"--{split}_split none leaves the split out"
        shown = some([str(number) for number in missing])
        raise ValueError(f"The {split} split has {len(missing)} samples without label: numbers {shown}. {way}.")
    if any(isinstance(row, list) != several for row in rows):
        kinds = ("lists of classes", "one class per sample")
        raise ValueError(f"The labels of train are {kinds[not several]}, those of {split} {kinds[several]}.")
    place = {name: number for number, name in enumerate(names)}
    for number, row in enumerate(rows):
        for name in row if several else [row]:
            if name not in place:
                raise ValueError(
                    f"Class {name!r} of the {split} split is not in the training split: "
                    f"{names if len(names) <= 20 else some(names, 20)} (sample {number})."
                )
    if not several:
        return np.array([place[row] for row in rows], dtype=np.int64)
    ids = np.zeros((len(rows), len(names)), dtype=np.float32)
    for number, row in enumerate(rows):
        ids[number, [place[name] for name in row]] = 1
    return ids


def counts_of(ids: np.ndarray, classes: int) -> np.ndarray:
    """The number of samples of each class, (classes,)."""
    return ids.sum(0).astype(np.int64) if ids.ndim == 2 else np.bincount(ids, minlength=classes)


def hold_out(ids: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the samples in two, stratified by class: the sample numbers of both parts.

    A class with two or more samples has at least one in each part. For samples with several classes, the rarest class
    counts.
    """
    if ids.ndim == 2:
        rarity = np.where(ids > 0, ids.sum(0), np.inf)
        ids = np.where(ids.any(1), rarity.argmin(1), ids.shape[1])
    shuffled = np.random.default_rng(seed).permutation(len(ids))
    members = [shuffled[ids[shuffled] == label] for label in np.unique(ids)]
    sizes = [min(max(round(share * len(rows)), 1), len(rows) - 1) for rows in members]
    held = np.sort(np.concatenate([rows[:size] for rows, size in zip(members, sizes, strict=True)]))
    if len(held) == 0 or share >= 1:
        count = len(ids) if share >= 1 else 0
        raise ValueError(f"--train_val_split {share} puts {count} of the {len(ids)} samples into validation.")
    return np.setdiff1d(np.arange(len(ids)), held), held


def class_table(ids: Mapping[str, np.ndarray], names: list[str], most: int = 30) -> str:
    """Names of the classes and their numbers of samples in each split; some of them if there are very many."""
    counts = {split: counts_of(split_ids, len(names)) for split, split_ids in ids.items()}
    width = max(map(len, [*names[:most], "class"]))
    lines = [f"{'class':{width}}" + "".join(f"{split:>12}" for split in ids)]
    lines += [
        f"{name:{width}}" + "".join(f"{of_split[number]:>12,}" for of_split in counts.values())
        for number, name in enumerate(names[:most])
    ]
    if len(names) > most:
        train = counts["train"]
        least, most_of = names[int(train.argmin())], names[int(train.argmax())]
        lines.append(
            f"and {len(names) - most} more classes; in train, {least} has fewest ({train.min():,}) and {most_of} most "
            f"({train.max():,})"
        )
    for split, of_split in counts.items():
        absent = [name for name, count in zip(names, of_split, strict=True) if not count]
        if absent:
            lines.append(f"{split} has no sample of {some(absent)}.")
    return "\n".join(lines)


def class_weights(given: Sequence[str] | None, ids: np.ndarray, names: list[str]) -> Tensor | None:
    """The weights of the classes, (classes,), or None.

    `balanced`: with one class per sample, the inverse of the class's frequency, so that all classes weigh the same and
    samples weigh 1 on average; with several, the number of samples without the class divided by the number with it.
    """
    if not given:
        return None
    if list(given) == ["balanced"]:
        counts = counts_of(ids, len(names)).astype(float)
        there = np.maximum(counts, 1)
        if ids.ndim == 2:
            weights = np.where((counts > 0) & (counts < len(ids)), (len(ids) - counts) / there, 1)
        else:
            weights = np.where(counts > 0, len(ids) / (there * (counts > 0).sum()), 0)
        return torch.tensor(weights, dtype=torch.float32)
    weights = np.ones(len(names))
    for text in given:
        name, _, number = text.rpartition("=")
        if name not in names:
            meant = did_you_mean(close_names(name or text, names)) or f"Classes: {some(names)}."
            raise ValueError(f"--class_weights {text}: write balanced, or CLASS=NUMBER. {meant}")
        try:
            weights[names.index(name)] = float(number)
        except ValueError:
            raise ValueError(f"--class_weights {text}: {number!r} is not a number.") from None
    if not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
        raise ValueError(f"--class_weights {' '.join(given)}: weights must be 0 or greater, and at least one above 0.")
    return torch.tensor(weights, dtype=torch.float32)


def check_flags(args: argparse.Namespace, several: bool, classes: int) -> None:
    """Raise an error for flags that do not fit the labels, and choose the metric for the best model if none is given.

    Args:
        args: flags of the recipe; `metric_for_best_model` and `threshold` are set.
        several: whether samples may have several classes.
        classes: number of classes.
    """
    own = ["mean_average_precision", "micro_f1"] if several else ["accuracy", "mean_per_class_accuracy"]
    known = [*own, "macro_f1", "loss"]
    args.metric_for_best_model = args.metric_for_best_model or known[0]
    if args.metric_for_best_model == "f1":
        args.metric_for_best_model = "macro_f1"
    kind = "samples that may have several classes" if several else "samples of one class each"
    if args.metric_for_best_model not in known:
        raise ValueError(f"--metric_for_best_model {args.metric_for_best_model}: {kind} have {', '.join(known)}.")
    if several:
        wrong = {
            "--sampler balanced": args.sampler == "balanced",  # a sample drawn for one class also has others
            f"--top_k {args.top_k}": args.top_k,
            f"--label_smoothing_factor {args.label_smoothing_factor}": args.label_smoothing_factor,
        }
        if any(wrong.values()):
            names = ", ".join(name for name, given in wrong.items() if given)
            raise ValueError(
                f"{names}: does not work with {kind}; remove it. --class_weights balanced weighs classes."
            )
    if (args.top_k or 0) > classes:
        raise ValueError(f"--top_k {args.top_k}: there are {classes} classes.")
    if args.sampler == "balanced" and args.class_weights == ["balanced"]:
        raise ValueError("--sampler balanced and --class_weights balanced both balance the classes; give one of them.")
    if args.threshold is not None and not several:
        raise ValueError(f"--threshold {args.threshold}: {kind} get the class with the highest score; remove it.")
    args.threshold = 0.5 if args.threshold is None else args.threshold
    if not 0 < args.threshold < 1:
        raise ValueError(f"--threshold must be between 0 and 1, got {args.threshold}.")


class Loss:
    """Cross entropy, or binary cross entropy if samples may have several classes.

    Args:
        weights: of the classes, in training only. The weight of a sample is that of its class; with several classes,
            the weight multiplies the terms of the classes that the sample has.
        several: whether samples may have several classes.
        smoothing: of the labels in training, if samples have one class.
    """

    def __init__(self, weights: Tensor | None = None, *, several: bool = False, smoothing: float = 0.0) -> None:
        self.weights, self.several, self.smoothing = weights, several, smoothing

    def samples(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each sample, (N,), without weights and smoothing."""
        if self.several:
            return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
        return F.cross_entropy(logits, labels, reduction="none")

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over samples for training.

        Unlike in torch, the sum is not divided by the weights: so the loss of a batch is the mean over its parts, on
        any number of processes.
        """
        weights = None if self.weights is None else self.weights.to(logits.device)
        if self.several:
            return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights)
        if weights is None:
            return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)
        losses = F.cross_entropy(logits, labels, label_smoothing=self.smoothing, reduction="none")
        of_sample = labels @ weights if labels.ndim == 2 else weights[labels]  # the former: mixed labels
        return (losses * of_sample).mean()


class BalancedSampler(torch.utils.data.Sampler[int]):
    """Draws as many samples per epoch as there are, with replacement, equally many of each class on average.

    The draws depend only on seed and epoch: every process and a resumed run draw the same. A repetition of a sample
    within an epoch has its number plus the number of samples, so that it gets another augmentation.

    Args:
        ids: the class of each sample, (N,).
        seed: of the draws.
        again: whether numbers of N and more mark repetitions.
    """

    def __init__(self, ids: np.ndarray, seed: int, *, again: bool = True) -> None:
        self.order = np.argsort(ids, kind="stable")
        self.classes, self.first, self.counts = np.unique(ids[self.order], return_index=True, return_counts=True)
        self.seed, self.again, self.epoch = seed, again, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw for another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch, 2))
        chosen = rng.integers(len(self.classes), size=len(self))
        drawn = self.order[self.first[chosen] + (rng.random(len(self)) * self.counts[chosen]).astype(np.int64)]
        times: dict[int, int] = {}
        for number in drawn.tolist():
            yield number + len(self) * times.get(number, 0)
            if self.again:
                times[number] = times.get(number, 0) + 1
