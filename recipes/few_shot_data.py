"""The images of few-shot runs, and which of them a run learns from."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator
from draws import draw, halves, text_names
from image_data import Images, columns_of_all, encode_all, usable_rows
from image_folders import tell
from image_sources import load_splits
from labels import hold_out, read_labels
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Part(Dataset[dict[str, Any]]):
    """Some samples, with the places of their classes among those of the run as labels.

    Args:
        images: the samples: images, or features of them, (views, samples, width).
        rows: numbers of the samples.
        labels: of these.
    """

    def __init__(self, images: Images | Tensor, rows: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.rows, self.labels = images, rows, labels
        self._epoch = 0

    @property
    def epoch(self) -> int:
        """The number of the augmentation."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = epoch
        if isinstance(self.images, Images):
            self.images.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, label = int(self.rows[index]), int(self.labels[index])
        if isinstance(self.images, Images):
            return {**self.images[row], "labels": label}
        return {"image_features": self.images[self.epoch % len(self.images), row], "labels": label}


@dataclass
class Data:
    """The images of all runs.

    Attributes:
        train: those that a draw has.
        test: to measure on; None for none.
        train_ids: the classes of the former.
        test_ids: the classes of the latter.
        draws: by shots and seed: the places in `train` of a draw's images.
        names: the text of each class.
        records: of each image in `train`, for `samples.jsonl`.
    """

    train: Any
    test: Any
    train_ids: np.ndarray
    test_ids: np.ndarray
    draws: dict[tuple[int, int], np.ndarray]
    names: list[str]
    records: list[dict[str, Any]]


def load_data(accelerator: Accelerator, args: argparse.Namespace, processor: Any) -> tuple[Data, range, range | None]:
    """The images of all runs, the classes to learn, and those that are tested apart."""
    with accelerator.main_process_first():  # the others then read its cache
        splits = dict(load_splits(args))
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits["validation"]
    splits.pop("validation", None)
    columns = columns_of_all(splits, args)
    names, ids = encode_all({split: read_labels(data, columns[split][1]) for split, data in splits.items()})
    if ids["train"].ndim == 2:
        raise ValueError("Few-shot runs need one class for each image, and the samples here may have several.")
    images = {
        split: data.select_columns([columns[split][0]]).cast_column(columns[split][0], datasets.Image(decode=False))
        for split, data in splits.items()
    }
    pool = np.arange(len(images["train"]))
    if args.skip_corrupt_images:
        pool = usable_rows(images["train"], "train", args)
    tests = np.arange(len(images["test"])) if "test" in images else np.array([], dtype=np.int64)
    if "test" not in images and args.train_val_split and args.test_split != "none":
        kept, held = hold_out(ids["train"][pool], args.train_val_split, args.seed)
        pool, tests = pool[kept], pool[held]
        images["test"], ids["test"] = images["train"], ids["train"]
        tell(f"There is no test split: {len(tests)} of {len(kept) + len(held)} images of train are held out to test.")
    seen, unseen = halves(len(names), args.split)
    free = np.full(len(ids["train"]), -1)
    free[pool] = ids["train"][pool]
    draws = {(shots, seed): draw(free, names, seen, shots, seed) for shots in args.shots for seed in args.seeds}
    union = np.unique(np.concatenate(list(draws.values())))
    if args.max_eval_samples:
        tests = np.random.default_rng(args.seed).permutation(tests)[: args.max_eval_samples]
    tests = tests[np.isin(ids["test"][tests], [*seen, *(unseen or [])])] if len(tests) else tests
    texts = text_names(args.class_names, names) if args.class_names else names
    found: dict[str, Any] = {"test": None}
    for split, rows in (("train", union), ("test", tests)):
        if len(rows):
            chosen = images[split].select(rows)
            good = usable_rows(chosen, split, args)
            rows = rows[good]
            found[split] = Images(chosen.select(good), ids[split][rows], split, processor, args)
    test = found["test"]
    measured = [] if "test" not in images else [("learned", seen), ("new", unseen)]
    for kind, classes in measured:
        if classes is not None and (test is None or not np.isin(test.ids, classes).any()):
            raise ValueError(
                f"No image to test is of the {kind} classes. Give a test split that has them, or --test_split none."
            )
    places = {row: place for place, row in enumerate(union.tolist())}
    values = images["train"].select(union)[columns["train"][0]][:]
    records = [
        {"index": row, "label": names[ids["train"][row]], "image": (value or {}).get("path")}
        for row, value in zip(union.tolist(), values, strict=True)
    ]
    drawn = {key: np.array([places[row] for row in rows.tolist()]) for key, rows in draws.items()}
    test_ids = ids["train"][:0] if test is None else test.ids
    return Data(found["train"], test, found["train"].ids, test_ids, drawn, texts, records), seen, unseen


def every_view(part: Part, views: int, size: int) -> Iterator[Any]:
    """Batches of all images, in every augmentation."""
    for view in range(views):
        part.epoch = view
        yield from DataLoader(part, size)
    part.epoch = 0
