"""What a comparison does with each method: measure a step, train for some steps, predict the test part."""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import image_classification
import numpy as np
import torch
from accelerate import Accelerator
from arguments import parse_args
from cached_features import cache_features
from image_data import Images, load_processor, prepare_data
from image_sources import load_splits
from labels import Loss
from model import load_model
from optimization import build_optimizer
from peft import PeftModel
from prediction import load_saved, logits_of
from torch import Tensor, nn
from torch.utils.data import DataLoader

import hf_visual_peft
from hf_visual_peft.features.dataset import FEATURES
from hf_visual_peft.peft_methods.methods import any_method


KNN = "knn"
# one of each kind of cost: none, from features, merged, prompts, adapters, a specification; and the usual yardstick
METHODS = ("linear", KNN, "lora", "last", "ssf", "vpt", "adaptformer", "bitfit")
NEIGHBOURS = (1, 3, 5, 10, 20)


@dataclass
class Setting:
    """What all methods of a comparison have in common.

    Attributes:
        folder: of the comparison, with the splits in `data`.
        model: checkpoint.
        image_size: side of the input; None for that of the image processor.
        interpolate: whether the model gets `interpolate_pos_encoding`.
        batch_size: images per training step.
    """

    folder: Path
    model: str
    image_size: int | None
    interpolate: bool
    batch_size: int

    def flags(self, method: str) -> list[str]:
        """The flags of the recipe that make a run of a method one of this comparison."""
        words = ["--model_name_or_path", self.model, "--dataset_name", str(self.folder / "data"), "--method", method]
        words += ["--per_device_train_batch_size", str(self.batch_size), "--ignore_mismatched_sizes"]
        words += ["--image_size", str(self.image_size)] if self.image_size else []
        words += ["--interpolate_pos_encoding"] if self.interpolate else []
        if from_features(method):
            words += ["--cache_features", str(self.folder / "features"), "--cache_dtype", "float16"]
            words += ["--train_crop", "none", "--horizontal_flip", "0"]
        return words

    def parsed(self, method: str, *more: str) -> tuple[argparse.Namespace, Any]:
        """The flags as the recipe reads them, and the config of the method."""
        own = ["--output_dir", str(self.folder / "runs" / "none"), "--progress", "none", "--check_images", "false"]
        return parse_args([*self.flags(method), *own, *more])


def from_features(method: str) -> bool:
    """Whether a method trains on features of the frozen backbone, so that an epoch costs next to nothing."""
    if method in ("linear", KNN):
        return True
    found = any_method(method)
    return getattr(found, "gradients", "full") == "none" and not found.calibrated and method != "sidetuning"


def kind_of(method: str) -> str:
    """The kind of cost of a method, in a few words."""
    if method in ("linear", KNN):
        return "frozen features"
    found = any_method(method)
    if from_features(method):
        return "beside the backbone"
    merges = ", merges" if found.mergeable else ""
    return f"{getattr(found, 'category', 'of peft')}{merges}"


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Keep what a run prints; an error ends with it."""
    kept = io.StringIO()
    with contextlib.redirect_stdout(kept), contextlib.redirect_stderr(kept):
        yield kept


def reason(error: BaseException, printed: str) -> str:
    """Why a run failed, in one line; a parser that stops a program has printed it."""
    text = printed.strip().splitlines()[-1] if isinstance(error, SystemExit) and printed.strip() else str(error)
    return " ".join(text.rpartition("error: ")[2].split()) or type(error).__name__


# ------------------------------------------------------------------------------------------------------ measurements


class Loaded(NamedTuple):
    """A model with a method, the images of each split, the classes, the flags, and extra inputs of the model."""

    model: Any
    data: dict[str, Images]
    names: list[str]
    args: argparse.Namespace
    inputs: dict[str, Any]


def load(setting: Setting, method: str) -> Loaded:
    """What a run of a method begins with."""
    args, config = setting.parsed(method)
    processor = load_processor(args)
    data, names, _ = prepare_data(args, processor, load_splits(args))
    model = load_model(args, config, names)
    if getattr(config, "chooses_from_data", False):
        loader = DataLoader(data["train"], batch_size=args.per_device_train_batch_size, shuffle=True)
        hf_visual_peft.calibrate(model, loader, seed=args.seed, progress=False)
    inputs = {"interpolate_pos_encoding": True} if setting.interpolate else {}
    return Loaded(model, data, names, args, inputs)


def kept_bytes(model: nn.Module, saved: dict[int, int]) -> int:
    """Bytes of the tensors that a forward pass has left for the backward pass, without the model's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    return sum(size for address, size in saved.items() if address not in own)


