"""Runs the trials of a sweep on Ray Tune, on this machine or on a cluster.

Ray places trials, replaces workers that die, and asks ASHA and Optuna. What is done is not in its files but in the
records of the trials, so that a sweep goes on whatever became of Ray: trials that ended are not given to it again, and
what they measured is told to ASHA and Optuna.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stopping import told
from sweep_space import plain, planned, spaces_of, suggest, suggestion
from sweep_trials import BROKEN, FAILED, OBJECTIVE, RUNNING, STOPPED, TIME, read_record, run_trial, write_record


RETRIES = 3  # of a trial whose worker died
MOST_EVALUATIONS = 100_000  # of a trial, which ASHA wants to know
# of this process and of the workers
SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths in flags are relative to where the command was given
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the recipe logs by --report_to
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # else an interrupted sweep looks like one that is done
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "300",  # to stop a trial that fell behind, before its worker takes the next
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the table is ours
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_register_timeout_seconds": "600",  # a busy machine starts processes slowly
    "RAY_worker_niceness": "0",  # else a trial has less of a busy machine than the recipe alone
    "RAY_prestart_worker_first_driver": "0",  # workers without the variables below would never be used
    "RAY_enable_worker_prestart": "0",
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to anybody
}


def require() -> None:
    """Raise an error if Ray or Optuna is missing.

    Raises:
        ModuleNotFoundError: with the extra that has them.
    """
    try:
        import optuna  # noqa: F401
        import ray.tune  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"A sweep needs the extra 'sweep', with Ray Tune and Optuna: pip install 'hf-visual-peft[sweep]' ({error})"
        ) from error


@contextmanager
def connected(address: str | None, cpus: int | None = None) -> Iterator[None]:
    """Ray, started here or at an address; one that this process uses already stays.

    Args:
        address: of a cluster; None to start Ray here.
        cpus: of this machine for trials; None for all.

    Raises:
        ValueError: there is no cluster at the address.
    """
    import ray

    os.environ.update(SETTINGS)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a worker that died is told by the screen
    if ray.is_initialized():
        yield
        return
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = SETTINGS | {"PYTHONPATH": path, "HF_VISUAL_PEFT_PROGRAM": "hf-visual-peft train"}
    more: dict[str, Any] = {} if address else {"include_dashboard": False, "num_cpus": cpus}
    try:
        ray.init(
            address or "local",
            runtime_env={"env_vars": variables},
            log_to_driver=False,
            logging_level=logging.ERROR,
            **more,
        )
    except ConnectionError as error:
        raise ValueError(f"--ray_address {address}: there is no cluster of Ray. {told(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def resources(given: argparse.Namespace) -> dict[str, float]:
    """What a trial takes: one accelerator where there are some, unless the flags say otherwise.

    Raises:
        ValueError: no machine has so much.
    """
    import ray

    there = ray.cluster_resources()
    gpus = given.gpus_per_trial
    if gpus is None:
        gpus = float(there.get("GPU", 0) > 0)
    for name, wanted, flag in (("CPU", given.cpus_per_trial, "cpus"), ("GPU", gpus, "gpus")):
        most = max((node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"]), default=0)
        if wanted > most:
            raise ValueError(f"--{flag}_per_trial {wanted:g}: the largest machine has {most:g}")
    return {"cpu": given.cpus_per_trial, "gpu": gpus}


def asha(grace: int, records: Sequence[Mapping[str, Any]], output: Path) -> Any:
    """ASHA for each data set by itself, which knows the trials that ended, and records those that it stops.

    Args:
        grace: evaluations before a trial can be stopped.
        records: of the trials that ended.
        output: folder of the sweep.
    """
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

    class Asha(FIFOScheduler):
        """Trials of one data set do not compete with those of another."""

        def __init__(self) -> None:
            super().__init__()
            self.of_data: dict[str, Any] = {}

        def of(self, data: str) -> Any:
            if data not in self.of_data:
                names = {"time_attr": TIME, "metric": OBJECTIVE, "mode": "max"}
                most = max(MOST_EVALUATIONS, grace)
                self.of_data[data] = ASHAScheduler(grace_period=grace, max_t=most, **names)
            return self.of_data[data]

        def on_trial_add(self, controller: Any, trial: Any) -> None:
            self.of(plain(trial.config)["data"]).on_trial_add(controller, trial)

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            found = plain(trial.config)
            decision: str = self.of(found["data"]).on_trial_result(controller, trial, result)
            if decision == TrialScheduler.STOP:
                record = read_record(output, found)
                if record["state"] == RUNNING:
                    write_record(output, record | {"state": STOPPED, "score": result[OBJECTIVE]})
            return decision

        def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
            self.of(plain(trial.config)["data"]).on_trial_complete(controller, trial, result)

        def on_trial_remove(self, controller: Any, trial: Any) -> None:
            self.of(plain(trial.config)["data"]).on_trial_remove(controller, trial)

        def on_trial_error(self, controller: Any, trial: Any) -> None:
            pass

    scheduler = Asha()
    for number, record in enumerate(records):
        earlier = SimpleNamespace(trial_id=f"earlier {number}", config={"trial": record["trial"]})
        scheduler.on_trial_add(None, earlier)
        for count, (_, score) in enumerate(record["curve"], 1):
            scheduler.of(record["trial"]["data"]).on_trial_result(None, earlier, {TIME: count, OBJECTIVE: score})
    return scheduler


def optuna_search(
    given: argparse.Namespace, ended: Sequence[Mapping[str, Any]], begun: Sequence[Mapping[str, Any]]
) -> Any:
    """Optuna's sampler, which knows the trials that ended and begins with those that did not.

    Args:
        given: flags of the sweep.
        ended: records.
        begun: records of trials that began and did not end.
    """
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spaces, fixed = spaces_of(given), {"data": given.dataset_name[0], "seed": given.seeds[0]}
    space = functools.partial(suggest, spaces, fixed)
    storage, name = optuna.storages.InMemoryStorage(), "sweep"
    study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
    for record in ended:
        params = suggestion(record["trial"], spaces[record["trial"]["method"]])
        known = optuna.trial.FixedTrial(params)
        space(known)  # finds the distributions
        score = record.get("score", FAILED)
        study.add_trial(optuna.trial.create_trial(params=known.params, distributions=known.distributions, value=score))
    return OptunaSearch(
        space=space,
        metric=OBJECTIVE,
        mode="max",
        storage=storage,
        study_name=name,
        points_to_evaluate=[suggestion(r["trial"], spaces[r["trial"]["method"]]) for r in begun] or None,
        # another seed, or it would draw what it drew before
        sampler=optuna.samplers.TPESampler(seed=given.seeds[0] + len(ended)),
    )


def callback(output: Path, show: Callable[[Mapping[str, Any], str], None]) -> Any:
    """Tells the screen of results, and records trials whose workers kept dying."""
    from ray import tune

    class Told(tune.Callback):
        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            show(plain(trial.config), RUNNING)

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            show(plain(trial.config), RUNNING)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            show(plain(trial.config), "ended")

        def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            show(plain(trial.config), "recovered")

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            record = read_record(output, plain(trial.config))
            error = trial.get_error()
            cause = f": {told(error)}" if isinstance(error, BaseException) else ""
            if record["state"] == RUNNING:
                reason = f"its worker ended {RETRIES + 1} times{cause}"
                write_record(output, record | {"state": BROKEN, "reason": reason})
            show(plain(trial.config), "ended")

    return Told()


def search(
    given: argparse.Namespace,
    others: Sequence[str],
    records: Sequence[Mapping[str, Any]],
    seconds: float | None,
    show: Callable[[Mapping[str, Any], str], None],
) -> None:
    """Run the trials that did not end yet.

    Args:
        given: flags of the sweep.
        others: flags of all trials.
        records: of the trials that began.
        seconds: how long it may take; None without a limit.
        show: called with a trial, and `running`, `recovered` after its worker died, or `ended`.
    """
    output = given.output_dir.resolve()
    ended = [record for record in records if record["state"] != RUNNING]
    with connected(given.ray_address):
        from ray import tune

        optuna = given.search == "optuna"
        done = [record["trial"] for record in ended]
        left = [] if optuna else [trial for trial in planned(given) if trial not in done]
        count = given.num_trials - len(ended) if optuna else len(left)
        if count <= 0:
            return
        start = {"others": list(others), "output": str(output), "most": given.max_trained, "start": os.getcwd()}
        trainable = tune.with_resources(tune.with_parameters(run_trial, **start), resources(given))
        begun = [record for record in records if record["state"] == RUNNING]
        tuner = tune.Tuner(
            trainable,
            param_space=None if optuna else {"trial": tune.grid_search(left)},
            tune_config=tune.TuneConfig(
                metric=OBJECTIVE,
                mode="max",
                search_alg=optuna_search(given, ended, begun) if optuna else None,
                scheduler=asha(given.asha, ended, output) if given.asha else None,
                num_samples=count if optuna else 1,
                reuse_actors=True,  # so that a worker keeps its backbone
                time_budget_s=seconds,
            ),
            run_config=tune.RunConfig(
                name=f"ray-{time.time_ns()}",
                storage_path=str(output / ".ray"),
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                callbacks=[callback(output, show)],
                verbose=0,
            ),
        )
        tuner.fit()
