"""What adapters have at the input and at the output of a model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..backbones.backbone import VisionBackbone
from .exchange import Exchange
from .layer import CHILD, Equation, VisualTunerLayer
from .positions import Positions
from .site import ModelSite


class ModelAdapters(VisualTunerLayer, nn.Module):
    """Equations at the images that a backbone reads and at the model's task heads; a child of the backbone.

    Sites call `run` where they act. Constant additions to the images fold into the backbone's position embeddings.

    Args:
        owner: the backbone.
        model: the model that it is in.
        backbone: its description.
        exchange: shared with the other adapter layers of the model.
    """

    serves = ModelSite
    stands_in = True
    mixes_by_itself = True

    @classmethod
    def create(
        cls, target: nn.Module, path: str, model: nn.Module, backbone: VisionBackbone | None, exchange: Exchange
    ) -> ModelAdapters:
        """For the backbone."""
        assert backbone is not None
        return cls(target, model, backbone, exchange)

    @classmethod
    def require_room(cls, module: nn.Module) -> None:
        """Check that the backbone can have such a child.

        Raises:
            ValueError: it calls all its children, or has something else of that name.
        """
        taken = hasattr(module, CHILD) and not isinstance(getattr(module, CHILD), cls)
        if taken or isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            raise ValueError(
                f"{type(module).__name__} takes no child {CHILD!r}, where methods at the images put theirs: "
                f"{'it has one' if taken else 'it calls all its children one after the other'}. Methods at blocks or "
                "at single modules work there."
            )

    def __init__(self, owner: nn.Module, model: nn.Module, backbone: VisionBackbone, exchange: Exchange) -> None:
        super().__init__()
        self._owner = (owner,)  # a tuple, so that it is not a submodule
        self._init_layer(exchange)
        self.backbone = backbone
        self.handles: list[Any] = []
        self.entered = ""  # by which method images have entered the backbone in this pass, as the sites see them
        self._off_now = False
        self._positions: Positions | None = None  # while something is merged

    def get_base_layer(self) -> nn.Module:
        """The backbone."""
        return self._owner[0]

    def attach(self) -> None:
        """Become a child of the backbone."""
        self.get_base_layer().add_module(CHILD, self)
        self.exchange.outside = self

    def detach(self) -> None:
        """Undo it, and remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        delattr(self.get_base_layer(), CHILD)
        self.exchange.outside = None

    def changes_images(self) -> bool:
        """Whether an active adapter trains before the blocks, so that gradients must cross them."""
        return any(
            p.requires_grad
            for e in self._active()
            if e.site.point == "images" and e.module is not None
            for p in e.module.parameters()
        )

    @property
    def active_name(self) -> str | None:
        """The adapter that decides about the model's classes; `None` where the head itself does."""
        return next((e.adapter for e in self._active() if e.site.classes is not None), None)

    def acts_at(self, point: str) -> bool:
        """Whether an active equation acts at a point, `"images"` or `"logits"`."""
        return not self._off_now and any(e.site.point == point for e in self._active())

    def run(self, point: str, x: Tensor, *more: Tensor) -> Tensor:
        """Let the active equations at a point of the model act, one after the other.

        Args:
            point: where, `"images"` or `"logits"`.
            x: what they change, one row or more a sample.
            more: what they read beside it.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self._off_now or self.disable_adapters or (self.merged and point == "images"):
            return x

        def part(name: str, index: Tensor, x: Tensor) -> Tensor:
            return self._run(point, x, *(each[index] for each in more))

        parts = self._parts((x,))
        return self._run_parts(parts, part, (x,), {}) if parts else self._run(point, x, *more)

    def _run(self, point: str, x: Tensor, *more: Tensor) -> Tensor:
        for equation in self._active():
            if equation.site.point == point:
                x = equation.site.act(self, equation, x, *more)
        return x

    def check_merge(self) -> None:
        """Refuse what is not a constant addition to the images, and backbones without a place for it.

        Raises:
            ValueError: it is such an adapter or backbone.
        """
        self._addend(list(self._active()))
        if self._positions is None:
            Positions(self)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold constant additions to the images into the position embeddings; exact for images of the size as now.

        Args:
            safe_merge: whether to check the result and leave the weights unchanged if it is not finite.
            adapter_names: adapters to merge; the active ones by default.

        Raises:
            ValueError: an adapter or the backbone does not allow it, or the result is not finite (with `safe_merge`).
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.plans]
        if not names:
            return
        addend = self._addend([e for name in (*self.merged_adapters, *names) for e in self.equations_of(name)])
        if safe_merge and not addend.isfinite().all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
        positions = self._positions or Positions(self)
        positions.add(addend)
        self._positions = positions
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the position embeddings exactly."""
        if self._positions is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._positions.restore()
        self._positions = None
        self.merged_adapters.clear()

    @torch.no_grad()
    def _addend(self, equations: list[Equation]) -> Tensor:
        """What equations add to the images, (channels, height, width)."""
        constants = [e.site.addend(e) for e in equations]
        if not equations or any(each is None for each in constants):
            slots = sorted({planned.attribute for plan in self.plans.values() for planned in plan})
            raise ValueError(
                f"{', '.join(slots)} cannot be merged: it is not a constant addition to the images. Keep the adapter "
                "beside the backbone; `unload()` gives the backbone back without it."
            )
        return torch.stack([each.float() for each in constants if each is not None]).sum(dim=0)
