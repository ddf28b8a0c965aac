"""UniPT."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import Block, VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BlockView, Placement, SideSite
from ...training.defaults import Training


EPS = 1e-8  # as in the authors' norms


class Reduced(nn.Module):
    """LN(W h + b): the stream at one place, with few channels.

    Args:
        width: channels of the stream.
        r: channels of the result.
    """

    def __init__(self, width: int, r: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, r)
        self.norm = nn.LayerNorm(r)

    def forward(self, h: Tensor) -> Tensor:
        """Map (batch, tokens, width) to (batch, tokens, r)."""
        return self.norm(self.down(h))


class Collected(nn.Module):
    """The piece beside a block: it puts the reduced stream after those of the blocks before.

    Args:
        width: channels of the stream.
        r: channels of its reduced form.
        first: whether the stream before the block is collected, too.
    """

    def __init__(self, width: int, r: int, first: bool) -> None:
        super().__init__()
        self.before = Reduced(width, r) if first else None
        self.behind = Reduced(width, r)

    def collect(self, state: Tensor | None, view: BlockView) -> Tensor:
        """The reduced streams so far, (batch, tokens, count r)."""
        assert view.after is not None
        parts = [] if state is None else [state]
        if self.before is not None:
            assert view.before is not None
            parts.append(self.before(view.before))
        return torch.cat([*parts, self.behind(view.after)], dim=-1)

    def forward(self, state: Tensor | None, view: BlockView) -> tuple[Tensor, None]:
        """Map the state to that with one stream more."""
        return self.collect(state, view), None


class UniPT(Collected):
    """The last piece: all streams, mixed by their likeness to the last one, which is the anchor.

        v_i = w_i u_i + u_i,  w_i = relu(u_L u_i^T), rows divided by their sums
        c = softmax_i(W_g (mean u_L * mean u_i) + b_g);  out = W_up relu(u_L + LN(W_p sum_i c_i v_i + b_p)) + b_up

    i counts the streams before the last; means are over tokens that are not padding.

    Args:
        width: channels of the stream.
        r: channels of its reduced form.
        first: whether the stream before the block is collected, too.
    """

    def __init__(self, width: int, r: int, first: bool) -> None:
        super().__init__(width, r, first)
        self.r = r
        self.project = Reduced(r, r)
        self.up = nn.Linear(r, width)
        self.gate = nn.Linear(r, 1)

    def forward(self, state: Tensor | None, view: BlockView) -> tuple[Tensor, None]:
        """Map the state to what replaces the block's output, (batch, tokens, width)."""
        *others, anchor = self.collect(state, view).split(self.r, dim=-1)
        seen = None if view.seen is None else view.seen[..., None].to(anchor.dtype)

        def mean(u: Tensor) -> Tensor:
            return u.mean(dim=1) if seen is None else (u * seen).sum(dim=1) / seen.sum(dim=1)

        confidences = torch.cat([self.gate(mean(anchor) * mean(u)) for u in others], dim=1).softmax(dim=1)
        mixed = torch.zeros_like(anchor)
        for number, u in enumerate(others):
            weights = F.relu(anchor @ u.mT if seen is None else (anchor @ u.mT) * seen.mT)
            weights = weights / (weights.sum(dim=-1, keepdim=True) + EPS)
            mixed = mixed + confidences[:, number, None, None] * (weights @ u + u)
        return self.up(F.relu(anchor + self.project(mixed))), None


def collecting(
    backbone: VisionBackbone, last: Callable[[bool], nn.Module], r: int, inputs: bool
) -> Iterable[tuple[Block, SideSite, Callable[[nn.Module], nn.Module]]]:
    """The blocks of a stage, with the sites and builders of pieces that collect their streams.

    Args:
        backbone: the stage.
        last: builds the piece of the very last block, told whether it also collects the stream before its block.
        r: channels of the reduced streams.
        inputs: whether the stream before the very first block is collected.

    Raises:
        NoTokensError: there is no stream.
    """
    width = backbone.width  # now, and not when pieces are built: here it is told which methods work instead
    for block in backbone.blocks:
        first = inputs and block is backbone.blocks[0] and backbone.width_before is None
        final = block is backbone.blocks[-1] and backbone.width_after is None
        site = SideSite(reads=("before", "after") if first else ("after",), needs_mask=True)

        def build(_: nn.Module, first: bool = first, final: bool = final) -> nn.Module:
            return last(first) if final else Collected(width, r, first)

        yield block, site, build


@register(
    name="unipt",
    paper=Paper(
        "UniPT: Universal Parallel Tuning for Transfer Learning with Efficient Parameter and Memory",
        "CVPR 2024",
        "2308.14316",
    ),
    summary="the last stream reads those of all blocks, in few channels; replaces it",
    visual_tuning="adapter: parallel",
    equation="out = W_up relu(u_L + LN(W_p sum_i c_i (w_i u_i + u_i))), u_i = LN(W_i h_i), w_i ~ relu(u_L u_i^T)",
    counts=(({"r": 96}, 1_046_305), ({"r": 384}, 4_293_505)),
    mergeable=False,
    identity_at_start=False,
    gradients="none",
    training=Training(3e-3),
)
@dataclass
class UniPTConfig(VisualPeftConfig):
    """Config of UniPT, arXiv 2308.14316.

    The streams before the first block and after each block are reduced to few channels. Every token of the last of
    them, the anchor, reads the tokens of each of the others by their likeness; the results are weighed by how like
    the whole streams are, and what comes out replaces the output of the last block. No gradient crosses the backbone.

    The authors (Paranioar/UniPT, VSE-infty/lib/adapter_for_transformer.py) tune text and image encoders for retrieval,
    where the result goes on to a pooling of its own; here it goes to the backbone's final norm and head. In
    hierarchical backbones, streams of earlier stages are averaged over the cells that are merged, and only the stream
    before the very first block is collected beside the outputs; that is our generalisation.

    Args:
        r: channels of the reduced streams.
    """

    r: int = field(default=96, metadata={"help": "Channels of the reduced streams."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1, 10_000)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Beside every block."""

        def last(first: bool) -> nn.Module:
            return UniPT(backbone.width, self.r, first)

        for block, site, build in collecting(backbone, last, self.r, inputs=True):
            yield Placement(block.path, "piece", site, build)
