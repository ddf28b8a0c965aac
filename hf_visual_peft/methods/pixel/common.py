"""What all prompts at the pixels have: fields, checks, and a map from the classes of the head to others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.label_maps import LabelMap
from ...sites import HeadSite, PixelSite, Placement


MAX_SIDE = 10_000  # pixels of an image


@dataclass
class PixelPromptConfig(VisualPeftConfig):
    """Base of the configs of prompts at the pixels.

    Args:
        prompt_size: height and width of the images; by default those for which the model was made.
        label_map: for each class of the data, the class of the model's own head that stands for it, or a list of
            several, whose logits are averaged. The head then stays frozen. `core.label_maps` finds such maps. There is
            none by default, and the head trains.
    """

    prompt_size: int | list[int] | None = field(
        default=None, metadata={"help": "Height and width of the images; by default those of the model."}
    )
    label_map: list[Any] | None = field(
        default=None, metadata={"help": "For each class, the class or classes of the frozen head that stand for it."}
    )

    per_stage: ClassVar[bool] = False
    chooses_blocks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        size: Any = list(self.prompt_size) if isinstance(self.prompt_size, tuple) else self.prompt_size
        sides = size if isinstance(size, list) else [size]
        if size is not None and (
            len(sides) > 2 or not all(type(side) is int and 0 < side <= MAX_SIDE for side in sides)
        ):
            self._fail("prompt_size", f"None, a number of pixels from 1 to {MAX_SIDE}, or [height, width]")
        self.prompt_size = size
        if self.label_map is not None:
            self._check_label_map()

    def _check_label_map(self) -> None:
        given: Any = self.label_map
        if not isinstance(given, list | tuple) or not given:
            self._fail("label_map", "None or a list with a source class, or a list of these, for each class")
        rows = [list(each) if isinstance(each, list | tuple) else [each] for each in given]
        if not all(type(source) is int and source >= 0 for row in rows for source in row) or not all(rows):
            self._fail("label_map", "a list of indices of classes, from 0")
        if len({len(row) for row in rows}) > 1:
            self._fail("label_map", "lists of equally many source classes")
        self.label_map = [row[0] if len(row) == 1 else row for row in rows]
        if self.modules_to_save is None:
            self.modules_to_save = []

    @property
    def output_classes(self) -> int | None:
        """As many as the label map has entries."""
        return None if self.label_map is None else len(self.label_map)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """The prompt at the images, and the label map at the head."""
        yield Placement(backbone.path, "pixels", self._site(backbone), self._builder(backbone))
        if self.label_map is not None:
            yield self._map(backbone)

    def _site(self, backbone: VisionBackbone) -> PixelSite:
        return PixelSite()

    def _builder(self, backbone: VisionBackbone) -> Callable[[nn.Module], nn.Module] | None:
        """What makes the prompt, once all fields fit; None if the input is not images, which the site says then."""
        if not backbone.image_channels:
            return None
        height, width = self._size(backbone)
        self._check_size(height, width)
        return lambda _: self._prompt(backbone.image_channels, height, width)

    def _size(self, backbone: VisionBackbone) -> tuple[int, int]:
        given: Any = self.prompt_size
        found: Any = backbone.image_size if given is None else given if isinstance(given, list) else [given]
        if found is None:
            self._fail("prompt_size", f"given for {backbone.class_name}, which was made for no one size of images")
        return found[0], found[-1]

    def _check_size(self, height: int, width: int) -> None:
        """Refuse images in which the prompt has no place.

        Raises:
            ValueError: a field does not fit.
        """

    def _require_fit(self, name: str, highest: int, to_what: str) -> None:
        """Refuse a number of pixels that is higher than some, if one is given."""
        if getattr(self, name) is not None or highest < 1:
            self._require_integer(name, 1, highest, to_what)

    def _prompt(self, channels: int, height: int, width: int) -> nn.Module:
        raise NotImplementedError(f"{type(self).__name__} does not say what its prompt is.")

    def _map(self, backbone: VisionBackbone) -> Placement:
        assert self.label_map is not None
        sizes = tuple((path, outputs) for path, (outputs, _) in backbone.head_sizes.items())
        rows = [each if isinstance(each, list) else [each] for each in self.label_map]
        least = min((outputs for _, outputs in sizes), default=0)
        if sizes and max(source for row in rows for source in row) >= least:
            self._fail("label_map", f"a list of classes of the model's own head, 0 to {least - 1}")
        if sizes and len(rows) * len(rows[0]) > least:
            self._fail("label_map", f"a map from no more classes than the model's own head has ({least})")
        if set(backbone.heads) & set(self.modules_to_save or ()) or (self.modules_to_save or ()) == ["classifier"]:
            self._fail("modules_to_save", "[] or names of other modules: with label_map, the head stays frozen")
        return Placement(backbone.path, "labels", HeadSite(sizes, len(rows)), lambda _: LabelMap(rows))


@dataclass
class UnitPixelPromptConfig(PixelPromptConfig):
    """Base of the configs of prompts on images from 0 to 1, which are normalised after that.

    Args:
        image_mean: mean by which images are normalised, one number or one for each channel. By default that of timm's
            models, which say it, and 0.5 for others: their processors know it.
        image_std: the same for the standard deviation.
    """

    image_mean: float | list[float] | None = field(
        default=None, metadata={"help": "Mean by which images are normalised; default: timm's, else 0.5."}
    )
    image_std: float | list[float] | None = field(
        default=None,
        metadata={"help": "Standard deviation by which images are normalised; default: timm's, else 0.5."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("image_mean", None), ("image_std", 0)):
            given: Any = getattr(self, name)
            values = list(given) if isinstance(given, list | tuple) else [given]
            real = all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e6 for v in values)
            if given is not None and (not real or not values or (least is not None and min(values) <= least)):
                self._fail(name, "None, a number or a list of numbers" + (" above 0" if least is not None else ""))
            if isinstance(given, tuple):
                setattr(self, name, values)

    def _site(self, backbone: VisionBackbone) -> PixelSite:
        told = backbone.image_statistics or (None, None)
        return PixelSite(*(map(partial(self._channels, backbone), ("image_mean", "image_std"), told)))

    def _channels(self, backbone: VisionBackbone, name: str, told: tuple[float, ...] | None) -> tuple[float, ...]:
        given: Any = getattr(self, name)
        channels = backbone.image_channels
        if given is None:
            fits = told is not None and len(told) == channels
            return tuple(told) if fits else (0.5,) * channels  # type: ignore[arg-type]
        values = given if isinstance(given, list) else [given] * channels
        if channels and len(values) != channels:
            self._fail(name, f"one number, or one for each of the {channels} channels")
        return tuple(map(float, values))


def part_of(height: int, width: int, of_224: int) -> int:
    """As many pixels of the images as some are of 224, and at least one."""
    return max(1, round(min(height, width) * of_224 / 224))


def in_float(images: Tensor) -> Tensor:
    """Images in a precision in which they can be resized."""
    return images if images.dtype == torch.float64 else images.float()


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Images of another size, by antialiased bilinear interpolation."""
    if images.shape[-2:] == (height, width):
        return images
    found = F.interpolate(in_float(images), size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return found.to(images.dtype)


def require_size(images: Tensor, height: int, width: int) -> None:
    """Refuse images of another size than the prompt's.

    Raises:
        ValueError: they have another size.
    """
    if images.shape[-2:] != (height, width):
        raise ValueError(
            f"The adapter's prompt is an image of {(height, width)} pixels, and the images have "
            f"{tuple(images.shape[-2:])}. Resize them, or train an adapter with that prompt_size."
        )


def padded(images: Tensor, height: int, width: int) -> Tensor:
    """Images in the middle of a black canvas."""
    top, left = (height - images.shape[-2]) // 2, (width - images.shape[-1]) // 2
    return F.pad(images, (left, width - images.shape[-1] - left, top, height - images.shape[-2] - top))


class Frame(nn.Module):
    """Four bars around the images, of which each element is a parameter.

    Args:
        channels: of the images.
        height: of the images.
        width: of the images.
        border: width of the bars.
        random: whether they start from N(0, 1); else from zero.
    """

    def __init__(self, channels: int, height: int, width: int, border: int, random: bool) -> None:
        super().__init__()
        make = torch.randn if random else torch.zeros
        self.top = nn.Parameter(make(channels, border, width))
        self.bottom = nn.Parameter(make(channels, border, width))
        self.left = nn.Parameter(make(channels, height - 2 * border, border))
        self.right = nn.Parameter(make(channels, height - 2 * border, border))

    def whole(self) -> Tensor:
        """The bars as one image, (channels, height, width), with zeros inside."""
        inside = self.top.shape[-1] - 2 * self.left.shape[-1]
        zeros = self.left.new_zeros(*self.left.shape[:2], inside)
        return torch.cat([self.top, torch.cat([self.left, zeros, self.right], dim=2), self.bottom], dim=1)


class Constant(nn.Module):
    """Base of the prompts that are one image, added to every image."""

    def addend(self) -> Tensor:
        """What is added, (channels, height, width)."""
        raise NotImplementedError

    def forward(self, images: Tensor, scale: Tensor | None = None) -> Tensor:
        """Add it to (batch, channels, height, width).

        Args:
            images: to be changed.
            scale: a factor for what is added, (channels, 1, 1).

        Raises:
            ValueError: the images have another size.
        """
        addend = self.addend()
        require_size(images, *addend.shape[-2:])
        return images + (addend if scale is None else addend * scale)
