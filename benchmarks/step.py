"""Time and memory of a training step of every method, relative to the floors, in one process.

    python benchmarks/step.py

Contestants take turns, some methods at a time and always with both floors: a forward pass without gradients, and a
forward and backward pass with gradients of activations only. What is reported is the median over the rounds of the
ratio to a floor in the same round, so that what else the machine does falls on all alike. Each method is a line in
the results file as soon as its group is done: a run that was killed goes on where it stopped.

`adapters` needs another version of transformers: give an environment that has it as `--adapters_python`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from gpu_page import RESULTS
from gpu_rows import read_rows
from lines import append_lines, read_lines
from peft import get_peft_model
from step_methods import (
    ADAPTERS,
    PEFT_BASELINES,
    all_methods,
    config_of,
    contestant,
    merges,
    setting_of,
)
from step_page import write_page
from step_rounds import (
    ACTIVATIONS,
    FORWARD,
    FULL,
    Contestant,
    Setup,
    build_model,
    example,
    floors,
    infer_once,
    kept_bytes,
    median_ms,
    ratio,
    take_turns,
    train_once,
)
from torch import nn

import hf_visual_peft


ROOT = Path(__file__).parents[1]
GET_MODEL = "vit_l"  # on which get_peft_model is measured
IMPORTS = 5


@dataclasses.dataclass(frozen=True)
class Result:
    """What is known of one method on one model.

    Attributes:
        model: key of `MODELS`.
        method: its name.
        setup: of the measurement.
        setting: fields of the config.
        parameters: that train, without the head.
        seconds: of a step of the floor of activations, in the same rounds.
        step: time of a training step, relative to the floor of activations.
        step_to_forward: the same, relative to the floor of a forward pass.
        optimizer: time of a step of AdamW, relative to the floor of activations.
        kept: bytes of activations.
        inference: time of a forward pass with the adapter at work, relative to the plain backbone.
        merged: the same for the merged model; None where nothing merges.
        adapter_bytes: size of the saved adapter, head included.
        load_ms: time to load a second adapter into the model.
        switch_ms: time to switch to another adapter.
    """

    model: str
    method: str
    setup: dict[str, Any]
    setting: dict[str, Any] = dataclasses.field(default_factory=dict)
    parameters: int = 0
    seconds: float = 0.0
    step: float = 0.0
    step_to_forward: float = 0.0
    optimizer: float = 0.0
    kept: int = 0
    inference: float | None = None
    merged: float | None = None
    adapter_bytes: int | None = None
    load_ms: float | None = None
    switch_ms: float | None = None
    kind: str = "step"


@dataclasses.dataclass(frozen=True)
class Built:
    """Time of `get_peft_model` on `GET_MODEL`."""

    method: str
    setup: dict[str, Any]
    seconds: float
    kind: str = "get_peft_model"


@dataclasses.dataclass(frozen=True)
class Imported:
    """Least times of `import peft`, and of `import hf_visual_peft` after it."""

    setup: dict[str, Any]
    peft: float
    hf_visual_peft: float
    kind: str = "import"


Line = Result | Built | Imported
KINDS: dict[str, type[Line]] = {"step": Result, "get_peft_model": Built, "import": Imported}


def key_of(line: Line) -> tuple:
    """What a line is about; of several, the last one counts."""
    setup = json.dumps(line.setup, sort_keys=True)
    return (line.kind, setup, getattr(line, "model", None), getattr(line, "method", None))


def read_results(path: Path) -> dict[tuple, Line]:
    """The last line of each; a truncated one is skipped."""
    found = {}
    for fields in read_lines(path):
        line = KINDS[fields["kind"]](**fields)
        found[key_of(line)] = line
    return found


def append_result(path: Path, line: Line) -> None:
    """Append one line, and flush it to the disk."""
    append_lines(path, [dataclasses.asdict(line)])


def measure_group(model_name: str, names: Iterable[str], setup: Setup) -> list[Result]:
    """Measure methods that take turns with each other and with the floors.

    Args:
        model_name: key of `MODELS`.
        names: of the methods, `"full"` and peft's among them; the floors are always measured, too.
        setup: how.
    """
    inputs = example(setup.batch, device=setup.device)
    both = floors(model_name, setup.device)
    group = [contestant(name, model_name, setup) for name in names if name not in (FORWARD, ACTIVATIONS)]
    everyone = [*both, *(each.model.train() and each for each in group)]
    turns = take_turns(everyone, train_once, inputs, setup.rounds)
    kept = {each.name: kept_bytes(each, inputs) for each in everyone}
    sizes = {each.name: _trained(each.model) for each in group}
    adapters = {each.name: _measure_adapter(each.model) for each in group if each.name != FULL}
    for each in group:
        each.model.eval()
        each.trains, each.optimizer = False, None
    inference = take_turns([both[0], *group], infer_once, inputs, setup.rounds)
    merged = [Contestant(each.name, each.model.merge_and_unload()) for each in group if merges(each.name)]  # type: ignore[operator]
    merged_turns = take_turns([both[0], *merged], infer_once, inputs, setup.rounds) if merged else {}
    seconds = sorted(turn.step for turn in turns[ACTIVATIONS])[setup.rounds // 2]
    results = [
        Result(
            model=model_name,
            method=each.name,
            setup=dataclasses.asdict(setup),
            setting=setting_of(each.name),
            parameters=sizes.get(each.name, 0),
            seconds=seconds,
            step=ratio(turns, each.name, ACTIVATIONS),
            step_to_forward=ratio(turns, each.name, FORWARD),
            optimizer=ratio(turns, each.name, ACTIVATIONS, "optimizer"),
            kept=kept[each.name],
            inference=ratio(inference, each.name, FORWARD) if each.name in adapters else None,
            merged=ratio(merged_turns, each.name, FORWARD) if each in group and each.name in merged_turns else None,
            **adapters.get(each.name, {}),
        )
        for each in everyone
    ]
    return [result for result in results if result.method != FORWARD or result.method in names]


def _trained(model: nn.Module) -> int:
    heads = {id(p) for name, p in model.named_parameters() if "classifier" in name}
    return sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in heads)


def _measure_adapter(model: Any) -> dict[str, Any]:
    """Size of a saved adapter, and times of loading it again and of switching between the two."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = Path(folder, "adapter_model.safetensors").stat().st_size

        def forget() -> None:
            model.set_adapter("default")
            model.delete_adapter("second")

        load = median_ms(lambda: model.load_adapter(folder, "second"), forget)
        model.load_adapter(folder, "second")
        switch = median_ms(lambda: model.set_adapter("second"), lambda: model.set_adapter("default"), times=15)
        forget()
    return {"adapter_bytes": size, "load_ms": load, "switch_ms": switch}


