"""Plain-text tables and lists for the command line and for messages."""

from __future__ import annotations

from collections.abc import Sequence


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


def listed(names: Sequence[str]) -> str:
    """Names as a list in a sentence: "a, b and c"."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


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
