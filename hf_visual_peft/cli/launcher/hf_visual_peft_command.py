"""Where the `hf-visual-peft` command starts.

A module of its own beside the package: importing anything inside the package imports torch and peft, which takes
seconds, and help and version need neither.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path


def main() -> int:
    """Answer for help and version at once, and let the package do everything else."""
    words = sys.argv[1:]
    if words in ([], ["-h"], ["--help"], ["--version"]):
        package = importlib.util.find_spec("hf_visual_peft")  # finds a package without importing it
        folder = Path(package.submodule_search_locations[0])  # type: ignore[union-attr, index]
        version = runpy.run_path(str(folder / "version.py"))["__version__"]
        runpy.run_path(str(folder / "cli" / "commands.py"))["answer"](words, version)
    from hf_visual_peft.cli.main import main as run

    return run(words)
