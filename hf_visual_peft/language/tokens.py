"""Class names and texts as token ids, with the places of learned vectors among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .towers import Towers


Position = Literal["front", "middle", "end"]
POSITIONS: tuple[Position, ...] = ("front", "middle", "end")  # of the class name


@dataclass(frozen=True)
class Tokens:
    """Texts for a text model.

    Attributes:
        ids: (texts, length).
        mask: 1 at tokens, 0 at padding; None if the text model takes none.
        slots: positions of learned vectors, (texts, slots).
    """

    ids: Tensor
    mask: Tensor | None
    slots: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: Tensor) -> Tokens:
        """Some of the texts, by their numbers."""
        return Tokens(self.ids[index], None if self.mask is None else self.mask[index], self.slots[index])

    def part(self, start: int, end: int, device: torch.device) -> Tokens:
        """Some of the texts, on a device."""
        mask = None if self.mask is None else self.mask[start:end].to(device)
        return Tokens(self.ids[start:end].to(device), mask, self.slots[start:end].to(device))


def check_names(names: Any) -> list[str]:
    """Class names as a list of strings.

    Raises:
        ValueError: one is empty or no string, or two become the same text.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ValueError(f"class_names is {names!r}: must be a list of names, at least one.")
    seen: dict[str, str] = {}
    for index, name in enumerate(names):
        if not isinstance(name, str) or not as_text(name):
            raise ValueError(f"class_names[{index}] is {name!r}: must be a name that is not empty.")
        if (text := as_text(name)) in seen:
            raise ValueError(
                f"class_names[{index}] is {name!r}, and {seen[text]!r} stands before it: both are the text {text!r}, "
                "so that no text can tell these classes apart. Give them different names."
            )
        seen[text] = name
    return list(names)


def as_text(name: str) -> str:
    """A class name as it stands in a text: with spaces for underscores."""
    return " ".join(name.replace("_", " ").split())


class TextWriter:
    """Writes texts for one dual encoder.

    Args:
        tokenizer: of the checkpoint.
        towers: the dual encoder.
    """

    def __init__(self, tokenizer: Any, towers: Towers) -> None:
        self.tokenizer = tokenizer
        self.towers = towers
        if tokenizer.pad_token_id is None:
            raise ValueError(f"{type(tokenizer).__name__} has no pad_token: set it to the one of the checkpoint.")

    def plain(self, texts: Sequence[str], names: Sequence[str]) -> Tokens:
        """Whole texts.

        Args:
            texts: the texts.
            names: of their classes, for errors.

        Raises:
            ValueError: a text is too long.
        """
        return self._padded([self._ids(text) for text in texts], [[] for _ in texts], names)

    def words(self, text: str) -> list[int]:
        """The token ids of a text alone, without those that start and end it."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def words_after(self, text: str) -> list[int]:
        """The token ids of a text that follows other words: some tokenizers, as Gemma's, write spaces into tokens."""
        before, both = self.words("x"), self.words(f"x {text}")
        return both[len(before) :] if both[: len(before)] == before else self.words(text)

    def with_slots(self, names: Sequence[str], count: int, position: Position, before: str = "") -> Tokens:
        """Texts of a class name, a full stop and some places for learned vectors, which hold another token meanwhile.

        Args:
            names: of the classes.
            count: of places in a text.
            position: of the name: before, between or after them.
            before: words in front of each name.

        Raises:
            ValueError: a text is too long.
        """
        placeholder = self.words("x")[0]
        rows, slots = [], []
        for name in names:
            text = f"{before} {as_text(name)}".strip()
            full, alone = self._ids(f"{text}."), self.words(f"{text}.")
            start = next(at for at in range(len(full) + 1) if full[at : at + len(alone)] == alone)
            later = {"end": 0, "front": count, "middle": count - count // 2}[position]  # slots after the name
            first = count - later
            read = self.words_after if first else self.words
            own, split = read(f"{text}."), len(read(text))
            rows.append(
                [
                    *full[:start],
                    *[placeholder] * first,
                    *own[:split],
                    *[placeholder] * later,
                    *own[split:],
                    *full[start + len(alone) :],
                ]
            )
            after = start + first + split
            slots.append([*range(start, start + first), *range(after, after + later)])
        return self._padded(rows, slots, names)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def _padded(self, rows: list[list[int]], slots: list[list[int]], names: Sequence[str]) -> Tokens:
        limit = self.towers.max_length
        for row, name in zip(rows, names, strict=True):
            if len(row) > limit:
                raise ValueError(
                    f"Class {name!r}: its text has {len(row)} tokens, {len(row) - limit} more than the {limit} "
                    f"positions of {type(self.towers.model.text_model).__name__}. Shorten the name, the template or "
                    "the prompt."
                )
            end = self.towers.end_token
            if end is not None and end not in row:
                raise ValueError(
                    f"Class {name!r}: its text has no token {end}, at which the text model reads its features. The "
                    f"tokenizer ends texts with {row[-1]}: take the tokenizer of the checkpoint."
                )
        length = limit if self.towers.fixed_length else max(map(len, rows))
        padding = self.towers.padding_token
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id if padding is None else padding)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        # where all positions count, the side of the padding does, too
        left = self.towers.fixed_length and self.tokenizer.padding_side == "left"
        for index, row in enumerate(rows):
            start = length - len(row) if left else 0
            ids[index, start : start + len(row)] = torch.tensor(row)
            mask[index, start : start + len(row)] = 1
            slots[index] = [start + slot for slot in slots[index]]
        places = torch.tensor(slots, dtype=torch.long).reshape(len(rows), -1)
        return Tokens(ids, mask if self.towers.masked else None, places)
