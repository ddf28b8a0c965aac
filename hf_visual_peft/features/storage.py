"""Features on disk: safetensors files of a few hundred images each, written once and checked when opened.

A row of the tensor `features` holds all features of one image, so that one read fetches them. Rows are read from the
file directly into the batch. If a disk fails or a file is truncated, that raises an error, while a memory map would
end the process. `benchmarks/cache.py` compares the times of both and of Arrow.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import threading
import uuid
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from xxhash import xxh3_128

from ..sharing.files import write_aside
from .fingerprint import bytes_of


FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHARD_BYTES = 128 * 2**20
_SHARD_ROWS = 512  # so that little is lost where rows are small
_CHUNK = 8 * 2**20
_OPEN_FILES = 64  # at a time in each thread; systems allow a process at least 256
_METADATA = "hf_visual_peft"


class DamagedError(ValueError):
    """A file of a cache has changed since it was written; the message says what is wrong."""


@dataclass(frozen=True)
class Layout:
    """The contents of a cache.

    Attributes:
        fingerprint: of everything the features depend on.
        parts: the hashes that it consists of, by kind.
        rows: number of images times number of views; the views of an image are `rows / views` apart.
        views: of each image.
        dtype: of the features.
        shapes: of one image's features, by name.
        others: dtype and shape of the other entries of a sample, by name.
        rows_per_shard: images per file.
        format: of the files.
    """

    fingerprint: str
    parts: dict[str, str]
    rows: int
    views: int
    dtype: str
    shapes: dict[str, list[int]]
    others: dict[str, tuple[str, list[int]]]
    rows_per_shard: int = 0
    format: int = FORMAT

    def __post_init__(self) -> None:
        if not self.rows_per_shard:
            rows = max(1, min(_SHARD_ROWS, _SHARD_BYTES // self.row_bytes))
            object.__setattr__(self, "rows_per_shard", rows)

    @property
    def numbers(self) -> list[int]:
        """The number of elements of each feature of an image."""
        return [math.prod(shape) for shape in self.shapes.values()]

    @property
    def row_bytes(self) -> int:
        """Bytes of the features of an image."""
        return sum(self.numbers) * DTYPES[self.dtype].itemsize

    @property
    def shards(self) -> int:
        """Number of files."""
        return math.ceil(self.rows / self.rows_per_shard)

    def rows_of(self, shard: int) -> range:
        """The rows in a file."""
        return range(shard * self.rows_per_shard, min(self.rows, (shard + 1) * self.rows_per_shard))


@dataclass
class Shards:
    """The files of one cache in a folder.

    Attributes:
        folder: that holds them.
        layout: what they hold.
        starts: offset of the features in the files that are known to be intact.
        others: other entries of the samples in those files, (rows, ...), by name.
    """

    folder: Path
    layout: Layout
    starts: dict[int, int] = field(default_factory=dict)
    others: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _files: dict[tuple[int, int], dict[int, BinaryIO]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"features-{shard:05d}-of-{self.layout.shards:05d}.safetensors"

    @property
    def locks(self) -> Path:
        """The folder of the locks."""
        return self.folder / ".locks"

    def lock(self, shard: int) -> FileLock:
        """The lock that a process holds while it writes a shard; the system frees it when the process dies."""
        return FileLock(self.locks / f"{shard:05d}.lock")

    def check(self, shard: int) -> bool:
        """Read a whole file and compare its checksum; return whether the file is there.

        Raises:
            DamagedError: the file was truncated or changed, or belongs to another cache.
            OSError: the file cannot be read.
        """
        if shard in self.starts:
            return True
        path = self.path(shard)
        try:
            with path.open("rb") as file:
                header, start = _read_header(file)
                found = _digest_file(file, header, start)
            with safe_open(path, framework="pt") as tensors:
                metadata = tensors.metadata() or {}
                if json.loads(metadata[_METADATA])["checksum"] != found:
                    raise DamagedError("its checksum differs")
                if metadata != self._metadata(shard, found):
                    raise DamagedError("it belongs to another cache")
                for name, (dtype, shape) in self._kinds(shard).items():
                    part = tensors.get_slice(name)
                    kind = str(part[:0].dtype).removeprefix("torch."), part.get_shape()
                    if kind != (dtype, shape):
                        raise DamagedError(f"its {name} are {kind[0]} of shape {kind[1]}, not {dtype} of {shape}")
                others = {name: tensors.get_tensor(name).clone() for name in self.layout.others}
        except FileNotFoundError:
            return False
        except (OSError, DamagedError):  # a failing disk or system says nothing about the file
            raise
        except Exception as error:  # parsers raise all kinds of errors for bytes in another format
            raise DamagedError(f"it is truncated or not a safetensors file ({error})") from error
        self.starts[shard] = start + header["features"]["data_offsets"][0]
        self.others[shard] = others
        return True

    def _kinds(self, shard: int) -> dict[str, tuple[str, list[int]]]:
        """Dtype and shape of each tensor in a file."""
        rows = len(self.layout.rows_of(shard))
        kinds = {"features": (self.layout.dtype, [rows, sum(self.layout.numbers)])}
        return kinds | {name: (dtype, [rows, *shape]) for name, (dtype, shape) in self.layout.others.items()}

    def _metadata(self, shard: int, checksum: str) -> dict[str, str]:
        rows = self.layout.rows_of(shard)
        told = {"checksum": checksum, "fingerprint": self.layout.fingerprint, "rows": [rows.start, rows.stop]}
        return {_METADATA: json.dumps(told)}  # one entry, because safetensors writes several in any order

    def write(self, shard: int, features: Tensor, others: Mapping[str, Tensor]) -> None:
        """Write a temporary file and rename it once it is on the disk.

        Args:
            shard: index of the file.
            features: (rows, elements) in the dtype of the layout.
            others: other entries of the samples, (rows, ...).

        Raises:
            OSError: the disk is full, or the folder cannot be written; complete files stay.
        """
        path = self.path(shard)
        tensors = {"features": features, **others}
        content = save(tensors, metadata=self._metadata(shard, _digest(tensors)))
        for left in self.folder.glob(f".{path.name}.*.tmp"):  # of a process that died
            left.unlink(missing_ok=True)
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError as error:
            kind = "The disk is full" if error.errno == errno.ENOSPC else "Cannot write"
            raise OSError(
                error.errno,
                f"{kind}: {error.strerror} after {len(self.starts)} of {self.layout.shards} files of features. These "
                "are kept: the next run continues there",
                str(path),
            ) from error
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)

    def read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Features of some rows, (rows, ...) each, by name, in the dtype of the cache.

        Raises:
            OSError: a file cannot be read, or has become shorter.
        """
        layout = self.layout
        dtype = DTYPES[layout.dtype]
        batch = {name: torch.empty((len(rows), *shape), dtype=dtype) for name, shape in layout.shapes.items()}
        buffers = [tensor.view(len(rows), -1).view(torch.uint8).numpy() for tensor in batch.values()]
        for place, row in enumerate(rows):
            shard, index = divmod(row, layout.rows_per_shard)
            file = self._open(shard)
            file.seek(self.starts[shard] + index * layout.row_bytes)
            for buffer in buffers:
                if file.readinto(buffer[place]) != buffer.shape[1]:  # type: ignore[attr-defined]
                    raise OSError(errno.EIO, "The file of features has become shorter", str(self.path(shard)))
        return batch

    def _open(self, shard: int) -> BinaryIO:
        # each process and thread has its own position in the file
        files = self._files.setdefault((os.getpid(), threading.get_ident()), {})
        file = files.pop(shard, None) or self.path(shard).open("rb", buffering=0)
        files[shard] = file  # at the end: the first one was read the longest ago
        if len(files) > _OPEN_FILES:
            files.pop(next(iter(files))).close()
        return file


