"""Images and labels for the recipes: any `datasets` image data set, checked before training starts."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from PIL import Image


SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in a folder
SPLITS = ("train", "validation", "test")
CROPS = {
    "random_resized": "any part of the image, area and shape drawn at random",
    "random": "a square of 7/8 of the shorter side",
    "none": "as in evaluation",
}


def load_splits(args: argparse.Namespace) -> dict[str, datasets.Dataset]:
    """The splits there are of train, validation and test."""
    source = (args.dataset_name, args.dataset_config_name)
    on_disk = args.dataset_name and any((Path(args.dataset_name) / name).exists() for name in SAVED)
    if args.dataset_name:
        whole = datasets.load_from_disk(args.dataset_name) if on_disk else datasets.load_dataset(*source)
        whole = {"train": whole} if isinstance(whole, datasets.Dataset) else whole
    else:
        whole = {}
        for split in SPLITS:  # one at a time: together, folders at different depths would lose their labels
            if folder := getattr(args, f"{split}_dir"):
                files = {split: str(Path(folder) / "**")}
                whole[split] = datasets.load_dataset("imagefolder", data_files=files, split=split)
            elif file := getattr(args, f"{split}_file"):
                kind = Path(file).suffix.lstrip(".").replace("jsonl", "json")
                whole[split] = datasets.load_dataset(kind, data_files={split: file}, split=split)
    splits = {}
    for split in SPLITS:
        name = getattr(args, f"{split}_split")
        if (name or split) in whole:
            splits[split] = whole[name or split]
        elif name and "[" in name and args.dataset_name and not on_disk:
            splits[split] = datasets.load_dataset(*source, split=name)
        elif name != "none" and (name or split == "train"):
            raise ValueError(f"--{split}_split {name or split}: the data set has the splits {', '.join(whole)}.")
    return splits


def find_column(data: datasets.Dataset, flag: str, given: str | None, kind: type, default: str) -> str:
    """The column that was named, else the only one of a kind, else the one with the usual name."""
    of_kind = [name for name, feature in data.features.items() if isinstance(feature, kind)]
    name = given or (of_kind[0] if len(of_kind) == 1 else default)
    if name not in data.features:
        columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in data.features.items())
        raise ValueError(f"The data set has no {default} column {name!r}: choose by {flag} among {columns}.")
    return name


def class_names(data: datasets.Dataset, column: str) -> list[str]:
    feature = data.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    if not isinstance(feature, datasets.Value) or feature.dtype.startswith(("float", "binary")):
        raise ValueError(f"--label_column_name {column}: labels must be class names or whole numbers, got {feature}.")
    return [str(value) for value in sorted(value for value in data.unique(column) if value is not None)]


def class_ids(data: datasets.Dataset, split: str, column: str, names: list[str]) -> np.ndarray:
    """The class of each sample, (N,), as index into the names of the training split."""
    feature = data.features[column]
    of_value: dict[Any, int] = {}
    for value in data.unique(column):
        known = isinstance(feature, datasets.ClassLabel)
        if value is None or (known and value < 0):
            raise ValueError(f"The {split} split has samples without label ({value}). --{split}_split none drops it.")
        name = feature.names[value] if known else str(value)
        if name not in names:
            raise ValueError(f"Class {name!r} of the {split} split is none of the training split's: {names}.")
        of_value[value] = names.index(name)
    return np.array([of_value[value] for value in data.select_columns([column])[column][:]])


def hold_out(ids: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Part the samples in two, the same share of every class in the second: sample numbers of both."""
    shuffled = np.random.default_rng(seed).permutation(len(ids))
    members = [shuffled[ids[shuffled] == label] for label in np.unique(ids)]
    held = np.sort(np.concatenate([rows[: round(share * len(rows))] for rows in members]))
    if len(held) in (0, len(ids)):
        raise ValueError(f"--train_val_split {share} puts {len(held)} of the {len(ids)} samples into validation.")
    return np.setdiff1d(np.arange(len(ids)), held), held


