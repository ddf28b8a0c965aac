"""Run the demonstration: adapt a real pretrained encoder, compare with a linear probe, save and reload."""

from __future__ import annotations

import json
import shutil
import sys
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers.utils import logging as transformers_logging

from ..backbones.finding import find_backbone
from ..backbones.frozen_norms import freeze_norms
from ..core.calibration import calibrate
from ..core.registry import list_methods
from ..peft_methods.methods import PeftMethod, any_method
from ..sharing.files import write_aside
from ..tables import format_table
from .data import DIGITS, DIGITS_IMAGE_SIZE, ImageData, load_data, preprocess
from .evaluate import RECORD_FILE, Record, evaluate_in_new_process
from .models import PixelOptions, default_config, forward_options, keep_head_only, load_classifier, pixel_options
from .options import DemoOptions
from .training import TrainingOptions, count_correct, train
from .weights import DESCRIPTION, demo_checkpoint


PROBE = "linear probe"

# Peak learning rates; all other settings are equal. Chosen on the digits' validation split, 8 epochs at batch size 32.
DEFAULT_LEARNING_RATE = 3e-3  # AdaptFormer, Convpass: 0.02 more than at 1e-3; SSF: the same at 1e-2
LEARNING_RATES = {
    PROBE: 1e-2,  # best of seven from 1e-4 to 1e-1 (three seeds), so that the baseline is as strong as possible
    "linearprobe": 1e-2,
    "vpt": 1e-2,  # prompts need larger steps than weights do: 5e-3 gives the same, 3e-2 less
}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        method: name, or `"linear probe"`.
        trainable: trained parameters, the head included.
        trainable_without_head: trained parameters of the method itself.
        adapter_bytes: size of `adapter_model.safetensors`, head included; `None` for the probe, which saves none.
        correct: correct predictions on the test images after the last epoch.
        total: test images.
        reloaded_correct: correct predictions of the adapter reloaded in a new process; `None` for the probe.
        seconds: training time, without evaluation.
        lr: peak learning rate.
    """

    method: str
    trainable: int
    trainable_without_head: int
    adapter_bytes: int | None
    correct: int
    total: int
    reloaded_correct: int | None
    seconds: float
    lr: float

    @property
    def accuracy(self) -> float:
        """Fraction of correct predictions."""
        return self.correct / self.total

    @property
    def reloads(self) -> bool:
        """Whether the reloaded adapter gave as many correct predictions as the trained one."""
        return self.reloaded_correct in (None, self.correct)


class Demonstration:
    """Model, images and options of one run; every method starts from the same weights.

    Args:
        options: what to run.

    Raises:
        ValueError: an option names something that does not exist or cannot be.
        RuntimeError: started as several processes.
    """

    def __init__(self, options: DemoOptions) -> None:
        self.accelerator = Accelerator()
        if self.accelerator.num_processes > 1:
            raise RuntimeError(
                "The demonstration runs as one process: use a script under recipes/ to train with more."
            )
        self.methods = chosen_methods(options.method)
        for name in self.methods:
            _check_replaceable(options.output_dir / name)
        options.output_dir.mkdir(parents=True, exist_ok=True)
        # Absolute, because the new process and later users of the adapter may start in another folder.
        self.options = replace(options, data=replace(options.data, dataset_name=_absolute(options.data.dataset_name)))
        self.data: ImageData = load_data(self.options.data)
        self.checkpoint = _absolute(options.model_name_or_path or str(demo_checkpoint()))
        digits = options.data.dataset_name == DIGITS
        self.pixels: PixelOptions = pixel_options(
            self.checkpoint, options.image_size or (DIGITS_IMAGE_SIZE if digits else None)
        )
        self.train_images: Dataset = preprocess(self.data.train, **asdict(self.pixels))
        self.test_images: Dataset = preprocess(self.data.test, **asdict(self.pixels))

    def describe(self) -> str:
        """Two lines about model and images."""
        model = self.checkpoint if self.options.model_name_or_path else f"{DESCRIPTION} ({self.checkpoint})"
        return (
            f"Model:  {model}\n"
            f"Images: {self.options.data.dataset_name}, {len(self.data.train):,} to train on and "
            f"{len(self.data.test):,} to test on, {len(self.data.labels)} classes, {self.pixels.image_size} px"
        )

    def probe(self) -> Row:
        """Train only the head on the frozen model: the baseline of every method."""
        model = self._base()
        keep_head_only(model)
        return self._row(PROBE, model, LEARNING_RATES[PROBE])

    def run(self, name: str) -> Row:
        """Train a method, save its adapter, and evaluate it here and in a new process."""
        lr = self.options.lr or LEARNING_RATES.get(name, DEFAULT_LEARNING_RATE)
        method = any_method(name)
        base = self._base()
        model = get_peft_model(base, default_config(method, base, self.pixels.image_size))
        if isinstance(method, PeftMethod):
            freeze_norms(model)  # methods of this library do it themselves
        if method.calibrated:
            images = DataLoader(self.train_images, batch_size=self.options.batch_size)
            calibrate(model, images, seed=self.options.data.seed)
        row = self._row(name, model, lr)
        folder = self.options.output_dir / name
        self._save(model, folder)
        reloaded, _ = evaluate_in_new_process(folder)
        size = (folder / "adapter_model.safetensors").stat().st_size
        return replace(row, adapter_bytes=size, reloaded_correct=reloaded)

    def _base(self) -> nn.Module:
        set_seed(self.options.data.seed)  # the new head and the adapter's first weights
        return load_classifier(self.checkpoint, self.data.labels)

    def _row(self, name: str, model: nn.Module, lr: float) -> Row:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        extra = forward_options(base, self.pixels.image_size)
        trained = {key: value.numel() for key, value in model.named_parameters() if value.requires_grad}
        heads = [f"{head}." for head in find_backbone(base).heads]
        own = sum(size for key, size in trained.items() if not any(head in key for head in heads))
        training = TrainingOptions(
            epochs=self.options.epochs, batch_size=self.options.batch_size, lr=lr, seed=self.options.data.seed
        )
        seconds = train(model, self.train_images, training, self.accelerator, name, extra)
        correct = count_correct(model, self.test_images, self.options.batch_size, self.accelerator, extra)
        self.accelerator.free_memory()
        return Row(
            method=name,
            trainable=sum(trained.values()),
            trainable_without_head=own,
            adapter_bytes=None,
            correct=correct,
            total=len(self.test_images),
            reloaded_correct=None,
            seconds=seconds,
            lr=lr,
        )

    def _save(self, model: PeftModel, folder: Path) -> None:
        """Save an adapter to a temporary folder, then let it replace that of an earlier run."""
        aside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
        earlier = aside.with_name(f"{aside.name}-earlier")
        try:
            model.save_pretrained(aside)
            Record(self.options.data, self.pixels, self.options.batch_size, self.data.labels).write(aside)
            if folder.exists():
                folder.rename(earlier)
            aside.rename(folder)
        except BaseException:
            if earlier.exists():
                earlier.rename(folder)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(earlier, ignore_errors=True)


def chosen_methods(text: str) -> list[str]:
    """Names of methods, of this library or of peft, from what a user typed; `all` are those of this library.

    Raises:
        ValueError: an unknown name, a name twice, a method for videos, or none.
    """
    if text == "all":
        return [name for name, method in list_methods().items() if not method.video]
    names = [any_method(name.strip()).name for name in text.split(",") if name.strip()]
    for name in names:
        if any_method(name).video:
            raise ValueError(f"method={name!r} takes videos, and the demonstration has images.")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"method={text!r}: name each method once, separated by commas, or say 'all'.")
    return names


def demo_table(rows: list[Row]) -> str:
    """The table that the demonstration prints."""
    header = ("method", "trainable", "without head", "adapter bytes", "accuracy", "reloaded", "seconds")
    cells = [
        (
            row.method,
            f"{row.trainable:,}",
            f"{row.trainable_without_head:,}",
            "-" if row.adapter_bytes is None else f"{row.adapter_bytes:,}",
            f"{row.accuracy:.3f}",
            "-" if row.reloaded_correct is None else f"{row.reloaded_correct / row.total:.3f}",
            f"{row.seconds:.0f}",
        )
        for row in rows
    ]
    return format_table(header, cells, right=header[1:])


def run_demo(options: DemoOptions) -> int:
    """Run the demonstration and print its table.

    Returns:
        0, or 1 if a reloaded adapter does not give the accuracy it had.
    """
    transformers_logging.disable_progress_bar()  # one bar per method is enough
    demonstration = Demonstration(options)
    print(demonstration.describe(), flush=True)
    rows = [demonstration.probe()]
    for name in demonstration.methods:
        row = demonstration.run(name)
        rows.append(row)
        print(
            f"{name}: accuracy {row.accuracy:.3f}; saved in {options.output_dir / name}; reloaded in a new process: "
            f"{(row.reloaded_correct or 0) / row.total:.3f}",
            flush=True,
        )
    print(f"\n{demo_table(rows)}", flush=True)
    if options.json is not None:
        _write_json(options.json, demonstration, rows)
    failed = [row for row in rows if not row.reloads]
    for row in failed:
        print(
            f"error: {row.method} gave {row.correct} correct predictions of {row.total} before saving and "
            f"{row.reloaded_correct} after reloading.",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _write_json(path: Path, demonstration: Demonstration, rows: list[Row]) -> None:
    options = demonstration.options
    content: dict[str, Any] = {
        "model": demonstration.checkpoint if options.model_name_or_path else DESCRIPTION,
        "data": asdict(options.data),
        "train_images": len(demonstration.data.train),
        "test_images": len(demonstration.data.test),
        "image_size": demonstration.pixels.image_size,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "rows": [
            asdict(row)
            | {
                "accuracy": row.accuracy,
                "reloaded_accuracy": None if row.reloaded_correct is None else row.reloaded_correct / row.total,
            }
            for row in rows
        ],
    }
    write_aside(path, json.dumps(content, indent=2) + "\n")


def _absolute(name: str) -> str:
    """A local folder's full path; names on the Hub and `digits` as they are."""
    return str(Path(name).resolve()) if name != DIGITS and Path(name).is_dir() else name


def _check_replaceable(folder: Path) -> None:
    """Refuse to overwrite a folder that the demonstration did not write."""
    if folder.exists() and not (folder / RECORD_FILE).is_file():
        raise ValueError(
            f"output_dir={str(folder.parent)!r}: {folder} exists and was not saved by the demonstration; choose "
            "another --output_dir."
        )
