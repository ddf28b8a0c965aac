"""ProKeR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.registry import Paper
from ..classifier import ZeroShotClassifier
from ..config import register_language
from ..rows import by_name
from ..support import SupportConfig, SupportEquation
from ..view import Outcome, View, normalised


MAX_SUPPORT = 20_000  # the matrix of all pairs then takes 1.6 GB


class KernelRidge(SupportEquation):
    """Kernel ridge regression of what the texts get wrong.

        k(x, y) = exp(-beta (1 - cos(x, y))), A = (k(S, S) + lam I)^-1 (onehot(labels) - cos(S, text))
        logits = scale (cos(image, text) + k(image, S) A)

    Args:
        names: of the classes.
        width: of the features.
        support: number of images in S; None: none yet.
        beta: sharpness of the kernel.
        lam: of the regularisation.
    """

    why_not_merged = "its logits are no linear function of an image's features"

    images: Tensor
    dual: Tensor

    def __init__(self, names: Sequence[str], width: int, support: int | None, beta: float, lam: float) -> None:
        super().__init__(names, support)
        self.beta = beta
        self.lam = lam
        self.register_buffer("images", torch.zeros(support or 0, width))
        self.register_buffer("dual", torch.zeros(support or 0, len(names)))

    def _kernel(self, left: Tensor, right: Tensor) -> Tensor:
        return (-self.beta * (1 - left @ right.T)).exp()

    def forward(self, view: View) -> Outcome:
        """The logits with the correction."""
        self.require_support()
        correction = self._kernel(normalised(view.image).to(self.images), self.images) @ self.dual
        nothing = torch.zeros(len(view.names), 1, device=correction.device)
        columns = by_name(correction.T, self.names, view.names, nothing).T
        return Outcome(view.compare(view.image, view.text) + view.scale * columns, view.image, view.text)

    def take(self, view: View, features: Tensor, labels: Tensor) -> None:
        """Solve for A."""
        if len(labels) > MAX_SUPPORT:
            raise ValueError(
                f"ProKeRConfig: {len(labels)} images need a matrix of {len(labels)} x {len(labels)}. Valid are up to "
                f"{MAX_SUPPORT}: give fewer images a class, or take TaskResConfig or LPPlusPlusConfig."
            )
        images = normalised(features).double()
        error = F.one_hot(labels, len(self.names)) - images @ normalised(view.text).double().T
        kernel = self._kernel(images, images)
        kernel.diagonal().add_(self.lam)
        self.dual = torch.linalg.solve(kernel, error).float()
        self.images = images.float()


@register_language(
    name="proker",
    paper=Paper(
        "ProKeR: A Kernel Perspective on Few-Shot Adaptation of Large Vision-Language Models",
        "CVPR 2025",
        "2501.11175",
    ),
    equation="logits + scale k(image, S) (k(S, S) + lam I)^-1 (onehot(labels) - cos(S, text))",
    counts=(({"support_size": 1600}, 100, 0),),
)
@dataclass
class ProKeRConfig(SupportConfig):
    """Config of proximal kernel ridge regression (ProKeR), arXiv 2501.11175.

    `hf_visual_peft.fit` solves for the correction in closed form; nothing trains. The released code divides the kernel
    by `lam` inside the inverse, which makes the correction `lam` times that of kernel ridge regression; this is the
    latter. Names that it does not know get the logits of their texts.

    Args:
        beta: sharpness of the kernel.
        lam: of the regularisation.
    """

    beta: float = field(default=1.5, metadata={"help": "Sharpness of the kernel."})
    lam: float = field(default=0.05, metadata={"help": "Of the regularisation."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_number("beta", 1e-6)
        self._require_number("lam", 1e-9)

    def build(self, classifier: ZeroShotClassifier) -> KernelRidge:
        """The correction, empty before `fit`."""
        assert self.class_names is not None
        return KernelRidge(self.class_names, classifier.width, self.support_size, self.beta, self.lam)
