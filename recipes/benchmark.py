r"""Run methods by a protocol: every task, seed and number of shots, tuned on validation where the protocol says so.

    hf-visual-peft benchmark --protocol vtab-d --data_dir vtab-1k --methods adapterplus lora \
        --model_name_or_path google/vit-base-patch16-224-in21k --output_dir out/vtab

A protocol is a file of recipes/protocols, such as vtab-a to vtab-d, fgvc and few-shot, or your own. --data_dir has a
folder for each task, with `images/` and lists such as train800val200.txt, whose lines are `path class`; a protocol may
name data sets of the Hub, class folders or parquet files instead. Every run leaves a JSON with its accuracy and
fingerprints of its images; runs that are there are not repeated, and refused if they had other images or flags. At the
end stands a table: the mean over tasks and over groups of tasks, PPT, the standard deviation over seeds, and paired
tests. Other flags go to every run, after those of the protocol.

Exit status: 0 done, 1 error, 2 wrong flags.
"""

from __future__ import annotations

import hf_visual_peft  # noqa: F401  first: it hides notices that other packages print on import


# isort: split
import argparse
import functools
import importlib.util
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import image_classification
from arguments import parse_args
from peft import PeftConfig
from protocol import PARTS, Protocol, read_protocol
from protocol_data import Part, Tasks
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
    "dataset_config_name",
    "image_column_name",
    "label_column_name",
    "streaming",
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
    add("--data_dir", type=Path, help="with a folder for each task that is not on the Hub")
    add("--methods", nargs="+", required=True, metavar="NAME", help="as --method of the recipe")
    add("--tasks", nargs="+", metavar="TASK", help="default: all of the protocol")
    add("--output_dir", type=Path, required=True)
    add("--traceback", action="store_true", help="show where in the code an error arose")
    return parser


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str], Protocol, Tasks]:
    """The flags of this command, those of every run, the protocol, and its images."""
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
        access = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for name in ("--cache_dir", "--token", "--data_token"):
            access.add_argument(name)
        tasks = Tasks(protocol, given.data_dir, access.parse_known_args(others)[0])
        given.conditions = {method: conditions(given, protocol, method, others) for method in given.methods}
        tasks.check(given.tasks, any(len(protocol.settings(method)) > 1 for method in given.methods))
    except ValueError as error:
        parser.error(str(error))
    return given, others, protocol, tasks


def conditions(given: argparse.Namespace, protocol: Protocol, method: str, others: Sequence[str]) -> dict[str, str]:
    """What must be the same in runs of a method that are compared, apart from images, seed and what is tuned."""
    words = [*words_of(protocol, method, {}, others), "--train_file", "train.csv"]
    args, config = parse_args([*words, "--output_dir", str(given.output_dir / "models" / "new")])
    free = {*image_classification.FREE.split(), "train_file", "seed"} - {"num_train_epochs", "max_train_steps"}
    found = {name: str(value) for name, value in vars(args).items() if name not in free}
    return found | {"fields": json.dumps(config.to_dict() if config else {}, sort_keys=True, default=sorted)}


def words_of(protocol: Protocol, method: str, setting: Mapping[str, Any], others: Sequence[str]) -> list[str]:
    """The flags of a run, without those of data."""
    words = ["--method", method]
    for flag, value in {**protocol.flags, **setting}.items():
        words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return [*words, *others]


def written(folder: Path, **parts: Part) -> list[str]:
    """Write tables of images; the flags that name them."""
    return [word for split, part in parts.items() for word in (f"--{split}_file", str(part.write(folder, split)))]


def tune(
    given: argparse.Namespace, protocol: Protocol, tasks: Tasks, others: Sequence[str], method: str, task: str
) -> dict[str, Any]:
    """The values that are best on validation for a task, of equal ones the first; found once."""
    settings = protocol.settings(method)
    if len(settings) == 1:
        return settings[0]
    place = given.output_dir / "tuning" / method / task
    parts = {name.removeprefix("tune_"): tasks.part(task, name) for name in PARTS[2:]}
    same = {"conditions": given.conditions[method], "data": {name: part.fingerprint() for name, part in parts.items()}}
    files: list[str] = []
    best: tuple[float, dict[str, Any]] | None = None
    for number, setting in enumerate(settings):
        result = place / f"{number}.json"
        if not result.is_file():
            files = files or written(place, **parts)
            words = [*words_of(protocol, method, setting, others), *files, "--seed", str(protocol.seeds[0])]
            words += ["--output_dir", str(place / "run"), "--overwrite_output_dir", "--checkpointing_steps", "no"]
            found = image_classification.main(words)
            write_aside(result, json.dumps({"setting": setting, "accuracy": found["eval_accuracy"], **same}))
        accuracy = earlier(result, {"setting": setting, **same})["accuracy"]
        if best is None or accuracy > best[0]:
            best = accuracy, setting
    assert best is not None
    return best[1]


