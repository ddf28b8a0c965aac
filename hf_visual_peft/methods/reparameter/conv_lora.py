"""Conv-LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.outcome import Outcome
from ...core.registry import Paper, register
from ...sites import MapSite, Placement, TokenLayout, WithLoss
from ...training.defaults import Training
from .rows import Rows, projections


KERNEL = 3
ROLES = ("query", "key", "value", "output")


class Router(nn.Module):
    """Sends each map to one of several experts, by the mean over its cells.

        e = argmax(c + s * eps),  c = W_c mean(h),  s = softplus(W_n mean(h)) + 0.01

    eps ~ N(0, 1) in training, 0 in evaluation. W start at zero.

    Args:
        r: channels of the maps.
        experts: how many.
    """

    def __init__(self, r: int, experts: int) -> None:
        super().__init__()
        self.choice = nn.Parameter(torch.zeros(r, experts))
        self.noise = nn.Parameter(torch.zeros(r, experts))

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The expert of each map, a factor that is 1, and the loss of (batch, r, height, width) in training."""
        means = maps.mean(dim=(2, 3))
        scores = clean = means @ self.choice
        deviation = None
        if self.training:
            deviation = F.softplus(means @ self.noise) + 0.01
            scores = clean + torch.randn_like(clean) * deviation
        best, experts = scores.max(dim=1)
        factor = torch.softmax(best.unsqueeze(1), dim=1)  # of the one that is chosen
        if deviation is None or scores.shape[1] == 1:
            return experts, factor, None
        return experts, factor, self._imbalance(clean, scores, deviation, experts)

    def _imbalance(self, clean: Tensor, scores: Tensor, deviation: Tensor, experts: Tensor) -> Tensor:
        """Squared coefficients of variation of how often experts are chosen, and of how often they would be."""
        first, second = scores.topk(2, dim=1).values.unbind(dim=1)
        mine = experts.unsqueeze(1) == torch.arange(scores.shape[1], device=experts.device)
        # the score that another draw has to exceed: the second best for the chosen one, the best for all others
        threshold = torch.where(mine, second.unsqueeze(1), first.unsqueeze(1))
        load = torch.special.ndtr((clean - threshold) / deviation).sum(dim=0)
        return _variation(mine.sum(dim=0).to(load.dtype)) + _variation(load)


def _variation(x: Tensor) -> Tensor:
    return x.var() / (x.mean().square() + 1e-10)


