import functools
import gc
import os


# before any library reads them: no test talks to the Hub, and workers share two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jinja2
import numpy as np
import peft
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers.integrations.peft import MIN_PEFT_VERSION


# Millions of objects live as long as the tests: libraries, and the tests themselves. Searching them for garbage took a
# third of a test's time, so it is done rarely, and never among what is there at the start.
gc.set_threshold(20_000, 20, 20)
# every `save_pretrained` compiles the same template of a card
jinja2.Template = functools.lru_cache(jinja2.Template)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Skip what transformers refuses because it asks for a newer peft, which may not be out yet."""
    try:
        return (yield)
    except ValueError as error:
        refused = Version(peft.__version__) < Version(MIN_PEFT_VERSION) and "version of PEFT" in str(error)
        if not refused:
            raise
        pytest.skip(
            f"transformers {transformers.__version__} takes adapters with peft {MIN_PEFT_VERSION} or newer; "
            f"this is peft {peft.__version__}."
        )


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


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of tiny dual encoders by their family, each made when a test first asks for it."""
    from dual_encoders import saved

    class Folders(dict):
        def __missing__(self, family):
            with torch.random.fork_rng():  # a test has the same numbers wherever it runs first
                self[family] = saved(family, tmp_path_factory.mktemp(family))
            return self[family]

    return Folders()


@pytest.fixture(params=["clip", "siglip"])
def family(request):
    return request.param


@pytest.fixture
def base(folders, family):
    """A classifier of the family."""
    from dual_encoders import classifier

    return classifier(folders[family])
