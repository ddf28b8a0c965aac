"""The flags of `hf-visual-peft serve`."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


TOKEN_VARIABLE = "HF_VISUAL_PEFT_TOKEN"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ServeOptions:
    """What a server is started with; the fields are the flags.

    Raises:
        ValueError: a value makes no sense.
    """

    model: str
    adapters: Sequence[str]
    revision: str | None = None
    any_base: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    device: str | None = None
    dtype: str = "float32"
    max_adapters: int = 100
    max_batch: int = 32
    max_wait_ms: float = 5.0
    max_queue: int = 256
    max_bytes: int = 10 * 2**20
    max_pixels: int = 50_000_000
    max_adapters_per_request: int = 16
    timeout: float = 30.0
    token_file: Path | None = None
    allow_anonymous: bool = False

    def __post_init__(self) -> None:
        whole = ("workers", "max_adapters", "max_batch", "max_queue", "max_bytes", "max_pixels")
        for name in (*whole, "max_adapters_per_request"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1.")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port {self.port}: must be from 0 to {2**16 - 1}; 0 takes any free one.")
        if self.max_adapters_per_request > self.max_queue:
            raise ValueError(
                f"--max_adapters_per_request {self.max_adapters_per_request} is more than --max_queue "
                f"{self.max_queue}: such a request could never be admitted."
            )
        if not self.timeout > 0 or not 0 <= self.max_wait_ms < 1000 * self.timeout:
            raise ValueError(
                f"--timeout {self.timeout} must be above 0, and --max_wait_ms {self.max_wait_ms} from 0 to below it."
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype}: must be one of {', '.join(DTYPES)}.")
        if not _is_loopback(self.host) and not self.token() and not self.allow_anonymous:
            raise ValueError(
                f"--host {self.host} is open to other machines: give a token by --token_file or the variable "
                f"{TOKEN_VARIABLE}, or --allow_anonymous."
            )

    def token(self) -> str | None:
        """What requests must bear, if anything.

        Raises:
            ValueError: the file of the token cannot be read, or is empty.
        """
        if self.token_file is None:
            return os.environ.get(TOKEN_VARIABLE) or None
        try:
            found = self.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--token_file {self.token_file} cannot be read: {error}") from error
        if not found or not found.isascii() or not found.isprintable() or " " in found:
            raise ValueError(f"--token_file {self.token_file}: a token is one word of printable ASCII.")
        return found

    def as_json(self) -> str:
        """For another process."""
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> ServeOptions:
        """The reverse of `as_json`."""
        fields = json.loads(text)
        file = fields.pop("token_file")
        return cls(**fields, token_file=Path(file) if file else None)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> ServeOptions:
        """The options that flags ask for."""
        return cls(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(cls)})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser."""
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(ServeOptions)}

    def add(name: str, about: str, **more: Any) -> None:
        default = defaults[name]
        if isinstance(default, bool):
            parser.add_argument(f"--{name}", action="store_true", help=about)
        elif default is dataclasses.MISSING:
            parser.add_argument(f"--{name}", required=True, help=about, **more)
        else:
            told = "" if default is None else f" (default: {default})"
            kind = {"type": type(default)} if default is not None else {}
            parser.add_argument(f"--{name}", default=default, help=about + told, **kind | more)

    add("model", "backbone: Hub id or folder", metavar="BASE")
    add(
        "adapters",
        "folder or Hub repository of an adapter, or one whose sub-folders are adapters; NAME=SOURCE names one",
        nargs="+",
        metavar="SOURCE",
    )
    add("revision", "branch, tag or commit of the backbone")
    add("any_base", "serve adapters that name another backbone, or none, if their weights fit")
    add("host", "address to listen at")
    add("port", "0 takes any free one")
    add("workers", "processes, each with a backbone of its own")
    add("device", "default: a GPU if there is one")
    add("dtype", f"of the backbone: {', '.join(DTYPES)}")
    add("max_adapters", "adapters in memory; the one that was used least recently goes first")
    add("max_batch", "images in a batch")
    add("max_wait_ms", "how long an image waits for others to share its batch")
    add("max_queue", "predictions that wait or run; more are answered with 429")
    add("max_bytes", "of a request; more are answered with 413")
    add("max_pixels", "of an image, read from its header; more are answered with 413")
    add("max_adapters_per_request", "how many adapters one request may name")
    add("timeout", "seconds for a request; then it is answered with 408 or 504")
    add("token_file", f"file with the token that requests must bear; default: the variable {TOKEN_VARIABLE}, if set",
        type=Path)  # fmt: skip
    add("allow_anonymous", "listen to other machines without a token")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
