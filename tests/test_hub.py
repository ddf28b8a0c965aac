"""Uploads and downloads with an unmodified Hub client, against a Hub on this machine.

The client runs in a process of its own: the address of the Hub must be known before any of its libraries is imported,
so what sets it there comes from a module that imports none. Functions whose name begins with `client_` run in that
process; they return plain values, and the tests look at these and at what the Hub holds.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from pathlib import Path

import huggingface_hub
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub import ModelCard, hf_hub_download, scan_cache_dir, snapshot_download
from loopback_hub import Blob, LoopbackHub, set_environment
from packaging.version import Version
from peft import AutoPeftModel, LoraConfig, PeftConfig, PeftModel, get_peft_model
from PIL import Image, ImageOps
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import hf_visual_peft
from hf_visual_peft.cli.main import main
from hf_visual_peft.serving.options import ServeOptions
from hf_visual_peft.serving.service import Service
from hf_visual_peft.sharing.hub import push
from hf_visual_peft.sharing.inspecting import inspect_adapter


BASE = "tester/tiny-vit"
# what they leave in a file: tokens, modules, shared ones, copies, choices, norms, parts of several methods, peft's own
METHODS = ("vpt", "adaptformer", "ssf", "fact", "partial", "gps", "spt", "snf", "composite", "adapterbias", "lora")
FILES = {"adapter_model.safetensors", "adapter_config.json", "README.md"}


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory):
    return hub.environment(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def client(hub, environment):
    """Calls a function in the client process, after the base model is on the Hub."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=set_environment, initargs=(environment,)) as pool:

        def call(function, *args, **kwargs):
            return pool.submit(function, *args, **kwargs).result(timeout=300)

        call(client_push_base)
        yield call


@pytest.fixture(autouse=True)
def _every_request_is_understood(hub):
    yield
    assert hub.unknown == []
    assert (hub.cut_uploads, hub.expire_uploads, hub.cut_commits, hub.before_commit) == (0, 0, 0, None)


# What runs in the client process.


@cache
def _pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _logits(model):
    with torch.no_grad():
        pixels = _pixels()
        video = getattr(getattr(model, "peft_config", {}).get("default"), "video", False)
        return model.eval()(pixel_values=pixels[None] if video else pixels).logits


def _base(where=BASE):
    return ViTForImageClassification.from_pretrained(where)


def _adapted(method, seed, base=None):
    """A model with an adapter whose every weight depends on the seed, also those of the head."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    if method == "lora":
        config = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    else:
        config = hf_visual_peft.get_method(method).config_cls()
    model = get_peft_model(base or _base(), config)
    ours = hf_visual_peft.list_methods().get(method)
    if ours is not None and ours.calibrated:
        batch = {"pixel_values": _pixels(), "labels": torch.tensor([1, 1])}
        hf_visual_peft.calibrate(model, [batch], progress=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def client_push_base():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    labels = {"id2label": {0: "cat", 1: "dog", 2: "eel"}, "label2id": {"cat": 0, "dog": 1, "eel": 2}}
    ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, **labels)).push_to_hub(BASE)
    ViTImageProcessor(size={"height": 32, "width": 32}).push_to_hub(BASE)


def client_push(repo, method="vpt", seed=1, **kwargs):
    model = _adapted(method, seed)
    return {"logits": _logits(model).tolist(), "oid": push(model, repo, **kwargs).oid}


def client_load(repo, **kwargs):
    return _logits(PeftModel.from_pretrained(_base(), repo, **kwargs)).tolist()


def client_load_by_auto_classes(repo):
    return {
        "config": type(PeftConfig.from_pretrained(repo)).__name__,
        "peft": _logits(AutoPeftModel.from_pretrained(repo)).tolist(),
        "transformers": _logits(AutoModelForImageClassification.from_pretrained(repo)).tolist(),
    }


def client_error(function, *args, **kwargs):
    """The names of the classes of what was raised, and its text; errors of the client do not cross processes."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return [cls.__name__ for cls in type(error).__mro__], "".join(traceback.format_exception(error))
    return [], ""


