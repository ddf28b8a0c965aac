"""The training loop of the recipe: gradients, divergence, which weights are kept, and how a run goes on or ends."""

import os
import signal

import checkpoints
import image_classification
import optimization
import pytest
import stopping
import torch
import training
from recipe_runs import fails, weights
from safetensors.torch import load_file
from torch import nn


PLAIN = ["--train_crop", "none", "--horizontal_flip", 0]
CONSTANT = [*PLAIN, "--optim", "sgd", "--optim_momentum", 0, "--weight_decay", 0, "--lr_scheduler_type", "constant"]
SHORT = ["--select", "last", "--checkpointing_steps", "no"]


@pytest.fixture
def head(run):
    """The head that a linear probe has after a run."""

    def call(output, *flags, method="linear"):
        done = run(*flags, method=method, output=output)
        return load_file(done.output / "model.safetensors")["classifier.weight"], done.results

    return call


@pytest.fixture
def scripted(monkeypatch):
    """Validation figures as listed, and the trained weights at each evaluation."""

    def call(values, losses=None):
        seen = []

        def evaluate(accelerator, model, loader, metrics, inputs, name):
            number = len(seen)
            seen.append(checkpoints.trainable_state(model))
            value = values[min(number, len(values) - 1)]
            return {"accuracy": value, "mean_per_class_accuracy": value, "loss": losses[number] if losses else 1.0}

        monkeypatch.setattr(image_classification, "evaluate_split", evaluate)
        return seen

    return call


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize(
    ("size", "groups", "equal_to"),
    [
        (4, 6, 22),  # 22 images: five batches of four and one of two
        (4, 60, 22),
        (5, 60, 22),
        (8, 2, 16),  # a group of 16, and one of 6 in one batch
        (3, 5, 15),  # a group of 15, and one of 3 + 3 + 1
    ],
)
def test_a_step_has_the_mean_gradient_of_its_images(head, size, groups, equal_to):
    flags = [*CONSTANT, *SHORT, "--num_train_epochs", 1]
    expected, whole = head("whole", *flags, "--per_device_train_batch_size", equal_to)
    flags += ["--per_device_train_batch_size", size, "--gradient_accumulation_steps", groups]
    found, results = head("groups", *flags)
    assert results["steps"] == whole["steps"]
    assert torch.allclose(found, expected, atol=1e-7)
    assert results["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-6)


# ----------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize(
    "flags",
    [
        ["--learning_rate", 1e30, "--num_train_epochs", 1],  # no step is logged
        ["--learning_rate", 1e30, "--max_train_steps", 1],  # weights are finite, what comes out is not
        ["--learning_rate", 1e30, "--max_train_steps", 2, "--checkpointing_steps", 1],
        ["--learning_rate", 1e30, "--max_train_steps", 3, "--ema_decay", 0.9],
    ],
)
def test_a_run_that_diverges_saves_nothing(run, tmp_path, photos, flags):
    with pytest.raises(
        FloatingPointError, match=r"The run diverged: .* at step \d+ .*the last good checkpoint is none"
    ):
        run("--select", "last", *flags, data=["--train_dir", str(photos / "train")])
    assert not [p for p in (tmp_path / "out").rglob("*") if p.suffix == ".safetensors" and not finite(p)]
    assert not list((tmp_path / "out").glob("adapter*"))


def finite(path):
    return all(tensor.isfinite().all() for tensor in load_file(path).values() if tensor.is_floating_point())


def test_the_first_bad_step_and_the_last_good_checkpoint_are_named(run, monkeypatch, tmp_path):
    """The loss is not a number from step 5 on: the checkpoint of step 4 stays, and from there a run can go on."""
    calls, entropy = [], torch.nn.functional.cross_entropy

    def broken(*args, **kwargs):
        calls.append(1)
        return entropy(*args, **kwargs) * (float("nan") if len(calls) >= 5 else 1.0)

    flags = ["--checkpointing_steps", 2, "--select", "last", "--max_train_steps", 6]
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", broken)
        with pytest.raises(FloatingPointError, match=r"the loss is nan at step 5 .*checkpoint-4"):
            run(*flags)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert run(*flags, "--resume_from_checkpoint", "latest").results["steps"] == 6


