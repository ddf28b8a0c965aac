"""Fine-tuning of the last blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ...backbones.backbone import VisionBackbone
from ...core.registry import Paper, register
from ...sites import Placement, whole_module
from ...training.defaults import Training
from .linear_probe import WholeModulesConfig


@register(
    name="partial",
    paper=Paper("Visual Prompt Tuning", "ECCV 2022", "2203.12119"),
    summary="the last blocks and the norm after them; gradients stop there",
    visual_tuning="fine-tuning",
    equation="the last k blocks, the norm after them and the head train",
    counts=(({"k": 1}, 7_089_408), ({"k": 2}, 14_177_280)),
    mergeable=True,
    gradients="partial",
    identity_at_start=True,
    training=Training(1e-3),
)
@dataclass
class PartialConfig(WholeModulesConfig):
    """Config of Partial-k, in the form of VPT's baselines (arXiv 2203.12119).

    The last k blocks, the norm after them and the head train, with all their parameters. Gradients stop there.
    `layers_to_transform` and `exclude_modules` have nothing to act on and must be None.

    Args:
        k: number of blocks.
    """

    k: int = field(default=1, metadata={"help": "Number of blocks that train, counted from the last."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("k", 1)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """The blocks and the norm."""
        self._require_integer("k", 1, backbone.depth, "the backbone's blocks")
        blocks = backbone.blocks[-self.k :]
        return map(whole_module, (*(block.path for block in blocks), *backbone.final_norms))
