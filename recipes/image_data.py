"""Images and labels for the recipes: any `datasets` image data set, checked before training starts."""

from __future__ import annotations

import argparse
import copy
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from augmentation import Augmentation
from image_folders import some, tell
from labels import class_ids, class_names, class_table, find_label_columns, hold_out, read_labels
from peft import PeftModel
from PIL import Image
from screen import Screen
from tqdm.auto import tqdm

from hf_visual_peft.sharing import hub
from hf_visual_peft.training.images import as_rgb


CROPS = {
    "random_resized": "a part of the image, of random area and shape",
    "random": "a square of 7/8 of the shorter side",
    "none": "as in evaluation",
}


def find_column(data: datasets.Dataset, flag: str, given: str | None, kind: type, default: str) -> str:
    """The column that was named, else the only one of its kind, else the one with the usual name."""
    of_kind = [name for name, feature in data.features.items() if isinstance(feature, kind)]
    name = given or (of_kind[0] if len(of_kind) == 1 else default)
    if name not in data.features:
        columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in data.features.items())
        raise ValueError(f"The data set has no {default} column {name!r}: choose with {flag} among {columns}.")
    return name


class CorruptImageError(ValueError):
    """An image cannot be decoded; the message names the image."""


def decode(value: dict[str, Any] | None, where: str) -> Image.Image:
    """The image of `{"path": ..., "bytes": ...}` in RGB, upright; 16 bits are scaled to 8."""
    try:
        return as_rgb(datasets.Image().decode_example(value))
    except Exception as error:  # decoders raise all kinds of errors for a damaged file
        name = (value or {}).get("path") or "an image without file name"
        raise CorruptImageError(f"Cannot decode {name} ({where}): {error}. See --skip_corrupt_images.") from error


def decode_clip(
    value: list[dict[str, Any]], count: int, rng: np.random.Generator | None, where: str
) -> list[Image.Image]:
    """Images of a list, in RGB: one from each of `count` equal sections, the middle one or a random one."""
    edges = np.linspace(0, len(value), count + 1)
    places = (edges[:-1] + edges[1:]) / 2 if rng is None else rng.uniform(edges[:-1], edges[1:])
    return [decode(value[min(int(place), len(value) - 1)], where) for place in places]


def decode_all(value: Any, where: str) -> None:
    """Decode an image, or every image of a list; raise an error if one cannot be decoded or there is none."""
    if isinstance(value, list) and not value:
        raise CorruptImageError(f"There is no frame ({where}). See --skip_corrupt_images.")
    for image in value if isinstance(value, list) else [value]:
        decode(image, where)


class Verdicts(torch.utils.data.Dataset[str]):
    """The fault of each image, "" if it has none."""

    def __init__(self, data: datasets.Dataset, numbers: range, split: str) -> None:
        self.data, self.numbers, self.split = data, numbers, split

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> str:
        number = self.numbers[index]
        (value,) = self.data[number].values()
        try:
            decode_all(value, f"sample {number} of the {self.split} split")
        except CorruptImageError as error:
            return str(error)
        return ""