def earlier(path: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """A result that is there.

    Raises:
        ValueError: it is not readable, or comes from other images, flags or values than would run now.
    """
    way_out = "choose another --output_dir, or delete it"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        differ = {name: (found[name], value) for name, value in now.items() if found[name] != value}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is broken ({error!r}): {way_out}.") from error
    if "data" in differ:
        names = [name for name, value in now["data"].items() if found["data"].get(name) != value]
        raise ValueError(f"{path} was measured on other images of {' and '.join(names)} than are here: {way_out}.")
    for name, (before, value) in differ.items():
        pairs = [(name, before, value)]
        if isinstance(value, dict):
            keys = sorted({*before, *value})
            pairs = [(key, before.get(key), value.get(key)) for key in keys if before.get(key) != value.get(key)]
        told = "; ".join(f"{key} {before}, now {value}" for key, before, value in pairs)
        raise ValueError(f"{path} was run with {told}: {way_out}.")
    return found


def planned(given: argparse.Namespace, protocol: Protocol) -> Iterator[tuple[str, str, int | None, int, Path]]:
    """Method, task, shots, seed and file of every run."""
    for method, task, shots, seed in itertools.product(given.methods, given.tasks, protocol.shots, protocol.seeds):
        name = f"{method}-{task}" + (f"-{shots}" if shots else "") + f"-{seed}"
        yield method, task, shots, seed, given.output_dir / "runs" / f"{name}.json"


def run(given: argparse.Namespace, protocol: Protocol, tasks: Tasks, others: Sequence[str]) -> None:
    """All runs that are not there yet.

    Raises:
        ValueError: runs that are there do not belong to the others; nothing is trained.
    """

    @functools.cache
    def data(task: str) -> dict[str, str]:
        return {part: tasks.part(task, part).fingerprint() for part in PARTS[:2]}

    for method, task, _, _, result in planned(given, protocol):
        if result.is_file():
            now = {"protocol": protocol.name, "conditions": given.conditions[method], "data": data(task)}
            earlier(result, now)
    tuned = functools.cache(functools.partial(tune, given, protocol, tasks, others))

    @functools.cache
    def whole(task: str) -> dict[str, list[str]]:
        place = given.output_dir / "data" / task
        return {part: written(place, **{part: tasks.part(task, part)}) for part in PARTS[:2]}

    for method, task, shots, seed, result in planned(given, protocol):
        if result.is_file():
            continue
        setting = tuned(method, task)
        folder = given.output_dir / "models" / result.stem
        files = whole(task)["test"]
        if shots:
            files = files + written(folder / "splits", train=tasks.part(task, "train").drawn(shots, seed))
        else:
            files = files + whole(task)["train"]
        words = [*words_of(protocol, method, setting, others), *files, "--seed", str(seed), "--train_val_split", "0"]
        words += ["--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
        found = image_classification.main(words)
        about = {
            "method": method,
            "task": task,
            "seed": seed,
            "shots": shots,
            "setting": setting,
            "protocol": protocol.name,
            "group": protocol.tasks[task].get("group"),
            "accuracy": found["test_accuracy"],
            "fingerprint": found["fingerprint"]["test"],
            "data": data(task),
            "conditions": given.conditions[method],
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
    given, others, protocol, tasks = parse(argv)
    run(given, protocol, tasks, others)
    found = summary(read_runs([given.output_dir / "runs"]))
    write_aside(given.output_dir / "summary.json", json.dumps(found, indent=1))
    print(table_of(found))
    return found


if __name__ == "__main__":
    run_readably(main, show_traceback="--traceback" in sys.argv)
