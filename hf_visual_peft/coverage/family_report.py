"""The results of families as a page: counts, a row per family, and reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import metadata

from ..tables import format_table
from .cell import Status
from .family_models import LIBRARIES, Library
from .family_runs import BACKBONE, METHODS, SIZE, Result, Results


COMMAND = (
    "hf-visual-peft coverage --families timm,transformers --names --json families.jsonl --markdown docs/families.md"
)
_SIGNS: dict[Status, str] = {"works": "✓", "skipped": "·", "not applicable": "-", "fails": "✗"}
_WORDS: dict[Status, str] = {
    "works": "works", "skipped": "not run", "not applicable": "refused", "fails": "fails"
}  # fmt: skip
_INTRODUCTION = f"""# On which families of models a method works

Written by `{COMMAND}`; with `--dry` nothing is run.

Nothing is named by hand, neither models nor modules. A family is a module file of timm, for which its smallest model
stands, or a folder of transformers with a model that takes pictures, for which the first of its classes stands that
can be built from its default config, with two layers, few words and, if it then still runs, a quarter of the width
and small images; timm's models from 5 M parameters on have two blocks where they take `depth`. Weights are random.
*Works* means that two steps on the adapter alone move the output by at least 1e-5 of its scale, that
`disable_adapter` gives the base model's output to the bit and the saved adapter on a fresh base the same output to
the bit, and that merging in double precision, where the method can be merged, keeps the output to 1e-5. For
`linearprobe` it means that a task head was found and trains. A model that holds several backbones counts if each of
them is found, when it is chosen.

What stands in the file is not asked again, so that rows may come from runs of earlier states of the code. A table
counts the families that were asked the question of its row; "not run" is said of models that were adapted without
weights and not run, and of those that could not be built from their default config.
"""
_LEGEND = (
    "✓ works, · accepted and not run, - refused, ✗ fails. A number is that of the reason or, where a method works, of "
    "a restriction; the reasons are below the tables."
)


def failures(results: Iterable[Result]) -> list[str]:
    """The results that are faults, one per line."""
    return [
        f"{result.library}, {result.family}: {result.item} on {_short(result.model)}: {result.reason}"
        for result in results
        if result.status == "fails"
    ]


def counts(results: Results) -> str:
    """The number of families that each method works on, and of models with a backbone that was found."""
    parts = []
    for library in LIBRARIES:
        rows = _rows(results, library)
        if not rows:
            continue
        lines = []
        for item in _items(rows):
            count = Counter(cells[item].status for cells in rows.values() if item in cells)
            name = "backbone found" if item == BACKBONE else item
            lines.append([name, *(str(count[status]) for status in _SIGNS), str(sum(count.values()))])
        header = [library, *_WORDS.values(), "families"]
        parts.append(format_table(header, lines, right=header[1:]))
        asked = [each for each in results.found.values() if each.library == library and each.item == BACKBONE]
        found = sum(each.status == "works" for each in asked)
        some = len({each.family for each in asked if each.status == "works"})
        every = len({each.family for each in asked})
        parts.append(
            f"A backbone is found in {some} of {every} families of {library}, and in {found:,} of the {len(asked):,} "
            "models that were asked."
        )
    return "\n\n".join(parts)


def to_markdown(results: Results) -> str:
    """The page."""
    reasons: dict[str, int] = {}
    parts = [_INTRODUCTION, _versions() + "\n", counts(results) + "\n", _LEGEND + "\n"]
    for library in LIBRARIES:
        rows = _rows(results, library)
        items = _items(rows)
        lines = [
            [family, _short(next(iter(cells.values())).model), *(_shown(cells.get(item), reasons) for item in items)]
            for family, cells in sorted(rows.items())
        ]
        if lines:
            parts.append(f"## {library}\n\n{format_table(['family', 'model', *items], lines)}\n")
    if reasons:
        parts.append("## Reasons\n\n" + "\n".join(f"{number}. {reason}" for reason, number in reasons.items()) + "\n")
    return "\n".join(parts)


def _versions() -> str:
    names = ("timm", "transformers", "peft", "torch")
    found = {name: version for name in names if (version := _version(name))}
    return f"Versions: {', '.join(f'{name} {version}' for name, version in found.items())}."


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _shown(result: Result | None, reasons: dict[str, int]) -> str:
    if result is None:
        return ""
    said = _without_names(result)
    number = f" {reasons.setdefault(said, len(reasons) + 1)}" if said else ""
    return _SIGNS[result.status] + number


def _without_names(result: Result) -> str:
    """The reason without the names of config and class, which are those of the column and row."""
    before, colon, after = result.reason.partition(": ")
    return (
        after
        if colon and result.status == "not applicable" and " " not in before.split(" does not fit ")[0]
        else result.reason
    )


def _rows(results: Results, library: Library) -> dict[str, dict[str, Result]]:
    """Results of the model that stands for each family, by family and item.

    It is one in which a backbone was found, if there is any, of these one that methods were tried on; else the last.
    """
    asked = [each for each in results.found.values() if each.library == library and each.item != SIZE]
    found = {each.model for each in asked if each.item == BACKBONE and each.status == "works"}
    standing: dict[str, str] = {}
    for each in sorted(asked, key=lambda each: (each.model in found, each.item != BACKBONE)):
        standing[each.family] = each.model
    rows: dict[str, dict[str, Result]] = {}
    for each in asked:
        if each.model == standing[each.family]:
            rows.setdefault(each.family, {})[each.item] = each
    return rows


def _items(rows: dict[str, dict[str, Result]]) -> Sequence[str]:
    asked = {item for cells in rows.values() for item in cells}
    usual = [item for item in (BACKBONE, *METHODS) if item in asked]
    return [*usual, *sorted(asked - set(usual))]


def _short(model: str) -> str:
    return model.rpartition(".")[2]