def client_download(repo, name, **kwargs):
    return Path(hf_hub_download(repo, name, **kwargs)).read_text()


def client_card(repo):
    card = ModelCard.load(repo)
    if Version(huggingface_hub.__version__) >= Version("2.2"):  # older ones ask huggingface.co, not HF_ENDPOINT
        card.validate()
    results = [(r.task_type, r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results or []]
    return card.data.to_dict(), card.text, results


# The tests.


@pytest.mark.parametrize("method", METHODS)
def test_a_pushed_adapter_is_loaded_bit_for_bit_from_one_commit(hub, client, method):
    repo = f"tester/round-trip-{method}"
    pushed = client(client_push, repo, method)
    history = hub.model(repo).history()
    assert [commit.message for commit in history] == [f"Upload {method.upper()} adapter", "initial commit"]
    assert history[0].oid == pushed["oid"]
    assert set(history[0].files) - set(history[1].files) == FILES
    assert history[0].files["adapter_model.safetensors"].sha256, "weights travel by LFS"
    assert client(client_load, repo) == pushed["logits"]
    loaded = client(client_load_by_auto_classes, repo)
    assert loaded["peft"] == pushed["logits"]
    if method in ("adapterbias", "snf"):  # they round by how memory is aligned, here as in the file
        torch.testing.assert_close(torch.tensor(loaded["transformers"]), torch.tensor(pushed["logits"]))
    else:
        assert loaded["transformers"] == pushed["logits"]
    assert loaded["config"].removesuffix("Config").lower() == method


def test_the_base_model_alone_gives_other_logits(client):
    """So that the equalities of the other tests mean something."""
    pushed = client(client_push, "tester/other-logits")
    assert client(client_base_logits) != pushed["logits"]


def client_base_logits():
    return _logits(_base()).tolist()


def test_the_card_tells_what_the_run_was(hub, client):
    repo = "tester/with-card"
    run = {
        "metrics": {"accuracy": 0.944, "top5_accuracy": 1.0},
        "dataset": "ylecun/mnist",
        "dataset_split": "test",
        "command": "accelerate launch recipes/image_classification.py --method vpt",
        "license": "apache-2.0",
        "tags": ["digits"],
    }
    client(client_push, repo, **run)
    data, text, results = client(client_card, repo)
    assert data["base_model"] == BASE
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft"
    assert data["pipeline_tag"] == "image-classification"
    assert data["license"] == "apache-2.0"
    assert "ylecun/mnist" in data["datasets"]
    assert data["metrics"] == ["accuracy", "top5_accuracy"]
    assert {"digits", "hf_visual_peft", "vpt", f"base_model:adapter:{BASE}"} <= set(data["tags"])
    assert data["model-index"][0]["name"] == "with-card"
    assert results == [
        ("image-classification", "ylecun/mnist", "accuracy", 0.944),
        ("image-classification", "ylecun/mnist", "top5_accuracy", 1.0),
    ]
    assert run["command"] in text
    assert "https://arxiv.org/abs/2203.12119" in text
    assert text.index("import hf_visual_peft") < text.index("PeftModel.from_pretrained(")
    assert "0. cat\n1. dog\n2. eel\n" in text
    assert ("POST", "/api/validate-yaml") in hub.requests


def test_the_card_of_a_method_of_pefts_own_needs_no_import_of_ours(client):
    client(client_push, "tester/card-lora", "lora", metrics={"accuracy": 0.5}, dataset="cats and dogs")
    data, text, results = client(client_card, "tester/card-lora")
    assert "hf_visual_peft" not in re.sub("<!--.*-->", "", text).partition("### Framework versions")[0]
    assert data["base_model_relation"] == "adapter"
    assert "datasets" not in data, "a name with spaces in it is not an id"
    assert results == [("image-classification", "cats and dogs", "accuracy", 0.5)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vpt", "lora"])
def test_the_snippet_of_the_card_does_what_was_evaluated_in_a_new_process(client, environment, method, tmp_path):
    """With the base's revision, the processor and the size of the run, the names, and the image as a phone took it."""
    repo, path = f"tester/snippet-{method}", tmp_path / "image.jpg"
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.radial_gradient("L").resize((90, 60)).crop((20, 0, 90, 40)).save(path, exif=turned)
    expected = client(client_push_as_evaluated, repo, method, path)
    card = client(client_card, repo)[1]
    snippet = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]
    run = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    printed = ast.literal_eval(run.stdout.splitlines()[-1])
    assert printed == pytest.approx(expected["evaluated"], abs=1e-6)
    for other, scores in expected.items():
        if other != "evaluated":
            assert max(abs(printed[name] - score) for name, score in scores.items()) > 1e-4, other
    assert "0. ant\n1. bee\n2. cow\n3. doe\n" in card


def client_push_as_evaluated(repo, method, path):
    """What the upload gives for an image: as it was evaluated, and with one thing otherwise."""
    names = dict(enumerate(["ant", "bee", "cow", "doe"]))
    versions = "tester/versions"
    for revision in (None, "v1.2"):
        base = _base()
        if revision:
            torch.manual_seed(7)
            with torch.no_grad():
                for parameter in base.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        base.push_to_hub(versions, revision=revision)
        ViTImageProcessor(size={"height": 32, "width": 32}).push_to_hub(versions, revision=revision)
    options = {"id2label": names, "label2id": {n: i for i, n in names.items()}, "ignore_mismatched_sizes": True}
    model = _adapted(method, 8, ViTForImageClassification.from_pretrained(versions, revision="v1.2", **options))
    model.peft_config["default"].revision = "v1.2"
    processor = ViTImageProcessor(size={"height": 48, "width": 48})
    push(model, repo, processor=processor, interpolate_pos_encoding=True)

    def scores(model, processor, image):
        inputs = processor(image.convert("RGB"), return_tensors="pt")
        with torch.no_grad():
            found = model.eval()(**inputs, interpolate_pos_encoding=True).logits[0].softmax(-1)
        return dict(zip(names.values(), found.tolist(), strict=True))

    raw = Image.open(path)
    upright = ImageOps.exif_transpose(raw)
    other = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(versions, **options), repo)
    return {
        "evaluated": scores(model, processor, upright),
        "as it lies in the file": scores(model, processor, raw),
        "the base's processor": scores(model, AutoImageProcessor.from_pretrained(versions), upright),
        "another revision": scores(other, processor, upright),
    }


