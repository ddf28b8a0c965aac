"""The site at the images that a backbone reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ..backbones.backbone import Block, VisionBackbone
from ..backbones.paths import within
from .layer import CHILD, Equation, call_equation
from .model import ModelAdapters
from .site import ModelSite


_NAMES = ("pixel_values", "pixel_values_videos")


class PixelEquation(Protocol):
    """What an equation at the images is called with.

    One that adds a constant, the same to all images, also has `addend()`, which returns it, (channels, height, width);
    it then merges, and takes a factor for the constant, (channels, 1, 1), as its last argument.
    """

    def __call__(self, images: Tensor, *shared: nn.Module) -> Tensor:
        """The new images, (batch, channels, height, width), of this or another size."""
        ...


@dataclass(frozen=True)
class PixelSite(ModelSite):
    """The images that the backbone reads, before it does anything with them.

    The equation is called with (batch, channels, height, width), and returns images of this or another size. Videos
    are batches of images. Placements are at the path of the backbone.

    Attributes:
        mean: of each channel, that normalised the images. With it the equation sees and returns images from 0 to 1;
            without it, normalised ones.
        std: the same for the standard deviation.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    point = "images"

    def why_not(self, block: Block | None, whole: VisionBackbone) -> str | None:
        """The input may be no images."""
        if whole.image_channels and whole.architecture.grid != "spatial_shapes":
            return None
        return ": its input is no images of (batch, channels, height, width), so prompts at pixels have no place."

    def why_not_beside(self, path: str, copied: Sequence[str]) -> str | None:
        """A copy of the whole backbone would have its own input."""
        whole = within(path, copied)
        return whole and f"the method acts at the input of {path!r}, which {whole!r} would replace. Name its parts."

    def connect(self, layer: ModelAdapters, model: nn.Module, backbone: VisionBackbone | None) -> None:
        """Watch the input of the backbone."""
        if not layer.handles:
            layer.handles.append(layer.get_base_layer().register_forward_pre_hook(_before, with_kwargs=True))

    def act(self, layer: Any, equation: Any, x: Tensor, *more: Tensor) -> Tensor:
        """The images as the equation changes them."""
        flat = x.flatten(0, -4) if x.ndim > 4 else x
        if self.mean and hasattr(equation.module, "addend"):  # not to 0 ... 1 and back, which rounds
            scale = 1 / flat.new_tensor(self.std)[:, None, None]
            flat = call_equation(layer, equation.module, flat, *equation.shared, scale)
        elif self.mean:
            mean, std = (flat.new_tensor(each)[:, None, None] for each in (self.mean, self.std))
            flat = (call_equation(layer, equation.module, flat * std + mean, *equation.shared) - mean) / std
        else:
            flat = call_equation(layer, equation.module, flat, *equation.shared)
        return flat.unflatten(0, x.shape[:-3]) if x.ndim > 4 else flat

    def addend(self, equation: Equation) -> Tensor | None:
        """What it adds to normalised images, whatever they are; None if that depends on them."""
        constant: Any = getattr(equation.module, "addend", None)
        if constant is None:
            return None
        added = constant()
        return added / added.new_tensor(self.std)[:, None, None] if self.mean else added

    def describe(self, names: Mapping[str, str]) -> str:
        """Which space."""
        return "the images, from 0 to 1" if self.mean else "the normalised images"


def _before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """The hook at the backbone. It finds the layer in the module, so that copies of the model have their own."""
    layer: Any = module._modules.get(CHILD)
    if layer is None or not layer.acts_at(PixelSite.point):
        return None
    name = next((name for name in _NAMES if name in kwargs), None)
    if name is None and args:
        images = args[0]
    else:
        name = name or next((key for key, value in kwargs.items() if _are_images(value)), None)
        images = None if name is None else kwargs[name]
    if images is None:
        return None  # a model that reads something else beside images, without images
    channels = layer.backbone.image_channels
    if not _are_images(images) or images.shape[-3] != channels:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"{type(module).__name__} gets images of {found}: an adapter at the images is active, which needs a "
            f"floating-point tensor of (batch, {channels}, height, width)."
        )
    images = layer.run(PixelSite.point, images)
    return ((images, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: images})


def _are_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 4
