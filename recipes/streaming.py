"""Samples streamed from the Hub or from large files, without a copy on disk.

Before training, the labels of all samples are read once, so that the classes, their numbers of samples and the length
of an epoch are known, as without streaming. Images are read and decoded when they are needed.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from accelerate.utils import gather_object, send_to_device
from datasets.distributed import split_dataset_by_node
from image_data import Images, columns_of_all, encode_all
from image_folders import tell
from labels import class_table, read_labels
from PIL import Image
from torch import Tensor


SHARDS = 64  # at most, for data in one file on disk


def check_flags(args: argparse.Namespace) -> None:
    """Raise an error for flags that need all samples at once."""
    wrong = {
        "--cache_features": args.cache_features,
        "--sampler balanced": args.sampler == "balanced",
        "--max_train_samples": args.max_train_samples,
        "--max_eval_samples": args.max_eval_samples,
        "--train_val_split": args.train_val_split,
        "--skip_corrupt_images": args.skip_corrupt_images,
    }
    if any(wrong.values()):
        names = ", ".join(name for name, given in wrong.items() if given)
        raise ValueError(f"--streaming does not work with {names}: it never has all samples at once; remove one")


def part_of(stream: datasets.IterableDataset) -> datasets.IterableDataset:
    """The samples of this process, the same in every epoch."""
    state = PartialState()
    if state.num_processes > 1 and stream.num_shards % state.num_processes == 0:
        # `split_dataset_by_node` would distribute whole shards anew in every epoch
        return stream.shard(num_shards=state.num_processes, index=state.process_index)
    return split_dataset_by_node(stream, rank=state.process_index, world_size=state.num_processes)


class Samples(torch.utils.data.IterableDataset[dict[str, Any]]):
    """The samples of this process and, with several, of this worker, prepared for the model.

    Args:
        images: of the process.
        skipped: number of samples to skip at the beginning, without decoding.
        again: how often the process has already used them in this epoch, for other augmentations.
    """

    def __init__(self, images: StreamedImages, skipped: int, again: int) -> None:
        super().__init__()
        self.images, self.skipped, self.again = images, skipped, again

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        for place, row in enumerate(self.images.rows()):
            if place >= self.skipped:
                yield self.images.prepared(row, (worker.id if worker else 0, self.again, place))


class StreamedImages(Images):
    """Samples of a stream.

    Augmentation is drawn from seed, epoch, process, worker and the sample's place in the stream, whose order depends
    on seed, epoch and the numbers of processes and workers: a resumed run with the same numbers sees the same pixels.

    Args:
        stream: samples of this process.
        columns: of the image and of the labels.
        labels: the classes of a sample, by the values of its columns.
        ids: classes of the samples of all processes.
        own: number of samples of this process.
        most: largest number of samples of a process.
        split: its name.
        processor: image processor of the model.
        args: of the recipe.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        columns: tuple[str, list[str]],
        labels: dict[str, Any],
        ids: np.ndarray,
        own: int,
        most: int,
        split: str,
        processor: Any,
        args: argparse.Namespace,
    ) -> None:
        super().__init__(stream, ids, split, processor, args)
        self.columns, self.labels, self.own, self.most = columns, labels, own, most

    def __len__(self) -> int:
        """The number of samples of all processes."""
        return len(self.ids)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The samples of this epoch, shuffled in training."""
        stream = self.data
        if self.split == "train":
            stream = stream.shuffle(seed=self.args.seed, buffer_size=self.args.shuffle_buffer)
            stream.set_epoch(self.epoch)
        yield from stream

    def prepared(self, row: dict[str, Any], place: tuple[int, int, int]) -> dict[str, Any]:
        """A row for the model; `place` is the worker, the repetition in the epoch and the number within it."""
        image, names = self.columns
        process = PartialState().process_index
        where = f"sample {place[-1]} of the {self.split} split in process {process}, worker {place[0]}"
        held = held_by(row, names)
        if held not in self.labels:
            raise ValueError(f"The label {held} ({where}) was not there when the labels were read: the data changed.")
        return self.sample(row[image], self.labels[held], where, (self.args.seed, self.epoch, process, *place))

    def blank(self) -> dict[str, Any]:
        """A placeholder sample of the right shapes, for a process without samples."""
        image = Image.new("RGB", (64, 64))
        inputs = self.processor(images=[image] * (self.args.clip_frames or 1), return_tensors="pt")
        if not self.args.clip_frames:
            inputs = {name: tensor[0] for name, tensor in inputs.items()}
        return {**inputs, "labels": torch.from_numpy(self.ids[0]) if self.ids.ndim == 2 else int(self.ids[0])}


def held_by(row: Mapping[str, Any], names: list[str]) -> str:
    return repr([row[name] for name in names])


class StreamLoader(DataLoaderStateMixin):
    """Batches of a stream on the device of a process, equally many in each process.

    In training, an epoch has as many batches as the process with the most samples needs; the others repeat theirs. In
    evaluation, every sample occurs once: batches are padded, and `real` (batch,) marks the samples.
    """

    def __init__(self, accelerator: Accelerator, images: StreamedImages, first: int = 0) -> None:
        self.accelerator, self.dataset, self.first = accelerator, images, first
        self.train = images.split == "train"
        args = images.args
        self.batch_size = args.per_device_train_batch_size if self.train else args.per_device_eval_batch_size
        self.gradient_state = GradientState()

    def __len__(self) -> int:
        """Batches of an epoch."""
        return math.ceil(self.dataset.most / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for another epoch."""
        self.dataset.epoch = epoch

    def after(self, batches: int) -> StreamLoader:
        """The rest of an epoch, after that many batches."""
        return StreamLoader(self.accelerator, self.dataset, batches)

    def samples(self) -> Iterator[dict[str, Any]]:
        """Samples of this process, prepared by the workers; in training without end."""
        workers = self.dataset.args.dataloader_num_workers
        first = self.first * self.batch_size
        # several workers take turns, so that none knows by itself which samples to skip
        skipped = first if workers < 2 and first < self.dataset.own else 0
        for again in itertools.count() if self.train else range(1):
            loader = torch.utils.data.DataLoader(
                Samples(self.dataset, 0 if again else skipped, again), batch_size=None, num_workers=workers,
                generator=torch.Generator().manual_seed(again),  # its draws must not change those of dropout
            )  # fmt: skip
            yield from loader if again or skipped else itertools.islice(loader, first, None)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.begin()
        try:
            yield from self.train_batches() if self.train else self.evaluation_batches()
        finally:
            self.end()

    def train_batches(self) -> Iterator[dict[str, Tensor]]:
        """Equally many batches in each process; the last one of an epoch has the remaining samples."""
        samples = self.samples()
        for number in range(self.first, len(self)):
            size = min(self.batch_size, self.dataset.most - number * self.batch_size)
            self.end_of_dataloader = number == len(self) - 1
            yield self.batch(list(itertools.islice(samples, size)))

    def evaluation_batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches until no process has samples left."""
        samples, count = self.samples(), 0
        filler = None
        while True:
            found = list(itertools.islice(samples, self.batch_size))
            left = torch.tensor(len(found), device=self.accelerator.device)
            total = int(self.accelerator.reduce(left, "sum"))
            count += total
            if not total:
                break
            filler = filler or (found[0] if found else self.dataset.blank())
            batch = self.batch(found + [filler] * (self.batch_size - len(found)))
            yield {**batch, "real": torch.arange(self.batch_size, device=left.device) < left}
        if count != len(self.dataset):
            raise RuntimeError(
                f"{count} samples of the {self.dataset.split} split were read, but {len(self.dataset)} labels "
                "before: the data have changed."
            )

    def batch(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate samples, on the device."""
        return send_to_device(torch.utils.data.default_collate(samples), self.accelerator.device)