def test_branches_and_commits_keep_their_own_weights(hub, client):
    repo = "tester/branches"
    first = client(client_push, repo, seed=1)
    second = client(client_push, repo, seed=2, revision="exp/second")
    third = client(client_push, repo, seed=3)
    assert len({json.dumps(pushed["logits"]) for pushed in (first, second, third)}) == 3
    assert client(client_load, repo) == third["logits"]
    assert client(client_load, repo, revision="exp/second") == second["logits"]
    assert client(client_load, repo, revision=first["oid"]) == first["logits"]
    assert len(hub.model(repo).history()) == 3
    assert [commit.oid for commit in hub.model(repo).history("exp/second")][:2] == [second["oid"], first["oid"]]


def test_the_same_adapter_twice_is_one_commit(hub, client):
    first = client(client_push, "tester/twice")
    assert client(client_push, "tester/twice")["oid"] == first["oid"]
    assert len(hub.model("tester/twice").history()) == 2


def test_a_short_name_is_that_of_the_user(hub, client):
    client(client_push, "short-name")
    card = hub.model("tester/short-name").history()[0].files["README.md"].data.decode()
    assert 'PeftModel.from_pretrained(base, "tester/short-name")' in card


def test_a_private_repository_is_there_for_its_owner_alone(hub, client, tmp_path):
    repo = "tester/private"
    pushed = client(client_push, repo, private=True)
    assert hub.model(repo).private
    assert client(client_load, repo) == pushed["logits"]
    for token in (False, "hf_stranger"):
        elsewhere = {"token": token, "cache_dir": tmp_path}  # not what the owner already downloaded
        names, _ = client(client_error, client_download, repo, "README.md", **elsewhere)
        assert "RepositoryNotFoundError" in names
        names, text = client(client_error, client_load, repo, **elsewhere)
        assert "ValueError" in names
        assert "Can't find 'adapter_config.json' at 'tester/private'" in text


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_of_other_visibility_gets_no_upload(hub, client, private):
    repo = f"tester/was-{'public' if private else 'private'}"
    client(client_push, repo, private=not private)
    names, text = client(client_error, client_push, repo, seed=2, private=private)
    assert "ValueError" in names
    assert f"private={private}" in text
    assert len(hub.model(repo).history()) == 2
    assert hub.model(repo).private != private


