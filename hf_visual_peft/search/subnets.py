"""The subnets of a supernet: what can be chosen, what it costs, and which weights it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

from peft import PeftConfig, PeftModel
from torch import Tensor, nn


Choice = tuple[int, ...]  # for each gene, the index of its option
ADAPTER = "default"  # name of the supernet's adapter


@dataclass(frozen=True)
class Gene:
    """One thing that is chosen.

    Attributes:
        name: for messages.
        options: what it may be; the first is the smallest.
        mutation: probability with which a mutation draws it again.
    """

    name: str
    options: tuple[Any, ...]
    mutation: float


class Subnets(ABC):
    """All subnets of one supernet, on one model.

    Args:
        genes: what is chosen.

    Attributes:
        genes: the same.
    """

    def __init__(self, genes: Sequence[Gene]) -> None:
        self.genes = tuple(genes)

    @abstractmethod
    def canonical(self, choice: Choice) -> Choice:
        """The same subnet with genes that have no effect set to their first option."""

    @abstractmethod
    def parameters(self, choice: Choice) -> int:
        """Trained parameters of the subnet, without the task head."""

    @abstractmethod
    def smallest(self) -> Choice:
        """The subnet of the fewest parameters, of those that have any."""

    @abstractmethod
    def config(self, choice: Choice) -> PeftConfig:
        """The config of the subnet as an ordinary adapter."""

    @abstractmethod
    def tensors(self, choice: Choice, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What stands in the place of the supernet's weights while the subnet runs.

        Args:
            choice: the subnet.
            weights: of the supernet, by name.
        """

    @abstractmethod
    def own_weights(self, choice: Choice, weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The weights of the subnet as an ordinary adapter.

        Args:
            choice: the subnet.
            weights: of the supernet, by name.
            model: with the ordinary adapter, whose names they get.
        """

    @abstractmethod
    def describe(self, choice: Choice) -> dict[str, Any]:
        """The subnet as flags of `recipes/image_classification.py`."""

    @contextmanager
    def alone(self, choice: Choice) -> Iterator[None]:
        """Leave equations that the subnet lacks out inside the context."""
        yield

    def largest(self) -> Choice:
        """The whole supernet."""
        return self.canonical(tuple(len(gene.options) - 1 for gene in self.genes))

    def draw(self, generator: Random) -> Choice:
        """A subnet at random, with at least one parameter.

        Args:
            generator: of the numbers.
        """
        while True:
            choice = self.canonical(tuple(generator.randrange(len(gene.options)) for gene in self.genes))
            if self.parameters(choice) > 0:
                return choice


def weights_of(model: PeftModel) -> dict[str, nn.Parameter]:
    """The trained weights of the supernet, without copies of modules such as the task head.

    Args:
        model: with the supernet as an adapter.
    """
    prefix = f".{model.base_model.prefix}"
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if prefix in name and f".{ADAPTER}." in name.rpartition(prefix)[2]
    }
