"""ProGrad."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.registry import Paper
from ..classifier import ZeroShotClassifier
from ..config import register_language
from ..slot import LanguageEquation
from ..tokens import Position
from ..view import Outcome, View
from .coop import Context, CoOpConfig


class AlignedContext(Context):
    """CoOp whose gradient never points against that of the zero-shot predictions.

        g = d cross entropy, h = d T^2 H(softmax(zero-shot / T), softmax(logits / T))
        if <g, h> < 0: g <- g - weight <g, h> h / |h|^2, for each tensor

    Args:
        vectors: as of `Context`.
        names: as of `Context`.
        position: as of `Context`.
        weight: of the part that is taken away.
        temperature: T.
    """

    def __init__(
        self, vectors: Tensor, names: Sequence[str], position: Position, weight: float, temperature: float
    ) -> None:
        super().__init__(vectors, names, position)
        self.weight = weight
        self.temperature = temperature

    def objective(self, view: View, outcome: Outcome, loss: Tensor, labels: Tensor) -> Tensor:
        """The cross entropy; its gradient is the one above."""
        if not torch.is_grad_enabled() or not self.vectors.requires_grad:
            return loss
        weights = [self.vectors, *(p for p in view.classifier.logit_scale.parameters() if p.requires_grad)]
        known = set(map(id, weights))
        if any(p.requires_grad and id(p) not in known for p in view.classifier.parameters()):
            raise ValueError(
                "ProGradConfig: other parameters than its vectors and the scale train, and would get no gradient. "
                "Freeze them, or take CoOpConfig or KgCoOpConfig."
            )
        with torch.no_grad():
            zero_shot = view.compare(view.image, view.text, learned=False)
            target = (zero_shot / self.temperature).softmax(-1)
        general = F.cross_entropy(outcome.logits / self.temperature, target) * self.temperature**2
        ours = torch.autograd.grad(loss, weights, retain_graph=True)
        total = loss.detach()
        for weight, g, h in zip(weights, ours, torch.autograd.grad(general, weights), strict=True):
            unit = h / h.norm().clamp_min(torch.finfo(h.dtype).tiny)
            kept = g - self.weight * (g * unit).sum().clamp(max=0) * unit
            total = total + ((weight - weight.detach()) * kept).sum()
        return total


@register_language(
    name="prograd",
    paper=Paper("Prompt-aligned Gradient for Prompt Tuning", "ICCV 2023", "2205.14865"),
    equation="CoOp; of its gradient, the part against that of the zero-shot predictions is taken away",
    counts=(({}, 100, 8_192),),
)
@dataclass
class ProGradConfig(CoOpConfig):
    """Config of prompt-aligned gradient (ProGrad), arXiv 2205.14865.

    CoOp, whose gradient loses what points against the gradient of a loss towards the zero-shot predictions. Both
    gradients are computed in the forward pass, and the loss has the value of the cross entropy. The projection is that
    of one process and one micro-batch, for each tensor. Nothing but the vectors and the scale may train: other
    parameters would get no gradient.

    Args:
        weight: 1 takes all of the opposing part away; the authors use 0.8 for some data sets.
        temperature: of both predictions.
    """

    weight: float = field(default=1.0, metadata={"help": "Of the part of the gradient that is taken away."})
    temperature: float = field(default=1.0, metadata={"help": "Of the predictions that are compared."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_number("weight", 0.0)
        self._require_number("temperature", 1e-3)

    def equation(self, classifier: ZeroShotClassifier, vectors: Tensor) -> LanguageEquation:
        """The equation with these vectors."""
        assert self.class_names is not None
        return AlignedContext(vectors, self.class_names, self.position, self.weight, self.temperature)
