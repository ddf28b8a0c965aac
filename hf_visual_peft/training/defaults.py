"""Default settings of each method for AdamW, measured in `docs/defaults.md`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Training:
    """Settings of a training run with AdamW, under the names of the recipe's flags.

    Attributes:
        learning_rate: the peak, the same for method and head.
        weight_decay: of the parameters that decay (`parameter_groups`).
        lr_scheduler_type: name of a schedule of transformers.
        num_warmup_steps: fraction of all steps in which the learning rate rises.
        train_crop: how images are cropped in training.
        crop_scale: smallest fraction of an image in a crop.
        horizontal_flip: probability of a mirrored image.
    """

    learning_rate: float
    weight_decay: float = 0.01
    lr_scheduler_type: str = "cosine"
    num_warmup_steps: float = 0.1
    train_crop: Literal["random_resized", "random", "none"] = "random_resized"
    crop_scale: float = 0.5
    horizontal_flip: float = 0.0


USUAL = Training(3e-3)  # suits most methods, so it is the default
HEAD_ALONE = Training(1e-2)
ALL_WEIGHTS = Training(3e-5)  # the learning rates of the methods would destroy a pretrained backbone
CLIP_LORA = Training(2e-4, num_warmup_steps=0, crop_scale=0.08, horizontal_flip=0.5)  # the authors'
