"""The `hf-visual-peft` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command.

    Args:
        argv: arguments without the program's name; those of the process when `None`.

    Returns:
        Exit status: 0, 1 where the work failed, 2 (raised by argparse) where the arguments make no sense.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "methods":
        print(_methods_json() if arguments.json else _methods_table())
        return 0
    return _demo(arguments)


def _parser() -> argparse.ArgumentParser:
    from . import __version__
    from .demo.options import add_arguments

    parser = argparse.ArgumentParser(
        prog="hf-visual-peft", description="Parameter-efficient fine-tuning methods for vision models."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a method on real images beside a linear probe, save it, reload it in a new process",
        description="Train a linear probe and then one or more methods on 1,000 real digits (or any image dataset) "
        "with a real pretrained encoder (or any checkpoint), save each adapter, reload it in a new process, and print "
        "one table.",
    )
    add_arguments(demo)
    demo.add_argument("--traceback", action="store_true", help="show where an error came from")
    listing = commands.add_parser("methods", help="list the registered methods", description="List the methods.")
    listing.add_argument("--json", action="store_true", help="for scripts")
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from .demo.options import DemoOptions

    try:
        options = DemoOptions.from_arguments(arguments)
        from .demo.run import run_demo  # after the checks that need nothing

        return run_demo(options)
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError, FloatingPointError) as error:
        if arguments.traceback:
            raise
        print(f"hf-visual-peft demo: error: {error}", file=sys.stderr)
        return 1


def _methods_table() -> str:
    from .registry import list_methods
    from .tables import format_table

    header = ("method", "category", "paper", "trainable on ViT-B/16", "with", "mergeable", "gradients")
    rows = []
    for method in list_methods().values():
        paper = f"{method.paper.title} ({method.paper.venue}), arXiv {method.paper.arxiv}"
        about = (method.name, method.category, paper)
        nature = ("yes" if method.mergeable else "no", _GRADIENTS[method.gradients])
        for number, (fields, count) in enumerate(method.counts):
            first = number == 0
            setting = ", ".join(f"{key}={value}" for key, value in fields.items()) or "defaults"
            rows.append((*(about if first else ("",) * 3), f"{count:,}", setting, *(nature if first else ("",) * 2)))
    return format_table(header, rows, right=("trainable on ViT-B/16",))


_GRADIENTS = {
    "full": "through the backbone",
    "partial": "through a part of the backbone",
    "none": "not through the backbone",
}


def _methods_json() -> str:
    from .registry import list_methods

    listing = [
        {
            "name": method.name,
            "config": method.config_cls.__name__,
            "category": method.category,
            "paper": {
                "title": method.paper.title,
                "venue": method.paper.venue,
                "arxiv": method.paper.arxiv,
                "url": method.paper.url,
            },
            "equation": method.equation,
            "trainable_on_vit_b16": [{"fields": fields, "parameters": count} for fields, count in method.counts],
            "mergeable": method.mergeable,
            "gradients_through_backbone": method.gradients,
            "identity_at_start": method.identity_at_start,
        }
        for method in list_methods().values()
    ]
    return json.dumps(listing, indent=2)


if __name__ == "__main__":
    sys.exit(main())