def open_folder(folder: Path, layout: Layout, read_only: bool) -> Shards:
    """Open the shards in a folder, and write the manifest if there is none.

    Args:
        folder: for these features alone.
        layout: what the cache shall hold; an existing manifest decides the number of rows per file.
        read_only: whether to write nothing.

    Returns:
        The shards.

    Raises:
        FileNotFoundError: there is no manifest, and none may be written.
        ValueError: the manifest describes other features.
        OSError: the folder cannot be written.
    """
    path = folder / MANIFEST
    problem = ""
    try:
        there = Layout(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        if read_only:
            text = "There are no such features, and read_only is set"
            raise FileNotFoundError(errno.ENOENT, text, str(folder)) from None
    except (ValueError, TypeError) as error:
        problem = f"{path} is damaged ({error})"
        if read_only:
            raise DamagedError(f"{problem}, and read_only is set.") from error
    else:
        layout = Layout(**{**asdict(layout), "rows_per_shard": there.rows_per_shard})
        if asdict(there) != _plain(asdict(layout)):
            names = [name for name, value in asdict(there).items() if value != _plain(getattr(layout, name))]
            raise ValueError(f"{path} describes other features: {', '.join(names)} differ. Delete the folder.")
        return Shards(folder, layout)
    make_folder(folder)
    write_aside(path, json.dumps(asdict(layout), indent=2) + "\n")
    if problem:
        warnings.warn(f"{problem}; it is written again.", stacklevel=2)
    return Shards(folder, layout)


def make_folder(folder: Path) -> None:
    """Create a folder if it is not there.

    Raises:
        OSError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"Cannot write features: {error.strerror}", str(folder)) from error


def check_space(folder: Path, rows: int, layout: Layout) -> None:
    """Raise an error if the disk cannot hold that many more rows.

    Raises:
        OSError: it cannot; the message says how much is needed and how much is free.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    needed, free = rows * layout.row_bytes, shutil.disk_usage(there).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"The disk is too small: {rows:,} rows of {size(layout.row_bytes)} need {size(needed)}, and {size(free)} "
            f"are free. float16 halves what float32 needs; fewer views or images need less",
            str(folder),
        )


def size(count: float) -> str:
    """A number of bytes with a unit."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    total = xxh3_128()
    for name in sorted(tensors):
        total.update(bytes_of(tensors[name]))
    return total.hexdigest()


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, without its metadata, and the offset of the tensors."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(min(length, os.fstat(file.fileno()).st_size)))
    header.pop("__metadata__", None)
    return header, 8 + length


def _digest_file(file: BinaryIO, header: Mapping[str, Any], start: int) -> str:
    total = xxh3_128()
    buffer = bytearray(_CHUNK)
    for name in sorted(header):
        begin, end = header[name]["data_offsets"]
        if not 0 <= begin <= end:
            raise DamagedError(f"its header has the offsets {begin} and {end}")
        file.seek(start + begin)
        left = end - begin
        while left:
            count = file.readinto(memoryview(buffer)[: min(left, _CHUNK)])  # type: ignore[attr-defined]
            if not count:
                raise DamagedError("it is truncated")
            total.update(memoryview(buffer)[:count])
            left -= count
    return total.hexdigest()
