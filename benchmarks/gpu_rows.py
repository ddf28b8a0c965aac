"""Rows of `gpu.py`: a line of JSON each, written as soon as it is known, whatever became of it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lines import append_lines, read_lines


OK, FAILED, ERROR = "ok", "failed", "error"
AGAIN = {"nothing": (), "failed": (FAILED, ERROR), "all": (OK, FAILED, ERROR)}  # what is run though it has a row
BROKEN_DEVICE = ("CUDA error", "device-side assert", "cuBLAS error", "CUBLAS_STATUS", "cuDNN error")
DEVICE_LOST = 3  # exit status of a process whose device answers no more


@dataclass(frozen=True)
class Row:
    """What is known of one case.

    Attributes:
        part: of the script.
        case: name within the part.
        card: that it ran on.
        status: `"ok"`; `"failed"` where a check found something wrong; `"error"` where an exception ended it.
        values: figures and findings.
        seconds: that it took, building included.
        torch: version.
    """

    part: str
    case: str
    card: str
    status: str
    values: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    torch: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What the row is about; of several, the last one counts."""
        return self.part, self.case, self.card


@dataclass(frozen=True)
class Case:
    """Something to run.

    Attributes:
        part: of the script.
        name: within the part.
        run: returns the values of the row; those of a check that found something wrong are under `"failed"`.
    """

    part: str
    name: str
    run: Callable[[], dict[str, Any]]


def read_rows(path: Path) -> dict[tuple[str, str, str], Row]:
    """The last row of each case."""
    rows = (Row(**fields) for fields in read_lines(path))
    return {row.key: row for row in rows}


def card_name(device: torch.device) -> str:
    """What rows of a device have in common."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def outcome(case: Case, device: torch.device) -> tuple[Row, bool]:
    """Run a case; its row, and whether the device still answers."""
    start, alive = time.perf_counter(), True
    try:
        values = case.run()
        status = FAILED if values.get("failed") else OK
    except Exception as error:  # whatever breaks in one case becomes its row, and the others go on
        status, values = ERROR, {"error": told(error), "where": where(error)}
        alive = not any(sign in str(error) for sign in BROKEN_DEVICE)
    seconds = round(time.perf_counter() - start, 2)
    return Row(case.part, case.name, card_name(device), status, values, seconds, torch.__version__), alive


def told(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def where(error: BaseException) -> str:
    """The innermost line of the project, and the innermost line of all."""
    frames = traceback.extract_tb(error.__traceback__)
    root = str(Path(__file__).parents[1])
    own = [frame for frame in frames if frame.filename.startswith(root)]
    shown = dict.fromkeys(
        f"{Path(frame.filename).name}:{frame.lineno} {frame.line}" for frame in (*own[-1:], frames[-1])
    )
    return "; ".join(shown)


class Ledger:
    """The file of rows, which is also what tells which cases are done.

    Args:
        path: of the file.
        device: that cases run on.
        again: key of `AGAIN`.
        until: time of `time.monotonic` after which no case is begun.
        quiet: whether to print only rows that are not ok.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        again: str = "nothing",
        until: float = float("inf"),
        quiet: bool = False,
    ) -> None:
        self.path, self.device, self.until, self.quiet = path, device, until, quiet
        card = card_name(device)
        rows = read_rows(path).values()
        self.done = {row.key[:2] for row in rows if row.card == card and row.status not in AGAIN[again]}

    def missing(self, cases: Iterable[Case]) -> list[Case]:
        """The cases without a row."""
        return [case for case in cases if (case.part, case.name) not in self.done]

    def run(self, cases: Iterable[Case], until: float = float("inf")) -> str:
        """Run the cases without a row.

        Args:
            cases: in this order.
            until: as of the ledger, if it is earlier.

        Returns:
            `"done"`, `"late"` where the time was over before, or `"lost"` where the device answers no more.
        """
        for case in self.missing(cases):
            if time.monotonic() > min(until, self.until):
                return "late"
            row, alive = outcome(case, self.device)
            append_lines(self.path, [asdict(row)])
            self.done.add((case.part, case.name))
            if row.status != OK or not self.quiet:
                print(
                    f"{row.seconds:6.1f} s  {row.status:6}  {row.part}  {row.case}  {_short(row.values)}", flush=True
                )
            if not alive:
                return "lost"
        return "done"


def _short(values: dict[str, Any]) -> str:
    text = ", ".join(f"{key} {value}" for key, value in values.items() if not isinstance(value, dict | list) or value)
    return text[:160]
