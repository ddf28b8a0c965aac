"""What `scale.py` measures: training steps, many adapters on one backbone, a path of many images, whole machines."""

from __future__ import annotations

import argparse
import concurrent.futures
import gc
import io
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import hf_visual_peft
from hf_visual_peft.peft_methods.methods import PEFT_METHODS


HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "recipes")]

from image_data import decode, prepare_data  # noqa: E402
from image_sources import load_splits  # noqa: E402
from step_rounds import (  # noqa: E402
    ACTIVATIONS,
    FORWARD,
    FULL,
    LABELS,
    Contestant,
    example,
    kept_bytes,
    ratio,
    start_gradients_after,
    take_turns,
    train_once,
)


FIELDS: dict[str, dict[str, Any]] = {"vpt": {"num_virtual_tokens": 10}, "adaptformer": {}, "ssf": {}, "lst": {}}
LORA = "peft-lora"
METHODS = (*FIELDS, LORA)
BATCH = 32  # of the path of images
SOURCE_SIDE, INPUT_SIDE = 96, 64  # pixels of the images on disk and of the inputs
LOOKS = 20  # at the memory, on the way through all images
SHARD = 1000  # images in a file; Arrow reads ahead and may hold all of it
BUFFER = 1000  # images among which the stream is shuffled; `datasets` fills it from ten files at a time


@dataclass(frozen=True)
class Setup:
    """What figures must share to be compared."""

    threads: int = 2
    rounds: int = 5
    torch: str = field(default_factory=lambda: torch.__version__.partition("+")[0])


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        part: what is varied.
        case: a method, a model or a path of data; empty where all methods took turns.
        size: value of what is varied.
        values: what was found.
        setup: under what.
    """

    part: str
    case: str
    size: int
    values: dict[str, Any]
    setup: dict[str, Any]


@dataclass(frozen=True)
class Size:
    """A plain vision transformer.

    Attributes:
        title: in the page.
        width: of its tokens.
        heads: of its attention.
        blocks: number of them.
        patch: side, pixels.
        swiglu: whether it is DINOv2's giant, with gated MLPs.
    """

    title: str
    width: int
    heads: int
    blocks: int
    patch: int = 16
    swiglu: bool = False

    def build(self, image_size: int, device: str = "cpu") -> nn.Module:
        """The model, frozen, with random weights."""
        common = {
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.blocks,
            "image_size": image_size,
            "patch_size": self.patch,
            "num_labels": LABELS,
        }
        with torch.device(device):
            if self.swiglu:
                model: nn.Module = Dinov2ForImageClassification(Dinov2Config(**common, use_swiglu_ffn=True))
            else:
                model = ViTForImageClassification(ViTConfig(**common, intermediate_size=4 * self.width))
        return model.requires_grad_(False)

    def build_empty(self, image_size: int) -> nn.Module:
        """The same with whatever lies in memory for weights: what is kept for the backward pass depends on none."""
        return self.build(image_size, "meta").to_empty(device="cpu")


SIZES = {
    "vit_s": Size("ViT-S/16", 384, 6, 12),
    "vit_b": Size("ViT-B/16", 768, 12, 12),
    "vit_l": Size("ViT-L/16", 1024, 16, 24),
    "vit_g": Size("ViT-g/14", 1536, 24, 40, patch=14, swiglu=True),
}


def config_of(name: str, base: nn.Module) -> PeftConfig:
    """The config of a method; that of peft's LoRA has rank 8, on query and value."""
    if name == LORA:
        return PEFT_METHODS["lora"].config(base)
    return hf_visual_peft.get_method(name).config_cls(**FIELDS[name])


def adapted(name: str, model: nn.Module) -> nn.Module:
    """A frozen backbone with a method, or made one of the floors, or with all weights training."""
    if name == FULL:
        return model.requires_grad_(True)
    if name == ACTIVATIONS:
        start_gradients_after(model.get_submodule(hf_visual_peft.find_backbone(model).embeddings[0]))
    return model if name in (FORWARD, ACTIVATIONS) else get_peft_model(model, config_of(name, model))


def step_cost(size: Size, image_size: int, batch: int, setup: Setup) -> dict[str, Any]:
    """Time and memory of a training step of every method, in turns.

    Returns:
        `seconds` of the floor of activations, and of every contestant `step`, its time relative to that floor, and
        `bytes`, what it keeps for the backward pass.
    """
    inputs = example(batch, image_size)
    contestants = [
        Contestant(name, adapted(name, size.build(image_size)), trains=name != FORWARD)
        for name in (FORWARD, ACTIVATIONS, *METHODS)
    ]
    found: dict[str, Any] = {each.name: {"bytes": kept_bytes(each, inputs)} for each in contestants}
    turns = take_turns(contestants, train_once, inputs, setup.rounds, warmup=1)
    for name, cost in found.items():
        cost["step"] = ratio(turns, name, ACTIVATIONS)
    return {"seconds": statistics.median(turn.step for turn in turns[ACTIVATIONS]), **found}


