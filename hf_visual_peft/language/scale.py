"""The factor of the cosine in the logits, as adapters learn it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


SCALE = "logit_scale"  # name of the module in the classifier, for `modules_to_save`


class LogitScale(nn.Module):
    """A factor beside that of the dual encoder, 1 until it trains.

        logits = exp(offset) exp(logit_scale) cos(image, text)

    The dual encoder has its scale as a parameter, and adapters copy modules. Of this one they train a copy.
    """

    def __init__(self) -> None:
        super().__init__()
        # frozen here: a dual encoder that trains as a whole has its own scale
        self.offset = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, values: Tensor) -> Tensor:
        """Logits, or their scale, times the factor."""
        return values * self.offset.exp().to(values)