def measure_build(name: str, model: nn.Module, setup: Setup) -> Built:
    """Time `get_peft_model` on a model, and give the model back as it was."""
    taken = []
    for _ in range(3):
        config = config_of(name, model)
        start = time.perf_counter()
        adapted = get_peft_model(model, config)
        taken.append(time.perf_counter() - start)
        adapted.unload()
    return Built(name, dataclasses.asdict(setup), sorted(taken)[1])


def measure_imports(setup: Setup) -> Imported:
    """Time the imports, each time in a new process."""
    code = (
        "from time import perf_counter as now; a = now(); import peft; b = now(); import hf_visual_peft; "
        "print(b - a, now() - b)"
    )
    outputs = [subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(IMPORTS)]
    times = [tuple(map(float, output.split())) for output in outputs]
    first, second = map(
        min, zip(*times, strict=True)
    )  # nothing to relate them to: what other programs take is left out
    return Imported(dataclasses.asdict(setup), first, second)


def measure_adapters(python: str, model_name: str, setup: Setup) -> Result:
    """Measure the `adapters` library in another environment, against the floors there.

    Raises:
        RuntimeError: it failed there.
    """
    command = [python, str(Path(__file__).with_name("step_adapters.py")), model_name, json.dumps(vars(setup))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"--adapters_python {python} failed:\n{done.stderr[-2000:]}")
    return Result(model=model_name, method=ADAPTERS, **json.loads(done.stdout.splitlines()[-1]))


def groups_of(names: list[str], size: int) -> list[list[str]]:
    """Names in groups of at most `size`, of nearly one size."""
    count = -(-len(names) // size)
    return [names[start::count] for start in range(count)]


def measure_missing(
    models: list[str],
    names: list[str],
    setup: Setup,
    done: Callable[[Line], bool],
    save: Callable[[Line], None],
    group_size: int,
    adapters_python: str | None,
) -> None:
    """Measure what is not done yet, and save it group by group."""
    shared = dataclasses.asdict(setup)
    if not done(Imported(shared, 0.0, 0.0)):
        save(measure_imports(setup))
    for model_name in models:
        todo = [name for name in names if not done(Result(model_name, name, shared))]
        if ADAPTERS in todo and adapters_python:
            save(measure_adapters(adapters_python, model_name, setup))
        for group in groups_of([name for name in todo if name != ADAPTERS], group_size):
            for result in measure_group(model_name, group, setup):
                save(result)
            gc.collect()  # peft models hold themselves: a group must be gone before the next is built
    todo = [n for n in names if (n in PEFT_BASELINES or n in hf_visual_peft.list_methods())]
    todo = [name for name in todo if not done(Built(name, shared, 0.0))]
    model = build_model(GET_MODEL) if todo else None
    for name in todo:
        assert model is not None
        save(measure_build(name, model, setup))


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", help="names separated by commas (default: all)")
    parser.add_argument("--models", default="vit_s,vit_b", help="of vit_s, vit_b (default: both)")
    parser.add_argument("--again", action="store_true", help="measure also what is in the results file already")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default: 8)")
    parser.add_argument("--rounds", type=int, default=15, help="that count (default: 15)")
    parser.add_argument("--group", type=int, default=6, help="methods in memory at a time (default: 6)")
    parser.add_argument("--adapters_python", help="python of an environment with the adapters library")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "step.jsonl", help="one line a method")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md", help="the page to write")
    arguments = parser.parse_args(argv)
    names = arguments.methods.split(",") if arguments.methods else all_methods()
    models = arguments.models.split(",")
    for option, given, valid in (("methods", names, all_methods()), ("models", models, ["vit_s", "vit_b"])):
        if unknown := sorted(set(given) - set(valid)):
            parser.error(f"--{option} {', '.join(unknown)}: choose from {', '.join(valid)}.")
    for option in ("threads", "batch", "rounds", "group"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option} {getattr(arguments, option)}: must be at least 1.")
    torch.set_num_threads(arguments.threads)
    setup = Setup(arguments.device, arguments.threads, arguments.batch, arguments.rounds)
    known = {} if arguments.again else read_results(arguments.results)

    def save(line: Line) -> None:
        append_result(arguments.results, line)
        write()

    def write() -> None:
        lines, on_cards = read_results(arguments.results).values(), read_rows(RESULTS).values()
        write_page(arguments.page, list(lines), setup, all_methods(), list(on_cards))

    measure_missing(
        models, names, setup, lambda line: key_of(line) in known, save, arguments.group, arguments.adapters_python
    )
    write()


if __name__ == "__main__":
    main()
