"""LoRA's update of one linear, as a part of the adapters that hold several methods.

LoRA itself is peft's, `LoraConfig`. Its layers belong to a tuner of its own, so an adapter of this library that holds
LoRA beside other methods computes the same update here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...sites import LinearSite, Placement
from .products import plus_product
from .rows import Rows


class LowRank(nn.Module):
    """A low-rank update of a linear.

        f(y, x) = y + s B A dropout(x)

    A is Kaiming-uniform (a = sqrt 5) and B zero.

    Args:
        linear: the linear, for its sizes.
        r: rank.
        scale: s, or `"learnable"`: one number that starts at 1.
        dropout: probability, on the input.
        rows: outputs of the linear that it acts on; None: all.
    """

    def __init__(
        self,
        linear: nn.Linear,
        r: int,
        scale: float | Literal["learnable"],
        dropout: float,
        rows: Rows | None = None,
    ) -> None:
        super().__init__()
        self.rows = rows or Rows("", 0, linear.out_features)
        self.down = nn.Linear(linear.in_features, r, bias=False)
        self.up = nn.Linear(r, self.rows.size, bias=False)
        self.scale = nn.Parameter(torch.ones(1)) if scale == "learnable" else scale
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.up.weight)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The new output (..., out_features), from the linear's output and its input (..., in_features)."""
        hidden = self.down(self.dropout(x))
        if self.rows.size < y.shape[-1]:
            return y + self.rows.pad(self.scale * self.up(hidden), y.shape[-1], dim=-1)
        if isinstance(self.scale, nn.Parameter):
            return plus_product(y, self.scale * hidden, self.up.weight.T)
        return plus_product(y, hidden, self.up.weight.T, self.scale)

    @torch.no_grad()
    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the linear with the update folded in."""
        scale = self.scale.to(weight) if isinstance(self.scale, nn.Parameter) else self.scale
        update = scale * (self.up.weight.to(weight) @ self.down.weight.to(weight))
        return weight + self.rows.pad(update, len(weight), dim=-2), bias


# fields of `LoraConfig` with a meaning here; all others must have their defaults
LORA_FIELDS = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform"),
)
_GENERAL = ("peft_type", "auto_mapping", "peft_version", "runtime_config")


@dataclass
class LoraPart(VisualPeftConfig):
    """LoRA (arXiv 2106.09685) as a part of an adapter, with the settings of a `LoraConfig`; see `from_lora`."""

    method_type: ClassVar[Any] = "LORA"
    whole = "LoraConfig"  # for errors

    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)

    @classmethod
    def from_lora(cls, lora: LoraConfig) -> LoraPart:
        """The part that computes what peft's LoRA does with such a config.

        Args:
            lora: with its plain fields: rank, alpha, dropout, targets and layers.

        Raises:
            ValueError: a field has no meaning here.
        """
        plain = LoraConfig()
        for field in dataclasses.fields(LoraConfig):
            value = getattr(lora, field.name)
            if field.name not in (*LORA_FIELDS, *_GENERAL) and value != getattr(plain, field.name):
                raise ValueError(
                    f"LoraConfig.{field.name} is {value!r}: as a part of an adapter LoRA takes only "
                    f"{', '.join(LORA_FIELDS)}. Leave it out, or put LoRA on the model as an adapter of its own."
                )
        if lora.init_lora_weights is not True:
            raise ValueError(
                f"LoraConfig.init_lora_weights is {lora.init_lora_weights!r}: as a part of an adapter LoRA starts as "
                "by True. Put it on the model as an adapter of its own for another start."
            )
        part = cls(
            layers_to_transform=lora.layers_to_transform,
            exclude_modules=lora.exclude_modules,
            lora=lora,
        )
        for name in ("r", "lora_alpha"):
            value = getattr(lora, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"LoraConfig.{name} is {value!r}: must be an integer of at least 1.")
        return part

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At the linears that `target_modules` names in the blocks, by default those of query and value.

        Raises:
            ValueError: none has such a name, or the rank is larger than a linear.
        """
        lora: Any = self.lora
        inside = backbone.modules(("query", "key", "value", "output", "fc1", "fc2"))
        if lora.target_modules is None:
            targets = backbone.modules(("query", "value")) or backbone.modules(("fc1", "fc2"))
        else:
            names = dataclasses.replace(lora, layers_to_transform=None, exclude_modules=None)
            every = str(lora.target_modules).lower() == "all-linear"
            targets = [path for path in inside if every or check_target_module_exists(names, path)]
        if not targets:
            raise ValueError(
                f"LoraConfig.target_modules is {lora.target_modules!r}: no linear in attention or MLP of "
                f"{backbone.class_name} has such a name. Those of a block are {', '.join(inside[:6])}."
            )
        scale = lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)
        build = partial(LowRank, r=lora.r, scale=scale, dropout=lora.lora_dropout)
        for path in dict.fromkeys(targets):
            yield Placement(path, "update", LinearSite(), build)
