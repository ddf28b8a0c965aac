"""Cells of families: run in processes with a time limit, written at once, and not run twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..peft_methods.methods import any_method
from .cell import Cell, Status, accept, copied, is_ours, run_cell, what_went_wrong
from .family_models import (
    Library,
    NotRunnableError,
    backbones_of,
    count,
    on_meta,
    parameters_of,
    runnable,
    timm_families,
    transformers_families,
)
from .tiny import TinyModel


# methods of every kind: branches, prompts, scales, convolutions, side network, biases, factors, norms, linears, head
METHODS = ("adaptformer", "vpt", "ssf", "convpass", "lst", "bitfit", "fact", "lora", "ln_tuning", "linearprobe")
_NOT_BUILT = "not built: "
_LATE = 124  # exit code of a process that was late
_DYING = 10.0  # seconds until a process that closed its connection has ended
SIZE, BACKBONE = "size", "backbone"  # what else is asked of a model: how many parameters, and whether it is known


@dataclass(frozen=True)
class Result:
    """The result of one question to one model.

    Attributes:
        library: that contains the model.
        family: of the model.
        model: its name.
        item: a method, or `SIZE` or `BACKBONE`.
        status: as of a cell; `"skipped"` where the model was adapted and not run.
        reason: why it does not work or was not run, or a restriction.
        parameters: number of the model's parameters, if counted.
    """

    library: Library
    family: str
    model: str
    item: str
    status: Status
    reason: str = ""
    parameters: int = 0

    @property
    def key(self) -> tuple[str, str, str]:
        """The question."""
        return self.library, self.model, self.item


@dataclass(frozen=True)
class Task:
    """Questions to one model, in order; `dry` if it is only adapted, without weights."""

    library: Library
    family: str
    model: str
    items: tuple[str, ...]
    dry: bool = False

    def result(self, item: str, cell: Cell, parameters: int = 0) -> Result:
        """The answer to one of them."""
        return Result(self.library, self.family, self.model, item, cell.status, cell.reason, parameters)


class Results:
    """A file of results, one per line; questions in it are not asked again.

    Args:
        path: of the file, which is created if it does not exist. None keeps the results in memory only.

    Raises:
        ValueError: the file holds something else.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.found: dict[tuple[str, str, str], Result] = {}
        if path is None or not path.exists():
            return
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                result = Result(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}, is not a result of hf-visual-peft coverage --families: {error}. Choose "
                    "another file, or delete this line."
                ) from error
            self.found[result.key] = result

    def add(self, result: Result) -> None:
        """Keep a result, and write it at once."""
        self.found[result.key] = result
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result), ensure_ascii=False) + "\n")

    def open_tasks(self, tasks: Iterable[Task]) -> list[Task]:
        """The tasks without a result."""
        open_items = (
            replace(task, items=tuple(i for i in task.items if (task.library, task.model, i) not in self.found))
            for task in tasks
        )
        return [task for task in open_items if task.items]


def run_families(
    results: Results,
    libraries: Collection[Library],
    methods: Sequence[str] = METHODS,
    only: Collection[str] | None = None,
    names: bool = False,
    jobs: int = 1,
    limit: float = 120.0,
    dry: bool = False,
) -> None:
    """Run the methods on one model of every family, of timm the smallest, and add the results.

    Args:
        results: existing results.
        libraries: whose families to run.
        methods: names, of peft's methods, too.
        only: families; all by default.
        names: whether to look for a backbone in every model of a family; else only in one.
        jobs: processes.
        limit: seconds of processor time for one method on one model.
        dry: whether to adapt the models without weights, and not to run them.

    Raises:
        ValueError: a method or a family is unknown.
        ModuleNotFoundError: timm is wanted and not installed.
    """
    items = tuple(dict.fromkeys(any_method(name).name for name in methods))
    families = {
        library: timm_families() if library == "timm" else transformers_families(only) for library in libraries
    }
    known = sorted({name for found in families.values() for name in found})
    unknown = sorted(set(only or ()) - set(known))
    if unknown:
        raise ValueError(f"Unknown family {unknown[0]!r}: choose of {', '.join(known)}.")
    chosen = [
        (library, family, models)
        for library, found in families.items()
        for family, models in found.items()
        if only is None or family in only
    ]
    _prepare(results, chosen, jobs, limit)
    tasks = []
    for library, family, models in chosen:
        one = representative(results, library, models)
        tasks.append(Task(library, family, one, (BACKBONE, *items), dry))
        if names:
            tasks += [Task(library, family, model, (BACKBONE,)) for model in models if model != one]
    _work(results, tasks, jobs, limit, "Methods on families")


def _prepare(results: Results, chosen: Iterable[tuple[Library, str, list[str]]], jobs: int, limit: float) -> None:
    """Count the models of families of timm without results, and find one of transformers that can be built."""
    todo: list[Task] = []
    known = {(each.library, each.family) for each in results.found.values() if each.item not in (SIZE, BACKBONE)}
    for library, family, models in chosen:
        if library == "timm" and (library, family) not in known:  # the smallest is not known before all are counted
            todo += [Task(library, family, model, (SIZE,)) for model in models]
    _work(results, todo, jobs, limit, "Models counted")
    found = [each for each in chosen if each[0] == "transformers"]
    while found:
        before = len(results.found)
        tasks = [
            Task(library, f, representative(results, library, models), (BACKBONE,)) for library, f, models in found
        ]
        _work(results, tasks, jobs, limit, "Backbones")
        if len(results.found) == before:
            break


