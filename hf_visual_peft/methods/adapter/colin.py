"""CoLin."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.outcome import Outcome
from ...core.registry import Paper, register
from ...sites import BranchSite, Placement, TokenLayout, WithLoss
from ...training.defaults import Training
from .mona import at_centre


BRANCHES = 4  # Kaiming matrices whose decompositions the factors start from; as many branches in the authors' code
KERNEL = 3


class LowRank(nn.Module):
    """A linear of three factors, the one in the middle diagonal and given.

        W = (A diag(g) B)^T,  b as in `nn.Linear`

    A and B start as means of singular vectors of Kaiming-uniform (a = sqrt 5) matrices.

    Args:
        inputs: channels.
        outputs: channels.
        rank: length of the diagonal.
    """

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        kaiming = [nn.init.kaiming_uniform_(torch.empty(outputs, inputs), a=math.sqrt(5)) for _ in range(BRANCHES)]
        left, values, right = torch.linalg.svd(torch.stack(kaiming).mT, full_matrices=False)
        self.down = nn.Parameter(left[:, :, :rank].mean(dim=0).contiguous())
        self.up = nn.Parameter(right[:, :rank].mean(dim=0).contiguous())
        bound = 1.0 / math.sqrt(inputs)
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))
        self.start = values[:, :rank].sum(dim=0)  # of the diagonal

    def forward(self, x: Tensor, diagonal: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs); `diagonal` is (rank,)."""
        return F.linear((x @ self.down) * diagonal, self.up.T, self.bias)

    def orthogonality(self) -> Tensor:
        """|A^T A - I|^2 + |B B^T - I|^2, in float32."""
        with torch.autocast(self.up.device.type, enabled=False):
            down, up = self.down.float(), self.up.float()
            one = torch.eye(down.shape[1], device=down.device)
            return (down.T @ down - one).square().sum() + (up @ up.T - one).square().sum()


class CoLin(nn.Module):
    """Bottleneck of two low-rank projections with one diagonal, and a depthwise convolution over the patch grid.

        t = W_1 x + b_1;  t <- s conv3(t) + (1 - s) t;  f(x) = W_2 GELU(t) + b_2,  s = sigmoid(a)

    Prefix tokens pass the convolution as images of 1x1. a is zero at the start. The loss is that of both projections,
    which pulls their factors towards orthogonal ones.

    Args:
        width: channels of the token stream.
        r: width of the bottleneck.
        rank: of both projections.
    """

    def __init__(self, width: int, r: int, rank: int) -> None:
        super().__init__()
        self.down = LowRank(width, r, rank)
        self.up = LowRank(r, width, rank)
        self.diagonal = nn.Parameter(self.up.start)
        del self.down.start, self.up.start
        self.conv = nn.Conv2d(r, r, KERNEL, padding=KERNEL // 2, groups=r)
        self.mix = nn.Parameter(torch.zeros(r))

    def forward(self, x: Tensor, layout: TokenLayout) -> WithLoss:
        """Map (batch, tokens, width) to the same shape; `layout` says which tokens are patches and where they lie."""
        t = self.down(x, self.diagonal)
        prefix, patches = layout.split(t)
        mixed = layout.join(at_centre(self.conv, prefix), self.conv(patches))
        t = t + torch.sigmoid(self.mix) * (mixed - t)
        out = self.up(F.gelu(t), self.diagonal)
        return WithLoss(out, self.down.orthogonality() + self.up.orthogonality())


@register(
    name="colin",
    paper=Paper("CoLin", "arXiv 2026", "2602.10513"),
    summary="a bottleneck of low-rank projections with a depthwise convolution after attention and MLP; an "
    "orthogonality loss",
    visual_tuning="adapter: sequential",
    equation="z + f(z) after attention and after the MLP, f: W_1, depthwise 3x3 mixed in, GELU, W_2; W = A diag(g) B",
    counts=(({}, 1_214_496),),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class CoLinConfig(VisualPeftConfig):
    """Config of CoLin, arXiv 2602.10513.

    A bottleneck acts on the stream after attention and after the MLP, as in Mona. Its projections are of low rank and
    have one diagonal in common. An auxiliary loss, which `model(..., labels=...)` adds, keeps their factors near
    orthogonal ones.

    What differs from the authors' code (DongshuoYin/CoLin, swin_colin.py): it has four diagonals per projection whose
    sum alone matters, since its four branches share both factors; here is one, the sum, whose gradient is that of each
    of the four. So its value moves a quarter as far per step of the same learning rate. The code also counts the loss
    of the same factors four times, at a weight of 0.5: here the weight is 2. It calls `backward` inside of `forward`,
    which breaks accumulation of gradients and checkpointing; here the loss is returned. The authors adapt Swin, which
    has patches alone; CLS, distillation and register tokens pass the convolution as 1x1 images.

    Args:
        r: width of the bottleneck; 100 in the code at every width of the backbone.
        rank: of both projections; 28 in the code.
        orthogonality: weight of the auxiliary loss; 0 for none.
    """

    r: int = field(default=100, metadata={"help": "Width of the bottleneck, at any width of the backbone."})
    rank: int = field(default=28, metadata={"help": "Rank of both projections.", "tiny": 4})
    orthogonality: float = field(default=2.0, metadata={"help": "Weight of the auxiliary loss; 0: none."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1, 10_000)
        self._require_integer("rank", 1, self.r, "r")
        self._require_number("orthogonality", 0.0)

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether the factors are kept near orthogonal ones."""
        return self.orthogonality > 0

    def auxiliary_loss(self, outcome: Outcome) -> Tensor:
        """The deviation of all factors from orthogonal ones."""
        return self.orthogonality * torch.stack(outcome.values).sum()

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """After both sub-layers of every block."""
        self._require_integer("rank", 1, min(self.r, backbone.width), "r and the backbone's width")

        def build(_: nn.Module) -> nn.Module:
            return CoLin(backbone.width, self.r, self.rank)

        for block in backbone.blocks:
            yield Placement(block.path, "attention", BranchSite("attention", reads="sum", needs_layout=True), build)
            yield Placement(block.path, "mlp", BranchSite("mlp", reads="sum", needs_layout=True), build)
