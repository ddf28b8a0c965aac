"""`hf-visual-peft train`: the recipe as a part of the package, without a clone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import patch_environment
from recipe_runs import RECIPES, weights

from hf_visual_peft.cli import recipes
from hf_visual_peft.cli.main import main


@pytest.fixture
def flags(vit, photos, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    data = ["--train_dir", photos / "train", "--test_dir", photos / "test"]
    size = ["--num_train_epochs", 1, "--per_device_train_batch_size", 8, "--checkpointing_steps", "no"]
    return [*map(str, ["--model_name_or_path", vit, *data, *size, "--output_dir", tmp_path / "out"])]


def test_a_run_is_that_of_the_script(run, flags, tmp_path, photos):
    assert main(["train", "--method", "bitfit", "--select", "last", *flags]) == 0
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["command"].startswith("hf-visual-peft train --method bitfit")
    assert "hf-visual-peft train --method bitfit" in (tmp_path / "out" / "README.md").read_text()
    again = run(
        *flags[6:10], "--select", "last", "--checkpointing_steps", "no", "--learning_rate", "0.003",
        method="bitfit", output="again", data=flags[2:6],
    )  # fmt: skip
    assert weights(again.output) == weights(tmp_path / "out")
    assert again.results["command"].startswith("accelerate launch recipes/image_classification.py")


def test_configs_are_known_by_name(flags, tmp_path):
    assert main(["train", "--config", "ssf", *flags]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "SSF"


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--method", "vtp"], 2, "--method vtp: Did you mean 'vp' or 'vqt'? Choose one of"),
        (["--config", "vtp", "--method", "vpt"], 2, "vtp"),
        (["--method", "vpt", "--test_dir", "nowhere"], 1, "nowhere"),
        (["flag", "--", "--method", "vpt"], 1, "flag before -- is not a flag of accelerate launch"),
    ],
)
def test_errors_are_one_line_with_the_status_of_the_script(flags, capsys, more, status, message):
    before, after = (more[: more.index("--") + 1], more[more.index("--") + 1 :]) if "--" in more else ([], more)
    path, words = list(sys.path), list(sys.argv)
    assert main(["train", *before, *flags, *after]) == status
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert "Traceback" not in "\n".join(error)
    assert (sys.path, sys.argv) == (path, words)
    assert recipes.PROGRAM_VARIABLE not in os.environ


def test_help_and_usage_name_the_command(capsys):
    assert main(["train", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: hf-visual-peft train [--config FILE]")
    assert main(["train"]) == 2
    assert capsys.readouterr().err.startswith("usage: hf-visual-peft train [--config FILE]")


def test_flags_of_accelerate_come_first_and_the_status_is_kept(monkeypatch, tmp_path):
    script = tmp_path / "image_classification.py"
    script.write_text(
        "import os, signal, sys\n"
        "if sys.argv[1] == 'signal': os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(int(sys.argv[1]) + (os.environ['ACCELERATE_MIXED_PRECISION'] == 'bf16'))\n"
    )
    monkeypatch.setattr(recipes, "recipes_folder", lambda: tmp_path)
    launch = ["train", "--cpu", "--mixed_precision", "bf16", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--dynamo_backend", "no", "--"]
    assert main([*launch, "-1"]) == 0
    assert main([*launch, "1"]) == 2
    assert main([*launch, "signal"]) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_the_wheel_holds_the_recipes(flags, tmp_path):
    """What `pip wheel` builds trains from another folder, where there is no clone."""
    clone, library = Path(RECIPES).parent, tmp_path / "library"
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=clone, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    ZipFile(wheel).extractall(library)
    installed = library / "hf_visual_peft" / "recipes"
    shipped = {str(path.relative_to(installed)) for path in installed.rglob("*.*")}
    listed = subprocess.run(["git", "ls-files", "recipes"], cwd=clone, capture_output=True, text=True, check=False)
    if listed.returncode == 0:  # not in an unpacked archive
        assert {path.removeprefix("recipes/") for path in listed.stdout.split()} <= shipped
    assert {"image_classification.py", "configs/vpt.yaml", "accelerate/ddp.yaml"} <= shipped
    assert (library / "hf_visual_peft" / "report" / "page.html").exists()
    command = [sys.executable, "-m", "hf_visual_peft.cli.main", "train", "--config", "bitfit", *flags]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with patch_environment(PYTHONPATH=str(library), PYTHONDONTWRITEBYTECODE="", ACCELERATE_USE_CPU="true"):
        done = subprocess.run(
            [*command, "--max_train_steps", "1"], cwd=elsewhere, capture_output=True, text=True, timeout=200
        )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert (installed / "__pycache__").exists()  # this copy ran, not that of the clone


def test_an_incomplete_installation_says_so(monkeypatch, tmp_path, capsys):
    package = tmp_path / "site" / "hf_visual_peft" / "cli"
    package.mkdir(parents=True)
    monkeypatch.setattr(recipes, "__file__", str(package / "recipes.py"))
    assert main(["train", "--method", "vpt"]) == 1
    assert "install the package again" in capsys.readouterr().err
