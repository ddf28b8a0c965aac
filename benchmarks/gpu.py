"""Everything that this project has to tell about a GPU, in parts that can be run one by one; `gpu.sh` starts it.

    python benchmarks/gpu.py --parts right:70,sync,base --budget 200 --workers 12

Each result is a line of JSON, written at once. What has a line is not run again: a run that was stopped goes on where
it stopped. An exception becomes a line as well, and the script goes on.

    setup    versions and the card
    right    every method against the CPU, in half precision, saved, merged, mixed, cached
    sync     where a training step makes the host wait for the device
    base     time and memory of every method on ViT-B, batch 64, bfloat16
    small    the same on ViT-S
    graph    some methods recorded as CUDA graphs
    compile  the same compiled
    adapter  the same with only the adapters compiled
    large    some methods on ViT-L
    limit    the largest batch on ViT-L
    cache    pictures a second from cached features
    int8     some methods on a backbone with int8 weights
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import gpu_cache
import gpu_fast
import gpu_right
import gpu_sync
import torch
from gpu_rows import AGAIN, DEVICE_LOST, ERROR, OK, Case, Ledger, Row, card_name, read_rows
from lines import append_lines


ROOT = Path(__file__).parents[1]
ALONE = ("base", "small", "graph", "compile", "adapter", "large", "limit", "int8")  # of `gpu_fast`
SHARED = ("right", "sync")  # which several processes may do at a time
PARTS = ("setup", *SHARED, "base", "small", "graph", "compile", "adapter", "large", "limit", "cache", "int8")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "timm", "torchao", "bitsandbytes")
SMOKE_METHODS = ("full", "lst")
RESTARTS = 3  # of a process whose device was lost, or that died


def machine(device: torch.device) -> dict[str, Any]:
    """Versions, and what the device is."""
    found: dict[str, Any] = {"cores": os.cpu_count(), "python": sys.version.split()[0], "device": card_name(device)}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"cuda": torch.version.cuda, "memory": properties.total_memory}
        found["multiprocessors"] = properties.multi_processor_count
    return found


def cases_of(part: str, device: torch.device, smoke: bool, methods: Sequence[str] | None) -> list[Case]:
    """The cases of a part."""
    if part == "setup":
        return [Case(part, "machine", partial(machine, device))]
    named = {} if methods is None else {"methods": methods}
    if part in ALONE:
        return gpu_fast.cases(part, device, smoke, **named)
    modules: dict[str, Any] = {"right": gpu_right, "sync": gpu_sync, "cache": gpu_cache}
    if methods is not None and part in SHARED:
        named = {"methods": [name for name in gpu_right.METHODS if name in methods]}
    return modules[part].cases(device, smoke, **named)


def parsed_parts(text: str) -> list[tuple[str, float]]:
    """Names of parts, each with the seconds it may take.

    Raises:
        ValueError: one is none, or its seconds are not a number.
    """
    found = []
    for item in text.split(","):
        name, _, limit = item.partition(":")
        if name not in PARTS:
            raise ValueError(f"{name!r} is not a part: choose from {', '.join(PARTS)}.")
        try:
            found.append((name, float(limit) if limit else float("inf")))
        except ValueError:
            raise ValueError(f"{item!r}: {limit!r} is not a number of seconds.") from None
    return found


def side_by_side(arguments: argparse.Namespace, parts: Sequence[str], ledger: Ledger) -> None:
    """Run parts in several processes, each with its share of the cases, and start again those that died."""
    cases = [case for part, _ in parsed_parts(",".join(parts)) for case in all_cases(arguments, part)]
    count = min(arguments.workers, len(ledger.missing(cases)))

    def start(index: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, __file__, "--parts", ",".join(parts), "--stripe", f"{index}/{count}"]
        command += ["--out", str(arguments.out), "--again", arguments.again, "--device", str(ledger.device)]
        command += ["--until", str(ledger.until)]
        command += ["--methods", arguments.methods] if arguments.methods else []
        command += ["--smoke"] if arguments.smoke else []
        return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})

    running = {index: start(index) for index in range(count)}
    starts = dict.fromkeys(running, 1)
    while running:
        time.sleep(0.2)
        for index, process in list(running.items()):
            status = process.poll()
            if status is None and time.monotonic() > ledger.until + arguments.grace:
                process.kill()
                status = process.wait()
                print(f"process {index} of {count} was stopped: it took too long", flush=True)
                del running[index]
            elif status == 0:
                del running[index]
            elif status is not None:
                if status != DEVICE_LOST:
                    values = {"error": f"a process of {count} ended with status {status}"}
                    row = Row("process", f"{index}/{count}", card_name(ledger.device), ERROR, values)
                    append_lines(ledger.path, [asdict(row)])
                if starts[index] > RESTARTS:
                    del running[index]
                else:
                    starts[index] += 1
                    running[index] = start(index)
    ledger.done |= {row.key[:2] for row in read_rows(ledger.path).values()}


def all_cases(arguments: argparse.Namespace, part: str) -> list[Case]:
    """The cases of a part that the options choose, of this process."""
    methods = arguments.methods.split(",") if arguments.methods else None
    if methods is None and arguments.smoke:
        methods = list(SMOKE_METHODS)
    cases = cases_of(part, arguments.device, arguments.smoke, methods)
    if arguments.stripe:
        index, count = map(int, arguments.stripe.split("/"))
        cases = cases[index::count]
    return cases


def run(arguments: argparse.Namespace) -> str:
    """Run the parts; why it ended, as `Ledger.run` tells it."""
    parts = parsed_parts(arguments.parts)
    until = arguments.until or time.monotonic() + arguments.budget
    ledger = Ledger(arguments.out, arguments.device, arguments.again, until, quiet=bool(arguments.stripe))
    position = 0
    while position < len(parts):
        together = [part for part in parts[position:] if part[0] in SHARED]
        if arguments.workers > 1 and parts[position][0] in SHARED:
            end = position
            while end < len(parts) and parts[end][0] in SHARED:
                end += 1
            together = parts[position:end]
            names = [name if limit == float("inf") else f"{name}:{limit:g}" for name, limit in together]
            side_by_side(arguments, names, ledger)
            position = end
            continue
        name, limit = parts[position]
        ended = ledger.run(all_cases(arguments, name), time.monotonic() + limit)
        if ended == "lost":
            return ended
        position += 1
    return "done"


def summary(rows: Sequence[Row]) -> str:
    """How many rows of each part went well, and what became of the others."""
    lines = []
    for part in dict.fromkeys(row.part for row in rows):
        mine = [row for row in rows if row.part == part]
        good = sum(row.status == OK for row in mine)
        lines.append(f"{part}: {good} of {len(mine)} ok, {sum(row.seconds for row in mine):.0f} s")
        for row in mine:
            if row.status != OK:
                what = row.values.get("error") or row.values.get("failed")
                lines.append(f"  {row.status} {row.case}: {str(what)[:300]} {row.values.get('where', '')[:160]}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run what the options say; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="in this order, each with `:seconds` at most")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no case is begun")
    parser.add_argument("--workers", type=int, default=1, help=f"processes for {' and '.join(SHARED)} (default: 1)")
    parser.add_argument("--methods", help="names separated by commas (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu.jsonl", help="one line a case")
    parser.add_argument("--again", choices=list(AGAIN), default="nothing", help="what is run though it has a line")
    parser.add_argument("--device", type=torch.device, help="default: cuda, with --smoke cpu where there is none")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes and few methods, to test the script")
    parser.add_argument("--grace", type=float, default=20.0, help="seconds that a case may go on after the budget")
    parser.add_argument("--stripe", help=argparse.SUPPRESS)  # these two are given to processes that share the work
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    try:
        parsed_parts(arguments.parts)
    except ValueError as error:
        parser.error(f"--parts: {error}")
    if arguments.device is None:
        if not torch.cuda.is_available() and not arguments.smoke:
            parser.error("torch sees no GPU here: --smoke tests the script on the CPU.")
        arguments.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = {"activations", *gpu_fast.METHODS}
    if unknown := sorted(set((arguments.methods or "full").split(",")) - known):
        parser.error(f"--methods {', '.join(unknown)}: choose from {', '.join(sorted(known))}.")
    torch.set_num_threads(1)  # what runs on the CPU is small, and several processes may do it
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    ended = run(arguments)
    if not arguments.stripe:
        rows = [row for row in read_rows(arguments.out).values() if row.card == card_name(arguments.device)]
        print(summary(rows))
        print(f"{time.monotonic() - start:.0f} s, {ended}")
    return DEVICE_LOST if ended == "lost" else 0


if __name__ == "__main__":
    sys.exit(main())
