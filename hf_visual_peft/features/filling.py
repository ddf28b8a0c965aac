"""Compute features and write them, alongside other processes that may do the same."""

from __future__ import annotations

import errno
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm.auto import tqdm

from .storage import DTYPES, DamagedError, Shards, make_folder


_PATIENCE = 5  # seconds of waiting for another process before a message says so


class Filler:
    """Writes the missing files of a cache.

    Locks divide the files: the process that holds the lock of a file writes it, and the others wait until the lock is
    free, because the file is complete or its writer has died. So any number of processes, of one run or of several,
    fill a cache together, and one that starts later continues with the missing files. The batches of a file do not
    depend on the process that writes it, so the features are identical to the bit.

    Args:
        shards: where to write.
        views: the data set of each view, whose samples have the model's inputs and other entries to keep.
        compute: returns the features of a batch, (batch, features) each, in the order of the layout.
        batch_size: images per batch.
        num_workers: processes that read images.
        progress: whether to show a bar.
    """

    def __init__(
        self,
        shards: Shards,
        views: Sequence[Dataset[Any]],
        compute: Callable[[Mapping[str, Any]], list[Tensor]],
        batch_size: int,
        num_workers: int,
        progress: bool,
    ) -> None:
        self.shards, self.compute = shards, compute
        self.batch_size, self.num_workers, self.progress = batch_size, num_workers, progress
        self.data: Dataset[Any] = ConcatDataset(views)
        self.claimed: deque[tuple[int, FileLock]] = deque()
        self.taken: list[int] = []  # by other processes
        self.told = False  # whether the user knows that we wait for them

    def fill(self, missing: Sequence[int], description: str) -> None:
        """Write the missing files; return once all are complete, including those of other processes.

        Raises:
            ValueError: a feature is not finite in the dtype of the cache.
            OSError: the disk is full, or the folder cannot be written.
        """
        make_folder(self.shards.locks)
        rows = sum(len(self.shards.layout.rows_of(shard)) for shard in missing)
        with tqdm(total=rows, desc=description, unit="img", disable=not self.progress) as bar:
            while missing:
                self._make_free(missing, bar)
                missing = [shard for shard in self.taken if not is_whole(self.shards, shard)]
                if missing:
                    self._wait(missing[0])

    def _wait(self, shard: int) -> None:
        """Wait until the writer of a file has finished or died."""
        lock = self.shards.lock(shard)
        if not acquired(lock, 0 if self.told else _PATIENCE):
            if not self.told:
                tqdm.write(f"waiting for another process that writes {self.shards.path(shard)}", file=sys.stderr)
            self.told = True
            acquired(lock, -1)
        lock.release()

    def _make_free(self, missing: Sequence[int], bar: Any) -> None:
        layout = self.shards.layout
        self.taken = []
        loader = DataLoader(self.data, batch_sampler=_Batches(self._claim(missing)), num_workers=self.num_workers)
        features = torch.empty(0)
        others: list[Mapping[str, Tensor]] = []
        done = 0
        try:
            for batch in loader:
                shard, lock = self.claimed[0]
                rows = layout.rows_of(shard)
                if done == 0:
                    features = torch.empty(len(rows), sum(layout.numbers), dtype=DTYPES[layout.dtype])
                found = self.compute(batch)
                count = len(found[0])
                torch.cat([part.cpu() for part in found], dim=1, out=features[done : done + count])
                if not bool(torch.isfinite(features[done : done + count]).all()):
                    raise ValueError(
                        f"Features of images {rows.start + done} to {rows.start + done + count - 1} are not finite in "
                        f"{layout.dtype}. Choose {'float32' if layout.dtype == 'bfloat16' else 'bfloat16'}, or look "
                        "for damaged weights and images."
                    )
                others.append({name: batch[name] for name in layout.others})
                done += count
                bar.update(count)
                if done == len(rows):
                    kept = {name: torch.cat([part[name] for part in others]) for name in layout.others}
                    self.shards.write(shard, features, kept)
                    if not is_whole(self.shards, shard):
                        text = "The file of features differs from what was written: the disk or its driver fails"
                        raise OSError(errno.EIO, text, str(self.shards.path(shard)))
                    self.claimed.popleft()
                    lock.release()
                    others, done = [], 0
        finally:
            for _, lock in self.claimed:
                lock.release()
            self.claimed.clear()

    def _claim(self, missing: Sequence[int]) -> Iterator[list[int]]:
        """Rows of the batches of each file whose lock we could take."""
        for shard in missing:
            lock = self.shards.lock(shard)
            if not acquired(lock, 0):
                self.taken.append(shard)
                continue
            if is_whole(self.shards, shard):
                lock.release()
                continue
            self.claimed.append((shard, lock))
            rows = self.shards.layout.rows_of(shard)
            for start in range(rows.start, rows.stop, self.batch_size):
                yield list(range(start, min(rows.stop, start + self.batch_size)))


class _Batches:
    """An iterable over batches of rows, in the form that a `DataLoader` takes."""

    def __init__(self, batches: Iterator[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches


def acquired(lock: FileLock, timeout: float) -> bool:
    """Whether we get a lock within so many seconds; a negative number waits forever.

    Raises:
        OSError: the lock file cannot be created.
    """
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        return False
    except OSError as error:
        raise OSError(error.errno, f"Cannot write features: {error.strerror}", lock.lock_file) from error
    return True


def is_whole(shards: Shards, shard: int, read_only: bool = False) -> bool:
    """Whether a file is there and intact; a damaged file counts as missing, with a warning.

    Raises:
        DamagedError: the file is damaged, and nothing may be written.
    """
    try:
        return shards.check(shard)
    except DamagedError as error:
        text = f"{shards.path(shard)} is damaged: {error}."
        if read_only:
            raise DamagedError(f"{text} Without read_only it would be computed again.") from error
        warnings.warn(f"{text} It is computed again.", stacklevel=2)
        return False
