"""Early ends of a run: by a signal, by non-finite values, or by an error, each with a message of one line."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class DivergedError(FloatingPointError):
    """The loss, the weights or the predictions are no longer finite."""


class InterruptedBySignal(Exception):  # noqa: N818 - no error, but asked for
    """A signal arrived when nothing had to be finished."""


class Finite:
    """Checks that all trained parameters are finite.

    Args:
        accelerator: of the run.
        model: with its weights at the start.

    Raises:
        ValueError: they are not finite at the start.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        self.accelerator, self.model = accelerator, model
        self.buffers = {name for name, tensor in model.named_buffers() if tensor.is_floating_point()}
        self.buffers -= set(self._infinite(self._tensors()))  # a mask may hold infinity
        if found := self._infinite({n: p for n, p in model.named_parameters() if p.requires_grad}):
            raise ValueError(f"The weights are not finite before training: {', '.join(found[:3])}.")

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        return tensors | {name: tensor for name, tensor in self.model.named_buffers() if name in self.buffers}

    @torch.no_grad()
    def _infinite(self, tensors: dict[str, Tensor]) -> list[str]:
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
        if not local:
            return []
        fine = torch.stack([t.isfinite().all() for t in local]).tolist()
        return [name for name, good in zip(tensors, fine, strict=True) if not good]

    def check_weights(self, step: int) -> None:
        """Raise an error on every process if any process has weights that are not finite."""
        found = self._infinite(self._tensors())
        flag = torch.tensor([len(found)], device=self.accelerator.device)
        if self.accelerator.gather(flag).sum().item():
            raise DivergedError(f"weights are not finite at step {step} ({', '.join(found[:3]) or 'another process'})")

    def check_losses(self, losses: Sequence[Tensor], step: int) -> list[float]:
        """The losses of the last steps, averaged over all processes; raise an error if one is not finite."""
        values = self.accelerator.gather(torch.stack(list(losses))).view(-1, len(losses)).mean(0).tolist()
        for value, number in zip(values, range(step - len(values) + 1, step + 1), strict=True):
            if not abs(value) < float("inf"):
                raise DivergedError(f"the loss is {value} at step {number}")
        return values


class Interruption:
    """Records SIGTERM and SIGINT, so that a run can save first; a second signal ends it at once.

    Args:
        accelerator: of the run; a signal to one process counts for all.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.number: int | None = None
        self._raise = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            self._before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.__exit__()
        if self._raise:
            raise InterruptedBySignal

    def asked(self) -> bool:
        """Whether a process got a signal; on every process."""
        if self.accelerator.num_processes == 1:
            return self.number is not None
        if self.number is not None:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal interrupt the code in the context, during which no other process waits for this one."""
        self._raise = self.accelerator.num_processes == 1
        try:
            yield
        finally:
            self._raise = False

    def end(self, told: str) -> None:
        """End the program: 143 for SIGTERM, 130 for SIGINT."""
        number = signal.Signals(self.number or signal.SIGTERM)
        if self.accelerator.is_main_process:
            print(f"Stopped by {number.name}: {told}", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)


def run_readably(main: Callable[[], object], show_traceback: bool) -> None:
    """Run a program; an error ends it with one line and status 1, after its traceback if that is wanted."""
    try:
        main()
    except KeyboardInterrupt:  # before or after training, which handles signals itself
        print("Stopped by SIGINT.", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        hint = "" if show_traceback else " (--traceback shows where it arose.)"
        print(f"error: {told(error)}{hint}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def told(error: BaseException) -> str:
    """An error and its cause, in one line."""
    seen: BaseException | None = error
    texts: list[str] = []
    while seen is not None and len(texts) < 3:
        text = " ".join(str(seen).split())
        named = text if isinstance(seen, ValueError) and text else f"{type(seen).__name__}: {text}".rstrip(": ")
        if not any(text and text in earlier for earlier in texts):
            texts.append(named)
        seen = seen.__cause__
    return " <- ".join(texts)
