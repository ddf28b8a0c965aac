"""Features of images in few-shot runs, and the linear probe on them that stands beside every method."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
import torch.nn.functional as F
from augmentation import is_random
from cached_features import cache_features
from few_shot_data import Part
from few_shot_job import Job
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from torch.utils.data import DataLoader

import hf_visual_peft
from hf_visual_peft import CachedFeatures, TaskResConfig, ZeroShotClassifier
from hf_visual_peft.language.config import LanguageConfig
from hf_visual_peft.training.interpolation import base_of


PENALTY = 31.6  # of the linear probe: CLIP's authors take 0.316 for features of norm 10, here they have norm 1


def keeps_features(classifier: ZeroShotClassifier, config: PeftConfig, args: argparse.Namespace) -> bool:
    """Whether features of images are computed once; then `args.cache_features` names their folder.

    Raises:
        ValueError: the flag is given, and a method changes these features.
    """
    if isinstance(config, LanguageConfig):
        stay = not config.needs_images
    else:
        stay = not getattr(config, "chooses_from_data", False) and _only_text(classifier, config)
    if args.cache_features and not stay:
        raise ValueError(
            f"--cache_features: --method {args.method} changes the features of images, which cannot be kept then."
        )
    random = args.train_crop != "none" or args.horizontal_flip > 0 or is_random(args) or args.drop_path_rate
    if stay and (args.cache_views or not random):
        args.cache_features = args.cache_features or str(args.output_dir / "features")
    return bool(args.cache_features)


def _only_text(classifier: ZeroShotClassifier, config: PeftConfig) -> bool:
    """Whether a method acts in the text tower alone: it is tried, and taken out again."""
    model = get_peft_model(classifier, hf_visual_peft.with_visual_targets(copy.deepcopy(config), classifier))
    of_texts = {id(part) for module in (*classifier.text_modules, classifier.logit_scale) for part in module.modules()}
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    weights = {id(p) for module in classifier.modules() if id(module) in of_texts for p in module.parameters()}
    stay = all(id(module) in of_texts for module in adapted)
    stay = stay and all(id(p) in weights for p in model.parameters() if p.requires_grad)
    base_of(model)
    return stay


def encode_images(job: Job) -> None:
    """Put features of the images in their place, each computed once and kept on disk."""
    held = get_peft_model(job.classifier, TaskResConfig())  # any method that leaves the image tower as it is
    there = {split: images for split in ("train", "test") if (images := getattr(job.data, split)) is not None}
    for split, kept in cache_features(job.accelerator, held, there, job.args, job.inputs).items():
        views = (job.args.cache_views or 1) if split == "train" else 1
        with torch.no_grad():
            found = [torch.cat(_encoded(job, held, kept, view)) for view in range(views)]
        setattr(job.data, split, torch.stack(found))
    held.unload()


def _encoded(job: Job, held: Any, kept: CachedFeatures, view: int) -> list[Tensor]:
    kept.epoch = view
    found: list[Tensor] = []
    handle = job.classifier.adapters.register_forward_hook(
        lambda _, args, output: found.append(output.image.float().cpu())
    )
    for batch in DataLoader(kept, job.args.per_device_eval_batch_size, collate_fn=kept.collate):
        batch.pop("labels")
        held.eval()(**_moved(batch, job.accelerator.device))
    handle.remove()
    return found


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _moved(each, device) for key, each in value.items()}
    return value.to(device)


@torch.no_grad()
def features_of(job: Job, part: Part) -> tuple[Tensor, Tensor]:
    """Normalised features of images, and their labels, on every process."""
    part.epoch = 0
    found = []
    for batch in job.accelerator.prepare(DataLoader(part, job.args.per_device_eval_batch_size)):
        labels = batch.pop("labels")
        features = job.classifier.eval()(**batch, **job.inputs).image_embeds
        found.append(job.accelerator.gather_for_metrics((features, labels)))
    features, labels = zip(*found, strict=True)
    return torch.cat(features), torch.cat(labels)


def linear_probe(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Weights and biases of logistic regression on features, (width + 1, classes), found by L-BFGS."""
    inputs = F.pad(features.double(), (0, 1), value=1.0)
    weight = torch.zeros(inputs.shape[1], classes, dtype=torch.float64, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = weight[:-1].square().sum() / (2 * PENALTY * len(labels))
        loss = F.cross_entropy(inputs @ weight, labels) + penalty
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach()


def measure_baselines(job: Job) -> None:
    """Zero-shot classification, and a linear probe on the images of each draw."""
    if job.data.test is None:
        return
    job.record("zero-shot", 0, None, job.measure(job.classifier))
    features, labels = features_of(job, job.part(job.seen))
    for shots, seed in job.data.draws:
        weight = linear_probe(*features_of(job, job.drawn(shots, seed)), len(job.seen))
        predictions = (F.pad(features.double(), (0, 1), value=1.0) @ weight).argmax(1)
        job.record("linear probe", shots, seed, {"accuracy": (predictions == labels).double().mean().item()})
