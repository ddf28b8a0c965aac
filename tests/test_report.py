"""`hf-visual-peft report`: one page of runs and comparisons."""

import json
import re
import time
from html.parser import HTMLParser

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import (
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_visual_peft import AdaptFormerConfig, LSTConfig, VPTConfig
from hf_visual_peft.cli.main import main
from hf_visual_peft.report.attention import DARKEST, attention_maps
from hf_visual_peft.report.charts import MOST_CLASSES, all_charts, hardest, matrix
from hf_visual_peft.report.reading import read_results
from hf_visual_peft.report.rollout import rollout


METHODS = ("ssf", "vpt", "bitfit")


def comparison(folder, classes=4, images=40, methods=METHODS, seeds=1, seed=0, print_="a" * 32):
    """A finished comparison; the better a method, the earlier it stands."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=images)
    rows = {}
    for number, method in enumerate(methods):
        runs = []
        for one in range(seeds):
            wrong = rng.random(images) < 0.1 + 0.8 * number / len(methods)
            guesses = np.where(wrong, (labels + 1) % classes, labels)
            found = {
                "round": 0,
                "steps": 4,
                "seed": one,
                "accuracy": 1 - number / len(methods),
                "loss": 0.5,
                "bytes": 9,
            }
            found |= {"predicted": guesses.tolist(), "confidence": rng.uniform(0.3, 1, images).round(3).tolist()}
            runs.append(found)
        cost = {"trained": 1000 * 2**number, "step_seconds": 0.1 * (number + 1), "step_bytes": 2**20}
        rows[method] = {"kind": "x", "runs": runs, "cost": cost | {"inference_ratio": 1.0, "merges": True}}
    state = {
        "kind": "comparison",
        "rows": rows,
        "plan": [{"steps": 4, "methods": list(methods)}],
        "data": {
            "source": "photos",
            "classes": [f"class {index}" for index in range(classes)],
            "labels": labels.tolist(),
            "files": [f"{index}.png" for index in range(images)],
            "fingerprint": {"test": print_},
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(state))
    return state


def run(folder, method="vpt", accuracy=0.75, seed=0, print_="b" * 32, **more):
    folder.mkdir(parents=True, exist_ok=True)
    command = f"hf-visual-peft train --method {method} --dataset_name beans --seed {seed} --output_dir {folder.name}"
    found = {"test_accuracy": accuracy, "trainable_parameters": 10, "command": command, "images": {"test": 20}}
    found |= {"fingerprint": {"test": print_}} if print_ else {}
    (folder / "all_results.json").write_text(json.dumps(found | more))
    return folder


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects those with attributes."""

    VOID = {"meta", "input", "img", "br", "link"}

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture
def made(tmp_path, capsys):
    pytest.importorskip("vl_convert")

    def call(*places):
        assert main(["report", *map(str, places), "-o", str(tmp_path / "page.html")]) == 0, capsys.readouterr().err
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        return text, Page(text)

    return call


def specs_of(text):
    return json.loads(re.search(r'id="specs">(.*?)</script>', text, re.DOTALL)[1])


def test_every_method_has_a_row_with_its_figures_and_command(made, tmp_path):
    state = comparison(tmp_path / "one")
    text, page = made(tmp_path / "one")
    labels = np.array(state["data"]["labels"])
    shown = " ".join(" ".join(page.texts).split())
    for method in METHODS:
        share = np.mean(np.array(state["rows"][method]["runs"][0]["predicted"]) == labels)
        assert re.search(
            rf"{method} Command hf-visual-peft compare photos --methods {method} .*? {100 * share:.1f}", shown
        )
    assert {row["data-value"] for row in page.of("td")} >= set(METHODS)
    assert len(page.of("figure")) == len(specs_of(text))


def test_the_page_needs_no_network_and_is_accessible(made, tmp_path):
    comparison(tmp_path / "one")
    text, page = made(tmp_path / "one")
    assert [
        a for tag, a in page.found if tag in ("link", "iframe") or ("src" in a and not a["src"].startswith("data:"))
    ] == []
    assert "@import" not in text
    assert "url(" not in re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    (root,) = page.of("html")
    assert root["lang"] == "en"
    metas = page.of("meta")
    assert any(meta.get("name") == "viewport" for meta in metas)
    assert any(meta.get("content") == "light dark" for meta in metas)
    assert all(head.get("scope") == "col" and head["aria-sort"] == "none" for head in page.of("th"))
    assert len(page.of("th")) == len([b for b in page.of("button") if b["type"] == "button"])
    charts = [attributes for attributes in page.of("div") if attributes.get("role") == "img"]
    assert len(charts) == len(specs_of(text))
    assert all(chart["aria-label"].strip() for chart in charts)
    assert {label["for"] for label in page.of("label")} <= {a.get("id") for _, a in page.found}


def test_charts_compile_and_show_the_numbers(made, tmp_path):
    vl_convert = pytest.importorskip("vl_convert")
    state = comparison(tmp_path / "one", seeds=2)
    text, _ = made(tmp_path / "one")
    for spec in specs_of(text):
        fixed = {**spec, "width": 400}
        assert "<svg" in vl_convert.vegalite_to_svg(json.dumps(fixed), vl_version="5.20")
    results = read_results([tmp_path / "one"])
    labels = state["data"]["labels"]
    for result in results.results:
        runs = state["rows"][result.name]["runs"]
        assert result.accuracies == [np.mean(np.array(one["predicted"]) == labels) for one in runs]
        counts = matrix(results, result)
        assert counts.sum() == len(labels)
        assert counts.trace() == sum(a == b for a, b in zip(result.predicted, labels, strict=True))


def test_names_cannot_break_out_of_the_page(made, tmp_path):
    evil = "</script><img src=x onerror=alert(1)><!--\"'{{ 7*7 }}"
    state = comparison(tmp_path / "one", methods=("ssf", "vpt"))
    state["data"]["classes"][0] = evil
    state["data"]["source"] = evil
    state["rows"][evil] = state["rows"].pop("vpt")
    (tmp_path / "one" / "comparison.json").write_text(json.dumps(state))
    text, page = made(tmp_path / "one")
    assert page.of("img") == []
    assert not any("onerror" in attributes for _, attributes in page.found)
    assert "49" not in [part.strip() for part in page.texts]
    named = {
        row.get("class") or row.get("true")
        for spec in specs_of(text)
        for row in spec.get("data", {}).get("values", [])
    }
    assert evil in named


def test_pictures_are_those_on_which_methods_differ(made, tmp_path):
    state = comparison(tmp_path / "one", images=20)
    images = [Image.new("RGB", (300, 200), (index, 0, 0)) for index in range(20)]
    whole = datasets.Dataset.from_dict({"image": images, "label": state["data"]["labels"]})
    datasets.DatasetDict({"test": whole}).save_to_disk(tmp_path / "one" / "data")
    _, page = made(tmp_path / "one")
    guesses = np.array([state["rows"][method]["runs"][0]["predicted"] for method in METHODS])
    differ = {f"{index}.png" for index in range(20) if len(set(guesses[:, index])) > 1}
    named = {image["alt"].partition(",")[0] for image in page.of("img")}
    assert named
    assert named <= {
        f"{index}.png" for index in range(20) if (guesses[:, index] != state["data"]["labels"][index]).any()
    }
    assert len(named & differ) == min(len(differ), len(named))


def with_adapters(folder, base, *configs):
    """A comparison of 20 images whose runs have adapters, each of a head of its own."""
    state = comparison(folder, images=20)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(255, size=(48, 64, 3), dtype=np.uint8)) for _ in range(20)]
    whole = datasets.Dataset.from_dict({"image": images, "label": state["data"]["labels"]})
    datasets.DatasetDict({"test": whole}).save_to_disk(folder / "data")
    base.save_pretrained(folder / "base")
    state["model"] = str(folder / "base")
    for method, config in zip(METHODS, configs, strict=False):
        model = get_peft_model(
            type(base).from_pretrained(folder / "base", num_labels=4, ignore_mismatched_sizes=True), config
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3)
        state["rows"][method]["runs"][0]["folder"] = f"runs/{method}"
        model.save_pretrained(folder / "runs" / method)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "runs" / method)
    (folder / "comparison.json").write_text(json.dumps(state))
    return images


