"""What a server of many adapters does: throughput, latency, memory, and answers to malformed requests.

    python benchmarks/serve.py

A ViT with random weights and a hundred adapters of each method, in one server on this machine. Requests for 1, 10 and
100 adapters take turns, so that other work on the machine meets all of them. The page is written from the results.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import httpx
import psutil
import torch
from peft import get_peft_model
from serve_requests import malformed, picture
from transformers import AutoModelForImageClassification, ViTConfig, ViTImageProcessor, ViTModel

import hf_visual_peft
from hf_visual_peft.peft_methods.methods import any_method
from hf_visual_peft.serving.catalogue import Base, find_adapters
from hf_visual_peft.serving.pool import Backbone, Pool
from hf_visual_peft.sharing.files import write_aside
from hf_visual_peft.tables import format_table


METHODS = ("adaptformer", "ssf", "vpt", "lora")
MIXES = (1, 10, 100)
CLASSES = 10
SIZE = 96
FIELDS: dict[str, dict[str, Any]] = {
    "adaptformer": {"r": 8}, "vpt": {"num_virtual_tokens": 10}, "lora": {"r": 8, "modules_to_save": ["classifier"]}
}  # fmt: skip
ALIVE = 300  # seconds that a server may take to stop


def make(folder: Path, methods: Sequence[str], count: int) -> Path:
    """A backbone, and adapters with random weights."""
    torch.manual_seed(0)
    base = folder / "vit"
    sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    ViTModel(ViTConfig(**sizes, image_size=SIZE)).save_pretrained(base)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(base)
    for method in methods:
        plain = AutoModelForImageClassification.from_pretrained(base, num_labels=CLASSES)
        found = any_method(method)
        config = found.config_cls(**getattr(found, "chosen", {}) | FIELDS.get(method, {}))
        model = get_peft_model(plain, hf_visual_peft.with_visual_targets(config, plain))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for number in range(count):
            with torch.no_grad():
                for parameter in trained:
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
            model.save_pretrained(folder / "adapters" / f"{method}-{number}")
    return base


class Server:
    """A server in a process of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.log = folder / f"log-{time.monotonic_ns()}"
        command = [sys.executable, "-m", "hf_visual_peft.cli.main", "serve", "--port", "0", *words]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)
        while not (found := re.search(r"running on (http://\S+)", self.log.read_text())):
            if self.process.poll() is not None:
                raise RuntimeError(f"The server did not start: {self.log.read_text()}")
            time.sleep(0.2)
        self.url = found[1]

    def resident(self) -> int:
        """Bytes of memory of the process."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def stop(self) -> int:
        """Its exit status."""
        self.process.terminate()
        status = self.process.wait(ALIVE)
        return 128 - status if status < 0 else status


async def load(url: str, names: Sequence[str], content: bytes, at_a_time: int) -> tuple[float, list[float]]:
    """Images a second, and the seconds of each request."""
    limits = httpx.Limits(max_connections=at_a_time)
    waiting, taken = list(names), []
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=900) as client:

        async def work() -> None:
            while waiting:
                before = time.perf_counter()
                name = waiting.pop()
                answer = await client.post(f"/v1/predict?adapter={name}", content=content)
                answer.raise_for_status()
                taken.append(time.perf_counter() - before)

        start = time.perf_counter()
        await asyncio.gather(*[work() for _ in range(at_a_time)])
        return len(names) / (time.perf_counter() - start), taken


async def ask_nonsense(url: str, names: Sequence[str], count: int) -> dict[str, Any]:
    """Send malformed requests; how they were answered."""
    generator = random.Random(0)
    statuses: Counter[int] = Counter()
    silent = 0
    async with httpx.AsyncClient(base_url=url, timeout=900) as client:
        for start in range(0, count, 8):
            calls = []
            for _ in range(min(8, count - start)):
                given = {"query": f"adapter={names[0]}", "content": b"x", "kind": "image/png"}
                given |= malformed(generator, names, 10 * 2**20 + 1)
                headers = {"Content-Type": given["kind"]}
                calls.append(client.post(f"/v1/predict?{given['query']}", content=given["content"], headers=headers))
            for answer in await asyncio.gather(*calls):
                statuses[answer.status_code] += 1
                silent += len(answer.json().get("error", {}).get("message", "")) < 10
    return {"requests": count, "statuses": dict(sorted(statuses.items())), "without_reason": silent}


def memory(base: Path, adapters: Path, methods: Sequence[str]) -> dict[str, dict[str, int]]:
    """Numbers of an adapter in its file, and those that a pool keeps for it."""
    own = Base(str(base))
    entries = find_adapters([str(adapters)], own)
    pool = Pool(Backbone(own, torch.device("cpu"), torch.float32), most=3)
    found = {}
    for method in methods:
        for number in range(3):
            pool.get(entries[f"{method}-{number}"], torch.Size([3, SIZE, SIZE]))
        shared = {id(tensor) for tensor in pool.backbone.model.parameters()}
        (group,) = pool.groups
        kept = {id(p): p.numel() for p in group.model.parameters() if id(p) not in shared}
        header = entries[f"{method}-0"].header
        found[method] = {"file": header.values, "kept": sum(kept.values()) // 3, "bytes": header.num_bytes}
    return found


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All results."""
    base = make(folder, args.methods, max(MIXES))
    content = picture(size=(SIZE, SIZE), form="JPEG")
    found: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f} at the start",
        "requests": args.requests,
        "at_a_time": args.at_a_time,
        "memory": memory(base, folder / "adapters", args.methods),
    }
    all_of = [
        "--model",
        str(base),
        "--adapters",
        str(folder / "adapters"),
        "--max_adapters",
        "1000",
        "--timeout",
        "600",
    ]
    server = Server(folder, *all_of, "--max_batch", str(args.at_a_time))
    try:
        found["resident_before"] = server.resident()
        rows = {method: {k: {"rate": [], "seconds": []} for k in MIXES} for method in args.methods}
        for method in args.methods:  # loads them
            asyncio.run(load(server.url, [f"{method}-{n}" for n in range(max(MIXES))], content, args.at_a_time))
        found["resident_loaded"] = server.resident()
        for _ in range(args.rounds):
            for method in args.methods:
                for k in MIXES:
                    names = [f"{method}-{number % k}" for number in range(args.requests)]
                    rate, seconds = asyncio.run(load(server.url, names, content, args.at_a_time))
                    rows[method][k]["rate"].append(rate)
                    rows[method][k]["seconds"] += seconds
        found["rows"] = rows
        names = [f"{args.methods[0]}-{number}" for number in range(max(MIXES))]
        found["malformed"] = asyncio.run(ask_nonsense(server.url, names, args.malformed))
        asyncio.run(load(server.url, names[:1], content, 1))  # still alive
    finally:
        found["exit"] = server.stop()
    alone = Server(folder, "--model", str(base), "--adapters", str(folder / "adapters" / f"{args.methods[0]}-0"))
    try:
        asyncio.run(load(alone.url, [f"{args.methods[0]}-0"], content, 1))
        found["resident_alone"] = alone.resident()
    finally:
        alone.stop()
    return found


