"""`hf-visual-peft sweep`: trials on Ray, on two local nodes."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import accelerate.tracking
import arguments
import image_classification
import psutil
import pytest
import sweep
import sweep_ray
import sweep_screen
import sweep_space
import sweep_trials
import torch
from accelerate.utils import LoggerType
from recipe_runs import RECIPES
from safetensors.torch import load_file


LONG = 500  # seconds that a busy machine may take
QUICK = ["--num_train_epochs", "2", "--per_device_train_batch_size", "8", "--checkpointing_steps", "epoch"]


def words(vit, data, output, *more, methods=("vpt", "ssf")):
    given = ["--model_name_or_path", vit, "--dataset_name", str(data), "--output_dir", str(output)]
    return [*given, "--methods", *methods, *QUICK, *map(str, more)]


def trial_of(data, method="ssf", seed=0, **values):
    return {"data": str(data), "method": method, "values": values, "seed": seed}


# --------------------------------------------------------------------------------------------------------------- Ray


def patiently(start):
    """A node of Ray gives up after 30 seconds, which is too early on a busy machine."""
    for left in (2, 1, 0):
        try:
            return start()
        except Exception as error:
            if not left or "timed out during startup" not in str(error):
                raise


@pytest.fixture(scope="module")
def nodes():
    """Two nodes of Ray with one core each, and this process connected to them."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("optuna")
    from ray.cluster_utils import Cluster

    def patient(start):  # Ray gives a node 30 seconds to start, which is short on a busy machine
        before = psutil.Process().children(recursive=True)
        for _ in range(5):
            with contextlib.suppress(Exception):
                return start()
            for process in psutil.Process().children(recursive=True):  # of a node that did not start
                if process not in before:
                    process.kill()
        return start()

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (sweep_ray.SETTINGS | {"PYTHONPATH": str(RECIPES.parent)}).items():
            patch.setenv(name, value)
        head = {"num_cpus": 1, "include_dashboard": False}
        cluster = patient(lambda: Cluster(initialize_head=True, head_node_args=head))
        try:
            patient(lambda: cluster.add_node(num_cpus=1))
            with sweep_ray.connected(cluster.address):
                assert ray.cluster_resources()["CPU"] == 2
                yield cluster.address
        finally:
            cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(4 * LONG)
