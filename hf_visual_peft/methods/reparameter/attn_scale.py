"""AttnScale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...backbones.backbone import Block, VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BranchSite, LogitSite, Placement, TokenLayout, attention_of
from ...training.defaults import Training
from ..prompt.vpt import MAX_GRID


class AttnScale(nn.Module):
    """A factor for every pair of tokens.

        f(S) = A * S,  S = Q K^T / sqrt(d_head), before masks and position biases;  A is 1 at the start

    Args:
        tokens: of the sequence.
        heads: number of matrices of factors: one for each head, or 1 for all.
    """

    def __init__(self, tokens: int, heads: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.ones(heads, tokens, tokens))

    def forward(self, logits: Tensor, layout: TokenLayout | None = None) -> Tensor:
        """Map (batch, heads, tokens, tokens) to the same shape.

        Raises:
            ValueError: the sequence has a different length.
        """
        if logits.shape[-1] != self.factors.shape[-1]:
            raise ValueError(
                f"AttnScale has factors for {self.factors.shape[-1]} tokens, but the images have {logits.shape[-1]}: "
                "set grid_size to the rows (or columns) of their patches."
            )
        return logits * self.factors


class Offset(nn.Module):
    """The domain-residual adapter: a vector that is added to what a sub-layer adds, zero at the start.

    Args:
        width: channels of the token stream.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape; the same vector everywhere."""
        return self.offset.expand_as(x)


@register(
    name="attnscale",
    paper=Paper("Strong Baselines for Parameter Efficient Few-Shot Fine-tuning", "AAAI 2024", "2304.01917"),
    summary="a factor for each pair of tokens in every attention, an offset after every sub-layer",
    visual_tuning="parameter: weight",
    equation="softmax(A * Q K^T / sqrt(d_head)) V, and e1, e2 added to what attention and MLP add",
    # 12 matrices of 197 x 197; 24 vectors of 768
    counts=(({}, 484_140),),
    mergeable=False,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class AttnScaleConfig(VisualPeftConfig):
    """Config of AttnScale with the domain-residual adapter, arXiv 2304.01917.

    Every attention gets a factor for each pair of tokens, and every sub-layer an offset. The abstract says: "scaling
    parameters for each attention matrix", beside a domain-residual adapter. Our reading: the factors act on the
    logits, start at 1 and are by default the same for all heads; the offsets are those of eTT (arXiv 2301.02419). The
    factors fit one image size only. With windows (Swin) a block has factors for the pairs of tokens of a window, the
    same for all windows, which is also our reading. Attention is computed without a fused kernel.

    Args:
        grid_size: rows and columns of patches the images have; by default those of the backbone's own image size.
        share_heads: whether all heads of a block share one matrix of factors; else each has its own.
        residual: whether to add the offsets.
    """

    grid_size: int | None = field(
        default=None, metadata={"help": "Rows and columns of patches; default: of the backbone's own image size."}
    )
    share_heads: bool = field(default=True, metadata={"help": "The same factors for all heads of a block."})
    residual: bool = field(default=True, metadata={"help": "Whether offsets are added to both sub-layers."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid_size is not None:
            self._require_integer("grid_size", 1, MAX_GRID)
        self._require_choice("share_heads", (True, False))
        self._require_choice("residual", (True, False))

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At the logits of every attention, and after both sub-layers."""
        if backbone.num_heads is None:
            raise ValueError(f"{type(self).__name__}: the config of {backbone.class_name} has no num_attention_heads.")
        tokens = self._tokens(backbone)
        heads = 1 if self.share_heads else backbone.num_heads

        def build(block: Block) -> Placement:
            def scale(module: nn.Module) -> nn.Module:
                attention_of(module, block.projections[0].removeprefix(f"{block.path}."))
                return AttnScale(tokens or block.window**2, heads)

            return Placement(block.path, "logits", LogitSite(), scale)

        for block in backbone.blocks:
            yield build(block)
            for sublayer in ("attention", "mlp") if self.residual else ():
                site = BranchSite(sublayer, reads="output")
                yield Placement(block.path, sublayer, site, lambda _: Offset(backbone.width))

    def _tokens(self, backbone: VisionBackbone) -> int:
        """Tokens of a sequence; 0 for attention in windows, which have their own size."""
        if all(block.window for block in backbone.blocks):
            if self.grid_size is not None:
                self._fail("grid_size", f"None, because the windows of {backbone.class_name} have their own size")
            return 0
        if backbone.architecture.grid != "full":
            raise ValueError(f"{type(self).__name__}: {backbone.class_name} has no fixed number of tokens.")
        if self.grid_size is None and backbone.grid is None:
            self._fail("grid_size", f"given, because the config of {backbone.class_name} has no image size")
        rows, columns = (self.grid_size,) * 2 if self.grid_size is not None else backbone.grid or (0, 0)
        return backbone.prefix_tokens + rows * columns * backbone.times