def test_what_is_not_there_is_named(client):
    repo = "tester/not-found"
    client(client_push, repo)
    for args, kwargs, error in [
        (("tester/nowhere", "README.md"), {}, "RepositoryNotFoundError"),
        ((repo, "README.md"), {"revision": "nowhere"}, "RevisionNotFoundError"),
        ((repo, "nowhere.md"), {}, "EntryNotFoundError"),
    ]:
        assert error in client(client_error, client_download, *args, **kwargs)[0]
    for args, kwargs, error in [
        (("tester/nowhere",), {}, "RepositoryNotFoundError"),
        ((repo,), {"revision": "nowhere"}, "RevisionNotFoundError"),
        ((repo,), {"subfolder": "nowhere"}, "EntryNotFoundError"),
    ]:
        names, text = client(client_error, client_load, *args, **kwargs)
        assert "ValueError" in names
        assert f"Can't find 'adapter_config.json' at '{args[0]}'" in text
        assert kwargs.get("subfolder") or error in text, "peft names the cause"


def test_somebody_elses_repository_is_refused(hub, client):
    client(client_push, "tester/mine")
    names, text = client(client_error, client_push, "tester/mine", seed=2, token="hf_stranger")
    assert "HfHubHTTPError" in names
    assert "403" in text
    assert len(hub.model("tester/mine").history()) == 2


@pytest.mark.parametrize(("fault", "seed"), [("upload", 21), ("commit", 22)])  # weights no other test stored
def test_an_upload_cut_off_half_way_leaves_the_old_version(hub, client, fault, seed):
    repo = f"tester/cut-{fault}"
    old = client(client_push, repo, seed=1, metrics={"accuracy": 0.1}, dataset="x")
    before = hub.model(repo).history()
    hub.received.clear()
    if fault == "upload":  # the connection goes; the address the client then tries again has expired
        hub.cut_uploads = hub.expire_uploads = 1
    else:
        hub.cut_commits = 1
    names, _ = client(client_error, client_push, repo, seed=seed, metrics={"accuracy": 0.2}, dataset="x")
    assert names
    assert len(hub.received) == 1
    assert hub.received[0] > 100
    assert hub.model(repo).history() == before
    assert client(client_load, repo, force_download=True) == old["logits"]
    assert client(client_card, repo)[2][0][3] == 0.1, "the card is that of the weights"

    new = client(client_push, repo, seed=seed, metrics={"accuracy": 0.2}, dataset="x")
    assert new["logits"] != old["logits"]
    assert client(client_load, repo) == new["logits"]
    assert client(client_card, repo)[2][0][3] == 0.2
    assert len(hub.model(repo).history()) == len(before) + 1


def test_an_upload_that_is_cut_once_is_tried_again(hub, client):
    hub.cut_uploads = 1
    pushed = client(client_push, "tester/cut-once", seed=4)
    assert client(client_load, "tester/cut-once") == pushed["logits"]


