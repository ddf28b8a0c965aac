"""`hf-visual-peft serve`: many adapters on one backbone."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager, closing
from pathlib import Path
from socket import socket

import httpx
import pytest
import torch
from families import liven
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from serve_requests import malformed, picture
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import hf_visual_peft
from hf_visual_peft.cli.main import main
from hf_visual_peft.serving.app import create_app
from hf_visual_peft.serving.catalogue import Base, find_adapters
from hf_visual_peft.serving.options import ServeOptions
from hf_visual_peft.serving.pool import AdapterError, Backbone, Pool
from hf_visual_peft.serving.service import Service
from hf_visual_peft.sharing.hub import save_processor


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VIT = SIZES | {"image_size": 32, "patch_size": 8}
TARGETS = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"], "init_lora_weights": False}
METHODS = {
    "birds": ("vpt", {"num_virtual_tokens": 3}, 3),
    "flowers": ("vpt", {"num_virtual_tokens": 5}, 3),
    "many": ("vpt", {"num_virtual_tokens": 2}, 5),
    "cars": ("adaptformer", {"r": 4}, 3),
    "boats": ("ssf", {}, 3),
    "planes": (LoraConfig, {"r": 2, **TARGETS}, 3),
    "trains": (LoraConfig, {"r": 3, **TARGETS}, 3),
    "trams": (LoraConfig, {"r": 2, "use_dora": True, **TARGETS}, 3),
    "tags": ("adaptformer", {"r": 2}, 3),
}


def new_adapter(base, folder, method, fields, classes, seed, **more):
    torch.manual_seed(seed)
    names = {number: f"{folder.name} {number}" for number in range(classes)}
    model = AutoModelForImageClassification.from_pretrained(
        base, num_labels=classes, id2label=names, label2id={name: n for n, name in names.items()},
        ignore_mismatched_sizes=True, **more,
    )  # fmt: skip
    kind = method if not isinstance(method, str) else hf_visual_peft.list_methods()[method].config_cls
    config = kind(**fields) if kind is not LoraConfig else hf_visual_peft.with_visual_targets(kind(**fields), model)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in [p for p in model.parameters() if p.requires_grad]:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving") / "vit"
    torch.manual_seed(0)
    liven(ViTModel(ViTConfig(**VIT))).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shelf(base):
    folder = base.parent / "adapters"
    for seed, (name, (method, fields, classes)) in enumerate(METHODS.items()):
        more = {"problem_type": "multi_label_classification"} if name == "tags" else {}
        new_adapter(str(base), folder / name, method, fields, classes, seed, **more)
    save_processor(ViTImageProcessor(size={"height": 48, "width": 48}), folder / "boats")
    return folder


def service_of(base, *adapters, **options):
    given = {"max_wait_ms": 20.0, "device": "cpu"} | options
    return Service(ServeOptions(model=str(base), adapters=list(map(str, adapters)), **given))


@asynccontextmanager
async def talking(service):
    app = create_app(service)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            yield client


def talk(service, conversation):
    async def hold():
        async with talking(service) as client:
            return await conversation(client)

    return asyncio.run(hold())


def post(client, content=None, query="adapter=birds", kind="image/png", **headers):
    content = picture() if content is None else content
    return client.post(f"/v1/predict?{query}", content=content, headers={"Content-Type": kind, **headers})


def hold(service):
    """Let nothing be worked on until the event is set."""
    gate, step = asyncio.Event(), service.batcher._step

    async def held():
        await gate.wait()
        await step()

    service.batcher._step = held
    return gate


async def waiting(service, count):
    while len(service.batcher.waiting) < count:
        await asyncio.sleep(0.01)


async def together(service, calls):
    """The answers to requests that all wait before the first of them is worked on."""
    gate = hold(service)
    tasks = [asyncio.create_task(call) for call in calls]
    await waiting(service, len(tasks))
    gate.set()
    return await asyncio.gather(*tasks)


def alone(base, folder, content):
    """Probabilities by the usual way to load one adapter."""
    classes = METHODS[folder.name][2]
    plain = AutoModelForImageClassification.from_pretrained(base, num_labels=classes)
    model = PeftModel.from_pretrained(plain, folder).eval()
    size = 48 if folder.name == "boats" else 32
    image = Image.open(io.BytesIO(content)).convert("RGB")
    pixels = ViTImageProcessor(size={"height": size, "width": size})(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(pixel_values=pixels, interpolate_pos_encoding=size != 32).logits[0]
    return logits.sigmoid() if folder.name == "tags" else logits.softmax(-1)


def test_each_image_gets_its_own_adapter_in_few_batches(base, shelf):
    service = service_of(base, shelf, max_batch=64, max_wait_ms=0.0)
    batches = []
    run = service.pool.run
    names = [*METHODS, *METHODS]

    def recorded(loaded, pixels):
        batches.append([one.entry.name for one in loaded])
        return run(loaded, pixels)

    async def conversation(client):
        for name in METHODS:  # loads them
            assert (await post(client, query=f"adapter={name}")).status_code == 200
        service.pool.run = lambda loaded, pixels: (
            batches.append([one.entry.name for one in loaded]) or run(loaded, pixels)
        )
        calls = [post(client, picture(n), f"adapter={name}&top_k=9") for n, name in enumerate(names)]
        return await together(service, calls)

    answers = talk(service, conversation)
    for number, (name, answer) in enumerate(zip(names, answers, strict=True)):
        assert answer.status_code == 200, answer.text
        (result,) = answer.json()["results"]
        found = {row["label"]: row["probability"] for row in result["predictions"]}
        expected = alone(base, shelf / name, picture(number)).tolist()
        assert found == pytest.approx({f"{name} {n}": value for n, value in enumerate(expected)}, abs=1e-5)
        assert result["multi_label"] == (name == "tags")
    # DoRA goes alone, and so do other numbers of classes and other sizes
    served = [["birds", "flowers"], ["many"], ["cars", "tags"], ["boats"], ["planes", "trains"], ["trams"]]
    assert sorted(sorted(set(batch)) for batch in batches) == sorted(served)


def test_weights_of_the_backbone_exist_once_and_adapters_go(base, shelf):
    pool = Pool(Backbone(Base(str(base)), torch.device("cpu"), torch.float32), most=3)
    entries = find_adapters([str(shelf)], Base(str(base)))
    before = {id(p) for p in pool.backbone.model.parameters()}
    for name in [*METHODS, *METHODS, "birds", "flowers", "many"]:
        one = pool.get(entries[name], torch.Size([3, 32, 32]))
        assert list(pool.loaded)[-1] == name
        assert len(pool.loaded) <= 3
        assert one.values >= entries[name].header.values  # a head of the base may be named twice
        extra = {id(p): p.numel() for group in pool.groups for p in group.model.parameters() if id(p) not in before}
        assert sum(extra.values()) <= sum(loaded.values for loaded in pool.loaded.values())
    assert pool.loads == 2 * len(METHODS) + 3
    assert pool.evictions == pool.loads - 3
    assert len(pool.groups) == 1
    assert not pool.backbone.changed()


def test_most_used_adapters_stay(base, shelf):
    service = service_of(base, shelf, max_adapters=2)

    async def conversation(client):
        for name in ("birds", "cars", "birds", "boats"):
            assert (await post(client, query=f"adapter={name}")).status_code == 200
        listed = (await client.get("/v1/adapters")).json()["adapters"]
        counts = (await client.get("/metrics")).text
        every = await post(client, query="&".join(f"adapter={name}" for name in METHODS))
        return [one["name"] for one in listed if one["loaded"]], counts, every

    loaded, counts, every = talk(service, conversation)
    assert sorted(loaded) == ["birds", "boats"]
    assert "hf_visual_peft_adapter_evictions_total 1.0" in counts
    assert 'hf_visual_peft_images_total{adapter="birds"} 2.0' in counts
    assert [result["adapter"] for result in every.json()["results"]] == list(METHODS)  # more than are kept


def test_an_adapter_that_changes_the_backbone_harms_no_other(base, shelf, tmp_path):
    """peft subtracts what PiSSA starts with from the weights of the base when it loads such an adapter."""
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_pretrained(base, num_labels=3)
    fields = TARGETS | {"init_lora_weights": "pissa"}
    get_peft_model(model, LoraConfig(r=2, **fields)).save_pretrained(tmp_path / "pissa")
    entries = find_adapters([str(shelf), str(tmp_path)], Base(str(base)))
    pool = Pool(Backbone(Base(str(base)), torch.device("cpu"), torch.float32), most=3)
    shape = torch.Size([3, 32, 32])
    pixels = torch.randn(1, *shape)
    expected = pool.run([pool.get(entries["planes"], shape)], pixels)
    state = {name: value.clone() for name, value in pool.backbone.model.state_dict().items()}
    with pytest.raises(AdapterError, match="pissa.*changes the weights of the backbone"):
        pool.get(entries["pissa"], shape)
    head = ("classifier.weight", "classifier.bias")
    now = pool.backbone.model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in state.items() if name not in head)
    assert torch.equal(pool.run([pool.get(entries["planes"], shape)], pixels), expected)


def test_adapters_that_do_not_belong_here_are_refused_by_name(base, shelf, tmp_path):
    other = tmp_path / "other-vit"
    liven(ViTModel(ViTConfig(**VIT | {"hidden_size": 48}))).save_pretrained(other)
    new_adapter(str(other), tmp_path / "shelf" / "alien", "vpt", {"num_virtual_tokens": 2}, 3, 0)
    new_adapter(str(base), tmp_path / "shelf" / "headless", "ssf", {"modules_to_save": []}, 3, 0)
    new_adapter(str(base), tmp_path / "shelf" / "nameless", "ssf", {}, 3, 0)
    config = tmp_path / "shelf" / "nameless" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    new_adapter(str(base), tmp_path / "shelf" / "pickled", "ssf", {}, 3, 0)
    (tmp_path / "shelf" / "pickled" / "adapter_model.safetensors").rename(
        tmp_path / "shelf" / "pickled" / "adapter_model.bin"
    )
    service = service_of(base, shelf, tmp_path / "shelf")

    async def conversation(client):
        asked = ("alien", "nameless", "pickled", "headless", "birds")
        return {name: await post(client, query=f"adapter={name}") for name in asked}

    answers = talk(service, conversation)
    told = {name: answer.json().get("error", {}).get("message", "") for name, answer in answers.items()}
    assert {name: answer.status_code for name, answer in answers.items()} == {
        "alien": 409, "nameless": 409, "pickled": 409, "headless": 503, "birds": 200,
    }  # fmt: skip
    assert "other-vit" in told["alien"]
    assert str(base) in told["alien"]
    assert "names no base model" in told["nameless"]
    assert "adapter_model.safetensors" in told["pickled"]
    assert "classifier" in told["headless"]
    with pytest.raises(ValueError, match=r"No adapter can be served.*alien.*trained on .*other-vit"):
        service_of(base, tmp_path / "shelf" / "alien")
    fitting = service_of(base, tmp_path / "shelf", any_base=True)
    answers = talk(fitting, conversation)
    assert answers["nameless"].status_code == 200
    assert answers["alien"].status_code == 503
    assert "does not fit" in answers["alien"].json()["error"]["message"]


def test_sources(base, shelf, tmp_path):
    own = Base(str(base))
    assert list(find_adapters([f"cats={shelf / 'birds'}", str(shelf / "cars")], own)) == ["cats", "cars"]
    with pytest.raises(ValueError, match=r"both named 'birds': write NAME=SOURCE"):
        find_adapters([str(shelf), str(shelf / "birds")], own)
    with pytest.raises(ValueError, match="holds several adapters"):
        find_adapters([f"cats={shelf}"], own)
    with pytest.raises(ValueError, match=r"neither it nor a folder in it has adapter_config\.json"):
        find_adapters([str(tmp_path)], own)
    with pytest.raises(ValueError, match="neither a folder nor a repository id"):
        find_adapters([str(tmp_path / "missing" / "one")], own)
    (tmp_path / "two words").symlink_to(shelf / "birds")
    with pytest.raises(ValueError, match=r"'two words' is not a name for requests"):
        find_adapters([str(tmp_path)], own)


def test_each_malformed_request_is_told_why(base, shelf):
    generator = random.Random(0)
    service = service_of(base, shelf, max_bytes=60_000, max_pixels=1_000_000, max_wait_ms=0.0)

    async def conversation(client):
        wrong = []
        for _ in range(300):
            arguments = malformed(generator, list(METHODS), 60_001)
            answer = await post(client, **arguments)
            message = answer.json().get("error", {}).get("message", "")
            if not 400 <= answer.status_code < 500 or len(message) < 10 or "Traceback" in message:
                wrong.append((answer.status_code, message, arguments["query" if "query" in arguments else "content"]))
        assert (await post(client)).status_code == 200
        assert service.active == 0
        assert not service.batcher.waiting
        return wrong

    assert talk(service, conversation) == []


def test_other_requests(base, shelf):
    service = service_of(base, shelf)

    async def conversation(client):
        form = await client.post("/v1/predict?adapter=birds", files={"image": ("a.png", picture(), "image/png")})
        plain = await post(client)
        assert form.status_code == 200
        assert form.json() == plain.json()
        for mode, form in (
            ("L", "PNG"),
            ("RGBA", "PNG"),
            ("CMYK", "JPEG"),
            ("P", "GIF"),
            ("1", "TIFF"),
            ("I;16", "PNG"),
        ):
            answer = await post(client, picture(mode="L" if mode == "I;16" else mode, form=form))
            assert answer.status_code == 200, (mode, answer.text)
        assert (await client.get("/v1/predict")).status_code == 405
        assert (await client.get("/nothing")).status_code == 404
        assert (await client.get("/nothing")).json()["error"]["message"]
        assert (await client.get("/health")).json()["status"] == "ok"
        page = await client.get("/")
        assert "Drop a picture" in page.text
        description = (await client.get("/openapi.json")).json()
        assert {"/v1/predict", "/v1/adapters", "/health", "/metrics"} <= set(description["paths"])
        listed = (await client.get("/v1/adapters")).json()["adapters"]
        assert {one["name"] for one in listed} == set(METHODS)
        assert (await post(client, query="adapter=trams")).status_code == 200
        listed = (await client.get("/v1/adapters")).json()["adapters"]
        assert "DoRA" in next(one for one in listed if one["name"] == "trams")["alone"]

    talk(service, conversation)
    single = service_of(base, shelf / "birds")

    async def no_name(client):
        return await post(client, query="")

    assert talk(single, no_name).json()["results"][0]["adapter"] == "birds"


def test_token(base, shelf, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("secret\n")
    service = service_of(base, shelf, token_file=tmp_path / "token")

    async def conversation(client):
        for header in (None, "secret", "Bearer wrong", "Bearer sécret", "Basic secret"):
            given = {} if header is None else {"Authorization": header.encode()}
            for path in ("/v1/adapters", "/metrics"):
                answer = await client.get(path, headers=given)
                assert answer.status_code == 401
                assert "secret" not in answer.text
            assert (await post(client, **given)).status_code == 401
        assert (await client.get("/health")).status_code == 200
        assert (await post(client, Authorization="Bearer secret")).status_code == 200

    talk(service, conversation)
    given = {"model": "m", "adapters": ["a"]}
    monkeypatch.delenv("HF_VISUAL_PEFT_TOKEN", raising=False)
    with pytest.raises(ValueError, match=r"open to other machines.*--token_file"):
        ServeOptions(**given, host="0.0.0.0")
    monkeypatch.setenv("HF_VISUAL_PEFT_TOKEN", "x")
    assert ServeOptions(**given, host="0.0.0.0").token() == "x"
    assert ServeOptions.from_json(ServeOptions(**given, token_file=tmp_path / "token").as_json()).token() == "secret"
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ValueError, match="one word"):
        ServeOptions(**given, token_file=tmp_path / "token", host="0.0.0.0")


def test_a_full_queue_and_a_slow_model(base, shelf):
    service = service_of(base, shelf, max_queue=4, max_adapters_per_request=3, max_wait_ms=0.0)
    patience = service.options.timeout

    async def conversation(client):
        assert (await post(client)).status_code == 200  # loaded
        gate = hold(service)
        object.__setattr__(service.options, "timeout", 2.0)
        answers = await asyncio.gather(*[post(client) for _ in range(9)])
        object.__setattr__(service.options, "timeout", patience)
        gate.set()
        assert service.active == 0
        assert (await post(client)).status_code == 200
        return answers

    answers = talk(service, conversation)
    assert sorted(answer.status_code for answer in answers) == [429] * 5 + [504] * 4
    full = next(answer for answer in answers if answer.status_code == 429)
    assert full.headers["Retry-After"]
    assert "4 predictions" in full.json()["error"]["message"]


def test_a_slow_body(base, shelf):
    service = service_of(base, shelf, timeout=0.3)

    async def slow():
        yield picture()[:20]
        await asyncio.sleep(5)

    async def conversation(client):
        answer = await post(client, slow())
        assert service.active == 0
        return answer

    assert talk(service, conversation).status_code == 408


def test_an_adapter_that_fails_takes_no_other_with_it(base, shelf):
    """A batch that fails is run again by adapter."""
    service = service_of(base, shelf, max_batch=8)
    run = service.pool.run

    def fail(loaded, pixels):
        names = {one.entry.name for one in loaded}
        if names == {"flowers"}:
            return run(loaded, pixels) * float("nan")
        if len(names) > 1:
            raise ValueError("do not mix")
        return run(loaded, pixels)

    asked = ("birds", "flowers", "cars")

    async def conversation(client):
        for name in asked:  # loads them
            assert (await post(client, query=f"adapter={name}")).status_code == 200
        service.pool.run = fail
        answers = await together(service, [post(client, query=f"adapter={name}") for name in asked])
        listed = (await client.get("/v1/adapters")).json()["adapters"]
        return [answer.status_code for answer in answers], {one["name"]: one["alone"] for one in listed}, answers[1]

    codes, reasons, failed = talk(service, conversation)
    assert codes == [200, 503, 200]
    assert "not finite" in failed.json()["error"]["message"]
    assert "do not mix" in reasons["birds"]
    assert reasons["cars"] is None


def test_what_waits_is_finished_before_the_end(base, shelf):
    service = service_of(base, shelf)

    async def conversation():
        async with talking(service) as client:
            gate = hold(service)
            calls = [asyncio.create_task(post(client, query=f"adapter={name}")) for name in ("birds", "cars")]
            await waiting(service, 2)
            stopping = asyncio.create_task(service.stop())
            await asyncio.sleep(0)
            late = await post(client)
            gate.set()
            answers = [*await asyncio.gather(*calls), late]
            await stopping
            service.stop = lambda: asyncio.sleep(0)
            assert (await client.get("/health")).status_code == 503
            return [answer.status_code for answer in answers]

    assert asyncio.run(conversation()) == [200, 200, 503]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"max_adapters": 0}, "--max_adapters 0"),
        ({"port": 70000}, "--port 70000"),
        ({"timeout": 0.0}, "--timeout"),
        ({"dtype": "int8"}, "--dtype int8: must be one of float32"),
        ({"max_queue": 3}, "--max_queue 3"),
        ({"timeout": float("nan")}, "--timeout nan"),
    ],
)
def test_options_that_make_no_sense(given, told):
    with pytest.raises(ValueError, match=told):
        ServeOptions(model="m", adapters=["a"], **given)


def test_command_without_a_model(capsys, tmp_path):
    assert main(["serve", "--model", str(tmp_path), "--adapters", str(tmp_path)]) == 1
    assert "neither it nor a folder in it" in capsys.readouterr().err


@pytest.mark.slow
def test_workers_and_signals(base, shelf, tmp_path):
    """A worker that is killed loses no request of the other and comes back; the end is orderly."""
    with closing(socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--model", str(base), "--adapters", str(shelf / "birds"), "--port", str(port), "--workers", "2"]
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_visual_peft.cli.main", *words], stdout=log, stderr=log, env=dict(os.environ)
    )
    url = f"http://127.0.0.1:{port}"

    def children():
        found = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True)
        return set(map(int, found.stdout.split()))

    def wait_for(what):
        end = time.monotonic() + 240
        while not what():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.2)

    def answers():
        try:
            return httpx.post(f"{url}/v1/predict", content=picture(), timeout=20).status_code == 200
        except httpx.TransportError:
            return False

    def started():
        return (tmp_path / "log").read_text().count("Application startup complete")

    try:
        wait_for(lambda: started() == 2)
        wait_for(answers)
        before = children()
        killed = min(before)
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: killed not in children())
        assert all(answers() for _ in range(6))
        wait_for(lambda: len(children()) == 2)  # another one begins
        assert "hf_visual_peft_requests_total" in httpx.get(f"{url}/metrics").text
        (left,) = children() & before
        process.kill()  # the workers notice
        wait_until_gone(left)
    finally:
        process.kill()
        log.close()


def wait_until_gone(process):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if "State:\tZ" in Path(f"/proc/{process}/status").read_text():
                return
        except FileNotFoundError:
            return
        time.sleep(0.2)
    raise AssertionError(f"The worker {process} is still there.")


@pytest.mark.slow
def test_an_orderly_end(base, shelf, tmp_path):
    words = ["serve", "--model", str(base), "--adapters", str(shelf / "birds"), "--port", "0"]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen([sys.executable, "-m", "hf_visual_peft.cli.main", *words], stdout=log, stderr=log)
        try:
            end = time.monotonic() + 240
            while "Uvicorn running on" not in (tmp_path / "log").read_text():
                assert time.monotonic() < end, (tmp_path / "log").read_text()
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
            (port,) = re.findall(r"http://127\.0\.0\.1:(\d+)", (tmp_path / "log").read_text())
            assert httpx.post(f"http://127.0.0.1:{port}/v1/predict", content=picture(), timeout=60).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) in (-signal.SIGTERM, 128 + signal.SIGTERM)
            assert "Finished server process" in (tmp_path / "log").read_text()
        finally:
            process.kill()
