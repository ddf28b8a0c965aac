"""Folders and zip files with one folder of images per class.

The folders of the first level are the classes; images in folders below belong to them. An ambiguous layout is an error
that names the folders, and skipped files are counted.
"""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import datasets
from accelerate import PartialState
from PIL import Image


SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_NAMES = {name for names in SPLIT_FOLDERS.values() for name in names}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
IGNORED = ("__MACOSX", "__pycache__")  # beside all names that begin with a dot
STUBS = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")  # Pillow recognises these files but cannot read their pixels


@dataclass
class Listing:
    """The files below a folder, their paths relative to it and in alphabetical order."""

    images: list[PurePosixPath] = field(default_factory=list)
    metadata: list[PurePosixPath] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)  # the folders of the first level
    left_out: Counter[str] = field(default_factory=Counter)  # files by suffix

    def add(self, path: PurePosixPath, suffixes: frozenset[str]) -> None:
        """Sort a file by its suffix."""
        if path.suffix.lower() in suffixes:
            self.images.append(path)
        elif path.name in METADATA:
            self.metadata.append(path)
        else:
            self.left_out[path.suffix.lower() or "without suffix"] += 1


def image_suffixes() -> frozenset[str]:
    """The suffixes of the files that this Pillow reads, plugins included."""
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in known if kind in Image.OPEN and kind not in STUBS)


def hidden(name: str) -> bool:
    return name.startswith(".") or name in IGNORED


def list_folder(root: Path) -> Listing:
    """The files below a folder. Links to files and folders are followed."""
    listing, suffixes = Listing(), image_suffixes()

    def visit(folder: Path, above: PurePosixPath, parents: tuple[str, ...]) -> None:
        real = os.path.realpath(folder)
        if real in parents:
            raise ValueError(f"{folder} is a link to a folder that contains it: remove the link.")
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if hidden(entry.name):
                continue
            if entry.is_dir():
                if not above.parts:
                    listing.classes.append(entry.name)
                visit(Path(entry.path), above / entry.name, (*parents, real))
            elif entry.is_file():
                listing.add(above / entry.name, suffixes)
            else:
                listing.left_out["broken links"] += 1

    visit(root, PurePosixPath(), ())
    return listing


def list_zip(file: Path) -> tuple[Listing, PurePosixPath]:
    """The files in a zip file, and the one folder in it, if any, that holds all class folders."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = sorted(info.filename for info in archive.infolist() if not info.is_dir())
    except zipfile.BadZipFile as error:
        raise ValueError(f"{file} is not a readable zip file: {error}.") from error
    paths = [path for path in map(PurePosixPath, names) if not any(map(hidden, path.parts))]
    outer = {path.parts[0] for path in paths}
    # many programs also put the packed folder itself into the file
    packed = len(outer) == 1 and all(len(path.parts) > 2 or path.name in METADATA for path in paths)
    top = PurePosixPath(*outer) if packed else PurePosixPath()
    listing, suffixes = Listing(), image_suffixes()
    for path in paths:
        listing.add(path.relative_to(top), suffixes)
    inside = [path.relative_to(top) for path in paths]
    listing.classes = sorted({path.parts[0] for path in inside if len(path.parts) > 1})
    return listing, top


def some(names: list[str], most: int = 5) -> str:
    """Names for a message: all of a few, the first of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_layout(listing: Listing, source: str) -> None:
    """Raise an error for folders that are ambiguous or have no classes."""
    images = listing.images
    if not images:
        rest = f"; left out: {told(listing.left_out)}" if listing.left_out else ""
        raise ValueError(f"{source} has no image{rest}. Images of each class belong in a folder of its name.")
    stray = [path.name for path in images if len(path.parts) == 1]
    if stray and not listing.classes:
        raise ValueError(
            f"{source} has images ({some(stray)}) and no class folders: there is no label column. Put the images of "
            "each class into a folder of its name, or write metadata.csv there with the columns file_name and label."
        )
    if stray:
        raise ValueError(
            f"{source} has images beside the class folders ({some(stray)}): move them into the folder of their class, "
            "or out of there."
        )
    nested = [path for path in images if len(path.parts) > 2]
    splits = sorted({path.parts[0] for path in nested if path.parts[0].lower() in SPLIT_NAMES})
    if splits:
        raise ValueError(
            f"{source} holds folders of splits ({some(splits)}), which would become classes: give each by its own "
            f"flag, as --train_dir and --test_dir, or all as --dataset_name."
        )
    inner = sorted(
        {str(PurePosixPath(*path.parts[:place + 1])) for path in nested for place in range(1, len(path.parts) - 1)
         if path.parts[place].lower() in SPLIT_NAMES}
    )  # fmt: skip
    if inner:
        raise ValueError(
            f"{source} has splits within classes ({some(inner)}): put them above, as train/cat and test/cat, and give "
            "each by its own flag."
        )
    classes = {path.parts[0] for path in images}
    inner = sorted(
        {str(PurePosixPath(*path.parts[:-1])) for path in nested if {*path.parts[1:-1]} & (classes - {path.parts[0]})}
    )
    if inner:
        raise ValueError(
            f"{source} has folders of the same name as classes and as parts of other classes ({some(inner)}): the "
            "folders of the first level are the classes; rename or move the others."
        )


