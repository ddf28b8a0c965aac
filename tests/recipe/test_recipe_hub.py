"""Recipes and a Hub on this machine: from pictures to a served adapter, and protocols with data sets of the Hub.

The client runs in a process of its own, as in `test_hub.py`; functions whose name begins with `client_` run there.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import benchmark
import datasets
import numpy as np
import pytest
import torch
import yaml
from loopback_hub import LoopbackHub, set_environment
from peft import get_peft_model
from recipe_runs import SIZE, paint
from transformers import AutoModelForImageClassification, ViTConfig, ViTImageProcessor, ViTModel

import hf_visual_peft
from hf_visual_peft.cli.main import main
from hf_visual_peft.serving.options import ServeOptions
from hf_visual_peft.serving.service import Service


BASE = "tester/tiny"
NAMES = ("red", "green", "blue")
OTHERS = ("vpt", "ssf", "adaptformer", "bitfit", "convpass", "lst", "repadapter", "vpt", "ssf")


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """Calls a function in the client process, after the backbone is on the Hub."""
    environment = hub.environment(tmp_path_factory.mktemp("home")) | {"ACCELERATE_USE_CPU": "true"}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=set_environment, initargs=(environment,)) as pool:

        def call(function, *args):
            return pool.submit(function, *args).result(timeout=300)

        call(client_push_base)
        yield call
    assert hub.unknown == []


def client_push_base():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SIZE, intermediate_size=64)).push_to_hub(BASE)
    ViTImageProcessor(size={"height": 32, "width": 32}).push_to_hub(BASE)


def client_command(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(map(str, words)))
    return status, out.getvalue(), err.getvalue()


def client_save_others(folder):
    for seed, method in enumerate(OTHERS):
        torch.manual_seed(seed)
        labels = {"num_labels": 3, "id2label": dict(enumerate("xyz")), "label2id": {n: i for i, n in enumerate("xyz")}}
        plain = AutoModelForImageClassification.from_pretrained(BASE, **labels)
        config = hf_visual_peft.get_method(method).config_cls()
        get_peft_model(plain, config).save_pretrained(Path(folder, f"{method}-{seed}"))


def client_served(adapters, content):
    """What each adapter sees in an image."""
    service = Service(ServeOptions(model=BASE, adapters=adapters, device="cpu"))

    async def ask():
        await service.start()
        try:
            return await service.predict(list(service.entries.values()), content, 3)
        finally:
            await service.stop()

    return asyncio.run(ask())


def test_from_pictures_to_a_server(hub, client, tmp_path):
    """Compare methods, push the best one, pull it elsewhere, predict, and serve it beside nine others."""
    photos, rng = tmp_path / "photos", np.random.default_rng(1)
    for channel, name in enumerate(NAMES):
        for number in range(14):
            paint(photos / name / f"{number}.png", channel, rng)
    done = tmp_path / "done"
    words = ["compare", photos, "--model_name_or_path", BASE, "--methods", "vpt", "ssf", "--budget", "0.01"]
    status, out, err = client(client_command, *words, "--per_device_train_batch_size", "4", "--output_dir", done)
    assert status == 0, err
    state = json.loads((done / "comparison.json").read_text())
    assert state["choice"] in out
    run = state["rows"][state["choice"]]["runs"][-1]

    assert client(client_command, "push", "tester/winner", done / run["folder"])[0] == 0
    shelf = tmp_path / "shelf"
    client(client_save_others, shelf)
    assert client(client_command, "push", "tester/others", *sorted(shelf.iterdir()))[0] == 0
    assert len(json.loads(hub.model("tester/others").history()[0].files["adapters.json"].data)["adapters"]) == 9

    pulled = tmp_path / "elsewhere"
    assert client(client_command, "pull", "tester/winner", "--output_dir", pulled)[0] == 0
    test = [row["image"]["bytes"] for row in client_images(done / "data" / "test")]
    (tmp_path / "new").mkdir()
    for number, content in enumerate(test):
        (tmp_path / "new" / f"{number:02d}.png").write_bytes(content)
    status, out, err = client(client_command, "predict", pulled, tmp_path / "new", "--format", "jsonl")
    assert status == 0, err
    predicted = [json.loads(line) for line in out.splitlines()]
    names = [row["prediction"] for row in predicted]
    assert names == [state["data"]["classes"][index] for index in run["predicted"]]

    served = client(client_served, [f"winner={pulled}", "tester/others"], test[0])
    assert len(served) == 10
    (found,) = [one for one in served if one["adapter"] == "winner"]
    assert {row["label"] for row in found["predictions"]} == set(NAMES)
    assert found["predictions"][0]["label"] == names[0]
    assert found["predictions"][0]["probability"] == pytest.approx(run["confidence"][0], abs=1e-4)
    others = [one for one in served if one["adapter"] != "winner"]
    assert all({row["label"] for row in one["predictions"]} == set("xyz") for one in others)


def client_images(folder):
    return datasets.load_from_disk(folder).cast_column("image", datasets.Image(decode=False))


# Protocols.


def client_push_data(folder):
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=list(NAMES)), "id": datasets.Value("int32")}
    )
    splits = {}
    for split in ("train", "test"):
        files = sorted(Path(folder, split).rglob("*.png"))
        kinds = [NAMES.index(path.parent.name) for path in files]
        columns = {"picture": list(map(str, files)), "kind": kinds, "id": [0] * len(files)}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(splits).push_to_hub("tester/colours")


def client_benchmark(words):
    """The result or the message of refusal."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            return benchmark.main(words)
        except SystemExit:
            return err.getvalue()


def test_protocols_with_data_sets_of_the_hub(client, tmp_path):
    rng = np.random.default_rng(2)
    for split, count in (("train", 6), ("test", 3)):
        for channel, name in enumerate(NAMES):
            for number in range(count):
                paint(tmp_path / "photos" / split / name / f"{number}.png", channel, rng)
    client(client_push_data, tmp_path / "photos")
    about = {"classes": 3, "hub": "tester/colours", "image": "picture", "label": "kind"}
    keys = {
        "name": "of the Hub",
        "tasks": {"far": about, "near": {"classes": 3, "folder": "photos"}},
        "splits": {"train": "train", "test": "test"},
        "flags": {"num_train_epochs": 1, "per_device_train_batch_size": 8, "select": "last", "train_crop": "none"},
        "shots": [2],
        "seeds": [0],
    }
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(keys))
    words = ["--protocol", own, "--data_dir", tmp_path, "--methods", "vpt", "--model_name_or_path", BASE]
    words = [str(word) for word in [*words, "--progress", "none", "--output_dir", tmp_path / "out"]]
    found = client(client_benchmark, words)
    assert isinstance(found, dict), found
    runs = {row["task"]: row for row in map(json.loads, (f.read_text() for f in (tmp_path / "out").glob("runs/*")))}
    assert set(runs) == {"far", "near"}
    assert runs["far"]["data"]["test"] == runs["near"]["data"]["test"]  # the Hub has the same bytes
    assert runs["far"]["fingerprint"] == runs["near"]["fingerprint"]

    more = {
        "gone": about | {"hub": "tester/nothing"},
        "other": about | {"config": "missing"},
        "few": about | {"classes": 4},
    }
    own.write_text(yaml.safe_dump(keys | {"tasks": more}))
    told = client(client_benchmark, [word for word in words if word not in ("--data_dir", str(tmp_path))])
    assert "gone: Dataset 'tester/nothing' doesn't exist" in told
    assert "; other: " in told
    assert "few has 3 classes in the split train and should have 4; gone: " in told
    assert "--data_dir" not in told.partition("error:")[2]
