"""Flags of training and of the output of a run, and their default values."""

from __future__ import annotations

import argparse
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import LoggerType
from optimization import OPTIMIZERS
from transformers.hf_argparser import string_to_bool

import hf_visual_peft
from hf_visual_peft.peft_methods.methods import any_method
from hf_visual_peft.training.defaults import ALL_WEIGHTS, CLIP_LORA, HEAD_ALONE


TRACKERS = sorted(LoggerType.list())
SCHEDULES = ("cosine", "cosine_with_restarts", "linear", "polynomial", "constant", "constant_with_warmup")
CRITERIA = ("accuracy", "mean_per_class_accuracy", "mean_average_precision", "micro_f1", "macro_f1", "f1", "loss")
SWITCH: dict[str, Any] = {"type": string_to_bool, "nargs": "?", "const": True, "default": False}


def at_least(low: float, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if not kind(text) >= low:
            raise argparse.ArgumentTypeError(f"must be {low} or greater, got {text}")
        if kind(text) == math.inf:
            raise argparse.ArgumentTypeError(f"must be finite, got {text}")
        return kind(text)

    parse.__name__ = kind.__name__
    return parse


natural, positive, real = at_least(0), at_least(1), at_least(0, float)


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of training; `fill_defaults` sets those for which the method has a default."""
    add = parser.add_argument_group("training").add_argument
    add("--per_device_train_batch_size", type=positive, default=32)
    add("--per_device_eval_batch_size", type=positive, default=64)
    add("--gradient_accumulation_steps", type=positive, default=1)
    add("--num_train_epochs", type=positive, default=10)
    add("--max_train_steps", type=positive, help="optimizer steps; overrides --num_train_epochs")
    add("--optim", choices=OPTIMIZERS, default="adamw_torch", help="weight decay is decoupled but in adam, rmsprop, "
        "adagrad and sgd, where it is an L2 penalty")  # fmt: skip
    add("--optim_betas", type=float, nargs=2, metavar="BETA", help="default: torch's")
    add("--optim_momentum", type=real, help="of sgd (0.9) and rmsprop (0)")
    add("--optim_eps", type=real, help="default: torch's")
    add("--learning_rate", type=real, help="default: the method's, shown in the log")
    add("--vision_learning_rate", type=real, help="of the image tower of a dual encoder; default: --learning_rate")
    add("--text_learning_rate", type=real, help="of its text tower; default: --learning_rate")
    add("--min_learning_rate", type=real, default=0.0, help="the schedule ends there, not at 0")
    add("--weight_decay", type=real, help="default: the method's")
    add("--lr_scheduler_type", choices=SCHEDULES, help="default: the method's")
    add("--num_warmup_steps", type=real, help="below 1: fraction of all steps; default: the method's")
    add(
        "--layer_lr_decay",
        type=real,
        default=1.0,
        help="factor of the learning rate from each block to the one before",
    )
    add("--drop_path_rate", type=real, help="stochastic depth of the backbone, if the model has it")
    add("--label_smoothing_factor", type=real, default=0.0)
    add("--max_grad_norm", type=real, default=0.0, help="0: no clipping")
    add("--ema_decay", type=real, help="evaluate and save a moving average of the trained parameters, with that decay")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: that of `accelerate launch`")
    add("--gradient_checkpointing", **SWITCH)
    add("--cache_features", help="folder for features of the frozen backbone, computed once for all epochs and runs")
    add("--cache_dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of these features")
    add("--cache_views", type=positive, help="fixed augmentations of each training image among these features")
    add("--dataloader_num_workers", type=natural, default=0)
    add("--seed", type=natural, default=42)
    add("--top_k", type=positive, help="k of the top-k accuracy; default: 5 if there are more classes")
    add("--eval_steps", type=positive, help="evaluate on validation every so many optimizer steps, not epochs")
    add("--eval_epochs", type=positive, help="evaluate on validation every so many epochs (1)")
    add("--select", choices=["best", "last"], default="best", help="weights to keep: best on validation, or last")
    add("--metric_for_best_model", choices=CRITERIA, help="default: accuracy, or "
        "mean_average_precision where a sample may have several classes; f1 is macro_f1; of equal ones the lower "
        "loss is better, and of these the later")  # fmt: skip
    add("--early_stopping_patience", type=positive, help="stop after so many evaluations in a row without a better "
        "--metric_for_best_model (or, where it is equal, a lower loss)")  # fmt: skip


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of what a run writes and shows."""
    add = parser.add_argument_group("output").add_argument
    add("--config", help="YAML file of flags, or the name of one of recipes/configs, such as vpt")
    add("--output_dir", type=Path, required=True)
    add(
        "--overwrite_output_dir",
        **SWITCH,
        help="delete the files of an earlier run there, once data and model are loaded",
    )
    add("--checkpointing_steps", default="epoch", help="number of optimizer steps, epoch, or no")
    add("--save_total_limit", type=positive, default=2, help="checkpoints to keep")
    add(
        "--resume_from_checkpoint",
        help="path of a checkpoint, latest, or auto: latest, or a new run if there is none",
    )
    add("--logging_steps", type=positive, default=10)
    add("--progress", choices=["bar", "lines", "none"], help="default: bar on a terminal, else lines")
    add("--traceback", **SWITCH, help="show where in the code an error arose")
    add("--report_to", nargs="+", default=["none"], help=f"none, or some of {', '.join(TRACKERS)}")
    add("--push_to_hub", **SWITCH, help="upload the adapter and its card")
    add("--hub_model_id", help="repository to push to")
    add("--hub_private_repo", **(SWITCH | {"default": None}), help="create the repository as private")
    add("--hub_token", help="default: that of `hf auth login`")


def training_defaults(args: argparse.Namespace) -> dict[str, Any]:
    """Defaults of flags that are not given, by name: the method's settings for AdamW."""
    own = {"linear": HEAD_ALONE, "full": ALL_WEIGHTS, "clip_lora": CLIP_LORA}
    for name, method in hf_visual_peft.list_language_methods().items():
        own[name] = method.training
    training = own[args.method] if args.method in own else any_method(args.method).training
    if args.learning_rate is None and args.optim != "adamw_torch":
        raise ValueError(
            f"--optim {args.optim} needs --learning_rate: the default of --method {args.method}, "
            f"{training.learning_rate:g}, is for adamw_torch"
        )
    return asdict(training)


def fill_defaults(args: argparse.Namespace) -> None:
    """Set flags that are not given to their defaults, and record them in `args.by_default`."""
    args.by_default = {k: value for k, value in training_defaults(args).items() if getattr(args, k) is None}
    vars(args).update(args.by_default)


def check_training(args: argparse.Namespace) -> None:
    """Raise an error for valid flags that do not work together."""
    for name in ("label_smoothing_factor", "layer_lr_decay"):
        if getattr(args, name) > 1:
            raise ValueError(f"--{name} must be between 0 and 1, got {getattr(args, name)}")
    if args.layer_lr_decay == 0:
        raise ValueError("--layer_lr_decay must be above 0, got 0.0; without it there is one learning rate")
    for name in ("ema_decay", "drop_path_rate"):
        if (getattr(args, name) or 0) >= 1:
            raise ValueError(f"--{name} must be from 0 to below 1, got {getattr(args, name)}")
    taken = inspect.signature(OPTIMIZERS[args.optim][0]).parameters
    for flag in ("betas", "momentum", "eps"):
        if getattr(args, f"optim_{flag}") is not None and flag not in taken:
            others = ", ".join(k for k, (kind, _) in OPTIMIZERS.items() if flag in inspect.signature(kind).parameters)
            raise ValueError(f"--optim_{flag}: --optim {args.optim} has none; these have: {others}")
    if not all(0 <= beta < 1 for beta in args.optim_betas or ()):
        raise ValueError(f"--optim_betas must be from 0 to below 1, got {args.optim_betas}")
    if args.layer_lr_decay < 1 and (args.vision_learning_rate, args.text_learning_rate) != (None, None):
        raise ValueError("give --layer_lr_decay, or a learning rate for a tower, not both")
    if args.min_learning_rate > args.learning_rate:
        raise ValueError(
            f"--min_learning_rate {args.min_learning_rate} must not exceed --learning_rate {args.learning_rate}"
        )
    if args.eval_steps and args.eval_epochs:
        raise ValueError("give --eval_steps or --eval_epochs, not both")
    if not re.fullmatch("epoch|no|[1-9][0-9]*", args.checkpointing_steps):
        raise ValueError(f"--checkpointing_steps must be epoch, no, or a number, got {args.checkpointing_steps}")
    if args.push_to_hub and (args.method in ("linear", "full") or not args.hub_model_id):
        raise ValueError("--push_to_hub needs --hub_model_id, and an adapter: a --method other than linear and full")
