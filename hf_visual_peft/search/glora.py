"""The paths of Generalized LoRA as a search space, on peft's GLORA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import GloraConfig, PeftModel
from torch import Tensor, nn

from ..backbones.finding import find_backbone
from .spaces import Space, check_keys, check_options
from .subnets import Choice, Gene, Subnets


PATHS = {
    "config_A_B": ("none", "constant", "vector", "lora"),
    "config_C": ("none", "vector", "lora"),
    "config_D_E": ("none", "constant", "vector"),
}
ROLES = ("query", "key", "value", "output", "fc1", "fc2")
PATH_MUTATION, LINEAR_MUTATION = 0.4, 0.2


@dataclass(frozen=True)
class GLoRASpace(Space):
    """Forms of GLoRA's five terms, a rank, and the linears that have them.

    GLoRA (arXiv 2306.07967) draws a form of each term for each linear. A `GloraConfig` has one form of A and B, one of
    C, and one of D and E for all its linears, so that these are chosen for all, and for each linear whether it is one.

    Attributes:
        ranks: options.
        paths: options by field of `GloraConfig`, in the order of their size.
        roles: linears that may be chosen.
    """

    ranks: tuple[int, ...]
    paths: Mapping[str, tuple[str, ...]]
    roles: tuple[str, ...]

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> GLoRASpace:
        """From `r`, the three forms and `roles`."""
        check_keys(given, ("method", "r", *PATHS, "roles"), "search space")
        paths = {name: _some(given, name, known) for name, known in PATHS.items()}
        if all(options == ("none",) for options in paths.values()):
            raise ValueError("search space: config_A_B, config_C and config_D_E allow only none, so nothing trains.")
        return cls(check_options(given.get("r"), "search space: r", 1), paths, _some(given, "roles", ROLES))

    def supernet(self, model: nn.Module) -> GloraConfig:
        """All linears with the largest options."""
        targets = find_backbone(model).modules(self.roles)
        if not targets:
            raise ValueError(
                f"search space: {type(model).__name__} has none of {', '.join(self.roles)}. Name other roles."
            )
        largest: Any = {name: options[-1] for name, options in self.paths.items()}
        return GloraConfig(r=self.ranks[-1], target_modules=targets, **largest)

    def subnets(self, model: PeftModel) -> GLoRASubnets:
        """On this model."""
        return GLoRASubnets(self, model)


def _some(given: Mapping[str, Any], name: str, known: Sequence[str]) -> tuple[str, ...]:
    """Options of one key in their own order; all by default."""
    value = given.get(name, known)
    if not isinstance(value, list | tuple) or not value or not set(map(str, value)) <= set(known):
        raise ValueError(f"search space: {name} is {value!r}: must be a list of some of {', '.join(known)}.")
    return tuple(each for each in known if each in value)


class GLoRASubnets(Subnets):
    """The subnets of a `GLoRASpace` on one model.

    Weights are shared as in GLoRA: a low-rank term of rank k is that of the supernet cut to k, a vector is the first
    column of its first factor, and a constant is the first number in it.

    Args:
        space: declares them.
        model: with the supernet.
    """

    def __init__(self, space: GLoRASpace, model: PeftModel) -> None:
        self.space = space
        self._targets = find_backbone(model.get_base_model()).modules(space.roles)
        linears: Any = {path: model.get_base_model().get_submodule(path) for path in self._targets}
        self._sizes = {
            path: (module.out_features, module.in_features, module.bias is not None)
            for path, module in linears.items()
        }
        genes = [Gene("r", space.ranks, PATH_MUTATION)]
        genes += [Gene(name, options, PATH_MUTATION) for name, options in space.paths.items()]
        genes += [Gene(path, (False, True), LINEAR_MUTATION) for path in self._targets]
        super().__init__(genes)

    def options(self, choice: Choice) -> dict[str, Any]:
        """The chosen options by gene."""
        return {gene.name: gene.options[option] for gene, option in zip(self.genes, choice, strict=True)}

    def canonical(self, choice: Choice) -> Choice:
        """With the first rank if no term has one."""
        chosen = self.options(choice)
        ranked = "lora" in (chosen["config_A_B"], chosen["config_C"])
        return choice if ranked else (0, *choice[1:])

    def parameters(self, choice: Choice) -> int:
        """The sum over linears."""
        chosen = self.options(choice)
        return sum(self._cost(chosen, path) for path in self._targets if chosen[path])

    def smallest(self) -> Choice:
        """One linear, with one term."""
        found = []
        terms = [range(len(gene.options)) for gene in self.genes[1:4]]
        options = [(0, 0, 0)]
        for index, term in enumerate(terms):
            options += [tuple(own if i == index else 0 for i in range(3)) for own in term]  # type: ignore[misc]
        for three in options:
            for index in range(len(self._targets)):
                on = tuple(int(i == index) for i in range(len(self._targets)))
                found.append(self.canonical((0, *three, *on)))
        return min((each for each in found if self.parameters(each)), key=self.parameters)

    def config(self, choice: Choice) -> GloraConfig:
        """On the chosen linears, by their full names."""
        return GloraConfig(**{name: value for name, value in self.describe(choice).items() if name != "method"})

    def describe(self, choice: Choice) -> dict[str, Any]:
        """As fields of the config."""
        chosen = self.options(choice)
        targets = [path for path in self._targets if chosen[path]]
        return {"method": "glora", "r": chosen["r"], "target_modules": targets, **{n: chosen[n] for n in PATHS}}

    def tensors(self, choice: Choice, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Factors whose product is the chosen form of a term."""
        chosen, found = self.options(choice), {}
        for name, tensor in weights.items():
            path, term, last = _parse(name)
            form = chosen[_field(term)] if chosen[path] else "none"
            if last == "X":  # no product
                found[name] = {"none": torch.zeros_like(tensor), "constant": tensor[:1]}.get(form, tensor)
            elif form == "lora":
                found[name] = tensor[:, : chosen["r"]] if last == "Xd" else tensor[: chosen["r"]]
            elif last == "Xd":
                rows = 1 if form == "constant" or (form == "none" and term != "C") else len(tensor)
                found[name] = tensor.new_zeros(rows, 1) if form == "none" else tensor[:rows, :1]
            else:
                found[name] = tensor.new_ones(1, 1)
        return found

    def own_weights(self, choice: Choice, weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """As `tensors`, in the shapes of peft's modules for each form."""
        found = {}
        for name, parameter in model.named_parameters():
            if ".glora_" not in name:
                continue
            stem, _, last = name.rpartition(".")
            source = name if name in weights else f"{stem}.Xd"
            tensor = weights[source]
            if last == "X" and source.endswith("Xd"):
                tensor = tensor[:, :1]
            for dim, size in enumerate(parameter.shape[: tensor.ndim]):
                tensor = tensor.narrow(dim, 0, size)
            found[name] = tensor.reshape(parameter.shape) if parameter.ndim < tensor.ndim else tensor
        return found

    def _cost(self, chosen: Mapping[str, Any], path: str) -> int:
        rows, columns, biased = self._sizes[path]
        rank = chosen["r"]
        weights = {"none": 0, "constant": 1, "vector": rows, "lora": rank * (rows + columns)}
        across = {"none": 0, "vector": columns, "lora": rank * (columns + 1)}
        biases = {"none": 0, "constant": 1, "vector": rows}
        cost = 2 * weights[chosen["config_A_B"]]
        return cost + (across[chosen["config_C"]] + 2 * biases[chosen["config_D_E"]] if biased else 0)


def _parse(name: str) -> tuple[str, str, str]:
    """Path of the linear, term and name of the factor, of a weight's name."""
    head, _, tail = name.rpartition(".glora_")
    return head.removeprefix("base_model.model."), tail[0], tail.rpartition(".")[2]


def _field(term: str) -> str:
    return next(name for name in PATHS if term in name.removeprefix("config_"))
