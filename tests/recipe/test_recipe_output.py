"""What a run writes, deletes and shows, and with which status it ends."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import accelerate.tracking
import image_classification
import output_folder
import pytest
import screen
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType
from peft import get_peft_model
from recipe_runs import RECIPES, fails
from transformers import AutoModelForImageClassification

import hf_visual_peft


QUICK = ["--max_train_steps", 1, "--select", "last", "--checkpointing_steps", "no"]


# ------------------------------------------------------------------------------------------------ earlier output


@pytest.mark.parametrize(("first", "second"), [("vpt", "full"), ("vpt", "linear"), ("full", "bitfit")])
def test_overwriting_leaves_nothing_of_another_method(run, first, second, photos):
    run("--max_train_steps", 1, method=first)
    again = run(*QUICK, "--overwrite_output_dir", method=second)
    clean = run(*QUICK, method=second, output="clean")
    names = [{path.name for path in folder.iterdir()} for folder in (again.output, clean.output)]
    assert names[0] == names[1]
    if second != "bitfit":
        one, two = (AutoModelForImageClassification.from_pretrained(f) for f in (again.output, clean.output))
        pixels = torch.rand(1, 3, 32, 32)
        assert torch.equal(one.eval()(pixels).logits, two.eval()(pixels).logits)


@pytest.mark.parametrize("method", ["vpt", "linear"])
def test_a_result_without_checkpoints_is_not_written_over_unasked(run, capsys, method):
    done = run(*QUICK, method=method)
    (done.output / "all_results.json").unlink()  # as after a kill in the test split
    before = {path: path.read_bytes() for path in done.output.iterdir()}
    expected = "adapter_config.json" if method == "vpt" else "config.json"
    assert f"has a run ({expected}, " in fails(capsys, run, *QUICK, method=method)
    assert {path: path.read_bytes() for path in done.output.iterdir()} == before


def test_what_others_wrote_stays(run, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    mine = {"README.md": "# My study\n", "notes.txt": "x", "curves/loss.csv": "1"}
    for name, text in mine.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    run(*QUICK)
    assert "README.md is not the card of a run, so it is not changed" in capsys.readouterr().out
    run(*QUICK, "--overwrite_output_dir", method="linear")
    assert {name: (folder / name).read_text() for name in mine} == mine
    assert not (folder / "adapter_config.json").exists()


def test_a_readme_with_broken_metadata_is_somebodys(tmp_path):
    (tmp_path / "README.md").write_text("---\n: : [\n---\ntext")
    assert output_folder.is_own_readme(tmp_path)


def test_an_edited_card_keeps_its_text(run):
    done = run(*QUICK)
    card = done.output / "README.md"
    card.write_text(card.read_text() + "\nMeasured on my bench.\n")
    run(*QUICK, "--overwrite_output_dir")
    assert "Measured on my bench." in card.read_text()


def test_a_wrong_data_folder_costs_no_earlier_run(run, tmp_path):
    done = run(*QUICK)
    before = {path: path.read_bytes() for path in done.output.iterdir()}
    with pytest.raises(Exception, match="absent"):
        run(*QUICK, "--overwrite_output_dir", data=["--train_dir", str(tmp_path / "absent")])
    assert {path: path.read_bytes() for path in done.output.iterdir()} == before


def test_an_error_leaves_no_empty_folder(run, tmp_path):
    with pytest.raises(ValueError, match="absent"):
        run(*QUICK, "--output_dir", tmp_path / "new" / "run", data=["--train_dir", str(tmp_path / "absent")])
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match="absent"):
        run(*QUICK, "--output_dir", tmp_path / "new", data=["--train_dir", str(tmp_path / "absent")])
    assert (tmp_path / "new").exists(), "it was there before"


@pytest.mark.parametrize("method", ["ssf", "lora", "full", "linear"])
def test_training_does_not_start_from_an_adapter(run, tmp_path, vit, method):
    """Its weights would be in the model, and not in what is saved."""
    model = AutoModelForImageClassification.from_pretrained(vit)
    get_peft_model(model, hf_visual_peft.BitFitConfig()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=rf"adapter holds an adapter, .* give its base, {re.escape(vit)}, or merge"):
        run(*QUICK, "--model_name_or_path", tmp_path / "adapter", method=method)


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/nothing"])
def test_a_folder_that_cannot_be_written_is_named_first(run, tmp_path, folder):
    """Before data and models are looked for."""
    (tmp_path / "file").write_text("text")
    told = r"--output_dir \S*(file|nothing|below): no file can be written there \("
    with pytest.raises(ValueError, match=told):
        run(*QUICK, "--output_dir", tmp_path / folder, data=["--train_dir", str(tmp_path / "absent")])
    flags = ["--eval_only", "--model_name_or_path", "absent", "--test_dir", "absent"]
    with pytest.raises(ValueError, match=told):
        image_classification.main([*flags, "--output_dir", str(tmp_path / folder)])
    assert (tmp_path / "file").read_text() == "text"


def test_the_folder_of_the_model_is_not_deleted(run, capsys, vit):
    before = sorted(path.name for path in Path(vit).iterdir())
    for method, flags in (("vpt", ["--overwrite_output_dir"]), ("full", [])):
        message = fails(capsys, run, *QUICK, *flags, "--output_dir", vit, method=method)
        assert "is --model_name_or_path, which would be overwritten" in message
    assert sorted(path.name for path in Path(vit).iterdir()) == before


# ------------------------------------------------------------------------------------------------ flags of YAML


@pytest.mark.parametrize("word", ["no", "No", "off", "false", "'no'"])
def test_no_in_a_file_is_no(run, tmp_path, word):
    file = tmp_path / "run.yaml"
    file.write_text(f"checkpointing_steps: {word}\nmixed_precision: {word}\ngradient_checkpointing: {word}\n")
    if word in ("'no'", "off", "no"):
        done = run(
            "--config", file, "--max_train_steps", 1, "--select", "last", method="linear", output=word.strip("'")
        )
        assert not list(done.output.glob("checkpoint-*"))
    else:
        import arguments

        words = ["--config", str(file), "--model_name_or_path", "m", "--train_dir", "d", "--method", "vpt"]
        args, _ = arguments.parse_args([*words, "--output_dir", str(tmp_path / "o")])
        assert (args.checkpointing_steps, args.mixed_precision, args.gradient_checkpointing) == ("no", "no", False)


def test_fp16_needs_a_gpu(run):
    with pytest.raises(ValueError, match="--mixed_precision fp16 needs a GPU"):
        run("--mixed_precision", "fp16")


def test_defaults_are_shown_and_those_given_are_not(run, capsys):
    run(*QUICK, "--weight_decay", 0, method="linear")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Defaults for linear: ")]
    assert "lr_scheduler_type cosine" in line
    assert "weight_decay" not in line
    assert "learning_rate" not in line


# ------------------------------------------------------------------------------------------------------- screen


def test_lines_go_to_a_log(run, capsys):
    run("--max_train_steps", 4, "--logging_steps", 2, "--progress", "lines", "--checkpointing_steps", "no")
    found = capsys.readouterr()
    lines = [line for line in found.out.splitlines() if line.startswith("Step ")]
    number = r"[\d.e+-]+"
    for line, step in zip(lines, (2, 4), strict=True):
        pattern = (
            rf"Step {step}/4, epoch 1: loss {number}, lr {number}, grad_norm {number}, images/s {number}, GiB {number}"
        )
        assert re.fullmatch(pattern, line), line
    assert "\r" not in found.out + found.err


def test_a_bar_and_nothing(run, capsys):
    run(*QUICK, "--logging_steps", 1, "--progress", "bar", method="linear", output="bar")
    bar = capsys.readouterr()
    assert "Train: 100%" in bar.err
    assert "images/s=" in bar.err
    run(*QUICK, "--logging_steps", 1, "--progress", "none", method="linear", output="none")
    nothing = capsys.readouterr()
    assert "%|" not in nothing.err
    assert "Step " not in nothing.out


@pytest.mark.parametrize(
    ("asked", "variable", "terminal", "expected"),
    [
        (None, None, True, "bar"),
        (None, None, False, "lines"),
        (None, "1", True, "none"),
        (None, "true", False, "none"),
        (None, "0", True, "bar"),
        ("bar", "1", False, "bar"),
        ("lines", None, True, "lines"),
    ],
)
def test_what_is_shown_where_nothing_is_asked(monkeypatch, asked, variable, terminal, expected):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    if variable is not None:
        monkeypatch.setenv("TQDM_DISABLE", variable)
    assert screen.progress_kind(asked) == expected


def test_throughput_leaves_evaluation_out(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 12.0, 12.0])
    monkeypatch.setattr(screen.time, "perf_counter", lambda: next(clock))
    shown = screen.Screen(Accelerator(), "none")
    shown.start(4, 0)
    shown.step(30)
    shown.pause()  # after 2 s
    shown.resume()  # 8 s later
    shown.step(10)
    assert shown.report(2, 1, 0.5, 0.1, 1.0)["images_per_second"] == pytest.approx(40 / 4)


# ----------------------------------------------------------------------------------------- trackers, and processes


def launch(words):
    command = [sys.executable, str(RECIPES / "image_classification.py"), *map(str, words)]
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, **more)


def test_tensorboard_holds_the_curves(run):
    """With the package itself, and accelerate's own look for it."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = run("--report_to", "tensorboard", "--logging_steps", 3, method="linear")
    curves = EventAccumulator(str(done.output / "image_classification")).Reload()
    assert [event.step for event in curves.Scalars("train_loss")] == [3, 6, 9, 12]
    assert [event.step for event in curves.Scalars("eval_accuracy")] == [6, 12]
    assert curves.Scalars("learning_rate")[-1].value == pytest.approx(0, abs=1e-9)
    run(*QUICK, "--overwrite_output_dir", method="linear")
    assert not (done.output / "image_classification").exists()


