"""The `hf-visual-peft` command."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from ..tables import show_markdown
from ..version import __version__
from .commands import COMMANDS, fail, main_parser
from .recipes import SCRIPTS, run_recipe
from .sharing import SHARING
from .sharing import add_parsers as add_sharing_parsers
from .sharing import run as run_sharing


SHELLS = ("bash", "zsh", "tcsh")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command.

    Args:
        argv: arguments without the program's name; those of the process when `None`.

    Returns:
        Exit status: 0, 1 where the work failed, 2 (raised by argparse) where the arguments make no sense.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(words)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that closing it does not fail again
        return 0


def _run(words: list[str]) -> int:
    if words and words[0] in SCRIPTS:  # they have their own flags
        return run_recipe(words[0], words[1:])
    parser = _parser()
    arguments = parser.parse_args(words)
    if arguments.command == "methods":
        return _methods(arguments)
    if arguments.command == "completion":
        return _completion(arguments)
    if arguments.command == "coverage":
        return _coverage(arguments)
    if arguments.command in ("roles", "explain"):
        return _look(arguments)
    if arguments.command == "inspect":
        return _inspect(arguments)
    if arguments.command == "report":
        return _report(arguments, words)
    if arguments.command in SHARING:
        return run_sharing(arguments)
    if arguments.command == "serve":
        return _serve(arguments)
    return _demo(arguments)


def _parser(recipes: Mapping[str, argparse.ArgumentParser] = MappingProxyType({})) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        recipes: the parsers of the commands that run a recipe, if these flags are wanted, too.
    """
    from ..coverage.command import add_arguments as add_coverage_arguments
    from ..demo.options import add_arguments
    from ..serving.options import add_arguments as add_serve_arguments

    parser = main_parser(__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help=COMMANDS["demo"],
        description="Train a linear probe and then one or more methods on 1,000 real digits (or any image dataset) "
        "with a real pretrained encoder (or any checkpoint), save each adapter, reload it in a new process, and print "
        "one table.",
    )
    for name in SCRIPTS:
        parents = [recipes[name]] if name in recipes else []
        commands.add_parser(name, help=COMMANDS[name], parents=parents, add_help=not parents)
    add_arguments(demo)
    demo.add_argument("--traceback", action="store_true", help="show where an error came from")
    listing = commands.add_parser(
        "methods",
        help=COMMANDS["methods"],
        description="List the methods of this library, those for class names, and those of peft; or show one whole.",
    )
    listing.add_argument("name", nargs="?", metavar="NAME", help="of one method")
    forms = listing.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_const", const="json", dest="format", help="for scripts")
    forms.add_argument(
        "--markdown", action="store_const", const="markdown", dest="format", help="docs/methods.md, with all details"
    )
    coverage = commands.add_parser(
        "coverage",
        help=COMMANDS["coverage"],
        description="Run every method on a tiny random model of every architecture: a training step, "
        "disable_adapter, save and load, merging, another image size. Nothing is downloaded. Exit status 1 where a "
        "cell fails.",
    )
    add_coverage_arguments(coverage)
    roles = commands.add_parser(
        "roles",
        help=COMMANDS["roles"],
        description="Find the parts of a model, by its role table or by watching a copy of it run, and print them as "
        "a table and as the code that registers them. Weights are random; nothing but a config is downloaded.",
    )
    explain = commands.add_parser(
        "explain",
        help=COMMANDS["explain"],
        description="Tell for every method where it acts on a model, or why it cannot.",
    )
    for command in (roles, explain):
        command.add_argument("model", help="Hub id or folder with a config, or the name of a model of timm")
        command.add_argument("--json", action="store_true", help="for scripts")
    inspect = commands.add_parser(
        "inspect",
        help=COMMANDS["inspect"],
        description="Show what saved adapters are. Only configurations and headers are read: nothing of the files is "
        "imported, unpickled or loaded, so it is safe for files that nobody vouches for.",
    )
    inspect.add_argument("adapter", nargs="+", help="folder, or repository of the Hub")
    inspect.add_argument("--revision", help="branch, tag or commit of the repository")
    inspect.add_argument("--json", action="store_true", help="for scripts: one object a line")
    report = commands.add_parser(
        "report",
        help=COMMANDS["report"],
        description="Write one self-contained HTML page of comparisons and runs of the recipe, which must be measured "
        "on the same images. It needs the extra 'report'.",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run or comparison, or one that holds such")
    report.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="default: report.html")
    completion = commands.add_parser(
        "completion",
        help=COMMANDS["completion"],
        description="Print a script that completes commands, flags and choices in a shell. For bash: "
        "hf-visual-peft completion bash > ~/.local/share/bash-completion/completions/hf-visual-peft",
    )
    completion.add_argument("shell", choices=SHELLS)
    add_sharing_parsers(commands)
    serve = commands.add_parser(
        "serve",
        help=COMMANDS["serve"],
        description="Serve one backbone with many adapters over HTTP: POST /v1/predict?adapter=NAME with an image. "
        "/ is a page to try it, /docs describes all requests. It needs the extra 'serve'.",
    )
    add_serve_arguments(serve)
    return parser


