"""Visual prompt tuning."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import Placement, Shared, TokenSite
from ...training.defaults import Training


MAX_VIRTUAL_TOKENS = 10_000  # the papers stop at 200; attention is quadratic in them


class Prompts(nn.Module):
    """Learned tokens, the same for every image.

        P ~ U(-v, v), v = sqrt(6 / (patch_features + width)); tokens = dropout(P W^T + b), or dropout(P)

    Args:
        num_virtual_tokens: how many.
        width: channels of P: of the backbone, or of the projection's input.
        patch_features: input values of one patch, channels x height x width.
        dropout: probability, independent for each image.
    """

    def __init__(self, num_virtual_tokens: int, width: int, patch_features: int, dropout: float) -> None:
        super().__init__()
        bound = math.sqrt(6.0 / (patch_features + width))
        self.prompts = nn.Parameter(torch.empty(num_virtual_tokens, width).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch_size: int, projection: nn.Module | None = None) -> Tensor:
        """Tokens of shape (batch, num_virtual_tokens, width of the backbone)."""
        tokens = self.prompts if projection is None else projection(self.prompts)
        return self.dropout(tokens.expand(batch_size, -1, -1))


class Projection(nn.Linear):
    """Linear from the prompts' width to the backbone's; weight He-normal over the outputs, bias as in `nn.Linear`."""

    def reset_parameters(self) -> None:
        """Draw new weights."""
        super().reset_parameters()
        nn.init.kaiming_normal_(self.weight, a=0.0, mode="fan_out")


@register(
    name="vpt",
    paper=Paper("Visual Prompt Tuning", "ECCV 2022", "2203.12119"),
    visual_tuning="prompt: vision-driven",
    equation="x_i = [prefix; P_i; patches] into block i (deep), or P before the first block only (shallow)",
    counts=(
        ({"num_virtual_tokens": 50, "deep": True}, 460_800),
        ({"num_virtual_tokens": 50, "deep": False}, 38_400),
    ),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class VPTConfig(VisualPeftConfig):
    """Config of visual prompt tuning (VPT), arXiv 2203.12119.

    Learned tokens join the sequence after all prefix tokens (CLS, distillation, registers), without position. *Deep*:
    every block gets its own prompts, and their outputs are dropped. *Shallow*: one set enters before the first block
    and passes through all. Head, pooler and `hidden_states` see only the backbone's own tokens; attention maps include
    the prompts. Attention in windows or with reduced keys gets deep prompts in every window, as extra keys and values;
    blocks whose attention pools the grid get none.

    The paper keeps the backbone in eval mode during training; if the backbone has dropout or stochastic depth, call
    `.eval()` on it to do the same. The defaults here are 10 deep prompts, 92,160 parameters on ViT-B/16. The defaults
    of the authors' code are 5 shallow prompts, 3,840 parameters; the authors choose both per task. Known differences
    in other code: the bound of the initialisation uses the number of tokens instead of the width (Adapter+), and
    prompts stand at the end of the sequence (NOAH).

    Args:
        num_virtual_tokens: prompts per block; the paper tunes it from 1 to 200.
        deep: new prompts in every block; else one set before the first of `layers_to_transform`, which must then be
            consecutive.
        dropout: probability, on the prompts.
        projection_dim: width of the prompts, which a linear shared by all blocks then maps to the backbone's width;
            None: prompts have the backbone's width and no linear.
    """

    num_virtual_tokens: int = field(default=10, metadata={"help": "Prompts a block."})
    deep: bool = field(default=True, metadata={"help": "New prompts in every block; else before the first only."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on a prompt."})
    projection_dim: int | None = field(default=None, metadata={"help": "Width of the prompts before a projection."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("num_virtual_tokens", 1, MAX_VIRTUAL_TOKENS)
        self._require_choice("deep", (True, False))
        self._require_number("dropout", 0.0, below=1.0)
        if self.projection_dim is not None:
            self._require_integer("projection_dim", 1)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """One set of prompts before every block, or before the first."""
        if self.projection_dim is not None:
            self._require_integer("projection_dim", 1, backbone.width, "the backbone's width")
        blocks = backbone.blocks
        if not self.deep and [b.index for b in blocks] != list(range(blocks[0].index, blocks[-1].index + 1)):
            raise ValueError(
                f"{type(self).__name__}.deep is False: prompts pass from block to block, so the blocks must be "
                f"consecutive, but they are {[block.index for block in blocks]}. Choose layers_to_transform or "
                "exclude_modules so."
            )
        width = self.projection_dim or backbone.width
        projection = Shared("shared", partial(Projection, width, backbone.width)) if self.projection_dim else None
        for block in blocks:
            new = self.deep or block is blocks[0]
            site = TokenSite(takes=not new, hands_on=not self.deep and block is not blocks[-1])
            build = (lambda _: self._prompts(width, backbone.patch_features)) if new else None
            yield Placement(block.path, "tokens", site, build, projection)

    def _prompts(self, width: int, patch_features: int) -> Prompts:
        return Prompts(self.num_virtual_tokens, width, patch_features, self.dropout)
