"""The matrix as JSON, for comparison with a committed file, and as Markdown, for readers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import product
from pathlib import Path

from ..backbones.finding import find_backbone
from ..peft_methods.methods import PEFT_METHODS
from ..tables import format_table
from .cell import Cell
from .matrix import Matrix
from .models import MODELS
from .tiny import Kind


COMMAND = "hf-visual-peft coverage --markdown docs/coverage.md --json docs/coverage.json"
KINDS: dict[Kind, str] = {
    "plain": "Plain transformers",
    "hierarchical": "Hierarchical transformers",
    "convolutional": "Convolutional networks",
    "dense": "Segmentation, depth and detection",
    "timm": "timm, OpenCLIP and torchvision",
}
_SIGNS = {"works": "✓", "not applicable": "-", "skipped": "·", "fails": "✗"}
_INTRODUCTION = f"""# Which method works on which architecture

Written by `{COMMAND}`; do not edit.

Every cell is a tiny random model with a random adapter of the method. *Works* means that training changes the loss
and nothing frozen, that after two steps `disable_adapter` gives the base model's output to the bit and the saved
adapter on a fresh base the same output to the bit, that merging, where the method can be merged, keeps the output,
and that the model takes images of another size where its backbone does.
"""
_LEGEND = (
    "✓ works, - not applicable, · skipped for want of a package, ✗ fails. A number is that of the reason or, where a "
    "cell works, of a restriction; the reasons are below the tables."
)
_HEADS = """What trains beside an adapter where `modules_to_save` is None, and how many blocks the model around the
backbone reads; adapters stand at no others. Where no table names the head of a model, what stands beside its backbone
counts, and a warning says so."""


def to_json(matrix: Matrix) -> str:
    """One line per cell, sorted, so that a changed cell is a changed line."""
    rows = {row: {name: str(cell) for name, cell in cells.items()} for row, cells in matrix.items()}
    return json.dumps(rows, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Matrix:
    """Read the matrix that `to_json` wrote to a file.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {row: {name: Cell.parse(text) for name, text in cells.items()} for row, cells in rows.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a matrix written by hf-visual-peft coverage --json: {error}") from error


def regressions(now: Matrix, before: Matrix) -> list[str]:
    """Cells that worked before and no longer do, and cells that fail, each with its text.

    Cells that are skipped now or were not run are ignored.
    """
    found = []
    for row, cells in now.items():
        for name, cell in cells.items():
            earlier = before.get(row, {}).get(name)
            worked = earlier is not None and earlier.status == "works"
            if cell.status == "fails" or (worked and cell.status == "not applicable"):
                found.append(f"{name} on {row}: {cell} (before: {earlier or 'not in the file'})")
    return found


def failures(matrix: Matrix) -> list[str]:
    """The cells that fail."""
    return [
        f"{name} on {row}: {cell}"
        for row, cells in matrix.items()
        for name, cell in cells.items()
        if cell.status == "fails"
    ]


def summary(matrix: Matrix) -> str:
    """A table of the numbers of working cells for each kind of architecture."""
    rows = []
    for (kind, title), of_peft in product(KINDS.items(), (False, True)):
        cells = [
            cell
            for row, found in matrix.items()
            if MODELS[row].kind == kind
            for name, cell in found.items()
            if (name in PEFT_METHODS) == of_peft
        ]
        count = {status: sum(cell.status == status for cell in cells) for status in _SIGNS}
        ran = len(cells) - count["skipped"]
        if cells:
            share = f"{100 * count['works'] / ran:.1f} %" if ran else "-"
            architectures = sum(MODELS[row].kind == kind for row in matrix)
            rows.append(
                [
                    f"{title}, methods of peft" if of_peft else title,
                    str(architectures),
                    *(str(number) for number in count.values()),
                    share,
                ]
            )
    header = ["kind", "architectures", *_SIGNS, "works of those run"]
    return format_table(header, rows, right=header[1:])


def heads_table(rows: Iterable[str]) -> str:
    """A table of the heads that train with an adapter by default, one row per architecture."""
    lines = []
    for row in rows:
        if MODELS[row].missing_package:
            lines.append([row, "", "skipped", ""])
            continue
        backbone = find_backbone(MODELS[row].build())
        names = dict.fromkeys(re.sub(r"\.\d+$", ".*", path) for path in backbone.heads)
        read = f"{backbone.depth} of {backbone.depth + backbone.unread}"
        lines.append([row, backbone.class_name, ", ".join(f"`{name}`" for name in names) or "none", read])
    return format_table(["architecture", "backbone", "head that trains", "blocks that are read"], lines)


def to_markdown(matrix: Matrix) -> str:
    """The page: shares by kind, for each kind a table with methods as rows, one with peft's, heads, and reasons."""
    reasons: dict[str, int] = {}

    def shown(cell: Cell | None) -> str:
        if cell is None:
            return ""
        number = f" {reasons.setdefault(cell.reason, len(reasons) + 1)}" if cell.reason else ""
        return _SIGNS[cell.status] + number

    parts = [_INTRODUCTION, summary(matrix) + "\n", _LEGEND + "\n"]
    for kind, title in KINDS.items():
        rows = [row for row in matrix if MODELS[row].kind == kind]
        methods = sorted({name for row in rows for name in matrix[row]})
        if rows:
            parts.append(f"## {title}\n")
        for header, of_peft in (("method", False), ("method of peft", True)):
            group = [name for name in methods if (name in PEFT_METHODS) == of_peft]
            lines = [[name, *(shown(matrix[row].get(name)) for row in rows)] for name in group]
            if lines:
                parts.append(f"{format_table([header, *rows], lines)}\n")
    parts.append(f"## Task heads\n\n{_HEADS}\n\n{heads_table(matrix)}\n")
    if reasons:
        listed = [f"{number}. {reason}" for reason, number in reasons.items()]
        parts.append("## Reasons\n\n" + "\n".join(listed) + "\n")
    return "\n".join(parts)