def _methods(arguments: argparse.Namespace) -> int:
    from . import catalogue

    if arguments.name is not None:
        return _method(arguments)
    as_text = {"json": catalogue.methods_json, "markdown": catalogue.methods_markdown, None: catalogue.methods_table}
    print(as_text[arguments.format]())
    return 0


def _method(arguments: argparse.Namespace) -> int:
    import json

    from ..core.registry import get_method
    from . import catalogue

    try:
        if arguments.format == "json":
            print(json.dumps(catalogue.as_dictionary(get_method(arguments.name)), indent=2))
        else:
            show_markdown(catalogue.describe_method(arguments.name))
    except ValueError as error:
        return fail("methods", error)
    return 0


def _completion(arguments: argparse.Namespace) -> int:
    import shtab

    from .recipes import SCRIPTS, recipe_parser

    parser = _parser({name: recipe_parser(name) for name in SCRIPTS})
    print(shtab.complete(parser, shell=arguments.shell))
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from ..serving.command import run
    from ..serving.options import ServeOptions

    try:
        return run(ServeOptions.from_arguments(arguments))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return fail("serve", error)


def _report(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    from ..report.page import page
    from ..report.reading import read_results
    from ..sharing.files import write_aside

    try:
        if not arguments.output.resolve().parent.is_dir():
            raise ValueError(f"--output {arguments.output}: the folder does not exist.")
        text = page(read_results(arguments.runs), shlex.join(["hf-visual-peft", *words]))
        write_aside(arguments.output, text)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return fail("report", error)
    print(f"{arguments.output} has {len(text) / 2**20:.1f} MB.")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    import dataclasses
    import json

    from ..sharing.inspecting import described, inspect_adapter

    status = 0
    for name in arguments.adapter:
        try:
            header = inspect_adapter(name, revision=arguments.revision)
        except (ValueError, OSError, RuntimeError) as error:
            status = fail("inspect", error)
            continue
        print(json.dumps(dataclasses.asdict(header)) if arguments.json else described(header))
    return status


def _look(arguments: argparse.Namespace) -> int:
    import json

    from . import roles

    try:
        model = roles.load_model(arguments.model)
        if arguments.command == "roles":
            print(json.dumps(roles.roles_of(model), indent=2) if arguments.json else roles.describe_roles(model))
        else:
            print(json.dumps(roles.places_of(model), indent=2) if arguments.json else roles.explain(model))
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        return fail(arguments.command, error)
    return 0


def _coverage(arguments: argparse.Namespace) -> int:
    from ..coverage.command import run

    try:
        return run(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        return fail("coverage", error)


def _demo(arguments: argparse.Namespace) -> int:
    from ..demo.options import DemoOptions

    try:
        if arguments.task == "zero-shot":
            from ..demo.zero_shot import check, run_zero_shot

            check(arguments, _parser().parse_args(["demo"]))
            return run_zero_shot(arguments)
        options = DemoOptions.from_arguments(arguments)
        from ..demo.run import run_demo  # after the checks that need no imports

        return run_demo(options)
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError, FloatingPointError) as error:
        if arguments.traceback:
            raise
        return fail("demo", error)


if __name__ == "__main__":
    sys.exit(main())
