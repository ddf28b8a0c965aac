"""The mean of an adapter's weights over epochs, as in PromptSRC."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class GaussianAverage:
    """The mean of what trains, over epochs, with the weights of a normal distribution.

        average = sum_e g_e weights_e, g_e ~ exp(-(e - mean)^2 / (2 std^2)), e = 1 .. epochs

    Only weights that train are read and written: those of the base stay the same bits.

    Args:
        model: with an adapter.
        epochs: of the whole run.
        mean: the epoch that counts most; 15 of 20 in PromptSRC.
        std: in epochs.

    Raises:
        ValueError: a number does not fit, or nothing trains.
    """

    def __init__(self, model: nn.Module, epochs: int, mean: float = 15.0, std: float = 1.0) -> None:
        if type(epochs) is not int or epochs < 1:
            raise ValueError(f"epochs is {epochs!r}: must be an integer of at least 1.")
        if not (math.isfinite(mean) and 0 < std < math.inf):
            raise ValueError(f"mean is {mean!r} and std {std!r}: must be finite, and std above 0.")
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise ValueError(f"{type(model).__name__} has no parameter that trains.")
        logits = torch.tensor([-((epoch - mean) ** 2) / (2 * std**2) for epoch in range(1, epochs + 1)])
        self.weights: list[float] = logits.double().softmax(0).tolist()
        self.epoch = 0
        self.sums: list[Tensor] = [torch.zeros_like(p, dtype=torch.float32) for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after an epoch.

        Raises:
            ValueError: there were as many epochs as were said already.
        """
        if self.epoch == len(self.weights):
            raise ValueError(f"update: the average is over {len(self.weights)} epochs, and all of them are taken.")
        for total, parameter in zip(self.sums, self.parameters, strict=True):
            total.add_(parameter.float(), alpha=self.weights[self.epoch])
        self.epoch += 1

    @torch.no_grad()
    def apply(self) -> None:
        """Write the average into the model.

        Raises:
            ValueError: an epoch is missing.
        """
        if self.epoch < len(self.weights):
            raise ValueError(
                f"apply: {self.epoch} of {len(self.weights)} epochs are taken. Call update() after every epoch."
            )
        for total, parameter in zip(self.sums, self.parameters, strict=True):
            parameter.copy_(total)
