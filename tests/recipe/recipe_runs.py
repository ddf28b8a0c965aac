"""What the tests of the recipe share: sizes, and looks at what a run left."""

import argparse
from pathlib import Path

import image_classification
import numpy as np
import pytest
import torch
from image_sources import SPLITS, load_splits
from PIL import Image


RECIPES = Path(image_classification.__file__).parent
SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
LABELS = {"num_labels": 3, "id2label": {0: "blue", 1: "green", 2: "red"}}
TEST_IMAGES = 11  # odd, so that two processes must pad


def paint(path, channel, rng):
    pixels = rng.integers(0, 200, (20, 24, 3))
    pixels[..., channel] += 12  # a hint of colour: learnable, and not at once
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def fails(capsys, call, *flags, **more):
    """The message with which the parser refuses."""
    with pytest.raises(SystemExit) as stop:
        call(*flags, **more)
    assert stop.value.code == 2
    return capsys.readouterr().err


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def accuracy_by_hand(model, folder, processor, names=("blue", "green", "red")):
    hits = []
    for label, name in enumerate(names):
        for path in sorted((folder / name).iterdir()):
            inputs = processor(images=Image.open(path).convert("RGB"), return_tensors="pt")
            with torch.no_grad():
                hits.append(model.eval()(**inputs).logits.argmax().item() == label)
    return sum(hits) / len(hits)


def data_args(**given):
    """Flags of the data that are not given, and those that are."""
    kinds = [f"{split}_{kind}" for split in SPLITS for kind in ("dir", "file", "split")]
    names = ["dataset_name", "dataset_config_name", "image_column_name", "label_column_name", "cache_dir", "token"]
    names += ["data_token", "clip_frames", "train_val_split", "max_train_samples", "max_eval_samples"]
    given = {"streaming": False} | {
        name: str(value) if isinstance(value, Path) else value for name, value in given.items()
    }
    return argparse.Namespace(**dict.fromkeys([*kinds, *names]) | given)


def load(**given):
    return load_splits(data_args(**given))
