"""Time and memory of training steps on a card: what `step.py` measures, by the clock and the allocator of the card.

A contestant takes turns with both floors of `step_rounds`, and each turn is some steps on end without waiting, as in a
training loop: where the host is ahead, that is the time of the card; where it is behind, that of the host.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_rows import Case
from step_methods import contestant, setting_of
from step_rounds import (
    ACTIVATIONS,
    FORWARD,
    FULL,
    IMAGE_SIZE,
    LABELS,
    Contestant,
    Inputs,
    Setup,
    Turn,
    build_model,
    example,
    kept_bytes,
    ratio,
    start_gradients_after,
    take_turns,
    train_once,
)
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import hf_visual_peft
from hf_visual_peft.sites import VisualTunerLayer


METHODS = (FULL, "peft-lora", "peft-ln-tuning", *hf_visual_peft.list_methods())
# what has a target first, as time may run out
TARGETED = (
    *("adaptformer", "adapterplus", "pfeiffer", "vpt", "ssf", "sharedlora", "fact", "lst", "restuning"),
    *("sidetuning", "last", "e3va", "vqt", "dtl"),
)
SOME = ("adaptformer", "vpt", "ssf", "peft-lora", "lst", "sharedlora")  # where everything would take too long
LARGE = (FULL, "peft-lora", "adaptformer", "vpt", "ssf", "lst")
LIMITS = (FULL, "peft-lora", "vpt", "lst")
EAGER, COMPILED, GRAPH, PARTLY, INT8 = "eager", "compile", "graph", "compile-adapter", "int8"
FRAMES = 8


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        device: that is measured.
        batch: images a step.
        rounds: in which each contestant has one turn; one more does not count.
        steps: of a turn.
        smoke: whether models and images are of no size to speak of.
    """

    device: torch.device
    batch: int = 64
    rounds: int = 5
    steps: int = 3
    smoke: bool = False

    @classmethod
    def of(cls, device: torch.device, smoke: bool) -> Scale:
        """The usual one, or one of no size to speak of."""
        return cls(device, batch=8, rounds=1, steps=1, smoke=True) if smoke else cls(device)

    def inputs(self, batch: int | None = None) -> Inputs:
        """Images and labels of a step."""
        if batch is None:
            return example(self.batch, 32 if self.smoke else None, str(self.device))
        side = 32 if self.smoke else IMAGE_SIZE
        pixels = torch.randn(batch, 3, side, side, device=self.device)  # thousands would take long on the host
        return pixels, torch.randint(LABELS, (batch,), device=self.device)

    def model(self, name: str) -> nn.Module:
        """A model with random weights on the device."""
        if not self.smoke:
            with self.device:  # where they are drawn much faster
                return build_model(name)
        sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 2}
        return ViTForImageClassification(ViTConfig(**sizes, image_size=32, num_labels=LABELS)).to(self.device)


@dataclass(frozen=True)
class CardTurn(Turn):
    """Seconds a step of one turn.

    Attributes:
        host: until the host has launched all of it.
    """

    host: float = 0.0


