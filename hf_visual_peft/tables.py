"""Plain-text tables and lists for the command line and for messages."""

from __future__ import annotations

import difflib
import io
import shutil
import sys
from collections.abc import Iterable, Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Lay cells out in columns that also read as a Markdown table.

    Args:
        header: names of the columns.
        rows: the cells of each row, one per column.
        right: columns to align right, e.g. those of numbers.

    Returns:
        The lines joined, without a final newline.
    """
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(header, cells, widths, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = ("-" * (width - 1) + (":" if name in right else "-") for name, width in zip(header, widths, strict=True))
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])


def listed(names: Sequence[str], word: str = "and") -> str:
    """Names as a list in a sentence: "a, b and c".

    Args:
        names: in their order.
        word: before the last one.
    """
    return f" {word} ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def close_names(word: str, known: Iterable[str], most: int = 3, cutoff: float = 0.6) -> list[str]:
    """The known names that a misspelt word may mean, the closest first.

    Args:
        word: as written.
        known: what there is.
        most: names.
        cutoff: how alike they must be, up to 1.
    """
    return difflib.get_close_matches(word, sorted(known), most, cutoff)


def did_you_mean(names: Iterable[str]) -> str:
    """The question of a message about an unknown name; empty if no names are close.

    Args:
        names: that are close, as of `close_names`.
    """
    quoted = [*map(repr, names)]
    return f"Did you mean {listed(quoted, 'or')}?" if quoted else ""


def format_columns(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Lay cells out in columns with two spaces between them, for a terminal.

    Args:
        header: names of the columns.
        rows: the cells of each row, one per column.
        right: columns to align right, e.g. those of numbers.
    """
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(header, cells, widths, strict=True)
        ).rstrip()
        for cells in (header, *rows)
    ]
    return "\n".join(lines)


def terminal_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = (), whole: Sequence[str] = ()
) -> str:
    """Lay cells out for the terminal: as wide as it is (80 columns where there is none), with cells that wrap.

    Args:
        header: names of the columns.
        rows: the cells of each row, one per column.
        right: columns to align right, e.g. those of numbers.
        whole: columns whose cells do not wrap, e.g. those of names.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in header:
        table.add_column(
            name,
            justify="right" if name in right else "left",
            no_wrap=name in right or name in whole,
            overflow="fold",
        )
    for cells in rows:
        table.add_row(*map(Text, cells))  # as text: a bracket in a cell is not markup
    page = io.StringIO()
    Console(file=page, width=shutil.get_terminal_size((80, 24)).columns, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in page.getvalue().rstrip().splitlines())


def show_markdown(text: str) -> None:
    """Print Markdown: laid out on a terminal, and as it is where the output goes elsewhere."""
    if not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))
