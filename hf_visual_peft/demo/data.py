"""The images of the demonstration: the digits, or any image dataset that `datasets` can read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

DIGITS = "digits"
DIGITS_IMAGE_SIZE = 56
_DIGITS_SPLIT_SIZE = 1000
_HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class DataOptions:
    """Which images to read from where: all that a second process needs to get the same test split.

    Attributes:
        dataset_name: `"digits"`, a dataset on the Hub, or a local folder (of images, parquet, or `save_to_disk`).
        dataset_config_name: configuration of that dataset.
        image_column_name: column with the images; `None` takes the only one there is.
        label_column_name: column with the labels; `None` takes the only one of classes there is.
        train_split: split to train on.
        test_split: split to report on; `None` takes `test` or `validation`, or holds a fifth of `train_split` out.
        train_size: images to train on, a stratified choice; `None` takes 1,000 digits, or all of another dataset.
        test_size: images to report on, likewise.
        seed: of every choice.
    """

    dataset_name: str = DIGITS
    dataset_config_name: str | None = None
    image_column_name: str | None = None
    label_column_name: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    train_size: int | None = None
    test_size: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class ImageData:
    """Two splits with the columns `image` and `label`.

    Attributes:
        train: images to train on.
        test: images to report on, never used for a choice.
        labels: class names by label.
    """

    train: Dataset
    test: Dataset
    labels: tuple[str, ...]


def load_data(options: DataOptions) -> ImageData:
    """Read the dataset and choose its images.

    Raises:
        ValueError: a column, a split or a size does not exist in the dataset; the message lists those that do.
        FileNotFoundError: there is no such dataset.
    """
    for field in ("train_size", "test_size"):
        size = getattr(options, field)
        if size is not None and size < 1:
            raise ValueError(f"{field}={size}: choose at least 1 image.")
    splits = _digits(options) if options.dataset_name == DIGITS else _read(options)
    train, test = splits["train"], splits["test"]
    return ImageData(train=train, test=test, labels=tuple(train.features["label"].names))


def preprocess(
    dataset: Dataset, image_size: int, mean: tuple[float, ...], std: tuple[float, ...], rescale_factor: float = 1 / 255
) -> Dataset:
    """Let a dataset give model inputs: the centred square of each image, resized and normalised when it is read.

    Args:
        dataset: columns `image` and `label`.
        image_size: side of the square, pixels.
        mean: of the normalisation, per channel.
        std: the same.
        rescale_factor: what bytes are multiplied with before that.

    Returns:
        The dataset with rows of `pixel_values`, float32 `(3, image_size, image_size)`, and `labels`.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    shift, divisor = np.asarray(mean, dtype=np.float32), np.asarray(std, dtype=np.float32)

    def pixels(image: Image.Image) -> torch.Tensor:
        square = ImageOps.fit(image.convert("RGB"), (image_size, image_size), method=Image.Resampling.BICUBIC)
        values = (np.asarray(square, dtype=np.float32) * rescale_factor - shift) / divisor
        return torch.from_numpy(values.astype(np.float32, copy=False)).permute(2, 0, 1).contiguous()

    def transform(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"pixel_values": [pixels(image) for image in rows["image"]], "labels": rows["label"]}

    return dataset.with_transform(transform)


def _digits(options: DataOptions) -> DatasetDict:
    """The digits; options that choose columns and splits do not apply."""
    from .digits import load_digits

    for field in ("dataset_config_name", "image_column_name", "label_column_name", "test_split"):
        value = getattr(options, field)
        if value is not None:
            raise ValueError(f"{field}={value!r} applies to other datasets, not to the digits: remove it.")
    if options.train_split != "train":
        raise ValueError(f"train_split={options.train_split!r} applies to other datasets: remove it.")
    return load_digits(
        train_size=options.train_size or _DIGITS_SPLIT_SIZE,
        validation_size=0,
        test_size=options.test_size or _DIGITS_SPLIT_SIZE,
        seed=options.seed,
    )


