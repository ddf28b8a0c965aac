r"""Run methods by a protocol: every task, seed and number of shots, tuned on validation where the protocol says so.

    hf-visual-peft benchmark --protocol vtab-d --data_dir vtab-1k --methods adapterplus lora \
        --model_name_or_path google/vit-base-patch16-224-in21k --output_dir out/vtab

A protocol is a file of recipes/protocols, such as vtab-a to vtab-d, fgvc and few-shot, or your own. --data_dir has a
folder for each task, with `images/` and lists such as train800val200.txt, whose lines are `path class`. Every run
leaves a JSON with its accuracy and a fingerprint of its test images; runs that are there are not repeated. At the end
stands a table: the mean over tasks and over groups of tasks, PPT, the standard deviation over seeds, and paired tests.
Other flags go to every run, after those of the protocol.

Exit status: 0 done, 1 error, 2 wrong flags.
"""

from __future__ import annotations

import hf_visual_peft  # noqa: F401  first: it hides notices that other packages print on import


# isort: split
import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import image_classification
from peft import PeftConfig
from protocol import Protocol, as_table, check_data, drawn, read_list, read_protocol
from protocol_results import read_runs, summary, table_of
from stopping import run_readably

from hf_visual_peft.sharing.card import SavedAdapter
from hf_visual_peft.sharing.files import write_aside


OWN = [
    "method",
    "train_file",
    "validation_file",
    "test_file",
    "dataset_name",
    "train_dir",
    "validation_dir",
    "test_dir",
    "seed",
    "output_dir",
    "train_split",
    "validation_split",
    "test_split",
    "train_val_split",
    "do_predict",
    "eval_only",
]


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = argparse.ArgumentParser(
        prog="hf-visual-peft benchmark",
        usage="hf-visual-peft benchmark --protocol NAME --data_dir DIR --model_name_or_path MODEL --methods NAME ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--protocol", required=True, help="name of one of recipes/protocols, or a YAML file")
    add("--data_dir", type=Path, required=True, help="with a folder for each task")
    add("--methods", nargs="+", required=True, metavar="NAME", help="as --method of the recipe")
    add("--tasks", nargs="+", metavar="TASK", help="default: all of the protocol")
    add("--output_dir", type=Path, required=True)
    add("--traceback", action="store_true", help="show where in the code an error arose")
    return parser


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str], Protocol]:
    """The flags of this command, those of every run, and the protocol."""
    parser = build_parser()
    given, others = parser.parse_known_args(argv)
    if importlib.util.find_spec("scipy") is None:
        parser.error("the paired tests need the extra 'benchmark': pip install 'hf-visual-peft[benchmark]'")
    for flag in [word.partition("=")[0].removeprefix("--") for word in others if word.startswith("--")]:
        if flag in OWN:
            parser.error(f"--{flag} is set by the protocol")
    try:
        protocol = read_protocol(given.protocol)
        given.tasks = given.tasks or list(protocol.tasks)
        if unknown := [task for task in given.tasks if task not in protocol.tasks]:
            raise ValueError(f"--tasks {' '.join(unknown)}: the tasks of the protocol are {', '.join(protocol.tasks)}")
        tuned = any(len(protocol.settings(method)) > 1 for method in given.methods)
        check_data(protocol, given.data_dir, given.tasks, tuned)
    except ValueError as error:
        parser.error(str(error))
    return given, others, protocol


def words_of(protocol: Protocol, method: str, setting: Mapping[str, Any], others: Sequence[str]) -> list[str]:
    """The flags of a run, without those of data."""
    words = ["--method", method]
    for flag, value in {**protocol.flags, **setting}.items():
        words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return [*words, *others]


def write_lists(folder: Path, **rows: Sequence[tuple[str, int]]) -> list[str]:
    """Write tables of images; the flags that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    words = []
    for split, found in rows.items():
        write_aside(folder / f"{split}.csv", as_table(found))
        words += [f"--{split}_file", str(folder / f"{split}.csv")]
    return words


def tune(
    given: argparse.Namespace, protocol: Protocol, others: Sequence[str], method: str, task: str
) -> dict[str, Any]:
    """The values that are best on validation for a task, of equal ones the first; found once."""
    settings = protocol.settings(method)
    if len(settings) == 1:
        return settings[0]
    place, data = given.output_dir / "tuning" / method / task, given.data_dir / task
    rows = {split: read_list(data, protocol.lists[f"tune_{split}"]) for split in ("train", "validation")}
    files = write_lists(place, **rows)
    best: tuple[float, dict[str, Any]] | None = None
    for number, setting in enumerate(settings):
        result = place / f"{number}.json"
        if not result.is_file():
            words = [*words_of(protocol, method, setting, others), *files, "--seed", str(protocol.seeds[0])]
            words += ["--output_dir", str(place / "run"), "--overwrite_output_dir", "--checkpointing_steps", "no"]
            found = image_classification.main(words)
            write_aside(result, json.dumps({"setting": setting, "accuracy": found["eval_accuracy"]}))
        accuracy = json.loads(result.read_text(encoding="utf-8"))["accuracy"]
        if best is None or accuracy > best[0]:
            best = accuracy, setting
    assert best is not None
    return best[1]


def run(given: argparse.Namespace, protocol: Protocol, others: Sequence[str]) -> None:
    """All runs that are not there yet."""
    for method in given.methods:
        for task in given.tasks:
            setting = None
            for shots in protocol.shots:
                for seed in protocol.seeds:
                    name = f"{method}-{task}" + (f"-{shots}" if shots else "") + f"-{seed}"
                    result = given.output_dir / "runs" / f"{name}.json"
                    if result.is_file():
                        continue
                    setting = tune(given, protocol, others, method, task) if setting is None else setting
                    rows = {key: read_list(given.data_dir / task, protocol.lists[key]) for key in ("train", "test")}
                    if shots:
                        rows["train"] = drawn(rows["train"], shots, seed)
                    folder = given.output_dir / "models" / name
                    words = words_of(protocol, method, setting, others) + write_lists(folder / "splits", **rows)
                    words += ["--seed", str(seed), "--train_val_split", "0", "--output_dir", str(folder)]
                    words += ["--resume_from_checkpoint", "auto"]
                    found = image_classification.main(words)
                    about = {"method": method, "task": task, "seed": seed, "shots": shots, "setting": setting}
                    about |= {"protocol": protocol.name, "group": protocol.tasks[task].get("group")}
                    about |= {
                        "accuracy": found["test_accuracy"],
                        "fingerprint": found["fingerprint"]["test"],
                        "trained": without_head(found, folder, method),
                        "classes": protocol.tasks[task]["classes"],
                        "command": found["command"],
                    }
                    result.parent.mkdir(parents=True, exist_ok=True)
                    write_aside(result, json.dumps(about, indent=1))


def without_head(found: Mapping[str, Any], folder: Path, method: str) -> int:
    """How many parameters a run trained beside its head."""
    if method in ("linear", "full"):
        return 0 if method == "linear" else found["trainable_parameters"]
    head = SavedAdapter.read(folder, PeftConfig.from_pretrained(str(folder))).head_parameters
    return found["trainable_parameters"] - head


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, sum up, print; return the content of `summary.json`."""
    given, others, protocol = parse(argv)
    run(given, protocol, others)
    found = summary(read_runs([given.output_dir / "runs"]))
    write_aside(given.output_dir / "summary.json", json.dumps(found, indent=1))
    print(table_of(found))
    return found


if __name__ == "__main__":
    run_readably(main, show_traceback="--traceback" in sys.argv)
