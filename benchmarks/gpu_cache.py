"""How fast cached features reach a card: through a loader with workers and pinned memory, against the card's limit."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_fast import Scale, forget, wait
from gpu_rows import Case
from peft import get_peft_model
from step_methods import config_of
from step_rounds import LABELS
from torch.utils.data import DataLoader, Dataset

from hf_visual_peft import FeatureCache


METHODS = ("linearprobe", "lst")
IMAGES, EPOCHS, WORKERS, LIMIT_STEPS = 512, 2, 8, 20
LOADERS: dict[str, dict[str, Any]] = {  # ways to bring features to the card
    "plain": {},
    "pinned": {"pin_memory": True},
    "workers": {"num_workers": WORKERS, "persistent_workers": True},
    "workers_pinned": {"num_workers": WORKERS, "persistent_workers": True, "pin_memory": True},
}


class Pictures(Dataset[dict[str, Any]]):
    """Random images, made when they are asked for, the same every time.

    Args:
        count: how many.
        scale: how large they are.
    """

    def __init__(self, count: int, scale: Scale) -> None:
        self.count = count
        self.pixels = scale.inputs(16)[0].cpu()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index % 16] * (1 + index / self.count), "labels": index % LABELS}


def moved(value: Any, device: torch.device) -> Any:
    """A batch on the device, without waiting where its memory is pinned."""
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return value.to(device, non_blocking=True)


def measure(method: str, scale: Scale) -> dict[str, Any]:
    """Pictures a second of a method by every way to bring features to the card, and what no way can exceed."""
    device, count = scale.device, 4 * scale.batch if scale.smoke else IMAGES
    model: Any = scale.model("vit_b")
    model = get_peft_model(model, config_of(method, model)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def steps(batches: Iterable[Any]) -> int:
        seen = 0
        for batch in batches:
            batch = moved(batch, device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = F.cross_entropy(model(**batch).logits, batch["labels"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen += len(batch["labels"])
        return seen

    def rate(epoch: Callable[[], Any]) -> float:
        wait(device)
        start = time.perf_counter()
        seen = epoch()
        wait(device)
        return seen / (time.perf_counter() - start)

    pictures = Pictures(count, scale)
    found: dict[str, Any] = {"images": count, "batch": scale.batch}
    with tempfile.TemporaryDirectory() as folder, torch.autocast(device.type, torch.bfloat16):
        options: dict[str, Any] = {"dtype": "float16", "batch_size": scale.batch, "progress": False}
        cache = FeatureCache(model, folder, **options)
        cached: Any = None

        def fill() -> int:
            nonlocal cached
            cached = cache.cached(pictures, key="pictures")
            return count

        found["filling"] = rate(fill)
        found["bytes_per_image"] = cached.bytes_per_image
        images = moved({k: v[: scale.batch] for k, v in next(iter(DataLoader(pictures, scale.batch))).items()}, device)
        features = moved(cached.collate(cached.__getitems__(list(range(scale.batch)))), device)
        limit = 2 if scale.smoke else LIMIT_STEPS
        for name, batch in (("images_on_card", images), ("limit", features)):
            steps([batch] * 2)
            found[name] = rate(lambda batch=batch: steps([batch] * limit))  # type: ignore[misc]
        for name, choice in LOADERS.items():
            chosen = dict(choice)
            if scale.smoke and chosen.get("num_workers"):
                chosen["num_workers"] = 1
            if device.type != "cuda":
                chosen.pop("pin_memory", None)
            loader = DataLoader(cached, scale.batch, shuffle=True, collate_fn=cached.collate, **chosen)
            steps(loader)  # which starts the workers
            found[name] = rate(lambda loader=loader: sum(steps(loader) for _ in range(EPOCHS)))  # type: ignore[misc]
            del loader
        cache.close()
    forget(device)
    return found


def cases(device: torch.device, smoke: bool, methods: Sequence[str] = METHODS) -> list[Case]:
    """A method that caches a vector per image, and one that caches all tokens after every block."""
    scale = Scale.of(device, smoke)
    return [Case("cache", name, partial(measure, name, scale)) for name in METHODS if name in methods]
