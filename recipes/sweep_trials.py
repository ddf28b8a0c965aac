"""A trial of a sweep: a run of the recipe, with a record on disk that outlives worker and sweep."""

from __future__ import annotations

import copy
import gc
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import image_classification
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from arguments import parse_args
from comparison import from_features, quiet, reason
from filelock import FileLock
from output_folder import earlier_output
from sweep_space import name_of, plain, words_of
from torch import nn
from training import Hooks, rank_of

from hf_visual_peft.sharing.files import write_aside


TRIALS, FEATURES = "trials", "features"
OBJECTIVE, TIME = "score", "evaluations"  # what a trial reports
FAILED = -1e9  # the score of a trial that cannot train: below that of any other
RUNNING, FINISHED, STOPPED, BROKEN, LARGE = "running", "finished", "stopped", "failed", "too large"


class TooLargeError(ValueError):
    """A trial trains more parameters than --max_trained."""


# ---------------------------------------------------------------------------------------------------------- records


def record_file(output: Path, trial: Mapping[str, Any]) -> Path:
    """Where the record of a trial lies, beside its folder."""
    return output / TRIALS / f"{name_of(trial)}.json"


def read_record(output: Path, trial: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a trial: a new one if it never began."""
    file = record_file(output, trial)
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    return {"trial": dict(trial), "state": RUNNING, "curve": []}


def read_records(output: Path) -> list[dict[str, Any]]:
    """The records of all trials that began."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted((output / TRIALS).glob("*.json"))]


def write_record(output: Path, record: Mapping[str, Any]) -> None:
    """Replace the record of a trial."""
    write_aside(record_file(output, record["trial"]), json.dumps(record, indent=1, ensure_ascii=False))


# ---------------------------------------------------------------------------------------------------------- backbone


class KeptBackbone:
    """Loads the backbone once for all trials of a worker, and gives each a copy with a head of its own.

    The copy is what loading would give: weights that are not in the checkpoint are drawn anew.
    """

    def __init__(self) -> None:
        self.key: str | None = None
        self.model: Any = None
        self.loading: Any = None
        self.loaded = 0  # how often

    def __call__(self, **given: Any) -> tuple[Any, dict[str, Any]]:
        """The same as `from_pretrained` with these arguments."""
        key = repr(sorted(given.items()))
        if key == self.key:
            model = copy.deepcopy(self.model)
            for module in self.drawn(model, self.loading) or ():
                model._init_weights(module)
            return model, copy.deepcopy(self.loading)
        self.key = None
        self.model = self.loading = None  # so that there are never two
        model, loading = transformers.AutoModelForImageClassification.from_pretrained(**given)
        self.loaded += 1
        if self.drawn(model, loading) is not None:
            self.key, self.model, self.loading = key, copy.deepcopy(model), copy.deepcopy(loading)
        return model, loading

    @staticmethod
    def drawn(model: Any, loading: Mapping[str, Any]) -> list[nn.Module] | None:
        """The modules whose weights are not in the checkpoint; None if some of them have modules within."""
        keys = [*loading["missing_keys"], *(found[0] for found in loading["mismatched_keys"])]
        owners = {key.rpartition(".")[0] for key in keys}
        modules = [module for name, module in model.named_modules() if name in owners]
        if len(modules) < len(owners) or any(next(module.children(), None) is not None for module in modules):
            return None
        return modules


BACKBONE = KeptBackbone()  # of this worker


# ------------------------------------------------------------------------------------------------------------ trials


def run_trial(config: Mapping[str, Any], others: Sequence[str], output: str, most: int | None, start: str) -> None:
    """Train a trial in a worker of Ray.

    Args:
        config: the trial, as Ray or Optuna chose it.
        others: flags of all trials.
        output: folder of the sweep.
        most: trained parameters at most.
        start: the folder in which the sweep was started, to which paths in flags are relative.
    """
    import ray
    from ray import tune

    if not ray.get_gpu_ids():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if Path(start).is_dir():
        os.chdir(start)

    def report(score: float, evaluations: int) -> None:
        tune.report({OBJECTIVE: score, TIME: evaluations})

    node = ray.get_runtime_context().get_node_id()
    run(plain(config), others, Path(output), most, report, node)


def run(
    trial: Mapping[str, Any],
    others: Sequence[str],
    output: Path,
    most: int | None,
    report: Callable[[float, int], None] = lambda score, evaluations: None,
    node: str | None = None,
) -> dict[str, Any]:
    """Train a trial, or go on with it, and keep its record; of one that ended only the record is read.

    Args:
        trial: data set, method, values and seed.
        others: flags of all trials.
        output: folder of the sweep.
        most: trained parameters at most.
        report: called with the score and the number of each evaluation.
        node: the machine in the cluster.

    Returns:
        The record.
    """
    locks = output / TRIALS / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{name_of(trial)}.lock"):  # a worker that a killed sweep left may still write
        record = read_record(output, trial)
        for number, (_, score) in enumerate(record["curve"], 1):
            report(score, number)
        if record["state"] == RUNNING:
            record["nodes"] = [*record.get("nodes", []), node]  # more than one: a worker died, or the sweep
            train(record, others, output, most, report)
    report(record.get("score", FAILED), max(len(record["curve"]), 1))
    return record


def train(
    record: dict[str, Any],
    others: Sequence[str],
    output: Path,
    most: int | None,
    report: Callable[[float, int], None],
) -> None:
    """Train a trial to its end, from its last checkpoint if there is one, and complete its record."""
    trial, started = record["trial"], time.perf_counter()
    folder = output / TRIALS / name_of(trial)

    def check(count: int, splits: Sequence[str]) -> None:
        record["trained"] = count
        if "validation" not in splits:
            raise ValueError(
                "a sweep chooses on validation, and there is none: name a split with --validation_split, or hold out "
                "a share of train with --train_val_split 0.15"
            )
        if most is not None and count > most:
            raise TooLargeError(f"{count:,} parameters train, more than --max_trained {most:,}")

    def evaluated(score: float, step: int) -> None:
        # a run that goes on from a checkpoint measures again what came after it
        record["curve"] = [point for point in record["curve"] if point[0] < step] + [[step, score]]
        write_record(output, record)
        report(score, len(record["curve"]))

    AcceleratorState._reset_state(reset_partial_state=True)  # trials may differ in their precision
    GradientState._reset_state()
    try:
        with quiet() as printed:
            results = finished(folder)
            if results is None:
                words = [*words_of(trial, others), *cache_words(trial, others, output / FEATURES)]
                words += ["--output_dir", str(folder), "--test_split", "none", "--progress", "none"]
                words += start_words(folder)
                results = image_classification.main(words, Hooks(check, evaluated, BACKBONE))
            record |= outcome(results)
    except TooLargeError as error:
        record |= {"state": LARGE, "reason": str(error)}
        shutil.rmtree(folder, ignore_errors=True)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code != 2:  # Ray ends a trial so
            raise
        record |= {"state": BROKEN, "reason": reason(error, printed.getvalue())}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    record["seconds"] = record.get("seconds", 0.0) + time.perf_counter() - started
    write_record(output, record)


def finished(folder: Path) -> dict[str, Any] | None:
    """The results of a run that ended, of which only the record is missing."""
    file = folder / "all_results.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def outcome(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the record of a trial keeps of its results."""
    criterion = results["metric_for_best_model"]
    figures = {name.removeprefix("eval_"): value for name, value in results.items() if name.startswith("eval_")}
    return {
        "state": FINISHED,
        "score": rank_of(figures, criterion)[0],
        "criterion": criterion,
        "figures": figures,
        "trained": results["trainable_parameters"],
    }


def start_words(folder: Path) -> list[str]:
    """The flags with which a run goes on, or replaces what a killed one left without a checkpoint."""
    if any(folder.glob("checkpoint-[0-9]*")):
        return ["--resume_from_checkpoint", "auto"]
    return ["--overwrite_output_dir"] if earlier_output(folder) else []


def cache_words(trial: Mapping[str, Any], others: Sequence[str], folder: Path) -> list[str]:
    """The flags with which a trial reads features of the frozen backbone, if its method and its flags allow it."""
    given = any(word.partition("=")[0] in ("--cache_features", "--streaming") for word in others)
    if given or trial["method"] == "full" or not from_features(trial["method"]):
        return []
    words = ["--cache_features", str(folder)]
    try:
        with quiet():
            parse_args([*words_of(trial, others), *words, "--output_dir", str(folder / "none")])
    except SystemExit:  # images change at random, for one
        return []
    return words