def measure(accelerator: Accelerator, setting: Setting, method: str, rounds: int = 2) -> dict[str, Any]:
    """What a training step and a prediction cost, and what trains.

    Memory is what the forward pass leaves for the backward pass, the gradients and both moments of AdamW: the part
    that differs between methods.
    """
    device = accelerator.device
    model, data, _, args, inputs = load(setting, method)
    model.to(device)
    images = default_batch(data["train"], args.per_device_train_batch_size, device)
    batch, loss = dict(images), Loss()
    if args.cache_features:
        features = cache_features(accelerator, model, {s: d for s, d in data.items() if s != "test"}, args, inputs)
        known = features["train"]
        batch = moved(known.collate(known.__getitems__(range(min(setting.batch_size, len(known))))), device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(model, args)
    labels = batch.pop("labels")
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    seconds = []
    for number in range(rounds + 1):
        before = time.perf_counter()
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept)
        with contextlib.nullcontext() if number else hooks:
            value = loss(model(**batch, **inputs).logits.float(), labels)
            if not number:
                memory = kept_bytes(model, saved)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronise(device)
        seconds.append(time.perf_counter() - before)
    model.eval()
    images.pop("labels")
    few = {name: value[:8] for name, value in images.items()}
    count = sum(parameter.numel() for parameter in trained)
    base = prediction_seconds(model, few, inputs, without_adapter=True)
    adapted = prediction_seconds(model, few, inputs, without_adapter=False)
    merges = method not in ("linear", "full") and any_method(method).mergeable
    return {
        "trained": count,
        "step_seconds": statistics.median(seconds[1:]),
        "step_bytes": memory + 3 * sum(parameter.numel() * parameter.element_size() for parameter in trained),
        "inference_ratio": 1.0 if method in ("linear", "full") or merges else adapted / base,
        "inference_ratio_unmerged": adapted / base,
        "inference_seconds": adapted / len(next(iter(few.values()))),
        "merges": merges,
        "learning_rate": args.learning_rate,
        "train_images": len(data["train"]),
    }


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch on a device; cached features are a dictionary in it."""
    return {key: moved(v, device) if isinstance(v, dict) else v.to(device) for key, v in batch.items()}


def default_batch(images: Images, size: int, device: torch.device) -> dict[str, Tensor]:
    return moved(next(iter(DataLoader(images, batch_size=size))), device)


@torch.no_grad()
def prediction_seconds(
    model: Any, batch: Mapping[str, Tensor], inputs: Mapping[str, Any], *, without_adapter: bool, rounds: int = 2
) -> float:
    """The shortest time of a prediction of a batch, after one that warms up."""
    off = model.disable_adapter() if without_adapter and isinstance(model, PeftModel) else contextlib.nullcontext()
    found = []
    with off:
        for _ in range(rounds + 1):
            before = time.perf_counter()
            model(**batch, **inputs)
            synchronise(next(iter(batch.values())).device)
            found.append(time.perf_counter() - before)
    return min(found[1:])


# ------------------------------------------------------------------------------------------------------------- runs


def train(setting: Setting, method: str, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """A run of the recipe for so many steps; what it found on validation. The folder then holds the adapter."""
    words = ["--max_train_steps", str(steps), "--eval_steps", str(steps), "--seed", str(seed), "--test_split", "none"]
    words += ["--output_dir", str(folder), "--overwrite_output_dir", "--checkpointing_steps", "no"]
    words += ["--check_images", "false", "--progress", "none"]
    before = time.perf_counter()
    results = image_classification.main([*setting.flags(method), *words])
    weights = [*folder.glob("adapter_model.safetensors"), *folder.glob("model*.safetensors")]
    return {
        "steps": steps,
        "seed": seed,
        "accuracy": results["eval_accuracy"],
        "loss": results["eval_loss"],
        "train_loss": results["train_loss"],
        "seconds": time.perf_counter() - before,
        "bytes": sum(file.stat().st_size for file in weights[:1]),
        "folder": str(folder.relative_to(setting.folder)),
    }


def predict_test(accelerator: Accelerator, setting: Setting, folder: Path) -> dict[str, Any]:
    """The classes that a saved run predicts for the test part, and how sure it is."""
    args, _ = setting.parsed("linear")
    vars(args).update(model_name_or_path=str(folder), base_model_name_or_path=None, image_size=None)
    saved = load_saved(args)
    splits = load_splits(args)
    data, _, _ = prepare_data(args, saved.processor, splits)
    images = Images(data["test"].data, np.arange(len(data["test"])), "test", saved.processor, args)
    return predicted(logits_of(accelerator, saved, images, args).softmax(-1))


def predicted(chances: Tensor) -> dict[str, Any]:
    """The most probable class of each sample and its probability."""
    confidence, classes = chances.max(-1)
    return {"predicted": classes.tolist(), "confidence": [round(value, 5) for value in confidence.tolist()]}


def neighbours(accelerator: Accelerator, setting: Setting) -> dict[str, Any]:
    """K nearest neighbours by the angle between frozen features; k is chosen on validation."""
    model, data, names, args, inputs = load(setting, "linear")
    model.to(accelerator.device)
    cached = cache_features(accelerator, model, data, args, inputs)
    before = time.perf_counter()
    features, labels = {}, {}
    for split, found in cached.items():
        batch = found.collate(found.__getitems__(range(len(found))))
        whole = torch.cat([value.flatten(1).float() for value in batch[FEATURES].values()], 1)
        features[split], labels[split] = nn.functional.normalize(whole), batch["labels"]

    def chances(split: str, k: int) -> Tensor:
        nearest = (features[split] @ features["train"].T).topk(k)
        weights = 1 + 1e-3 * nearest.values  # of equal numbers of votes the nearer ones win
        votes = nn.functional.one_hot(labels["train"][nearest.indices], len(names)) * weights[..., None]
        return votes.sum(1) / weights.sum(1, keepdim=True)

    def accuracy(split: str, k: int) -> float:
        return float((chances(split, k).argmax(-1) == labels[split]).float().mean())

    usable = [k for k in NEIGHBOURS if k <= len(labels["train"])]
    best = max(usable, key=lambda k: (accuracy("validation", k), k))
    return {
        "k": best,
        "accuracy": accuracy("validation", best),
        "seconds": time.perf_counter() - before,
        "bytes": features["train"].numel() * 4,
        **predicted(chances("test", best)),
    }