def test_text_that_somebody_wrote_on_the_hub_stays(hub, client):
    repo = "tester/edited"
    client(client_push, repo)
    head = hub.model(repo).at("main")
    edited = head.files["README.md"].data.replace(b"## The adapter", b"It knows three animals.\n\n## The adapter")
    hub.model(repo).commit("main", "edit", {**head.files, "README.md": type(head.files["README.md"])(edited)})
    pushed = client(client_push, repo, seed=2, metrics={"accuracy": 0.7}, dataset="animals of mine")
    _, text, results = client(client_card, repo)
    assert "It knows three animals." in text
    assert "animals of mine" not in text
    assert results == [("image-classification", "animals of mine", "accuracy", 0.7)]
    assert client(client_load, repo) == pushed["logits"]


def test_a_commit_made_meanwhile_is_not_overwritten(hub, client):
    repo = "tester/meanwhile"
    client(client_push, repo)
    hub.before_commit = lambda repo: repo.commit("main", "meanwhile", repo.at("main").files)
    names, text = client(client_error, client_push, repo, seed=2)
    assert "HfHubHTTPError" in names
    assert "412" in text
    assert hub.model(repo).at("main").message == "meanwhile"


def test_one_of_several_adapters_lands_at_the_top_of_the_repository(hub, client):
    logits = client(client_push_second_adapter, "tester/second")
    assert not FILES - set(hub.model("tester/second").at("main").files)
    assert client(client_load, "tester/second") == logits


def client_push_second_adapter(repo):
    model = _adapted("vpt", seed=1)
    model.add_adapter("other", hf_visual_peft.get_method("vpt").config_cls(num_virtual_tokens=3, init_weights=False))
    model.set_adapter("other")
    push(model, repo, adapter_name="other")
    return _logits(model).tolist()


def test_a_base_model_from_a_folder_is_pointed_out_and_can_be_named(hub, client, tmp_path):
    warned, logits = client(client_push_from_folder, "tester/folder", tmp_path / "checkpoint")
    assert "base_model='user/name'" in warned
    data, text, _ = client(client_card, "tester/folder")
    assert "base_model" not in data
    assert str(tmp_path) not in text
    files = hub.model("tester/folder").at("main").files
    assert not any(str(tmp_path).encode() in blob.data for blob in files.values())
    assert json.loads(files["adapter_config.json"].data)["base_model_name_or_path"] == "checkpoint"

    warned, logits = client(client_push_from_folder, "tester/named", tmp_path / "checkpoint", base_model=BASE)
    assert warned == ""
    assert client(client_card, "tester/named")[0]["base_model"] == BASE
    saved = json.loads(hub.model("tester/named").at("main").files["adapter_config.json"].data)
    assert saved["base_model_name_or_path"] == BASE
    assert client(client_load_by_auto_classes, "tester/named")["peft"] == logits


def client_push_from_folder(repo, folder, **kwargs):
    _base().save_pretrained(folder)
    model = _adapted("vpt", seed=5, base=_base(folder))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        push(model, repo, **kwargs)
    ours = [str(warning.message) for warning in caught if "what you upload" in str(warning.message)]
    return "".join(ours), _logits(model).tolist()


@pytest.mark.parametrize(
    ("kwargs", "error", "said"),
    [
        ({"adapter_name": "missing"}, "ValueError", "adapter_name='missing': the model has 'default'"),
        ({"repo_id": "a/b/c"}, "HFValidationError", "a/b/c"),
        ({"revision": "0123456789abcdef0123456789abcdef01234567"}, "ValueError", "is a commit"),
        ({"base_model": "/data/vit"}, "ValueError", "base_model='/data/vit' is not a model id"),
        ({"metrics": {"accuracy": float("nan")}, "dataset": "x"}, "ValueError", "metrics['accuracy']=nan"),
        ({"metrics": {"accuracy": 0.9}}, "ValueError", "without dataset"),
        ({"model": "bare"}, "TypeError", "not ViTForImageClassification"),
    ],
)
def test_bad_input_is_refused_before_any_request(hub, client, kwargs, error, said):
    names, text = client(client_error, client_push_badly, **kwargs)
    assert error in names
    assert said in text
    assert ("models", "tester/bad") not in hub.repos


