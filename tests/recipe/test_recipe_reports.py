"""Where the recipe reports: trackers and the Hub."""

import inspect
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import accelerate.tracking
import arguments
import image_classification
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from peft import PeftModel
from recipe_runs import RECIPES

import hf_visual_peft


def test_trackers_get_the_curves_and_no_secret(run, monkeypatch):
    logged, configs = [], []

    class Recorder(GeneralTracker):
        name = "tensorboard"
        requires_logging_directory = True
        tracker = None

        def __init__(self, run_name, logging_dir, **kwargs):
            super().__init__()

        def store_init_configuration(self, values):
            configs.append(values)

        def log(self, values, step=None, **kwargs):
            logged.append((step, values))

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    for module in (accelerate.tracking, arguments):
        monkeypatch.setattr(module, "get_available_trackers", lambda: [LoggerType.TENSORBOARD, "tensorboard"])
    done = run("--report_to", "tensorboard", "--logging_steps", 3, "--hub_token", "hf_secret")
    assert [step for step, values in logged if "train_loss" in values] == [3, 6, 9, 12]
    curve = [(step, values["eval_accuracy"]) for step, values in logged if "eval_accuracy" in values]
    assert [step for step, _ in curve] == [6, 12]
    assert max(value for _, value in curve) == done.results["eval_accuracy"]
    assert logged[-1] == (12, {k: v for k, v in done.results.items() if k.startswith("test_")})
    assert configs[0]["learning_rate"] == "0.01"
    assert "hf_secret" not in str(configs)


def test_push_hands_over_the_run_and_no_secret(run, monkeypatch, photos):
    calls = []

    def push(*args, **kwargs):
        calls.append(inspect.signature(real_push).bind(*args, **kwargs).arguments)
        return SimpleNamespace(commit_url="https://hub/commit")

    real_push = hf_visual_peft.hub.push
    monkeypatch.setattr(hf_visual_peft.hub, "push", push)
    monkeypatch.setattr(image_classification, "HfApi", lambda token: SimpleNamespace(whoami=lambda: token))
    done = run("--push_to_hub", "--hub_model_id", "me/x", "--hub_private_repo", "--hub_token", "hf_secret")
    (call,) = calls
    assert isinstance(call["model"], PeftModel)
    assert (call["repo_id"], call["private"], call["token"]) == ("me/x", True, "hf_secret")
    assert (call["dataset"], call["dataset_split"]) == (photos.name, "test")
    card = ModelCard.load(done.output / "README.md")
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == call["metrics"]
    assert call["metrics"] == {
        k.removeprefix("test_"): v for k, v in done.results.items() if "test_" in k and ("acc" in k or "f1" in k)
    }
    assert "--method vpt" in call["command"]
    for file in done.output.rglob("*"):
        assert file.is_dir() or b"hf_secret" not in file.read_bytes(), file


def test_push_without_access_fails_before_training(run, monkeypatch):
    def refuse():
        raise PermissionError("no token")

    monkeypatch.setattr(image_classification, "HfApi", lambda token: SimpleNamespace(whoami=refuse))
    monkeypatch.setattr(image_classification, "load_processor", lambda args: pytest.fail("loaded"))
    with pytest.raises(PermissionError):
        run("--push_to_hub", "--hub_model_id", "me/x")


FROM_HUB_TO_HUB = """
import sys
sys.path[:0] = sys.argv[1:2]
import datasets, image_classification
from huggingface_hub import HfApi
from peft import AutoPeftModel

_, recipes, vit, photos, output = sys.argv
HfApi().create_repo("tester/tiny-vit")
HfApi().upload_folder(repo_id="tester/tiny-vit", folder_path=vit)
HfApi().create_branch("tester/tiny-vit", branch="v1.2")
datasets.load_dataset("imagefolder", data_dir=photos).push_to_hub("tester/photos")
flags = "--model_name_or_path tester/tiny-vit --model_revision v1.2 --dataset_name tester/photos --method ssf"
flags += " --num_train_epochs 1"
flags += f" --push_to_hub --hub_model_id tester/adapted --hub_private_repo --output_dir {output}"
image_classification.main([*flags.split(), "--hub_token", "hf_test"])
loaded = AutoPeftModel.from_pretrained("tester/adapted")
assert loaded.peft_config["default"].revision == "v1.2"
assert list(loaded.config.id2label.values()) == ["blue", "green", "red"]
words = f"--model_name_or_path tester/adapted --eval_only --dataset_name tester/photos --output_dir {output}-evaluated"
image_classification.main(words.split())
"""


@pytest.mark.slow
def test_from_the_hub_to_the_hub(vit, photos, tmp_path):
    """Model and data set come from a Hub on this machine, adapter and card go there."""
    with LoopbackHub() as hub:
        done = subprocess.run(
            [sys.executable, "-c", FROM_HUB_TO_HUB, str(RECIPES), vit, str(photos), str(tmp_path / "out")],
            env=os.environ | hub.environment(tmp_path / "home") | {"ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        files = hub.model("tester/adapted").at("main").files
        assert not hub.unknown
    card = files["README.md"].data.decode()
    assert 'from_pretrained("tester/tiny-vit", revision="v1.2")' in card
    assert 'AutoImageProcessor.from_pretrained("tester/adapted")' in card
    assert "preprocessor_config.json" in files
    evaluated = json.loads((tmp_path / "out-evaluated" / "evaluation.json").read_text())
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    for needed in ("base_model: tester/tiny-vit", "tester/photos", "import hf_visual_peft", results["command"]):
        assert needed in card
    assert evaluated["loss"] == pytest.approx(results["test_loss"], abs=1e-6)
    assert ModelCard(card).data.eval_results[0].metric_value == pytest.approx(results["test_accuracy"], abs=1e-4)
    assert "hf_test" not in card
    weights = next(blob for name, blob in files.items() if name == "adapter_model.safetensors")
    assert len(weights.data) == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