def model_memory(size: Size, image_size: int) -> dict[str, Any]:
    """Numbers in a backbone and in each adapter, and bytes that one image keeps for the backward pass."""
    inputs = example(1, image_size)
    found: dict[str, Any] = {}
    for name in (*METHODS, FULL):
        model = adapted(name, size.build_empty(image_size))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if name == FULL:
            found["parameters"] = trained
        found[name] = {"trained": trained, "bytes": kept_bytes(Contestant(name, model), inputs)}
        del model
        gc.collect()
    return found


def peak_memory(name: str, size: Size, image_size: int, batch: int) -> dict[str, Any]:
    """The most memory that the process takes for two training steps, and what it is made of."""
    before = own_memory()
    model = adapted(name, size.build(image_size))
    contestant = Contestant(name, model)
    inputs = example(batch, image_size)
    reset_peak()
    for _ in range(2):  # the optimizer takes its memory in the first
        train_once(contestant, *inputs)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "peak": read_peak() - before,
        "weights": 4 * sum(p.numel() for p in model.parameters()),
        "training": 12 * trained,  # gradients, and two moments of AdamW
        "kept": kept_bytes(contestant, inputs),
    }


def own_memory() -> int:
    """Bytes of the process, without the pages of files that the kernel can take back."""
    gc.collect()
    info = psutil.Process().memory_info()
    return info.rss - info.shared


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def read_peak() -> int:
    """The most bytes since `reset_peak`, without the pages of files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0]) - psutil.Process().memory_info().shared


def many_adapters(name: str, counts: Sequence[int], size: Size, image_size: int, setup: Setup) -> list[dict]:
    """Add adapters to one backbone, and look at memory and times on the way.

    Args:
        name: of the method.
        counts: numbers of adapters at which to look, ascending.
        size: of the backbone.
        image_size: of the image that goes through it.
        setup: number of rounds.

    Returns:
        One for each count: `add`, `switch` and `forward`, milliseconds (of `add` the median over the last adapters
        added), `plain`, the forward pass of the backbone alone in the same rounds, `memory`, bytes of the process,
        `parameters`, bytes of one adapter's, and `modules`, the number of its modules.
    """
    plain, base = size.build(image_size), size.build(image_size)
    model = get_peft_model(base, config_of(name, plain), adapter_name="a0")
    pixels, _ = example(1, image_size)
    added, found, choose = [0.0], [], random.Random(0).randrange
    for number in range(1, counts[-1] + 1):
        if number in counts:
            times: dict[str, list[float]] = {"switch": [], "forward": [], "plain": []}
            for _ in range(setup.rounds + 1):
                adapter = f"a{choose(number)}"
                times["switch"].append(milliseconds(partial(model.set_adapter, adapter)))
                with torch.no_grad():
                    times["forward"].append(milliseconds(lambda: model(pixels)))
                    times["plain"].append(milliseconds(lambda: plain(pixels)))
            found.append(
                {key: statistics.median(values[1:]) for key, values in times.items()}
                | {"add": statistics.median(added[-5:]), "memory": own_memory()}
                | adapter_size(model, "a0")
            )
        if number < counts[-1]:
            config = config_of(name, plain)
            added.append(milliseconds(partial(model.add_adapter, f"a{number}", config)))
    return found


def adapter_size(model: PeftModel, adapter: str) -> dict[str, int]:
    """Bytes of an adapter's parameters, and the number of its modules."""
    parameters = [p for key, p in model.named_parameters() if f".{adapter}." in f"{key}."]
    modules = [key for key, _ in model.named_modules() if f".{adapter}." in f"{key}."]
    return {"parameters": sum(p.nbytes for p in parameters), "modules": len(modules)}


def milliseconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - start)