def client_push_badly(model=None, repo_id="tester/bad", **kwargs):
    push(_base() if model else _adapted("vpt", seed=1), repo_id, **kwargs)


def test_headers_of_a_repository_are_inspected_without_its_weights(client):
    client(client_push, "tester/inspected", "ssf")
    found = client(client_inspect, "tester/inspected")
    assert found["header"] == found["local"] | {"source": "tester/inspected"}
    assert found["header"]["classes"] == ["cat", "dog", "eel"]
    assert found["weights in the cache"] == []
    names, text = client(client_error, inspect_adapter, "tester/nowhere")
    assert "ValueError" in names
    assert "no folder tester/nowhere here, and no such repository" in text


def client_inspect(repo):
    header = asdict(inspect_adapter(repo))
    revisions = next(found for found in scan_cache_dir().repos if found.repo_id == repo).revisions
    cached = [file.file_name for one in revisions for file in one.files if "safetensors" in file.file_name]
    folder = snapshot_download(repo)
    return {"header": header, "local": asdict(inspect_adapter(folder)), "weights in the cache": cached}


def test_the_loopback_hub_serves_datasets_too(client):
    rows, streamed = client(client_dataset_round_trip, "tester/numbers")
    assert rows == {"train": [0, 1, 2, 3], "test": [9]}
    assert streamed == [0, 1]


def client_dataset_round_trip(repo):
    made = DatasetDict(train=Dataset.from_dict({"n": [0, 1, 2, 3]}), test=Dataset.from_dict({"n": [9]}))
    made.push_to_hub(repo)
    loaded = load_dataset(repo)
    streamed = load_dataset(repo, split="train", streaming=True)
    return {split: list(data["n"]) for split, data in loaded.items()}, [row["n"] for row in streamed.take(2)]


# Commands: several adapters in a repository, with an index.


def client_save(folder, methods, base=None):
    found = {}
    for seed, method in enumerate(methods):
        model = _adapted(method, seed)
        if base is not None:
            model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(Path(folder, method))
        found[method] = _logits(model).tolist()
    return found


def client_command(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(map(str, words)))
    return status, out.getvalue(), err.getvalue()


def client_served(adapters, content):
    """The class that a server sees in an image with each adapter."""
    service = Service(ServeOptions(model=BASE, adapters=adapters, device="cpu"))

    async def ask():
        await service.start()
        try:
            entries = list(service.entries.values())
            return await service.predict(entries, content, 3)
        finally:
            await service.stop()

    return asyncio.run(ask())


def test_many_adapters_of_one_repository(hub, client, tmp_path):
    repo, shelf = "tester/shelf", tmp_path / "shelf"
    expected = client(client_save, shelf, ["vpt", "ssf", "lora"])
    status, out, err = client(client_command, "push", repo, shelf / "vpt", f"scales={shelf / 'ssf'}")
    assert (status, err) == (0, "")
    assert hub.model(repo).history()[0].oid in out
    files = set(hub.model(repo).history()[0].files)
    assert files - {".gitattributes"} == {
        "adapters.json", "README.md", *(f"{name}/{file}" for name in ("vpt", "scales") for file in FILES)
    }  # fmt: skip
    card, text, _ = client(client_card, repo)
    assert card["base_model"] == [BASE]
    assert {"hf_visual_peft", "vpt", "ssf", f"base_model:adapter:{BASE}"} <= set(card["tags"])
    assert "[scales](scales)" in text

    # a third one joins the others, and the text that somebody wrote around the list stays
    edited = (
        hub.model(repo).history()[0].files["README.md"].data.decode().replace("Adapters made with", "My adapters, by")
    )
    state = hub.model(repo).history()[0].files | {"README.md": Blob(edited.encode())}
    hub.model(repo).commit("main", "edited", state)
    assert client(client_command, "push", repo, shelf / "lora", "--subfolder")[0] == 0
    index = json.loads(hub.model(repo).history()[0].files["adapters.json"].data)["adapters"]
    assert {name: row["method"] for name, row in index.items()} == {"lora": "lora", "scales": "ssf", "vpt": "vpt"}
    text = hub.model(repo).history()[0].files["README.md"].data.decode()
    assert "My adapters, by" in text
    assert text.count("[lora](lora)") == 1

    status, out, _ = client(client_command, "pull", repo, "scales", "lora", "--output_dir", tmp_path / "pulled")
    assert status == 0
    assert sorted(path.name for path in (tmp_path / "pulled").iterdir() if path.name[0] != ".") == ["lora", "scales"]
    assert client(client_load, str(tmp_path / "pulled" / "scales")) == expected["ssf"]
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(picture, "PNG")
    served = client(client_served, [repo], picture.getvalue())
    assert [one["adapter"] for one in served] == ["lora", "scales", "vpt"]
    assert client(client_served, [str(tmp_path / "pulled")], picture.getvalue()) == served[:2]


