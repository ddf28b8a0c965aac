"""What a search space declares, apart from any model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from ..backbones.frozen_norms import freeze_norms
from ..core.config import VisualPeftConfig
from ..peft_methods.methods import with_visual_targets
from .subnets import Subnets


class Space(ABC):
    """A search space."""

    @classmethod
    @abstractmethod
    def read(cls, given: Mapping[str, Any]) -> Space:
        """A space from the keys of its file, without `method`.

        Raises:
            ValueError: a key is not known, or a value is not valid.
        """

    @abstractmethod
    def supernet(self, model: nn.Module) -> PeftConfig:
        """The config of the largest adapter.

        Args:
            model: to be adapted.
        """

    @abstractmethod
    def subnets(self, model: PeftModel) -> Subnets:
        """All subnets.

        Args:
            model: with the supernet.

        Raises:
            ValueError: they are not parts of the supernet, or the model has too few blocks.
        """

    def put_on(self, model: nn.Module) -> PeftModel:
        """Put the supernet on a model, with its task head.

        Args:
            model: to be adapted, in place.
        """
        return put_on(model, self.supernet(model))


def put_on(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Put an adapter on a model, with its task head, of this library or of peft.

    Args:
        model: to be adapted, in place.
        config: of the adapter.
    """
    adapted: Any = get_peft_model(model, with_visual_targets(config, model))
    if not isinstance(config, VisualPeftConfig):
        freeze_norms(adapted)  # methods of this library do it themselves
    return adapted


def check_keys(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuse keys that are not known.

    Args:
        given: by key.
        known: valid keys.
        where: for the message.

    Raises:
        ValueError: there is one.
    """
    unknown = [str(key) for key in given if key not in known]
    if unknown:
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}. Known are {', '.join(known)}.")


def check_options(value: Any, where: str, low: int) -> tuple[int, ...]:
    """Options that are integers in ascending order.

    Args:
        value: to be checked.
        where: for the message.
        low: the smallest that is allowed.

    Raises:
        ValueError: they are not.
    """
    fine = isinstance(value, list | tuple) and len(value) > 0 and all(type(each) is int for each in value)
    if not fine or list(value) != sorted(set(value)) or value[0] < low:
        raise ValueError(f"{where} is {value!r}: must be a list of integers from {low}, ascending.")
    return tuple(value)
