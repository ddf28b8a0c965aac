"""The methods that are measured, with the settings they are measured with, as contestants on a model."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from step_rounds import ACTIVATIONS, FORWARD, FULL, Contestant, Setup, build_model, example
from torch import nn

import hf_visual_peft
from hf_visual_peft.peft_methods.methods import PEFT_METHODS


PEFT_BASELINES = {"peft-lora": "lora", "peft-ln-tuning": "ln_tuning", "peft-ia3": "ia3"}
ADAPTERS = "adapters-seq-bn"  # the bottleneck adapter of the `adapters` library
SETTINGS: dict[str, dict[str, Any]] = {"vpt": {"num_virtual_tokens": 10}}  # where the target names another


def all_methods() -> list[str]:
    """What can be measured."""
    return [FORWARD, ACTIVATIONS, FULL, *PEFT_BASELINES, ADAPTERS, *hf_visual_peft.list_methods()]


def setting_of(name: str) -> dict[str, Any]:
    """Fields of a method's config: those of its first known count, or those that a target names."""
    if name not in hf_visual_peft.list_methods():
        return {}
    return SETTINGS.get(name, dict(hf_visual_peft.get_method(name).counts[0][0]))


def config_of(name: str, model: nn.Module) -> PeftConfig:
    """The config of a method for a model, with peft's own methods as the vision literature uses them."""
    if name in PEFT_BASELINES:
        return PEFT_METHODS[PEFT_BASELINES[name]].config(model)
    return hf_visual_peft.get_method(name).config_cls(**setting_of(name))


def frames_of(name: str, setup: Setup) -> int | None:
    """How many images make one video, for methods that take videos: all of a batch."""
    method = hf_visual_peft.list_methods().get(name)
    return setup.batch if method is not None and method.video else None


def merges(name: str) -> bool:
    """Whether there is anything to merge."""
    method = hf_visual_peft.list_methods().get(name)
    return name in PEFT_BASELINES if method is None else method.mergeable


def contestant(name: str, model_name: str, setup: Setup, base: nn.Module | None = None) -> Contestant:
    """A method on a model, a new one if none is given, ready to train."""
    torch.manual_seed(0)
    if base is None:
        base = build_model(model_name).to(setup.device)
    if name == FULL:
        return Contestant(name, base)
    model = get_peft_model(base, config_of(name, base))
    method = hf_visual_peft.list_methods().get(name)
    if method is not None and method.calibrated:
        pixels, labels = example(setup.batch, device=setup.device)
        some = {
            "pixel_values": pixels,
            "labels": torch.arange(len(labels), device=labels.device) % 2,
        }  # GPS looks for two of one class
        hf_visual_peft.calibrate(model, [some], progress=False)
    return Contestant(name, model, frames=frames_of(name, setup))