def test_search(hub, client, tmp_path):
    client(client_save, tmp_path, ["vpt", "ssf"])
    assert client(client_command, "push", "tester/search-one", tmp_path / "vpt")[0] == 0
    assert client(client_command, "push", "tester/search-two", tmp_path / "ssf")[0] == 0

    def names(*words):
        status, out, err = client(client_command, "search-hub", "search-", *words, "--json")
        assert status == 0, err
        return [row["repo_id"] for row in json.loads(out)]

    assert names() == ["tester/search-one", "tester/search-two"]
    assert names("--method", "vpt") == ["tester/search-one"]
    assert names("--base_model", BASE) == ["tester/search-one", "tester/search-two"]
    assert names("--base_model", "tester/other") == []
    assert names("--limit", "1") == ["tester/search-one"]
    status, out, _ = client(client_command, "search-hub", "search-two")
    assert (status, BASE in out, "search-two" in out) == (0, True, True)
    assert "Nothing was found" in client(client_command, "search-hub", "no-such-name")[1]


def test_commands_refuse_before_anything_is_sent(hub, client, tmp_path):
    client(client_save, tmp_path / "local", ["vpt"], base=str(tmp_path / "somewhere"))
    (tmp_path / "somewhere").mkdir()
    client(client_save, tmp_path / "fine", ["ssf"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = set(hub.repos)
    ours, same = tmp_path / "fine" / "ssf", f"ssf={tmp_path / 'local' / 'vpt'}"
    for words, told in (
        (["push", "tester/refused", tmp_path / "local" / "vpt"], "which is not on the Hub"),
        (["push", "tester/refused", tmp_path / "full"], "no adapter_config.json"),
        (["push", "tester/refused", f"../x={tmp_path / 'fine' / 'ssf'}"], "not a name of a sub-folder"),
        (["push", "tester/refused", f"a b={tmp_path / 'fine' / 'ssf'}"], "not a name of a sub-folder"),
        (["push", "tester/refused", ours, same], "both named 'ssf'"),
        (["push", "tester/refused", tmp_path / "fine" / "ssf", "--base_model", "/a/b"], "not a model id"),
        (["pull", "tester/missing", "--output_dir", tmp_path / "new"], "no repository tester/missing"),
        (["pull", BASE, "--output_dir", tmp_path / "new"], "holds no adapter"),
        (["pull", BASE, "birds", "--output_dir", tmp_path / "new"], "no adapter birds"),
        (["pull", BASE, "--output_dir", tmp_path / "full"], "not empty"),
    ):
        status, _, err = client(client_command, *words)
        assert status == 1, words
        assert told in err, words
    assert set(hub.repos) == before
    assert not (tmp_path / "new").exists()
    assert client(client_command, "push", "tester/renamed", tmp_path / "local" / "vpt", "--base_model", BASE)[0] == 0
    files = hub.model("tester/renamed").history()[0].files
    assert json.loads(files["adapter_config.json"].data)["base_model_name_or_path"] == BASE
    assert client(client_card, "tester/renamed")[0]["base_model"] == BASE
