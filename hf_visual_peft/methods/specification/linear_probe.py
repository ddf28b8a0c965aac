"""The linear probe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import Placement, whole_module
from ...training.defaults import Training


@dataclass
class WholeModulesConfig(VisualPeftConfig):
    """Base of the configs that train copies of modules of the model."""

    whole_modules: ClassVar[bool] = True
    chooses_blocks: ClassVar[bool] = False
    per_stage: ClassVar[bool] = False


@register(
    name="linearprobe",
    paper=Paper("Visual Prompt Tuning", "ECCV 2022", "2203.12119"),
    summary="the head alone",
    visual_tuning="fine-tuning",
    equation="only the head trains",
    counts=(({}, 0),),
    mergeable=True,
    gradients="none",
    identity_at_start=True,
    training=Training(1e-2),
)
@dataclass
class LinearProbeConfig(WholeModulesConfig):
    """Config of the linear probe, in the form of VPT's baselines (arXiv 2203.12119).

    Only the task head trains. `modules_to_save` names modules to train beside it; `layers_to_transform` and
    `exclude_modules` have nothing to act on and must be None.
    """

    copied_head: ClassVar[str] = "linearprobe_copy"

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """The head."""
        if not backbone.heads:
            name = backbone.headless
            if name:
                raise ValueError(
                    f"{type(self).__name__}: {name} has no known task head, so nothing would train. Register "
                    f"its modules as heads: hf_visual_peft.register_heads({name!r}, (...))."
                )
            raise ValueError(
                f"{type(self).__name__}: {backbone.class_name} has no task head, so nothing would train. Load it "
                "with one, for example by AutoModelForImageClassification."
            )
        twice = sorted(set(self.modules_to_save or ()) & {path.rpartition(".")[2] for path in backbone.heads})
        if twice:
            self._fail(
                "modules_to_save", f"None or names of other modules: the head ({', '.join(twice)}) trains anyway"
            )
        return map(whole_module, backbone.heads)
