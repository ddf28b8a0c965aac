"""Augmentation by torchvision's `transforms.v2`, drawn from seed, epoch and sample, and mixing of batches."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from training_options import natural, positive, real


# flags of random changes beside crop and horizontal flip, and their values without augmentation
OFF = {"vertical_flip": 0.0, "augment": "none", "color_jitter": None, "random_erasing": 0.0}
FLAGS = (*OFF, "randaugment_ops", "randaugment_magnitude")
BATCH_FLAGS = ("mixup", "cutmix")


def add_augmentation_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("augmentation in training, beside crop and horizontal flip").add_argument
    add("--vertical_flip", type=real, default=0.0, help="probability of a vertical flip")
    add("--augment", choices=["none", "randaugment", "trivialaugment"], default="none", help="policy of torchvision")
    add("--randaugment_ops", type=positive, default=2, help="operations an image")
    add("--randaugment_magnitude", type=natural, default=9, help="their strength, 0 to 30")
    add("--color_jitter", type=real, nargs="+", metavar="SHARE", help="brightness, contrast, saturation, hue up to "
        "0.5; one value: that of the first three")  # fmt: skip
    add("--random_erasing", type=real, default=0.0, help="probability of a rectangle that is erased")
    add("--mixup", type=real, default=0.0, metavar="ALPHA", help="blend pairs of images and their labels in a batch")
    add("--cutmix", type=real, default=0.0, metavar="ALPHA", help="put a rectangle of one image into another; with "
        "--mixup, each batch gets one of the two")  # fmt: skip
    add("--mix_probability", type=real, default=1.0, help="fraction of the batches that --mixup and --cutmix change")


def check_flags(args: argparse.Namespace) -> None:
    """Raise an error for invalid values, and for torchvision if it is needed and missing."""
    for name in ("vertical_flip", "random_erasing", "mix_probability"):
        if getattr(args, name) > 1:
            raise ValueError(f"--{name} must be between 0 and 1, got {getattr(args, name)}")
    if args.randaugment_magnitude > 30:
        raise ValueError(f"--randaugment_magnitude must be from 0 to 30, got {args.randaugment_magnitude}")
    jitter: list[float] = args.color_jitter or []
    if len(jitter) == 2 or len(jitter) > 4:
        raise ValueError(f"--color_jitter takes 1, 3 or 4 values, got {len(jitter)}")
    if len(jitter) == 4 and jitter[3] > 0.5:
        raise ValueError(f"--color_jitter: the hue (the fourth value) must be 0.5 or less, got {jitter[3]}")
    used = [name for name in ("color_jitter", "random_erasing", *BATCH_FLAGS) if getattr(args, name)]
    used += ["augment"] if args.augment != "none" else []
    if used:
        torchvision_v2(f"--{used[0]}")


def is_random(args: argparse.Namespace) -> bool:
    """Whether these flags change single images at random."""
    return bool(args.vertical_flip or args.augment != "none" or args.color_jitter or args.random_erasing)


def torchvision_v2(flag: str) -> Any:
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise ValueError(f"{flag} needs torchvision, which is not installed: pip install torchvision") from error
    return v2


@contextlib.contextmanager
def drawn_from(*numbers: int) -> Iterator[None]:
    """Seed torch with these numbers inside the context, and restore its state afterwards."""
    (seed,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(int(seed))
        yield


def check_shape(pixels: Tensor, dimensions: int, flag: str) -> None:
    if pixels.ndim != dimensions:
        raise ValueError(f"{flag} needs images, but this image processor cuts patches itself; remove it.")


class Augmentation:
    """The augmentation of an image in training, as the flags say.

    Args:
        args: flags of the recipe.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        args = argparse.Namespace(**OFF | vars(args))
        self.vertical_flip = args.vertical_flip
        self.on_images: list[Any] = []
        self.on_pixels: list[Any] = []
        if args.augment != "none":
            v2 = torchvision_v2("--augment")
            smooth = v2.InterpolationMode.BILINEAR
            randaugment = {"num_ops": args.randaugment_ops, "magnitude": args.randaugment_magnitude}
            policies = {
                "randaugment": lambda: v2.RandAugment(**randaugment, interpolation=smooth),
                "trivialaugment": lambda: v2.TrivialAugmentWide(interpolation=smooth),
            }
            self.on_images.append(policies[args.augment]())
        if args.color_jitter:
            values = args.color_jitter * 3 if len(args.color_jitter) == 1 else args.color_jitter
            self.on_images.append(torchvision_v2("--color_jitter").ColorJitter(*values))
        if args.random_erasing:
            self.on_pixels.append(torchvision_v2("--random_erasing").RandomErasing(p=args.random_erasing))

    def image(self, image: Image.Image, drawn: tuple[int, ...]) -> Image.Image:
        """Augment an image before normalisation; `drawn` seeds it, so that all frames of a video change alike."""
        if self.vertical_flip and np.random.default_rng((*drawn, 2)).random() < self.vertical_flip:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        if self.on_images:
            with drawn_from(*drawn, 3):
                for transform in self.on_images:
                    image = transform(image)
        return image

    def pixels(self, pixels: Tensor, drawn: tuple[int, ...]) -> Tensor:
        """The normalised images or frames, (images, channels, height, width)."""
        if self.on_pixels:
            check_shape(pixels, 4, "--random_erasing")
            with drawn_from(*drawn, 4):
                for transform in self.on_pixels:
                    pixels = transform(pixels)
        return pixels


class Mixing:
    """Mixup and CutMix of a batch.

    Args:
        args: flags of the recipe.
        classes: number of classes.
    """

    def __init__(self, args: argparse.Namespace, classes: int) -> None:
        self.probability, self.seed = args.mix_probability, args.seed
        self.kinds = []
        if args.mixup:
            self.kinds.append(torchvision_v2("--mixup").MixUp(alpha=args.mixup, num_classes=classes))
        if args.cutmix:
            self.kinds.append(torchvision_v2("--cutmix").CutMix(alpha=args.cutmix, num_classes=classes))

    def __call__(self, pixels: Tensor, labels: Tensor, drawn: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Pixels and labels; the labels are weights of the classes if the batch is mixed.

        Args:
            pixels: (batch, channels, height, width), or (batch, frames, channels, height, width).
            labels: (batch,).
            drawn: numbers that seed the random draws, together with the seed.
        """
        if not self.kinds:
            return pixels, labels
        check_shape(pixels, pixels.ndim if pixels.ndim == 5 else 4, "--mixup or --cutmix")
        with drawn_from(self.seed, *drawn, 5):
            if torch.rand(()) >= self.probability:
                return pixels, labels
            kind = self.kinds[int(torch.randint(len(self.kinds), ()))]
            if pixels.ndim == 5:
                from torchvision import tv_tensors

                mixed, shares = kind(tv_tensors.Video(pixels), labels)
                return mixed.as_subclass(Tensor), shares
            return kind(pixels, labels)
