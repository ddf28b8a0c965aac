"""What the runs of a few-shot program have in common: model, images, measurement, and the table of results."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field
from typing import Any

import evaluate
import numpy as np
from accelerate import Accelerator
from few_shot_data import Data, Part
from image_classification import Measures, evaluate_split
from image_data import Images
from labels import Loss
from peft import PeftConfig, PeftModel
from screen import Screen
from torch.utils.data import DataLoader

from hf_visual_peft import ZeroShotClassifier
from hf_visual_peft.metrics import Accuracy
from hf_visual_peft.tables import format_table


@dataclass
class Job:
    """What all runs have in common.

    Attributes:
        accelerator: of the program.
        args: flags.
        config: of the method.
        classifier: without an adapter.
        data: its images.
        processor: of images.
        screen: shows the progress.
        seen: the classes that are trained on.
        unseen: the classes that are tested apart; None for none.
        rows: of the table: method, shots, seed, accuracy on seen classes, on unseen classes.
    """

    accelerator: Accelerator
    args: argparse.Namespace
    config: PeftConfig
    classifier: ZeroShotClassifier
    data: Data
    processor: Any
    screen: Screen
    seen: range
    unseen: range | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of the model beside images and labels."""
        on_images = self.args.interpolate_pos_encoding and isinstance(self.data.train, Images)
        return {"interpolate_pos_encoding": True} if on_images else {}

    def part(self, classes: range) -> Part:
        """The images to measure some classes on."""
        rows = np.flatnonzero(np.isin(self.data.test_ids, classes))
        return Part(self.data.test, rows, self.data.test_ids[rows] - classes.start)

    def drawn(self, shots: int, seed: int) -> Part:
        """The images to learn from."""
        rows = self.data.draws[shots, seed]
        return Part(self.data.train, rows, self.data.train_ids[rows] - self.seen.start)

    def name_classes(self, classes: range, classifier: ZeroShotClassifier | None = None) -> None:
        """Give the classifier of all runs, or another one, the texts of some classes."""
        (classifier or self.classifier).set_class_names([self.data.names[number] for number in classes])

    def measure(self, model: Any) -> dict[str, float]:
        """The accuracy on seen classes, and on unseen ones, each among themselves."""
        found: dict[str, float] = {}
        classifier = model.get_base_model() if isinstance(model, PeftModel) else model
        for key, classes in (("accuracy", self.seen), ("new", self.unseen)):
            if classes is None or self.data.test is None:
                continue
            self.name_classes(classes, classifier)
            size = self.args.per_device_eval_batch_size
            loader = self.accelerator.prepare(
                DataLoader(self.part(classes), size, num_workers=self.args.dataloader_num_workers)
            )
            metrics = Measures(evaluate.combine([Accuracy(keep_in_memory=True)]), Loss())
            found[key] = evaluate_split(self.accelerator, model, loader, metrics, self.inputs, key)["accuracy"]
        self.name_classes(self.seen, classifier)
        return found

    def record(self, method: str, shots: int, seed: int | None, found: dict[str, float]) -> None:
        """Add a row of results."""
        if "new" in found:
            base, new = found.pop("accuracy"), found.pop("new")
            found = {"base": base, "new": new, "harmonic_mean": 2 * base * new / (base + new) if base + new else 0.0}
        self.rows.append({"method": method, "shots": shots, "seed": seed, **found})
        told = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        self.screen.say(f"{method}, {shots} shots{'' if seed is None else f', seed {seed}'}: {told or 'not measured'}")


def table_of(rows: list[dict[str, Any]]) -> str:
    """The results, averaged over seeds, in percent."""
    figures = [name for name in ("accuracy", "base", "new", "harmonic_mean") if any(name in row for row in rows)]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["shots"]), []).append(row)

    def cell(group: list[dict[str, Any]], name: str) -> str:
        values = [100 * row[name] for row in group if name in row]
        if not values and name == "base":  # a linear probe has no classes but those of training
            values = [100 * row["accuracy"] for row in group if "accuracy" in row]
        if not values:
            return "-"
        return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")

    if "base" in figures:
        figures.remove("accuracy") if "accuracy" in figures else None
    cells = [
        [method, str(shots), *(cell(group, name) for name in figures)] for (method, shots), group in groups.items()
    ]
    header = ["method", "shots", *(name.replace("_", " ") for name in figures)]
    return format_table(header, cells, right=header[1:])
