"""Texts around class names."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any


DEFAULT = "a photo of a {}."
_NAMED = {"simple": "SIMPLE_IMAGENET_TEMPLATES", "openai": "OPENAI_IMAGENET_TEMPLATES"}  # 7 and 80, of open_clip


def check_templates(templates: Any) -> list[str]:
    """Templates as a list of strings, each with one `{}`.

    Args:
        templates: one or several, or the name of a list in open_clip: `"simple"` or `"openai"`.

    Raises:
        ValueError: a template has not exactly one `{}`, two are equal, or open_clip is not installed.
    """
    if isinstance(templates, str) and templates in _NAMED:
        if importlib.util.find_spec("open_clip") is None:
            raise ValueError(
                f"templates is {templates!r}: that list is in open_clip, which is not installed. Run `pip install "
                "open_clip_torch`, or give the templates themselves."
            )
        from open_clip import zero_shot_metadata

        return [template("{}") for template in getattr(zero_shot_metadata, _NAMED[templates])]
    given = [templates] if isinstance(templates, str) else templates
    if not isinstance(given, Sequence) or not given:
        raise ValueError(f"templates is {templates!r}: must be a text, a list of texts, or one of {_names()}.")
    for template in given:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(
                f"templates has {template!r}: must be a text with one {{}}, where the class name goes, such as "
                f"{DEFAULT!r}; or one of {_names()}."
            )
    if len(set(given)) < len(given):
        raise ValueError(f"templates is {templates!r}: one of them is there twice and would count double.")
    return list(given)


def _names() -> str:
    return ", ".join(map(repr, _NAMED))
