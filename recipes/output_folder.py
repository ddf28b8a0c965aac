"""The files that a run writes into its folder, so that a later run can find, keep or delete them."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from hf_visual_peft.sharing.card import is_generated


CARD = "README.md"
WRITTEN = (
    *("checkpoint-[0-9]*", "adapter_config.json", "adapter_model.*", "config.json", "model.safetensors"),
    *("model-*-of-*.safetensors", "model.safetensors.index.json", "all_results.json"),
    *("search-[0-9]*.json", "subnet.yaml"),
)


@contextlib.contextmanager
def unless_it_fails(folder: Path) -> Iterator[None]:
    """After an error in the context, delete the folder and those around it that did not exist before, if empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in new:
            with contextlib.suppress(OSError):  # something is in it
                path.rmdir()
        raise


def make(folder: Path) -> None:
    """Make a folder for output.

    Raises:
        ValueError: that is not possible, or no file can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"--output_dir {folder}: no file can be written there ({error.strerror}: {error.filename}). Give a folder "
            "that you may write to; it is made if it does not exist."
        ) from error


def earlier_output(folder: Path) -> list[Path]:
    """Files of an earlier run that the next run would overwrite or mix with its own."""
    return [path for pattern in WRITTEN for path in sorted(folder.glob(pattern))]


def clear(folder: Path) -> None:
    """Delete the files of earlier runs, with their cards and logs of trackers; other files stay."""
    remains = [*folder.glob("preprocessor_config.json"), *folder.glob(".checkpoint-*.tmp")]
    for curves in ("events.out.tfevents.*", "hparams.yml"):
        remains += folder.glob(f"image_classification/**/{curves}")
    card = [folder / CARD] if (folder / CARD).exists() and not is_own_readme(folder) else []
    for path in [*earlier_output(folder), *remains, *card]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for empty in sorted(folder.glob("image_classification/**"), reverse=True):
        with contextlib.suppress(OSError):  # it holds other files
            empty.rmdir()


def is_own_readme(folder: Path) -> bool:
    """Whether there is a README that a user wrote, which we must not change."""
    path = folder / CARD
    if not path.exists():
        return False
    try:
        return not is_generated(ModelCard.load(path).text)
    except (ValueError, yaml.YAMLError):  # it does not begin with metadata
        return True


def publish(folder: Path, *writers: Callable[[Path], object]) -> None:
    """Write files to a temporary folder and move them once all are complete; a README that a user wrote stays."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".tmp") as aside:
        for write in writers:
            write(Path(aside))
        for file in Path(aside).iterdir():
            if not (file.name == CARD and is_own_readme(folder)):
                os.replace(file, folder / file.name)
