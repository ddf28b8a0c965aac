"""Training steps and inference of several models, taken in turns, and what a step keeps in memory.

Needs torch and transformers only, so that other libraries can be measured in an environment of their own.
"""

from __future__ import annotations

import os
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification


MODELS: dict[str, dict[str, int]] = {
    "vit_s": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 12},
    "vit_b": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12},
    "vit_l": {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 24},
}
TITLES = {"vit_s": "ViT-S/16", "vit_b": "ViT-B/16", "vit_l": "ViT-L/16"}
IMAGE_SIZE, LABELS = 224, 10
FORWARD, ACTIVATIONS, FULL = "forward", "activations", "full"  # the two floors, and all weights
Inputs = tuple[Tensor, Tensor]  # images and labels


@dataclass(frozen=True)
class Setup:
    """What figures must share to be compared.

    Attributes:
        device: type of the device.
        threads: of torch, on a CPU.
        cores: of the machine.
        batch: images a step.
        rounds: in which each contestant has one turn; the first two do not count.
        torch: version.
    """

    device: str = "cpu"
    threads: int = 2
    batch: int = 8
    rounds: int = 15
    cores: int = field(default_factory=lambda: os.cpu_count() or 1)
    torch: str = field(default_factory=lambda: torch.__version__.partition("+")[0])


@dataclass
class Contestant:
    """A model that takes turns with others.

    Attributes:
        name: in the results.
        model: returns `logits`.
        trains: whether anything in it does; else a turn is a forward pass without gradients.
        frames: images that make one video, for methods that take videos.
        dtype: half precision that autocast computes in; None for that of the model.
    """

    name: str
    model: nn.Module
    trains: bool = True
    frames: int | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        weights = [p for p in self.model.parameters() if p.requires_grad] if self.trains else []
        self.optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True) if weights else None

    def inputs(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The same images, as the model takes them."""
        if self.frames is None:
            return pixels, labels
        return pixels.unflatten(0, (-1, self.frames)), labels[:: self.frames]

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Of the forward pass, with gradients where anything trains."""
        pixels, labels = self.inputs(pixels, labels)
        half = torch.autocast(pixels.device.type, self.dtype, enabled=self.dtype is not None)
        with torch.set_grad_enabled(self.trains), half:
            return F.cross_entropy(self.model(pixels).logits, labels)


@dataclass(frozen=True)
class Turn:
    """Seconds of one turn.

    Attributes:
        step: forward pass, loss, and backward pass where something trains.
        optimizer: a step of AdamW.
    """

    step: float
    optimizer: float


def build_model(name: str) -> nn.Module:
    """A transformers ViT for images of 224 px with random weights, on which no time depends."""
    return ViTForImageClassification(ViTConfig(**MODELS[name], image_size=IMAGE_SIZE, num_labels=LABELS))


def floors(name: str, device: str) -> list[Contestant]:
    """The contestants that all others are measured against.

    *forward*: a forward pass without gradients. *activations*: forward and backward with gradients of activations
    only, from the loss to the output of the embeddings: what every method pays that acts from the first block on.
    """
    forward, activations = (build_model(name).to(device).requires_grad_(False) for _ in range(2))
    start_gradients_after(activations.get_submodule("vit.embeddings"))
    return [Contestant(FORWARD, forward, trains=False), Contestant(ACTIVATIONS, activations)]


def start_gradients_after(embeddings: nn.Module) -> None:
    """Let the output of frozen embeddings ask for a gradient, as it would if something before it trained."""

    def start_here(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output.requires_grad_(torch.is_grad_enabled())

    embeddings.register_forward_hook(start_here)


def example(batch: int, image_size: int | None = None, device: str = "cpu") -> Inputs:
    """Images, of 224 px if nothing else is said, and labels of one step."""
    side = IMAGE_SIZE if image_size is None else image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, side, side, generator=generator)
    labels = torch.randint(LABELS, (batch,), generator=generator)
    return pixels.to(device), labels.to(device)


def train_once(contestant: Contestant, pixels: Tensor, labels: Tensor) -> Turn:
    """One turn: a training step, or a forward pass where nothing trains."""
    start = _now(pixels)
    loss = contestant.loss(pixels, labels)
    if contestant.trains:
        loss.backward()
    middle = _now(pixels)
    if contestant.optimizer is None:
        return Turn(middle - start, 0.0)
    contestant.optimizer.step()
    end = _now(pixels)
    contestant.optimizer.zero_grad()
    return Turn(middle - start, end - middle)


@torch.no_grad()
def infer_once(contestant: Contestant, pixels: Tensor, labels: Tensor) -> Turn:
    """One turn: a forward pass without gradients."""
    pixels, _ = contestant.inputs(pixels, labels)
    start = _now(pixels)
    contestant.model(pixels)
    return Turn(_now(pixels) - start, 0.0)


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def take_turns(
    contestants: Iterable[Contestant],
    turn: Callable[[Contestant, Tensor, Tensor], Turn],
    inputs: Inputs,
    rounds: int,
    warmup: int = 2,
) -> dict[str, list[Turn]]:
    """Let each contestant have one turn a round, in an order that changes from round to round.

    Args:
        contestants: all of them in memory.
        turn: what to do.
        inputs: images and labels of every turn.
        rounds: how many count.
        warmup: extra rounds before those.

    Returns:
        The turns of each, round by round.
    """
    order, shuffle = list(contestants), random.Random(0).shuffle
    turns: dict[str, list[Turn]] = {contestant.name: [] for contestant in order}
    for number in range(warmup + rounds):
        shuffle(order)
        for contestant in order:
            taken = turn(contestant, *inputs)
            if number >= warmup:
                turns[contestant.name].append(taken)
    return turns


def ratio(turns: Mapping[str, list[Turn]], name: str, to: str, part: str = "step") -> float:
    """Median over the rounds of what a contestant took, relative to another's step in the same round."""
    return statistics.median(getattr(a, part) / b.step for a, b in zip(turns[name], turns[to], strict=True))


class _Kept:
    """What autograd holds in place of a tensor, as long as it needs it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def count_kept(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Count what autograd keeps, meanwhile.

    Args:
        model: whose parameters and buffers do not count.

    Yields:
        A function that tells the bytes of all memory that is kept just now for a backward pass, each counted once.
    """
    alive: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor.detach())  # with its graph it would hold the node that holds it, for ever
        alive.add(kept)
        return kept

    def total() -> int:
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        storages = {k.tensor.untyped_storage().data_ptr(): k.tensor.untyped_storage().nbytes() for k in alive}
        return sum(size for address, size in storages.items() if address not in own)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        yield total


def kept_bytes(contestant: Contestant, inputs: Inputs) -> int:
    """Bytes that a training step needs beside the model.

    On a CPU what the forward pass leaves for the backward pass; on a GPU the most that was allocated at a time.
    """
    model = contestant.model
    if inputs[0].is_cuda:
        train_once(contestant, *inputs)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = contestant.loss(*inputs)
        if contestant.trains:
            loss.backward()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with count_kept(model) as kept:
            loss = contestant.loss(*inputs)
            peak = kept()
    model.zero_grad()
    return peak


def median_ms(action: Callable[[], Any], undo: Callable[[], Any] = lambda: None, times: int = 5) -> float:
    """Median time of an action in milliseconds, each time after undoing the last one, and not counting that."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        taken.append(1e3 * (time.perf_counter() - start))
        undo()
    return statistics.median(taken)
