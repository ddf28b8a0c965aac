"""recipes/search.py: the adapter that is found, determinism, resuming, and refusals."""

import functools
import importlib.util
import json
import shutil
from types import SimpleNamespace

import image_sources
import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel
from recipe_runs import RECIPES, accuracy_by_hand, fails, weights
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTImageProcessor


specification = importlib.util.spec_from_file_location("recipe_search", RECIPES / "search.py")
recipe = importlib.util.module_from_spec(specification)  # benchmarks/ has a module of that name, too
specification.loader.exec_module(recipe)

SPACE = {
    "method": "composite",
    "parts": [
        {"method": "vpt", "sizes": {"num_virtual_tokens": [1, 2, 3]}, "depths": [0, 1, 2]},
        {"method": "pfeiffer", "sizes": {"r": [1, 2, 4]}, "depths": [1, 2]},
    ],
}
FEW = ["--population", 4, "--parents", 2, "--mutations", 2, "--crossovers", 2, "--generations", 1]


def call(folder, vit, photos, *flags, space=SPACE, cap=700, few=FEW):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if isinstance(space, dict):
        path = folder.parent / f"{folder.name}.yaml"
        path.write_text(yaml.safe_dump(space))
        space = path
    words = [word for split in image_sources.SPLITS for word in (f"--{split}_dir", photos / split)]
    words += ["--model_name_or_path", vit, "--num_train_epochs", 2, "--per_device_train_batch_size", 4]
    words += ["--output_dir", folder, "--space", space, "--max_parameters", cap, *few, *flags]
    return SimpleNamespace(output=folder, results=recipe.main(list(map(str, words))))


@pytest.fixture
def search(vit, photos, tmp_path):
    return functools.partial(call, tmp_path / "found", vit, photos)


@pytest.fixture(scope="module")
def whole(vit, photos, tmp_path_factory):
    """A search that nothing interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return call(tmp_path_factory.mktemp("whole") / "found", vit, photos)


def test_what_is_found_is_an_ordinary_adapter(whole, vit, photos):
    results = whole.results
    assert results == json.loads((whole.output / "all_results.json").read_text())
    assert results["adapter_parameters"] <= 700
    assert results["fitness"] == results["eval_accuracy"] == max(results["history"])
    base = AutoModelForImageClassification.from_pretrained(vit, num_labels=3)
    model = PeftModel.from_pretrained(base, whole.output)
    state = load_file(whole.output / "adapter_model.safetensors")
    own = sum(value.numel() for name, value in state.items() if "composite_" in name)
    assert own == results["adapter_parameters"]
    processor = ViTImageProcessor.from_pretrained(whole.output)
    assert accuracy_by_hand(model, photos / "validation", processor) == pytest.approx(results["eval_accuracy"])
    assert accuracy_by_hand(model, photos / "test", processor) == pytest.approx(results["test_accuracy"])
    assert "accelerate launch recipes/search.py" in (whole.output / "README.md").read_text()


def test_the_subnet_trains_anew(whole, run):
    again = run("--config", whole.output / "subnet.yaml", "--max_train_steps", 1, method=None)
    config = json.loads((again.output / "adapter_config.json").read_text())
    assert config["parts"] == json.loads((whole.output / "adapter_config.json").read_text())["parts"]


def test_forms_of_glora(search, run):
    space = {"method": "glora", "r": [1, 2], "roles": ["query", "fc1"]}
    found = search("--max_train_steps", 2, space=space, cap=900)
    assert found.results["adapter_parameters"] <= 900
    assert found.results["fitness"] == found.results["eval_accuracy"]
    again = run("--config", found.output / "subnet.yaml", "--max_train_steps", 1, method=None)
    assert again.results["trainable_parameters"] == found.results["adapter_parameters"] + 64 * 3 + 3


class Killed(BaseException):
    """Nothing in the recipe catches it."""


def after(monkeypatch, owner, name, calls):
    """Let a call after so many others kill the run."""
    real, count = getattr(owner, name), [0]

    def counted(*args, **kwargs):
        count[0] += 1
        if count[0] > calls:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (recipe.Screen, "step", 8),  # in the second epoch of the supernet, 6 steps each
        (recipe, "evaluate_split", 3),  # in the evolution
    ],
    ids=["supernet", "evolution"],
)
def test_a_killed_search_finds_what_it_would_have_found(search, whole, monkeypatch, owner, name, calls):
    with monkeypatch.context() as patch:
        after(patch, owner, name, calls)
        with pytest.raises(Killed):
            search()
    again = search("--resume_from_checkpoint", "auto")
    for key in ("subnet", "fitness", "history", "evaluated", "test_accuracy", "test_loss"):
        assert again.results[key] == whole.results[key]
    assert weights(again.output) == weights(whole.output)


def test_another_seed_finds_other_weights_in_a_folder_that_is_cleared(search, whole, capsys):
    shutil.copytree(whole.output, search.args[0])
    before = weights(whole.output)
    assert "has a run" in fails(capsys, search)
    assert weights(search.args[0]) == before
    with pytest.raises(ValueError, match="comes from a run with seed 42"):
        search("--seed", 5, "--resume_from_checkpoint", "latest")
    search("--overwrite_output_dir", "--seed", 5, "--max_train_steps", 2)
    assert weights(search.args[0]) != before
    assert [path.name for path in search.args[0].glob("search-*")] == ["search-2.json"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "vpt"], "the space says which methods"),
        (["--parts", "{method: vpt}"], "fields of CompositeConfig are in the space"),
        (["--streaming"], "--streaming has no meaning in a search"),
        (["--early_stopping_patience", 2], "--early_stopping_patience has no meaning"),
        (["--gradient_checkpointing"], "--gradient_checkpointing has no meaning"),
        (["--max_parameters", 0], "must be 1 or greater"),
        (["--space", "naoh"], "there is no such file"),
        (["--learning_rat", 1], "unknown: --learning_rat"),
    ],
)
def test_flags_that_are_refused(search, capsys, tmp_path, flags, message):
    assert message in fails(capsys, search, *flags)
    assert not (tmp_path / "found").exists()


def test_what_ends_a_search_before_training(search, tmp_path):
    with pytest.raises(ValueError, match="--max_parameters 10: the smallest part of the space has"):
        search(cap=10)
    with pytest.raises(ValueError, match="needs validation images"):
        search("--validation_split", "none", "--train_val_split", 0, "--select", "last")
    with pytest.raises(ValueError, match="needs a validation split"):
        search("--validation_split", "none", "--train_val_split", 0)
    deep = {**SPACE, "parts": [{**SPACE["parts"][0], "depths": [9]}]}
    with pytest.raises(ValueError, match="depths goes up to 9, but ViTForImageClassification has 2 blocks"):
        search(space=deep)
    assert not list((tmp_path / "found").iterdir())
