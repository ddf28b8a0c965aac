"""Checks the files of an adapter before peft reads them, and names the one that is damaged.

peft itself passes on what a parser says (`Expecting value: line 1 column 1`), or fails later at a field of the wrong
type. Importing the package makes it name file, field, value and what is valid, for adapters of ours and of peft alike.
"""

from __future__ import annotations

import enum
import functools
import json
import types
import typing
import zipfile
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union

from peft import PeftConfig
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..tables import close_names, did_you_mean
from .config import VisualPeftConfig


_KINDS: dict[type, str] = {
    str: "a text", bool: "a number", int: "a number", float: "a number", list: "a list", dict: "an object",
    types.NoneType: "null",
}  # fmt: skip
_EVERY = frozenset(_KINDS.values())


def teach_files() -> None:
    """Make peft check the files of an adapter when it reads its configuration, and whether its weights are there."""
    read, tell = PeftConfigMixin.from_json_file.__func__, PeftConfigMixin._get_peft_type.__func__

    @functools.wraps(read)
    def from_json_file(cls: type, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        path = Path(path_json_file)
        check_config(parsed_config(path.read_bytes(), str(path)), str(path), cls)
        check_weights(path.parent)
        return read(cls, path_json_file, **kwargs)

    @functools.wraps(tell)  # peft asks this first if it will load weights, too
    def get_peft_type(cls: type, model_id: str, **kwargs: Any) -> Any:
        folder = Path(model_id, kwargs.get("subfolder") or "")
        weights = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
        if (folder / CONFIG_NAME).is_file() and not any((folder / name).is_file() for name in weights):
            raise ValueError(
                f"{folder} has {CONFIG_NAME}, but no {SAFETENSORS_WEIGHTS_NAME}: the adapter was not saved or copied "
                "completely. Save or download it again."
            )
        return tell(cls, model_id, **kwargs)

    PeftConfigMixin.from_json_file = classmethod(from_json_file)
    PeftConfigMixin._get_peft_type = classmethod(get_peft_type)


def parsed_config(content: bytes, where: str) -> dict[str, Any]:
    """The fields in the content of an `adapter_config.json`.

    Raises:
        ValueError: it is not a JSON object.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        told = "an empty file" if not content.strip() else f"not readable JSON, perhaps cut short: {error}"
        raise ValueError(f"{where} is {told}. Save or download the adapter again.") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{where} holds {_KINDS[type(found)]}, not the fields of a configuration. Save or download the adapter "
            "again."
        )
    return found


def check_config(found: Mapping[str, Any], where: str, reader: type = PeftConfig) -> None:
    """Check the method and the types of fields in a configuration; for methods of this library also their values.

    Args:
        found: the fields.
        where: they are from, for messages.
        reader: config class that reads them, which decides about the method if the file does not.

    Raises:
        ValueError: peft could not read it.
    """
    known = {str(getattr(kind, "value", kind)): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = found.get("peft_type")
    if kind is None and reader in known.values():
        config_cls = reader
    elif kind is None:
        raise ValueError(
            f"{where} has no peft_type, which names the method: it is not the configuration of an adapter."
        )
    elif not isinstance(kind, str) or kind not in known:
        hint = did_you_mean(close_names(str(kind).upper(), known, 1))
        hint = hint or "`hf-visual-peft methods` lists those of hf_visual_peft."
        raise ValueError(
            f"{where}: peft_type is {kind!r}, a method that neither this version of hf_visual_peft nor this one of "
            f"peft has. {hint}"
        )
    else:
        config_cls = known[kind]
    if not issubclass(config_cls, VisualPeftConfig):
        _check_types(found, where, config_cls)
        return
    names = {field.name for field in fields(config_cls) if field.init}  # others are an error once there is a model
    try:
        config_cls(**{name: value for name, value in found.items() if name in names})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def check_weights(folder: Path) -> None:
    """Check that the weights of an adapter in a folder can be read, if they are there.

    Raises:
        ValueError: they are damaged.
    """
    path, older = folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME
    if path.is_file():
        try:
            with safe_open(path, framework="pt"):
                return
        except SafetensorError as error:
            raise ValueError(
                f"{path} is truncated or not a safetensors file ({path.stat().st_size} bytes; {error}). Save or "
                "download the adapter again."
            ) from error
    if older.is_file() and not zipfile.is_zipfile(older):  # torch.save writes zip files, whose table stands at the end
        with older.open("rb") as file:
            if file.read(1) != b"\x80":  # as files of torch before 1.6 begin
                raise ValueError(
                    f"{older} is truncated or was not written by torch.save ({older.stat().st_size} bytes). Save or "
                    f"download the adapter again, as {SAFETENSORS_WEIGHTS_NAME} if you can."
                )


def _check_types(found: Mapping[str, Any], where: str, config_cls: type) -> None:
    """Check that the fields of a config of peft have types that its annotations allow, as far as JSON tells them."""
    hints = typing.get_type_hints(config_cls)
    for field in fields(config_cls):
        if field.name not in found:
            continue
        valid = _kinds(hints[field.name])
        if field.default is None or field.default is MISSING:  # as peft itself may have written it
            valid = valid | {"null"}
        value = found[field.name]
        if _KINDS[type(value)] not in valid:
            shown = " or ".join(sorted(valid - {"null"}) + ["null"] * ("null" in valid))
            raise ValueError(f"{where}: {config_cls.__name__}.{field.name} is {value!r}: must be {shown}.")


def _kinds(hint: Any) -> frozenset[str]:
    """What a value with this annotation may be in JSON; all that there is, if the annotation does not tell."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return frozenset[str]().union(*(_kinds(part) for part in parts))
    if origin is Literal:
        return frozenset(_KINDS.get(type(part), "a text") for part in parts)
    plain = origin or hint
    if not isinstance(plain, type):
        return _EVERY
    if issubclass(plain, enum.Enum):
        return frozenset({"a text"})
    if issubclass(plain, list | tuple | set):
        return frozenset({"a list"})
    if is_dataclass(plain) or issubclass(plain, dict):
        return frozenset({"an object"})
    return frozenset({_KINDS[plain]}) if plain in _KINDS else _EVERY
