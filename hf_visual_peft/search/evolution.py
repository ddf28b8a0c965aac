"""Evolution of subnets under a cap on trained parameters.

It is written here and not taken from a library for two reasons. A killed search must give the same result as one that
was not: Optuna keeps trials in a study, but not the state of its samplers, and DEAP leaves saving to the caller. And
the cap is strict: in Optuna a constraint only makes a trial worse, so that evaluations are spent on what cannot be
chosen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tqdm.auto import tqdm

from ..sharing.files import write_aside
from .subnets import Choice, Subnets


_TRIES = 100  # draws before a candidate that is known already is taken


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        choice: the best subnet.
        fitness: its fitness.
        parameters: that it trains, without the task head.
        evaluated: number of subnets that were evaluated.
        history: the best fitness after each generation, the first one included.
    """

    choice: Choice
    fitness: float
    parameters: int
    evaluated: int
    history: tuple[float, ...]


def evolve(
    subnets: Subnets,
    fitness: Callable[[Choice], float],
    *,
    max_parameters: int,
    population: int = 50,
    parents: int = 10,
    mutations: int = 25,
    crossovers: int = 25,
    generations: int = 15,
    seed: int = 0,
    record: str | Path | None = None,
    writes: bool = True,
    progress: bool = True,
) -> Found:
    """Find a subnet of high fitness with at most so many parameters, as NOAH (arXiv 2206.04673) does.

    The first generation is drawn at random. Each of the next ones has `mutations` changed copies and `crossovers`
    mixtures of the `parents` best subnets so far. A candidate above the cap is made smaller, gene by gene, until it
    fits. Of equally fit subnets the one with fewer parameters is better, and of these the earlier one.

    The same seed and the same fitness give the same result. `record` keeps the fitness of every subnet as soon as it
    is known; a search that was killed and is called again with the same arguments takes it from there.

    Args:
        subnets: of a supernet.
        fitness: of a subnet, measured on validation images; the greater the better.
        max_parameters: the cap, without the task head.
        population: size of the first generation.
        parents: number of the best subnets that others are made of.
        mutations: changed copies in a generation.
        crossovers: mixtures in a generation.
        generations: after the first one.
        seed: of all draws.
        record: file for what is known; it is written aside and renamed.
        writes: whether this process writes it; in a distributed run, only one does.
        progress: whether to show a bar.

    Raises:
        ValueError: an argument is out of range, the smallest subnet exceeds the cap, a fitness is not finite, or the
            record is of another search or damaged.
    """
    numbers = {
        "max_parameters": (max_parameters, 1), "population": (population, 1), "parents": (parents, 1),
        "mutations": (mutations, 0), "crossovers": (crossovers, 0), "generations": (generations, 0), "seed": (seed, 0),
    }  # fmt: skip
    for name, (value, low) in numbers.items():
        if type(value) is not int or value < low:
            raise ValueError(f"{name} is {value!r}: must be an integer of at least {low}.")
    if parents > population:
        raise ValueError(f"parents is {parents}: must be at most population, {population}.")
    if generations and not mutations + crossovers:
        raise ValueError("mutations and crossovers are both 0: give at least one of them, or generations=0.")
    smallest = subnets.smallest()
    if subnets.parameters(smallest) > max_parameters:
        raise ValueError(
            f"max_parameters is {max_parameters:,}: the smallest subnet of the space has "
            f"{subnets.parameters(smallest):,} parameters without the task head. Raise the cap, or give the space "
            "smaller options."
        )
    settings: dict[str, Any] = {name: value for name, (value, _) in numbers.items()}
    settings["genes"] = [[gene.name, list(gene.options), gene.mutation] for gene in subnets.genes]
    known = _read(Path(record), settings) if record is not None else {}
    draws = Random(f"evolution {seed}")
    measured: dict[Choice, float] = {}

    def measure(choice: Choice) -> None:
        if choice not in known:
            value = float(fitness(choice))
            if not math.isfinite(value):
                raise ValueError(f"The fitness of a subnet is {value}: train the supernet at a lower rate.")
            known[choice] = value
            if record is not None and writes:
                _write(Path(record), settings, known)
        measured[choice] = known[choice]

    def ranked() -> list[Choice]:
        return sorted(measured, key=lambda choice: (-measured[choice], subnets.parameters(choice)))  # stable

    def fresh(make: Callable[[], Choice]) -> Choice:
        """A candidate within the cap, a new one if such is found."""
        for _ in range(_TRIES):
            choice = _within(subnets, make(), max_parameters, draws)
            if choice not in measured:
                break
        return choice

    total = population + generations * (mutations + crossovers)
    history = []
    with tqdm(total=total, desc="Evolution", unit="subnet", disable=not progress) as bar:
        for generation in range(generations + 1):
            best = ranked()[:parents]
            makers: list[Callable[[], Choice]] = [lambda: subnets.draw(draws)] * population
            if generation:
                makers = [lambda: _mutated(subnets, draws.choice(best), draws)] * mutations  # noqa: B023 - called now
                makers += [lambda: _mixed(subnets, draws.choice(best), draws.choice(best), draws)] * crossovers  # noqa: B023
            for make in makers:
                measure(fresh(make))
                bar.update()
            top = ranked()[0]
            history.append(measured[top])
            bar.set_postfix(best=f"{measured[top]:.4f}", parameters=f"{subnets.parameters(top):,}", refresh=False)
    return Found(top, measured[top], subnets.parameters(top), len(measured), tuple(history))


def _mutated(subnets: Subnets, parent: Choice, draws: Random) -> Choice:
    """A copy in which some genes are drawn again."""
    changed = tuple(
        draws.randrange(len(gene.options)) if draws.random() < gene.mutation else option
        for gene, option in zip(subnets.genes, parent, strict=True)
    )
    return subnets.canonical(changed)


def _mixed(subnets: Subnets, one: Choice, other: Choice, draws: Random) -> Choice:
    """Each gene from one of two parents."""
    return subnets.canonical(tuple(draws.choice(pair) for pair in zip(one, other, strict=True)))


def _within(subnets: Subnets, choice: Choice, max_parameters: int, draws: Random) -> Choice:
    """The subnet itself, or a smaller one that the cap allows and that has parameters."""
    while not 0 < subnets.parameters(choice) <= max_parameters:
        smaller = []
        for index, option in enumerate(choice):
            if option:
                other = subnets.canonical((*choice[:index], option - 1, *choice[index + 1 :]))
                if 0 < subnets.parameters(other) < subnets.parameters(choice):
                    smaller.append(other)
        if not smaller:
            return subnets.smallest()
        choice = draws.choice(smaller)
    return choice


def _write(path: Path, settings: dict[str, Any], known: dict[Choice, float]) -> None:
    content = {"settings": settings, "fitness": [[list(choice), value] for choice, value in known.items()]}
    write_aside(path, json.dumps(content) + "\n")


def _read(path: Path, settings: dict[str, Any]) -> dict[Choice, float]:
    """What an earlier call with the same settings measured."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        before, known = content["settings"], {tuple(choice): float(value) for choice, value in content["fitness"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"record {path} is damaged or no record of a search: delete it to start anew.") from error
    now = json.loads(json.dumps(settings))
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        told = [f"{name} {before.get(name)} (now {now[name]})" if name != "genes" else "another space or model"
                for name in changed]  # fmt: skip
        raise ValueError(
            f"record {path} is of a search with {', '.join(told)}: it cannot continue with other settings. Delete it, "
            "or name another file."
        )
    return known
