"""Sparse-Tuning."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BlockView, Kept, Placement, ReductionSite, SideSite
from ...training.defaults import Training


class AttentiveTokens(nn.Module):
    """Keeps the patches that attention weighs most, and merges the others into one token.

        kept: the ceil(keep n) patches with the largest a_j;  merged: sum over the others of a_j z_j

    Args:
        keep: share of patches that stay.
        merge: whether the others are merged; else they are dropped.
    """

    def __init__(self, keep: float, merge: bool) -> None:
        super().__init__()
        self.keep, self.merge = keep, merge

    def forward(self, patches: Tensor, weights: Tensor) -> Kept:
        """Of z, (batch, patches, width), and a, (batch, patches)."""
        count = math.ceil(self.keep * weights.shape[1])
        order = weights.argsort(dim=1, descending=True)
        if count == weights.shape[1] or not self.merge:
            return Kept(order[:, :count], None)
        others = order[:, count:]
        found = patches.gather(1, others.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
        share = weights.gather(1, others).unsqueeze(1).to(found.dtype)
        return Kept(order[:, : count + 1], share @ found)


class DenseAdapter(nn.Module):
    """A bottleneck whose two inner maps are read together.

        h = ReLU(W_1 x + b_1);  t = W_2 h + b_2;  f(x) = W_5 (W_4 [t; W_3 t + b_3] + b_4 + h) + b_5

    W_1, W_2 and W_4 are Kaiming-uniform (a = sqrt 5), the rest zero, so f starts at zero.

    Args:
        width: channels of the token stream.
        r: width of h.
        inner: width of t.
        begins: whether the sum over a group of blocks starts here.
        ends: whether it is added to the stream here.
    """

    def __init__(self, width: int, r: int, inner: int, begins: bool, ends: bool) -> None:
        super().__init__()
        self.begins, self.ends = begins, ends
        self.down = nn.Linear(width, r)
        self.inner_down = nn.Linear(r, inner)
        self.inner_up = nn.Linear(inner, r)
        self.join = nn.Linear(inner + r, r)
        self.up = nn.Linear(r, width)
        for linear in (self.down, self.inner_down, self.join):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
        for linear in (self.inner_up, self.up):
            nn.init.zeros_(linear.weight)
        for linear in (self.down, self.inner_down, self.inner_up, self.join, self.up):
            nn.init.zeros_(linear.bias)

    def forward(self, total: Tensor | None, view: BlockView) -> tuple[Tensor, Tensor]:
        """Map the sum over the blocks before to that with this block, and return what is added to the stream."""
        assert view.between is not None
        h = F.relu(self.down(view.between))
        t = self.inner_down(h)
        own = self.up(self.join(torch.cat([t, self.inner_up(t)], dim=-1)) + h)
        total = own if self.begins or total is None else total + own
        return total, own + total if self.ends else own


@register(
    name="sparsetuning",
    paper=Paper(
        "Sparse-Tuning: Adapting Vision Transformers with Efficient Fine-tuning and Inference",
        "arXiv 2024",
        "2405.14700",
    ),
    summary="a bottleneck beside every MLP, summed over groups of blocks, between which patches leave the stream",
    visual_tuning="adapter: parallel",
    equation="out = z + MLP(LN2 z) + f(z), and + the sum of f over its group of blocks at the group's end; before the "
    "MLP of the first block of each group but the first: z <- [CLS; patches with the largest CLS attention; "
    "sum a_j z_j of the others]",
    counts=(({}, 1_314_432), ({"r": 8, "inner": 4}, 158_928)),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class SparseTuningConfig(VisualPeftConfig):
    """Config of Sparse-Tuning, arXiv 2405.14700.

    The blocks form groups of equal depth. In the first block of each group but the first, after attention, patches to
    which CLS attends little leave the stream; they are merged into one token. What follows computes less, in training
    and in evaluation: with the defaults ViT-B/16 goes on with 139 of 196 patches after block 3, with 99 after block 6
    and with 71 after block 9. A bottleneck stands beside every MLP, and what the bottlenecks of a group add is added
    once more after its last block. Patches leave at the start, too, so this is not the identity.

    Heads read CLS, or pool over the tokens that are left. `last_hidden_state` and later `hidden_states` of the model
    have these alone. Models that need all tokens are refused: with windows, maps, relative or rotary positions, padded
    images, several frames in a sequence, or heads for places in the image.

    What differs from the released code (liuting20/Sparse-Tuning): it adds the embeddings once more at the end of the
    first group, which changes the pretrained features before training, and leaves the last block out of the sum of the
    last group. Here each group is treated alike. Without a CLS or another token before the patches, attention is the
    mean over all patches; the paper has no such model.

    Args:
        r: width of the bottleneck.
        inner: width of the narrower map in it.
        keep: share of patches that stay in the stream, each time.
        groups: number of groups of blocks, of all the backbone's; at most one for each block. 1 keeps all tokens.
        merge: whether the patches that leave are merged into one token, as in the paper; else they are dropped.
    """

    r: int = field(default=64, metadata={"help": "Width of the bottleneck.", "tiny": 4})
    inner: int = field(default=32, metadata={"help": "Width of the narrower map in the bottleneck.", "tiny": 2})
    keep: float = field(default=0.7, metadata={"help": "Share of patches that stay in the stream, each time."})
    groups: int = field(default=4, metadata={"help": "Groups of blocks, between which patches leave.", "tiny": 2})
    merge: bool = field(default=True, metadata={"help": "Merge the patches that leave into one token."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_integer("inner", 1, self.r, "r")
        self._require_number("keep", 0.0)
        if not 0 < self.keep <= 1:
            self._fail("keep", "a share greater than 0, and at most 1")
        self._require_integer("groups", 1)
        self._require_choice("merge", (True, False))

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """A bottleneck beside every block, and what takes tokens out in the first block of each later group."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")
        if self.groups > 1 and backbone.stage is not None:
            raise ValueError(
                f"{type(self).__name__} does not fit {backbone.class_name}: its blocks form stages of several widths, "
                "between which its own tokens are merged. Set groups=1, with which no others leave the stream."
            )
        groups = min(self.groups, backbone.depth)
        starts = [number * backbone.depth // groups for number in range(groups)]
        group_of = [sum(block.index >= start for start in starts) for block in backbone.blocks]
        for block, before, group, after in zip(
            backbone.blocks, (0, *group_of), group_of, (*group_of[1:], 0), strict=False
        ):
            begins, last = group != before, group != after
            if block.index in starts[1:]:
                yield Placement(
                    block.path, "tokens", ReductionSite(), lambda _: AttentiveTokens(self.keep, self.merge)
                )
            yield Placement(
                block.path,
                "dense",
                SideSite(("between", "after"), frozen=False, ends=False, aligned=False),
                lambda _, begins=begins, last=last: DenseAdapter(  # type: ignore[misc]
                    backbone.width, self.r, self.inner, begins, last
                ),
            )
