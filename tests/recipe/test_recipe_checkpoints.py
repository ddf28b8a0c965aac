"""The checkpoints of the recipe: exact resumption, kills, and full disks."""

import errno
import os
import shutil
from pathlib import Path

import checkpoints
import pytest
import torch
from recipe_runs import fails, weights
from safetensors.torch import load_file


def killed_after(monkeypatch, step):
    """Let the checkpoint at a step be written and kill the run right after."""
    save = checkpoints.Checkpoints.save

    def save_and_die(self, progress, best_state):
        save(self, progress, best_state)
        if progress.step == step:
            raise KeyboardInterrupt

    return monkeypatch.setattr(checkpoints.Checkpoints, "save", save_and_die)


# 6 batches and 3 steps an epoch; the last epoch, as the best may be one from before the kill
EXACT = ["--num_train_epochs", 3, "--dropout", 0.3, "--gradient_accumulation_steps", 2, "--num_warmup_steps", 0.2]
EXACT += ["--select", "last"]


@pytest.fixture(scope="module")
def wholes():
    """Uninterrupted runs, by what they select."""
    return {}


@pytest.mark.parametrize(
    ("every", "step", "workers", "select"),
    [
        pytest.param(1, 4, 0, "last", id="amid an epoch"),
        pytest.param(1, 4, 2, "last", id="with other workers"),
        pytest.param(3, 6, 0, "last", id="before evaluation"),
        pytest.param("epoch", 3, 0, "last", id="after evaluation"),
        pytest.param(1, 9, 0, "last", id="after the last step"),
        pytest.param("epoch", 6, 0, "best", id="best epoch before"),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    run, monkeypatch, wholes, tmp_path, every, step, workers, select
):
    flags = [*EXACT, "--checkpointing_steps", every, "--select", select]
    whole = wholes.get(select) or run(*flags, output="whole")
    wholes[select] = whole  # how often checkpoints are written does not change it
    with monkeypatch.context() as patch:
        killed_after(patch, step)
        with pytest.raises(KeyboardInterrupt):
            run(*flags, output="killed")
    assert not (tmp_path / "killed" / "all_results.json").exists()
    torch.manual_seed(99)  # as a new process would have other random numbers
    latest = run(*flags, "--dataloader_num_workers", workers, "--resume_from_checkpoint", "latest", output="killed")
    assert weights(latest.output) == weights(whole.output)
    differ = {"train_runtime", "command"}
    assert {k: v for k, v in latest.results.items() if k not in differ} == {
        k: v for k, v in whole.results.items() if k not in differ
    }


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("sct", ["--channels", 8]),
        ("gps", []),
        ("lst", ["--r", 4, "--init", "fisher"]),
        ("biadaptformer", ["--bits", 4]),
    ],
)
def test_methods_with_more_to_their_state_than_weights_resume_exactly(method, fields, run, monkeypatch):
    """What was chosen from data stays chosen, and a quantised weight goes on from its full precision."""
    flags = [*fields, "--max_train_steps", 2, "--checkpointing_steps", 1, "--select", "last"]
    whole = run(*flags, method=method, output="whole")
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run(*flags, method=method, output="killed")
    torch.manual_seed(99)
    resumed = run(*flags, "--resume_from_checkpoint", "latest", method=method, output="killed")
    assert weights(resumed.output) == weights(whole.output)
    last = "checkpoint-2/trainable.safetensors"
    assert (resumed.output / last).read_bytes() == (whole.output / last).read_bytes()
    first, second = (load_file(whole.output / f"checkpoint-{step}" / "trainable.safetensors") for step in (1, 2))
    chosen = {name for name in first if name.endswith(".indices")}
    assert bool(chosen) == (method != "biadaptformer")
    assert all((first[name] >= 0).all() and torch.equal(first[name], second[name]) for name in chosen)
    trained = {name for name, tensor in first.items() if not torch.equal(tensor, second[name])}
    assert any(f".{method}_" in name for name in trained), "the second step moves the adapter"
    if method == "biadaptformer":
        latent = {name for name in first if name.endswith((".down.weight", ".up.weight"))}
        assert latent <= trained
        saved = load_file(resumed.output / "adapter_model.safetensors")
        assert not any(name.endswith((".down.weight", ".up.weight")) for name in saved)


@pytest.mark.parametrize("method", ["sct", "gps"])
def test_what_is_chosen_depends_on_the_training_images_alone(method, run, photos):
    data = ["--train_dir", photos / "train", "--validation_dir", photos / "validation", "--test_dir"]
    fields = ["--channels", 8] if method == "sct" else []
    flags = [*fields, "--max_train_steps", 1, "--select", "last"]
    found = []
    for output, test, train in (("one", "test", "train"), ("two", "train", "train"), ("three", "test", "validation")):
        data[1], test_dir = photos / train, photos / test
        done = run(*flags, method=method, data=[*map(str, data), str(test_dir)], output=output)
        saved = load_file(done.output / "adapter_model.safetensors")
        found.append({name: tensor for name, tensor in saved.items() if name.endswith(".indices")})
    one, two, three = found
    assert one
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert not all(torch.equal(tensor, three[name]) for name, tensor in one.items())


def test_dropout_and_crops_matter_to_the_test_above(run):
    """Another seed changes the weights, so that equal bits mean that the random states came back."""
    assert weights(run(*EXACT, output="a").output) != weights(run(*EXACT, "--seed", 43, output="b").output)


