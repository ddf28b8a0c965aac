"""The benchmark of time and memory: what it measures, how it goes on, and what its page says."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from pathlib import Path

import gpu_page
import gpu_rows
import pytest
import step
import step_methods
import step_page
import step_rounds
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import hf_visual_peft


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

SETUP = step_rounds.Setup(batch=2, rounds=3, torch="2.15.0", cores=2)
SHARED = asdict(SETUP)


def tiny(name):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, num_labels=10
    )
    return ViTForImageClassification(config)


@pytest.fixture
def small(monkeypatch):
    """Models and images of no size to speak of."""
    for module in (step, step_methods, step_rounds):
        monkeypatch.setattr(module, "build_model", tiny)
    monkeypatch.setattr(step_rounds, "IMAGE_SIZE", 32)


class Layer(nn.Module):
    """Keeps as much as is known: the input of a square, and the weight, which is a parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 7))

    def forward(self, x):
        return (x @ self.weight).square()


def test_kept_memory_is_counted_once_and_without_parameters():
    layer, x = Layer(), torch.randn(3, 5)
    with step_rounds.count_kept(layer) as kept:
        out = layer(x)
        both = 4 * (3 * 5 + 3 * 7)  # x for the weight's gradient, the product for the square's
        assert kept() == both
        again = layer(x)
        assert kept() == both + 4 * 3 * 7
        del again
        assert kept() == both
        out.sum().backward()
        assert kept() == 0


def test_floor_of_activations(small):
    forward, activations = step_rounds.floors("vit_s", "cpu")
    pixels, labels = step_rounds.example(SETUP.batch)
    seen = []
    embeddings = activations.model.get_submodule("vit.embeddings")
    embeddings.register_forward_hook(lambda module, args, output: seen.append(output))
    step_rounds.train_once(activations, pixels, labels)
    step_rounds.train_once(forward, pixels, labels)
    assert seen[0].grad.abs().sum() > 0
    assert all(p.grad is None for each in (forward, activations) for p in each.model.parameters())
    inputs = (pixels, labels)
    assert step_rounds.kept_bytes(forward, inputs) == 0 < step_rounds.kept_bytes(activations, inputs)


def test_everybody_has_one_turn_a_round_and_ratios_are_of_one_round():
    taken = []

    def turn(contestant, pixels, labels):
        taken.append(contestant.name)
        return step_rounds.Turn(len(taken), 0.5)

    names = ["a", "b", "c"]
    contestants = [step_rounds.Contestant(n, nn.Linear(1, 1)) for n in names]
    turns = step_rounds.take_turns(contestants, turn, step_rounds.example(2), rounds=3, warmup=1)
    assert all(sorted(taken[start : start + 3]) == names for start in range(0, 12, 3))
    assert len(taken) == 12
    assert [len(turns[name]) for name in names] == [3, 3, 3]
    rounds = {
        "a": [step_rounds.Turn(2.0, 1.0), step_rounds.Turn(30.0, 0.0), step_rounds.Turn(5.0, 0.0)],
        "b": [step_rounds.Turn(1.0, 0.0), step_rounds.Turn(10.0, 0.0), step_rounds.Turn(1.0, 0.0)],
    }
    assert step_rounds.ratio(rounds, "a", "b") == 3.0  # of 2, 3 and 5
    assert step_rounds.ratio(rounds, "a", "b", "optimizer") == 0.0


def test_measured_methods(small):
    names = ["ssf", "spt", "aim", "peft-lora", "full", "linearprobe"]
    results = {r.method: r for r in step.measure_group("vit_s", names, SETUP)}
    assert set(results) == {*names, "activations"}
    ssf, lora, video, full = (results[name] for name in ("ssf", "peft-lora", "aim", "full"))
    assert all(r.step > 0 and r.step_to_forward > 0 and r.setup == SHARED for r in results.values())
    assert ssf.parameters == 2 * 16 * (2 * (2 + 4 + 2 + 1) + 2)  # both norms, four projections, MLP; embedding, norm
    assert lora.parameters == 2 * 2 * 2 * 8 * 16
    assert full.adapter_bytes is full.inference is full.merged is None
    assert all(r.adapter_bytes > 0 and r.load_ms > 0 and r.switch_ms > 0 for r in (ssf, lora, video))
    assert ssf.merged > 0 < lora.merged
    assert video.merged is None
    assert results["linearprobe"].kept < results["activations"].kept <= ssf.kept


def test_building_leaves_the_model_as_it_was(small):
    model = tiny("vit_l")
    before = [name for name, _ in model.named_modules()]
    built = step.measure_build("fact", model, SETUP)
    assert built.method == "fact"
    assert built.seconds > 0
    assert [name for name, _ in model.named_modules()] == before


def test_settings():
    assert step.setting_of("vpt") == {"num_virtual_tokens": 10}
    assert step.setting_of("adaptformer") == {"r": 64}
    assert step.config_of("fact", tiny("vit_s")).variant == "tt"
    assert step.setting_of("full") == {}


def test_groups():
    assert step.groups_of(list("abcdefg"), 3) == [["a", "d", "g"], ["b", "e"], ["c", "f"]]


def result(method, model="vit_s", **fields):
    values = {"seconds": 0.5, "step": 1.05, "step_to_forward": 2.1, "optimizer": 0.01, "kept": 2**20}
    return step.Result(model=model, method=method, **{"setup": SHARED, **values, **fields})


