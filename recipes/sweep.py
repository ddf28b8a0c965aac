r"""Search methods, hyper-parameters, seeds and data sets with Ray Tune, and choose on validation.

    hf-visual-peft sweep --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name beans \
        --methods vpt ssf --values learning_rate=1e-3,1e-2 vpt.num_virtual_tokens=5,20 --output_dir out/sweep

A trial is a run of `hf-visual-peft train`, and other flags go to every trial. `--search grid` takes all combinations
of the values; `random` draws --num_trials, also from ranges such as `learning_rate=1e-4..1e-1`, which are logarithmic;
`optuna` lets Optuna's sampler choose them. A value with a method before it, as above, belongs to that method alone.
`--asha` stops trials early that fall behind on validation.

A worker that dies is replaced, and its trial goes on from its last checkpoint. The same command continues a sweep that
was stopped or killed: trials that ended are not repeated. Trials do not see the test split; it is read once, for the
winner of each data set. `sweep.json` has all results, `trials/` a folder and a record for each trial.

Exit status: 0 done, 1 error, 2 wrong flags, 130 interrupted.
"""

from __future__ import annotations

import hf_visual_peft  # noqa: F401  first: it hides notices that other packages print on import


# isort: split
import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import image_classification
import numpy as np
import sweep_ray
from arguments import parse_args
from comparison import quiet
from filelock import FileLock, Timeout
from stopping import run_readably
from sweep_screen import Table, table_of
from sweep_space import OWN, name_of, planned, settings_of, spaces_of, values_told, words_of
from sweep_trials import BROKEN, FEATURES, FINISHED, RUNNING, TRIALS, read_record, read_records, record_file
from training_options import at_least

from hf_visual_peft.sharing.files import write_aside


RESULTS = "sweep.json"
NUM_TRIALS = 20  # of a search without an end of its own
# flags that may change when a sweep continues
FREE = ("ray_address", "cpus_per_trial", "gpus_per_trial", "max_hours", "traceback", "output_dir", "retry_failed")


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command; it also takes those of the recipe."""
    parser = argparse.ArgumentParser(
        prog="hf-visual-peft sweep",
        usage="hf-visual-peft sweep --model_name_or_path MODEL --dataset_name DATA ... --methods NAME ... [flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset_name", nargs="+", required=True, metavar="DATA", help="data sets of the Hub, or folders")
    add("--methods", nargs="+", required=True, metavar="NAME", help="as --method of the recipe")
    add("--values", nargs="+", default=[], metavar="FLAG=A,B", help="of flags of the recipe; see above. "
        "'FLAG=1 2,3' has two values, of which the first has two words")  # fmt: skip
    add("--seeds", nargs="+", type=at_least(0), default=[0], help="each setting trains once for each (0)")
    add("--search", choices=["grid", "random", "optuna"], default="grid", help="how values are chosen (grid)")
    add("--asha", nargs="?", const=1, type=at_least(1), metavar="N", help="stop trials that are in the worse three "
        "quarters of their data set after N evaluations on validation (1), after 4 N, 16 N, ...")  # fmt: skip
    add("--num_trials", type=at_least(1), help=f"at most ({NUM_TRIALS}; grid: all)")
    add("--max_hours", type=at_least(0, float), help="of the search: then no trial starts, and those that run stop")
    add("--max_trained", type=at_least(1), metavar="COUNT", help="leave out trials that train more parameters, head "
        "included")  # fmt: skip
    add("--test_split", help="of the data sets, for the winner; none to read none (test, if there is one)")
    add("--output_dir", type=Path, required=True, help="on a cluster: a path that all machines share")
    add("--retry_failed", action="store_true", help="try trials again that failed in an earlier start")
    add("--ray_address", help="of a running cluster, or auto; default: start Ray on this machine")
    add("--cpus_per_trial", type=at_least(0, float), default=1.0, help="as many trials run as the CPUs allow (1)")
    add("--gpus_per_trial", type=at_least(0, float), help="may be a fraction (1 where there is a GPU)")
    add("--traceback", action="store_true", help="show where in the code an error arose")
    return parser


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this command, and those of every trial; all values are tried on the parser of the recipe."""
    parser = build_parser()
    given, others = parser.parse_known_args(argv)
    for flag in [word.partition("=")[0] for word in others if word.startswith("--")]:
        if flag.removeprefix("--") in OWN:
            parser.error(f"{flag} is set by the sweep")
    try:
        check_search(given)
    except ValueError as error:
        parser.error(str(error))
    given.dataset_name = [str(Path(name).resolve()) if Path(name).exists() else name for name in given.dataset_name]
    for method, space in spaces_of(given).items():
        common = {"data": given.dataset_name[0], "method": method, "seed": given.seeds[0]}
        tried: list[dict[str, Any]] = [
            {"values": {}},
            *({"values": {flag: str(v)}} for flag, found in space.items() for v in found),
        ]
        for values in tried:
            parse_args([*words_of(common | values, others), "--output_dir", str(given.output_dir / TRIALS / "none")])
    return given, others


