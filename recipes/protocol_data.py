"""The images of a protocol's tasks: lists of files, class folders, tables, or data sets of the Hub."""

from __future__ import annotations

import argparse
import csv
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from fingerprints import fingerprint
from image_data import columns_of
from image_folders import some
from image_sources import cut, named_sources
from labels import class_ids, read_labels
from protocol import SOURCES, Protocol

from hf_visual_peft.sharing.files import write_aside


class Part:
    """Some images of a task, each with a class.

    Args:
        data: two columns: `image`, not decoded, and `label`, the names of the classes.
        listed: whether all images are files of this machine.
    """

    def __init__(self, data: datasets.Dataset, listed: bool) -> None:
        self.data, self.listed = data, listed
        self.labels: list[str] = data["label"][:]

    @property
    def classes(self) -> list[str]:
        """Those that occur, in order."""
        return sorted(set(self.labels))

    def drawn(self, shots: int, seed: int) -> Part:
        """So many images of each class; all where there are fewer."""
        return Part(self.data.select(drawn(self.labels, shots, seed)), self.listed)

    def write(self, folder: Path, name: str) -> Path:
        """Write a table for the recipe: paths of files as CSV, other images as parquet with their content."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.{'csv' if self.listed else 'parquet'}"
        if self.listed:
            paths = [image["path"] for image in self.data["image"][:]]
            write_aside(path, as_table(list(zip(paths, self.labels, strict=True))))
        else:
            new = path.with_suffix(".new")
            self.data.to_parquet(new)
            new.replace(path)
        return path

    def fingerprint(self) -> str:
        """Of the images and their classes."""
        names = self.classes
        return fingerprint(self.data.select_columns(["image"]), class_ids(self.labels, "", names, False), names)


class Tasks:
    """The images of tasks, each read once.

    Args:
        protocol: which says where they are.
        folder: of the data; None if all are on the Hub.
        access: `cache_dir`, `token` and `data_token`, as flags of the recipe.
    """

    def __init__(self, protocol: Protocol, folder: Path | None, access: argparse.Namespace) -> None:
        self.protocol, self.folder, self.access = protocol, folder, access
        self.part = functools.cache(self._part)
        self._read = functools.cache(self._read_anew)
        self._splits = functools.cache(self._find_splits)

    def check(self, tasks: Sequence[str], tuned: bool) -> None:
        """Check all tasks before anything is computed.

        Raises:
            ValueError: some are missing, malformed or have another number of classes; the message names all.
        """
        wrong = [told for task in tasks if (told := self._wrong(task, self.protocol.parts(tuned)))]
        if wrong:
            where = f"--data_dir {self.folder}: " if self.folder else ""
            raise ValueError(f"{where}{'; '.join(wrong)}.")

    def _wrong(self, task: str, parts: Sequence[str]) -> str:
        """What is wrong with a task; "" if nothing is."""
        if absent := self._absent(task, parts):
            return f"{task} {absent}"
        wanted, sourced = self.protocol.tasks[task]["classes"], self._sourced(task)
        try:
            found = {part: set(self.part(task, part).classes) for part in parts}
            known = self._read(task, "train")[2] if sourced else [f"{label:04d}" for label in range(wanted)]
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            return f"{task}: {' '.join(str(error).split()).rstrip('.')}"
        seen = found["train"]
        where = f"the split {self.protocol.splits['train']}" if sourced else self.protocol.lists["train"]
        empty = sorted(set(known) - seen) if len(known) == wanted else []
        if not sourced and (beyond := sorted(seen - set(known))):
            return f"{task} has images of {_some(beyond)} in {where} and should have {wanted} classes, numbered from 0"
        if empty and self.protocol.shots != (None,):
            return f"{task}: no image of {_some(empty)} can be drawn from {where}"
        if len(seen) != wanted:
            return f"{task} has {len(seen)} classes in {where} and should have {wanted}"
        if foreign := sorted(set().union(*found.values()) - seen):
            return f"{task} has images of {_some(foreign)}, which are not classes of training"
        return ""

    def _absent(self, task: str, parts: Sequence[str]) -> str:
        """What a task lacks on this machine."""
        about = self.protocol.tasks[task]
        if "hub" in about:
            here = Path(about["hub"]).exists()
            return f"is the folder {about['hub']} here: name it by folder, below --data_dir" if here else ""
        if self.folder is None:
            return "is on this machine: give --data_dir, which holds its folder"
        if "folder" in about:
            return "" if (self.folder / about["folder"]).is_dir() else f"lacks its folder {about['folder']}"
        names = [self.protocol.lists[part] for part in parts]
        return f"lacks {', '.join(absent)}" if (absent := self._not_there(task, names)) else ""

    def _not_there(self, task: str, names: Sequence[str]) -> list[str]:
        return [name for name in names if not (Path(str(self.folder)) / task / name).is_file()]

    def _sourced(self, task: str) -> bool:
        return bool(set(SOURCES) & set(self.protocol.tasks[task]))

    def _find_splits(self, task: str) -> tuple[dict[str, Any], argparse.Namespace]:
        """The splits of a task that has a source, and its columns as flags of the recipe."""
        about = self.protocol.tasks[task]
        given = {
            "dataset_name": about.get("hub") or str(Path(str(self.folder)) / about["folder"]),
            "dataset_config_name": about.get("config"),
            "image_column_name": about.get("image"),
            "label_column_name": [about["label"]] if "label" in about else None,
            "streaming": False,
            "clip_frames": None,
        }
        arguments = argparse.Namespace(**{**vars(self.access), **given})
        return {split: functools.cache(load) for split, load in named_sources(arguments).items()}, arguments

    def _read_anew(self, task: str, part: str) -> tuple[datasets.Dataset, list[str], list[str]]:
        """Images, the class of each, and all classes that its description names, of a task that has a source."""
        sources, arguments = self._splits(task)
        spec = self.protocol.splits[part]
        data, _ = cut(sources, spec, f"splits.{part} {spec}")
        image, labels = columns_of(data, arguments)
        rows, declared = read_labels(data, labels)
        if any(isinstance(row, list) for row in rows):
            raise ValueError(f"its images have several classes each ({labels[0]}); a protocol takes one")
        if missing := rows.count(None):
            raise ValueError(f"{missing} images of {spec} have no class")
        images = data.select_columns([image]).rename_columns({image: "image"})
        return images.cast_column("image", datasets.Image(decode=False)), rows, declared or []

    def _part(self, task: str, part: str) -> Part:
        if self._sourced(task):
            images, labels, _ = self._read(task, part)
            return Part(images.add_column("label", labels), listed=False)
        rows = read_list(Path(str(self.folder)) / task, self.protocol.lists[part])
        features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
        images = [{"path": path, "bytes": None} for path, _ in rows]
        labels = [f"{label:04d}" for _, label in rows]  # these sort as the numbers
        return Part(datasets.Dataset.from_dict({"image": images, "label": labels}, features=features), listed=True)


def _some(labels: Sequence[str]) -> str:
    """Classes as lists write them."""
    return some([str(int(label)) if label.isdecimal() else label for label in labels])


def read_list(folder: Path, name: str) -> list[tuple[str, int]]:
    """The lines of a list: path below the folder of the task, and class.

    Raises:
        ValueError: it is malformed, or names images that are not there.
    """
    rows, wrong = [], []
    for number, line in enumerate((folder / name).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdecimal():
            raise ValueError(f"{folder / name}, line {number}: {line[:80]!r} is not 'path class'.")
        # lists of the community name paths below the task's folder, or below its folder `images`
        place = next((p for p in (folder / path, folder / "images" / path) if p.is_file()), None)
        if place is None:
            wrong.append(path)
        else:
            rows.append((str(place.resolve()), int(label)))
    if wrong:
        raise ValueError(f"{folder / name} names {len(wrong)} images that are not there: {some(wrong)}.")
    if not rows:
        raise ValueError(f"{folder / name} is empty.")
    return rows


def drawn(labels: Sequence[str], shots: int, seed: int) -> list[int]:
    """The indices of so many images of each class; of all where there are fewer."""
    generator = np.random.default_rng(seed)
    by_class: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    return [
        members[index]
        for _, members in sorted(by_class.items())
        for index in sorted(generator.permutation(len(members))[:shots])
    ]


def as_table(rows: Sequence[tuple[str, str]]) -> str:
    """Paths of images and their classes, as the recipe reads them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "label"])
    writer.writerows(rows)
    return text.getvalue()