def opened(data: Any) -> datasets.IterableDataset:
    """A split as a stream with known columns."""
    if isinstance(data, datasets.Dataset):
        return data.to_iterable_dataset(num_shards=min(SHARDS, len(data)))
    return data if data.features else data._resolve_features()


def prepare_stream(
    args: argparse.Namespace, processor: Any, splits: Mapping[str, Any]
) -> tuple[dict[str, StreamedImages], list[str], int]:
    """As `prepare_data`, without reading images."""
    streams = {split: opened(data) for split, data in splits.items()}
    if "validation" not in streams and args.select == "best":
        raise ValueError("--streaming holds no samples out: --select best needs a validation split; or --select last.")
    encoded = datasets.Image(decode=False)
    plain = datasets.List(encoded) if args.clip_frames else encoded
    columns = columns_of_all(streams, args)
    parts, named, sizes, held = {}, {}, {}, {}
    for split, stream in streams.items():
        image, labels = columns[split]
        features = datasets.Features({name: stream.features[name] for name in labels})
        parts[split] = part_of(stream.select_columns([image, *labels]).cast_column(image, plain))
        mine = list(part_of(stream.select_columns(labels)))
        sizes[split] = gather_object([len(mine)])
        rows = gather_object(mine)
        held[split] = [held_by(row, labels) for row in rows]
        named[split] = read_labels(datasets.Dataset.from_list(rows, features=features), labels)
    names, ids = encode_all(named)
    if not min(sizes["train"]):
        raise ValueError(f"--streaming: {len(sizes['train'])} processes cannot share {sum(sizes['train'])} samples.")
    found = {}
    for split, part in parts.items():
        of_value = dict(zip(held[split], ids[split], strict=True))
        found[split] = StreamedImages(
            part,
            columns[split],
            of_value,
            ids[split],
            sizes[split][PartialState().process_index],
            max(sizes[split]),
            split,
            processor,
            args,
        )
    tell(class_table(ids, names))
    return found, names, 0