def small_vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, initializer_range=0.5))


def test_maps_are_those_of_the_best_adapter_and_its_base(made, tmp_path):
    folder = tmp_path / "one"
    images = with_adapters(folder, small_vit(), VPTConfig(num_virtual_tokens=3), AdaptFormerConfig(r=4))
    results = read_results([folder])
    maps = attention_maps(results.results, images[:2], 32)
    assert (maps.method, maps.reason, maps.same) == ("ssf", "", False)
    pixels = ViTImageProcessorPil(size={"height": 32, "width": 32})(images[:2], return_tensors="pt")["pixel_values"]
    base = ViTForImageClassification.from_pretrained(folder / "base").eval()
    shares = [rollout(base, {"pixel_values": pixels})]
    shares.append(rollout(PeftModel.from_pretrained(base, str(folder / "runs" / "ssf")), {"pixel_values": pixels}))
    for number, pair in enumerate(maps.pairs):
        seen = np.asarray(images[number].resize((32, 32), Image.Resampling.BILINEAR), dtype=float)
        for share, drawn in zip(shares, pair, strict=True):
            bright = (np.asarray(drawn) / np.maximum(seen, 1)).clip(0, 1).mean(-1).reshape(4, 8, 4, 8).mean((1, 3))
            # the brightness of a patch follows its share, from dark to full
            assert np.corrcoef(bright.ravel(), share[number].ravel())[0, 1] > 0.95
            assert bright.min() < DARKEST + 0.25
            assert bright.max() > 0.6
    text, page = made(folder)
    figures = [image["alt"] for image in page.of("img")]
    assert len(figures) % 3 == 0
    assert sum(alt.startswith("attention of backbone") for alt in figures) == len(figures) / 3
    assert sum(alt.startswith("attention of ssf") for alt in figures) == len(figures) / 3
    assert "changes no attention" not in text


