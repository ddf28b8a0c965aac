"""Training and counting of correct predictions: one loop for the probe and every method."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler

from ..training.parameters import parameter_groups


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        epochs: passes over the images; the last one counts.
        batch_size: images per step.
        lr: peak learning rate of AdamW, reached after the warm-up and falling to 0 along a cosine.
        seed: of the order of the images.
        weight_decay: of AdamW, for parameters that decay (`parameter_groups`).
        warmup_share: fraction of all steps for the warm-up.
    """

    epochs: int
    batch_size: int
    lr: float
    seed: int
    weight_decay: float = 0.01
    warmup_share: float = 0.1


def train(
    model: nn.Module,
    images: Dataset,
    options: TrainingOptions,
    accelerator: Accelerator,
    description: str,
    forward_options: dict[str, Any],
) -> float:
    """Train the parameters of the model that require a gradient.

    Args:
        model: classifier that returns `logits`.
        images: rows of `pixel_values` and `labels`.
        options: how.
        accelerator: device and precision.
        description: shown beside the progress bar.
        forward_options: extra arguments of the model.

    Returns:
        Seconds it took.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(options.seed)
    loader = DataLoader(images, batch_size=options.batch_size, shuffle=True, generator=generator)
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.lr)
    steps = options.epochs * len(loader)
    warmup = int(options.warmup_share * steps)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    model.train()
    start = time.perf_counter()
    with tqdm(total=steps, desc=description, unit="step", mininterval=0.5) as bar:
        for _ in range(options.epochs):
            for batch in loader:
                labels = batch.pop("labels")
                loss = F.cross_entropy(model(**batch, **forward_options).logits, labels)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                value = loss.item()
                if value != value:
                    raise FloatingPointError(
                        f"{description}: the loss is not a number at lr={options.lr}: choose a lower --lr."
                    )
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
                bar.update()
    return time.perf_counter() - start


@torch.inference_mode()
def count_correct(
    model: nn.Module, images: Dataset, batch_size: int, accelerator: Accelerator, forward_options: dict[str, Any]
) -> int:
    """How many images the model puts in the right class; arguments as in `train`."""
    model, loader = accelerator.prepare(model, DataLoader(images, batch_size=batch_size))
    model.eval()
    correct = 0
    for batch in loader:
        labels = batch.pop("labels")
        correct += int((model(**batch, **forward_options).logits.argmax(dim=-1) == labels).sum())
    return correct
