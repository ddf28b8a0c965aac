"""A tiny model, images and clips, and the recipe run on them in this process."""

import io
from types import SimpleNamespace

import datasets
import image_classification
import image_sources
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from recipe_runs import SIZE, TEST_IMAGES, paint
from transformers import ViTConfig, ViTImageProcessor, ViTModel


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("models") / "vit")
    ViTModel(ViTConfig(**SIZE, intermediate_size=128)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, counts in {"train": (8, 8, 6), "validation": (5, 5, 5), "test": (4, 4, TEST_IMAGES - 8)}.items():
        for name, channel, count in zip(("red", "green", "blue"), range(3), counts, strict=True):
            for number in range(count):
                paint(folder / split / name / f"{number}.png", channel, rng)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A data set of lists of frames, from 3 to 9 of them; the number of the frame is its brightness."""
    folder = tmp_path_factory.mktemp("clips")
    encoded = {"bytes": None}

    def frame(number):
        file = io.BytesIO()
        Image.new("RGB", (20, 24), (20 * number,) * 3).save(file, "PNG")
        return encoded | {"bytes": file.getvalue()}

    features = datasets.Features(
        {"frames": datasets.List(datasets.Image()), "label": datasets.ClassLabel(names=["up", "down"])}
    )
    rows = {"frames": [], "label": []}
    for index in range(14):
        numbers = range(3 + index % 7)
        rows["frames"].append([frame(n) for n in (numbers if index % 2 == 0 else reversed(numbers))])
        rows["label"].append(index % 2)
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": whole, "validation": whole, "test": whole}).save_to_disk(folder)
    return folder


@pytest.fixture(autouse=True)
def _cpu_and_caches(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def run(vit, photos, tmp_path):
    def call(*flags, method="vpt", data=None, output="out"):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if data is None:
            data = [word for split in image_sources.SPLITS for word in (f"--{split}_dir", str(photos / split))]
        common = ["--num_train_epochs", "2", "--per_device_train_batch_size", "4", "--learning_rate", "0.01"]
        common += ["--output_dir", str(tmp_path / output), *([] if method is None else ["--method", method])]
        words = ["--model_name_or_path", vit, *data, *common, *map(str, flags)]
        return SimpleNamespace(output=tmp_path / output, results=image_classification.main(words))

    return call