def test_two_nodes_share_the_trials_and_a_killed_worker_is_replaced(nodes, vit, photos, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    killed = []

    def kill():
        end = time.monotonic() + LONG
        while time.monotonic() < end and not killed:
            for found in records(out):
                name = sweep_space.name_of(found["trial"])
                if found["state"] == "running" and list((out / "trials" / name).glob("checkpoint-*/*")):
                    killed.extend(kill_holders_of(out / "trials" / ".locks" / f"{name}.lock"))
            time.sleep(0.02)

    given = words(vit, photos, out, "--values", "learning_rate=0.01,0.02", "vpt.layers_to_transform=0,7")
    given += ["--num_train_epochs", "12"]
    watcher = threading.Thread(target=kill)
    watcher.start()
    state = sweep.main([*given, "--ray_address", nodes])
    watcher.join()
    assert len(killed) == 1
    assert len(state["rows"]) == 6
    failed = [row for row in state["rows"] if row["state"] == "failed"]
    assert [row["trial"]["values"]["layers_to_transform"] for row in failed] == ["7", "7"]
    assert all("layers_to_transform" in row["reason"] and "7" in row["reason"] for row in failed)
    fine = [row for row in state["rows"] if row["state"] == "finished"]
    assert len(fine) == 4
    assert all(len(row["curve"]) == 12 for row in fine)  # also that of the killed worker
    assert len({node for row in state["rows"] for node in row["nodes"]}) == 2
    assert sum(len(row["nodes"]) for row in state["rows"]) == 6 + 1

    ((data, (winner,)),) = state["winners"].items()
    assert winner["score"] == max(row["score"] for row in fine)
    folder = out / "trials" / sweep_space.name_of(winner["trial"])
    results = json.loads((folder / "all_results.json").read_text())
    assert results["eval_accuracy"] == winner["score"]
    assert not any(key.startswith("test") for key in results)  # no trial has seen it
    tested = state["test"][data]["0"]["accuracy"]
    assert tested == json.loads((folder / "test" / "evaluation.json").read_text())["accuracy"]
    printed = capsys.readouterr()
    assert "2 of 6 trials failed" in printed.out
    assert f"accuracy {winner['score']:.4f} on validation, {tested:.4f} on test" in printed.out
    assert len(re.findall(r"^photos.*: its worker died; another goes on\.$", printed.err, re.MULTILINE)) == 1
    assert len(re.findall(r"^\d/6 photos", printed.err, re.MULTILINE)) >= 5

    monkeypatch.setattr(sweep, "run_search", lambda *given: pytest.fail("everything is done"))
    monkeypatch.setattr(sweep, "test", lambda *given: pytest.fail("the test split was read"))
    assert sweep.main(given) == json.loads(json.dumps(state))
    with pytest.raises(ValueError, match=r"has a sweep with seeds \[0\], now \[3\]"):
        sweep.main([*given, "--seeds", "3"])


@pytest.mark.slow
@pytest.mark.timeout(4 * LONG)
def test_a_killed_sweep_continues(nodes, vit, photos, tmp_path):
    """With Optuna, on a Ray of its own that dies with it; two nodes continue it."""
    out = tmp_path / "out"
    given = words(vit, photos, out, "--values", "learning_rate=0.01..0.03", methods=("ssf",))
    given += ["--search", "optuna", "--num_trials", "3", "--num_train_epochs", "20"]
    command = [sys.executable, str(RECIPES / "sweep.py"), *given]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + LONG
        # one trial ended and another is under way
        while not (
            (ended := [r for r in records(out) if r["state"] == "finished"])
            and any(r["state"] == "running" and len(r["curve"]) > 2 for r in records(out))
        ):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        ray_and_workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        for other in ray_and_workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                other.kill()
        psutil.wait_procs(ray_and_workers, timeout=LONG)
    assert len(ray_and_workers) > 2
    begun = [r for r in records(out) if r["state"] == "running"]
    assert begun
    files = {sweep_space.name_of(r["trial"]): sweep_trials.record_file(out, r["trial"]) for r in ended}
    written = {name: file.stat().st_mtime_ns for name, file in files.items()}

    state = sweep.main([*given, "--ray_address", nodes])
    assert [row["state"] for row in state["rows"]] == ["finished"] * 3
    assert {name: file.stat().st_mtime_ns for name, file in files.items()} == written  # not done again
    for row in state["rows"]:
        assert [step for step, _ in row["curve"]] == list(range(3, 61, 3))  # none is lost or counted twice
    for before in begun:
        (after,) = [row for row in state["rows"] if row["trial"] == before["trial"]]
        assert after["curve"][: len(before["curve"])] == before["curve"]


def kill_holders_of(file):
    """Kill -9 the workers that hold a file open."""
    killed = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if str(file) in [opened.path for opened in process.open_files()]:
                process.kill()
                killed.append(process.pid)
    return killed


def records(out):
    try:
        return sweep_trials.read_records(out)
    except FileNotFoundError:
        return []


@pytest.mark.slow
@pytest.mark.timeout(4 * LONG)
def test_optuna_and_asha_when_every_trial_fails(nodes, vit, photos, tmp_path):
    given = words(vit, photos, tmp_path / "out", "--values", "layers_to_transform=7,8,9", methods=("ssf",))
    given += ["--search", "optuna", "--num_trials", "2", "--asha"]
    with pytest.raises(ValueError, match=r"No trial of photos.* was finished. The first cause, of ssf: .*transform.*"):
        sweep.main(given)
    assert {r["state"] for r in records(tmp_path / "out")} == {"failed"}


def test_the_extra_is_named(vit, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.tune", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hf-visual-peft\[sweep\]'"):
        sweep.main(words(vit, photos, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_nothing_of_ray_is_imported_before_it_runs():
    code = "import sys, sweep; assert not {'ray', 'optuna'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(RECIPES)})


# ------------------------------------------------------------------------------------------------------------ trials


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_a_worker_loads_the_backbone_once_and_trains_as_a_run_of_its_own(vit, photos, tmp_path, monkeypatch):
    kept = sweep_trials.KeptBackbone()
    monkeypatch.setattr(sweep_trials, "BACKBONE", kept)
    trials = [trial_of(photos, "full", 1, learning_rate="0.1"), trial_of(photos, "vpt", 2), trial_of(photos, "ssf", 1)]
    others = ["--model_name_or_path", vit, *QUICK]
    for trial in trials:
        assert sweep_trials.run(trial, others, tmp_path, None)["state"] == "finished"
    assert kept.loaded == 1
    for trial in trials[1:]:
        alone = tmp_path / f"alone-{trial['method']}"
        more = ["--output_dir", str(alone), "--test_split", "none"]
        image_classification.main([*sweep_space.words_of(trial, others), *more])
        there = weights(tmp_path / "trials" / sweep_space.name_of(trial))
        torch.testing.assert_close(there, weights(alone), rtol=0, atol=0)


def test_trials_share_features_where_they_can(photos, vit, tmp_path):
    others = ["--model_name_or_path", vit, *QUICK, "--train_crop", "none", "--horizontal_flip", "0"]
    for method in ("linear", "lst", "vpt"):
        record = sweep_trials.run(trial_of(photos, method), others, tmp_path, None)
        assert record["state"] == "finished"
        assert ("--cache_features" in all_results(tmp_path, record)["command"]) == (method != "vpt")
    again = sweep_trials.run(trial_of(photos, "linear", learning_rate="0.1"), others, tmp_path, None)
    assert again["state"] == "finished"
    caches = {path.parent for path in (tmp_path / "features").rglob("*.safetensors")}
    assert caches
    # augmented images differ from epoch to epoch
    assert sweep_trials.cache_words(trial_of(photos, "linear"), ["--model_name_or_path", vit], tmp_path) == []


def all_results(output, record):
    return json.loads((output / "trials" / sweep_space.name_of(record["trial"]) / "all_results.json").read_text())


def test_a_trial_goes_on_from_its_checkpoint(photos, vit, tmp_path):
    class Stopped(BaseException):
        pass

    def stop(score, number):
        if number == 3:
            raise Stopped

    trial, others = trial_of(photos), ["--model_name_or_path", vit, *QUICK, "--num_train_epochs", "4"]
    with pytest.raises(Stopped):
        sweep_trials.run(trial, others, tmp_path, None, stop)
    assert len(sweep_trials.read_record(tmp_path, trial)["curve"]) == 3
    reported = []
    record = sweep_trials.run(trial, others, tmp_path, None, lambda score, number: reported.append(number))
    assert record["state"] == "finished"
    assert [step for step, _ in record["curve"]] == [3, 6, 9, 12]
    assert reported == [1, 2, 3, 3, 4, 4]  # ASHA sees what it missed; the third was after the checkpoint
    whole = sweep_trials.run(trial, others, tmp_path / "whole", None)
    assert whole["curve"] == record["curve"]

    # killed after the adapter was written, without a checkpoint: it starts anew
    folder = tmp_path / "trials" / sweep_space.name_of(trial)
    (folder / "all_results.json").unlink()
    sweep_trials.record_file(tmp_path, trial).unlink()
    others = [*others, "--checkpointing_steps", "no"]
    for checkpoint in folder.glob("checkpoint-*"):
        checkpoint.rename(tmp_path / checkpoint.name)
    assert sweep_trials.run(trial, others, tmp_path, None)["curve"] == record["curve"]


def test_trials_that_cannot_be_chosen(photos, vit, tmp_path):
    others = ["--model_name_or_path", vit, *QUICK]
    record = sweep_trials.run(trial_of(photos), others, tmp_path, 10)
    assert record["state"] == "too large"
    assert record["reason"] == f"{record['trained']:,} parameters train, more than --max_trained 10"
    record = sweep_trials.run(
        trial_of(photos, seed=1), [*others, "--validation_split", "none", "--select", "last"], tmp_path, None
    )
    assert record["state"] == "failed"
    assert "--train_val_split" in record["reason"]
    assert record["curve"] == []
    record = sweep_trials.run(trial_of(photos, learning_rate="1e30"), others, tmp_path, None)
    assert "diverged" in record["reason"]
    with pytest.raises(ValueError, match="No trial of photos.* The first cause, of ssf: a sweep chooses"):
        sweep.winners([found for found in records(tmp_path) if "split" in found["reason"]])


# ---------------------------------------------------------------------------------------------------------- searches


def test_seeds_data_sets_and_what_is_tried_again(vit, photos, tmp_path, monkeypatch, capsys):
    """All but Ray, whose place a loop takes."""
    pytest.importorskip("ray.tune")
    pytest.importorskip("optuna")
    ran, seconds_left, cause = [], [], ["it broke"]

    def search(given, others, records, seconds, show):
        seconds_left.append(seconds)
        done = [found["trial"] for found in records if found["state"] != "running"]
        for trial in sweep.planned(given):
            if trial in done:
                continue
            ran.append(sweep_space.name_of(trial))
            if cause and trial["method"] == "vpt":
                broken = {"trial": trial, "state": "failed", "reason": cause[0], "curve": []}
                (given.output_dir / "trials").mkdir(exist_ok=True)
                sweep_trials.write_record(given.output_dir, broken)
            else:
                sweep_trials.run(trial, others, given.output_dir, given.max_trained)
            show(trial, "ended")

    monkeypatch.setattr(sweep_ray, "search", search)
    again = tmp_path / "again"
    shutil.copytree(photos, again)
    shutil.rmtree(again / "test")
    given = ["--model_name_or_path", vit, "--dataset_name", str(photos), str(again), "--methods", "vpt", *QUICK]
    given += ["--seeds", "1", "2", "--output_dir", str(tmp_path / "out"), "--max_hours", "1"]
    with pytest.raises(ValueError, match=r"No trial of .*The first cause, of vpt: it broke\. --retry_failed"):
        sweep.main(given)
    with pytest.raises(ValueError, match="it broke"):
        sweep.main(given)
    assert len(ran) == 4  # what failed is not tried again unless that is wanted
    cause.clear()
    state = sweep.main([*given, "--retry_failed"])
    assert len(ran) == 8
    assert seconds_left[0] == pytest.approx(3600)
    assert seconds_left[2] < 3600
    assert {len(found) for found in state["winners"].values()} == {2}
    assert set(state["test"][str(photos)]) == {"1", "2"}
    assert state["test"][str(again)] == {"1": None, "2": None}
    printed = capsys.readouterr()
    assert "again: vpt: accuracy" in printed.out
    assert "no test split was read" in printed.out
    assert "in the mean over 2 seeds" in printed.out

    # time is up: what ended is chosen from
    monkeypatch.setattr(sweep_ray, "search", lambda *given: pytest.fail("there is no time"))
    late = ["--model_name_or_path", vit, "--dataset_name", str(photos), "--methods", "vpt", *QUICK, "--max_hours", "0"]
    with pytest.raises(ValueError, match="No trial of photos.* was finished"):
        sweep.main([*late, "--output_dir", str(tmp_path / "late")])


def record(method="vpt", seed=0, score=0.5, data="a", state="finished", curve=((3, 0.5),), **more):
    return {
        "trial": trial_of(data, method, seed),
        "score": score,
        "state": state,
        "curve": curve,
        "trained": 10,
    } | more


def test_choice():
    rows = [record("vpt", 0, 0.6), record("vpt", 1, 0.7), record("ssf", 0, 0.9)]
    rows.append({"trial": trial_of("a", "ssf", 1), "state": "failed", "reason": "it broke", "curve": []})
    assert [found["trial"]["method"] for found in sweep.winners(rows)["a"]] == ["vpt", "vpt"]
    rows += [record("ssf", 0, 0.9, data="b"), record("vpt", 0, 0.3, data="b"), record(score=1.0, state="stopped")]
    assert sweep.winners(rows)["b"][0]["trial"]["method"] == "ssf"
    with pytest.raises(ValueError, match="The first cause, of ssf: it broke"):
        sweep.winners([rows[3]])
    with pytest.raises(ValueError, match="No trial of b was finished"):
        sweep.winners([*rows[:3], record(data="b", state="stopped")])
    table = sweep.table_of(rows)
    assert "stopped" in table
    assert "1 of 7 trials failed. The first cause: it broke" in table


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--values", "learning_rate"], "write FLAG=A,B"),
        (["--values", "lora.r=4"], "lora is none of --methods vpt ssf"),
        (["--values", "learning_rate=1e-4..1e-2"], "--search grid takes lists of values"),
        (["--values", "learning_rate=0..1", "--search", "random"], "a range goes from a number above 0"),
        (["--values", "learning_rate=a..b", "--search", "random"], "a range is two numbers"),
        (["--values", "learning_rate=1..2..3", "--search", "random"], "a range is two numbers"),
        (["--values", "learning_rate=1", "vpt.learning_rate=2"], "vpt has values of learning_rate already"),
        (["--values", "learning_rate=0.1,high"], "high"),
        (["--values", "num_virtual_tokens=5"], "those of --method ssf are"),
        (["--values", "vpt.num_virtual_tokens=5,0"], "num_virtual_tokens"),
        (["--values", "seed=1,2"], "seed is set by the sweep"),
        (["--values", "train_dir=a,b"], "train_dir is set by the sweep"),
        (["--method", "vpt"], "--method is set by the sweep"),
        (["--push_to_hub"], "--push_to_hub is set by the sweep"),
        (["--seeds", "1", "1"], "--seeds: each is given once"),
        (["--search", "optuna", "--seeds", "1", "2"], "one seed and one data set"),
        (["--search", "random", "--num_trials", "2", "--seeds", "1", "2", "3"], "one setting takes 3"),
        (["--nonsense", "1"], "unknown: --nonsense 1"),
        (["--methods", "vptt"], "vptt"),
    ],
)
def test_flags_that_make_no_sense(more, told, vit, photos, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        sweep.main([*words(vit, photos, tmp_path / "out"), *more])
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_of_something_else(vit, photos, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and holds no sweep"):
        sweep.main(words(vit, photos, tmp_path))
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match="is not readable"):
        sweep.main(words(vit, photos, tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "sweep.json"]


def test_two_sweeps_in_one_folder(vit, photos, tmp_path):
    pytest.importorskip("ray.tune")
    given, others = sweep.parse(words(vit, photos, tmp_path / "out"))
    sweep.save(given, sweep.opened(given, others))
    with sweep.FileLock(tmp_path / "out" / ".lock"), pytest.raises(ValueError, match="another sweep is running there"):
        sweep.main(words(vit, photos, tmp_path / "out"))


def test_a_terminal_has_a_live_table_and_a_pipe_lines(tmp_path, monkeypatch, capsys):
    (tmp_path / "trials").mkdir()
    running, ended = record("ssf", score=0.7, state="running"), record("vpt", score=0.5)
    del running["score"]
    for found in (running, ended):
        sweep_trials.write_record(tmp_path, found)
    counted = []

    def show(table):
        table.show(running["trial"], "running")
        table.show(ended["trial"], "ended")
        table.show(running["trial"], "recovered")

    with sweep_screen.Table(tmp_path, 3, lambda: counted.append(1)) as table:
        show(table)
    lines = ["1/3 a, vpt, seed 0: 0.5000 on validation", "a, ssf, seed 0: its worker died; another goes on."]
    assert capsys.readouterr().err.splitlines() == lines
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich draws as on a terminal
    monkeypatch.setenv("COLUMNS", "120")
    with sweep_screen.Table(tmp_path, 3, lambda: counted.append(1)) as table:
        show(table)
    drawn = capsys.readouterr().err
    assert re.search(r"ssf .* running", drawn)
    assert re.search(r"vpt .* finished", drawn)
    assert "1 of 3 trials are done." in drawn
    assert counted == [1, 1]


def test_every_trial_is_logged(vit, photos, tmp_path, monkeypatch):
    """In TensorBoard's files, and in runs of trackio that have the trial's name."""
    started = []

    class Recorder(accelerate.tracking.GeneralTracker):
        name, requires_logging_directory, main_process_only = "trackio", False, True

        def __init__(self, project, **more):
            super().__init__()
            started.append(more["name"])

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **more):
            pass

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "trackio", Recorder)
    known = [LoggerType.TENSORBOARD, LoggerType.TRACKIO]
    for module in (accelerate.tracking, arguments):
        monkeypatch.setattr(module, "get_available_trackers", lambda: [*known, *map(str, known)])
    others = ["--model_name_or_path", vit, *QUICK, "--report_to", "tensorboard", "trackio"]
    names = []
    for method in ("linear", "ssf"):
        found = sweep_trials.run(trial_of(photos, method), others, tmp_path, None)
        assert found["state"] == "finished", found
        names.append(sweep_space.name_of(found["trial"]))
        assert list((tmp_path / "trials" / names[-1]).rglob("events.out.tfevents.*"))
    assert started == names


def plan(*more, methods=("vpt", "ssf")):
    given, _ = sweep.parse(words("model", "data", "out", *more, methods=methods))
    return sweep.planned(given)


def test_plans():
    grid = plan("--values", "learning_rate=0.1,0.2", "vpt.num_virtual_tokens=5,6", "--seeds", 0, 1)
    assert len(grid) == len({json.dumps(trial) for trial in grid}) == (4 + 2) * 2
    assert [trial["seed"] for trial in grid] == [0] * 6 + [1] * 6
    assert len(plan("--values", "learning_rate=0.1,0.2", "--num_trials", 3)) == 3

    drawn = ["--search", "random", "--values", "learning_rate=1e-4..1e-2", "vpt.num_virtual_tokens=2..50"]
    assert plan(*drawn) == plan(*drawn) != plan(*drawn, "--seeds", 1)
    assert len(plan(*drawn)) == 20
    for trial in plan(*drawn):
        assert 1e-4 <= float(trial["values"]["learning_rate"]) <= 1e-2
        if trial["method"] == "vpt":
            assert 2 <= int(trial["values"]["num_virtual_tokens"]) <= 50
    # a small space has no more settings than it has
    assert len(plan("--search", "random", "--values", "learning_rate=0.1,0.2")) == 4

    (trial,) = plan("--values", "layers_to_transform=0 1", methods=("ssf",))
    assert sweep_space.words_of(trial, [])[-3:] == ["--layers_to_transform", "0", "1"]


def test_optuna_knows_earlier_trials_and_begins_with_unfinished_ones():
    optuna = pytest.importorskip("optuna")
    pytest.importorskip("ray.tune")
    more = ["--search", "optuna", "--values", "learning_rate=1e-4..1e-1", "vpt.num_virtual_tokens=2..50"]
    given, _ = sweep.parse(words("model", "data", "out", *more))
    first = sweep_ray.optuna_search(given, [], [])
    ended, begun = [], []
    for number in range(4):
        trial = sweep_space.plain(first.suggest(str(number)))
        assert (
            sweep_space.plain(
                sweep_space.suggestion(trial, sweep.spaces_of(given)[trial["method"]]) | {"data": "data", "seed": 0}
            )
            == trial
        )
        (ended if number < 3 else begun).append({"trial": trial, "score": 0.1 * number})
    second = sweep_ray.optuna_search(given, ended, begun)
    study = second._ot_study
    assert [found.value for found in study.trials[:3]] == pytest.approx([0, 0.1, 0.2])
    assert study.trials[0].state == optuna.trial.TrialState.COMPLETE
    assert sweep_space.plain(second.suggest("a")) == begun[0]["trial"]
    assert sweep_space.plain(second.suggest("b")) not in [r["trial"] for r in ended + begun]


def test_asha_compares_within_a_data_set_and_knows_earlier_trials(tmp_path):
    pytest.importorskip("ray.tune")
    from types import SimpleNamespace

    earlier = [record(seed=seed, data="a", curve=[[3, 0.8], [6, 0.9]]) for seed in range(4)]
    scheduler = sweep_ray.asha(1, earlier, tmp_path)

    def decision(data, score, count=1, method="ssf"):
        found = trial_of(data, method)
        sweep_trials.record_file(tmp_path, found).parent.mkdir(exist_ok=True)
        sweep_trials.write_record(tmp_path, {"trial": found, "state": "running", "curve": [[3, score]]})
        runs = SimpleNamespace(trial_id=f"{data} {method}", config={"trial": found})
        scheduler.on_trial_add(None, runs)
        decided = scheduler.on_trial_result(None, runs, {"score": score, "evaluations": count})
        return decided, sweep_trials.read_record(tmp_path, found)["state"]

    assert decision("a", 0.5) == ("STOP", "stopped")
    assert decision("a", 0.85, method="vpt") == ("CONTINUE", "running")
    assert decision("b", 0.5) == ("CONTINUE", "running")  # the first of its data set
