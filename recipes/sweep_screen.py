"""What a sweep shows: a live table on a terminal, else a line for each trial that ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from sweep_space import name_of, values_told
from sweep_trials import BROKEN, FINISHED, LARGE, RUNNING, STOPPED, read_record

from hf_visual_peft.tables import format_columns


MOST_ROWS = 20


def table_of(records: Sequence[Mapping[str, Any]], most: int = MOST_ROWS) -> str:
    """The best trials, those that run, and how many there are of the others."""
    order = {RUNNING: 0, FINISHED: 1, STOPPED: 1}
    shown = [record for record in records if record["state"] in order and record["curve"]]
    shown.sort(key=lambda record: -score_of(record))
    header = ("data", "method", "values", "seed", "validation", "evaluations", "trained", "state")
    cells = [
        (
            Path(record["trial"]["data"]).name,
            record["trial"]["method"],
            values_told(record["trial"]),
            str(record["trial"]["seed"]),
            f"{score_of(record):.4f}",
            str(len(record["curve"])),
            f"{record['trained']:,}" if "trained" in record else "",
            record["state"],
        )
        for record in shown[:most]
    ]
    lines = [format_columns(header, cells, right=header[3:7])] if cells else []
    if len(shown) > most:
        lines.append(f"... and {len(shown) - most} more")
    for state, told in ((BROKEN, "failed"), (LARGE, "would train too many parameters")):
        those = [record for record in records if record["state"] == state]
        if those:
            lines.append(f"{len(those)} of {len(records)} trials {told}. The first cause: {those[0]['reason']}")
    left = sum(record["state"] == RUNNING and not record["curve"] for record in records)
    if left:
        lines.append(f"{left} of {len(records)} trials have no result yet.")
    return "\n".join(lines)


def score_of(record: Mapping[str, Any]) -> float:
    """The score of a trial that ended, else the best so far."""
    return record["score"] if "score" in record else max(score for _, score in record["curve"])


def named(trial: Mapping[str, Any]) -> str:
    """A trial in a few words."""
    return f"{Path(trial['data']).name}, {trial['method']} {values_told(trial)}".rstrip() + f", seed {trial['seed']}"


def line_of(record: Mapping[str, Any]) -> str:
    """A trial that ended, in a line."""
    name = named(record["trial"])
    if "score" not in record:
        return f"{name}: {record['state']}: {record.get('reason', '')}"
    stopped = f", stopped after {len(record['curve'])} evaluations" if record["state"] == STOPPED else ""
    return f"{name}: {score_of(record):.4f} on validation{stopped}"


class Table:
    """Shows a sweep while it runs.

    Args:
        output: folder of the sweep.
        wanted: number of trials.
        ended: called after each trial.
    """

    def __init__(self, output: Path, wanted: int, ended: Callable[[], None]) -> None:
        self.output, self.wanted, self.ended = output, wanted, ended
        self.records: dict[str, dict[str, Any]] = {}
        console = Console(file=sys.stderr)
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Table:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *unused: object) -> None:
        if self.live is not None:
            self.live.stop()

    def begin(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Take the records of an earlier start; they are returned."""
        self.records = {name_of(record["trial"]): record for record in records}
        done = sum(record["state"] != RUNNING for record in records)
        if done and self.live is None:
            print(f"{done} of {self.wanted} trials are done already.", file=sys.stderr, flush=True)
        return list(records)

    def show(self, trial: Mapping[str, Any], state: str) -> None:
        """Show a trial that started, was evaluated, lost its worker or ended."""
        record = read_record(self.output, trial)
        self.records[name_of(trial)] = record
        done = sum(record["state"] != RUNNING for record in self.records.values())
        if self.live is not None:
            text = f"{table_of(list(self.records.values()))}\n{done} of {self.wanted} trials are done."
            self.live.update(Text(text), refresh=True)
        elif state == "recovered":
            print(f"{named(trial)}: its worker died; another goes on.", file=sys.stderr, flush=True)
        elif state == "ended" and record["state"] != RUNNING:
            print(f"{done}/{self.wanted} {line_of(record)}", file=sys.stderr, flush=True)
        if state == "ended":
            self.ended()