class Images(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples as inputs of the model.

    Augmentation is drawn from seed, epoch and sample number: a resumed run, or one with other workers, sees the same
    pixels.
    """

    def __init__(self, data: Any, ids: np.ndarray, split: str, processor: Any, args: argparse.Namespace) -> None:
        self.data, self.ids, self.split, self.processor, self.args = data, ids, split, processor, args
        self.epoch = 0
        self.further = Augmentation(args) if split == "train" else None
        self.prepare = processor
        self.crops = split == "train" and args.train_crop != "none"
        if self.crops:
            self.height, self.width = input_size(processor)
            self.prepare = without_resize(processor)
            self.resample = resampling(processor)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # larger numbers are repetitions of the samples: `BalancedSampler`
        (value,) = self.data[index % len(self)].values()
        label = self.ids[index % len(self)]
        where = f"sample {index % len(self)} of the {self.split} split"
        return self.sample(value, label, where, (self.args.seed, self.epoch, index))

    def sample(self, value: Any, label: Any, where: str, drawn: tuple[int, ...]) -> dict[str, Any]:
        """An image or clip as input of the model, and its label.

        Args:
            value: of the column of images.
            label: a number, or 0 and 1 for each class.
            where: identifies the sample, for messages.
            drawn: numbers that seed the augmentation.
        """
        if self.args.clip_frames:
            places = np.random.default_rng((*drawn, 1)) if self.split == "train" else None
            images = decode_clip(value, self.args.clip_frames, places, where)
        else:
            images = [decode(value, where)]
        # every frame of a clip uses the same draws, so the same crop and flip
        images = [self.augment(image, np.random.default_rng(drawn)) for image in images]
        if self.further is not None:
            images = [self.further.image(image, drawn) for image in images]
        inputs = self.prepare(images=images, return_tensors="pt")
        if self.further is not None and self.further.on_pixels:
            inputs["pixel_values"] = self.further.pixels(inputs["pixel_values"], drawn)
        if not self.args.clip_frames:
            inputs = {name: tensor[0] for name, tensor in inputs.items()}
        return {**inputs, "labels": torch.from_numpy(label) if self.ids.ndim == 2 else int(label)}

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
        return image.resize((self.width, self.height), self.resample, box=(left, top, left + width, top + height))


def input_size(processor: Any) -> tuple[int, int]:
    """Height and width of the image processor's output."""
    pixels = processor(images=Image.new("RGB", (640, 480)), return_tensors="pt")["pixel_values"]
    if pixels.ndim != 4:
        raise ValueError(
            f"{type(processor).__name__} cuts patches itself: needs --train_crop none and no --image_size."
        )
    return pixels.shape[-2], pixels.shape[-1]


def is_timm(processor: Any) -> bool:
    """Whether an image processor is the wrapper of timm's transforms, which has its own arguments."""
    return isinstance(processor, transformers.TimmWrapperImageProcessor)


def without_resize(processor: Any) -> Any:
    """The image processor for images that already have the size of the model's input."""
    if is_timm(processor):
        return type(processor)(processor.data_config | {"crop_pct": 1.0, "crop_mode": "squash"})
    return functools.partial(processor, do_resize=False, do_center_crop=False)


def resampling(processor: Any) -> Image.Resampling:
    """The resampling of an image processor."""
    if is_timm(processor):
        return Image.Resampling.__members__.get(
            processor.data_config["interpolation"].upper(), Image.Resampling.BICUBIC
        )
    return getattr(processor, "resample", None) or Image.Resampling.BICUBIC


def save_processor(processor: Any, model: Any, folder: Path) -> None:
    """Write an image processor beside an adapter, or where `AutoImageProcessor` expects that of a whole model.

    For a whole model, timm's has no own file but is part of the model's `config.json`.
    """
    if isinstance(model, PeftModel) or not is_timm(processor):
        hub.save_processor(processor, folder)
        return
    config = copy.deepcopy(model.config)
    config.pretrained_cfg = {**(getattr(config, "pretrained_cfg", None) or {}), **processor.data_config}
    config.save_pretrained(folder)


def load_processor(args: argparse.Namespace, *, timm_file: str | None = None) -> Any:
    """The checkpoint's image processor, for inputs of `--image_size`.

    Args:
        args: of the recipe.
        timm_file: file of timm's processor, if it has its own, as beside an adapter.
    """
    own = {"pretrained_model_name_or_path": args.model_name_or_path, "revision": args.model_revision}
    other = {"pretrained_model_name_or_path": args.image_processor_name}
    access = {"cache_dir": args.cache_dir, "token": args.token}
    chosen = other if args.image_processor_name else own
    if timm_file is None or args.image_processor_name:
        processor = transformers.AutoImageProcessor.from_pretrained(**chosen, **access)
    else:
        processor = transformers.TimmWrapperImageProcessor.from_pretrained(
            **own, **access, image_processor_filename=timm_file
        )
    if args.image_size is None:
        return processor
    if is_timm(processor):
        size = (processor.data_config["input_size"][0], args.image_size, args.image_size)
        return type(processor)(processor.data_config | {"input_size": size})
    scale = args.image_size / input_size(processor)[1]
    config = processor.to_dict()
    for key in ("size", "crop_size"):  # scaled alike, so that a crop keeps its fraction of the image
        config[key] = config.get(key) and {side: round(length * scale) for side, length in config[key].items()}
    return type(processor).from_dict(config)


def usable_rows(data: datasets.Dataset, split: str, args: argparse.Namespace) -> np.ndarray:
    """Indices of the samples whose image can be decoded; others raise an error unless they may be skipped.

    Every run checks the files, because they may have changed, and each process checks a part of them.
    """
    if not (args.check_images or args.skip_corrupt_images):
        return np.arange(len(data))
    state = PartialState()
    numbers = range(state.process_index, len(data), state.num_processes)
    loader = torch.utils.data.DataLoader(
        Verdicts(data, numbers, split), batch_size=None, num_workers=args.dataloader_num_workers,
        generator=torch.Generator(),  # its draws must not change those of the model
    )  # fmt: skip
    bar = tqdm(loader, desc=f"Check {split}", leave=False, disable=not Screen.bars)
    found = gather_object([(number, fault) for number, fault in zip(numbers, bar, strict=True) if fault])
    faults = dict(sorted(found))
    if faults and not args.skip_corrupt_images:
        first, fault = next(iter(faults.items()))
        (value,) = data[first].values()
        decode_all(value, f"sample {first} of the {split} split, {len(faults)} such images in all")
        raise CorruptImageError(fault)  # the file has changed since
    if faults:
        tell(f"{split}: {len(faults)} left out. {' '.join(list(faults.values())[:5])}")
    return np.setdiff1d(np.arange(len(data)), list(faults))


def columns_of(data: datasets.Dataset, args: argparse.Namespace) -> tuple[str, list[str]]:
    """The column of the images and those of the labels."""
    kind = datasets.List if args.clip_frames else datasets.Image
    image = find_column(data, "--image_column_name", args.image_column_name, kind, "image")
    if args.clip_frames and not isinstance(getattr(data.features[image], "feature", None), datasets.Image):
        raise ValueError(f"--clip_frames: the column {image!r} must hold lists of images.")
    return image, find_label_columns(data, args.label_column_name)


def columns_of_all(splits: Mapping[str, Any], args: argparse.Namespace) -> dict[str, tuple[str, list[str]]]:
    """The columns of each split: those of train, or its own if it is from another source."""
    columns = {"train": columns_of(splits["train"], args)}
    image, labels = columns["train"]
    for split, data in splits.items():
        if {image, *labels} <= set(data.features):
            columns[split] = columns["train"]
            continue
        try:
            usual = {"image_column_name": None, "label_column_name": None}
            columns[split] = columns_of(data, argparse.Namespace(**vars(args) | usual))
        except ValueError:
            missing = ", ".join({image, *labels} - set(data.features))
            raise ValueError(
                f"The {split} split lacks the column {missing}: it has {', '.join(data.features)}. --{split}_split "
                "none leaves it out."
            ) from None
    return columns


def encode_all(named: Mapping[str, tuple[Any, list[str] | None]]) -> tuple[list[str], dict[str, np.ndarray]]:
    """The names of the classes, and the result of `class_ids` for each split.

    Args:
        named: the result of `read_labels` for each split.
    """
    names = class_names(*named["train"])
    several = any(isinstance(row, list) for row in named["train"][0])
    ids = {split: class_ids(rows, split, names, several) for split, (rows, _) in named.items()}
    if len(names) < 2 - several:
        raise ValueError(f"The train split has one class, {some(names)}; classification needs at least two.")
    if bare := [split for split, split_ids in ids.items() if several and not split_ids.any()]:
        raise ValueError(f"No sample of the {bare[0]} split has any class.")
    return names, ids


def prepare_data(
    args: argparse.Namespace, processor: Any, splits: Mapping[str, datasets.Dataset]
) -> tuple[dict[str, Images], list[str], int]:
    """The samples of each split, the names of the classes, and how many corrupt images were left out.

    Args:
        args: of the recipe.
        processor: image processor of the model.
        splits: the result of `load_splits`; every process calls this at the same time.
    """
    splits = dict(splits)
    encoded = datasets.Image(decode=False)
    plain = datasets.List(encoded) if args.clip_frames else encoded
    columns = columns_of_all(splits, args)
    names, ids = encode_all({split: read_labels(data, columns[split][1]) for split, data in splits.items()})
    rows = {split: np.arange(len(data)) for split, data in splits.items()}
    share = (0.15 if args.select == "best" else 0) if args.train_val_split is None else args.train_val_split
    if "validation" not in splits and share:
        splits["validation"], ids["validation"] = splits["train"], ids["train"]
        columns["validation"] = columns["train"]
        rows["train"], rows["validation"] = hold_out(ids["train"], share, args.seed)
    if "validation" not in splits and args.select == "best":
        raise ValueError("--select best needs a validation split, or --train_val_split above 0.")
    found, skipped = {}, 0
    for split, data in splits.items():
        kept = rows[split]
        if limit := args.max_train_samples if split == "train" else args.max_eval_samples:
            kept = np.random.default_rng(args.seed).permutation(kept)[:limit]
        column = columns[split][0]
        images = data.select_columns([column]).cast_column(column, plain).select(kept)
        good = usable_rows(images, split, args)
        skipped += len(images) - len(good)
        if len(good) == 0:
            raise ValueError(f"The {split} split has no image that can be used.")
        if ids[split].ndim == 2 and not ids[split][kept[good]].any():  # metrics need one
            raise ValueError(f"No sample of the {split} split has any class.")
        found[split] = Images(images.select(good), ids[split][kept[good]], split, processor, args)
    tell(class_table({split: images.ids for split, images in found.items()}, names))
    return found, names, skipped
