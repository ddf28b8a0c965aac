"""Reads search spaces."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .composite import CompositeSpace
from .glora import GLoRASpace
from .spaces import Space


SHIPPED = ("noah", "glora")
_KINDS: dict[str, type[Space]] = {"composite": CompositeSpace, "glora": GLoRASpace}


def read_space(source: str | Path | Mapping[str, Any]) -> Space:
    """A search space from a YAML file, from the name of one of this package, or from its content.

    `method: composite` has `parts`: a list of methods, each with

    - `method`, and fields of its config, which are the same in all subnets;
    - `sizes`: one field and its options, ascending; 0 first lets a block go without. Each block chooses its own;
    - `depths`: options for the number of blocks, from the first, that have the method; by default all of them.

    `method: glora` has lists of options for the fields of peft's `GloraConfig`; see `glora.yaml`.

    Args:
        source: `"noah"`, `"glora"`, the path of a file, or a mapping.

    Raises:
        ValueError: there is no such file, a key is not known, or a value is not valid.
    """
    content: Any = source
    if isinstance(source, str | Path):
        path = Path(source)
        if str(source) in SHIPPED and not path.exists():
            text = resources.files(__package__).joinpath(f"{source}.yaml").read_text(encoding="utf-8")
        else:
            try:
                text = path.read_text(encoding="utf-8")
            except OSError as error:
                raise ValueError(
                    f"search space {str(source)!r}: there is no such file, and the names of this package are "
                    f"{', '.join(SHIPPED)} ({error.strerror})."
                ) from error
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"search space {str(source)!r} is not valid YAML: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"A search space is a mapping with a method, not {type(content).__name__}.")
    given = dict(content)
    kind = given.pop("method", None)
    if kind not in _KINDS:
        raise ValueError(f"search space: method is {kind!r}: must be one of {', '.join(_KINDS)}.")
    return _KINDS[kind].read(given)
