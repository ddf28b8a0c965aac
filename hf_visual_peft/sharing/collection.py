"""Repositories of the Hub with one saved adapter, or with many in sub-folders and an index of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    HfApi,
    ModelCard,
    ModelCardData,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..tables import format_table
from .card import CONFIG_NAME, PROCESSOR_NAME, WEIGHTS_NAME, is_generated, is_hub_id, is_repo_id
from .hub import CARD_NAME
from .inspecting import Header, inspect_adapter, printable


INDEX = "adapters.json"
FILES = (WEIGHTS_NAME, CONFIG_NAME, CARD_NAME, PROCESSOR_NAME)
FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
TAG = "hf_visual_peft"
_BEGIN, _END = "<!-- adapters -->", "<!-- end of adapters -->"


def push_folders(
    adapters: Mapping[str, Path],
    repo_id: str,
    *,
    base_model: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Upload saved adapters in one commit.

    Args:
        adapters: their folders by name. A name is a sub-folder of the repository; the only adapter may have the name
            "", and then lies at the root.
        repo_id: `"user/name"`, or `"name"` for the user that the token belongs to.
        base_model: id of the backbone on the Hub, for adapters that name a local folder.
        private: visibility of a new repository.
        token: an access token; by default the one of `hf auth login`.
        commit_message: title of the commit.

    Raises:
        ValueError: there is nothing to upload, a name is not a folder, a folder holds no adapter, or a base model is
            not on the Hub. Nothing was sent.
    """
    validate_repo_id(repo_id)
    if base_model is not None and not is_repo_id(base_model):
        raise ValueError(f"--base_model {base_model} is not a model id of the Hub, such as facebook/dinov2-small.")
    if not adapters:
        raise ValueError("There is no adapter to upload.")
    if "" in adapters and len(adapters) > 1:
        raise ValueError("Several adapters need a name each, which is their sub-folder.")
    contents: dict[str, bytes | Path] = {}
    rows = {}
    for name, folder in adapters.items():
        if name and not FOLDER.fullmatch(name):
            raise ValueError(f"{name!r} is not a name of a sub-folder: take letters, digits, '.', '_' and '-'.")
        header = inspect_adapter(str(folder))
        if not header.tensors:
            raise ValueError(f"{folder} has no {WEIGHTS_NAME}: nothing else is uploaded.")
        base = base_model or header.base_model
        if not is_hub_id(base):
            raise ValueError(
                f"{folder} was trained on {base or 'a model that it does not name'}, which is not on the Hub, so "
                "nobody could load it: give --base_model with its id there."
            )
        rows[name] = _row(header, str(base))
        for file in FILES:
            if (folder / file).is_file():
                contents[f"{name}/{file}".lstrip("/")] = folder / file
        if base != header.base_model:
            config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
            text = json.dumps({**config, "base_model_name_or_path": base}, indent=2, sort_keys=True)
            contents[f"{name}/{CONFIG_NAME}".lstrip("/")] = text.encode()
            if (folder / CARD_NAME).is_file():
                text = _card_with_base(folder / CARD_NAME, str(base))
                contents[f"{name}/{CARD_NAME}".lstrip("/")] = text.encode()
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    info = api.model_info(repo_id)
    if "" not in adapters:
        there = {file.rfilename for file in info.siblings or ()}
        known = read_index(repo_id, revision=info.sha, token=token) if INDEX in there else {}
        rows = dict(sorted({**known, **rows}.items()))
        contents[INDEX] = json.dumps({"adapters": rows}, indent=1, ensure_ascii=False).encode()
        old = ""
        if CARD_NAME in there:
            old = Path(hf_hub_download(repo_id, CARD_NAME, revision=info.sha, token=token)).read_text(encoding="utf-8")
        contents[CARD_NAME] = _collection_card(repo_id, rows, old).encode()
    operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in contents.items()]
    names = ", ".join(filter(None, adapters)) or "adapter"
    # if another commit changes the index meanwhile, this one fails and nothing is lost
    return api.create_commit(
        repo_id, operations, commit_message=commit_message or f"Upload {names}"[:200], parent_commit=info.sha
    )


