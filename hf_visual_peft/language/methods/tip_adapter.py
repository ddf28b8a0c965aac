"""Tip-Adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.registry import Paper
from ..classifier import ZeroShotClassifier
from ..config import USUAL, register_language
from ..support import SupportConfig, SupportEquation
from ..view import Outcome, View, normalised


ALPHAS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
BETAS = (0.5, 1.0, 2.0, 4.0, 7.0)


class ImageCache(SupportEquation):
    """Labelled images as a memory beside the texts.

        logits = scale cos(image, text) + alpha scale / 100 exp(-beta (1 - image . F)) onehot(labels),
        image and, at the start, F normalised

    Args:
        names: of the classes.
        width: of the features.
        support: number of images in the memory; None: none yet.
        alpha: weight of the memory; None: chosen by `fit`.
        beta: sharpness of the memory; None: chosen by `fit`.
        trains: whether the keys F train.
    """

    why_not_merged = "its logits are no linear function of an image's features"

    keys: Tensor
    labels: Tensor
    strength: Tensor

    def __init__(
        self,
        names: Sequence[str],
        width: int,
        support: int | None,
        alpha: float | None,
        beta: float | None,
        trains: bool,
    ) -> None:
        super().__init__(names, support)
        self.fixed = alpha, beta
        self.trains = trains
        self._hold(torch.zeros(support or 0, width))
        self.register_buffer("labels", torch.zeros(support or 0, dtype=torch.long))
        self.register_buffer("strength", torch.tensor([alpha or 0.0, beta or 0.0]))

    def _hold(self, keys: Tensor) -> None:
        if self.trains:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)

    def forward(self, view: View) -> Outcome:
        """The logits with those of the memory."""
        self.require_support()
        alpha, beta = self.strength
        image = normalised(view.image).to(self.keys)
        # -beta (1 - image . F) in one product: the memory is large, so that each step over it counts
        exponents = torch.addmm(-beta.expand(1, 1), beta * image, self.keys.T)
        logits = view.compare(view.image, view.text)
        values = alpha * view.scale / 100 * self._values(view.names, self.labels).to(self.keys)
        return Outcome(logits + exponents.exp() @ values, view.image, view.text)

    def _values(self, names: Sequence[str], labels: Tensor) -> Tensor:
        """For each image of the memory 1 at the place of its class; of names that it does not know, none has one."""
        places = {name: index for index, name in enumerate(names)}
        columns = torch.tensor([places.get(name, len(names)) for name in self.names], device=labels.device)
        return F.one_hot(columns[labels], len(names) + 1)[:, :-1]

    def take(self, view: View, features: Tensor, labels: Tensor) -> None:
        """Remember images; alpha and beta that are not given are chosen on them, each left out of its own memory."""
        keys = normalised(features)
        self._hold(keys)
        self.labels = labels
        alphas, betas = (
            ((given,) if given is not None else grid) for given, grid in zip(self.fixed, (ALPHAS, BETAS), strict=True)
        )
        if torch.bincount(labels).max() < 2:  # no image would find another of its class
            alphas, betas = (self.fixed[0] or 1.17,), (self.fixed[1] or 1.0,)
        cosine = (keys @ keys.T).fill_diagonal_(float("-inf"))
        zero_shot = view.compare(features, view.text)
        values = self._values(view.names, labels).to(keys)
        losses = {}
        for beta in betas:
            memory = view.scale / 100 * ((-beta * (1 - cosine)).exp() @ values)
            for alpha in alphas:
                losses[alpha, beta] = F.cross_entropy(zero_shot + alpha * memory, labels).item()
        self.strength.copy_(torch.tensor(min(losses, key=losses.__getitem__)))


@register_language(
    name="tip_adapter",
    paper=Paper("Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification", "ECCV 2022", "2207.09519"),
    equation="logits + alpha scale / 100 exp(-beta (1 - image . F)) onehot(labels)",
    counts=(({"support_size": 1600}, 100, 0), ({"support_size": 1600, "train_keys": True}, 100, 819_200)),
    training=replace(USUAL, learning_rate=1e-3),
)
@dataclass
class TipAdapterConfig(SupportConfig):
    """Config of Tip-Adapter and Tip-Adapter-F, arXiv 2207.09519.

    The features of labelled images are a memory: `hf_visual_peft.fit` fills it. An image gets the labels of those that
    are like it. Nothing trains, or with `train_keys` (Tip-Adapter-F) the features in the memory. The authors choose
    alpha and beta on a large validation set, and for CLIP's scale of 100. Here alpha is in units of scale / 100, and
    what is not given is chosen on the images of the memory, each of which is left out for itself; with one image a
    class that is not possible, and alpha is 1.17, beta 1. Names that the memory does not know get their texts' logits.

    Args:
        alpha: weight of the memory.
        beta: its sharpness.
        train_keys: whether the memory's features train.
    """

    alpha: float | None = field(default=None, metadata={"help": "Weight of the memory; default: chosen by fit."})
    beta: float | None = field(default=None, metadata={"help": "Its sharpness; default: chosen by fit."})
    train_keys: bool = field(default=False, metadata={"help": "Train the memory's features: Tip-Adapter-F."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            if getattr(self, name) is not None:
                self._require_number(name, 1e-6)
        self._require_choice("train_keys", (True, False))

    def build(self, classifier: ZeroShotClassifier) -> ImageCache:
        """The memory, empty before `fit`."""
        assert self.class_names is not None
        return ImageCache(
            self.class_names, classifier.width, self.support_size, self.alpha, self.beta, self.train_keys
        )
