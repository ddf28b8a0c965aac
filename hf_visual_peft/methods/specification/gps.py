"""Gradient-based parameter selection."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import LINEAR_ROLES, VisionBackbone, unwrapped
from ...core.calibration import Calibration
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import Placement, WeightSite, as_matrix
from ...training.defaults import Training
from .deltas import Addend, Deltas, SparseAddend, summed_gradients


TEMPERATURE = 0.07  # as in the authors' code


class GPS(Deltas):
    """Additions to k entries of each row of a weight, and to the whole bias, zero at the start.

    Args:
        module: linear or convolution, whose weight is used as (out, all other dimensions).
        k: entries of each row.
    """

    def __init__(self, module: nn.Module, k: int) -> None:
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        self.row_size = weight.shape[1:].numel()  # also known for quantised weights
        if k > self.row_size:
            raise ValueError(f"k is {k}: must be at most the {self.row_size} inputs of {module}.")
        self.k = k
        sparse = SparseAddend(weight.numel(), len(weight) * k, "GPS")
        super().__init__(sparse, Addend(bias.numel()) if isinstance(bias, Tensor) else None)

    def choose(self, gradient: Tensor) -> None:
        """Choose the k entries of each row with the largest gradient, given in the weight's shape."""
        best = gradient.abs().flatten(1).topk(self.k, dim=1).indices
        rows = torch.arange(len(best), device=best.device)[:, None]
        assert isinstance(self.weight, SparseAddend)
        self.weight.entries.choose((rows * self.row_size + best).flatten())


def supervised_contrastive_loss(features: Tensor, labels: Tensor, temperature: float = TEMPERATURE) -> Tensor | None:
    """Supervised contrastive loss (arXiv 2004.11362, equation 2) of (batch, channels), given classes (batch,).

    Every image is an anchor, and all others of its class are its positives. None if no two images share a class.
    """
    z = F.normalize(features.float(), dim=-1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(own, -torch.inf)
    log_probability = logits - logits.logsumexp(dim=1, keepdim=True)
    positive = (labels[:, None] == labels[None, :]) & ~own
    count = positive.sum(dim=1)
    if not count.any():
        return None
    loss = -log_probability.masked_fill(~positive, 0.0).sum(dim=1)
    return (loss / count.clamp(min=1))[count > 0].mean()


@register(
    name="gps",
    paper=Paper("Gradient-based Parameter Selection for Efficient Fine-Tuning", "CVPR 2024", "2312.10136"),
    summary="the entries of every weight with the largest gradient",
    visual_tuning="parameter: weight",
    equation="W + dW, b + db; dW non-zero at the k entries of each row whose gradient is largest",
    # rows: (4 * 768 + 3072 + 768) * 12 + 768 = 83,712, each with k entries and a bias
    counts=(({"k": 1}, 167_424), ({"k": 2}, 251_136)),
    mergeable=True,
    identity_at_start=True,
    calibrated=True,
    training=Training(3e-3),
)
@dataclass
class GPSConfig(VisualPeftConfig):
    """Config of gradient-based parameter selection (GPS), arXiv 2312.10136.

    In each row of every weight matrix and of the patch embedding, k entries train: those with the largest gradient of
    a supervised contrastive loss, summed over one pass through the training images. All biases of these modules train
    too; norms are frozen, with their biases. Indices and values are saved, not weights. The loss acts on the input of
    the head. It uses two views of each image, as the authors do, if the loader gives `pixel_values` of (batch, 2,
    channels, height, width); else one. The authors choose with dropout and stochastic depth active; here both are off.
    Train without weight decay, as they do; the values never decay.

    Args:
        k: entries per row; the authors use 1 on nearly all of VTAB-1k and up to 20 elsewhere.
    """

    k: int = field(default=1, metadata={"help": "Entries that train of each row of a weight."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("k", 1)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At every linear and the patch embedding."""
        for path in (
            *backbone.patch_embedding,
            *backbone.between,
            *backbone.modules((*LINEAR_ROLES, "operations")),
        ):
            yield Placement(path, "entries", WeightSite(), partial(GPS, k=self.k))

    def choose(self, calibration: Calibration) -> None:
        """Choose the entries with the largest gradients.

        Raises:
            ValueError: no batch has two images of the same class, or a gradient is not finite.
        """
        parts: dict[Any, tuple[nn.Module, GPS]] = {}
        for path, equation in calibration.equations("entries"):
            module = unwrapped(calibration.model.get_submodule(path))
            parts[module.weight] = (module, equation)
        pairs = False
        with summed_gradients(list(parts), of=lambda gradient: gradient) as sums:
            for batch in calibration.batches():
                labels, pixels = batch.pop("labels"), batch[calibration.input_name]
                if labels.ndim != 1:
                    raise ValueError(
                        f"dataloader: GPS contrasts classes: labels must be one class per image, (batch,), got shape "
                        f"{tuple(labels.shape)}. SPT and SCT take images of several classes."
                    )
                if pixels.ndim == 5 and not calibration.backbone.architecture.video:
                    labels = labels.repeat_interleave(pixels.shape[1])
                    batch["pixel_values"] = pixels.flatten(0, 1)
                features = calibration.features(batch, "GPS")
                loss = supervised_contrastive_loss(features, labels)
                if loss is not None:
                    pairs = True
                    loss.backward()
        if not pairs:
            raise ValueError("dataloader: no batch has two images of the same class, so there is nothing to contrast.")
        if not all(total.isfinite().all() for total in sums.values()):
            raise ValueError("GPS: gradients of the contrastive loss are not finite.")
        for weight, (module, equation) in parts.items():
            equation.choose(as_matrix(module, sums[weight]))
