"""Salient channel tuning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.calibration import Calibration
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BranchSite, Placement, to_tokens
from ...training.defaults import Training
from ..specification.deltas import Chosen


CHANNELS = 96  # of the paper
INIT_STD = 0.02


class SCT(nn.Module):
    """A linear of some channels, added to them.

        f(x)[C] = W x[C] + b,  0 in all other channels

    W is drawn from a normal of standard deviation 0.02, b is zero. C is chosen from data.

    Args:
        width: channels of the token stream.
        channels: how many of them are in C.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.linear.weight, std=INIT_STD)
        nn.init.zeros_(self.linear.bias)
        self.salient = Chosen(channels, width, "SCT")

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape.

        Raises:
            NotCalibratedError: C is not chosen yet.
        """
        indices = self.salient()
        branch = self.linear(x.index_select(-1, indices)).to(x.dtype)
        return torch.zeros_like(x).index_copy(-1, indices, branch)


class ClassNorms:
    """Running L2 norms of channels over the patches of all images of a class."""

    def __init__(self) -> None:
        self.squares: dict[int, Tensor] = {}

    def add(self, patches: Tensor, labels: Tensor) -> None:
        """Add (batch, patches, channels) of classes (batch,)."""
        squares = patches.detach().double().square().sum(dim=1)
        for label in labels.unique():
            total = squares[labels == label].sum(dim=0)
            self.squares[int(label)] = self.squares.get(int(label), 0) + total

    def mean(self) -> Tensor:
        """The norms, averaged over the classes, (channels,)."""
        return torch.stack([square.sqrt() for square in self.squares.values()]).mean(dim=0)


@register(
    name="sct",
    paper=Paper(
        "SCT: A Simple Baseline for Parameter-Efficient Fine-Tuning via Salient Channels", "IJCV 2023", "2309.08513"
    ),
    summary="a linear of the salient channels after attention",
    visual_tuning="adapter: sequential",
    equation="z[C] = z[C] + W z[C] + b after attention, C the channels with the largest class-mean L2 norm",
    counts=(({"channels": 96}, 111_744),),
    mergeable=False,
    identity_at_start=False,
    calibrated=True,
    training=Training(1e-3),
)
@dataclass
class SCTConfig(VisualPeftConfig):
    """Config of salient channel tuning (SCT), arXiv 2309.08513.

    A linear with a skip connection acts on a few channels of the token stream after attention. Its channels are chosen
    once for each block, from the stream in the frozen model: those with the largest L2 norm over all patches of the
    training images of a class, averaged over the classes. Prefix tokens and padding do not count for the choice, but
    pass the linear like all others. Starts close to the identity. The authors' code also has a scale, but does not
    apply it.

    Args:
        channels: number of channels; by default 96 as in the paper, or all where the backbone has fewer.
    """

    channels: int | None = field(
        default=None, metadata={"help": "Channels to tune; by default 96, or all where there are fewer."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels is not None:
            self._require_integer("channels", 1)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """After the attention of every block."""
        if self.channels is not None:
            self._require_integer("channels", 1, backbone.width, "the backbone's width")
        channels = self.channels or min(CHANNELS, backbone.width)
        for block in backbone.blocks:
            site = BranchSite("attention", reads="sum")
            yield Placement(block.path, "attention", site, lambda _: SCT(backbone.width, channels))

    @torch.no_grad()
    def choose(self, calibration: Calibration) -> None:
        """The channels with the largest norms.

        Raises:
            ValueError: a norm is not finite.
        """
        backbone, model = calibration.backbone, calibration.model
        blocks = {block.path: block for block in backbone.blocks}
        table = backbone.architecture
        parts, handles = [], []
        stream: dict[nn.Module, Tensor] = {}
        for path, part in calibration.equations("attention"):
            block = blocks[path]
            module = model.get_submodule(block.entrances.get("mlp", path))
            parts.append((module, part, block.prefix_tokens))
            if "mlp" in block.entrances:
                see: Any = lambda module, args: stream.update({module: args[0]})  # noqa: E731
                handles.append(module.register_forward_pre_hook(see))
            else:  # the block ends with its attention
                see = lambda module, args, output: stream.update({module: output})  # noqa: E731
                handles.append(module.register_forward_hook(see))
        totals = [ClassNorms() for _ in parts]
        try:
            for batch in calibration.batches():
                labels = batch.pop("labels")
                calibration.output(batch)
                for (norm, _, prefix_tokens), total in zip(parts, totals, strict=True):
                    tokens = to_tokens(stream[norm], table.stream_inside or table.stream)
                    patches = tokens[:, prefix_tokens:]
                    if "pixel_attention_mask" in batch:
                        patches = patches * batch["pixel_attention_mask"].to(patches).unsqueeze(-1)
                    # some blocks see an image as several sequences, one after the other
                    total.add(patches, labels.repeat_interleave(len(patches) // len(labels)))
        finally:
            for handle in handles:
                handle.remove()
        means = [total.mean() for total in totals]
        if not all(mean.isfinite().all() for mean in means):
            raise ValueError("SCT: the norms of the token stream are not finite.")
        for (_, part, _), mean in zip(parts, means, strict=True):
            indices = mean.topk(len(part.salient.indices)).indices
            part.salient.choose(indices.sort().values)