def test_a_killed_run_goes_on(tmp_path, small, monkeypatch):
    path = tmp_path / "step.jsonl"
    step.append_result(path, step.Imported(SHARED, 1.0, 0.1))
    step.append_result(path, result("ssf"))
    step.append_result(path, step.Built("ssf", SHARED, 0.1))
    with path.open("a") as file:
        file.write('{"kind": "step", "mod')  # a line that was cut off
    known = step.read_results(path)
    assert len(known) == 3
    saved = []
    monkeypatch.setattr(step, "GET_MODEL", "vit_s")
    monkeypatch.setattr(step, "measure_imports", lambda setup: pytest.fail("measured already"))
    step.measure_missing(
        ["vit_s"],
        ["ssf", "bitfit", step.ADAPTERS],
        SETUP,
        lambda line: step.key_of(line) in known,
        saved.append,
        group_size=4,
        adapters_python=None,
    )
    assert [(type(line).__name__, line.method) for line in saved] == [
        ("Result", "activations"),
        ("Result", "bitfit"),
        ("Built", "bitfit"),
    ]
    for line in saved:
        step.append_result(path, line)
    assert len(step.read_results(path)) == 6
    later = result("ssf", step=9.0)
    step.append_result(path, later)
    assert step.read_results(path)[step.key_of(later)] == later


def test_failure_in_the_other_environment():
    with pytest.raises(RuntimeError, match=r"--adapters_python .* failed"):
        step.measure_adapters(sys.executable, "nothing", SETUP)


def test_page(tmp_path):
    lines = [
        result("activations", step=1.0),
        result("forward", step=0.5, step_to_forward=1.0),
        result("ssf", step=1.2, kept=3 * 2**20, merged=1.03, adapter_bytes=1000, load_ms=5.0, switch_ms=1.5),
        result("bitfit", kept=2**21, merged=0.99, adapter_bytes=900, load_ms=5.0, switch_ms=12.0),
        result("lst", step=0.6, step_to_forward=1.2, adapter_bytes=900, load_ms=5.0, switch_ms=1.0),
        result("pfeiffer", setup={**SHARED, "rounds": 1}),
        step.Built("ssf", SHARED, 1.5),
        step.Imported(SHARED, 4.0, 0.2),
    ]
    page = tmp_path / "performance.md"
    step_page.write_page(page, lines, SETUP, ["activations", "ssf", "bitfit", "vpt"])
    text = page.read_text()
    cells = {
        row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]]
        for row in text.splitlines()
        if row.startswith("|")
    }
    assert cells["ssf, ViT-S/16: step / A"] == ["at most 1.12", "1.200", "**no**"]
    assert cells["ssf, ViT-S/16: kept / bitfit's"] == ["at most 1.05", "1.500", "**no**"]
    assert cells["lst, ViT-S/16: step / F"] == ["at most 1.25", "1.200", "yes"]
    assert cells["merged / F, ViT-S/16: furthest, ssf"][1:] == ["1.030", "**no**"]
    assert cells["switch, ViT-S/16: bitfit"][1:] == ["12.0", "**no**"]
    assert cells["get_peft_model, ViT-L/16: ssf"][1:] == ["1.50", "**no**"]
    assert cells["import, beside peft's"][1:] == ["0.20", "yes"]
    assert "pfeiffer" not in text
    assert "Not measured: vpt." in text
    assert text.index("| *F* ") < text.index("| lst ") < text.index("| *A* ")
    assert "2 threads on 2 cores" in " ".join(text.split())
    assert all(len(line) <= 119 for line in text.splitlines() if not line.startswith(("|", "!")))
    plot = (tmp_path / "performance" / "time_vit_s.svg").read_text()
    assert ">ssf<" in plot
    step_page.write_page(page, lines, SETUP, ["activations", "ssf", "bitfit", "vpt"])
    assert (tmp_path / "performance" / "time_vit_s.svg").read_text() == plot


def test_page_in_docs_is_that_of_the_results(tmp_path):
    lines = list(step.read_results(BENCHMARKS / "step.jsonl").values())
    setup = step_rounds.Setup(**lines[-1].setup)
    page = tmp_path / "performance.md"
    rows = list(gpu_rows.read_rows(gpu_page.RESULTS).values())
    committed = (BENCHMARKS.parent / "docs" / "performance.md").read_text()
    measured = {line.method for line in lines if line.kind == "step"}
    told = {name for names in re.findall(r"Not measured: ([^.]*)\.", committed) for name in re.split(r",\s+", names)}
    # a new method is on the page once it was measured; until then nothing here asks for it
    step_page.write_page(page, lines, setup, [n for n in step.all_methods() if n in measured | told], rows)
    assert page.read_text() == committed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "vpt,aimless"], "--methods aimless: choose from"),
        (["--models", "vit_l"], "--models vit_l: choose from vit_s, vit_b."),
        (["--rounds", "0"], "--rounds 0: must be at least 1."),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        step.main(arguments)
    assert message in capsys.readouterr().err


def test_every_target_names_a_method():
    known = set(hf_visual_peft.list_methods())
    assert {name for name in step_page.STEP_TARGETS if name in known} >= {"ssf", "fact", "hydra", "convpass", "vpt"}