def told(left_out: Counter[str]) -> str:
    """Skipped files, for a message: `2 .heic, 1 without suffix`."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))


def tell(text: str) -> None:
    PartialState().print(text)


def class_folders(listing: Listing, source: str, locate: Callable[[PurePosixPath], str]) -> datasets.Dataset:
    """Images and labels of class folders.

    Args:
        listing: the files.
        source: flag and value, for messages.
        locate: where `datasets` finds a file.
    """
    check_layout(listing, source)
    names = sorted({path.parts[0] for path in listing.images})
    if empty := sorted({*listing.classes} - {*names}):
        them = "it is not a class" if len(empty) == 1 else "they are not classes"
        tell(f"{source}: no image in {some(empty)}, so {them}.")
    if listing.left_out:
        tell(f"{source}: skipped files that are not images that Pillow reads: {told(listing.left_out)}.")
    place = {name: number for number, name in enumerate(names)}
    return datasets.Dataset.from_dict(
        {
            "image": [locate(path) for path in listing.images],
            "label": [place[path.parts[0]] for path in listing.images],
        },
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}),
    )


def read_zip(file: Path, source: str) -> datasets.Dataset:
    """Images and labels of a zip file of class folders; nothing is unpacked on disk."""
    listing, top = list_zip(file)
    if listing.metadata:
        raise ValueError(f"{source} holds {listing.metadata[0]}: unpack the file and give the folder.")
    data = class_folders(listing, source, lambda path: f"zip://{top / path}::{file.resolve()}")
    # the data set's fingerprint, and so a cache of features, must change when the file changes
    stat = file.stat()
    return data.add_column("archive", [f"{stat.st_size} {stat.st_mtime_ns}"] * len(data))


def split_folders(root: Path, tables: frozenset[str], source: str) -> dict[str, Path]:
    """The folders of splits in a folder, or the folder itself as train if it holds class folders.

    Args:
        root: the folder.
        tables: suffixes of data files.
        source: flag and value, for messages.

    Returns:
        Nothing if `datasets` should read the folder: it holds data files, or a card that describes them.
    """
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and not hidden(folder.name)]
    if [folder.name for folder in folders] == ["data"]:
        return split_folders(root / "data", tables, source)
    files = [path for folder in (root, *folders) for path in folder.iterdir() if path.is_file()]
    card = root / "README.md"
    if any({*path.suffixes} & tables and path.name not in METADATA for path in files) or (
        card.exists() and card.read_text(encoding="utf-8", errors="replace").startswith("---")
    ):
        return {}
    found: dict[str, Path] = {}
    for split, names in SPLIT_FOLDERS.items():
        these = [folder for folder in folders if folder.name.lower() in names]
        if len(these) > 1:
            raise ValueError(
                f"{source} has several folders for {split}: {', '.join(folder.name for folder in these)}."
            )
        found |= dict.fromkeys([split] * len(these), *these)
    if found and any((root / name).exists() for name in METADATA):
        return {}
    others = [folder.name for folder in folders if folder not in found.values()]
    if found and others:
        tell(f"{source}: no split reads {some(others)}.")
    return found or {"train": root}