def page(found: dict[str, Any]) -> str:
    """The results as a page."""
    rows = []
    for method, by_mix in found["rows"].items():
        one = by_mix["1"]
        for k, row in by_mix.items():
            ratio = statistics.median(b / a for a, b in zip(one["rate"], row["rate"], strict=True))
            cuts = statistics.quantiles(row["seconds"], n=100)
            rows.append(
                (
                    f"{method}, of peft" if method == "lora" else method,
                    k,
                    f"{statistics.median(row['rate']):.1f}",
                    f"{ratio:.2f}",
                    f"{1000 * cuts[49]:.0f}",
                    f"{1000 * cuts[98]:.0f}",
                )
            )
    header = ("method", "adapters", "images a second", "of one", "p50 (ms)", "p99 (ms)")
    kept = [(m, f"{r['file']:,}", f"{r['kept']:,}", f"{r['bytes']:,}") for m, r in found["memory"].items()]
    told = ", ".join(f"{count:,} with {status}" for status, count in found["malformed"]["statuses"].items())
    mega = {key: round(found[f"resident_{key}"] / 2**20) for key in ("before", "loaded", "alone")}
    total = max(MIXES) * len(found["rows"])
    sizes = ("in the file", "in memory", "bytes of the file")
    nonsense = found["malformed"]
    paragraphs = [
        f"wrote this page. One server on {found['machine']}, shared with other work; a ViT of 12 blocks of width 192 "
        f"and random weights at {SIZE} px; {found['at_a_time']} requests at a time, {found['requests']} for each "
        "measurement. Measurements with 1, 10 and 100 adapters take turns: *of one* is the median of their ratios "
        "within a round.",
        format_table(header, rows, right=header[1:]),
        "Numbers of one adapter, its head included, in its file and in the server's memory:",
        format_table(("method", *sizes), kept, right=sizes),
        f"The process took {mega['before']:,} MB before the first adapter and {mega['loaded']:,} MB with {total}. One "
        f"process for each adapter would take about {mega['alone']:,} MB each.",
        f"{nonsense['requests']:,} malformed requests and pictures, random ones of 19 kinds, were answered {told}; "
        f"{nonsense['without_reason']} without a reason. The server then worked as before, and its exit status was "
        f"{found['exit']}.",
    ]
    texts = [text if text.startswith("|") else fill(text, 119) for text in paragraphs]
    return "\n\n".join(["# Serving many adapters", "    python benchmarks/serve.py", *texts]) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at_a_time", type=int, default=32)
    parser.add_argument("--malformed", type=int, default=10_000)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("serve.json"))
    parser.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "docs" / "serving.md")
    parser.add_argument("--only_page", action="store_true", help="write the page from the results that are there")
    args = parser.parse_args(argv)
    if not args.only_page:
        warnings.filterwarnings("ignore", message=".*(multiple adapters|second time).*")
        with tempfile.TemporaryDirectory() as folder:
            write_aside(args.results, json.dumps(measure(args, Path(folder)), indent=1))
    write_aside(args.page, page(json.loads(args.results.read_text())))


if __name__ == "__main__":
    main()
