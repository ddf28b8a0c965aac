"""The recipe on cached features."""

import os
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from cached_features import key_of
from image_data import Images
from safetensors.torch import load_file
from transformers import ResNetConfig, ResNetModel, ViTImageProcessor


PLAIN = ("--train_crop", "none", "--horizontal_flip", "0")


@pytest.fixture
def trained(run):
    """Results and weights of a run."""

    def call(*flags, method="linear", output="out"):
        done = run("--num_train_epochs", 3, "--checkpointing_steps", "no", *flags, method=method, output=output)
        results = {k: v for k, v in done.results.items() if k not in ("train_runtime", "command")}
        (weights,) = done.output.glob("*model.safetensors")
        return results, load_file(weights)

    return call


def assert_equal(one, other):
    (results, weights), (others, other_weights) = one, other
    assert results.keys() == others.keys()
    for key, value in results.items():
        assert others[key] == (value if isinstance(value, dict) else pytest.approx(value, abs=1e-6))
    assert weights.keys() == other_weights.keys()
    assert all(weights[name].allclose(other_weights[name], atol=1e-6) for name in weights)


@pytest.mark.parametrize(("method", "flags"), [("linear", ()), ("linearprobe", ()), ("lst", ("--r", "2"))])
def test_the_same_results_as_without(method, flags, trained, tmp_path):
    cached = ("--cache_features", str(tmp_path / "features"))
    expected = trained(*PLAIN, *flags, method=method, output="plain")
    assert_equal(trained(*PLAIN, *flags, *cached, method=method, output="first"), expected)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("features/*/*.safetensors")}
    assert len(times) == 3  # one file a split
    assert_equal(trained(*PLAIN, *flags, *cached, method=method, output="second"), expected)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("features/*/*.safetensors")} == times


@pytest.mark.parametrize("method", ["linear", "linearprobe"])
def test_batch_norms_give_the_same_results_as_without(method, trained, tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path / "resnet")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "resnet")
    flags = ("--model_name_or_path", str(tmp_path / "resnet"), *PLAIN)
    expected = trained(*flags, method=method, output="plain")
    assert_equal(
        trained(*flags, "--cache_features", str(tmp_path / "features"), method=method, output="cached"), expected
    )


def test_files_of_a_table_that_change_make_another_key(tmp_path):
    path = tmp_path / "a.png"
    PIL.Image.new("RGB", (4, 4)).save(path)
    data = datasets.Dataset.from_dict({"image": [str(path)]}).cast_column("image", datasets.Image(decode=False))
    args = SimpleNamespace(image_size=None, clip_frames=None, cache_views=None)
    images = Images(data, np.array([0]), "test", None, args)
    first = key_of(images)
    assert key_of(images)["data"] == first["data"]
    os.utime(path, ns=(1, 1))
    assert key_of(images)["data"] != first["data"]


def test_as_many_views_as_epochs_give_the_same_results_as_augmentation(trained, tmp_path):
    cached = ("--cache_features", str(tmp_path / "features"))
    expected = trained(output="plain")
    assert_equal(trained(*cached, "--cache_views", "3", output="views"), expected)
    one = trained(*cached, "--cache_views", "1", output="one")
    assert not one[1]["classifier.weight"].allclose(expected[1]["classifier.weight"], atol=1e-6)
    assert len(list(tmp_path.glob("features/train-*"))) == 2
    assert len(list(tmp_path.glob("features/test-*"))) == 1


def test_a_resumed_run_sees_the_views_of_its_epochs(trained, tmp_path):
    flags = ("--cache_features", str(tmp_path / "features"), "--cache_views", "3", "--checkpointing_steps", "8")
    expected = trained(*flags, output="whole")
    checkpoint = str(tmp_path / "whole" / "checkpoint-8")  # in the second epoch
    assert_equal(trained(*flags, "--resume_from_checkpoint", checkpoint, output="resumed"), expected)


def test_runs_of_a_sweep_share_features(trained, tmp_path):
    cached = (*PLAIN, "--cache_features", str(tmp_path / "features"))
    for index, flags in enumerate([("--seed", "1"), ("--learning_rate", "0.1"), ("--weight_decay", "0")]):
        trained(*cached, *flags, output=str(index))
    trained(*cached, method="linearprobe", output="probe")
    assert len(list(tmp_path.glob("features/*"))) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--cache_features", "f", "--horizontal_flip", "0.5"),
            "--cache_views N for N fixed augmentations of each training image",
        ),
        (
            ("--cache_features", "f", "--train_crop", "none", "--horizontal_flip", "0.5"),
            "--horizontal_flip 0 for none",
        ),
        (("--cache_features", "f", *PLAIN, "--cache_views", "2"), "all are equal"),
        (("--cache_views", "2"), "--cache_views needs --cache_features"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, trained, capsys):
    with pytest.raises(SystemExit):
        trained(*flags)
    assert message in " ".join(capsys.readouterr().err.split())


def test_methods_that_change_every_block_are_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="No block of the backbone is frozen"):
        trained(*PLAIN, "--cache_features", str(tmp_path / "features"), method="bitfit")
