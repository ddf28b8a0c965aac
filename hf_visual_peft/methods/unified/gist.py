"""GIST."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.outcome import Outcome
from ...core.registry import Paper, register
from ...sites import BranchSite, Exchange, Placement, Shared, TokenSite
from ...training.defaults import Training


class GistToken(nn.Module):
    """One learned token, the same for every image: dropout(G), G ~ U(-0.5, 0.5).

    Args:
        width: channels of the backbone.
        dropout: probability, independent for each image.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(1, width).uniform_(-0.5, 0.5))
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch_size: int) -> Tensor:
        """(batch, 1, width)."""
        return self.dropout(self.token.expand(batch_size, -1, -1))


class SharedBranch(nn.Module):
    """A branch whose bottleneck stands beside both sub-layers of a block: s B(x).

    Args:
        scale: s.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor, bottleneck: nn.Module) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        return self.scale * bottleneck(x)


@register(
    name="gist",
    paper=Paper(
        "GIST: Improving Parameter Efficient Fine Tuning via Knowledge Interaction", "arXiv 2023", "2312.07255"
    ),
    summary="a learned token that the head reads, too, in an auxiliary loss; around any method",
    visual_tuning="several",
    equation="loss + 0.5 CE(z_G) + 0.75 (KL(p, p_G) + KL(p_G, p)), z_G: the head on a learned token",
    # the token; and 12 bottlenecks
    counts=(({"r": 0}, 768), ({"r": 4}, 83_760)),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class GISTConfig(VisualPeftConfig):
    """Config of GIST, arXiv 2312.07255.

    A learned token joins the sequence after the prefix tokens and passes through all blocks. In training, the head
    reads it in place of the image, too, and an auxiliary loss, which `model(..., labels=...)` adds, compares its
    logits with the labels and with those of the image. Evaluation uses the latter alone.

    The head reads the token by a second pass of the model in which no block runs: what follows the blocks gets the
    token at every place of the sequence. So whatever a head reads there, CLS, a mean, or both, it is the token.

    It goes with any other method, as an adapter beside it (`model.base_model.set_adapter([...])`). r is the bottleneck
    of the authors' own code, one for both sub-layers of a block, outside of stochastic depth; 0 for the token alone.

    What differs from the released code (JCruan519/GIST): it takes the logarithm of a softmax, which rounds to minus
    infinity; here both are one function. As there, neither side of the divergences is detached, and they are not
    multiplied by the square of the temperature.

    Args:
        r: width of the bottleneck beside attention and MLP; 0: none.
        scale: factor of the bottleneck.
        dropout: probability, on the token.
        token_weight: of the loss of the token's logits.
        interaction: weight of the divergences between both logits.
        temperature: of both in the divergences.
    """

    r: int = field(default=0, metadata={"help": "Width of a bottleneck beside both sub-layers; 0: none.", "tiny": 2})
    scale: float = field(default=0.1, metadata={"help": "Factor of the bottleneck."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability on the token."})
    token_weight: float = field(default=0.5, metadata={"help": "Weight of the loss of the token's logits."})
    interaction: float = field(default=0.75, metadata={"help": "Weight of the divergences between both logits."})
    temperature: float = field(default=3.0, metadata={"help": "Temperature of both logits in the divergences."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 0)
        self._require_number("dropout", 0.0, below=1.0)
        self._require_number("scale")
        for name in ("token_weight", "interaction"):
            self._require_number(name, 0.0)
        self._require_number("temperature", 1e-6)

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether the head reads the token in training."""
        return self.token_weight > 0 or self.interaction > 0

    def auxiliary_loss(self, outcome: Outcome) -> Tensor:
        """The loss of the token's logits, and their divergence from those of the image."""
        token, image = outcome.logits_again, outcome.logits
        if token is None or image is None or image.ndim != 2:
            shape = None if image is None else tuple(image.shape)
            raise ValueError(f"GIST compares logits of (batch, classes), and the model returns {shape}.")
        total = self.token_weight * outcome.loss_again if self.token_weight else token.new_zeros(())
        if self.interaction:
            p, q = (F.log_softmax(z.float() / self.temperature, dim=-1) for z in (image, token))
            both = F.kl_div(p, q, reduction="batchmean", log_target=True)
            both = both + F.kl_div(q, p, reduction="batchmean", log_target=True)
            total = total + self.interaction * both
        return total

    @contextmanager
    def extra_pass(self, exchange: Exchange, owner: str) -> Iterator[bool]:
        """Let what follows the blocks read the token at every place."""
        token = exchange.handed_on.pop(owner, None)
        if token is None:
            yield False
            return
        last = max(exchange.blocks)

        def instead(index: int, x: Tensor) -> Tensor:
            return token.to(x.dtype).expand_as(x) if index == last else x

        exchange.instead = instead
        try:
            yield True
        finally:
            exchange.instead = None

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """The token from the first block to the last, and the bottlenecks."""
        blocks = backbone.blocks
        if [block.index for block in blocks] != list(range(blocks[0].index, backbone.depth)):
            raise ValueError(
                f"{type(self).__name__}: the token passes through all blocks to the head, so the blocks must be "
                f"consecutive up to {backbone.depth - 1}, but they are {[block.index for block in blocks]}. Choose "
                "layers_to_transform, exclude_modules and modules_to_save so."
            )
        if self.r:
            self._require_integer("r", 0, backbone.width, "the backbone's width")
        for block in blocks:
            first = block is blocks[0]
            site = TokenSite(takes=not first, hands_on=True)
            build = (lambda _: GistToken(backbone.width, self.dropout)) if first else None
            yield Placement(block.path, "token", site, build)
            if self.r:
                shared = Shared(f"bottleneck{block.index}", partial(self._bottleneck, backbone.width))
                for sublayer in ("attention", "mlp"):
                    branch = BranchSite(sublayer, reads="stream")
                    yield Placement(block.path, sublayer, branch, lambda _: SharedBranch(self.scale), shared)

    def _bottleneck(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, self.r), nn.GELU(), nn.Linear(self.r, width))
