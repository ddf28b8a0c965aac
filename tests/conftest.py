import os


# before any library reads them: no test talks to the Hub, and workers share two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True)
def _seeded_and_single_threaded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    """A folder of images with two classes, dark and light, and no test split."""
    folder = tmp_path_factory.mktemp("shades")
    generator = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 156)):
        (folder / name).mkdir()
        for index in range(20):
            pixels = generator.integers(low, low + 100, size=(24, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder
