"""The commands and their help, in a file that needs only the standard library."""

from __future__ import annotations

import argparse
import sys


PROGRAM = "hf-visual-peft"
DESCRIPTION = "Parameter-efficient fine-tuning methods for vision models."
EXIT_CODES = """\
exit status:
  0  done
  1  the work failed; the last line on standard error says why
  2  the arguments make no sense
  130, 143  interrupted (Ctrl+C, SIGTERM); training has saved what it had
"""
COMMANDS = {
    "demo": "train a method on real images beside a linear probe, save it, reload it in a new process",
    "train": "train on your images with the recipe, by accelerate; own flags: train --help",
    "few-shot": "adapt CLIP or SigLIP to class names with a few images a class; own flags: few-shot --help",
    "predict": "predict images with an adapter or model; own flags: predict --help",
    "compare": "compare methods on your images within minutes; own flags: compare --help",
    "merge": "merge an adapter and export the model; own flags: merge --help",
    "benchmark": "run methods by a protocol such as VTAB-1k; own flags: benchmark --help",
    "sweep": "search methods, hyper-parameters and seeds with Ray Tune; own flags: sweep --help",
    "methods": "list the methods, or show one",
    "coverage": "try every method on a tiny model of every architecture",
    "roles": "show which modules of a model play which part",
    "explain": "show which methods act where on a model, and why others cannot",
    "inspect": "show what saved adapters are, by their headers only",
    "report": "write a page of runs and comparisons: table, charts, images",
    "completion": "print a script that completes these commands in a shell",
    "push": "upload saved adapters to the Hub, one or many in a repository",
    "pull": "download adapters from the Hub",
    "search-hub": "find adapters on the Hub",
    "serve": "answer requests with many adapters on one backbone",
}


def fail(command: str, error: Exception) -> int:
    """Tell on standard error, in one line, why a command failed; return its exit status.

    Args:
        command: such as `"train"`.
        error: what went wrong.
    """
    print(f"{PROGRAM} {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


def main_parser(version: str) -> argparse.ArgumentParser:
    """The parser of the command, without those of its sub-commands.

    Args:
        version: of the package.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version}")
    return parser


def answer(words: list[str], version: str) -> None:
    """Answer a call for help or for the version, which needs no import of the package, and exit.

    Args:
        words: arguments of the command.
        version: of the package.
    """
    parser = main_parser(version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    parser.parse_args(words)
