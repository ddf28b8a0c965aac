"""Visual query tuning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BlockView, Placement, SideSite
from ...sites.heads import HeadUse
from ...sites.queries import takes_queries
from ...training.defaults import Training
from ..prompt.vpt import MAX_VIRTUAL_TOKENS


class QueryTokens(nn.Module):
    """Learned queries of one block, and the columns of the classifier that read their outputs.

        z = Block(dropout(Q); keys and values of x);  logits <- logits + W z / |z|

    Q ~ U(-v, v), v = sqrt(6 / (patch_features + width)); z is the vector of all their outputs, and W is He-normal over
    the classes, without a bias: the head has one.

    Args:
        num_virtual_tokens: queries.
        width: channels of the block's stream.
        patch_features: input values of one patch, channels x height x width.
        classes: logits of each head.
        dropout: probability, independent for each image.
        normalize: whether z is scaled to unit length.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        width: int,
        patch_features: int,
        classes: Sequence[int],
        dropout: float,
        normalize: bool,
    ) -> None:
        super().__init__()
        bound = math.sqrt(6.0 / (patch_features + width))
        self.queries = nn.Parameter(torch.empty(num_virtual_tokens, width).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)
        self.normalize = normalize
        self.head_columns = nn.ModuleList(nn.Linear(num_virtual_tokens * width, n, bias=False) for n in classes)
        for linear in self.head_columns.parameters():
            nn.init.kaiming_normal_(linear, mode="fan_out")

    def forward(self, logits: Tensor | None, view: BlockView) -> tuple[Tensor, None]:
        """Add this block's part to the logits of the blocks before, (batch, classes of all heads) or None."""
        assert view.after is not None
        assert view.ask is not None
        features = view.ask(self.dropout(self.queries.expand(len(view.after), -1, -1))).flatten(1)
        if self.normalize:
            features = F.normalize(features, dim=1)
        new = torch.cat([linear(features) for linear in self.head_columns], dim=1)
        return new if logits is None else logits + new, None


@register(
    name="vqt",
    paper=Paper(
        "Visual Query Tuning: Towards Effective Usage of Intermediate Representations for Parameter and Memory "
        "Efficient Transfer Learning",
        "CVPR 2023",
        "2212.03220",
    ),
    summary="queries beside every block, whose outputs the head also reads",
    visual_tuning="prompt: vision-driven",
    equation="z_i = Block_i(Q_i; K, V of x_i); logits = W [x_cls; z_1; ...; z_L] + b",
    counts=(({"num_virtual_tokens": 1}, 9_216),),
    head_inputs=9_216,
    mergeable=False,
    identity_at_start=False,
    gradients="partial",
    training=Training(1e-2),
)
@dataclass
class VQTConfig(VisualPeftConfig):
    """Config of visual query tuning (VQT), arXiv 2212.03220.

    In every block, learned tokens go through attention and MLP beside the block's own tokens. They attend to the
    block's keys and values; no token attends to them. So the backbone's features do not change, and it runs without
    gradients. Training keeps only what the few queries need in a block: its keys and values, and the activations of
    the queries. The outputs of the queries are extra inputs of the head, which becomes wider: on ViT-B/16 with one
    query, each class gets 768 x 12 = 9,216 weights beside its own 768. Most trained parameters are in the head: with
    100 classes 921,600 extra ones, beside 9,216 in the queries. These columns are kept in the blocks; their results
    add up to that of one linear on all features.

    As in the authors' code, the outputs of a block are scaled to unit length as one vector, and so is the head's own
    input. Their initial bias of -4.6, their choice of features by a group lasso after training, and the variants that
    pool outputs are not implemented.

    The model needs linear heads for the whole image, and plain softmax attention between all tokens, without windows.
    Queries have no position: no rotary embedding and no position bias.

    Args:
        num_virtual_tokens: queries per block; 1 in the paper and its scripts, 5 by default in the authors' code.
        dropout: probability, on the queries; 0.1 in the authors' scripts.
        normalize: whether all inputs of the head are scaled to unit length.
    """

    widened_head: ClassVar[str] = "head_columns"

    num_virtual_tokens: int = field(default=1, metadata={"help": "Queries a block."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability on a query."})
    normalize: bool = field(default=True, metadata={"help": "Whether the head reads everything at unit length."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("num_virtual_tokens", 1, MAX_VIRTUAL_TOKENS)
        self._require_number("dropout", 0.0, below=1.0)
        self._require_choice("normalize", (True, False))

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Queries beside every block."""
        name = f"{type(self).__name__} does not fit {backbone.class_name}"
        sizes, width = backbone.head_sizes, backbone.width
        if not backbone.heads:
            raise ValueError(
                f"{name}: it has no task head here to read the queries' outputs. Load it with one, for example by "
                "AutoModelForImageClassification."
            )
        if backbone.dense or not all(path in sizes for path in backbone.heads):
            raise ValueError(
                f"{name}: its task head, {', '.join(backbone.heads)}, is not a linear on features of the image."
            )
        outputs = tuple((path, sizes[path][0]) for path in backbone.heads)
        prompts, grid = backbone.architecture.prompts, backbone.architecture.grid
        if not all(block.projections for block in backbone.blocks):
            raise ValueError(f"{name}: not all of its blocks have attention that queries could join.")
        for block in backbone.blocks:
            query = (*block.projections, "")[0].removeprefix(f"{block.path}.")
            site = SideSite(ends=False, aligned=False, asks=True, heads=HeadUse(outputs, self.normalize))
            build = partial(self._build, name, query, prompts, grid, width, backbone.patch_features, outputs)
            yield Placement(block.path, "queries", site, build)

    def _build(
        self,
        name: str,
        query: str,
        prompts: str | None,
        grid: str | None,
        width: int,
        patch_features: int,
        outputs: Sequence[tuple[str, int]],
        block: nn.Module,
    ) -> QueryTokens:
        if not takes_queries(block, query, prompts, grid):
            raise ValueError(
                f"{name}: {type(block).__name__} has no plain softmax attention over all tokens, which extra "
                "queries could join."
            )
        classes = [size for _, size in outputs]
        return QueryTokens(self.num_virtual_tokens, width, patch_features, classes, self.dropout, self.normalize)
