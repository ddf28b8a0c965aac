"""Whether a training step makes the host wait for the device, and where.

On a card torch's own watch tells (`torch.cuda.set_sync_debug_mode`). On a CPU nothing waits; there those operations
are told that would: which read a number from a tensor, or whose output has a size that depends on numbers.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_right import METHODS, REAL, Subject
from gpu_rows import Case, told
from step_rounds import FULL
from torch.utils._python_dispatch import TorchDispatchMode


DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
WARMUP = 2
_READING = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.equal,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.nonzero,
    torch.ops.aten._unique2,
}


class _Reading(TorchDispatchMode):
    """Notes which lines would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        by_mask = packet is torch.ops.aten.index and any(i is not None and i.dtype == torch.bool for i in args[1])
        if packet in _READING or by_mask:
            self.places[f"{_line(traceback.extract_stack()[:-1])} ({packet.__name__})"] += 1
        return func(*args, **(kwargs or {}))


def _line(frames: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line that is not torch's own."""
    torch_root = str(Path(torch.__file__).parent)
    outside = [frame for frame in frames if not frame.filename.startswith(torch_root)]
    return _place(outside[-1].filename, outside[-1].lineno)


def _place(filename: str, line: int | None) -> str:
    return f"{'/'.join(Path(filename).parts[-3:])}:{line}"


@contextmanager
def waits(device: torch.device) -> Iterator[Counter[str]]:
    """Meanwhile note where the host waits for the device, and how often."""
    if device.type != "cuda":
        with _Reading() as watch:
            yield watch.places
        return
    places: Counter[str] = Counter()
    torch.cuda.synchronize(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "called a synchronizing" in str(warning.message):  # and not that the watch is a prototype
            places[_place(warning.filename, warning.lineno)] += 1


def steps(subject: Subject, dtype: torch.dtype | None) -> Counter[str]:
    """Where the host waits in a step, after some to warm up."""
    model: Any = subject.moved(subject.base if subject.method == FULL else subject.model).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    labels, pixels = subject.labels.to(subject.device), subject.pixels.to(subject.device)

    def step() -> None:
        with torch.autocast(subject.device.type, dtype, enabled=dtype is not None):
            loss = torch.nn.functional.cross_entropy(model(pixels).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARMUP):
        step()
    with waits(subject.device) as places:
        step()
    return places


def watch(method: str, model: str, device: torch.device, smoke: bool) -> dict[str, Any]:
    """Where the host waits in a training step of a method, in each precision; anywhere is a failure."""
    try:
        subject = Subject("linearprobe" if method == FULL else method, model, device, smoke)
    except ValueError as refusal:
        return {"refused": {"adapting": told(refusal)}}
    subject.method = method
    found = {name: dict(steps(subject, dtype)) for name, dtype in DTYPES.items()}
    failed = {name: ", ".join(f"{place} x{count}" for place, count in at.items()) for name, at in found.items() if at}
    return {"waits": found, "failed": failed}


def cases(device: torch.device, smoke: bool, methods: Sequence[str] = METHODS) -> list[Case]:
    """Full fine-tuning, which tells what the model itself does, and every method, model by model."""
    return [
        Case("sync", f"{model}/{method}", partial(watch, method, model, device, smoke))
        for model in REAL
        for method in (FULL, *methods)
    ]
