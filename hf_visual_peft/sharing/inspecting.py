"""What a saved adapter is, by its headers only: safe for files that nobody vouches for.

Nothing is imported, unpickled or loaded: the configuration is read as plain JSON of limited size, of the weights only
the header of a safetensors file. From the Hub come these parts alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, SafetensorsParsingError
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open

from ..core.adapter_files import parsed_config
from ..core.registry import list_methods
from .card import CONFIG_NAME, PROCESSOR_NAME, WEIGHTS_NAME, is_repo_id


MAX_JSON = 10 * 2**20
CODE = (".py", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
TRUSTED = ("transformers", "timm", "torchvision", "hf_visual_peft", "open_clip")


@dataclasses.dataclass
class Header:
    """What the files of an adapter say about it.

    Attributes:
        source: folder or repository.
        peft_type: of the configuration.
        method: name of the method, with whose it is.
        base_model: that it was trained on.
        revision: of the base model.
        classes: names saved with the head.
        fields: of the configuration, where they differ from the method's defaults.
        tensors: their shapes.
        values: number of trained values, the head included.
        num_bytes: of the weights.
        dtypes: number of tensors of each.
        processor: whether an image processor is there.
        notes: what to know before loading it.
    """

    source: str
    peft_type: str
    method: str
    base_model: str | None
    revision: str | None
    classes: list[str]
    fields: dict[str, Any]
    tensors: dict[str, list[int]]
    values: int
    num_bytes: int
    dtypes: dict[str, int]
    processor: bool
    notes: list[str]


def inspect_adapter(source: str, *, revision: str | None = None, token: str | None = None) -> Header:
    """Read the headers of an adapter.

    Args:
        source: a folder, or a repository on the Hub.
        revision: of the repository.
        token: for the Hub.

    Raises:
        ValueError: there is no adapter, or a file is damaged.
    """
    files: _Folder | _Repository
    if Path(source).is_dir():
        files = _Folder(Path(source))
    elif is_repo_id(source) and not Path(source).exists():
        files = _Repository(source, revision, token)
    else:
        raise ValueError(f"{source} is neither a folder nor a repository id of the Hub.")
    names = files.names()
    if CONFIG_NAME not in names:
        raise ValueError(f"{source} has no {CONFIG_NAME}: it is not an adapter.")
    config = parsed_config(files.text(CONFIG_NAME), f"{source}/{CONFIG_NAME}")
    tensors: dict[str, tuple[str, list[int]]] = {}
    num_bytes = 0
    notes = []
    if WEIGHTS_NAME in names:
        tensors, num_bytes = files.header(WEIGHTS_NAME)
    else:
        notes.append(f"There is no {WEIGHTS_NAME}: the weights cannot be inspected.")
    if code := sorted(name for name in names if name.lower().endswith(CODE)):
        notes.append(f"Files that may run code when they are loaded, not opened here: {', '.join(code[:5])}.")
    mapping = config.get("auto_mapping")
    mapping = mapping if isinstance(mapping, dict) else {}
    module = mapping.get("parent_library")
    if module is not None and str(module).partition(".")[0] not in TRUSTED:
        notes.append(f"peft imports the Python module {module} when it loads this adapter.")
    kind, base, commit = str(config.get("peft_type")), config.get("base_model_name_or_path"), config.get("revision")
    method, known = _method(kind, config)
    if known is None:
        notes.append("Neither this version of hf_visual_peft nor this one of peft has such a method.")
    else:
        expected = {field.name: field for field in dataclasses.fields(known)}
        if unknown := sorted(set(config) - set(expected) - {"peft_version", "hf_visual_peft_version"}):
            notes.append(f"Fields that this version does not have: {', '.join(unknown[:8])}.")
        config = {key: value for key, value in config.items() if key in expected and _differs(expected[key], value)}
    about = ("peft_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version")
    labels = mapping.get("id2label")
    return Header(
        source=source,
        peft_type=kind,
        method=method,
        base_model=_text(base),
        revision=_text(commit),
        classes=[str(name) for name in labels.values()] if isinstance(labels, dict) else [],
        fields={key: value for key, value in config.items() if key not in about},
        tensors={name: shape for name, (_, shape) in tensors.items()},
        values=sum(math.prod(shape) for _, shape in tensors.values()),
        num_bytes=num_bytes,
        dtypes=dict(Counter(dtype for dtype, _ in tensors.values())),
        processor=PROCESSOR_NAME in names,
        notes=notes,
    )


def described(header: Header) -> str:
    """The header as lines of text, without control characters of the files."""
    shown = {
        "method": header.method,
        "base model": (header.base_model or "not named") + (f" at {header.revision}" if header.revision else ""),
        "classes": f"{len(header.classes)}: {', '.join(header.classes)}" if header.classes else "no names",
        "values": f"{header.values:,} in {len(header.tensors)} tensors ({', '.join(header.dtypes) or 'none'})",
        "bytes": f"{header.num_bytes:,}",
        "image processor": "saved with it" if header.processor else "that of the base model",
        "fields": ", ".join(f"{key}={json.dumps(value)}" for key, value in header.fields.items()) or "defaults",
    }
    lines = [printable(header.source), *(f"  {name + ':':17}{printable(text)}" for name, text in shown.items())]
    return "\n".join([*lines, *(f"  note: {printable(note, 400)}" for note in header.notes)])


def printable(text: str, most: int = 200) -> str:
    """Text of a file for a terminal: escapes in place of control characters, and not too long."""
    clean = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text[: most + 1])
    return clean if len(clean) <= most else clean[: most - 1] + "…"


def _method(kind: str, config: dict[str, Any]) -> tuple[str, type | None]:
    """The name of a method for people, and its config."""
    ours = list_methods().get(kind.lower())
    if ours is not None:
        return f"{ours.name} of hf_visual_peft ({ours.paper.title})", ours.config_cls
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if known is None:
        return f"{kind}, which is unknown", None
    return f"{'dora' if config.get('use_dora') is True else kind.lower()} of peft", known


def _differs(field: dataclasses.Field[Any], value: Any) -> bool:
    default = field.default_factory() if callable(field.default_factory) else field.default
    plain = list(default) if isinstance(default, tuple) else getattr(default, "value", default)
    return plain != value


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


class _Folder:
    """Files of a local folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def text(self, name: str) -> bytes:
        path = self.folder / name
        if not path.is_file():
            raise ValueError(f"{path} is not a file.")
        with path.open("rb") as file:
            content = file.read(MAX_JSON + 1)
        if len(content) > MAX_JSON:
            raise ValueError(f"{path} has more than {MAX_JSON:,} bytes, too many for a configuration.")
        return content

    def header(self, name: str) -> tuple[dict[str, tuple[str, list[int]]], int]:
        path = self.folder / name
        try:
            with safe_open(path, framework="np") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - no mapping
                found = {key: (one.get_dtype(), one.get_shape()) for key, one in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
        return found, path.stat().st_size


class _Repository:
    """Files on the Hub."""

    def __init__(self, name: str, revision: str | None, token: str | None) -> None:
        self.name, self.revision, self.token = name, revision, token
        self.api = HfApi(token=token)

    def names(self) -> set[str]:
        try:
            return set(self.api.list_repo_files(self.name, revision=self.revision))
        except RepositoryNotFoundError as error:
            raise ValueError(f"There is no folder {self.name} here, and no such repository on the Hub.") from error
        except HfHubHTTPError as error:
            raise ValueError(f"{self.name}: the Hub refused: {error}") from error

    def text(self, name: str) -> bytes:
        url = hf_hub_url(self.name, name, revision=self.revision)
        if (get_hf_file_metadata(url, token=self.token).size or 0) > MAX_JSON:
            raise ValueError(f"{self.name}/{name} has more than {MAX_JSON:,} bytes, too many for a configuration.")
        return Path(hf_hub_download(self.name, name, revision=self.revision, token=self.token)).read_bytes()

    def header(self, name: str) -> tuple[dict[str, tuple[str, list[int]]], int]:
        try:
            found = self.api.parse_safetensors_file_metadata(self.name, name, revision=self.revision)
        except (SafetensorsParsingError, EntryNotFoundError) as error:
            raise ValueError(f"{self.name}/{name} is not a safetensors file: {error}") from error
        size = get_hf_file_metadata(hf_hub_url(self.name, name, revision=self.revision), token=self.token).size or 0
        return {key: (one.dtype, list(one.shape)) for key, one in found.tensors.items()}, size
