"""MoSA."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BranchSite, Placement
from ...training.defaults import Training


SEED_STEP = 1_000_003  # between blocks; generators use only the lower 32 bits


class MoSA(nn.Module):
    """Bottleneck whose up projection is split into sparse modules, of which training uses one at a time.

        f(x) = s ((M_k * W_up) dropout(GELU(W_down LN(x) + b_down)) + b_up)   in training, k drawn anew at each call
        f(x) = s (mean_k (M_k * W_up) GELU(W_down LN(x) + b_down) + b_up)     in evaluation

    The masks M_k are random, equally large, disjoint and together complete, so the mean of M_k * W_up is W_up / m.
    W_down is Kaiming-uniform with a = sqrt 5; W_up and both biases are zero at the start.

    Args:
        width: channels of the token stream.
        r: width of the bottleneck.
        modules: m, the number of sparse modules.
        scale: s.
        dropout: probability, in the bottleneck.
        seed: of the masks, which depend only on it.
    """

    owner: Tensor

    def __init__(self, width: int, r: int, modules: int, scale: float, dropout: float, seed: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, r)
        self.up = nn.Linear(r, width)
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        self.num_modules = modules
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        # The module that each entry of W_up belongs to. Always on the CPU, even where weights are on the meta device:
        # only the seed decides, so the masks need not be saved.
        order = torch.randperm(width * r, generator=torch.Generator().manual_seed(seed), device="cpu")
        owner = (order * modules // (width * r)).to(torch.int32)  # gloo and NCCL carry no int16
        self.register_buffer("owner", owner.view(width, r), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        hidden = self.dropout(F.gelu(self.down(self.norm(x))))
        if self.training:
            weight = self.up.weight
            drawn = torch.randint(self.num_modules, (), device=weight.device)
            weight = weight * (self.owner.to(weight.device) == drawn)
        else:
            weight = self.up.weight / self.num_modules
        return self.scale * F.linear(hidden, weight, self.up.bias)


@register(
    name="mosa",
    paper=Paper("MoSA: Mixture of Sparse Adapters for Visual Efficient Tuning", "arXiv 2023", "2312.02923"),
    summary="a bottleneck beside the MLP, of which each training step uses a random part",
    visual_tuning="adapter: parallel",
    equation="out = z + MLP(LN2 z) + f(z), f = s W_k GELU(W_down LN .), W_k the k-th part of W_up, k random",
    counts=(({"r": 64}, 1_208_064), ({"r": 16}, 322_752)),
    mergeable=False,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class MoSAConfig(VisualPeftConfig):
    """Config of MoSA, arXiv 2312.02923.

    A bottleneck with its own norm stands beside the MLP and reads the stream before the MLP's norm. The entries of its
    up projection are split at random into sparse modules of equal size. Each training step uses one of them, drawn
    anew for each block and the same for the whole batch. Evaluation uses the mean of all. They share the down
    projection.

    All of that, the initialisation and the defaults follow the usual setting of the released code. Our simplification:
    the up projection has one bias, where the code has one for each module and averages them. The authors' training
    runs each batch twice and adds the symmetric KL divergence of the two outputs to the loss; that is not part of the
    adapter.

    Args:
        r: width of the bottleneck; 64 for fine-grained classification, 16 for VTAB-1k.
        num_modules: number of sparse modules.
        scale: s.
        dropout: probability, in the bottleneck.
        mask_seed: decides which entries belong to which module; training that resumes later needs the same seed.
    """

    r: int = field(default=64, metadata={"help": "Width of the bottleneck."})
    num_modules: int = field(default=4, metadata={"help": "Number of sparse modules."})
    scale: float = field(default=0.1, metadata={"help": "Factor s of the branch."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability in the bottleneck."})
    mask_seed: int = field(default=0, metadata={"help": "Decides which entries belong to which module."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_integer("num_modules", 1, 1000)
        self._require_number("scale")
        self._require_number("dropout", 0.0, below=1.0)
        self._require_integer("mask_seed", 0, 2**31 - 1)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """Beside the MLP of every block."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")

        def build(seed: int, _: nn.Module) -> nn.Module:
            return MoSA(backbone.width, self.r, self.num_modules, self.scale, self.dropout, seed)

        for block in backbone.blocks:
            seed = self.mask_seed + SEED_STEP * block.index
            yield Placement(block.path, "mlp", BranchSite("mlp", reads="stream"), partial(build, seed))
