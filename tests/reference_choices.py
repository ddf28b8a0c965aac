"""The methods that choose from data what they train, in plain torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from reference_backbone import ROLES, Vit, Weights, images
from torch import Tensor


LABELS = (0, 1, 0, 1, 2, 2)  # of the images that methods choose from


def chosen_from(count: int) -> Vit:
    """The frozen model with the images that methods choose from."""
    v = Vit(training=False)
    v.pixels = images(count)
    return v


def sct(v: Vit, w: Weights) -> Tensor:
    """Channels by the mean over the classes of their L2 norms over all patches: their `getSalientChannels`."""
    frozen, chosen = chosen_from(len(LABELS)), {}
    labels = torch.tensor(LABELS)

    def look(index: int, x: Tensor) -> Tensor:
        z = x + frozen.attended(index, x)
        norms = [z[labels == label][:, 1:].flatten(0, 1).norm(dim=0) for label in range(3)]
        chosen[index] = torch.stack(norms).mean(0).topk(6).indices.sort().values
        return z + frozen.fed(index, z)

    frozen.block = look
    frozen.stream()

    def block(index: int, x: Tensor) -> Tensor:
        z = x + v.attended(index, x)
        branch = w.of(f"{index}.sct_attention.").linear("linear", z[..., chosen[index]])
        z = z + torch.zeros_like(z).index_copy(-1, chosen[index], branch)
        return z + v.fed(index, z)

    v.block = block
    return v.logits()


def gps(v: Vit, w: Weights) -> Tensor:
    """The entry of each row with the largest gradient of the supervised contrastive loss, and all biases."""
    frozen, labels = chosen_from(len(LABELS)), torch.tensor(LABELS)
    names = [name for name in frozen.w if name.endswith(("patch.weight", *(f"{role}.weight" for role in ROLES)))]
    leaves = [frozen.w[name].requires_grad_() for name in names]
    z = F.normalize(frozen.features(), dim=-1)
    own = torch.eye(len(z)).bool()
    log = (z @ z.T / 0.07).masked_fill(own, -math.inf).log_softmax(1)
    positive = (labels[:, None] == labels) & ~own
    loss = -(log.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()
    for name, gradient in zip(names, torch.autograd.grad(loss, leaves), strict=True):
        module = name.removesuffix(".weight")
        best = gradient.abs().flatten(1).argmax(1, keepdim=True)
        values = w[f"{module}.gps_entries.weight.values"].unsqueeze(1)
        addend = torch.zeros_like(gradient).flatten(1).scatter(1, best, values)
        v.w[name] = v.w[name] + addend.view_as(gradient)
        v.w[f"{module}.bias"] = v.w[f"{module}.bias"] + w[f"{module}.gps_entries.bias.values"]
    return v.logits()


BUDGET = 700


def spt(v: Vit, w: Weights) -> Tensor:
    """The most sensitive entries, by squared gradients of the cross entropy: their `get_sensitivity`.

    A matrix with a tenth of a low-rank update's numbers among them gets that, a vector with a fifth trains as a whole.
    """
    frozen, r = chosen_from(len(LABELS)), 2
    names = [name for name in frozen.w if name.partition(".")[0] in ("0", "1", "2", "norm")]
    leaves = [frozen.w[name].requires_grad_() for name in names]
    loss = F.cross_entropy(frozen.logits(), torch.tensor(LABELS))
    scores = [gradient.square() for gradient in torch.autograd.grad(loss, leaves)]
    least = torch.cat([score.flatten() for score in scores]).sort(descending=True).values[BUDGET - 1]
    branches = {}
    for name, score in zip(names, scores, strict=True):
        where = (score.flatten() >= least).nonzero().flatten()
        module, _, kind = name.rpartition(".")
        matrix = score.ndim == 2
        if matrix and len(where) >= r * sum(score.shape) / 10:
            branches[module] = w.of(f"{module}.spt_lora.")
        elif len(where):
            if not matrix and len(where) >= len(score) / 5:
                where = torch.arange(len(score))
            values = w[f"{module}.spt_entries.{kind}.values"]
            v.w[name] = v.w[name] + torch.zeros(score.numel()).index_copy(0, where, values).view_as(score)

    def at_linear(name: str, x: Tensor, y: Tensor) -> Tensor:
        if name not in branches:
            return y
        read = v.drop(x, 0.0 if name.endswith("output") else 0.1)
        return y + v.drop_path(branches[name].linear("up", branches[name].linear("down", read)), 0.1)

    v.at_linear = at_linear
    return v.logits()
