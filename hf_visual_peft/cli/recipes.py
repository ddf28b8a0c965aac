"""Runs the recipes: those in the installed package, or those of a clone."""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .commands import fail


PROGRAM_VARIABLE = "HF_VISUAL_PEFT_PROGRAM"  # how a recipe is called in its messages, cards and results
SCRIPTS = {
    "train": "image_classification.py",
    "few-shot": "few_shot.py",
    "predict": "predict.py",
    "compare": "compare.py",
    "merge": "merge.py",
    "benchmark": "benchmark.py",
    "sweep": "sweep.py",
}
OWN_WORKERS = ("sweep",)  # a launcher must not start several of these


def recipes_folder() -> Path:
    """The folder of the recipes: in the installed package, or beside the package in a clone.

    Raises:
        FileNotFoundError: there is none.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / SCRIPTS["train"]).is_file():
            return folder
    raise FileNotFoundError(
        f"The recipes are not in {package / 'recipes'}: the installation is incomplete; install the package again."
    )


def recipe_parser(command: str) -> argparse.ArgumentParser:
    """The parser of a command's own flags.

    Args:
        command: one of `SCRIPTS`.
    """
    folder = str(recipes_folder())
    sys.path.insert(0, folder)  # where the modules of a recipe find each other
    try:
        module = "arguments" if command == "train" else Path(SCRIPTS[command]).stem
        return importlib.import_module(module).build_parser()
    finally:
        sys.path.remove(folder)


def run_recipe(command: str, words: Sequence[str]) -> int:
    """Run the recipe of a command; return its exit status.

    Args:
        command: one of `SCRIPTS`.
        words: flags of the recipe; before `--`, flags of `accelerate launch`.
    """
    flags: list[str] = []
    if "--" in words:
        place = list(words).index("--")
        flags, words = list(words[:place]), words[place + 1 :]
    try:
        script = recipes_folder() / SCRIPTS[command]
        os.environ[PROGRAM_VARIABLE] = f"hf-visual-peft {command}"
        if flags or (command not in OWN_WORKERS and _needs_launcher()):
            return _launch(flags, script, words)
        return _run_here(script, words)
    except (ValueError, OSError) as error:
        return fail(command, error)
    finally:
        os.environ.pop(PROGRAM_VARIABLE, None)


def _needs_launcher() -> bool:
    """Whether `accelerate launch` would do more than start one process: several GPUs, or settings of `accelerate`."""
    import torch
    from accelerate.commands.config.config_args import default_config_file

    return torch.cuda.device_count() > 1 or os.path.isfile(default_config_file)


def _run_here(script: Path, words: Sequence[str]) -> int:
    """Run a recipe in this process, so that signals and the exit status are its own."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(script), *words]
    sys.path.insert(0, str(script.parent))  # where Python looks first for the modules of a script
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    finally:
        sys.argv, sys.path[:] = argv, path
    return 0


def _launch(flags: Sequence[str], script: Path, words: Sequence[str]) -> int:
    """Run a recipe by `accelerate launch`, which may start several processes; return the status of the first to fail.

    Raises:
        ValueError: the flags of `accelerate launch` do not work together.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = launch_command_parser().parse_args([*flags, str(script), *words])
    if Path(arguments.training_script) != script:
        raise ValueError(f"{arguments.training_script} before -- is not a flag of accelerate launch")
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:
        return _status(error.returncode)
    except ChildFailedError as error:
        return _status(error.get_first_failure()[1].exitcode)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def _status(code: int) -> int:
    """The exit status of a shell for that of a process, which is negative after a signal."""
    return 128 - code if code < 0 else code