class ConvLoRA(nn.Module):
    """A low-rank update of a linear with a convolution in the bottleneck, at the scale of the image that fits it.

        f(y, x) = y + s B g,  g = h + up_e^-1(GELU(conv_e(up_e(h)))),  h = A dropout(x)

    up_e resizes a map to e times its size, bicubically; the router chooses e from 1 to the number of experts, for each
    image. Prefix tokens have g = h. A is Kaiming-uniform (a = sqrt 5), B zero; convolutions start as `nn.Conv2d` does,
    without bias.

    Args:
        linear: the linear, for its sizes.
        rows: of its output that are updated.
        r: channels of the bottleneck.
        experts: how many.
        scale: s.
        dropout: probability, of the input.
    """

    def __init__(self, linear: nn.Linear, rows: Rows, r: int, experts: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.rows, self.scale = rows, scale
        self.down = nn.Parameter(torch.empty(r, linear.in_features))
        self.up = nn.Parameter(torch.zeros(rows.size, r))
        self.kernels = nn.Parameter(torch.empty(experts, r, r, KERNEL, KERNEL))
        self.biases = nn.Parameter(torch.zeros(experts, r))
        self.router = Router(r, experts)
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        bound = 1.0 / math.sqrt(r * KERNEL**2)
        nn.init.uniform_(self.kernels, -bound, bound)

    def forward(self, y: Tensor, x: Tensor, layout: TokenLayout) -> Tensor | WithLoss:
        """The new output, from the linear's output, its input and the layout of the input's tokens."""
        h = F.linear(self.dropout(x), self.down)
        prefix, maps = layout.split(h.flatten(1, -2))
        experts, factor, loss = self.router(maps)
        maps = maps + factor[:, :, None, None] * self._mixed(maps, experts)
        g = layout.join(prefix, maps).reshape(h.shape)
        y = y + self.rows.pad(self.scale * F.linear(g, self.up), y.shape[-1], -1)
        return y if loss is None else WithLoss(y, loss)

    def _mixed(self, maps: Tensor, experts: Tensor) -> Tensor:
        """Each map by its own expert; all compute all, so that no shape depends on what is chosen."""
        out = torch.zeros_like(maps)
        for index in range(len(self.kernels)):
            out = torch.where((experts == index)[:, None, None, None], self._expert(index, maps).to(out.dtype), out)
        return out

    def _expert(self, index: int, maps: Tensor) -> Tensor:
        size = (maps.shape[2], maps.shape[3])
        larger = maps
        if index:
            larger = F.interpolate(maps, scale_factor=index + 1, mode="bicubic", align_corners=False)
        mixed = F.gelu(F.conv2d(larger, self.kernels[index], self.biases[index], padding=KERNEL // 2))
        return F.interpolate(mixed, size, mode="bicubic", align_corners=False) if index else mixed


@register(
    name="convlora",
    paper=Paper(
        "Convolution Meets LoRA: Parameter Efficient Finetuning for Segment Anything Model", "ICLR 2024", "2401.17868"
    ),
    summary="LoRA of queries, keys and values with a convolution in the bottleneck, at a scale that a router chooses",
    visual_tuning="parameter: weight",
    equation="W x + b + s B g, g = h + conv_e(h) at e times the size, h = A x, e chosen for each image",
    # 36 linears with 2 768 3 of LoRA, 8 (81 + 3) of the experts and 2 3 8 of the router
    counts=(({}, 191_808), ({"roles": ("query", "value")}, 127_872)),
    mergeable=False,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class ConvLoRAConfig(VisualPeftConfig):
    """Config of Conv-LoRA, arXiv 2401.17868.

    LoRA at projections of attention whose bottleneck is a map of the image with a few channels. A convolution mixes
    its cells, at one of several scales: for each image a router chooses the factor by which the map is enlarged before
    the convolution, 1 for the first expert, 2 for the second, and so on. It stands where attention sees windows, too;
    the map is then the window. In training the choice is random, and an auxiliary loss, which `model(..., labels=...)`
    adds, keeps experts equally busy.

    What differs from the authors' code (autogluon, adaptation_layers.py): it takes square maps without prefix tokens;
    here CLS, distillation and register tokens, and prompts of other adapters, pass by the convolution. There and here
    what an expert returns is not multiplied by the router's weight, so the router learns from the auxiliary loss
    alone.

    Args:
        r: channels of the bottleneck.
        experts: number of scales.
        roles: projections that get an update: one or more of `"query"`, `"key"`, `"value"`, `"output"`.
        alpha: the update is multiplied by alpha / r.
        dropout: probability, on the input.
        balance: weight of the auxiliary loss, a sum over all linears; 0 for none.
    """

    r: int = field(default=3, metadata={"help": "Channels of the bottleneck."})
    experts: int = field(default=8, metadata={"help": "Number of scales, 1 to this.", "tiny": 3})
    roles: tuple[str, ...] = field(
        default=("query", "key", "value"), metadata={"help": "Projections of attention that get an update."}
    )
    alpha: float = field(default=3.0, metadata={"help": "The update is multiplied by alpha / r."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the input."})
    balance: float = field(default=0.01, metadata={"help": "Weight of the loss that keeps experts busy; 0: none."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_integer("experts", 1, 32)
        self._require_some("roles", ROLES)
        self._require_number("alpha")
        self._require_number("dropout", 0.0, below=1.0)
        self._require_number("balance", 0.0)

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether experts are kept equally busy."""
        return self.balance > 0 and self.experts > 1

    def auxiliary_loss(self, outcome: Outcome) -> Tensor:
        """How unequally busy the experts are; zero in evaluation, where nothing is drawn."""
        return self.balance * torch.stack(outcome.values).sum() if outcome.values else torch.zeros(())

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At the chosen projections of every block."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")
        if backbone.architecture.grid and not backbone.image_channels:
            raise ValueError(
                f"{type(self).__name__} does not fit {backbone.class_name}: its images are padded in a batch, and "
                "resizing maps would mix the padding in."
            )
        for block in backbone.blocks:
            kind = (block.table or backbone.architecture).grid
            site = MapSite(kind, block.prefix_tokens, block.window)
            for role, rows in projections(backbone, block).items():
                if role in self.roles:
                    build = partial(
                        ConvLoRA,
                        rows=rows,
                        r=self.r,
                        experts=self.experts,
                        scale=self.alpha / self.r,
                        dropout=self.dropout,
                    )
                    yield Placement(rows.path, role, site, build)
