"""The images to predict: those of one source or of several, or a labelled split of the usual flags."""

from __future__ import annotations

import argparse
import glob
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator
from image_data import find_column, usable_rows
from image_folders import image_suffixes, list_folder, some, tell, told
from image_sources import SAVED, cut, load_splits, named_sources, read_file, read_folder
from labels import find_label_columns, read_labels
from PIL import Image, UnidentifiedImageError


@dataclass
class Samples:
    """The samples to predict.

    Attributes:
        data: one column of images, not yet decoded.
        rows: their numbers in the source.
        files: names of the files, None without files.
        labels: class of each, or list of classes; None for a sample without label.
    """

    data: datasets.Dataset
    rows: np.ndarray
    files: list[str | None]
    labels: list[Any]


def read_samples(accelerator: Accelerator, args: argparse.Namespace, names: list[str], several: bool) -> Samples:
    """The images and their known classes; every process calls this at the same time.

    Args:
        accelerator: of the run.
        args: of the recipe.
        names: the classes of the model.
        several: whether an image may have several of them.
    """
    with accelerator.main_process_first():  # the others then read its cache
        root, data = _read_evaluated(args) if args.eval_only else _read_source(args)
    flag = "--eval_only" if args.eval_only else f"--do_predict {some(args.do_predict)}"
    kind = datasets.List if args.clip_frames else datasets.Image
    image = find_column(data, "--image_column_name", args.image_column_name, kind, "image")
    usual = {name for name in ("label", "labels", "cls") if name in data.column_names}
    if args.label_column_name or usual or args.eval_only:
        labels, _ = read_labels(data, find_label_columns(data, args.label_column_name))
    else:
        labels = [None] * len(data)
    labels = _known(labels, names, several, flag, required=args.eval_only)
    encoded = datasets.Image(decode=False)
    images = data.select_columns([image]).cast_column(image, datasets.List(encoded) if args.clip_frames else encoded)
    rows = np.arange(len(data))
    if args.max_eval_samples:
        rows = np.sort(np.random.default_rng(args.seed).permutation(rows)[: args.max_eval_samples])
    rows = rows[usable_rows(images.select(rows), "test", args)]
    if not len(rows):
        raise ValueError(f"{flag} has no image that can be used.")
    images = images.select(rows)
    files = [None if isinstance(value, list) else _name_of(value, root) for value in images[image][:]]
    if lists_images(args.do_predict):
        files = [value["path"] for value in images[image][:]]  # as they were given
    return Samples(images, rows, files, [labels[row] for row in rows])


def _read_evaluated(args: argparse.Namespace) -> tuple[Path | None, datasets.Dataset]:
    """The test split, or else validation, and its folder."""
    splits = load_splits(argparse.Namespace(**vars(args) | {"train_split": "none"}))
    for split in ("test", "validation"):
        if split in splits:
            folder = getattr(args, f"{split}_dir") or args.dataset_name
            tell(f"Evaluation on {len(splits[split])} samples of {split}.")
            return Path(folder) if folder else None, splits[split]
    raise ValueError(
        "--eval_only: there is no test split and no validation split. Name one by --test_dir, --test_file or "
        "--dataset_name, with --test_split if it has another name."
    )


def _read_source(args: argparse.Namespace) -> tuple[Path | None, datasets.Dataset]:
    """The images that `--do_predict` names, and the folder that their names are relative to."""
    if lists_images(args.do_predict):
        return None, _images_of(*_listed(args.do_predict))
    (source,) = args.do_predict
    flag = f"--do_predict {source}"
    path, suffixes = Path(source), image_suffixes()
    if path.is_file() and path.suffix.lower() in suffixes:
        return path.parent, _images_of([path], [None])
    if path.is_file():
        return path.parent, read_file(source, flag, args)
    if path.is_dir() and not any((path / name).exists() for name in SAVED):
        listing = list_folder(path)
        if listing.metadata:
            return path, read_folder(path, flag, args)
        if listing.images:
            if listing.left_out:
                tell(f"{flag}: skipped files: {told(listing.left_out)}.")
            labels = [image.parts[0] if len(image.parts) > 1 else None for image in listing.images]
            return path, _images_of([path.resolve() / image for image in listing.images], labels)
    try:
        sources = named_sources(argparse.Namespace(**vars(args) | {"dataset_name": source}))
    except (ConnectionError, FileNotFoundError) as error:
        if path.exists():
            raise
        raise ValueError(
            f"{flag}: there is no such file or folder here, and no such data set can be read from the Hub ({error})."
        ) from error
    split = args.test_split or ("test" if "test" in sources else next(iter(sources)) if len(sources) == 1 else None)
    if split is None:
        raise ValueError(f"{flag} has the splits {', '.join(sources)}: choose one with --test_split.")
    return path if path.is_dir() else None, cut(sources, split, f"--test_split {split}")[0]


