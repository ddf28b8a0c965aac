"""The bottleneck of the sequential adapters."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """Down, activation, up.

        f(x) = W_up dropout(g(W_down x + b_down)) + b_up

    Args:
        width: channels of the token stream.
        r: width of the bottleneck.
        dropout: probability, in the bottleneck.
        activation: g.
    """

    def __init__(
        self, width: int, r: int, dropout: float = 0.0, activation: Callable[[Tensor], Tensor] = F.gelu
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width, r)
        self.up = nn.Linear(r, width)
        self.dropout = nn.Dropout(dropout)
        self.activation = activation
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def truncated_normal(self, std: float = 0.01) -> Bottleneck:
        """Draw both weights from a normal cut at two standard deviations, so that it starts close to the identity."""
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        return self.up(self.dropout(self.activation(self.down(x))))
