"""The supernet: a model with the largest adapter, of which each training step runs a part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from random import Random
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from ..backbones.modes import in_eval_mode
from .spaces import Space, put_on
from .subnets import ADAPTER, Choice, Subnets, weights_of


class Supernet(nn.Module):
    """A model of which a subnet runs: in training a new one in every forward pass, else the chosen one.

    It takes and returns what the model does, so that any training loop works. Subnets share the weights of the
    largest adapter, and all of them the task head. The draws depend on the seed and on the number of passes so far,
    which is the whole of `draws`; all processes of a distributed run draw the same.

    Args:
        model: with the supernet, from `space.put_on`.
        space: that it came from.
        seed: of the draws.

    Attributes:
        model: the same.
        space: the same.
        subnets: what can be chosen.
        draws: state of the draws, with `state_dict` and `load_state_dict`.
        chosen: the subnet that runs outside of training; None for the whole supernet.

    Raises:
        TypeError: the model is no `PeftModel`.
        ValueError: the space does not fit the model.
    """

    def __init__(self, model: PeftModel, space: Space, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(model, PeftModel):
            raise TypeError(f"Supernet needs the model that space.put_on(model) returns, not {type(model).__name__}.")
        if list(model.peft_config) != [ADAPTER]:
            raise ValueError(
                f"Supernet: the model has the adapters {', '.join(model.peft_config)}: it must have the supernet "
                f"alone, with the name {ADAPTER!r}, as space.put_on makes it."
            )
        self.space = space
        self.subnets = space.subnets(model)
        if not self.subnets.parameters(self.subnets.largest()):
            raise ValueError("search space: no subnet has any parameter on this model. Give it larger options.")
        self.model = model
        self.draws = Draws(seed)
        self.chosen: Choice | None = None
        self._verified = False
        self._weights: Mapping[str, nn.Parameter] = weights_of(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of the model; in training by a subnet that is drawn.

        Raises:
            ValueError: the model has gradient checkpointing, or see `verify`, which the first pass in training calls.
        """
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            raise ValueError(
                "Supernet: gradient checkpointing would run the whole supernet in the backward pass. Switch it off: "
                "gradient_checkpointing_disable()."
            )
        if self.training and not self._verified:
            self.verify(*args, **kwargs)
        choice = self.draws.next(self.subnets.draw) if self.training else self.chosen
        return self.run(choice, self._weights, *args, **kwargs)

    def run(self, choice: Choice | None, weights: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Run a subnet.

        Args:
            choice: the subnet; None for the whole supernet.
            weights: of the supernet, by name.
            args: of the model.
            kwargs: of the model.
        """
        choice = self.subnets.largest() if choice is None else choice
        tensors = self.subnets.tensors(choice, weights)
        with self.subnets.alone(choice):
            return functional_call(self.model, tensors, args, kwargs, tie_weights=False)

    def accuracy_on(
        self, batches: Iterable[Mapping[str, Any]], progress: bool = False, **inputs: Any
    ) -> Callable[[Choice], float]:
        """A fitness: accuracy of a subnet on validation images.

        Args:
            batches: with `labels`, one class an image; read once for each subnet.
            progress: whether to show a bar for each subnet.
            inputs: extra arguments of the model.

        Raises:
            ValueError: there is no batch, or one has no labels.
        """

        def accuracy(choice: Choice) -> float:
            correct = total = 0
            with in_eval_mode(self), torch.inference_mode():
                for batch in tqdm(batches, desc="Evaluate", leave=False, disable=not progress):
                    own = dict(batch)
                    labels = own.pop("labels", None)
                    if labels is None:
                        raise ValueError("accuracy_on: a batch of validation images has no labels.")
                    logits = self.run(choice, self._weights, **own, **inputs).logits
                    correct += int((logits.argmax(dim=-1) == labels.to(logits.device)).sum())
                    total += len(labels)
            if not total:
                raise ValueError("accuracy_on: there are no validation images. Give a loader that is not empty.")
            return correct / total

        return accuracy

    def verify(self, *args: Any, **kwargs: Any) -> None:
        """Check on some images that subnets compute what ordinary adapters with their weights do.

        Two subnets are compared, with random weights. The model is left as it was.

        Args:
            args: of the model.
            kwargs: of the model.

        Raises:
            ValueError: a method's equation depends on its size by more than its weights.
        """
        weights = {
            name: torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(p) * 0.1
            for name, p in self._weights.items()
        }
        for choice in (self.subnets.draw(Random(0)), self.subnets.smallest()):
            with in_eval_mode(self), torch.no_grad(), torch.random.fork_rng(devices=[]):
                twin = _as_adapter(copy.deepcopy(self.model), self.subnets, choice, weights)
                expected, reason = twin(*args, **kwargs).logits, ""
                try:
                    found = self.run(choice, weights, *args, **kwargs).logits
                except (RuntimeError, TypeError) as error:
                    found, reason = torch.full_like(expected, torch.nan), f" ({error})"
            if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
                raise ValueError(
                    "The search space has a method whose smaller sizes are more than parts of its largest, so sizes "
                    f"cannot share weights; seen with {self.subnets.describe(choice)}. Leave that method out, or give "
                    f"it one size.{reason}"
                )
        self._verified = True

    def extract(self, choice: Choice) -> PeftModel:
        """The model with a subnet as an ordinary adapter, with its weights and the head.

        The backbone moves from the supernet to it, so the supernet is used up.

        Args:
            choice: the subnet.
        """
        weights = {name: tensor.detach().clone() for name, tensor in self._weights.items()}
        return _as_adapter(self.model, self.subnets, choice, weights)


def _as_adapter(model: PeftModel, subnets: Subnets, choice: Choice, weights: Mapping[str, Tensor]) -> PeftModel:
    """The model with a subnet in the place of the supernet, in the same mode."""
    training, copies = model.training, f".modules_to_save.{ADAPTER}."
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items() if copies in name}
    found = put_on(model.unload(), subnets.config(choice))
    own = subnets.own_weights(choice, weights, found)
    with torch.no_grad():
        for name, parameter in weights_of(found).items():
            parameter.copy_(own[name])
        for name, tensor in found.state_dict().items():
            if copies in name:
                tensor.copy_(trained[name])
    return found.train(training)


class Draws:
    """Subnets drawn one after another; where it stands is one number.

    Args:
        seed: of all draws.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.count = seed, 0

    def next(self, draw: Callable[[Random], Choice]) -> Choice:
        """The next subnet.

        Args:
            draw: makes one of random numbers.
        """
        self.count += 1
        return draw(Random(f"supernet {self.seed} {self.count}"))

    def state_dict(self) -> dict[str, int]:
        """The number of draws so far."""
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from there.

        Args:
            state: from `state_dict`.
        """
        self.count = state["count"]
