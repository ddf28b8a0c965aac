"""LP++."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.registry import Paper
from ..classifier import ZeroShotClassifier
from ..config import register_language
from ..rows import by_name
from ..slot import Linear
from ..support import SupportConfig, SupportEquation
from ..view import Outcome, View, normalised


ALPHA_EVERY = 10  # steps


class BlendedProbe(SupportEquation):
    """A linear probe, and the texts with a weight for each class.

        logits_k = x . W_k + b_k + a_k x . t_k, x and t normalised features of image and text

    Args:
        names: of the classes.
        width: of the features.
        scale: of the logits, the start of a.
        support: number of images that `fit` used; None: not yet.
        steps: of `fit`.
        momentum: of `fit`.
    """

    def __init__(
        self, names: Sequence[str], width: int, scale: Tensor, support: int | None, steps: int, momentum: float
    ) -> None:
        super().__init__(names, support)
        self.weight = nn.Parameter(torch.zeros(len(names), width))
        self.bias = nn.Parameter(torch.zeros(len(names)))
        self.alpha = nn.Parameter(scale.detach().float().expand(len(names)).clone())
        self.steps = steps
        self.momentum = momentum

    def forward(self, view: View) -> Outcome:
        """The logits of both."""
        text = normalised(view.text).to(self.weight)
        nothing = torch.zeros(len(view.names), device=text.device)
        weight, bias, alpha = (
            by_name(rows, self.names, view.names, otherwise)
            for rows, otherwise in (
                (self.weight, nothing[:, None]),
                (self.bias, nothing),
                (self.alpha, nothing + view.scale),
            )
        )
        logits = self._logits(normalised(view.image).to(text), text, weight, bias, alpha)
        return Outcome(logits, view.image, weight + alpha[:, None] * text)

    def linear(self, classifier: ZeroShotClassifier) -> Linear:
        """Weights and texts as one linear."""
        text = classifier.features_of(self.names).to(self.weight)
        return Linear(self.names, self.weight + self.alpha[:, None] * text, self.bias, raw=False, biased=False)

    @staticmethod
    def _logits(image: Tensor, text: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor) -> Tensor:
        return image @ weight.T + bias + alpha * (image @ text.T)

    def take(self, view: View, features: Tensor, labels: Tensor) -> None:
        """Start from the images, and descend with step sizes that come from them."""
        x, text = normalised(features).float(), normalised(view.text).float()
        count = len(labels)
        similar = x @ text.T
        self.weight.copy_(torch.zeros_like(self.weight).index_add(0, labels, x))
        self.bias.zero_()
        own = similar.gather(1, labels[:, None])[:, 0]
        self.alpha.fill_(250 * own.mean())
        rate = 4 * count / torch.linalg.eigvalsh(x.T @ x)[-1]
        rate_alpha = count / (4 * similar.square().sum(0).max())
        parameters = [self.weight, self.bias, self.alpha]
        velocity = [torch.zeros_like(each) for each in parameters]
        for step in range(self.steps):
            with torch.enable_grad():
                now = [each.detach().requires_grad_() for each in parameters]
                loss = F.cross_entropy(self._logits(x, text, *now), labels)
                gradients = torch.autograd.grad(loss, now)
            for index, (each, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                last = each is self.alpha
                if last and step % ALPHA_EVERY:
                    continue
                velocity[index].mul_(self.momentum).add_(gradient)
                each.sub_((rate_alpha if last else rate) * velocity[index])


@register_language(
    name="lp_plus_plus",
    paper=Paper("LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP", "CVPR 2024", "2404.02285"),
    equation="logits_k = x . W_k + b_k + a_k x . text_k",
    counts=(({}, 100, 51_400), ({}, 1000, 514_000)),
)
@dataclass
class LPPlusPlusConfig(SupportConfig):
    """Config of LP++, arXiv 2404.02285.

    A linear probe on normalised features beside the texts, which have a learned weight for each class. Before `fit` it
    decides as the zero-shot classifier. `hf_visual_peft.fit` starts from the sums of the images' features and takes
    `steps` steps of gradient descent over all images, with step sizes that come from the features; no learning rate is
    needed. The weights of the texts change every 10th step. Differences from the released code: their gradient is that
    of the step, not the sum of all before; and the last step is kept, where the code chooses one on a validation set.
    Training as any other adapter also works. A class goes with its name; new names get the logits of their texts.

    Args:
        steps: of `fit`; 0: the start only.
        momentum: of these steps.
    """

    why_no_scale: ClassVar[str] = "its logits have learned weights in the place of the scale"

    steps: int = field(default=300, metadata={"help": "Steps of fit."})
    momentum: float = field(default=0.9, metadata={"help": "Of these steps."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("steps", 0)
        self._require_number("momentum", 0.0, below=1.0)

    def starts_from_texts(self) -> bool:
        """Always: there is nothing beside the texts at first."""
        return True

    def build(self, classifier: ZeroShotClassifier) -> BlendedProbe:
        """The zero-shot classifier."""
        assert self.class_names is not None
        scale = classifier.towers.scale()[0].reshape(())
        return BlendedProbe(self.class_names, classifier.width, scale, self.support_size, self.steps, self.momentum)