def test_a_method_beside_the_backbone_changes_no_attention(made, tmp_path):
    with_adapters(tmp_path / "one", small_vit(), LSTConfig(r=4))
    assert "ssf changes no attention" in made(tmp_path / "one")[0]


def swin():
    sizes = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 32}
    return SwinForImageClassification(SwinConfig(**sizes, patch_size=2))


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (None, "without softmax attention among all tokens"),
        ("base", "is not on this machine"),
        ("runs", "No adapter of these runs is on this machine"),
        ("runs/ssf/preprocessor_config.json", "is not an image processor"),
        ("runs/ssf/adapter_model.safetensors", "adapter_model"),
    ],
)
def test_the_page_says_why_it_draws_no_attention(made, tmp_path, break_, message):
    folder = tmp_path / "one"
    with_adapters(folder, small_vit() if break_ else swin(), AdaptFormerConfig(r=4))
    if break_ and (folder / break_).is_dir():
        (folder / break_).rename(tmp_path / "away")
    elif break_:
        (folder / break_).write_text("{")
    _, page = made(folder)
    (told,) = [text for text in page.texts if text.startswith("No attention is drawn")]
    assert message in told
    assert not any("attention" in image["alt"] for image in page.of("img"))
    assert page.of("img")


def test_30_runs_of_1000_classes_stay_small_and_quick(made, tmp_path):
    comparison(tmp_path / "one", classes=1000, images=5000, methods=[f"m{number}" for number in range(30)])
    before = time.process_time()
    text, page = made(tmp_path / "one")
    assert time.process_time() - before < 10
    assert len(text) < 2.5 * 2**20
    assert len(page.of("tr")) == 31
    results = read_results([tmp_path / "one"])
    assert len(hardest(matrix(results, results.results[0]))) == MOST_CLASSES
    assert all(str(MOST_CLASSES) in c["text"] for c in all_charts(results) if "Confusion" in c["title"])


def test_runs_of_one_command_are_averaged_over_seeds(made, tmp_path):
    for seed, accuracy in enumerate((0.5, 0.7)):
        run(tmp_path / "runs" / f"vpt-{seed}", "vpt", accuracy, seed)
    run(tmp_path / "runs" / "ssf", "ssf", 0.9)
    found = {result.name: result for result in read_results([tmp_path / "runs"]).results}
    assert found["vpt"].accuracy == pytest.approx(0.6)
    assert found["vpt"].deviation == pytest.approx(np.std([0.5, 0.7], ddof=1))
    assert found["ssf"].deviation is None
    text, _ = made(tmp_path / "runs")
    assert "beans" in text


def test_different_images_are_never_put_together(tmp_path, capsys):
    run(tmp_path / "a", print_="1" * 32)
    run(tmp_path / "b", print_="2" * 32)
    run(tmp_path / "c", print_=None)
    comparison(tmp_path / "d")
    for other in "bcd":
        assert main(["report", str(tmp_path / "a"), str(tmp_path / other), "-o", str(tmp_path / "x.html")]) == 1
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert ("different images" in error) == (other != "c")
        assert str(tmp_path / other) in error
    assert not (tmp_path / "x.html").exists()
    assert read_results([tmp_path / "c"]).results[0].accuracy == 0.75


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, None, "holds no run"),
        ("comparison.json", "{", "is broken"),
        ("comparison.json", "[]", "holds list"),
        ("comparison.json", "{}", "is broken or not complete: it lacks 'data'"),
        ("all_results.json", "{}", "it lacks 'command'"),
        ("all_results.json", '{"command": 3, "test_accuracy": 1, "trainable_parameters": 1}', "is broken"),
        ("all_results.json", '{"command": "x", "trainable_parameters": 1}', "it lacks 'eval_accuracy'"),
        ("all_results.json", "\x00\x01", "is broken"),
    ],
)
def test_broken_runs_are_told_in_one_line(tmp_path, capsys, name, content, message):
    (tmp_path / "run").mkdir()
    if name:
        (tmp_path / "run" / name).write_text(content)
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "page.html")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "page.html").exists()


def test_a_comparison_without_results_and_a_wrong_folder(tmp_path, capsys):
    state = comparison(tmp_path / "one")
    for row in state["rows"].values():
        row["runs"] = []
    (tmp_path / "one" / "comparison.json").write_text(json.dumps(state))
    assert main(["report", str(tmp_path / "one")]) == 1
    assert "has no result yet" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "There is no folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "one"), "-o", str(tmp_path / "no" / "page.html")]) == 1
    assert "the folder does not exist" in capsys.readouterr().err


def test_without_the_extra_the_command_names_it(tmp_path, capsys, monkeypatch):
    comparison(tmp_path / "one")
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    assert main(["report", str(tmp_path / "one"), "-o", str(tmp_path / "page.html")]) == 1
    assert 'pip install "hf-visual-peft[report]"' in capsys.readouterr().err