class CorruptImageError(ValueError):
    """An image cannot be decoded; the message names it."""


def decode(value: dict[str, Any] | None, where: str) -> Image.Image:
    """The image of `{"path": ..., "bytes": ...}` in RGB."""
    try:
        return datasets.Image().decode_example(value).convert("RGB")
    except Exception as error:  # decoders raise anything on a damaged file
        name = (value or {}).get("path") or "an image without file name"
        raise CorruptImageError(f"Cannot decode {name} ({where}): {error}. See --skip_corrupt_images.") from error


def decode_clip(
    value: list[dict[str, Any]], count: int, rng: np.random.Generator | None, where: str
) -> list[Image.Image]:
    """Some images of a list, in RGB: one of each of `count` equal stretches, the middle one or one drawn at random."""
    edges = np.linspace(0, len(value), count + 1)
    places = (edges[:-1] + edges[1:]) / 2 if rng is None else rng.uniform(edges[:-1], edges[1:])
    return [decode(value[min(int(place), len(value) - 1)], where) for place in places]


def decode_all(value: Any, where: str) -> None:
    """Decode an image, or every image of a list; an error if one cannot be decoded or there is none."""
    if isinstance(value, list) and not value:
        raise CorruptImageError(f"There is no frame ({where}). See --skip_corrupt_images.")
    for image in value if isinstance(value, list) else [value]:
        decode(image, where)


def is_corrupt(value: Any) -> bool:
    try:
        decode_all(value, "")
    except CorruptImageError:
        return True
    return False


