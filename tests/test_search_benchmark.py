"""benchmarks/search.py: what the page says about runs, and that all adapters have as many parameters as they may."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


path = Path(__file__).parents[1] / "benchmarks" / "search.py"
specification = importlib.util.spec_from_file_location("search_benchmark", path)
benchmark = importlib.util.module_from_spec(specification)  # recipes/ has a module of that name, too
sys.modules[benchmark.__name__] = benchmark  # dataclasses look there
specification.loader.exec_module(benchmark)
WIDTH, DEPTH = 384, 12


def test_each_method_alone_has_the_largest_size_under_the_cap():
    counts = {
        "vpt": lambda p: DEPTH * p * WIDTH,
        "sharedlora": lambda r: DEPTH * 4 * r * WIDTH,
        "pfeiffer": lambda r: DEPTH * (2 * r * WIDTH + r + WIDTH),
    }
    for name, fields in benchmark.ALONE.items():
        (size,) = fields.values()
        assert counts[name](size) <= benchmark.CAP < counts[name](size + 1)


def runs(**tests):
    names = {benchmark.FOUND: 0.8, benchmark.INHERITED: 0.7, "vpt": 0.6, "sharedlora": 0.7, "pfeiffer": 0.5, **tests}
    found = []
    for seed in (0, 1):
        for name, test in names.items():
            part = {"method": "vpt", "num_virtual_tokens": 2, "layers_to_transform": [0, 3]}
            run = {"name": name, "seed": seed, "test": test, "validation": test, "lr": 3e-3, "parameters": 100 + seed}
            found.append({**run, "seconds": 9.0, "supernet_seconds": 4.0, "evaluated": 7, "parts": [part]})
    return found


def page(those, seeds=(0, 1)):
    text = benchmark.report(those, list(seeds), benchmark.Protocol(), benchmark.Settings())
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (0.8, "is at least as good as the best of its three parts alone, sharedlora: 80.0 against 70.0 percent."),
        (0.69, "is not as good as the best of its three parts alone, sharedlora: 69.0 against 70.0 percent."),
    ],
)
def test_the_page_answers_the_question(found, said):
    text = page(runs(**{benchmark.FOUND: found}))
    assert said in text
    assert ("so this is a tie" in text) == (found > 0.68 and found < 0.72)
    assert "seeds: the runs" not in text
    assert "100 to 101" in text
    assert "vpt: num_virtual_tokens 2 in blocks 0, 3" in text


def test_seeds_with_missing_runs_do_not_count():
    text = page(runs()[:-1])
    assert "That is of 1 of 2 seeds" in text
    assert "On average" not in text
    assert "No seed has all of its runs yet" in page(runs()[:2])
