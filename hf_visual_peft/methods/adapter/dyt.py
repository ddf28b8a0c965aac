"""Dynamic tuning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.outcome import Outcome
from ...core.registry import Paper, register
from ...sites import BranchSite, ChoiceSite, Exchange, Placement, WithLoss
from ...training.defaults import Training
from .adaptformer import AdaptFormer


class Dispatcher(nn.Module):
    """Decides for each token whether the MLP acts on it.

        m = 1 if sigmoid((w z + b + g) / tau) > 0.5, else 0;  g ~ Logistic(0, 1) in training, 0 in evaluation

    g is the difference of two Gumbel variables. The gradient of m is that of the sigmoid. w ~ N(0, 0.02), b = 0. What
    is left for the loss is m itself.

    Args:
        width: channels of the token stream.
        temperature: tau, in training.
    """

    def __init__(self, width: int, temperature: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        self.temperature = temperature
        self.everything = False  # whether all tokens are chosen, while the complete model runs
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z: Tensor) -> Tensor | WithLoss:
        """(batch, tokens, width) to the decisions, (batch, tokens)."""
        if self.everything:
            return z.new_ones(z.shape[:2])
        logits = self.linear(z).squeeze(-1)
        if self.training:
            uniform = torch.rand_like(logits, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
            logits = (logits + torch.logit(uniform).to(logits.dtype)) / self.temperature
        chosen = (logits > 0).to(logits.dtype)
        if logits.requires_grad:
            soft = torch.sigmoid(logits)
            chosen = chosen + (soft - soft.detach())  # 0 or 1 to the bit
        return WithLoss(chosen, chosen)


@register(
    name="dyt",
    paper=Paper(
        "Dynamic Tuning Towards Parameter and Inference Efficiency for ViT Adaptation", "NeurIPS 2024", "2403.11808"
    ),
    visual_tuning="adapter: parallel",
    equation="out = z + m MLP(LN2 z) + s (W_up ReLU(W_down z)), m_j = [w z_j + b > 0] for each patch, 1 for CLS",
    counts=(({}, 313_548), ({"r": 8}, 165_996), ({"r": 64}, 1_198_860)),
    mergeable=False,
    identity_at_start=False,
    summary="a bottleneck beside every MLP, which acts on the patches that a dispatcher chooses and skips the others",
    training=Training(3e-3),
)
@dataclass
class DyTConfig(VisualPeftConfig):
    """Config of dynamic tuning (DyT), arXiv 2403.11808.

    The MLP of every block acts only on the tokens that a small dispatcher chooses; an adapter beside it acts on all.
    Prefix tokens, such as CLS, are always chosen. A fresh dispatcher chooses about half of the others, so this is not
    the identity. In training the decisions are random, and all is computed. In evaluation the MLP runs on the chosen
    tokens alone and saves the time of the others, if it treats each token by itself; where it has a convolution (PVT
    v2, SegFormer), or the model is compiled or exported, its output for the others is set to zero.

    An auxiliary loss, which `model(..., labels=...)` adds, has three terms: the square of the distance between the
    share of chosen tokens and `keep`; the loss of the task of the complete model, in which all tokens are chosen, in a
    second pass; and the divergence of the model's classes from those of the complete one, which gets no gradient from
    it. The second pass costs as much as the first; it runs unless both weights are 0.

    The paper's variants with several experts in the adapter, or that leave out attention or whole blocks, are not
    implemented.

    Args:
        r: width of the adapter's bottleneck.
        scale: factor s of the adapter, or `"learnable"`.
        dropout: probability, in the bottleneck.
        keep: share of tokens that the MLPs shall act on, in the mean over blocks and images.
        keep_weight: of the first term of the loss.
        complete_weight: of the second.
        distillation: weight of the third.
        temperature: of the random decisions in training.
    """

    r: int = field(default=16, metadata={"help": "Width of the adapter's bottleneck."})
    scale: float | str = field(default=1.0, metadata={"help": 'Factor s of the adapter, or "learnable".'})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability in the bottleneck."})
    keep: float = field(default=0.5, metadata={"help": "Share of tokens that MLPs act on, in the mean."})
    keep_weight: float = field(default=2.0, metadata={"help": "Weight of the squared distance to that share."})
    complete_weight: float = field(default=1.0, metadata={"help": "Weight of the loss of the complete model."})
    distillation: float = field(default=1.0, metadata={"help": "Weight of the divergence from the complete model."})
    temperature: float = field(default=5.0, metadata={"help": "Temperature of the decisions in training."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("r", 1)
        self._require_number_or("scale", "learnable")
        self._require_number("dropout", 0.0, below=1.0)
        self._require_number("keep", 0.0)
        if self.keep > 1:
            self._fail("keep", "a share from 0 to 1")
        for name in ("keep_weight", "complete_weight", "distillation"):
            self._require_number(name, 0.0)
        self._require_number("temperature", 1e-6)

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether one of its terms has a weight."""
        return self.keep_weight > 0 or self._completes

    @property
    def _completes(self) -> bool:
        return self.complete_weight > 0 or self.distillation > 0

    def auxiliary_loss(self, outcome: Outcome) -> Tensor:
        """The share of chosen tokens, and what the complete model says of the batch."""
        chosen = torch.cat([each.flatten() for each in outcome.values])
        total = self.keep_weight * (chosen.float().mean() - self.keep).square()
        if self.complete_weight:
            total = total + self.complete_weight * outcome.loss_again
        if self.distillation:
            student, teacher = outcome.logits, outcome.logits_again
            if student is None or teacher is None:
                raise ValueError(
                    f"{type(self).__name__} compares the model's logits with those of the complete model, and it "
                    "returns none. Set distillation and complete_weight to 0."
                )
            p, q = (F.log_softmax(logits.float(), dim=1) for logits in (student, teacher.detach()))
            total = total + self.distillation * F.kl_div(p, q, reduction="none", log_target=True).sum(dim=1).mean()
        return total

    @contextmanager
    def extra_pass(self, exchange: Exchange, owner: str) -> Iterator[bool]:
        """Let all dispatchers choose every token."""
        found = [
            each.module
            for layer in exchange.blocks.values()
            for each in layer._active()
            if each.owner == owner and isinstance(each.module, Dispatcher)
        ]
        for dispatcher in found:
            dispatcher.everything = True
        try:
            yield self._completes
        finally:
            for dispatcher in found:
                dispatcher.everything = False

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """A dispatcher and an adapter at the MLP of every block."""
        self._require_integer("r", 1, backbone.width, "the backbone's width")
        width = backbone.width
        for block in backbone.blocks:
            yield Placement(block.path, "dispatcher", ChoiceSite(), lambda _: Dispatcher(width, self.temperature))
            yield Placement(
                block.path,
                "mlp",
                BranchSite("mlp", reads="stream"),
                lambda _: AdaptFormer(width, self.r, self.scale, self.dropout, "none"),  # type: ignore[arg-type]
            )
