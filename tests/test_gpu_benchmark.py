"""The script for GPUs: its smallest form on the CPU, how it goes on after a stop, and what its page says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_fast
import gpu_page
import gpu_right
import gpu_rows
import gpu_sync
import pytest
import torch
from torch import nn

import hf_visual_peft


ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def run(path, *options):
    return gpu.main(["--smoke", "--device", "cpu", "--out", str(path), *options])


def rows_of(path):
    return {(row.part, row.case): row for row in gpu_rows.read_rows(path).values()}


@pytest.mark.slow
def test_smoke(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    parts = [part for part in gpu.PARTS if part != "compile"]  # which "adapter" does, too, and faster
    assert run(path, "--parts", ",".join(parts)) == 0
    rows = rows_of(path)
    assert {row.part for row in rows.values()} == set(parts)
    bad = {key: row.values for key, row in rows.items() if row.status != gpu_rows.OK}
    assert not bad
    assert {case for part, case in rows if part == "right"} == {f"{model}/lst" for model in ("vit", "dinov2", "swin")}
    right = rows["right", "swin/lst"].values
    assert set(right) == {*gpu_right.CHECKS, "refused", "failed"}
    assert right["numbers"]["output"] < 1e-5 < right["bfloat16"]["last"]
    assert right["caching"] == {"cached": pytest.approx(0, abs=1e-5)}
    step = rows["base", "vit_b/eager/lst"].values
    assert step["step"] > 0 < step["ms"]["host"]
    assert rows["base", "vit_b/eager/activations"].values["step"] == 1
    assert rows["limit", "vit_l/lst"].values["fits"] == 8
    assert rows["cache", "lst"].values["bytes_per_image"] == 2 * 3 * 5 * 64  # float16, images and two blocks' tokens

    before = path.read_bytes()
    capsys.readouterr()
    assert run(path, "--parts", ",".join(parts)) == 0  # everything has a row
    assert path.read_bytes() == before
    assert "right: 3 of 3 ok" in capsys.readouterr().out


def test_the_shell_script_starts_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    options = ["--smoke", "--parts", "setup", "--device", "cpu", "--out", str(path)]
    environment = {**os.environ, "PYTHON": sys.executable, "WHEELS": ""}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "setup: 1 of 1 ok" in done.stdout
    assert rows_of(path)["setup", "machine"].values["torch"].startswith(torch.__version__.partition("+")[0])


@pytest.fixture
def ledger(tmp_path):
    return lambda **options: gpu_rows.Ledger(tmp_path / "rows.jsonl", CPU, **options)


def case(name, run=lambda: {"value": 1}):
    return gpu_rows.Case("part", name, run)


def test_what_has_a_row_is_not_run_again(ledger, tmp_path):
    assert ledger().run([case("a"), case("b")]) == "done"
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"part": "part", "ca')  # a line that was cut off
    again = ledger()
    assert [each.name for each in again.missing([case("a"), case("b"), case("c")])] == ["c"]
    assert again.run([case("a", lambda: pytest.fail("run already")), case("c")]) == "done"
    assert list(rows_of(tmp_path / "rows.jsonl")) == [("part", "a"), ("part", "b"), ("part", "c")]


def test_failures_are_rows_and_the_others_go_on(ledger, tmp_path):
    def broken():
        raise KeyError("no such thing")

    assert ledger().run([case("a", broken), case("b", lambda: {"failed": {"x": "off"}}), case("c")]) == "done"
    rows = rows_of(tmp_path / "rows.jsonl")
    assert [row.status for row in rows.values()] == ["error", "failed", "ok"]
    assert rows["part", "a"].values["error"] == "KeyError: 'no such thing'"
    assert "raise KeyError" in rows["part", "a"].values["where"]
    cases = [case(name) for name in "abc"]
    assert [each.name for each in ledger(again="failed").missing(cases)] == ["a", "b"]
    assert len(ledger(again="all").missing(cases)) == 3
    assert ledger().missing(cases) == []
    assert ledger(again="failed").run(cases) == "done"
    assert {row.status for row in rows_of(tmp_path / "rows.jsonl").values()} == {"ok"}


def test_a_lost_device_ends_the_process(ledger):
    def lost():
        raise RuntimeError("CUDA error: device-side assert triggered")

    assert ledger().run([case("a", lost), case("b", lambda: pytest.fail("the device is lost"))]) == "lost"
    assert [each.name for each in ledger().missing([case("a"), case("b")])] == ["b"]


def test_nothing_begins_after_the_budget(ledger, tmp_path):
    early = ledger(until=time.monotonic() - 1)
    assert early.run([case("a")]) == "late"
    assert ledger().run([case("a")], until=time.monotonic() - 1) == "late"
    assert not (tmp_path / "rows.jsonl").exists()


class Process:
    """In place of a process: runs the script here, the first time as if its device were lost."""

    started = []

    def __init__(self, command, env):
        self.status = gpu.DEVICE_LOST if not self.started else gpu.main(command[2:])
        self.started.append(command)

    def poll(self):
        return self.status


def test_several_processes_share_the_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.subprocess, "Popen", Process)
    monkeypatch.setattr(Process, "started", [])
    monkeypatch.setattr(gpu_right, "check", lambda method, model, device, smoke: {"numbers": {}})
    path = tmp_path / "rows.jsonl"
    assert run(path, "--parts", "right:60,setup", "--workers", "4", "--methods", "vpt") == 0
    assert len(rows_of(path)) == 3 + 1
    assert len(Process.started) == 3 + 1  # three cases, and one start in vain
    assert all(command[3] == "right:60" for command in Process.started)


class Waiting(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x[x > 0]
        return x


def test_waits_are_told_with_their_line():
    with gpu_sync.waits(CPU) as places:
        Waiting()(torch.ones(3))
        torch.ones(3)[torch.tensor([0, 2])].sum()
    assert sorted(place.rpartition(" ")[2] for place in places) == ["(_local_scalar_dense)", "(index)"]
    assert all("tests/test_gpu_benchmark.py:" in place for place in places)


@pytest.mark.parametrize("name", sorted(hf_visual_peft.list_methods()))
def test_no_step_reads_a_number_from_the_device(name):
    subject = gpu_right.Subject(name, "vit", CPU, smoke=True)
    assert not gpu_sync.steps(subject, torch.bfloat16)


def test_ssf_reads_scales_on_a_cpu_only():
    from hf_visual_peft.methods.reparameter.ssf import is_recoverable

    good = torch.ones(3), torch.zeros(3)
    assert is_recoverable(torch.ones(2, 3), *good)
    assert not is_recoverable(*(t.to("meta") for t in (torch.ones(2, 3), *good)))


def test_a_wrong_gradient_is_found():
    subject = gpu_right.Subject("adaptformer", "vit", CPU, smoke=True)
    assert gpu_right.numbers(subject)["gradient"] < 1e-5
    parameter = next(p for n, p in subject.on_device.named_parameters() if n.endswith("up.weight"))
    handle = parameter.register_hook(lambda gradient: gradient * (1 + 1e-2))
    with pytest.raises(AssertionError, match=r"the gradient of .*up.weight is off by"):
        gpu_right.numbers(subject)
    handle.remove()
    with torch.no_grad():
        parameter.mul_(2)
    with pytest.raises(AssertionError, match="logits are off by"):
        gpu_right.numbers(subject)


def test_checks_that_break_do_not_hide_the_others(monkeypatch):
    def broken(subject):
        raise IndexError("out of range")

    def refusing(subject):
        raise ValueError("not here. Do something else.")

    def good(subject):
        return {"value": 1.0}

    monkeypatch.setattr(gpu_right, "CHECKS", {"a": broken, "b": refusing, "c": good})
    found = gpu_right.check("vpt", "vit", CPU, True)
    assert found == {
        "c": {"value": 1.0},
        "refused": {"b": "ValueError: not here. Do something else."},
        "failed": {"a": "IndexError: out of range"},
    }


class Model(nn.Module):
    """Has memory for so many images."""

    def __init__(self, room):
        super().__init__()
        self.room, self.weight = room, nn.Parameter(torch.ones(()))

    def forward(self, pixels):
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("no more")
        return type("Output", (), {"logits": pixels.mean((2, 3)) * self.weight})


@pytest.mark.parametrize(("room", "fits"), [(8, 8), (100, 96), (133, 128), (1000, 256)])
def test_largest_batch(monkeypatch, room, fits):
    scale = gpu_fast.Scale(CPU, batch=8)
    monkeypatch.setattr(gpu_fast.Scale, "model", lambda self, name: Model(room))

    def inputs(self, batch):
        return torch.ones(batch, 3, 2, 2), torch.zeros(batch, dtype=torch.long)

    monkeypatch.setattr(gpu_fast.Scale, "inputs", inputs)
    found = gpu_fast.largest_batch("full", scale, most=256)
    assert found["fits"] == fits
    assert found["fails"] is None if room > 256 else room < found["fails"] <= room + max(8, room // 8)


def row(part, name, status="ok", card="Card 1", **values):
    return gpu_rows.Row(part, name, card, status, values, 1.0, "2.11.0")


def step_row(method, step, part="base", mode="eager", forward=2.0, host=5.0, peak=2**20, **values):
    times = {"step": 10 * step, "optimizer": 1.0, "host": host}
    fields = {"step": step, "step_to_forward": forward, "optimizer": 0.1, "ms": times, "peak": peak, "held": 2**21}
    floors = {"activations_ms": {**times, "step": 10.0}, "forward_ms": {**times, "step": 4.0}, "batch": 64}
    return row(part, f"vit_b/{mode}/{method}", **fields, **floors, **values)


def cells(parts):
    return {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for part in parts
        for line in part.splitlines()
        if line.startswith("|")
    }


def test_page_says_where_nothing_was_measured():
    assert gpu_page.section([], {})[-1] == "Not yet measured on a GPU."
    assert gpu_page.section([row("setup", "machine", card="cpu")], {})[-1] == "Not yet measured on a GPU."


def test_page():
    rows = [
        row("setup", "machine", torch="2.11.0", cuda="13.0", transformers="5.24.0", peft="0.21.2"),
        step_row("activations", 1.0),
        step_row("full", 1.5, peak=40 * 2**20),
        step_row("adaptformer", 1.05),
        step_row("lst", 0.9, forward=1.3, peak=8 * 2**20),
        step_row("ssf", 1.25, host=40.0),
        step_row("ssf", 1.1, part="graph", mode="graph"),
        row("base", "vit_b/eager/vpt", "error", error="RuntimeError: out of everything"),
        row("right", "vit/ssf", numbers={"output": 1e-6, "gradient": 2e-6}, refused={}, failed={}),
        row("right", "vit/lst", "failed", numbers={"output": 3e-6, "gradient": 1e-6}, failed={"mixing": "off by 1"}),
        row("sync", "vit/ssf"),
        row("sync", "vit/lst", "failed", waits={"float32": {"lst.py:1": 1, "torch/cuda/__init__.py:9": 1}}),
        row("sync", "vit/vpt", "failed", waits={"float32": {"torch/cuda/__init__.py:9": 1}}),
        row("limit", "vit_l/lst", fits=512, fails=576, peak=2**36),
        row("cache", "lst", **dict.fromkeys(gpu_page.CACHE_COLUMNS, 1234.5)),
    ]
    parts = gpu_page.section(rows, {("vit_b", "ssf"): 1.14})
    text, found = "\n\n".join(parts), cells(parts)
    flat = " ".join(text.split())
    assert "Not yet" not in text
    assert "### Card 1" in parts
    table = cells([parts[parts.index("#### ViT-B/16, batch 64") + 1]])
    assert table["ssf"] == ["1.14", "1.25", "2.00", "0.10", "12.5", "40.0", "1", "0.03", "2"]
    assert table["adaptformer"][0] == "-"
    assert list(table)[2:] == ["*F*", "lst", "*A*", "adaptformer", "ssf", "full"]
    assert found["adaptformer: step / A"] == ["at most 1.10", "1.050", "yes", "-"]
    assert found["ssf: step / A"] == ["at most 1.20", "1.250", "**no**", "1.100"]
    assert found["lst: step / F"] == ["at most 1.25", "1.300", "**no**", "-"]
    assert found["lst: peak / full's"] == ["at most 0.25", "0.200", "yes", "-"]
    assert "The host sets the pace, launching kernels, of: ssf." in flat
    assert "- base, vit_b/eager/vpt: RuntimeError: out of everything" in text
    assert "- right, vit/lst: mixing: off by 1" in text
    assert "In 2 of 3 cases" in flat
    assert "It does in: vit/lst." in flat
    assert found["vit"] == ["1 of 2", "3.0e-06 (lst)", "2.0e-06 (ssf)"]
    modes = cells([parts[parts.index("#### Graphs and compilers, ViT-B/16") + 2]])
    assert modes["ssf"] == ["12.5", "11.0", "-", "-", "1.25", "1.10", "-", "-"]
    limits = cells([parts[parts.index("#### Largest batch, ViT-L/16") + 2]])
    assert limits["lst"] == ["512", "576", "64.0"]
    assert all(len(line) <= 119 for line in text.splitlines() if not line.startswith(("|", "-")))


def test_every_target_names_a_method():
    assert {*gpu_page.STEP_TARGETS, *gpu_page.SIDE_NETWORKS} <= set(hf_visual_peft.list_methods())


def test_rows_in_the_repository_are_of_cards():
    for line in gpu_page.RESULTS.read_text().splitlines() if gpu_page.RESULTS.exists() else ():
        assert json.loads(line)["card"] != "cpu"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "right,wrong"], "--parts: 'wrong' is not a part: choose from setup, right"),
        (["--parts", "right:soon"], "'soon' is not a number of seconds"),
        (["--methods", "vpt,aimless"], "--methods aimless: choose from activations, adapterbias"),
    ],
)
def test_bad_options(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "rows.jsonl", *options)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_for_a_card_needs_one(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "rows.jsonl")])
    assert "torch sees no GPU here: --smoke tests the script on the CPU." in capsys.readouterr().err