def test_a_tracker_that_is_installed_is_taken_by_name(tmp_path, monkeypatch):
    """accelerate lists trackers as members of an enum: the package decides, not how it is listed."""
    import arguments

    words = ["--model_name_or_path", "m", "--train_dir", "d", "--method", "vpt", "--output_dir", str(tmp_path / "o")]
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])  # found at import
    args, _ = arguments.parse_args([*words, "--report_to", "tensorboard"])
    assert args.report_to == ["tensorboard"]


@pytest.mark.slow
def test_a_process_that_fails_ends_with_one_line(tmp_path):
    words = ["--model_name_or_path", tmp_path / "absent", "--method", "linear", "--train_dir", tmp_path]
    process = launch([*words, "--output_dir", tmp_path / "out"])
    _, told = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert str(tmp_path / "absent") in line
    assert line.endswith("(--traceback shows where it arose.)")


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(vit, photos, tmp_path):
    """The signal goes to the process and to those that load images for it, as from a scheduler."""
    words = ["--model_name_or_path", vit, "--method", "linear", "--train_dir", photos / "train", "--select", "last"]
    words += ["--output_dir", tmp_path / "out", "--resume_from_checkpoint", "auto", "--checkpointing_steps", 100000]
    words += ["--logging_steps", 1, "--dataloader_num_workers", 1, "--progress", "lines", "--num_train_epochs"]
    process = launch([*words, 500])
    while "Step 3/" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    os.killpg(process.pid, signal.SIGTERM)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 143, told
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    assert step >= 3
    assert f"Stopped by SIGTERM: step {step} of 500 was the last; " in told
    assert "Traceback" not in told
    results = image_classification.main([*map(str, words), str(step + 1)])
    assert results["steps"] == step + 1