def write_images(folder: Path, count: int) -> str:
    """Parquet files of synthetic JPEG images with labels; every thousandth is the same.

    Returns:
        The pattern of their names.
    """
    rng = np.random.default_rng(0)
    images = []
    for _ in range(min(count, 1000)):
        cells = rng.integers(0, 256, (SOURCE_SIDE // 8, SOURCE_SIDE // 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(cells).resize((SOURCE_SIDE, SOURCE_SIDE)).save(file, "JPEG", quality=85)
        images.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(label) for label in range(LABELS)])}
    )
    # neither compression nor a dictionary: the files are as large as those of distinct images
    for first in range(0, count, SHARD):
        name = folder / f"{first:09}.parquet"
        with pq.ParquetWriter(name, features.arrow_schema, compression="none", use_dictionary=False) as writer:
            for start in range(first, min(first + SHARD, count), len(images)):
                part = images[: count - start]
                labels = [(start + row) % LABELS for row in range(len(part))]
                writer.write_table(pa.table({"image": part, "label": labels}, schema=features.arrow_schema))
    return str(folder / "*.parquet")


def streamed(files: str) -> Iterator[dict[str, Tensor]]:
    """Batches of images that are read from the files as they are needed."""
    processor = ViTImageProcessor(size={"height": INPUT_SIDE, "width": INPUT_SIDE})
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    stream = stream.cast_column("image", datasets.Image(decode=False)).shuffle(seed=0, buffer_size=BUFFER)

    def to_batch(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        images = [decode(row["image"], files) for row in rows]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["label"] for row in rows])}

    return iter(DataLoader(stream, batch_size=BATCH, collate_fn=to_batch))


def mapped(files: str) -> Iterator[dict[str, Tensor]]:
    """Batches of images as the recipe makes them: Arrow files in the cache, mapped into memory, in random order."""
    args = argparse.Namespace(
        **dict.fromkeys(f"{split}_{kind}" for split in ("train", "validation", "test") for kind in ("dir", "split")),
        **dict.fromkeys(("validation_file", "test_file", "dataset_name", "dataset_config_name", "clip_frames")),
        **dict.fromkeys(("image_column_name", "label_column_name", "max_train_samples", "max_eval_samples")),
        **dict.fromkeys(("cache_dir", "token", "data_token", "streaming")),
        train_file=files, train_val_split=0, select="last", seed=0, check_images=True, skip_corrupt_images=False,
        dataloader_num_workers=0, train_crop="none", horizontal_flip=0.5,
    )  # fmt: skip
    processor = ViTImageProcessor(size={"height": INPUT_SIDE, "width": INPUT_SIDE})
    splits, _, _ = prepare_data(args, processor, load_splits(args))
    return iter(DataLoader(splits["train"], batch_size=BATCH, shuffle=True))  # type: ignore[arg-type]


def image_path(path_of_data: str, count: int, folder: str) -> dict[str, float]:
    """Run over all images once and watch the memory.

    Args:
        path_of_data: `"streamed"` or `"mapped"`.
        count: of images.
        folder: for the images and for what `datasets` writes.

    Returns:
        `start`, seconds before the first batch; `rest`, seconds after it; `memory`, bytes that the process took at
        most beyond those before it opened the files, and `growth`, how many more of them in the second half of the
        images than in the first; `disk`, bytes of Arrow files; `files`, of those that were read.
    """
    datasets.disable_progress_bars()
    files = write_images(Path(folder), count)
    written = sum(path.stat().st_size for path in Path(folder).glob("*.parquet"))
    before, start = own_memory(), time.perf_counter()
    seen, first, most = 0, 0.0, [before, before]  # the latter in either half
    for batch in {"streamed": streamed, "mapped": mapped}[path_of_data](files):
        first = first or time.perf_counter()
        seen += len(batch["labels"])
        if LOOKS * seen // count > LOOKS * (seen - len(batch["labels"])) // count:
            half = int(2 * seen > count)
            most[half] = max(most[half], own_memory())
    end = time.perf_counter()
    if seen != count:
        raise RuntimeError(f"{path_of_data}: {seen} of {count} images came out.")
    arrow = sum(path.stat().st_size for path in Path(folder).rglob("*.arrow"))
    return {
        "start": first - start,
        "rest": end - first,
        "memory": max(most) - before,
        "growth": max(most[1] - most[0], 0),
        "disk": arrow,
        "files": written,
    }


@contextmanager
def scratch() -> Iterator[str]:
    """A folder for images, in which `datasets` of child processes keeps its cache, too."""
    with tempfile.TemporaryDirectory() as folder:
        earlier = os.environ.get("HF_DATASETS_CACHE")
        os.environ["HF_DATASETS_CACHE"] = folder
        try:
            yield folder
        finally:
            if earlier is None:
                del os.environ["HF_DATASETS_CACHE"]
            else:
                os.environ["HF_DATASETS_CACHE"] = earlier


def alone(function: Callable[..., Any], *args: Any, threads: int) -> Any:
    """Call a function in a fresh process, whose memory is that of the call."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, torch.set_num_threads, (threads,)) as pool:
        return pool.submit(function, *args).result()