def lists_images(sources: list[str] | None) -> bool:
    """Whether sources are a list of images, and not one folder, file or data set."""
    if not sources:
        return False
    first, *others = sources
    return bool(others) or first == "-" or (glob.has_magic(first) and not os.path.exists(first))


def _listed(sources: list[str]) -> tuple[list[Path | bytes], list[str | None]]:
    """The images of several sources and their labels, which are class folders below a folder."""
    files: list[Path | bytes] = []
    labels: list[str | None] = []
    suffixes = image_suffixes()
    waiting = list(sources)
    while waiting:
        source = waiting.pop(0)
        path, flag = Path(source), f"--do_predict {source}"
        if source == "-":
            found = _standard_input()
            if isinstance(found, bytes):
                files, labels = [*files, found], [*labels, None]
            else:
                waiting = [*found, *waiting]
        elif path.is_dir():
            listing = list_folder(path)
            if not listing.images:
                raise ValueError(f"{flag}: the folder has no image.")
            if listing.left_out:
                tell(f"{flag}: skipped files: {told(listing.left_out)}.")
            files += [path / image for image in listing.images]
            labels += [image.parts[0] if len(image.parts) > 1 else None for image in listing.images]
        elif path.is_file():
            if path.suffix.lower() not in suffixes:
                raise ValueError(f"{flag} is not an image file; a table of images is given alone.")
            files, labels = [*files, path], [*labels, None]
        elif glob.has_magic(source):
            found = sorted(glob.glob(source, recursive=True))
            if not found:
                raise ValueError(f"{flag}: no file has such a name.")
            matched = [name for name in found if os.path.isfile(name)]
            good = [name for name in matched if Path(name).suffix.lower() in suffixes]
            if left := len(matched) - len(good):
                tell(f"{flag}: skipped {left} files that are not images.")
            waiting = [*(good if matched else found), *waiting]  # `**` gives folders beside the files in them
        else:
            raise ValueError(f"{flag}: there is no such file or folder; a data set of the Hub is given alone.")
    if not files:
        raise ValueError(f"--do_predict {some(sources)} names no image.")
    return files, labels


def _standard_input() -> bytes | list[str]:
    """An image, or the names of files, one a line."""
    content = sys.stdin.buffer.read()
    try:
        with Image.open(io.BytesIO(content)):
            return content
    except UnidentifiedImageError:
        pass
    try:
        names = [line for line in content.decode().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--do_predict -: standard input is neither an image nor names of files ({error}).") from None
    if "-" in names or not names:
        raise ValueError("--do_predict -: standard input has no names of files, or names itself.")
    return names


def _images_of(files: Sequence[Path | bytes], labels: list[str | None]) -> datasets.Dataset:
    whole = {"path": "standard input"}
    rows = [{**whole, "bytes": f} if isinstance(f, bytes) else {"path": str(f), "bytes": None} for f in files]
    columns: dict[str, Any] = {"image": rows}
    features = datasets.Features({"image": datasets.Image()})
    if any(label is not None for label in labels):
        columns["label"] = labels
        features["label"] = datasets.Value("string")
    return datasets.Dataset.from_dict(columns, features=features)


def _known(labels: list[Any], classes: list[str], several: bool, flag: str, required: bool) -> list[Any]:
    """The labels that are classes of the model; others are an error if labels are required, else None."""
    names = set(classes)
    kind = list if several else str
    good = [isinstance(row, kind) and ({*row} if several else {row}) <= names for row in labels]
    bad = [number for number, fine in enumerate(good) if not fine]
    if bad and required:
        row = labels[bad[0]]
        what = "no label" if row is None else f"the label {row!r}"
        raise ValueError(
            f"{flag}: sample {bad[0]} has {what}, {len(bad)} such samples in all. The classes of the model are "
            f"{some(classes, 20)}; an image has {'a list' if several else 'one'} of them."
        )
    others = sorted({str(labels[number]) for number in bad if labels[number] is not None})
    if others:
        tell(f"{len(bad)} samples count as unlabelled: {some(others)} is not a class of the model.")
    return [row if fine else None for row, fine in zip(labels, good, strict=True)]


def _name_of(value: dict[str, Any] | None, root: Path | None) -> str | None:
    """The file of an image, relative to the given folder; its name if it is elsewhere."""
    path = ((value or {}).get("path") or "").partition("::")[0].removeprefix("zip://")
    if not path:
        return None
    if not os.path.isabs(path):
        return path
    inside = root is not None and Path(path).is_relative_to(root.resolve())
    return str(Path(path).relative_to(root.resolve())) if inside and root is not None else Path(path).name
