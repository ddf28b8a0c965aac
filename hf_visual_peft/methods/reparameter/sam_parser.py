"""SAM-PARSER."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from ...backbones.backbone import LINEAR_ROLES, VisionBackbone
from ...core.registry import Paper, register
from ...core.targets import TargetedConfig
from ...sites import Placement, WeightSite
from ...training.defaults import Training


TOLERANCE = 1e-4  # of the largest singular value; float32 rounds by 1e-6, bfloat16 by 1e-3


class SingularValues(nn.Module):
    """Changes of the singular values of a linear's weight W = U diag(sigma) V^T, zero at the start.

        W' = W + U diag(delta) V^T

    U and V follow from W, in float32, and are not saved. sigma is, so that the changes cannot be loaded beside another
    weight, whose singular vectors would be others.

    Args:
        linear: the linear, whose weight is decomposed; a quantised one as the floating-point numbers it stands for.
    """

    sigma: Tensor
    no_weight_decay = ("delta",)

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(min(linear.out_features, linear.in_features)))
        self.register_buffer("sigma", torch.zeros(len(self.delta)))
        self._linear = (linear,)  # a tuple, so that it is not a submodule
        self._vectors: tuple[Tensor, Tensor] | None = None
        if not self.delta.is_meta and not linear.weight.is_meta:
            self._decompose()

    @torch.no_grad()
    def _decompose(self) -> tuple[Tensor, Tensor]:
        """U and V^T; checks that W has the singular values of the file, if these come from one.

        Raises:
            ValueError: it has not.
        """
        weight = dequantize_module_weight(self._linear[0]).detach().float()
        left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
        if not self.sigma.is_meta and self.sigma.any():
            self._compare(self.sigma, sigma)
        self.sigma = sigma.to(weight.device)
        self._vectors = (left.contiguous(), right.contiguous())
        return self._vectors

    def _compare(self, saved: Tensor, own: Tensor) -> None:
        error = (saved.to(own) - own).abs().max() / own.max().clamp_min(1e-12)
        if not error <= TOLERANCE:
            raise ValueError(
                f"SAM-PARSER: the adapter's singular values belong to another weight than that of {self._linear[0]}: "
                f"they differ by {float(error):.1e} of the largest. Load it beside the backbone that it was trained "
                "with, in the same precision, or merge it there."
            )

    def forward(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The new weight and bias, from the old ones."""
        left, right = (x.to(weight.device) for x in self._vectors or self._decompose())
        return weight + ((left * self.delta.float()) @ right).to(weight.dtype), bias

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(f"{prefix}sigma")
        if isinstance(saved, Tensor) and self._vectors is not None:
            self._compare(saved, self.sigma)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@register(
    name="samparser",
    paper=Paper(
        "SAM-PARSER: Fine-tuning SAM Efficiently by Parameter Space Reconstruction", "AAAI 2024", "2308.14604"
    ),
    summary="the singular values of every linear train",
    visual_tuning="parameter: weight",
    equation="W + U diag(delta) V^T, W = U diag(sigma) V^T",
    # the smaller size of six linears is 768 in 12 blocks
    counts=(({}, 55_296),),
    mergeable=True,
    identity_at_start=True,
    training=Training(3e-3),
)
@dataclass
class SAMPARSERConfig(TargetedConfig):
    """Config of SAM-PARSER, arXiv 2308.14604.

    Each linear of the blocks is decomposed once, and only its singular values train. Which matrices of SAM the paper
    takes could not be verified; here it is every linear of the blocks, or those in `roles`. The re-implementation that
    was read (Chongjie-Si/Subspace-Tuning) trains the singular values themselves; this adapter holds their changes, so
    that it switches off and merges. Its decomposition happens in the first forward pass and replaces the parameter,
    which an optimizer made before never sees; here it happens when the adapter is made.

    The singular vectors take as much memory as two matrices of the linear's size, and each step computes a gradient of
    the whole weight. An adapter fits only the very weights that it was trained beside, in the same precision: it is
    refused beside others.

    Args:
        roles: linears that it acts on: one or more of `"query"`, `"key"`, `"value"`, `"output"`, `"fc1"`, `"fc2"`.
    """

    roles: tuple[str, ...] = field(default=LINEAR_ROLES, metadata={"help": "Linears whose singular values train."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_some("roles", LINEAR_ROLES)

    def trained_parameters(self, name: str, shape: tuple[int, ...]) -> int:
        """As the base class's; the backbone's own singular values do not train."""
        return 0 if name.endswith(".sigma") else super().trained_parameters(name, shape)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At the chosen linears of every block."""
        for path in backbone.modules(self.roles):
            yield self._at(path)

    def _at(self, path: str) -> Placement:
        return Placement(path, "values", WeightSite(), lambda linear: SingularValues(linear))  # type: ignore[arg-type]