def test_checkpoints_hold_only_what_trains(run, vit):
    done = run("--checkpointing_steps", 4, "--save_total_limit", 2, method="adaptformer")
    found = sorted(path.name for path in done.output.glob("checkpoint-*"))
    assert found == ["checkpoint-12", "checkpoint-8"], "the oldest is gone"
    folder = done.output / "checkpoint-12"
    trained = load_file(folder / "trainable.safetensors")
    assert all("adaptformer_" in name or "classifier.modules_to_save" in name for name in trained)
    assert sum(tensor.numel() for tensor in trained.values()) == done.results["trainable_parameters"]
    assert load_file(folder / "best.safetensors").keys() == trained.keys()
    base = {tensor.numpy().tobytes() for tensor in load_file(Path(vit) / "model.safetensors").values() if tensor.any()}
    assert not any(tensor.numpy().tobytes() in base for tensor in trained.values() if tensor.unique().numel() > 1)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("trainable.safetensors", "best.safetensors", "progress.json"),
        *("optimizer.bin", "scheduler.bin", "random_states_0.pkl"),
    }
    small = run("--checkpointing_steps", "epoch", "--num_virtual_tokens", 1, output="small")
    for file in small.output.glob("checkpoint-*/*"):
        assert file.stat().st_size < (Path(vit) / "model.safetensors").stat().st_size / 4, file


@pytest.mark.parametrize("what", ["trainable.safetensors", "optimizer.bin", "progress.json", "file size limit"])
def test_full_disk_leaves_the_checkpoint_before_whole(run, monkeypatch, what):
    """The second checkpoint cannot be written: the error says so, nothing half stays, and the first still resumes."""
    resource = pytest.importorskip("resource") if what == "file size limit" else None
    flags = [*EXACT, "--checkpointing_steps", 3]
    whole = run(*flags, output="whole")
    writes, limits = [], None

    def out_of_space(write, position):
        def limited(*args, **kwargs):
            writes.append(Path(args[position]).name)
            if "checkpoint-6" in str(args[position]) and (what is None or Path(args[position]).name == what):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[position]))
            return write(*args, **kwargs)

        return limited

    with monkeypatch.context() as patch:
        if resource:  # writes that fail in the kernel, as on a full disk
            save = checkpoints.Checkpoints.save

            def save_in_little_space(self, progress, best_state):
                if progress.step == 6:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
                save(self, progress, best_state)

            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            patch.setattr(checkpoints.Checkpoints, "save", save_in_little_space)
        else:
            patch.setattr(checkpoints, "save_file", out_of_space(checkpoints.save_file, 1))
            patch.setattr(torch, "save", out_of_space(torch.save, 1))
            patch.setattr(Path, "write_text", out_of_space(Path.write_text, 0))
        try:
            with pytest.raises(
                OSError, match=r"Cannot write .*checkpoint-6: .* last complete checkpoint is .*checkpoint-3"
            ):
                run(*flags, output="full")
        finally:
            if resource:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder = whole.output.parent / "full"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-3"]
    resumed = run(*flags, "--resume_from_checkpoint", "latest", output="full")
    assert weights(resumed.output) == weights(whole.output)


def test_a_kill_while_writing_is_cleared_away(run, monkeypatch):
    run("--max_train_steps", 2, "--checkpointing_steps", 2, "--select", "last")
    done = run("--overwrite_output_dir", "--checkpointing_steps", 2)
    broken = done.output / ".checkpoint-14.tmp"
    shutil.copytree(done.output / "checkpoint-12", broken)
    (broken / "progress.json").unlink()
    again = run("--checkpointing_steps", 2, "--resume_from_checkpoint", str(done.output / "checkpoint-10"))
    assert not broken.exists()
    assert again.results["test_loss"] == done.results["test_loss"]


def test_what_cannot_be_resumed_says_why(run, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"latest: no checkpoint in"):
        run("--resume_from_checkpoint", "latest")
    done = run("--max_train_steps", 2, "--checkpointing_steps", 2)
    with pytest.raises(ValueError, match=r"comes from a run with learning_rate 0\.01 \(now 0\.5\)"):
        run("--max_train_steps", 2, "--learning_rate", 0.5, "--resume_from_checkpoint", "latest")
    with pytest.raises(ValueError, match=r"out is not a checkpoint of this recipe"):
        run("--max_train_steps", 2, "--resume_from_checkpoint", done.output)
    message = fails(capsys, run, "--max_train_steps", 2)
    assert "has a run (checkpoint-2, all_results.json)" in message
    assert "--overwrite_output_dir" in message
    run("--max_train_steps", 1, "--checkpointing_steps", "no", "--overwrite_output_dir")
    assert not list(done.output.glob("checkpoint-*"))


def test_only_what_differs_between_runs_is_named():
    vpt = {"peft_type": "VPT", "num_virtual_tokens": 10, "deep": True}
    before = {"method": "vpt", "seed": 0, "fields": vpt}
    other = before | {"fields": vpt | {"num_virtual_tokens": 4}}
    assert checkpoints.differences(before, other) == [("num_virtual_tokens", 10, 4)]
    ssf = {"method": "ssf", "seed": 0, "fields": {"peft_type": "SSF"}}
    assert checkpoints.differences(before, ssf) == [("method", "vpt", "ssf"), ("fields of", "VPT", "SSF")]
    assert checkpoints.differences(before, {**before, "seed": 1, "new": None}) == [("seed", 0, 1)]
