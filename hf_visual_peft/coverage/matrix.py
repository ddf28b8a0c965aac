"""All cells of the matrix: processes share the architectures, and build a model once for all methods."""

from __future__ import annotations

import gc
import multiprocessing
import os
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed

from tqdm.auto import tqdm

from ..core.registry import list_methods
from ..peft_methods.methods import any_method
from .cell import Cell, broken, run_cell
from .models import MODELS


# the fast subset: every method on these architectures, and these methods on every architecture; test_conformance.py
# looks at every method on ViT, DINOv2 and their like
FAST_ARCHITECTURES = ("swin", "pvt_v2", "convnext", "timm_vit")
FAST_METHODS = ("adaptformer", "bitfit", "ssf", "vpt")

Matrix = dict[str, dict[str, Cell]]  # by architecture and method


def choose_cells(
    methods: Iterable[str] | None = None, architectures: Iterable[str] | None = None, fast: bool = False
) -> dict[str, list[str]]:
    """The methods to run by architecture, in the order of the catalogue.

    Args:
        methods: names, of peft's methods, too; all of this library by default.
        architectures: names; all by default.
        fast: whether to run only the fast subset of these.

    Raises:
        ValueError: a name is unknown, or nothing is left to run.
    """
    chosen = list(list_methods()) if methods is None else sorted({any_method(name).name for name in methods})
    rows = list(MODELS) if architectures is None else list(architectures)
    unknown = [name for name in rows if name not in MODELS]
    if unknown:
        raise ValueError(f"Unknown architecture {unknown[0]!r}: choose of {', '.join(MODELS)}.")
    cells = {
        row: [name for name in chosen if not fast or row in FAST_ARCHITECTURES or name in FAST_METHODS]
        for row in MODELS
        if row in rows
    }
    cells = {row: names for row, names in cells.items() if names}
    if not cells:
        raise ValueError(f"The fast subset has none of the methods {', '.join(chosen)} on {', '.join(rows)}.")
    return cells


def run_matrix(cells: Mapping[str, list[str]], jobs: int | None = None, progress: bool = True) -> Matrix:
    """Run the cells.

    Args:
        cells: methods by architecture, see `choose_cells`.
        jobs: processes; by default one per core. With one everything runs in this process.
        progress: whether to show a bar.

    Raises:
        RuntimeError: a process died, for example without memory.
    """
    jobs = min(jobs or _cores(), len(cells))
    found: Matrix = {}
    with tqdm(total=sum(map(len, cells.values())), desc="Cells", disable=not progress) as bar:
        if jobs == 1:
            for row, names in cells.items():
                found[row] = run_row(row, names)
                bar.update(len(names))
            return {row: found[row] for row in cells}
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_prepare) as pool:
            rows = {pool.submit(run_row, row, names): row for row, names in cells.items()}
            for future in as_completed(rows):
                found[rows[future]] = future.result()
                bar.update(len(cells[rows[future]]))
    return {row: found[row] for row in cells}


def run_row(row: str, names: Iterable[str]) -> dict[str, Cell]:
    """The cells of one architecture."""
    tiny = MODELS[row]
    if tiny.missing_package:
        return {name: Cell("skipped", f"{tiny.missing_package} is not installed") for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random tiny models and merged biases cause many
        try:
            base = tiny.model()
        except Exception as error:  # another version of a library than this catalogue knows; the other rows go on
            return {name: Cell("fails", f"building: {broken(error)}") for name in names}
        return {name: run_cell(any_method(name), tiny, base) for name in names}


def _cores() -> int:
    """The number of cores that this process may use, if the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare() -> None:
    """Set up a process of the pool: one thread, because there is a process per core, and no messages over the bar."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    gc.freeze()  # what was imported stays, and is not searched for garbage again and again
    gc.set_threshold(20_000, 20, 20)