def test_weights_that_break_are_found_where_the_loss_is_fine(run, monkeypatch, tmp_path):
    """Also statistics that are not parameters; a mask that holds infinity from the start is none of them."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    class One:
        device = torch.device("cpu")

        @staticmethod
        def gather(tensor):
            return tensor

    look = stopping.Finite(One(), model)
    look.check_weights(1)
    model[1].running_var[0] = float("inf")
    with pytest.raises(stopping.DivergedError, match=r"not finite at step 3 \(1\.running_var\)"):
        look.check_weights(3)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite before training: 0\.weight"):
        stopping.Finite(One(), model)


# ------------------------------------------------------------------------------------------ which weights are kept


@pytest.mark.parametrize(
    ("values", "losses", "criterion", "kept"),
    [
        ([0.5, 1.0, 1.0, 1.0], [4.0, 3.0, 1.0, 2.0], "accuracy", 3),  # the lower loss
        ([0.5, 1.0, 1.0, 0.9], [1.0, 1.0, 1.0, 1.0], "accuracy", 3),  # the later
        ([0.9, 0.5, 0.5, 0.5], [4.0, 3.0, 1.0, 2.0], "loss", 3),
    ],
)
def test_equal_evaluations_go_by_loss_and_then_by_time(run, scripted, values, losses, criterion, kept):
    seen = scripted([*values, 0.0], [*losses, 0.0])
    flags = ["--num_train_epochs", 4, "--max_train_samples", 4, "--metric_for_best_model", criterion]
    done = run(*flags, "--checkpointing_steps", "no", method="linear")
    assert (done.results["epoch"], done.results["step"]) == (kept, kept)
    saved = load_file(done.output / "model.safetensors")["classifier.weight"]
    assert torch.equal(saved, seen[kept - 1]["classifier.weight"])


def test_f1_chooses_what_accuracy_would_not(run, monkeypatch):
    found = [
        {"accuracy": 0.9, "macro_f1": 0.3},
        {"accuracy": 0.8, "macro_f1": 0.6},
        {"accuracy": 0.0, "macro_f1": 0.0},
    ]
    figures = iter([{**figure, "loss": 1.0} for figure in found])
    monkeypatch.setattr(image_classification, "evaluate_split", lambda *args: next(figures))
    flags = ["--max_train_samples", 4, "--metric_for_best_model", "f1", "--checkpointing_steps", "no"]
    assert run(*flags, method="linear").results["epoch"] == 2


def test_f1_is_measured(run):
    done = run("--max_train_steps", 1, "--metric_for_best_model", "macro_f1", "--checkpointing_steps", "no")
    assert 0 <= done.results["eval_macro_f1"] <= 1
    assert done.results["test_macro_f1"] <= 1


def test_early_stopping_counts_evaluations_without_a_better_one(run, scripted, tmp_path):
    seen = scripted([0.5, 0.7, 0.7, 0.6, 0.8, 0.9])
    flags = ["--num_train_epochs", 6, "--max_train_samples", 4, "--early_stopping_patience", 2]
    done = run(*flags, method="linear")
    assert (done.results["steps"], len(seen)) == (4, 4 + 1), "four epochs, and the test split"
    again = run(*flags, "--resume_from_checkpoint", "auto", method="linear")
    assert again.results["steps"] == 4, "it stays stopped"
    more = [*flags[:-1], 3, "--resume_from_checkpoint", "auto"]
    assert run(*more, method="linear").results["steps"] == 6, "and goes on with more patience"


def test_early_stopping_needs_something_to_evaluate(run, photos):
    with pytest.raises(ValueError, match="--early_stopping_patience needs a validation split"):
        run("--early_stopping_patience", 1, "--select", "last", data=["--train_dir", str(photos / "train")])


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (["--eval_steps", 4], [4, 8, 12, 14]),
        (["--eval_epochs", 2], [12, 14]),
        ([], [6, 12, 14]),
    ],
)
def test_evaluation_comes_as_often_as_asked_and_at_the_end(run, monkeypatch, flags, steps):
    found, validate = [], training.Training.validate

    def noted(self):
        found.append(self.progress.step)
        validate(self)

    monkeypatch.setattr(training.Training, "validate", noted)
    run(*flags, "--max_train_steps", 14, "--checkpointing_steps", "no", method="linear")
    assert found == steps


# ------------------------------------------------------------------------------------------------- moving average


def test_the_moving_average_is_its_equation():
    parameter, decay = nn.Parameter(torch.tensor([1.0, 2.0])), 0.3
    average = optimization.MovingAverage([parameter], decay)
    expected = parameter.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            parameter.add_(step)
        average.update()
        rate = min(decay, (1 + step) / (10 + step))
        expected = rate * expected + (1 - rate) * parameter.detach()
    before = parameter.detach().clone()
    with average.in_place():
        assert torch.allclose(parameter, expected)
    assert torch.equal(parameter, before)


def test_the_average_is_what_is_evaluated_and_saved(run, monkeypatch, scripted):
    plain = run(*SHORT, "--max_train_steps", 3, method="linear", output="plain")
    seen = scripted([0.5, 0.9, 0.1])
    done = run("--num_train_epochs", 2, "--ema_decay", 0.9, method="linear", output="average")
    saved = load_file(done.output / "model.safetensors")["classifier.weight"]
    assert torch.equal(saved, seen[1]["classifier.weight"])
    trained = load_file(done.output / "checkpoint-12" / "trainable.safetensors")["classifier.weight"]
    assert not torch.allclose(saved, trained)
    last = run(*SHORT, "--max_train_steps", 3, "--ema_decay", 0, method="linear", output="none")
    assert weights_of(last) == weights_of(plain), "an average that forgets at once is the last weights"


def weights_of(done):
    return (done.output / "model.safetensors").read_bytes()


# --------------------------------------------------------------------------------------------------- optimization


@pytest.mark.parametrize("name", optimization.OPTIMIZERS)
def test_every_optimizer_trains_and_resumes(run, name):
    flags = [
        "--optim",
        name,
        "--max_train_steps",
        2,
        "--checkpointing_steps",
        1,
        "--select",
        "last",
        "--optim_eps",
        1e-7,
    ]
    flags = flags[:-2] if name == "sgd" else flags
    whole = run(*flags, method="linear", output="whole")
    flags += ["--resume_from_checkpoint", str(whole.output / "checkpoint-1")]
    assert weights_of(run(*flags, method="linear", output="resumed")) == weights_of(whole)


def scheduled(**flags):
    values = {"lr_scheduler_type": "cosine", "num_warmup_steps": 0.2, "learning_rate": 0.1, "min_learning_rate": 0.0}
    args = training.argparse.Namespace(**values | flags)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    schedule, rates = optimization.build_schedule(optimizer, args, 10), []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*rates, optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_schedule_ends_at_the_least_learning_rate(kind):
    plain, low = scheduled(lr_scheduler_type=kind), scheduled(lr_scheduler_type=kind, min_learning_rate=0.02)
    assert plain[:2] == low[:2] == [0.0, 0.05], "warm-up begins at 0"
    assert max(low) == low[2] == pytest.approx(0.1)
    assert (plain[-1], low[-1]) == (pytest.approx(0.0), pytest.approx(0.02))
    assert all(found == pytest.approx(0.02 + 0.8 * rate) for found, rate in zip(low[2:], plain[2:], strict=True))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--optim", "sgd", "--optim_betas", 0.9, 0.99],
            "--optim_betas: --optim sgd has none; these have: adamw_torch,",
        ),
        (["--optim_momentum", 0.9], "--optim_momentum: --optim adamw_torch has none; these have: rmsprop, sgd"),
        (["--optim_betas", 0.9, 1.0], "--optim_betas must be from 0 to below 1"),
        (["--optim", "lamb"], "--optim: invalid choice: 'lamb'"),
        (["--learning_rate", "inf"], "argument --learning_rate: must be finite, got inf"),
        (["--min_learning_rate", 1], "--min_learning_rate 1.0 must not exceed --learning_rate 0.01"),
        (["--layer_lr_decay", 0], "--layer_lr_decay must be above 0"),
        (["--layer_lr_decay", 1.1], "--layer_lr_decay must be between 0 and 1"),
        (["--ema_decay", 1], "--ema_decay must be from 0 to below 1"),
        (["--drop_path_rate", 1], "--drop_path_rate must be from 0 to below 1"),
        (["--eval_steps", 5, "--eval_epochs", 1], "--eval_steps or --eval_epochs, not both"),
        (["--metric_for_best_model", "speed"], "--metric_for_best_model: invalid choice"),
        (
            ["--overwrite_output_dir", "--resume_from_checkpoint", "auto"],
            "--overwrite_output_dir would delete the checkpoint",
        ),
    ],
)
def test_wrong_values_are_named(run, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(image_classification, "load_processor", lambda args: pytest.fail("loaded"))
    assert message in fails(capsys, run, *map(str, flags))


# ------------------------------------------------------------------------------------------- going on and stopping


def test_auto_starts_where_there_is_nothing_and_goes_on_where_there_is(run, capsys):
    flags = [
        "--max_train_steps",
        4,
        "--checkpointing_steps",
        2,
        "--select",
        "last",
        "--resume_from_checkpoint",
        "auto",
    ]
    first = run(*flags, method="linear")
    assert "Continuing" not in capsys.readouterr().out
    kept = weights_of(first)
    again = run(*flags, method="linear")
    assert "Continuing after step 4 of 4" in capsys.readouterr().out
    assert weights_of(again) == kept
    for folder in again.output.glob("checkpoint-*"):
        checkpoints.shutil.rmtree(folder)
    with pytest.raises(ValueError, match="auto: .* has config.json of a run without checkpoints"):
        run(*flags, method="linear")
    assert weights_of(again) == kept


def test_a_finished_run_takes_more_epochs(run, capsys):
    """The rest has the learning rates of the longer run, and only these: without them the two runs are one."""
    flags = [*PLAIN, "--select", "last", "--num_warmup_steps", 0, "--lr_scheduler_type"]
    whole = run(*flags, "constant", "--num_train_epochs", 3, method="linear", output="whole")
    run(*flags, "constant", "--num_train_epochs", 2, method="linear", output="parts")
    more = ["--num_train_epochs", 3, "--resume_from_checkpoint", "auto"]
    parts = run(*flags, "constant", *more, method="linear", output="parts")
    assert weights_of(parts) == weights_of(whole)
    assert parts.results["steps"] == 18
    run(*flags, "linear", "--num_train_epochs", 1, method="linear", output="linear")
    capsys.readouterr()
    run(*flags, "linear", "--max_train_steps", 8, "--resume_from_checkpoint", "auto", method="linear", output="linear")
    rate = 0.01 * (1 - 6 / 8)
    assert f"The run had 6 steps. From now on it has the learning rates of a run of 8: now {rate:.3g}." in (
        capsys.readouterr().out
    )
    with pytest.raises(ValueError, match=r"is at step 8, and .* end the run at step 6: give more"):
        run(
            *flags,
            "linear",
            "--resume_from_checkpoint",
            "latest",
            "--max_train_steps",
            6,
            method="linear",
            output="linear",
        )


@pytest.mark.parametrize(
    ("number", "when"),
    [
        (signal.SIGTERM, "a step"),
        (signal.SIGINT, "a step"),
        (signal.SIGTERM, "evaluation"),
        (signal.SIGTERM, "a checkpoint"),
    ],
)
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(run, monkeypatch, capsys, number, when):
    flags = ["--num_train_epochs", 2, "--checkpointing_steps", 5, "--dropout", 0.3, "--max_train_samples", 12]
    flags += ["--ema_decay", 0.5]
    whole = run(*flags, output="whole")
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    place = {"a step": "backward", "evaluation": "evaluate", "a checkpoint": "save"}[when]
    calls = []

    def hit(*args, **kwargs):
        calls.append(1)
        if len(calls) == (4 if when == "a step" else 1):
            os.kill(os.getpid(), number)
        return before(*args, **kwargs)

    with monkeypatch.context() as patch:
        owner = image_classification if when == "evaluation" else training.Training
        name = "evaluate_split" if when == "evaluation" else place
        before = getattr(owner, name)
        patch.setattr(owner, name, hit)
        with pytest.raises(SystemExit) as stop:
            run(*flags, output="stopped")
    assert stop.value.code == 128 + number
    told = capsys.readouterr().err
    step = {"a step": 4, "evaluation": 3, "a checkpoint": 5}[when]
    assert f"Stopped by {number.name}: step {step} of 6 was the last; " in told
    assert f"checkpoint-{step}" in told
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    folder = whole.output.parent / "stopped"
    assert not (folder / "adapter_model.safetensors").exists()
    torch.manual_seed(99)
    resumed = run(*flags, "--resume_from_checkpoint", "auto", output="stopped")
    assert weights(resumed.output) == weights(whole.output)
    differ = {"train_runtime", "command"}
    assert {k: v for k, v in resumed.results.items() if k not in differ} == {
        k: v for k, v in whole.results.items() if k not in differ
    }


def test_a_signal_without_checkpoints_says_so(run, monkeypatch, capsys, tmp_path):
    step = training.Training.backward

    def hit(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(training.Training, "backward", hit)
    with pytest.raises(SystemExit):
        run(*SHORT, method="linear")
    assert "no checkpoint is written (--checkpointing_steps no)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- errors


def test_errors_are_one_line_with_what_caused_them(capsys):
    def fail():
        try:
            raise OSError("no such\n  file")
        except OSError as error:
            raise RuntimeError("cannot read") from error

    with pytest.raises(SystemExit) as stop:
        stopping.run_readably(fail, show_traceback=False)
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        "error: RuntimeError: cannot read <- OSError: no such file (--traceback shows where it arose.)\n"
    )
    with pytest.raises(SystemExit) as stop:
        stopping.run_readably(lambda: signal.raise_signal(signal.SIGINT), show_traceback=False)
    assert (stop.value.code, capsys.readouterr().err) == (130, "Stopped by SIGINT.\n")
    with pytest.raises(SystemExit):
        stopping.run_readably(fail, show_traceback=True)
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert shown.endswith("error: RuntimeError: cannot read <- OSError: no such file\n")


# ------------------------------------------------------------------------------------------------ auxiliary losses


@pytest.mark.parametrize(("method", "flags"), [("colin", ("--r", 6, "--rank", 3)), ("gist", ())])
def test_auxiliary_losses_are_in_the_loss_and_are_accumulated_as_a_mean(run, method, flags):
    """The same mean whether the 22 images come in one batch or in batches of four and accumulated."""
    weight = {"colin": "--orthogonality", "gist": "--token_weight"}[method]
    usual = [*PLAIN, "--dropout", 0, *flags] if method == "gist" else [*PLAIN, *flags]
    found = {}
    for name, value, accumulation in (("without", 0.0, 1), ("with", 5.0, 1), ("accumulated", 5.0, 2)):
        more = ["--num_train_epochs", 1, "--learning_rate", 0, "--gradient_accumulation_steps", accumulation, *SHORT]
        done = run(*usual, weight, value, *more, method=method, output=f"{method}-{name}")
        found[name] = done.results["train_loss"]
    assert found["with"] > found["without"] + 1
    assert found["accumulated"] == pytest.approx(found["with"], rel=0.02)
