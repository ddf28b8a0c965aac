"""The sources of the recipes' images: the Hub, folders, zip files and tables, one for all splits or one for each."""

from __future__ import annotations

import argparse
import functools
import glob
import re
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
from image_folders import class_folders, list_folder, read_zip, some, split_folders, tell, told


SAVED = ("dataset_dict.json", "state.json")  # files that `save_to_disk` writes
SPLITS = ("train", "validation", "test")
FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".zip": "class folders",
}
Source = Callable[[], datasets.Dataset]


def load_splits(args: argparse.Namespace) -> dict[str, datasets.Dataset]:
    """The existing splits among train, validation and test, as the flags choose them."""
    sources = named_sources(args) if args.dataset_name else {}
    given = {}
    for split in SPLITS:
        folder, file = getattr(args, f"{split}_dir"), getattr(args, f"{split}_file")
        if folder and file:
            raise ValueError(f"--{split}_dir {folder} and --{split}_file {file}: give only one for {split}.")
        if folder or file:
            given[split] = f"--{split}_dir {folder}" if folder else f"--{split}_file {file}"
            sources[split] = (
                functools.partial(read_folder, Path(folder), given[split], args)
                if folder
                else functools.partial(read_file, file, given[split], args)
            )
    loaded = {name: functools.cache(source) for name, source in sources.items()}
    chosen, taken = {}, {}
    for split in SPLITS:
        spec = getattr(args, f"{split}_split")
        if spec == "none" or (spec is None and split != "train" and split not in loaded):
            continue
        chosen[split], taken[split] = cut(loaded, spec or split, f"--{split}_split {spec or split}")
    used = {name for pieces in taken.values() for name, _, _ in pieces}
    for split, flag in given.items():
        if split not in used and getattr(args, f"{split}_split") != "none":
            raise ValueError(f"No split reads {flag}: remove it or --{split}_split.")
    for split in set(taken) - {"train"}:
        shared = sum(
            max(0, min(end, other_end) - max(start, other_start))
            for name, start, end in taken[split]
            for other, other_start, other_end in taken.get("train", ())
            if name == other
        )
        if shared:
            many = str(shared) if isinstance(chosen[split], datasets.Dataset) else "all"
            tell(f"Samples of {split} that are also in train, because of --{split}_split and --train_split: {many}.")
    return chosen


def named_sources(args: argparse.Namespace) -> dict[str, Source]:
    """The splits of `--dataset_name`."""
    name, flag = args.dataset_name, f"--dataset_name {args.dataset_name}"
    folder = Path(name)
    if any((folder / file).exists() for file in SAVED):
        whole = datasets.load_from_disk(name)
    elif folder.is_file():
        raise ValueError(f"{flag} is a file: give it by --train_file.")
    elif not folder.exists() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise ValueError(f"{flag}: there is no such folder.")
    else:
        local = folder.is_dir() and not args.dataset_config_name
        if local and (found := split_folders(folder, frozenset(FORMATS), flag)):
            read = {
                split: functools.partial(read_folder, path, f"{flag}, {path.name}") for split, path in found.items()
            }
            return {split: functools.partial(source, args) for split, source in read.items()}
        token = args.data_token or args.token
        where = {"cache_dir": args.cache_dir, "token": token, "streaming": args.streaming}
        whole = datasets.load_dataset(name, args.dataset_config_name, **where)
    whole = whole if isinstance(whole, dict) else {"train": whole}
    return {split: functools.partial(whole.__getitem__, split) for split in whole}


def cut(loaded: Mapping[str, Source], spec: str, flag: str) -> tuple[datasets.Dataset, list[tuple[str, int, int]]]:
    """A split or a slice of it, such as `train[:80%]`, and its parts: splits, first and last sample numbers."""
    if spec in loaded:
        data = loaded[spec]()
        return data, [(spec, 0, len(data) if isinstance(data, datasets.Dataset) else 1)]
    names = [re.sub(r"\[.*", "", part) for part in spec.split("+")]
    if unknown := set(names) - set(loaded):
        names_known = ", ".join(loaded) or "none"
        raise ValueError(f"{flag}: the data set has the splits {names_known}. There is no {' or '.join(unknown)}.")
    if not all(isinstance(loaded[name](), datasets.Dataset) for name in names):
        raise ValueError(f"{flag}: --streaming takes whole splits of tables and of the Hub; name one, such as train.")
    try:
        lengths = {name: len(loaded[name]()) for name in names}
        pieces = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"{flag}: write a slice as train[:800], train[10%:50%] or train[:8]+test[:8]: {error}"
        ) from None
    taken = [(piece.splitname, piece.from_, piece.to) for piece in pieces]
    parts = [loaded[name]().select(range(start, end)) for name, start, end in taken if end > start]
    if not parts:
        raise ValueError(
            f"{flag} takes no sample of {', '.join(f'{name} ({size})' for name, size in lengths.items())}."
        )
    return datasets.concatenate_datasets(parts), taken


