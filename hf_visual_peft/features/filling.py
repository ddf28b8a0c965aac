"""Compute features and write them, beside other processes that may do the same."""

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


_PATIENCE = 5  # seconds before it is said that another process is waited for


class Filler:
    """Makes the files of a cache that are missing.

    Files are divided by locks: whoever holds the lock of a file makes it, and the others leave it alone until the lock
    is free, because the file is there or its maker has died. So any number of processes, of one run or of several,
    fill a cache together, and one that starts later goes on with what is missing. A file's batches are the same
    whoever makes it: the features are the same to the bit.

    Args:
        shards: where to write.
        views: the data set of each view, with samples of the model's inputs and what else is kept.
        compute: features of a batch, (batch, numbers) each, in the order of the layout.
        batch_size: images a batch.
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
        self.taken: list[int] = []  # by others
        self.told = False  # that they are waited for

    def fill(self, missing: Sequence[int], description: str) -> None:
        """Make the files that are missing; return once all are there, whoever has made them.

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
        """Wait until the maker of a file is done, or dead."""
        lock = self.shards.lock(shard)
        if not acquired(lock, 0 if self.told else _PATIENCE):
            if not self.told:
                tqdm.write(f"waiting for another process that makes {self.shards.path(shard)}", file=sys.stderr)
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
                        text = "The file of features is not what was written: the disk or its driver fails"
                        raise OSError(errno.EIO, text, str(self.shards.path(shard)))
                    self.claimed.popleft()
                    lock.release()
                    others, done = [], 0
        finally:
            for _, lock in self.claimed:
                lock.release()
            self.claimed.clear()

    def _claim(self, missing: Sequence[int]) -> Iterator[list[int]]:
        """Rows of batches of the files whose locks are free, which are then ours."""
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
    """An iterable that can be walked once, as a `DataLoader` takes its batches."""

    def __init__(self, batches: Iterator[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches


def acquired(lock: FileLock, timeout: float) -> bool:
    """Whether a lock is ours after so many seconds; a negative number waits for ever.

    Raises:
        OSError: it cannot be made.
    """
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        return False
    except OSError as error:
        raise OSError(error.errno, f"Cannot write features: {error.strerror}", lock.lock_file) from error
    return True


def is_whole(shards: Shards, shard: int, read_only: bool = False) -> bool:
    """Whether a file is there and as it was written; a damaged one counts as missing, with a warning.

    Raises:
        DamagedError: it is damaged, and nothing may be written.
    """
    try:
        return shards.check(shard)
    except DamagedError as error:
        text = f"{shards.path(shard)} is damaged: {error}."
        if read_only:
            raise DamagedError(f"{text} Without read_only it would be computed again.") from error
        warnings.warn(f"{text} It is computed again.", stacklevel=2)
        return False
