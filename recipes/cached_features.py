"""Features of the frozen backbone in place of images, computed once for all epochs and runs."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from typing import Any

import augmentation
from accelerate import Accelerator
from image_data import Images
from screen import Screen
from torch import nn

from hf_visual_peft import CachedFeatures, FeatureCache
from hf_visual_peft.features import fingerprint


def check_augmentation(args: argparse.Namespace) -> None:
    """Raise an error for flags that do not work with cached features."""
    if not args.cache_features:
        if args.cache_views:
            raise ValueError("--cache_views needs --cache_features")
        return
    for name in (*augmentation.BATCH_FLAGS, "drop_path_rate"):
        if getattr(args, name):
            raise ValueError(f"--{name} does not work with --cache_features, which keeps the output of frozen blocks")
    crop_or_flip = args.train_crop != "none" or args.horizontal_flip > 0
    random = crop_or_flip or augmentation.is_random(args) or bool(args.clip_frames)
    if random and not args.cache_views:
        raise ValueError(
            "--cache_features reads every image once, and training would change it at random in every epoch: give "
            "--cache_views N for N fixed augmentations of each training image, of which epoch e sees number e modulo "
            "N, or --train_crop none --horizontal_flip 0 for none"
        )
    if not random and (args.cache_views or 1) > 1:
        raise ValueError(
            f"--cache_views {args.cache_views}: without --train_crop, --horizontal_flip and the like all are equal"
        )


def key_of(images: Images) -> dict[str, Any]:
    """The key of these images, labels and their preparation."""
    args = images.args
    key = {
        "data": fingerprint.key_of(images.data),
        "labels": images.ids,
        "processor": images.processor,
        "size": args.image_size,
        "clip_frames": args.clip_frames,
    }
    if images.split == "train" and args.cache_views:
        names = ("train_crop", "crop_scale", "horizontal_flip", "seed", *augmentation.FLAGS)
        key["augmentation"] = {name: getattr(args, name) for name in names}
    return key


def cache_features(
    accelerator: Accelerator,
    model: nn.Module,
    data: Mapping[str, Images],
    args: argparse.Namespace,
    inputs: Mapping[str, Any],
) -> dict[str, Any]:
    """The features of each split, `CachedFeatures`; the processes divide the missing ones among them.

    Args:
        accelerator: of the run.
        model: before it is prepared.
        data: images of each split.
        args: of the recipe.
        inputs: extra arguments of the model.
    """
    cache = FeatureCache(
        model.to(accelerator.device),
        args.cache_features,
        dtype=args.cache_dtype,
        arguments=inputs,
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
        progress=Screen.bars,
    )
    found: dict[str, CachedFeatures] = {}
    for split, images in data.items():
        views = []
        for epoch in range((args.cache_views or 1) if split == "train" else 1):
            view = copy.copy(images)
            view.epoch = epoch
            views.append(view)
        with accelerator.autocast():  # as in training
            found[split] = cache.cached(views, name=split, key=key_of(images))
        accelerator.print(f"Features of {split}: {found[split]}")
    return found
