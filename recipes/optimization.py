"""Optimizers, learning rates and the moving average of the trained parameters."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

import hf_visual_peft


Tensors = tuple[Tensor, ...] | list[Tensor]
DECOUPLED = {"decoupled_weight_decay": True}
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw_torch": (torch.optim.AdamW, {}),
    "adam": (torch.optim.Adam, {}),
    "nadam": (torch.optim.NAdam, DECOUPLED),
    "radam": (torch.optim.RAdam, DECOUPLED),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
}


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer of the trained parameters, as the flags say."""
    rates = {"vision": args.vision_learning_rate, "text": args.text_learning_rate}
    rates = {tower: rate for tower, rate in rates.items() if rate is not None}
    groups = hf_visual_peft.parameter_groups(model, args.weight_decay, rates)
    if args.layer_lr_decay < 1:
        groups = split_by_depth(model, groups, args.learning_rate, args.layer_lr_decay)
    kind, options = OPTIMIZERS[args.optim]
    given = {name: getattr(args, f"optim_{name}") for name in ("betas", "momentum", "eps")}
    options = options | {name: value for name, value in given.items() if value is not None}
    return kind(groups, lr=args.learning_rate, **options)  # type: ignore[call-arg]


def depths(model: nn.Module) -> tuple[dict[str, int], int]:
    """The depth of each trained parameter in the backbone, by name, and the greatest depth.

    Modules before the first block have depth 0. Block i has depth i + 1, with its adapters and with the modules
    between it and the next block; weights that blocks share have the depth of the first one. Modules after the last
    block or outside the backbone, such as heads, have the greatest depth.
    """
    backbone = hf_visual_peft.find_backbone(model)
    blocks = [f"{block.path}." for block in backbone.blocks]
    heads = tuple(f"{head}." for head in backbone.heads)
    inner = f"{backbone.path}." if backbone.path else ""
    found, seen = {}, 0
    for name, parameter in model.named_parameters():
        place = next((i + 1 for i, block in enumerate(blocks) if name.startswith(block)), None)
        seen = seen if place is None else max(seen, place)
        if parameter.requires_grad:
            behind = seen == len(blocks) or not name.startswith(inner) or name.startswith(heads)
            found[name] = place if place is not None else len(blocks) + 1 if behind else seen
    return found, len(blocks) + 1


def split_by_depth(
    model: nn.Module, groups: list[dict[str, Any]], learning_rate: float, decay: float
) -> list[dict[str, Any]]:
    """The groups, divided by depth: the deepest has the learning rate, each other `decay` times that of the next."""
    of_name, deepest = depths(model)
    depth = {id(parameter): of_name[name] for name, parameter in model.named_parameters() if name in of_name}
    found = []
    for group in groups:
        for level in sorted({depth[id(parameter)] for parameter in group["params"]}):
            members = [parameter for parameter in group["params"] if depth[id(parameter)] == level]
            found.append(group | {"params": members, "lr": learning_rate * decay ** (deepest - level)})
    return found


def build_schedule(optimizer: torch.optim.Optimizer, args: argparse.Namespace, steps: int) -> LambdaLR:
    """Warm-up and schedule over that many optimizer steps, which ends at `--min_learning_rate`."""
    warmup = round(args.num_warmup_steps * steps if args.num_warmup_steps < 1 else args.num_warmup_steps)
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)  # get_scheduler changes its argument
    (shape,) = transformers.get_scheduler(args.lr_scheduler_type, stand_in, warmup, steps).lr_lambdas
    low = args.min_learning_rate / args.learning_rate if args.learning_rate else 0.0
    return LambdaLR(optimizer, lambda step: shape(step) if step < warmup else low + (1 - low) * shape(step))


def follow_schedule(optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> None:
    """Set the learning rates of the schedule's current step, in case its length has changed."""
    rates = [
        base * shape(schedule.last_epoch) for base, shape in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


class MovingAverage:
    """The exponential moving average of parameters: average + (1 - decay) (value - average) after each step.

    The decay grows as (1 + n) / (10 + n) with the steps n, up to the given value, so that a short run forgets its
    start.

    Args:
        parameters: the trained parameters.
        decay: from 0 to below 1.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        def step(averages: Tensors, values: Tensors, count: Tensor | int) -> None:
            n = int(self.average.n_averaged)  # reading `count` on the device would synchronise
            torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + n) / (10 + n)))

        self.parameters = parameters
        self.average = AveragedModel(nn.ParameterList(parameters), multi_avg_fn=step)
        self.average.update_parameters(nn.ParameterList(parameters))  # starts at the current values

    def update(self) -> None:
        """Update the averages after a step."""
        self.average.update_parameters(nn.ParameterList(self.parameters))

    def state_dict(self) -> dict[str, Any]:
        """The averages, for a checkpoint."""
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the averages of a checkpoint."""
        self.average.load_state_dict(state)

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap the averages and the parameters of the model."""
        for parameter, average in zip(self.parameters, self.average.module.parameters(), strict=True):
            value = parameter.clone()
            parameter.copy_(average)
            average.copy_(value)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the averages, for evaluation."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()