def representative(results: Results, library: Library, models: Sequence[str]) -> str:
    """The model that represents its family: the one that results exist for, or of timm the smallest.

    Of transformers, it is the first that can be built from its default config.
    """
    asked = {each.model for each in results.found.values() if each.item not in (SIZE, BACKBONE)}
    found = {m: each for m in models for item in (SIZE, BACKBONE) if (each := results.found.get((library, m, item)))}
    if library == "transformers":
        return next((m for m in models if m not in found or not found[m].reason.startswith(_NOT_BUILT)), models[0])
    if not asked.isdisjoint(models):
        return next(model for model in models if model in asked)
    return min(models, key=lambda m: (found[m].parameters if m in found else 0) or float("inf"))


def answers(task: Task) -> Iterator[Result]:
    """Ask a model everything, in this process."""
    for item in task.items:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # random models cause many
            if item == SIZE:
                yield _size(task)
            elif item == BACKBONE:
                yield _backbone(task)
            else:
                yield task.result(item, _method(task, item))


def _size(task: Task) -> Result:
    try:
        return task.result(SIZE, Cell("works"), parameters_of(task.library, task.model))
    except Exception as error:  # any: a model that cannot be built is not the fault of a method
        return task.result(SIZE, Cell("skipped", what_went_wrong(error)))


def _backbone(task: Task) -> Result:
    try:
        model = _without_weights(task.library, task.model)
    except Exception as error:  # the same
        return task.result(BACKBONE, Cell("skipped", f"{_NOT_BUILT}{what_went_wrong(error)}"))
    try:
        paths = backbones_of(model)
    except Exception as error:  # ours is a refusal, any other a fault
        return task.result(BACKBONE, Cell(*_refused_or_broken(error)), count(model))
    said = "" if paths == (None,) else f"several, of which backbone= chooses one: {', '.join(map(repr, paths))}"
    return task.result(BACKBONE, Cell("works", said), count(model))


def _refused_or_broken(error: Exception) -> tuple[Status, str]:
    return ("not applicable" if is_ours(error) else "fails"), what_went_wrong(error)


def _method(task: Task, name: str) -> Cell:
    method = any_method(name)
    subject = "no run was asked for" if task.dry else _subject(task.library, task.model)
    if isinstance(subject, str):
        try:
            model = _without_weights(task.library, task.model)
        except NotRunnableError as error:
            return Cell("skipped", f"{_NOT_BUILT}{error}")
        cell = accept(method, copied(model))
        return Cell("skipped", f"accepted, not run: {subject}") if cell.status == "works" else cell
    return run_cell(method, *subject, alone=True)


@lru_cache(maxsize=1)
def _without_weights(library: Library, name: str) -> nn.Module:
    """A model on the meta device, of which only copies are adapted."""
    return on_meta(library, name)


@lru_cache(maxsize=1)
def _subject(library: Library, name: str) -> tuple[TinyModel, nn.Module] | str:
    """A model that can be run, and an instance with weights; or the reason why there is none."""
    try:
        tiny = runnable(library, name)
        return tiny, tiny.model()
    except NotRunnableError as error:
        return str(error)


class _Worker:
    """A process that works on tasks, one after the other."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.connection.recv()  # it has imported all, which takes long where others run
        self.task: Task | None = None

    def give(self, task: Task, limit: float) -> None:
        self.task = task
        self.connection.send((task, limit))

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection) -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    connection.send(None)
    while True:
        try:
            task, limit = connection.recv()
        except EOFError:
            return
        clock = _Clock(limit)
        for result in answers(task):
            connection.send(result)
            clock.start()
        clock.stop()


class _Clock:
    """Ends this process when one question took too much processor time, however busy the machine is."""

    def __init__(self, limit: float) -> None:
        self.limit, self._stopped = limit, threading.Event()
        self.start()
        threading.Thread(target=self._watch, daemon=True).start()

    def start(self) -> None:
        self._due = time.process_time() + self.limit

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.limit)):
            if time.process_time() > self._due:
                os._exit(_LATE)


def _work(results: Results, tasks: Iterable[Task], jobs: int, limit: float, title: str) -> None:
    """Run the open items of some tasks. A process that is late or dies costs one result, and is replaced."""
    queue = results.open_tasks(tasks)[::-1]
    # images and weights are random: a download would be a mistake, and slow
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    bar = tqdm(total=sum(len(task.items) for task in queue), desc=title, disable=not queue)
    workers: list[_Worker] = []
    try:
        while queue or any(worker.task for worker in workers):
            while queue and len(workers) < jobs:
                workers.append(_Worker())
            for worker in workers:
                if worker.task is None and queue:
                    worker.give(queue.pop(), limit)
            busy = {worker.connection: worker for worker in workers if worker.task}
            ready: list[Any] = wait(list(busy))
            for connection in ready:
                worker = busy[connection]
                results.add(_received(worker, limit))
                bar.update()
                rest = worker.task.items[1:]  # type: ignore[union-attr]
                left = replace(worker.task, items=rest) if rest else None  # type: ignore[type-var]
                if worker.process.is_alive():
                    worker.task = left
                else:
                    workers.remove(worker)
                    queue += [left] if left else []
    finally:
        bar.close()
        for worker in workers:
            worker.stop()


def _received(worker: _Worker, limit: float) -> Result:
    assert worker.task is not None
    try:
        return worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join(_DYING)
        code = worker.process.exitcode
        worker.stop()
        late = Cell("skipped", f"not done in {limit:.0f} s of processor time")
        return worker.task.result(
            worker.task.items[0], late if code == _LATE else Cell("fails", f"its process died with exit code {code}")
        )