def mark(device: torch.device) -> Any:
    """A point in time, by the clock of the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(start: Any, end: Any) -> float:
    """Between two points, once the device has reached both."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def wait(device: torch.device) -> None:
    """Until the device has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Runs:
    """Forward and backward passes of contestants, in one mode.

    Args:
        scale: how large everything is.
        mode: `"eager"`, `"compile"`, `"graph"` or `"compile-adapter"`.
    """

    def __init__(self, scale: Scale, mode: str) -> None:
        self.scale, self.mode = scale, mode
        self.graphs: dict[str, Callable[[], Any]] = {}

    def prepare(self, each: Contestant, inputs: Inputs) -> None:
        """Compile or record what the mode asks for."""
        if self.mode in (COMPILED, PARTLY):
            torch._dynamo.config.recompile_limit = 64  # one function serves many contestants
        options: Any = {"dynamic": False, "backend": "eager" if self.scale.smoke else "inductor"}
        if self.mode == COMPILED:
            each.model = torch.compile(each.model, **options)  # type: ignore[assignment]
        elif self.mode == PARTLY:
            for module in equations_of(each.model):
                module.compile(**options)
        elif self.mode == GRAPH:
            self.graphs[each.name] = self._recorded(each, inputs)

    def _recorded(self, each: Contestant, inputs: Inputs) -> Callable[[], Any]:
        def once() -> None:
            loss = each.loss(*inputs)
            if each.trains:
                loss.backward()

        if self.scale.device.type != "cuda":
            return once
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                once()
                each.model.zero_grad()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        return graph.replay

    def turn(self, each: Contestant, *inputs: Any) -> CardTurn:
        """Some steps on end."""
        device, marks = self.scale.device, []
        recorded = self.graphs.get(each.name)
        start = time.perf_counter()
        for _ in range(self.scale.steps):
            first = mark(device)
            if recorded is not None:
                recorded()
            else:
                loss = each.loss(*inputs)
                if each.trains:
                    loss.backward()
            second = mark(device)
            if each.optimizer is not None:
                each.optimizer.step()
            marks.append((first, second, mark(device)))
            if each.optimizer is not None and recorded is None:  # a graph writes into the same gradients again
                each.optimizer.zero_grad()
        host = (time.perf_counter() - start) / self.scale.steps
        wait(device)
        step = statistics.mean(seconds(a, b) for a, b, _ in marks)
        return CardTurn(step, statistics.mean(seconds(b, c) for _, b, c in marks), host)


def equations_of(model: nn.Module) -> list[nn.Module]:
    """What the adapter layers of a model compute with, each once."""
    found: dict[int, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, VisualTunerLayer):
            for name, child in layer.named_children():
                if isinstance(child, nn.ModuleDict) and name != "base_layer":
                    found |= {id(module): module for module in child.values()}
    return list(found.values())


class Track:
    """Measures contestants on one model in one mode, with floors that stay.

    Args:
        model: key of `step_rounds.MODELS`.
        mode: as of `Runs`, or `"int8"`, which is eager on a backbone with quantised weights.
        scale: how large everything is.
    """

    def __init__(self, model: str, mode: str, scale: Scale) -> None:
        self.model, self.mode, self.scale = model, mode, scale
        self.inputs = scale.inputs()
        torch.manual_seed(0)
        self.template = scale.model(model).requires_grad_(False)
        self.runs = Runs(scale, EAGER if mode == INT8 else mode)
        behind = copy.deepcopy(self.template)
        start_gradients_after(behind.get_submodule("vit.embeddings"))
        self.floors = [
            Contestant(FORWARD, copy.deepcopy(self.template), trains=False, dtype=torch.bfloat16),
            Contestant(ACTIVATIONS, behind, dtype=torch.bfloat16),
        ]
        for floor in self.floors:
            self.runs.prepare(floor, self.inputs)

    def contestant(self, name: str) -> Contestant:
        """A method on a copy of the model, ready to train."""
        base = copy.deepcopy(self.template)
        if name == FULL:
            base.requires_grad_(True)
        if self.mode == INT8:
            base = quantised(base)
        setup = Setup(device=str(self.scale.device), batch=self.scale.batch)
        found = contestant(name, self.model, setup, base)
        found.dtype = torch.bfloat16
        if found.frames is not None:
            found.frames = FRAMES
        found.model.train()
        return found

    def measure(self, name: str) -> dict[str, Any]:
        """Figures of a contestant."""
        runs, inputs = self.runs, self.inputs
        own = [] if name in (FORWARD, ACTIVATIONS) else [self.contestant(name)]
        for each in own:
            runs.prepare(each, inputs)
        everyone = [*self.floors, *own]
        turns: Any = take_turns(everyone, runs.turn, inputs, self.scale.rounds, warmup=1)
        mine = next(each for each in everyone if each.name == name)
        median = {
            each.name: {
                part: 1e3 * statistics.median(getattr(turn, part) for turn in turns[each.name])
                for part in ("step", "optimizer", "host")
            }
            for each in everyone
        }
        runs.graphs.pop(name, None) if own else None
        failed = {}
        if not all(p.isfinite().all() for p in mine.model.parameters() if p.requires_grad):
            failed["finite"] = "parameters are not finite after training"
        return {
            "step": ratio(turns, name, ACTIVATIONS),
            "step_to_forward": ratio(turns, name, FORWARD),
            "optimizer": ratio(turns, name, ACTIVATIONS, "optimizer"),
            "ms": median[name],
            "activations_ms": median[ACTIVATIONS],
            "forward_ms": median[FORWARD],
            "peak": self._peak(mine),
            "held": held_bytes(mine),
            "trained": sum(p.numel() for p in mine.model.parameters() if p.requires_grad),
            "batch": self.scale.batch,
            "setting": setting_of(name),
            **({"failed": failed} if failed else {}),
        }

    def _peak(self, each: Contestant) -> int | None:
        """Bytes that a step allocates at most; a graph has a pool of its own, and quantised weights no one address."""
        if self.mode == GRAPH or (self.mode == INT8 and self.scale.device.type != "cuda"):
            return None
        return kept_bytes(each, self.inputs)


def held_bytes(each: Contestant) -> int:
    """Bytes of the model and of the optimizer's state."""
    tensors: list[Any] = [*each.model.parameters(), *each.model.buffers()]
    states = each.optimizer.state.values() if each.optimizer is not None else ()
    tensors += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def quantised(model: nn.Module) -> nn.Module:
    """The model in bfloat16, whose blocks' linears have int8 weights of torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = model.to(torch.bfloat16)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda m, name: isinstance(m, nn.Linear) and "layer" in name)
    return model


_TRACK: list[Track] = []  # the last one, whose floors serve the next case


def measure(model: str, mode: str, name: str, scale: Scale) -> dict[str, Any]:
    """Figures of a contestant on a model in a mode."""
    if not _TRACK or (_TRACK[0].model, _TRACK[0].mode, _TRACK[0].scale) != (model, mode, scale):
        _TRACK.clear()
        forget(scale.device)
        _TRACK.append(Track(model, mode, scale))
    try:
        return _TRACK[0].measure(name)
    finally:
        forget(scale.device)


def forget(device: torch.device) -> None:
    """Give back what nothing holds any more; peft models hold themselves."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def largest_batch(name: str, scale: Scale, model: str = "vit_l", most: int = 1 << 14) -> dict[str, Any]:
    """The largest batch that a training step was seen to fit with, and the smallest that it was seen not to.

    Args:
        name: of the contestant.
        scale: how large everything is.
        model: key of `step_rounds.MODELS`.
        most: batch that is not exceeded.
    """
    _TRACK.clear()
    forget(scale.device)
    base = scale.model(model)
    setup = Setup(device=str(scale.device), batch=scale.batch)
    each = contestant(name, model, setup, base)
    each.dtype = torch.bfloat16
    each.model.train()
    fits, fails, peaks = 0, None, {}
    batch = scale.batch
    while batch <= most and (fails is None or fails - fits > max(8, fits // 16)):
        try:
            inputs = scale.inputs(batch)
            if scale.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            train_once(each, *inputs)
            fits = batch
            peaks[batch] = torch.cuda.max_memory_allocated() if scale.device.type == "cuda" else None
        except torch.OutOfMemoryError:
            fails = batch
            each.model.zero_grad()
        inputs = None  # type: ignore[assignment]
        forget(scale.device)
        batch = 2 * fits if fails is None else (fits + fails) // 2 // 8 * 8
        if batch <= fits:
            break
    return {"fits": fits, "fails": fails, "peak": peaks.get(fits), "model": model}


def cases(part: str, device: torch.device, smoke: bool, methods: Sequence[str] = METHODS) -> list[Case]:
    """The cases of one of the parts of this file, most telling first."""
    scale = Scale.of(device, smoke)

    def some(model: str, mode: str, names: Sequence[str]) -> list[Case]:
        names = [FULL, ACTIVATIONS, *(name for name in names if name in methods and name != FULL)]
        return [
            Case(part, f"{model}/{mode}/{name}", partial(measure, model, mode, name, scale))
            for name in names
            if name in methods or name == ACTIVATIONS
        ]

    everything = tuple(dict.fromkeys(("peft-lora", "peft-ln-tuning", *TARGETED, *METHODS)))
    by_part: dict[str, Callable[[], list[Case]]] = {
        "base": lambda: some("vit_b", EAGER, everything),
        "small": lambda: some("vit_s", EAGER, everything),
        "graph": lambda: some("vit_b", GRAPH, ("peft-lora", *TARGETED)),
        "compile": lambda: some("vit_b", COMPILED, SOME),
        "adapter": lambda: some("vit_b", PARTLY, SOME),
        "large": lambda: some("vit_l", EAGER, LARGE),
        "limit": lambda: [
            Case("limit", f"vit_l/{name}", partial(largest_batch, name, scale, most=scale.batch if smoke else 1 << 14))
            for name in LIMITS
            if name in methods
        ],
        "int8": lambda: some("vit_b", INT8, ("adaptformer", "vpt", "ssf", "lst"))[1:],
    }
    return by_part[part]()
