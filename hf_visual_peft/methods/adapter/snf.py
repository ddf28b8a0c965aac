"""SNF."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import BranchSite, Placement
from ...training.defaults import Training


INIT_BOUND = 0.01


class Flow(nn.Module):
    """A normalizing flow on the shortcut, minus the shortcut itself.

        z_0 = mu + exp(log_sigma) * x;  z_t = z_{t-1} + u_t tanh(w_t . z_{t-1} + b_t);  f(x) = z_T - x

    mu and log_sigma are zero at the start, the rest is drawn from U(-0.01, 0.01).

    Args:
        width: channels of the token stream.
        num_flows: T, the number of planar steps.
    """

    def __init__(self, width: int, num_flows: int) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(width))
        self.log_sigma = nn.Parameter(torch.zeros(width))
        self.w = nn.Parameter(torch.empty(num_flows, width).uniform_(-INIT_BOUND, INIT_BOUND))
        self.u = nn.Parameter(torch.empty(num_flows, width).uniform_(-INIT_BOUND, INIT_BOUND))
        self.b = nn.Parameter(torch.empty(num_flows).uniform_(-INIT_BOUND, INIT_BOUND))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        z = self.mu + self.log_sigma.exp() * x
        for w, u, b in zip(self.w.unbind(), self.u.unbind(), self.b.unbind(), strict=True):
            z = z + torch.tanh(z @ w + b).unsqueeze(-1) * u
        return z - x


@register(
    name="snf",
    paper=Paper(
        "Adapting Shortcut With Normalizing Flow: An Efficient Tuning Framework for Visual Recognition",
        "CVPR 2023",
        None,
        page="https://cvpr.thecvf.com/virtual/2023/poster/22667",
    ),
    summary="a normalizing flow on the shortcuts",
    visual_tuning="adapter: parallel",
    equation="z = flow(x) + MHSA(LN1 x); out = flow'(z) + MLP(LN2 z); flow: affine, T times z + u tanh(w . z + b)",
    counts=(({"num_flows": 6}, 258_192), ({"num_flows": 4}, 184_416)),
    mergeable=False,
    identity_at_start=False,
    training=Training(1e-3),
)
@dataclass
class SNFConfig(VisualPeftConfig):
    """Config of SNF, CVPR 2023.

    A normalizing flow acts on the shortcuts around attention and around the MLP of every block: an affine map of each
    channel, then a number of planar steps. Starts close to the identity. As in the released code, nothing keeps a step
    invertible, and the flow's log-determinant is not part of the loss. Where the backbone has stochastic depth, its
    branches keep it, as in the released blocks of EVA; in those of ViT and CLIP they lose it, which matters only in
    training. The affine maps alone have the 0.036 M parameters of the paper's abstract; six planar steps give the 0.25
    M that V-PETL Bench reports.

    Args:
        num_flows: T, planar steps of each flow; the released code's default is 16.
    """

    num_flows: int = field(default=16, metadata={"help": "Planar steps of each flow."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("num_flows", 1, 1000)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """On both shortcuts of every block."""

        def build(_: nn.Module) -> nn.Module:
            return Flow(backbone.width, self.num_flows)

        for block in backbone.blocks:
            yield Placement(block.path, "attention", BranchSite("attention", reads="stream"), build)
            yield Placement(block.path, "mlp", BranchSite("mlp", reads="stream"), build)
