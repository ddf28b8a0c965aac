"""Distribution-aware visual prompt tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from ...backbones.backbone import Block, VisionBackbone
from ...backbones.finding import find_backbone
from ...backbones.modes import in_eval_mode
from ...core.calibration import Calibration, NotCalibratedError
from ...core.config import VisualPeftConfig
from ...core.outcome import Outcome
from ...core.registry import Paper, register
from ...sites import OutputSite, Placement, Shared, TokenLayout, TokenSite, WithLoss
from ...training.defaults import Training
from ..specification.bitfit import Shift
from .vpt import MAX_VIRTUAL_TOKENS


ALPHA, MARGIN = 32.0, 0.1  # of the proxy-anchor loss, as in the authors' code


class NormedPrompts(nn.Module):
    """Learned tokens, of which a norm may be taken: dropout(norm(P)), P ~ U(-bound, bound).

    Args:
        num_virtual_tokens: how many.
        width: channels of the backbone.
        bound: of the first values.
        l2: whether the norm is P / |P|.
        dropout: probability, independent for each image.
    """

    def __init__(self, num_virtual_tokens: int, width: int, bound: float, l2: bool, dropout: float) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(num_virtual_tokens, width).uniform_(-bound, bound))
        self.l2 = l2
        self.dropout = nn.Dropout(dropout)

    def normed(self, *norm: nn.Module) -> Tensor:
        """(num_virtual_tokens, width)."""
        prompts = norm[0](self.prompts) if norm else self.prompts
        return F.normalize(prompts, dim=-1, eps=1e-6) if self.l2 else prompts

    def forward(self, batch_size: int, *norm: nn.Module) -> Tensor:
        """Tokens of shape (batch, num_virtual_tokens, width)."""
        return self.dropout(self.normed(*norm).expand(batch_size, -1, -1))


class Proxies(NormedPrompts):
    """Prompts that stand for classes in a loss, with their similarity to images.

        cos(P, mean of the patches), cos(P, query of CLS),  times the scale

    Args:
        sizes: as `NormedPrompts`.
        scale: factor of both.
        cls: whether the second is needed.
    """

    def __init__(self, *sizes: Any, scale: float, cls: bool) -> None:
        super().__init__(*sizes)
        self.scale, self.cls = scale, cls

    def forward(  # type: ignore[override]
        self, x: Tensor, layout: TokenLayout, queries: Callable[[Tensor], Tensor], *norm: nn.Module
    ) -> WithLoss:
        """Tokens for a stream (batch, tokens, width), and similarities, (batch, 2 or 1, num_virtual_tokens)."""
        prompts = self.normed(*norm)
        tokens = self.dropout(prompts.expand(len(x), -1, -1))
        of_images = [_mean_of_patches(x, layout)]
        if self.cls:
            of_images.append(queries(x[:, :1]).squeeze(1))
        similar = F.normalize(torch.stack(of_images, dim=1).float(), dim=-1) @ F.normalize(prompts.float(), dim=-1).T
        return WithLoss(tokens, self.scale * similar)


def _mean_of_patches(x: Tensor, layout: TokenLayout) -> Tensor:
    patches = x[:, layout.prefix :]
    if layout.grid is None or layout.grid.cells is None:
        return patches.mean(dim=1)
    seen = (layout.grid.cells < layout.grid.area).to(x.dtype).unsqueeze(-1)  # the others are padding
    return (patches * seen).sum(dim=1) / seen.sum(dim=1)


def proxy_anchor(similar: Tensor, proxies: Tensor) -> Tensor:
    """The proxy-anchor loss (arXiv 2003.13911), as the mean over all proxies.

        mean_p log(1 + sum_+ exp(-alpha (s - m))) + mean_p log(1 + sum_- exp(alpha (s + m))),  alpha = 32, m = 0.1

    Args:
        similar: of images to proxies, (batch, proxies).
        proxies: which one each image has, (batch,); below 0: the image does not count.
    """
    counts = (proxies >= 0).unsqueeze(1)
    own = proxies.unsqueeze(1) == torch.arange(similar.shape[1], device=similar.device)
    one = similar.new_zeros(1, similar.shape[1])
    total = similar.new_zeros(())
    for logits, mask in ((-ALPHA * (similar - MARGIN), own), (ALPHA * (similar + MARGIN), ~own & counts)):
        total = total + torch.cat([logits.masked_fill(~mask, -torch.inf), one]).logsumexp(dim=0).mean()
    return total


@torch.no_grad()
def cosine_k_means(points: Tensor, count: int, centres: Tensor | None = None) -> Tensor:
    """Groups of points by their cosine similarity to centres: the number of the group of each, (points,).

    Args:
        points: (points, channels).
        count: of groups.
        centres: to start from; points drawn at random by default.
    """
    if centres is None:
        centres = points[torch.randperm(len(points), device=points.device)[:count]]
    group = points.new_zeros(len(points), dtype=torch.long)
    for _ in range(20):
        group = (F.normalize(points, dim=1) @ F.normalize(centres, dim=1).T).argmax(dim=1)
        moved = _means(points, group, centres)
        if (moved - centres).norm(dim=1).sum() < 1e-4:
            break
        centres = moved
    return group


def _means(points: Tensor, group: Tensor, otherwise: Tensor) -> Tensor:
    """The mean of each group; of an empty one a row of `otherwise`."""
    sums = torch.zeros_like(otherwise).index_add(0, group, points)
    sizes = torch.bincount(group, minlength=len(otherwise)).unsqueeze(1)
    return torch.where(sizes > 0, sums / sizes.clamp(min=1), otherwise)


@register(
    name="davpt",
    paper=Paper("DA-VPT: Semantic-Guided Visual Prompt Tuning for Vision Transformers", "CVPR 2025", "2505.23694"),
    summary="as VPT; prompts of the last block are proxies of classes in an auxiliary loss",
    visual_tuning="prompt: vision-driven",
    equation="x_i = [prefix; P_i; patches] into block i; loss + a PA(patches, P_L) + b PA(W_q LN(CLS), P_L)",
    # 11 x 20 prompts and 10 proxies
    counts=(({}, 176_640),),
    mergeable=False,
    identity_at_start=False,
    calibrated=True,
    training=Training(3e-3),
)
@dataclass
class DAVPTConfig(VisualPeftConfig):
    """Config of distribution-aware visual prompt tuning (DA-VPT), arXiv 2505.23694.

    Prompts as in VPT. Those of the last block are also *proxies* of classes, of which several may share one: an
    auxiliary loss, which `model(..., labels=...)` adds, draws images to the proxy of their class and pushes them from
    the others (proxy anchor, a cosine similarity). It does so for the mean of the block's patches, and for the query
    that the block's attention makes of CLS. `calibrate` finds which classes share a proxy, by k-means of the classes'
    mean features in the frozen model, or `class_map` says it. `RefreshClassMap` finds it again in every epoch of a
    `Trainer`, with the features of the model that is being trained. Evaluation is that of VPT.

    What differs from the released code (Noahsark/DA-VPT): its weights of both losses are 0 unless they are given; here
    they are those of its files for FGVC. An error in its loss becomes a loss of 0 there, and is an error here. Its
    choice of patches by the attention of CLS is commented out there as too slow, and all patches count, as here. Its
    mask of attention from prompts changes nothing where their outputs are dropped, and is left out. It groups classes
    again by features of the training epoch that just passed, starting from the last centres; here by a pass of its own
    in evaluation, starting from the groups. It trains a choice of biases and CLS beside; here `biases` trains all
    biases.

    Args:
        num_virtual_tokens: prompts of a block without proxies.
        num_proxies: prompts of a block with proxies.
        proxy_layers: index or indices of the blocks whose prompts are proxies; the last adapted block by default.
        norm: of the prompts: `"none"`, `"l2"`, or `"layer"` for one that all blocks share and that trains.
        patch_weight: weight of the loss of patches.
        cls_weight: weight of the loss of CLS; give 0 where the backbone has no CLS.
        proxy_scale: factor of the similarities.
        init_scale: factor of the first values, which are Xavier-uniform over all prompts of their kind.
        dropout: probability, on the prompts.
        biases: whether all biases of the backbone train, too.
        class_map: the proxy of each class, from 0; found by `calibrate` if it is not given.
    """

    num_virtual_tokens: int = field(default=20, metadata={"help": "Prompts of a block without proxies.", "tiny": 3})
    num_proxies: int = field(default=10, metadata={"help": "Prompts of a block with proxies.", "tiny": 2})
    proxy_layers: list[int] | int | None = field(
        default=None, metadata={"help": "Blocks whose prompts are proxies of classes; default: the last."}
    )
    norm: str = field(default="none", metadata={"help": "Norm of the prompts: none, l2 or layer."})
    patch_weight: float = field(default=0.05, metadata={"help": "Weight of the loss of patches and proxies."})
    cls_weight: float = field(default=0.05, metadata={"help": "Weight of the loss of CLS and proxies."})
    proxy_scale: float = field(default=1.0, metadata={"help": "Factor of the similarities in both losses."})
    init_scale: float = field(default=1.0, metadata={"help": "Factor of the first values of the prompts."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on a prompt."})
    biases: bool = field(default=False, metadata={"help": "Train all biases of the backbone, too."})
    class_map: list[int] | None = field(
        default=None, metadata={"help": "The proxy of each class, from 0; default: found by k-means (calibrate)."}
    )

    per_stage: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("num_virtual_tokens", 1, MAX_VIRTUAL_TOKENS)
        self._require_integer("num_proxies", 1, MAX_VIRTUAL_TOKENS)
        layers: Any = [self.proxy_layers] if type(self.proxy_layers) is int else self.proxy_layers
        if layers is not None:
            if (
                not isinstance(layers, list | tuple)
                or not layers
                or not all(type(n) is int and n >= 0 for n in layers)
            ):
                self._fail("proxy_layers", "None, an index, or a non-empty list of indices from 0")
            self.proxy_layers = sorted(set(layers))
        self._require_choice("norm", ("none", "l2", "layer"))
        for name in ("patch_weight", "cls_weight"):
            self._require_number(name, 0.0)
        for name in ("proxy_scale", "init_scale"):
            self._require_number(name, 1e-6)
        self._require_number("dropout", 0.0, below=1.0)
        self._require_choice("biases", (True, False))
        given: Any = self.class_map
        if given is not None:
            if not isinstance(given, list | tuple) or not given or not all(type(number) is int for number in given):
                self._fail("class_map", "None, or a list with the number of a proxy for each class")
            if not all(0 <= number < self.num_proxies for number in given):
                self._fail("class_map", f"a list of numbers from 0 to {self.num_proxies - 1} (num_proxies - 1)")
            self.class_map = list(given)

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether one of its terms has a weight."""
        return self.patch_weight > 0 or self.cls_weight > 0

    @property
    def chooses_from_data(self) -> bool:
        """Whether the classes of the proxies are to be found."""
        return self.has_auxiliary_loss and self.class_map is None

    def auxiliary_loss(self, outcome: Outcome) -> Tensor:
        """How far images are from the proxies of their classes, as a mean over blocks with proxies."""
        if self.class_map is None:
            raise NotCalibratedError("DA-VPT")
        labels = outcome.labels
        if labels is None:
            raise ValueError(
                f"The auxiliary loss of the adapter {outcome.adapter!r} compares images by their classes. Call the "
                "model with labels, or auxiliary_loss(model, labels=...)."
            )
        count = len(outcome.values[0])
        if labels.is_floating_point() or labels.shape != (count,):
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and type {labels.dtype}: {type(self).__name__} needs one "
                f"class for each of {count} images. Set patch_weight and cls_weight to 0, or mix no images."
            )
        proxies = torch.tensor(self.class_map, device=labels.device)[labels.clamp(min=0)]
        proxies = torch.where(labels < 0, labels, proxies)
        total = outcome.values[0].new_zeros(())
        for similar in outcome.values:
            for part, weight in zip(similar.unbind(dim=1), (self.patch_weight, self.cls_weight), strict=False):
                if weight:
                    total = total + weight * proxy_anchor(part, proxies)
        return total / len(outcome.values)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Prompts before every block, and biases."""
        blocks = {block.index: block for block in backbone.blocks}
        given: Any = self.proxy_layers
        layers = [backbone.blocks[-1].index] if given is None else given
        if not set(layers) <= set(blocks):
            self._fail("proxy_layers", f"indices of adapted blocks: {', '.join(map(str, blocks))}")
        if self.has_auxiliary_loss:
            self._check_classes(backbone, [blocks[layer] for layer in layers])
        for block in backbone.blocks:
            width = block.width or backbone.width
            proxies = block.index in layers
            number = self.num_proxies if proxies else self.num_virtual_tokens
            of_its_kind = len(layers) if proxies else len(blocks) - len(layers)
            bound = self.init_scale * math.sqrt(6.0 / (width * (number + of_its_kind)))
            sizes = (number, width, bound, self.norm == "l2", self.dropout)
            loss = proxies and self.has_auxiliary_loss
            norm = Shared(f"norm{width}", partial(nn.LayerNorm, width, eps=1e-6)) if self.norm == "layer" else None
            yield Placement(
                block.path, "tokens", TokenSite(reads=loss, queries=loss), partial(self._build, sizes, loss), norm
            )
        for path in (*backbone.outside, *backbone.modules()) if self.biases else ():
            yield Placement(path, "bias", OutputSite(), Shift)

    def _build(self, sizes: tuple[Any, ...], loss: bool, block: nn.Module) -> NormedPrompts:
        return Proxies(*sizes, scale=self.proxy_scale, cls=self.cls_weight > 0) if loss else NormedPrompts(*sizes)

    def _check_classes(self, backbone: VisionBackbone, blocks: list[Block]) -> None:
        """Refuse models without classes to compare, or without CLS."""
        if backbone.dense:
            raise ValueError(
                f"{type(self).__name__} does not fit {backbone.class_name}: its head has classes for positions, and "
                "the auxiliary loss compares whole images. Set patch_weight and cls_weight to 0."
            )
        if self.cls_weight and not all(block.prefix_tokens for block in blocks):
            self._fail("cls_weight", f"0 for {backbone.class_name}, whose tokens have no CLS")
        classes = {outputs for outputs, _ in backbone.head_sizes.values()}
        if self.class_map is not None and classes and len(self.class_map) not in classes:
            self._fail(
                "class_map",
                f"None, or a list of {' or '.join(map(str, sorted(classes)))} numbers, one for each class of the head",
            )

    @torch.no_grad()
    def choose(self, calibration: Calibration) -> None:
        """Find which classes share a proxy."""
        self.class_map = self.group_classes(calibration)

    @torch.no_grad()
    def group_classes(self, calibration: Calibration) -> list[int]:
        """The proxy of each class: itself if there are enough, else by k-means of the classes' mean features.

        K-means starts from the groups of `class_map`, if it is there; else from classes drawn at random. Classes
        without images get proxies at random.

        Raises:
            ValueError: labels are invalid, or a feature is not finite.
        """
        known = [outputs for outputs, _ in calibration.backbone.head_sizes.values()]
        classes = len(self.class_map) if self.class_map is not None else min(known, default=0)
        labels_seen, found = [], []
        for batch in calibration.batches():
            labels_seen.append(calibration.class_labels(batch, type(self).__name__))
            found.append(calibration.features(batch, "DA-VPT").float())
        labels, features = torch.cat(labels_seen), torch.cat(found)
        classes = classes or int(labels.max()) + 1
        if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"dataloader: labels must be from 0 to {classes - 1}.")
        if not features.isfinite().all():
            raise ValueError("DA-VPT: features of the model are not finite.")
        if classes <= self.num_proxies:
            return list(range(classes))
        sums = features.new_zeros(classes, features.shape[1]).index_add(0, labels, features)
        counts = torch.bincount(labels, minlength=classes)
        seen = counts > 0
        points = F.layer_norm(sums[seen] / counts[seen].unsqueeze(1), features.shape[1:])
        if len(points) < self.num_proxies:
            raise ValueError(
                f"dataloader: images of {len(points)} classes, fewer than {type(self).__name__}.num_proxies, "
                f"{self.num_proxies}. Give images of more classes, or lower num_proxies."
            )
        proxies, centres = torch.randint(self.num_proxies, (classes,), device=points.device), None
        if self.class_map is not None:
            before = torch.tensor(self.class_map, device=points.device)[seen]
            drawn = points[torch.randperm(len(points), device=points.device)[: self.num_proxies]]
            centres = _means(points, before, drawn)
        proxies[seen] = cosine_k_means(points, self.num_proxies, centres)
        return proxies.tolist()


class RefreshClassMap(TrainerCallback):
    """Finds again which classes share a proxy of DA-VPT, at the start of every epoch but the first.

    Args:
        dataloader: gives mappings with `pixel_values` and `labels`.
        adapter_name: of the adapter.
        max_batches: most batches to read; None for all.
    """

    def __init__(
        self, dataloader: Iterable[Mapping[str, Any]], adapter_name: str = "default", max_batches: int | None = None
    ) -> None:
        self.dataloader, self.adapter_name, self.max_batches = dataloader, adapter_name, max_batches

    def on_epoch_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Find it."""
        if state.epoch:
            refresh_class_map(model, self.dataloader, self.adapter_name, self.max_batches)


def refresh_class_map(
    model: Any,
    dataloader: Iterable[Mapping[str, Any]],
    adapter_name: str = "default",
    max_batches: int | None = None,
) -> None:
    """Find again which classes share a proxy of DA-VPT, with the features of the model as it is now.

    Args:
        model: with the adapter, active.
        dataloader: gives mappings with `pixel_values` and `labels`. In a distributed run give every process the same.
        adapter_name: of the adapter.
        max_batches: most batches to read; None for all.

    Raises:
        ValueError: the adapter has no such proxies, or the data are invalid; its config is then unchanged.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, DAVPTConfig) or config.class_map is None:
        about = "it has no class_map yet; calibrate it first" if isinstance(config, DAVPTConfig) else "it has none"
        raise ValueError(f"Adapter {adapter_name!r}: there are no proxies to find classes for again: {about}.")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    reader = Calibration(base, find_backbone(base, config.backbone), adapter_name, {}, max_batches, dataloader, False)
    with in_eval_mode(base):
        config.class_map = config.group_classes(reader)
