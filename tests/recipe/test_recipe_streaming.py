"""Samples that come as a stream: the figures are those without one, on any number of processes."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from recipe_runs import RECIPES, data_args, fails, load, weights
from streaming import StreamLoader, prepare_stream
from transformers import ViTImageProcessor


TWO = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    """`datasets` waits after each shuffled pass over parquet files for threads of downloads."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture(scope="module")
def shards(photos, tmp_path_factory):
    """Train in 4 files of different length, test in 3."""
    folder = tmp_path_factory.mktemp("shards")
    for split, cuts in {"train": (0, 3, 10, 15, 22), "test": (0, 5, 6, 11)}.items():
        rows = load(train_dir=photos / split)["train"].shuffle(seed=0)
        for number, (start, end) in enumerate(itertools.pairwise(cuts)):
            rows.select(range(start, end)).to_parquet(folder / f"{split}-{number}.parquet")
    return folder


def files(shards):
    flags = [w for s in ("train", "test") for w in (f"--{s}_file", str(shards / f"{s}-*.parquet"))]
    return [*flags, "--select", "last"]


def test_figures_are_those_without_a_stream(run, shards, capsys):
    plain = run("--learning_rate", 0, "--per_device_eval_batch_size", 4, data=files(shards))
    whole = capsys.readouterr().out
    for workers in (0, 2):
        flags = ("--streaming", "--learning_rate", 0, "--per_device_eval_batch_size", 4)
        done = run(*flags, "--dataloader_num_workers", workers, data=files(shards), output=f"stream{workers}")
        told = capsys.readouterr().out
        assert told.split("parameters train")[0] == whole.split("parameters train")[0], "classes, counts and sizes"
        assert done.results["steps"] == plain.results["steps"]
        for name in ("test_accuracy", "test_mean_per_class_accuracy", "test_loss"):
            assert done.results[name] == pytest.approx(plain.results[name], abs=1e-6), name


def stream(shards, train=True, **changes):
    given = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "dataloader_num_workers": 0}
    given |= {"streaming": True, "select": "last", "seed": 1, "shuffle_buffer": 5, "train_crop": "random_resized"}
    given |= {"crop_scale": 0.08, "horizontal_flip": 0.5, **changes}
    split = "train" if train else "test"
    args = data_args(train_file=str(shards / "train-*.parquet"), test_file=str(shards / "test-*.parquet"), **given)
    found, names, _ = prepare_stream(args, ViTImageProcessor(size={"height": 32, "width": 32}), load(**vars(args)))
    assert names == ["blue", "green", "red"]
    return StreamLoader(Accelerator(cpu=True), found[split])


def key(pixels):
    return pixels.numpy().tobytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_holds_every_sample_once_and_goes_on_where_it_was(shards, workers):
    plain = stream(shards, train_crop="none", horizontal_flip=0, dataloader_num_workers=workers)
    assert len(plain) == 6
    seen = [key(row) for batch in plain for row in batch["pixel_values"]]
    assert len(seen) == len(set(seen)) == 22
    plain.set_epoch(1)
    again = [key(row) for batch in plain for row in batch["pixel_values"]]
    assert set(again) == set(seen)
    assert again != seen

    loader = stream(shards, dataloader_num_workers=workers)
    loader.set_epoch(2)
    whole = list(loader)
    assert [len(batch["labels"]) for batch in whole] == [4, 4, 4, 4, 4, 2]
    rest = list(loader.after(2))
    assert len(rest) == 4
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(rest, whole[2:], strict=True))
    other = stream(shards, dataloader_num_workers=workers, seed=2)
    other.set_epoch(2)
    assert not torch.equal(next(iter(other))["pixel_values"], whole[0]["pixel_values"])


def test_the_last_batch_of_an_epoch_is_told(shards):
    loader = stream(shards)
    ends = [loader.gradient_state.end_of_dataloader for _ in loader]
    assert ends == [False] * 5 + [True]
    assert not loader.gradient_state.in_dataloader
    evaluation = list(stream(shards, train=False))
    assert [batch["real"].tolist() for batch in evaluation] == [[True] * 4, [True] * 4, [True] * 3 + [False]]


def test_a_resumed_run_ends_as_one_that_went_through(run, shards):
    flags = ("--streaming", "--checkpointing_steps", 4, "--shuffle_buffer", 6)
    whole = run(*flags, "--save_total_limit", 9, data=files(shards))
    part = shutil.copytree(whole.output, whole.output.parent / "part")
    for path in part.iterdir():
        if path.name != "checkpoint-4":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = run(*flags, "--resume_from_checkpoint", "latest", data=files(shards), output="part")
    assert weights(resumed.output) == weights(whole.output)
    with pytest.raises(ValueError, match="stream_workers"):
        run(
            *flags,
            "--resume_from_checkpoint",
            "latest",
            "--dataloader_num_workers",
            1,
            data=files(shards),
            output="part",
        )


