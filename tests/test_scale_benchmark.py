"""The benchmark of scale: what it measures, how it goes on after a kill, and what its page says."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import scale
import scale_page
import scale_parts
import torch


ROOT = Path(__file__).parents[1]

TINY = scale_parts.Size("tiny", 64, 4, 2, patch=8)
SETUP = scale_parts.Setup(threads=1, rounds=1)


def point(part, case, size, values, setup=SETUP):
    return scale_parts.Point(part, case, size, values, asdict(setup))


def cost(factor=1):
    names = (scale_page.FORWARD, scale_page.ACTIVATIONS, *scale_parts.METHODS)
    return {"seconds": factor * 0.5, **{name: {"step": 1.25, "bytes": factor * 3_000_000} for name in names}}


def memory(parameters, kept):
    shown = {name: {"trained": 1_000_000, "bytes": kept} for name in (*scale_parts.METHODS, scale_parts.FULL)}
    shown[scale_parts.FULL]["trained"] = parameters
    return {"parameters": parameters, **shown}


def row(page, *starts):
    return next(
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page.splitlines()
        if [cell.strip() for cell in line.split("|")[1 : len(starts) + 1]] == list(starts)
    )


def test_page_is_that_of_the_results():
    path = ROOT / "benchmarks" / "scale.jsonl"
    setup = scale_parts.Setup(**json.loads(path.read_text().splitlines()[-1])["setup"])
    page = scale_page.page(scale.read_points(path, setup), setup)
    assert (ROOT / "docs" / "scale.md").read_text() == page


def test_step_cost():
    found = scale_parts.step_cost(TINY, 16, 2, SETUP)
    assert found[scale_page.ACTIVATIONS]["step"] == 1
    assert found[scale_page.FORWARD]["bytes"] == 0
    assert all(found[name]["bytes"] > 0 and found[name]["step"] > 0 for name in scale_parts.METHODS)
    # no activation of the backbone is kept beside a side network
    assert found["lst"]["bytes"] < found[scale_page.ACTIVATIONS]["bytes"]


def test_bytes_kept_grow_with_the_batch():
    few, many = (scale_parts.step_cost(TINY, 16, batch, SETUP) for batch in (1, 3))
    for name in ("adaptformer", scale_page.ACTIVATIONS):
        assert many[name]["bytes"] == pytest.approx(3 * few[name]["bytes"], rel=0.05)


def test_many_adapters():
    found = scale_parts.many_adapters("adaptformer", (1, 3), TINY, 16, SETUP)
    first, last = found
    # 2 blocks of 64 -> 64 -> 64 with biases, and a head for 10 labels
    assert first["parameters"] == last["parameters"] == 4 * (2 * 2 * (64 * 64 + 64) + 10 * 64 + 10)
    assert first["modules"] == last["modules"] > 2
    assert min(last[key] for key in ("add", "switch", "forward", "plain", "memory")) > 0


@pytest.mark.parametrize("path", ["streamed", "mapped"])
def test_image_path(path, tmp_path):
    count = scale_parts.BATCH + 8
    found = scale_parts.image_path(path, count, str(tmp_path))
    assert found["files"] > count * 1000
    assert found["rest"] > 0


def test_images(tmp_path):
    batches = list(scale_parts.streamed(scale_parts.write_images(tmp_path, 40)))
    assert [tuple(batch["pixel_values"].shape) for batch in batches] == [(32, 3, 64, 64), (8, 3, 64, 64)]
    labels = torch.cat([batch["labels"] for batch in batches])
    assert labels.bincount().tolist() == [4] * 10


def test_model_memory():
    found = scale_parts.model_memory(TINY, 16)
    assert found["full"]["trained"] == found["parameters"]
    assert found["lst"]["bytes"] < found["full"]["bytes"]


def test_resume(tmp_path):
    path = tmp_path / "points.jsonl"
    calls = []

    def task(part, case, sizes):
        def find():
            calls.append((part, case))
            return [{"found": size} for size in sizes]

        return part, case, sizes, find

    wanted = [task("batch", "", (1,)), task("adapters", "vpt", (1, 10))]
    scale.append_points(path, [point("adapters", "vpt", 1, {"found": 0}), point("batch", "", 1, {}, scale.Setup(9))])
    with path.open("a") as file:
        file.write('{"part": "ba')
    scale.measure(wanted, path, SETUP, lambda: None)
    assert calls == [("batch", ""), ("adapters", "vpt")]
    points = {(p.part, p.case, p.size): p.values for p in scale.read_points(path, SETUP)}
    assert points == {("adapters", "vpt", 1): {"found": 0}, ("adapters", "vpt", 10): {"found": 10},
                      ("batch", "", 1): {"found": 1}}  # fmt: skip
    scale.measure(wanted, path, SETUP, lambda: None)
    assert len(calls) == 2


def test_tasks():
    found = [(part, case, sizes) for part, case, sizes, _ in scale.tasks(scale.PARTS, False, SETUP)]
    assert ("tokens", "", (4096,)) in found
    assert ("depth", "", (40,)) in found
    assert ("adapters", "vpt", (1, 10, 100, 1000)) in found
    assert ("images", "streamed", (100_000,)) in found
    quick = [(part, case, sizes) for part, case, sizes, _ in scale.tasks(scale.PARTS, True, SETUP)]
    assert {part for part, _, _ in quick} == set(scale.PARTS)
    assert len(quick) < len(found)


def test_page():
    adapter = {"parameters": 200_000, "modules": 25, "switch": 1.0, "forward": 3.0, "plain": 2.0, "add": 40.0}
    images = {"start": 1.0, "memory": 5e6, "growth": 0.0, "files": 1e6}
    points = [
        point("tokens", "", 196, cost()),
        point("tokens", "", 784, cost(4)),
        *(point("adapters", "vpt", n, adapter | {"memory": 1e8 + 250_000 * n}) for n in (1, 10, 100)),
        *(point("images", "mapped", n, images | {"rest": n / 1000, "disk": 3000 * n}) for n in (1000, 10_000)),
        point("models", "vit_s", 1, memory(22_000_000, 20_000_000)),
    ]
    page = scale_page.page(points, SETUP)
    assert row(page, "tokens", "784")[2:4] == ["2.00", "1.25"]
    assert "4.0 times the tokens keep 4.0 to 4.0 times the bytes and take 4.0 times the time of A." in page
    assert row(page, "vpt", "10")[3] == "-"
    assert "for each module, kB, at the largest number: vpt 2.0." in page
    assert "times that with one adapter: vpt 1.0 (at 100)." in page
    assert row(page, "vpt", "100")[2:7] == ["200", "50", "25", "1.0", "1.50"]
    assert row(page, "mapped", "1,000,000 (extrapolated)") == [
        "mapped", "1,000,000 (extrapolated)", "1.0", "1.00", "5", "0.0", "3,000"]  # fmt: skip
    # 90 % of 8 GiB less 4 x 22 M and 16 x 1 M, over 20 MB an image
    assert row(page, "ViT-S/16", "adaptformer")[2] == str(int((0.9 * 8 * 2**30 - 88e6 - 16e6) // 20e6))
    assert max(map(len, page.splitlines())) <= 160
    assert max(len(line) for line in page.splitlines() if not line.startswith("|")) <= 119


def test_a_backbone_that_does_not_fit():
    assert scale_page.largest_batch(memory(3_000_000_000, 10**9), "adaptformer", 8) == 0
    assert scale_page.largest_batch(memory(1_000_000_000, 10**9), "adaptformer", 8) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--parts", "tokens,width"], "--parts width: choose from tokens"), (["--threads", "0"], "--threads 0")],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        scale.main(arguments)
    assert message in capsys.readouterr().err