def read_folder(folder: Path, flag: str, args: argparse.Namespace) -> datasets.Dataset:
    """Class folders, or images with the table `metadata.csv` beside them."""
    if folder.suffix.lower() == ".zip" and folder.is_file():
        return read_zip(folder, flag)
    if not folder.is_dir():
        raise ValueError(
            f"{flag}: {'this is a file: give it by --train_file' if folder.exists() else 'there is no such folder'}."
        )
    listing = list_folder(folder)
    if not listing.metadata:
        if not listing.images and set(FORMATS) & set(listing.left_out):
            raise ValueError(f"{flag} has no images, but files for --train_file: {told(listing.left_out)}.")
        return class_folders(listing, flag, lambda path: str(folder.resolve() / path))
    tables, args = [], argparse.Namespace(**vars(args) | {"streaming": False})
    for path in listing.metadata:
        table = read_table(str(folder / path), f"{flag}, {path}", args, ("file_name", "file_names"))
        for column in set(table.column_names) & {"file_name", "file_names"}:
            table = table.rename_column(column, column.replace("file_name", "image"))
        tables.append(table)
    data = datasets.concatenate_datasets(tables)
    label = (args.label_column_name or ["label"])[0]
    if label not in data.column_names and listing.classes:
        raise ValueError(
            f"{flag}: {listing.metadata[0]} is read instead of the names of folders ({some(listing.classes)}). It has "
            f"no column {label!r} but {', '.join(data.column_names)}: name its labels by --label_column_name, or move "
            "it away so that the folders are classes."
        )
    if len(listing.images) > len(data):
        tell(f"{flag}: there are {len(listing.images)} images, but {listing.metadata[0]} names {len(data)}.")
    return data


def read_file(file: str, flag: str, args: argparse.Namespace) -> datasets.Dataset:
    """A table of images and labels, tar files for WebDataset, or a zip file of class folders."""
    if Path(file).is_dir():
        raise ValueError(f"{flag} is a folder: give it by {flag.split()[0].replace('_file', '_dir')}.")
    if Path(file).suffix.lower() == ".zip":
        if not Path(file).exists():
            raise ValueError(f"{flag}: there is no such file.")
        return read_zip(Path(file), flag)
    return read_table(file, flag, args, (args.image_column_name or "image",))


def read_table(file: str, flag: str, args: argparse.Namespace, paths: tuple[str, ...]) -> datasets.Dataset:
    """A table. Relative paths of images in its columns `paths` are taken from the folder of the table."""
    kind = FORMATS.get(Path(file).suffix.lower())
    if kind is None:
        raise ValueError(
            f"{flag}: the suffix {Path(file).suffix or '(none)'!r} does not identify the format; valid are "
            f"{', '.join(FORMATS)}."
        )
    files: Any = file
    if "://" not in file:
        found = [file] if Path(file).is_file() else sorted(glob.glob(file, recursive=True))
        if not found:
            raise ValueError(f"{flag}: there is no such file.")
        if len({Path(path).parent for path in found}) > 1:  # the paths in each are relative to its folder
            return datasets.concatenate_datasets([read_table(path, flag, args, paths) for path in found])
        files = [glob.escape(str(Path(path).absolute())) for path in found]
    options: dict[str, Any] = {}
    if kind == "csv":  # text is not converted: a class may be named NA or 007
        options = {"converters": dict.fromkeys([*paths, *(args.label_column_name or ["label"])], str)}
        options |= {"keep_default_na": False, "na_values": [""], "sep": "\t" if file.lower().endswith(".tsv") else ","}
    try:
        data = datasets.load_dataset(
            kind,
            data_files={"train": files},
            split="train",
            cache_dir=args.cache_dir,
            streaming=args.streaming,
            **options,
        )
    except (datasets.exceptions.DatasetsError, ValueError, OSError, tarfile.TarError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{flag} has no rows.") from error
        raise ValueError(f"{flag} cannot be read as {kind}: {error.__cause__ or error}") from error
    if args.streaming and data.features is None:
        data = data._resolve_features()  # of the first rows
    for column in set(paths) & set(data.column_names):
        data = absolute(data, column, Path(file).absolute().parent) if "://" not in file else data
    return data


def absolute(data: datasets.Dataset, column: str, folder: Path) -> datasets.Dataset:
    """The data set with images in place of the names of their files; relative paths start at the folder."""

    def place(value: Any) -> Any:
        if isinstance(value, list):
            return [place(part) for part in value]
        return str(folder / value) if value and "://" not in value else value

    def as_image(value: Any) -> Any:
        return [as_image(part) for part in value] if isinstance(value, list) else {"path": value, "bytes": None}

    feature = data.features[column]
    if isinstance(feature, dict) and set(feature) == {"path"} and isinstance(data, datasets.Dataset):
        data = data.flatten().rename_column(f"{column}.path", column)
        feature = data.features[column]
    inner = getattr(feature, "feature", feature)
    if not isinstance(inner, datasets.Value) or "string" not in inner.dtype:
        return data
    image = datasets.Image() if inner is feature else datasets.List(datasets.Image())
    if isinstance(data, datasets.IterableDataset):
        features = datasets.Features(data.features | {column: image})
        return data.map(lambda row: {column: as_image(place(row[column]))}, features=features)
    values = [place(value) for value in data.select_columns([column])[column][:]]
    return data.remove_columns(column).add_column(column, values).cast_column(column, image)