def read_index(repo_id: str, *, revision: str | None = None, token: str | None = None) -> dict[str, dict[str, Any]]:
    """The adapters of a repository of many, by name.

    Raises:
        ValueError: the index is damaged.
    """
    path = Path(hf_hub_download(repo_id, INDEX, revision=revision, token=token))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["adapters"]
        if not all(FOLDER.fullmatch(name) and isinstance(row, dict) for name, row in found.items()):
            raise ValueError("a name is not a sub-folder")
        return dict(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{repo_id}/{INDEX} is damaged: {error}") from error


def pull(
    repo_id: str,
    names: Sequence[str] = (),
    *,
    output_dir: Path,
    revision: str | None = None,
    token: str | None = None,
) -> list[Path]:
    """Download adapters, and nothing but their weights in safetensors, configurations and cards.

    Args:
        repo_id: on the Hub.
        names: sub-folders; all adapters if there are none.
        output_dir: new or empty.
        revision: branch, tag or commit.
        token: an access token.

    Returns:
        The folders of the adapters.

    Raises:
        ValueError: the repository or an adapter does not exist, or the folder is not empty.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"--output_dir {output_dir} exists and is not empty: choose another.")
    try:
        files = HfApi(token=token).list_repo_files(repo_id, revision=revision)
    except RepositoryNotFoundError as error:
        raise ValueError(f"There is no repository {repo_id} on the Hub, or it is private.") from error
    except HfHubHTTPError as error:
        raise ValueError(f"{repo_id}: the Hub refused: {error}") from error
    folders = [file.removesuffix(CONFIG_NAME).rstrip("/") for file in files if Path(file).name == CONFIG_NAME]
    folders = [folder for folder in folders if not folder or FOLDER.fullmatch(folder)]
    if missing := [name for name in names if name not in folders]:
        held = ", ".join(filter(None, folders)) or "none"
        raise ValueError(f"{repo_id} has no adapter {', '.join(missing)}. Its sub-folders with adapters: {held}.")
    chosen = list(names) or folders
    if not chosen:
        raise ValueError(f"{repo_id} has no {CONFIG_NAME}: it holds no adapter.")
    wanted = {f"{folder}/{file}".lstrip("/") for folder in chosen for file in FILES}
    allowed = sorted(wanted & set(files))
    snapshot_download(repo_id, revision=revision, token=token, allow_patterns=allowed, local_dir=output_dir)
    return [output_dir / folder if folder else output_dir for folder in chosen]


@dataclass(frozen=True)
class Found:
    """A repository that a search found."""

    repo_id: str
    base_model: str
    tags: tuple[str, ...]
    downloads: int
    likes: int


def search_hub(
    query: str = "",
    *,
    method: str | None = None,
    base_model: str | None = None,
    any_peft: bool = False,
    limit: int = 20,
    token: str | None = None,
) -> list[Found]:
    """Adapters on the Hub, by the tags of their cards.

    Args:
        query: words in the name of the repository.
        method: such as `"vpt"`.
        base_model: that they were trained on.
        any_peft: also those that were not made with this library.
        limit: how many at most.
        token: an access token.

    Raises:
        ValueError: the Hub refuses.
    """
    tags = ["peft" if any_peft else TAG]
    tags += [method.lower()] if method else []
    tags += [f"base_model:adapter:{base_model}"] if base_model else []
    try:
        models = list(HfApi(token=token).list_models(search=query or None, filter=tags, limit=limit))
    except HfHubHTTPError as error:
        raise ValueError(f"The Hub refused the search: {error}") from error
    found = []
    for model in models:
        own = tuple(model.tags or ())
        prefix = "base_model:adapter:"
        base = next((tag.removeprefix(prefix) for tag in own if tag.startswith(prefix)), "")
        shown = tuple(tag for tag in own if ":" not in tag and tag not in (TAG, "peft", "safetensors"))
        found.append(Found(model.id, base, shown, model.downloads or 0, model.likes or 0))
    return found


def as_table(found: Sequence[Found]) -> str:
    """The result of a search for a terminal, without control characters of others."""
    header = ("repository", "base model", "tags", "downloads", "likes")
    rows = [
        (printable(one.repo_id), printable(one.base_model), printable(", ".join(one.tags), 60), f"{one.downloads:,}",
         f"{one.likes:,}")
        for one in found
    ]  # fmt: skip
    return format_table(header, rows, right=("downloads", "likes"))


def _row(header: Header, base: str) -> dict[str, Any]:
    return {
        "method": header.method.partition(" of ")[0],
        "base_model": base,
        "classes": len(header.classes) or None,
        "values": header.values,
        "bytes": header.num_bytes,
    }


def _card_with_base(path: Path, base: str) -> str:
    """A card that names the base model by its id on the Hub."""
    card = ModelCard.load(path)
    card.data["base_model"], card.data["base_model_relation"] = base, "adapter"
    tags = [tag for tag in card.data.get("tags") or [] if not tag.startswith("base_model:adapter:")]
    card.data["tags"] = sorted({*tags, f"base_model:adapter:{base}"})
    return str(card)


def _collection_card(repo_id: str, rows: Mapping[str, Mapping[str, Any]], old: str) -> str:
    """The card of a repository of many adapters; of an edited one only the list and the metadata are written."""
    header = ("adapter", "method", "base model", "classes", "values")
    cells = [
        (
            f"[{name}]({name})",
            str(row["method"]),
            str(row["base_model"]),
            str(row["classes"] or ""),
            f"{row['values']:,}",
        )
        for name, row in rows.items()
    ]
    listing = f"{_BEGIN}\n\n{format_table(header, cells, right=('classes', 'values'))}\n\n{_END}"
    bases = sorted({str(row["base_model"]) for row in rows.values()})
    made = {str(row["method"]) for row in rows.values()}
    tags = {TAG, *made, *(f"base_model:adapter:{base}" for base in bases)}
    text = "\n\n".join(
        [
            f"# {repo_id.rpartition('/')[2]}",
            f"Adapters made with `hf_visual_peft` and `peft`, each in a folder of its own. `{INDEX}` lists them, too.",
            listing,
            f"```bash\nhf-visual-peft pull {repo_id} NAME --output_dir NAME",
        ]
    )
    text += f"\nhf-visual-peft serve --model {bases[0]} --adapters {repo_id}\n```\n"
    data: dict[str, Any] = {}
    if old.startswith("---"):
        there = ModelCard(old, ignore_metadata_errors=True)
        data = there.data.to_dict()
        tags |= {tag for tag in data.get("tags") or [] if not tag.startswith("base_model:adapter:")}
        if _BEGIN in there.text and _END in there.text:
            before, _, rest = there.text.partition(_BEGIN)
            text = f"{before}{listing}{rest.partition(_END)[2]}"
        elif there.text.strip() and not is_generated(there.text):
            text = f"{there.text.rstrip()}\n\n{listing}\n"
    data |= {"library_name": "peft", "tags": sorted(tags), "base_model": bases, "base_model_relation": "adapter"}
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{text.lstrip()}"
