"""The adapters that a server may load: found at the start, from their headers only.

A request names an adapter of this list. No name of a request becomes a path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from ..core.config import VisualPeftConfig
from ..core.registry import list_methods
from ..sharing.card import CONFIG_NAME, PROCESSOR_NAME, WEIGHTS_NAME, is_repo_id
from ..sharing.inspecting import Header, inspect_adapter, printable


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Entry:
    """An adapter that can be asked for.

    Attributes:
        name: in requests.
        key: in the model; short, and without signs that peft refuses.
        source: where it is from, for people.
        folder: with its configuration, and its weights once they are fetched.
        header: what its files say.
        refused: why it cannot be served; "" if it can.
        remote: repository, commit and folder in it, if the weights are on the Hub.
    """

    name: str
    key: str
    source: str
    folder: Path
    header: Header
    refused: str = ""
    remote: tuple[str, str, str] | None = None

    def fetch(self) -> None:
        """Bring the weights to this machine, if they are on the Hub.

        Raises:
            ValueError: the Hub does not give them.
        """
        if self.remote is None or (self.folder / WEIGHTS_NAME).is_file():
            return
        repository, commit, inside = self.remote
        try:
            snapshot_download(repository, revision=commit, allow_patterns=[_inside(inside, WEIGHTS_NAME)])
        except (HfHubHTTPError, OSError) as error:
            raise ValueError(f"{self.source}: the weights cannot be fetched: {error}") from error
        if not (self.folder / WEIGHTS_NAME).is_file():
            raise ValueError(f"{self.source} has no {WEIGHTS_NAME}.")


@dataclass(frozen=True)
class Base:
    """The backbone that is served.

    Attributes:
        name: as given: a folder or a Hub id.
        revision: of the Hub id, None for the main one.
        any_name: whether adapters that name another backbone, or none, are served where their weights fit.
    """

    name: str
    revision: str | None = None
    any_name: bool = False

    def refusal(self, header: Header) -> str:
        """Why an adapter does not belong to this backbone; "" if it does."""
        named = header.base_model
        if self.any_name:
            return ""
        way_out = "--any_base serves it if its weights fit"
        if not named:
            return f"it names no base model, and {self.name} is served: {way_out}"
        own = Path(self.name)
        local = own.is_dir() and (Path(named).resolve() == own.resolve() or named == own.resolve().name)
        if named != self.name and not local:
            return f"it was trained on {printable(named)}, and {self.name} is served: {way_out}"
        if header.revision and not local and header.revision != (self.revision or "main"):
            return (
                f"it was trained on revision {printable(header.revision)} of {self.name}, and "
                f"{self.revision or 'main'} is served: {way_out}"
            )
        return ""


def find_adapters(sources: Sequence[str], base: Base) -> dict[str, Entry]:
    """The adapters of all sources, by name.

    Args:
        sources: each a folder or repository of one adapter, or one whose sub-folders are adapters; `NAME=SOURCE` names
            a single one.
        base: what is served.

    Raises:
        ValueError: a source has no adapter, a file is damaged, two have the same name, or none can be served.
    """
    found: dict[str, Entry] = {}
    for source in sources:
        given, where = _named(source)
        for number, (name, folder, remote) in enumerate(_folders(where)):
            if given and number:
                raise ValueError(f"--adapters {source}: {where} holds several adapters; a name is for one.")
            label = given or name
            if not NAME.fullmatch(label):
                raise ValueError(
                    f"--adapters {where}: {label!r} is not a name for requests (letters, digits, '.', '_', '-'): "
                    f"write NAME={folder}."
                )
            if label in found:
                raise ValueError(
                    f"--adapters: {found[label].source} and {folder} are both named {label!r}: write NAME=SOURCE."
                )
            header = inspect_adapter(str(folder))
            refused = base.refusal(header) or _unusable(header, folder, remote)
            origin = f"{remote[0]}/{remote[2]}".rstrip("/") if remote else str(folder)
            found[label] = Entry(label, f"a{len(found)}", origin, folder, header, refused, remote)
    if not found:
        raise ValueError("--adapters: name at least one folder or repository.")
    if all(entry.refused for entry in found.values()):
        first = next(iter(found.values()))
        raise ValueError(f"No adapter can be served. The first of them, {first.name}: {first.refused}.")
    return found


def _named(source: str) -> tuple[str, str]:
    """The name and the place of `NAME=SOURCE`."""
    name, equals, where = source.partition("=")
    if equals and not Path(source).exists() and NAME.fullmatch(name):
        return name, where
    return "", source


def _folders(where: str) -> Iterator[tuple[str, Path, tuple[str, str, str] | None]]:
    """Name, local folder and place on the Hub of each adapter of a source."""
    folder = Path(where)
    if folder.is_dir():
        inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
        if (folder / CONFIG_NAME).is_file():
            yield folder.resolve().name, folder, None
        elif not inside:
            raise ValueError(f"--adapters {where}: neither it nor a folder in it has {CONFIG_NAME}.")
        else:
            yield from ((path.name, path, None) for path in inside)
        return
    if not is_repo_id(where):
        raise ValueError(f"--adapters {where} is neither a folder nor a repository id of the Hub.")
    small = [CONFIG_NAME, PROCESSOR_NAME]
    try:
        commit = str(HfApi().model_info(where).sha)
        local = Path(snapshot_download(where, revision=commit, allow_patterns=[*small, *(f"*/{n}" for n in small)]))
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"--adapters {where}: the Hub does not give it: {error}") from error
    places = sorted(path.parent for path in (*local.glob(CONFIG_NAME), *local.glob(f"*/{CONFIG_NAME}")))
    if not places:
        raise ValueError(f"--adapters {where}: the repository has no {CONFIG_NAME}.")
    for place in places:
        inner = "" if place == local else place.name
        yield inner or where.rpartition("/")[2], place, (where, commit, inner)


def _unusable(header: Header, folder: Path, remote: object) -> str:
    """Why a server cannot take an adapter, whatever the backbone."""
    if remote is None and not (folder / WEIGHTS_NAME).is_file():
        return f"it has no {WEIGHTS_NAME}; weights in other formats are not loaded"
    method = list_methods().get(header.peft_type.lower())
    if method is not None and issubclass(method.config_cls, VisualPeftConfig) and method.video:
        return f"{method.name} is a method for videos; the server takes images"
    return ""


def _inside(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def as_json(entry: Entry, loaded: Mapping[str, str]) -> dict[str, object]:
    """An adapter for those who ask which there are.

    Args:
        entry: of the catalogue.
        loaded: why each loaded adapter cannot share a batch with others, by name; "" if it can.
    """
    return {
        "name": entry.name,
        "method": entry.header.method,
        "classes": entry.header.classes,
        "values": entry.header.values or None,
        "loaded": entry.name in loaded,
        "alone": loaded.get(entry.name) or None,
        "refused": entry.refused or None,
    }
