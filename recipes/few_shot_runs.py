"""One few-shot run: a method learns from one draw of images, is measured and saved."""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from augmentation import Mixing, is_random
from checkpoints import Checkpoints
from few_shot_data import Part, every_view
from few_shot_features import features_of
from few_shot_job import Job
from image_data import save_processor
from labels import Loss
from optimization import build_optimizer, build_schedule
from output_folder import publish
from peft import get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from training import Training

import hf_visual_peft
from hf_visual_peft import VisualPeftConfig
from hf_visual_peft.language.config import LanguageConfig
from hf_visual_peft.language.methods.two_sfs import TwoSFSConfig
from hf_visual_peft.language.support import SupportConfig
from hf_visual_peft.training.interpolation import base_of


@dataclass
class FewShotTraining(Training):
    """The loop of the recipes, where the model computes the loss: methods for class texts add to it there.

    Attributes:
        epochs: mean of the weights of all epochs, to keep; None: the last weights.
    """

    epochs: hf_visual_peft.GaussianAverage | None = None

    def epoch(self) -> None:
        """The rest of an epoch."""
        super().epoch()
        if self.epochs is not None:
            self.epochs.update()

    def loss_of(self, batch: dict[str, Any], labels: Tensor) -> Tensor:
        """The loss of a batch, with that of the method."""
        loss: Tensor = self.wrapped(**batch, **self.inputs, labels=labels).loss
        return loss


def adapt(job: Job, shots: int, seed: int) -> None:
    """One run: learn from one draw, measure, save."""
    args, accelerator = copy.copy(job.args), job.accelerator
    args.seed = seed
    set_seed(seed)
    job.name_classes(job.seen)
    config = copy.deepcopy(job.config)
    if not isinstance(config, LanguageConfig):
        config = hf_visual_peft.with_visual_targets(config, job.classifier)
    model = get_peft_model(job.classifier, config)
    if args.gradient_checkpointing:
        job.classifier.gradient_checkpointing_enable({"use_reentrant": False})
    part = job.drawn(shots, seed)
    size = args.per_device_train_batch_size
    if isinstance(config, SupportConfig):
        hf_visual_peft.fit(model.to(accelerator.device), every_view(part, args.cache_views or 1, size))
    if isinstance(config, VisualPeftConfig) and config.chooses_from_data:
        order = torch.Generator().manual_seed(seed)
        hf_visual_peft.calibrate(
            model.to(accelerator.device), DataLoader(part, size, shuffle=True, generator=order), seed=seed
        )
    if args.interpolate:
        hf_visual_peft.Interpolation(model)  # raises an error now where that is not possible
    if any(parameter.requires_grad for parameter in model.parameters()):
        set_seed(seed, device_specific=True)
        if isinstance(config, TwoSFSConfig) and config.stage == 1:
            train(job, args, model, part, shots, config.first_stage)
            hf_visual_peft.second_stage(model)
            train(job, args, model, with_features(job, part), shots, 1 - config.first_stage)
        else:
            train(job, args, model, part, shots)
    job.record(args.method, shots, seed, job.measure(model))
    if accelerator.is_main_process:
        folder = args.output_dir / f"shots_{shots}_seed_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        publish(folder, model.save_pretrained, lambda aside: save_processor(job.processor, model, aside))
    if args.interpolate:
        between = hf_visual_peft.Interpolation(model)
        for alpha in args.interpolate:
            job.record(f"{args.method}, alpha {alpha:g}", shots, seed, job.measure(between(alpha)))
    base_of(model)  # the next run starts without what this one learned
    accelerator.free_memory()


def with_features(job: Job, part: Part) -> Part:
    """The draw with features of the image tower as it is now; with its images where these change in every epoch."""
    args = job.args
    if args.train_crop != "none" or args.horizontal_flip or is_random(args):
        return part
    features, labels = features_of(job, part)
    return Part(features[None].cpu(), np.arange(len(labels)), labels.cpu().numpy())


def train(job: Job, args: argparse.Namespace, model: Any, part: Part, shots: int, share: float = 1.0) -> None:
    """Train what trains in a model with one draw, for a share of the steps."""
    accelerator = job.accelerator
    loader = accelerator.prepare(
        DataLoader(
            part,
            args.per_device_train_batch_size,
            shuffle=True,
            num_workers=args.dataloader_num_workers,
            generator=torch.Generator().manual_seed(args.seed),
        )
    )
    per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    steps = args.max_train_steps or args.epochs_by_shots.get(shots, args.num_train_epochs) * per_epoch
    if args.steps_per_shot:
        steps = args.steps_per_shot * shots
    steps = max(1, round(share * steps))
    plain = build_optimizer(model, args)
    wrapped, optimizer, scheduler = accelerator.prepare(model, plain, build_schedule(plain, args, steps))
    training = FewShotTraining(
        accelerator, args, model, wrapped, optimizer, scheduler, loader, part,
        evaluate=None, checkpoints=Checkpoints(accelerator, model, args.output_dir, 1, {}), screen=job.screen,
        max_steps=steps, loss=Loss(), inputs=job.inputs, mixing=Mixing(args, len(job.seen)), average=None,
    )  # fmt: skip
    if args.epoch_average:
        training.epochs = hf_visual_peft.GaussianAverage(model, math.ceil(steps / per_epoch), *args.epoch_average)
    training.run()
    if training.epochs is not None:
        training.epochs.apply()
    training.check_result()
