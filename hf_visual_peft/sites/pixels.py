"""The site at the images that a backbone reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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

    It acts wherever images enter the backbone: in its forward, and in other methods that take images as the forward
    does, such as timm's `forward_features`. A pass that reaches the patch embedding in any other way is refused.

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

    def why_no_text(self) -> str | None:
        """A text has no pixels."""
        return ": it acts on the images."

    def why_not(self, block: Block | None, whole: VisionBackbone) -> str | None:
        """The input may be no images."""
        if whole.image_channels and whole.architecture.grid != "spatial_shapes":
            return None
        return ": its input is not images of (batch, channels, height, width), so prompts at pixels have no place."

    def why_not_beside(self, path: str, copied: Sequence[str]) -> str | None:
        """A copy of the whole backbone would have its own input."""
        whole = within(path, copied)
        return whole and f"the method acts at the input of {path!r}, which {whole!r} would replace. Name its parts."

    def connect(self, layer: ModelAdapters, model: nn.Module, backbone: VisionBackbone | None) -> None:
        """Act wherever images enter the backbone."""
        assert backbone is not None
        layer.exchange.guard_images(model, backbone)
        if layer.handles:
            return
        owner = layer.get_base_layer()
        layer.handles.append(owner.register_forward_pre_hook(_before, with_kwargs=True))
        layer.handles.append(owner.register_forward_hook(_after, always_call=True))
        for name in _entries(owner):
            layer.handles.append(_EntryHandle(owner, name, vars(owner).get(name)))
            setattr(owner, name, partial(_enter, owner, name, vars(owner).get(name)))

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
        """What it adds to any normalised images; None if that depends on the images."""
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
    if layer is None or layer.entered:
        return None
    layer.entered = "forward"
    if not layer.acts_at(PixelSite.point):
        return None
    images, put = _images(args, kwargs)
    if images is None:
        return None  # a model that reads something else beside images, without images
    channels = layer.backbone.image_channels
    if not _are_images(images) or images.shape[-3] != channels:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"{type(module).__name__} gets images of {found}: an adapter at the images is active, which needs a "
            f"floating-point tensor of (batch, {channels}, height, width)."
        )
    return put(layer.run(PixelSite.point, images))


def _after(module: nn.Module, args: tuple, output: Any) -> None:
    layer: Any = module._modules.get(CHILD)
    if layer is not None and layer.entered == "forward":
        layer.entered = ""


def _enter(module: nn.Module, name: str, own: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """Replaces another method of the backbone that may take images.

    Args:
        module: the backbone.
        name: of the method.
        own: what the module had in its place before; None for the method of its class.
        args: of the method.
        kwargs: of the method.
    """
    method = own or partial(getattr(type(module), name), module)
    layer: Any = module._modules.get(CHILD)
    if layer is None or layer.entered or not layer.acts_at(PixelSite.point):
        return method(*args, **kwargs)
    images, put = _images(args, kwargs)
    if not _are_images(images) or images.shape[-3] != layer.backbone.image_channels:
        return method(*args, **kwargs)  # features, as for `forward_head`
    args, kwargs = put(layer.run(PixelSite.point, images))
    layer.entered = name
    try:
        return method(*args, **kwargs)
    finally:
        layer.entered = ""


def _entries(owner: nn.Module) -> Iterator[str]:
    """The methods of a backbone that may take images: whose first argument has the name of the forward's."""
    first = _first_argument(type(owner).forward)
    found = {name: getattr(type(owner), name) for name in dir(type(owner)) if not name.startswith("_")}
    for name, method in found.items():
        if name != "forward" and not hasattr(nn.Module, name) and first and _first_argument(method) == first:
            yield name


def _first_argument(method: Any) -> str:
    """The name of a method's argument after `self`; empty if it has none."""
    if not inspect.isfunction(method):
        return ""
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [each.name for each in inspect.signature(method).parameters.values() if each.kind in named]
    return (*parameters[1:], "")[0]


@dataclass
class _EntryHandle:
    """Takes the replacement of a method back.

    Attributes:
        owner: the backbone.
        name: of the method.
        own: what the backbone had in its place before; None for the method of its class.
    """

    owner: nn.Module
    name: str
    own: Any

    def remove(self) -> None:
        """Do it."""
        if self.own is None:
            vars(self.owner).pop(self.name, None)
        else:
            setattr(self.owner, self.name, self.own)


def _images(args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Callable[[Tensor], tuple[tuple, dict[str, Any]]]]:
    """The images among arguments, and a function that puts others in their place; None if there are none."""
    name = next((name for name in _NAMES if name in kwargs), None)
    if name is None and args:
        return args[0], lambda images: ((images, *args[1:]), kwargs)
    name = name or next((key for key, value in kwargs.items() if _are_images(value)), "")
    return kwargs.get(name), lambda images: (args, {**kwargs, name: images})


def _are_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 4