def check_search(given: argparse.Namespace) -> None:
    """Raise an error for flags that do not work together, and set the number of trials.

    Raises:
        ValueError: with what to change.
    """
    for name in ("dataset_name", "methods", "seeds"):
        if len(set(getattr(given, name))) < len(getattr(given, name)):
            raise ValueError(f"--{name}: each is given once")
    spaces = spaces_of(given)
    if given.search == "grid" and any(isinstance(v, tuple) for space in spaces.values() for v in space.values()):
        raise ValueError("--search grid takes lists of values: a range as A..B needs random or optuna")
    if given.search == "optuna" and (len(given.seeds) > 1 or len(given.dataset_name) > 1):
        raise ValueError("--search optuna learns from one number a trial: give one seed and one data set")
    if given.search != "grid":
        given.num_trials = given.num_trials or NUM_TRIALS
    if settings_of(given) == 0:
        each = len(given.seeds) * len(given.dataset_name)
        raise ValueError(f"--num_trials {given.num_trials}: one setting takes {each}, for each data set and seed")


# ------------------------------------------------------------------------------------------------------------- state


def opened(given: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """What an earlier start with the same flags left, or a new state.

    Raises:
        ValueError: the folder has a sweep with other flags, or something else.
    """
    flags = {key: value for key, value in vars(given).items() if key not in FREE}
    settings = json.loads(json.dumps(flags | {"others": list(others)}))
    file = given.output_dir / RESULTS
    if not file.is_file():
        if given.output_dir.exists() and (not given.output_dir.is_dir() or any(given.output_dir.iterdir())):
            raise ValueError(f"--output_dir {given.output_dir} exists and holds no sweep: choose another.")
        return {"kind": "sweep", "settings": settings, "seconds": 0.0}
    try:
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        earlier = state["settings"]
        differ = [key for key in settings if earlier[key] != settings[key]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not readable ({error}): choose another --output_dir.") from error
    if differ:
        told = ", ".join(f"{key} {earlier[key]}, now {settings[key]}" for key in differ)
        raise ValueError(f"--output_dir {given.output_dir} has a sweep with {told}: choose another.")
    return state


def save(given: argparse.Namespace, state: Mapping[str, Any]) -> None:
    """Write the state as a whole."""
    given.output_dir.mkdir(parents=True, exist_ok=True)
    write_aside(given.output_dir / RESULTS, json.dumps(state, indent=1, ensure_ascii=False))


def run_search(given: argparse.Namespace, others: Sequence[str], state: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the trials that are left; the records of all.

    Raises:
        ValueError: trials are left though the time is not over.
    """
    output = given.output_dir
    if given.retry_failed:
        for record in read_records(output):
            if record["state"] == BROKEN:
                shutil.rmtree(output / TRIALS / name_of(record["trial"]), ignore_errors=True)
                record_file(output, record["trial"]).unlink()
    before, started = state["seconds"], time.monotonic()
    left = None if given.max_hours is None else 3600 * given.max_hours - before
    wanted = given.num_trials if given.search == "optuna" else len(planned(given))

    def keep_time() -> None:
        state["seconds"] = before + time.monotonic() - started
        save(given, state)

    save(given, state)
    if left is None or left > 0:
        with Table(output, wanted, keep_time) as table:
            sweep_ray.search(given, others, table.begin(read_records(output)), left, table.show)
        keep_time()
    records = read_records(output) if given.search == "optuna" else [read_record(output, t) for t in planned(given)]
    unfinished = [record for record in records if record["state"] == RUNNING]
    over = given.max_hours is not None and state["seconds"] >= 3600 * given.max_hours
    if unfinished and not over:
        raise ValueError(f"{len(unfinished)} of {wanted} trials did not end. The same command continues the sweep.")
    return records


# ------------------------------------------------------------------------------------------------------------ choice


def winners(records: Sequence[Mapping[str, Any]], retry: str = "") -> dict[str, list[dict[str, Any]]]:
    """For each data set the trials, one for each seed, of the setting with the best mean score on validation.

    Args:
        records: of all trials.
        retry: how failed trials are tried again.

    Raises:
        ValueError: there is none.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["state"] == FINISHED:
            trial = record["trial"]
            groups.setdefault(json.dumps([trial["data"], trial["method"], trial["values"]]), []).append(dict(record))
    best: dict[str, tuple[tuple[int, float], list[dict[str, Any]]]] = {}
    for members in groups.values():
        # a setting of which a seed failed or was stopped does not win by those that are left
        rank = len(members), float(np.mean([record["score"] for record in members]))
        data = members[0]["trial"]["data"]
        if data not in best or rank > best[data][0]:
            best[data] = rank, members
    missing = sorted({record["trial"]["data"] for record in records} - set(best))
    if missing:
        of = [record for record in records if record["trial"]["data"] == missing[0]]
        cause = next((record for record in of if record["state"] == BROKEN), None)
        cause = cause or next((record for record in of if "reason" in record), None)
        told = (
            f" The first cause, of {cause['trial']['method']}: {cause['reason'].rstrip('.')}.{retry}" if cause else ""
        )
        raise ValueError(f"No trial of {Path(missing[0]).name} was finished.{told}")
    return {data: members for data, (_, members) in best.items()}


def test(record: Mapping[str, Any], given: argparse.Namespace, others: Sequence[str]) -> dict[str, Any] | None:
    """What a trial's model reaches on the test split; None without one."""
    trial = record["trial"]
    folder = given.output_dir / TRIALS / name_of(trial)
    words = [*words_of(trial, others), "--cache_features=", "--eval_only", "--model_name_or_path", str(folder)]
    words += ["--validation_split", "none", "--streaming", "no"]
    words += ["--test_split", given.test_split] if given.test_split else []
    words += ["--progress", "none", "--output_dir", str(folder / "test"), "--overwrite_output_dir"]
    try:
        with quiet():
            found = image_classification.main(words)
    except ValueError as error:
        if "there is no test split" in str(error):
            return None
        raise
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def finish(given: argparse.Namespace, others: Sequence[str], state: dict[str, Any]) -> None:
    """Choose on validation, and read the test split for each winner, once."""
    if "winners" not in state:
        records = run_search(given, others, state)
        state["rows"] = records
        state["winners"] = winners(records, " --retry_failed tries those that failed again.")
        state["test"] = {}
        save(given, state)
    for data, members in state["winners"].items():
        tested = state["test"].setdefault(data, {})
        for record in members:
            seed = str(record["trial"]["seed"])
            if given.test_split != "none" and seed not in tested:
                tested[seed] = test(record, given, others)
                save(given, state)
    shutil.rmtree(given.output_dir / ".ray", ignore_errors=True)
    shutil.rmtree(given.output_dir / FEATURES, ignore_errors=True)


def told(state: Mapping[str, Any], data: str) -> str:
    """The winner of a data set in a line."""
    members = state["winners"][data]
    trial, criterion = members[0]["trial"], members[0]["criterion"]
    shown = [f"{np.mean([record['figures'][criterion] for record in members]):.4f} on validation"]
    measured = [found[criterion] for found in state["test"][data].values() if found and criterion in found]
    shown.append(f"{np.mean(measured):.4f} on test" if measured else "no test split was read")
    settings = f"{trial['method']} {values_told(trial)}".rstrip()
    seeds = f", in the mean over {len(members)} seeds" if len(members) > 1 else ""
    return f"{Path(data).name}: {settings}: {criterion} {', '.join(shown)}{seeds}."


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Search, choose, test; return the content of `sweep.json`.

    Raises:
        ModuleNotFoundError: the extra `sweep` is not installed.
        ValueError: another sweep runs in the folder, or no trial could train.
    """
    given, others = parse(argv)
    sweep_ray.require()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("A sweep is one process, which starts its workers itself: run it without accelerate launch.")
    state = opened(given, others)
    given.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(given.output_dir / ".lock", timeout=0):
            finish(given, others, state)
    except Timeout:
        raise ValueError(f"--output_dir {given.output_dir}: another sweep is running there.") from None
    print(table_of(state["rows"]))
    for data in state["winners"]:
        print(told(state, data))
    print(f"All results: {given.output_dir / RESULTS}")
    return state


if __name__ == "__main__":
    run_readably(main, show_traceback="--traceback" in sys.argv)