def _read(options: DataOptions) -> dict[str, Dataset]:
    """`train` and `test` of any dataset, with columns `image` and `label` and of the sizes asked for."""
    name = options.dataset_name
    splits = _open(name, options.dataset_config_name)
    if options.train_split not in splits:
        raise ValueError(f"train_split={options.train_split!r}: {name} has {', '.join(splits)}.")
    train = _two_columns(splits[options.train_split], options)

    test_split = options.test_split or next((split for split in ("test", "validation") if split in splits), None)
    if test_split is None:
        parts = _divide(train, options.seed, test_size=options.test_size or _HELD_OUT_SHARE)
        train, test = parts["train"], parts["test"]
    elif test_split not in splits or test_split == options.train_split:
        others = [split for split in splits if split != options.train_split]
        raise ValueError(f"test_split={test_split!r}: {name} has {', '.join(others) or 'no other split'}.")
    else:
        test = _two_columns(splits[test_split], options)
        if test.features["label"].names != train.features["label"].names:
            raise ValueError(f"Splits {options.train_split!r} and {test_split!r} of {name} have different classes.")
    return {
        "train": _choose(train, options.train_size, "train_size", options.seed),
        "test": _choose(test, options.test_size, "test_size", options.seed),
    }


def _open(name: str, config_name: str | None) -> DatasetDict:
    """All splits of a dataset on the Hub or on disk."""
    import datasets

    path = Path(name)
    if (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(name)
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return datasets.DatasetDict({"train": datasets.load_from_disk(name)})
    return datasets.load_dataset(name, config_name)


def _two_columns(dataset: Dataset, options: DataOptions) -> Dataset:
    """Only the image and the label, under those names, the label as a class."""
    from datasets import ClassLabel, Image

    image = _column(dataset, "image_column_name", options.image_column_name, lambda kind: isinstance(kind, Image))
    label = _column(dataset, "label_column_name", options.label_column_name, lambda kind: isinstance(kind, ClassLabel))
    dataset = dataset.select_columns([image, label])
    for old, new in ((image, "image"), (label, "label")):
        if old != new:
            dataset = dataset.rename_column(old, new)
    if not isinstance(dataset.features["image"], Image):
        raise ValueError(f"image_column_name={image!r} holds {dataset.features['image']}, not images.")
    if not isinstance(dataset.features["label"], ClassLabel):
        dataset = dataset.class_encode_column("label")
    unlabelled = sum(value is None or value < 0 for value in dataset["label"])
    if unlabelled:
        raise ValueError(
            f"label_column_name={label!r}: {unlabelled} of {len(dataset)} images of a split have no label."
        )
    return dataset


def _column(dataset: Dataset, field: str, chosen: str | None, fits: Callable[[Any], bool]) -> str:
    """The chosen column, or the only one that fits."""
    if chosen is not None:
        if chosen not in dataset.features:
            raise ValueError(f"{field}={chosen!r}: the dataset's columns are {', '.join(dataset.features)}.")
        return chosen
    candidates = [column for column, kind in dataset.features.items() if fits(kind)]
    if len(candidates) != 1:
        described = ", ".join(f"{column} ({type(kind).__name__})" for column, kind in dataset.features.items())
        found = f"{len(candidates)} columns fit" if candidates else "no column fits"
        raise ValueError(f"{field} is needed, since {found}; the dataset's columns are {described}.")
    return candidates[0]


def _choose(dataset: Dataset, size: int | None, field: str, seed: int) -> Dataset:
    """A stratified choice of that many rows, in random order."""
    if size is None or size == len(dataset):
        return dataset
    if size > len(dataset):
        raise ValueError(f"{field}={size}: the split has {len(dataset)} images.")
    return _divide(dataset, seed, train_size=size)["train"]


def _divide(dataset: Dataset, seed: int, **sizes: float) -> DatasetDict:
    """Split in two, stratified by class."""
    try:
        return dataset.train_test_split(seed=seed, stratify_by_column="label", **sizes)
    except ValueError as error:
        raise ValueError(
            f"Cannot choose {sizes} of {len(dataset)} images with all classes in both parts: {error}"
        ) from error