def test_two_processes(vit, photos, tmp_path, run):
    """Test images are counted once each, however the files are dealt out: 3 for 2 processes, and 4."""
    for split, counts in {"train": (3, 7, 5, 7), "test": (5, 1, 5)}.items():
        rows = iter(f"{path},{path.parent.name}" for path in sorted((photos / split).glob("*/*.png")))
        for number, count in enumerate(counts):
            lines = ["image,label", *itertools.islice(rows, count)]
            (tmp_path / f"{split}-{number}.csv").write_text("\n".join(lines))
    data = [w for s in ("train", "test") for w in (f"--{s}_file", str(tmp_path / f"{s}-*.csv"))]
    data += ["--validation_file", str(tmp_path / "train-*.csv"), "--select", "last"]
    words = ["--model_name_or_path", vit, *data, "--method", "vpt", "--max_train_steps", "4", "--learning_rate", "0"]
    words += ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4", "--streaming"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *TWO.split()]
    done = subprocess.run(
        [*launch, str(RECIPES / "image_classification.py"), *words, "--output_dir", str(tmp_path / "two")],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "two" / "all_results.json").read_text())
    assert (found["num_processes"], found["steps"]) == (2, 4)
    assert found["epoch"] == 2, "of 22 samples, one process has 12 in its files: 3 batches an epoch"
    plain = run("--learning_rate", 0, "--max_train_steps", 1, data=data)
    for name in ("test_accuracy", "test_loss", "eval_accuracy", "eval_loss"):
        assert found[name] == pytest.approx(plain.results[name], abs=1e-6), name


def test_folders_tables_and_several_classes_stream_alike(run, photos, tmp_path, capsys):
    folders = [w for s in ("train", "validation", "test") for w in (f"--{s}_dir", str(photos / s))]
    plain = run("--learning_rate", 0, data=folders)
    done = run("--learning_rate", 0, "--streaming", data=folders, output="folders")
    assert done.results["test_loss"] == pytest.approx(plain.results["test_loss"], abs=1e-6)
    for split in ("train", "test"):
        paths = sorted((photos / split).glob("*/*.png"))
        lines = [f"{os.path.relpath(path, tmp_path)},{n % 2},{int(n % 3 == 0)}" for n, path in enumerate(paths)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["image,a,b", *lines]))
    table = [w for s in ("train", "test") for w in (f"--{s}_file", str(tmp_path / f"{s}.csv"))]
    flags = ("--learning_rate", 0, "--label_column_name", "a", "b", "--select", "last", "--class_weights", "balanced")
    plain = run(*flags, data=table, output="table")
    done = run(*flags, "--streaming", data=table, output="tables")
    for name in ("test_loss", "test_mean_average_precision", "test_micro_f1"):
        assert done.results[name] == pytest.approx(plain.results[name], abs=1e-6), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--cache_features", "x", "--train_crop", "none", "--horizontal_flip", "0"],
            "not work with --cache_features",
        ),
        (["--sampler", "balanced"], "--streaming does not work with --sampler balanced"),
        (["--max_train_samples", "3", "--max_eval_samples", "3"], "--max_train_samples, --max_eval_samples"),
        (["--train_val_split", "0.2"], "not work with --train_val_split"),
        (["--skip_corrupt_images"], "not work with --skip_corrupt_images"),
    ],
)
def test_flags_that_need_all_samples(run, capsys, shards, flags, message):
    assert message in fails(capsys, run, "--streaming", *flags, data=files(shards))


def test_what_a_stream_cannot_do(run, shards, tmp_path):
    train = ["--train_file", str(shards / "train-*.parquet")]
    with pytest.raises(ValueError, match="--streaming holds no samples out: --select best needs a validation split"):
        run("--streaming", data=train)
    with pytest.raises(ValueError, match=r"--test_split train\[:3\]: --streaming takes whole splits"):
        run("--streaming", "--test_split", "train[:3]", "--select", "last", data=train)
    with pytest.raises(ValueError, match="--method gps reads samples before training"):
        run("--streaming", "--select", "last", method="gps", data=train)
    bad = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"none", "path": "bad.png"}] * 8, "label": [0, 1] * 4},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}),
    )
    bad.to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(
        ValueError, match=r"Cannot decode bad\.png \(sample 0 of the train split in process 0, worker 0"
    ):
        run("--streaming", "--select", "last", data=["--train_file", str(tmp_path / "bad.parquet")])


def test_labels_that_change_on_the_way(shards):
    loader = stream(shards, train=False)
    loader.dataset.labels = {}
    with pytest.raises(ValueError, match=r"The label \[\d\] .* was not there when the labels were read"):
        list(loader)
    loader = stream(shards, train=False)
    loader.dataset.ids = np.zeros(12, dtype=int)
    with pytest.raises(RuntimeError, match="11 samples of the test split were read, but 12 labels before"):
        list(loader)
