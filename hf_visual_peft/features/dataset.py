"""Cached features as a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .storage import Shards, size


FEATURES = "cached_features"


class CachedFeatures(Dataset[dict[str, Any]]):
    """A data set of features in place of images.

    Samples are `{"cached_features": {name: (...)}, "labels": ...}`. A `DataLoader` with `collate` as its `collate_fn`
    reads whole batches without a copy; other ways of collating also work.

    `epoch` selects the view of the images: the epoch modulo the number of views. Set it before each epoch, or let
    `set_epoch` do so: in runs of one process, loaders of accelerate call it, and so does transformers' Trainer. (With
    several processes they may only inform their sampler: set it in a callback there.)

    Args:
        shards: complete files.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared with persistent workers
        layout = shards.layout
        self.others = {
            name: torch.cat([shards.others[shard][name] for shard in range(layout.shards)]) for name in layout.others
        }

    @property
    def epoch(self) -> int:
        """The epoch, the same in all processes that load from this data set."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set `epoch`."""
        self.epoch = epoch

    @property
    def bytes_per_image(self) -> int:
        """On disk, for one view."""
        return self.shards.layout.row_bytes

    def __repr__(self) -> str:
        layout = self.shards.layout
        views = f" x {layout.views} views" if layout.views > 1 else ""
        return (
            f"{len(self):,} images{views} of {size(layout.row_bytes)} ({layout.dtype}), "
            f"{size(layout.rows * layout.row_bytes)} in {self.shards.folder}"
        )

    def __len__(self) -> int:
        return self.shards.layout.rows // self.shards.layout.views

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Several samples, read at once."""
        return self.of_view(self.epoch % self.shards.layout.views, indices)

    def of_view(self, view: int, indices: Sequence[int]) -> Batch:
        """Several samples of one view."""
        start = view * len(self)
        rows = [start + range(len(self))[index] for index in indices]
        others = {name: value[rows] for name, value in self.others.items()}
        return Batch(self.shards.read(rows), others)

    @staticmethod
    def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate samples of this data set into a batch.

        Raises:
            ValueError: the samples have lost their features.
        """
        if isinstance(samples, Batch):
            return {FEATURES: samples.features, **samples.others}
        if not all(FEATURES in sample for sample in samples):
            raise ValueError(
                f"The samples have no {FEATURES}, but {', '.join(samples[0])}: with transformers' Trainer, set "
                "remove_unused_columns=False."
            )
        return torch.utils.data.default_collate(list(samples))


class Batch(Sequence[Any]):
    """Samples that are views of tensors of the whole batch.

    Args:
        features: (batch, ...), by name.
        others: other entries of the samples, (batch, ...), by name.
    """

    def __init__(self, features: dict[str, Tensor], others: dict[str, Tensor]) -> None:
        self.features, self.others = features, others

    def __len__(self) -> int:
        return len(next(iter(self.features.values())))

    def __getitem__(self, index: Any) -> Any:
        features = {name: value[index] for name, value in self.features.items()}
        return {FEATURES: features, **{name: value[index] for name, value in self.others.items()}}

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))
