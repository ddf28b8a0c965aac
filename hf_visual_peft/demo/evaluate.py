"""Evaluate a saved adapter from the files in its folder alone: `python -m hf_visual_peft.demo.evaluate FOLDER`.

The demonstration runs this in a new process, so that its report on the reloaded adapter depends only on the files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .data import DataOptions
from .models import PixelOptions


RECORD_FILE = "demo.json"


@dataclass(frozen=True)
class Record:
    """What a second process needs to know besides the adapter; a file in the adapter's folder.

    Attributes:
        data: which images.
        pixels: how they become inputs.
        batch_size: images per step, because sums of floats depend on it.
        labels: class names by label.
    """

    data: DataOptions
    pixels: PixelOptions
    batch_size: int
    labels: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Write the record into an adapter's folder."""
        (folder / RECORD_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Read what `write` wrote.

        Raises:
            ValueError: there is no such file in the folder, or it is damaged.
        """
        path = folder / RECORD_FILE
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            pixels: dict[str, Any] = {
                key: tuple(v) if isinstance(v, list) else v for key, v in fields["pixels"].items()
            }
            return cls(
                DataOptions(**fields["data"]), PixelOptions(**pixels), fields["batch_size"], tuple(fields["labels"])
            )
        except FileNotFoundError:
            raise ValueError(f"{folder} has no {RECORD_FILE}: name a folder that the demonstration saved.") from None
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged: {error!r}.") from error


def evaluate_adapter(folder: Path) -> tuple[int, int]:
    """Load an adapter on its base model and count correct predictions on the test images.

    Args:
        folder: an adapter that the demonstration saved.

    Returns:
        Correct predictions and images.

    Raises:
        ValueError: the folder is not one of the demonstration's, or the dataset has changed.
    """
    from accelerate import Accelerator
    from peft import PeftConfig, PeftModel

    from .data import load_data, preprocess
    from .models import forward_options, load_classifier
    from .training import count_correct

    record = Record.read(folder)
    data = load_data(record.data)
    if data.labels != record.labels:
        raise ValueError(f"{record.data.dataset_name} no longer has the classes that the adapter was trained on.")
    base = load_classifier(PeftConfig.from_pretrained(folder).base_model_name_or_path, record.labels)
    options = forward_options(base, record.pixels.image_size)
    model = PeftModel.from_pretrained(base, folder)
    test = preprocess(data.test, **asdict(record.pixels))
    return count_correct(model, test, record.batch_size, Accelerator(), options), len(test)


def evaluate_in_new_process(folder: Path) -> tuple[int, int]:
    """Run this module on an adapter in a fresh interpreter.

    Returns:
        Correct predictions and images.

    Raises:
        RuntimeError: the process failed; the message ends with what it printed last.
    """
    command = [sys.executable, "-m", __name__, str(folder.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    return result["correct"], result["total"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the result as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m hf_visual_peft.demo.evaluate", description=__doc__)
    parser.add_argument("folder", type=Path, help="an adapter that the demonstration saved")
    correct, total = evaluate_adapter(parser.parse_args(argv).folder)
    print(json.dumps({"correct": correct, "total": total, "accuracy": correct / total}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
