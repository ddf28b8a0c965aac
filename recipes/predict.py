"""Predict images with a saved adapter or model, and print a table, CSV or JSON.

    hf-visual-peft predict out/vpt photos/new 'more/*.jpg' --format csv --output new.csv
    find photos -name '*.jpg' | hf-visual-peft predict out/vpt -

MODEL is the folder of a run, or an adapter or model on the Hub. SOURCE is an image, a folder, a pattern, `-` for
standard input (names of files, one a line, or one image); or, alone, a table or zip file of images, a data set of the
Hub, or a folder that `save_to_disk` wrote. If there are labels, the figures follow. Other flags are those of
`hf-visual-peft train`, such as --base_model_name_or_path, --skip_corrupt_images and --per_device_eval_batch_size.

Exit status: 0 done, 1 error, 2 wrong flags.
"""

from __future__ import annotations

import hf_visual_peft  # noqa: F401  first: it hides notices that other packages print on import


# isort: split
import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from arguments import parse_args
from prediction import Saved, as_csv, run_prediction, table_of
from screen import Screen, progress_kind
from stopping import run_readably

from hf_visual_peft.sharing.files import write_aside
from hf_visual_peft.tables import format_table


FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".json": "json"}


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command; it also takes those of the recipe."""
    parser = argparse.ArgumentParser(
        prog="hf-visual-peft predict",
        usage="hf-visual-peft predict MODEL SOURCE [SOURCE ...] [flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of an adapter or model with a trained head")
    parser.add_argument("source", metavar="SOURCE", nargs="+", help="images; see above")
    parser.add_argument("--format", choices=["table", *FORMATS.values()], help="default: by --output, else table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    return parser


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this command, and the words for those of the recipe."""
    parser = build_parser()
    given, others = parser.parse_known_args(argv)
    given.format = given.format or (FORMATS.get(given.output.suffix, "table") if given.output else "table")
    if given.output is not None and not given.output.resolve().parent.is_dir():
        parser.error(f"--output {given.output}: the folder {given.output.resolve().parent} does not exist")
    return given, others


def as_table(rows: list[dict[str, Any]], width: int) -> str:
    """File, prediction and probability of each sample, and its label if any has one, in so many columns."""
    labelled = any(row["label"] is not None for row in rows)
    header = ("file", "prediction", "probability", *(["label"] if labelled else []))
    cells: list[list[str]] = []
    for row in rows:
        chances, best = row["probabilities"], row["prediction"]
        chance = "" if isinstance(best, list) else f"{chances[best]:.3f}"
        label = row["label"]
        label = ", ".join(label) if isinstance(label, list) else label or ""
        file = row["file"] if row["file"] is not None else f"sample {row['row']}"
        cells.append(
            [file, ", ".join(best) if isinstance(best, list) else best, chance, *([label] if labelled else [])]
        )
    flexible = [column for column, name in enumerate(header) if name != "probability"]
    room = width - 3 * len(header) - 1 - len("probability")
    for column in flexible[::-1]:  # the file gets what the others leave
        longest = max(len(line[column]) for line in [*cells, header])
        most = min(longest, max(room // 3, 10)) if column else max(room, 10)
        for line in cells:
            if len(line[column]) > most:
                line[column] = "…" + line[column][len(line[column]) - most + 1 :]
        room -= min(longest, most)
    return format_table(header, cells, right=["probability"])


def text_of(form: str, rows: list[dict[str, Any]], saved: Saved) -> str:
    """The predictions in a form, with a final newline."""
    if form == "csv":
        return as_csv(rows, saved)
    if form == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if form == "json":
        return json.dumps({"classes": saved.names, "predictions": rows}, indent=1, ensure_ascii=False) + "\n"
    return as_table(rows, min(shutil.get_terminal_size().columns, 120)) + "\n"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Predict, print or write; return the rows."""
    given, others = parse(argv)
    words = ["--model_name_or_path", given.model, "--do_predict", *given.source, *others]
    # nothing is written there
    args, _ = parse_args([*words, "--output_dir", ".", "--overwrite_output_dir"], __doc__)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the predictions
        accelerator = Accelerator(mixed_precision=args.mixed_precision)
        if accelerator.num_processes > 1 and "-" in given.source:
            raise ValueError("SOURCE -: standard input needs a single process.")
        Screen(accelerator, progress_kind(args.progress))
        saved, rows, found = run_prediction(accelerator, args)
    if accelerator.is_main_process:
        text = text_of(given.format, rows, saved)
        if given.output:
            write_aside(given.output, text)
        else:
            sys.stdout.write(text)
        if found:
            print(table_of(found), file=sys.stdout if given.format == "table" and not given.output else sys.stderr)
    return rows


if __name__ == "__main__":
    run_readably(main, show_traceback=parse()[0].traceback)
