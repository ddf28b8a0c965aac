"""The commands `push`, `pull` and `search-hub`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from .commands import COMMANDS, fail


SHARING = ("push", "pull", "search-hub")


def add_parsers(commands: Any) -> None:
    """Add the parsers of these commands.

    Args:
        commands: the sub-parsers of the main parser.
    """
    push = commands.add_parser(
        "push",
        help=COMMANDS["push"],
        description="Upload saved adapters in one commit: one to the root of a repository, or several to sub-folders, "
        "with an index and a card that lists them. Only weights in safetensors, configurations, image processors and "
        "cards are sent.",
    )
    push.add_argument("repository", help="user/name")
    push.add_argument("adapter", nargs="+", help="folder, or NAME=FOLDER, where NAME is the sub-folder")
    push.add_argument("--subfolder", action="store_true", help="put a single adapter into a sub-folder, too")
    push.add_argument("--base_model", help="id of the backbone on the Hub, if the adapters name a local folder")
    push.add_argument("--private", action="store_true", default=None, help="create the repository as private")
    push.add_argument("--message", help="title of the commit")
    pull = commands.add_parser(
        "pull",
        help=COMMANDS["pull"],
        description="Download adapters: weights in safetensors, configurations, image processors and cards, nothing "
        "that could run.",
    )
    pull.add_argument("repository", help="user/name")
    pull.add_argument("name", nargs="*", help="sub-folders; default: all adapters")
    pull.add_argument("--output_dir", type=Path, required=True, help="new or empty")
    pull.add_argument("--revision", help="branch, tag or commit")
    search = commands.add_parser(
        "search-hub", help=COMMANDS["search-hub"], description="Find adapters on the Hub by the tags of their cards."
    )
    search.add_argument("query", nargs="?", default="", help="words in the name of the repository")
    search.add_argument("--method", help="such as vpt")
    search.add_argument("--base_model", help="id of the backbone")
    search.add_argument("--any_peft", action="store_true", help="also adapters that were not made with this library")
    search.add_argument("--limit", type=int, default=20, help="(20)")
    search.add_argument("--json", action="store_true", help="for scripts")


def run(arguments: argparse.Namespace) -> int:
    """Run one of these commands; return the exit status."""
    from huggingface_hub.errors import HfHubHTTPError

    call = {"push": _push, "pull": _pull, "search-hub": _search}[arguments.command]
    try:
        call(arguments)
    except (ValueError, OSError, HfHubHTTPError) as error:
        return fail(arguments.command, error)
    return 0


def _push(arguments: argparse.Namespace) -> None:
    from ..sharing.collection import push_folders

    adapters: dict[str, Path] = {}
    for source in arguments.adapter:
        name, equals, folder = source.partition("=")
        if not equals or Path(source).exists():
            name, folder = Path(source).resolve().name, source
            if len(arguments.adapter) == 1 and not arguments.subfolder:
                name = ""
        if name in adapters:
            raise ValueError(f"{adapters[name]} and {folder} are both named {name!r}: write NAME=FOLDER.")
        adapters[name] = Path(folder)
    given = {"base_model": arguments.base_model, "private": arguments.private, "commit_message": arguments.message}
    print(f"Pushed: {push_folders(adapters, arguments.repository, **given).commit_url}")


def _pull(arguments: argparse.Namespace) -> None:
    from ..sharing.collection import pull

    given = {"output_dir": arguments.output_dir, "revision": arguments.revision}
    for folder in pull(arguments.repository, arguments.name, **given):
        print(folder)


def _search(arguments: argparse.Namespace) -> None:
    from ..sharing.collection import as_table, search_hub

    fields = ("method", "base_model", "any_peft", "limit")
    found = search_hub(arguments.query, **{name: getattr(arguments, name) for name in fields})
    if arguments.json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=1))
    else:
        print(as_table(found) if found else "Nothing was found.")
