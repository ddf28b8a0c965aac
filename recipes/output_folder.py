"""What a run writes into its folder: known by name, so that a run finds, keeps or deletes what an earlier one left."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from hf_visual_peft.sharing.card import is_generated


CARD = "README.md"
WRITTEN = (
    *("checkpoint-[0-9]*", "adapter_config.json", "adapter_model.*", "config.json", "model.safetensors"),
    *("model-*-of-*.safetensors", "model.safetensors.index.json", "all_results.json"),
)


def earlier_output(folder: Path) -> list[Path]:
    """What an earlier run left in a folder and the next would write again or mix with its own."""
    return [path for pattern in WRITTEN for path in sorted(folder.glob(pattern))]


def clear(folder: Path) -> None:
    """Delete what earlier runs wrote, with a card of theirs and curves of trackers; anything else stays."""
    remains = [*folder.glob("preprocessor_config.json"), *folder.glob(".checkpoint-*.tmp")]
    for curves in ("events.out.tfevents.*", "hparams.yml"):
        remains += folder.glob(f"image_classification/**/{curves}")
    card = [folder / CARD] if (folder / CARD).exists() and not is_own_readme(folder) else []
    for path in [*earlier_output(folder), *remains, *card]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for empty in sorted(folder.glob("image_classification/**"), reverse=True):
        with contextlib.suppress(OSError):  # it holds something else
            empty.rmdir()


def is_own_readme(folder: Path) -> bool:
    """Whether there is a README that somebody wrote: it is not for us to change."""
    path = folder / CARD
    if not path.exists():
        return False
    try:
        return not is_generated(ModelCard.load(path).text)
    except (ValueError, yaml.YAMLError):  # its head is no metadata
        return True


def publish(folder: Path, *writers: Callable[[Path], object]) -> None:
    """Write files aside and move them into a folder once all are whole; a README that somebody wrote stays."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".tmp") as aside:
        for write in writers:
            write(Path(aside))
        for file in Path(aside).iterdir():
            if not (file.name == CARD and is_own_readme(folder)):
                os.replace(file, folder / file.name)
