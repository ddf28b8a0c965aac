"""The `hf-visual-peft coverage` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..sharing.files import write_aside


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "--methods", type=_names, metavar="A,B", help="only these, also of peft; all of ours by default"
    )
    parser.add_argument("--architectures", type=_names, metavar="A,B", help="only these; all by default")
    parser.add_argument(
        "--fast", action="store_true", help="every method on four architectures, every architecture with four methods"
    )
    parser.add_argument("--jobs", type=_count, metavar="N", help="processes; by default one per core")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the cells there, one per line")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page docs/coverage.md there")
    parser.add_argument(
        "--families",
        type=_names,
        metavar="A,B",
        help="instead of tiny models, one real model of every family of timm, transformers, or both; --architectures "
        "then chooses families, and what stands in the file of --json is not run again",
    )
    parser.add_argument(
        "--names", action="store_true", help="with --families, look for a backbone in every model of a family"
    )
    parser.add_argument(
        "--dry", action="store_true", help="with --families, adapt the models without weights, and do not run them"
    )
    parser.add_argument(
        "--limit",
        type=_count,
        default=120,
        metavar="SECONDS",
        help="with --families, processor time for one method on one model",
    )
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="compare with the JSON of an earlier run; a regression is an error"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the cells, write what was asked for, and say what fails.

    Returns:
        Exit status: 0, or 1 where a cell fails or, with `--check`, does not work any more.

    Raises:
        ValueError: an argument is invalid; raised before any cell runs.
        OSError: a file cannot be read or written.
        RuntimeError: a process died.
    """
    for name in ("json", "markdown"):
        path = getattr(arguments, name)
        if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
            raise ValueError(f"--{name}={path}: choose a file in a folder that exists.")
    return _run_families(arguments) if arguments.families else _run_matrix(arguments)


def _run_matrix(arguments: argparse.Namespace) -> int:
    from . import report
    from .matrix import choose_cells, run_matrix

    if arguments.names:
        raise ValueError("--names counts models of families: give --families as well.")
    if arguments.dry:
        raise ValueError("--dry is for models of families: give --families as well.")
    before = report.read_json(arguments.check) if arguments.check else None
    cells = choose_cells(arguments.methods, arguments.architectures, arguments.fast)
    matrix = run_matrix(cells, arguments.jobs)
    if arguments.json:
        write_aside(arguments.json, report.to_json(matrix))
    if arguments.markdown:
        write_aside(arguments.markdown, report.to_markdown(matrix))
    print(report.summary(matrix))
    wrong = report.failures(matrix) if before is None else report.regressions(matrix, before)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def _run_families(arguments: argparse.Namespace) -> int:
    from . import family_report
    from .family_models import LIBRARIES
    from .family_runs import METHODS, Results, run_families

    unknown = [name for name in arguments.families if name not in LIBRARIES]
    if unknown:
        raise ValueError(f"--families has {unknown[0]!r}: valid are {' and '.join(LIBRARIES)}.")
    for flag in ("fast", "check"):
        if getattr(arguments, flag):
            raise ValueError(f"--{flag} is for tiny models: remove it, or --families.")
    results = Results(arguments.json)
    run_families(
        results,
        arguments.families,
        arguments.methods or METHODS,
        arguments.architectures,
        arguments.names,
        arguments.jobs or 1,
        arguments.limit,
        arguments.dry,
    )
    if arguments.markdown:
        write_aside(arguments.markdown, family_report.to_markdown(results))
    print(family_report.counts(results))
    wrong = family_report.failures(results.found.values())
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("names no method and no architecture")
    return names


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes: choose an integer from 1")
    return int(text)
