"""Checks of the fields of a config."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar


class CheckedFields:
    """Mixin of configs: says what is wrong with a field, and what is valid.

    Attributes:
        whole: name of the config that users gave, if that made this one for a part of its adapter; else empty.
        fields_of_whole: what that config calls the fields of this one, where it has another name for them.
    """

    whole: ClassVar[str] = ""
    fields_of_whole: ClassVar[Mapping[str, str]] = {}

    @property
    def title(self) -> str:
        """Name of the config for errors: the one that users know."""
        return self.whole or type(self).__name__

    def _fail(self, name: str, valid: str) -> None:
        value = getattr(self, name)
        raise ValueError(f"{self.title}.{self.fields_of_whole.get(name, name)} is {value!r}: must be {valid}.")

    def _require_integer(self, name: str, low: int, high: int | None = None, high_is: str = "") -> None:
        value = getattr(self, name)
        if type(value) is not int or value < low or (high is not None and value > high):
            upper = "" if high is None else f" to {high}{f' ({high_is})' if high_is else ''}"
            self._fail(name, f"an integer from {low}{upper}" if upper else f"an integer of at least {low}")

    def _require_unset(self, name: str, where: str) -> None:
        """Refuse a value other than the default where the field has no effect."""
        default = type(self).__dataclass_fields__[name].default  # type: ignore[attr-defined]
        if getattr(self, name) != default:
            self._fail(name, f"{default!r}, its default, {where}, where it has no effect")

    def _require_number(self, name: str, low: float = -math.inf, below: float = math.inf) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not low <= value < below:
            bounds = "" if low == -math.inf else f" of at least {low:g}"
            self._fail(name, f"a finite number{bounds}" + ("" if below == math.inf else f" and less than {below:g}"))

    def _require_number_or(self, name: str, word: str) -> None:
        value = getattr(self, name)
        if value == word:
            return
        if isinstance(value, str):
            self._fail(name, f'a finite number or "{word}"')
        self._require_number(name)

    def _require_choice(self, name: str, choices: Collection[Any]) -> None:
        value = getattr(self, name)
        if not any(type(value) is type(choice) and value == choice for choice in choices):  # 1 is not True
            self._fail(name, f"one of {', '.join(map(repr, choices))}")

    def _require_some(self, name: str, choices: Collection[str]) -> None:
        """Make a field that names one or more of the choices a tuple in their order."""
        value = getattr(self, name)
        given = (value,) if isinstance(value, str) else value
        listed = isinstance(given, list | tuple | set | frozenset)
        if not listed or not given or not all(isinstance(each, str) and each in choices for each in given):
            setattr(self, name, given)
            self._fail(name, f"one or more of {', '.join(map(repr, choices))}")
        setattr(self, name, tuple(choice for choice in choices if choice in given))
