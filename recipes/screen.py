"""The progress display of a run: a bar on a terminal, lines in a log file, or nothing."""

from __future__ import annotations

import os
import sys
import time

import datasets
import huggingface_hub.utils
import torch
import transformers
from accelerate import Accelerator
from tqdm.auto import tqdm


def progress_kind(asked: str | None) -> str:
    """`bar`, `lines` or `none`: as asked; else none if `TQDM_DISABLE` is set, a bar on a terminal, or lines."""
    off = os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false", "no")
    return asked or ("none" if off else "bar" if sys.stderr.isatty() else "lines")


def peak_memory(device: torch.device) -> float:
    """Peak memory so far in GiB: of the accelerator, or of this process on a CPU; 0 if it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Screen:
    """Shows the progress of training, on the first process of each machine.

    Args:
        accelerator: of the run.
        kind: result of `progress_kind`.

    Attributes:
        bars: whether bars are shown, also for evaluation.
    """

    bars = True

    def __init__(self, accelerator: Accelerator, kind: str) -> None:
        self.device, self.kind = accelerator.device, kind
        self.main, self.local_main = accelerator.is_main_process, accelerator.is_local_main_process
        Screen.bars = kind == "bar" and self.local_main
        self.bar: tqdm | None = None
        if not self.bars:  # also those of other libraries
            datasets.disable_progress_bars()
            transformers.utils.logging.disable_progress_bar()
            huggingface_hub.utils.disable_progress_bars()

    def start(self, total: int, done: int) -> None:
        """Begin with training, after `done` of `total` steps."""
        self.total, self.images, self.seconds = total, 0, 0.0
        self.bar = tqdm(total=total, initial=done, desc="Train", disable=not self.bars)
        self.resume()

    def pause(self) -> None:
        """Exclude the time until `resume` from the throughput."""
        self.seconds += time.perf_counter() - self.since

    def resume(self) -> None:
        """Count time again."""
        self.since = time.perf_counter()

    def step(self, images: int) -> None:
        """Count a step, with its number of images on all processes."""
        self.images += images
        if self.bar is not None:
            self.bar.update()

    def report(self, step: int, epoch: int, loss: float, rate: float, norm: float) -> dict[str, float]:
        """Show the figures since the last report, and return those that this class adds."""
        self.pause()
        speed = self.images / max(self.seconds, 1e-9)
        memory = peak_memory(self.device)
        shown = {"loss": f"{loss:.4f}", "lr": f"{rate:.2e}", "grad_norm": f"{norm:.3g}"}
        shown |= {"images/s": f"{speed:.3g}", "GiB": f"{memory:.2f}"}
        if self.bar is not None and self.bars:
            self.bar.set_postfix(shown)
        elif self.kind == "lines" and self.main:
            print(
                f"Step {step}/{self.total}, epoch {epoch}: " + ", ".join(f"{k} {v}" for k, v in shown.items()),
                flush=True,
            )
        self.images, self.seconds = 0, 0.0
        self.resume()
        return {"images_per_second": speed, "peak_memory_gib": memory}

    def say(self, text: str) -> None:
        """Print a line above the bar, from the first process."""
        if self.main:
            tqdm.write(text)

    def close(self) -> None:
        """End the display."""
        if self.bar is not None:
            self.bar.close()