class Images(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples as the model wants them.

    Augmentation is drawn from seed, epoch and sample number: a resumed run, or one with other workers, sees the same
    pixels.
    """

    def __init__(self, data: datasets.Dataset, ids: np.ndarray, split: str, processor: Any, args: argparse.Namespace):
        self.data, self.ids, self.split, self.processor, self.args = data, ids, split, processor, args
        self.epoch = 0
        self.crops = split == "train" and args.train_crop != "none"
        if self.crops:
            self.height, self.width = input_size(processor)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        (value,) = self.data[index].values()
        where = f"sample {index} of the {self.split} split"
        drawn = (self.args.seed, self.epoch, index)
        if self.args.clip_frames:
            places = np.random.default_rng((*drawn, 1)) if self.split == "train" else None
            images = decode_clip(value, self.args.clip_frames, places, where)
        else:
            images = [decode(value, where)]
        # every frame of a clip gets the same draws, so the same crop and flip
        images = [self.augment(image, np.random.default_rng(drawn)) for image in images]
        done = {"do_resize": False, "do_center_crop": False} if self.crops else {}
        inputs = self.processor(images=images, return_tensors="pt", **done)
        if not self.args.clip_frames:
            inputs = {name: tensor[0] for name, tensor in inputs.items()}
        return {**inputs, "labels": int(self.ids[index])}

    def augment(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Crop and flip, in training."""
        if self.crops:
            image = self.crop(image, rng)
        if self.split == "train" and rng.random() < self.args.horizontal_flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image

    def crop(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """A random box of the image, at the size of the model's input."""
        if self.args.train_crop == "random_resized":
            area = image.width * image.height * rng.uniform(self.args.crop_scale, 1)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            width, height = min(image.width, math.sqrt(area * ratio)), min(image.height, math.sqrt(area / ratio))
        else:
            zoom = min(image.width / self.width, image.height / self.height) * 7 / 8
            width, height = self.width * zoom, self.height * zoom
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        resample = getattr(self.processor, "resample", None) or Image.Resampling.BICUBIC
        return image.resize((self.width, self.height), resample, box=(left, top, left + width, top + height))


def input_size(processor: Any) -> tuple[int, int]:
    """Height and width of what the image processor makes."""
    pixels = processor(images=Image.new("RGB", (640, 480)), return_tensors="pt")["pixel_values"]
    if pixels.ndim != 4:
        raise ValueError(
            f"{type(processor).__name__} cuts patches itself: needs --train_crop none and no --image_size."
        )
    return pixels.shape[-2], pixels.shape[-1]


def load_processor(args: argparse.Namespace) -> Any:
    """The checkpoint's image processor, for inputs of `--image_size`."""
    own = {"pretrained_model_name_or_path": args.model_name_or_path, "revision": args.model_revision}
    other = {"pretrained_model_name_or_path": args.image_processor_name}
    processor = transformers.AutoImageProcessor.from_pretrained(**(other if args.image_processor_name else own))
    if args.image_size is None:
        return processor
    scale = args.image_size / input_size(processor)[1]
    config = processor.to_dict()
    for key in ("size", "crop_size"):  # scaled alike, so that a crop keeps its share of the image
        config[key] = config.get(key) and {side: round(length * scale) for side, length in config[key].items()}
    return type(processor).from_dict(config)


def usable_rows(data: datasets.Dataset, split: str, args: argparse.Namespace) -> np.ndarray:
    """Numbers of the samples whose image can be decoded; an error for others unless they may be skipped."""
    if not (args.check_images or args.skip_corrupt_images):
        return np.arange(len(data))
    (column,) = data.column_names
    workers = args.dataloader_num_workers or None
    look = data.map(
        lambda row: {"bad": is_corrupt(row[column])}, remove_columns=[column], num_proc=workers, desc=split
    )
    bad = np.array(look["bad"][:], dtype=bool)
    if bad.any() and not args.skip_corrupt_images:
        first = int(bad.argmax())
        decode_all(data[first][column], f"sample {first} of the {split} split, {bad.sum()} such images in all")
    return np.flatnonzero(~bad)


def prepare_data(args: argparse.Namespace, processor: Any) -> tuple[dict[str, Images], list[str], int]:
    """The samples of each split, the names of the classes, and how many corrupt images were left out."""
    splits = load_splits(args)
    encoded = datasets.Image(decode=False)
    kind, plain = (datasets.List, datasets.List(encoded)) if args.clip_frames else (datasets.Image, encoded)
    image = find_column(splits["train"], "--image_column_name", args.image_column_name, kind, "image")
    if args.clip_frames and not isinstance(getattr(splits["train"].features[image], "feature", None), datasets.Image):
        raise ValueError(f"--clip_frames: the column {image!r} must hold lists of images.")
    label = find_column(splits["train"], "--label_column_name", args.label_column_name, datasets.ClassLabel, "label")
    for split, data in splits.items():
        if missing := {image, label} - set(data.features):
            raise ValueError(f"The {split} split lacks the column {missing}: it has {', '.join(data.features)}.")
    names = class_names(splits["train"], label)
    ids = {split: class_ids(data, split, label, names) for split, data in splits.items()}
    rows = {split: np.arange(len(data)) for split, data in splits.items()}
    share = (0.15 if args.select == "best" else 0) if args.train_val_split is None else args.train_val_split
    if "validation" not in splits and share:
        splits["validation"], ids["validation"] = splits["train"], ids["train"]
        rows["train"], rows["validation"] = hold_out(ids["train"], share, args.seed)
    if "validation" not in splits and args.select == "best":
        raise ValueError("--select best needs a validation split, or --train_val_split above 0.")
    found, skipped = {}, 0
    for split, data in splits.items():
        kept = rows[split]
        if limit := args.max_train_samples if split == "train" else args.max_eval_samples:
            kept = np.random.default_rng(args.seed).permutation(kept)[:limit]
        images = data.select_columns([image]).cast_column(image, plain).select(kept)
        good = usable_rows(images, split, args)
        skipped += len(images) - len(good)
        if len(good) == 0:
            raise ValueError(f"The {split} split has no image that can be used.")
        found[split] = Images(images.select(good), ids[split][kept[good]], split, processor, args)
    return found, names, skipped
