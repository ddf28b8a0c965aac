"""Flags of the recipe for image classification: of data, model, training and output, and the fields of a method."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from cached_features import check_augmentation
from image_data import CROPS
from image_sources import FORMATS, SPLITS
from peft import PeftConfig
from transformers.hf_argparser import string_to_bool

import hf_visual_peft
from hf_visual_peft.peft_methods import PEFT_METHODS, PeftMethod, any_method


TRACKERS = sorted(LoggerType.list())
SCHEDULES = ("cosine", "cosine_with_restarts", "linear", "polynomial", "constant", "constant_with_warmup")


def at_least(low: float, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if not kind(text) >= low:
            raise argparse.ArgumentTypeError(f"must be {low} or greater, got {text}")
        return kind(text)

    parse.__name__ = kind.__name__
    return parse


def literal(text: str) -> Any:
    """The value of a method's field: a number, true, false, null, a list in brackets, or text."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return yaml.safe_load(text)


def build_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="accelerate launch recipes/image_classification.py [--config FILE] [flags]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    switch = {"type": string_to_bool, "nargs": "?", "const": True, "default": False}
    natural, positive, real = at_least(0), at_least(1), at_least(0, float)

    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", help="on the Hub, or a local folder for `load_dataset` or `load_from_disk`")
    add("--dataset_config_name", help="configuration of that data set")
    for split in SPLITS:
        add(f"--{split}_dir", help=f"folder for {split}, with one folder of images a class")
        add(f"--{split}_file", help=f"file for {split}: {', '.join(suffix.lstrip('.') for suffix in FORMATS)}")
        add(f"--{split}_split", help=f"split for {split} ('{split}'), or a slice as 'train[:800]', or none")
    add("--cache_dir", help="folder for what is downloaded; default: that of each library")
    add("--token", help="access token for data set and checkpoint on the Hub; default: that of `hf auth login`")
    add("--data_token", help="access token for the data set, where it is another")
    add("--trust_remote_code", **switch, help="refused: code from the Hub is never run")
    add("--train_val_split", type=real, help="share of train to validate on where there is no such split (best: 0.15)")
    add("--image_column_name", help="default: the only column of images")
    add(
        "--label_column_name",
        nargs="+",
        help="default: the only column of class labels, else 'label'; several: columns of 0 and 1, one a class",
    )
    add("--max_train_samples", type=positive, help="train on that many random samples")
    add("--max_eval_samples", type=positive, help="evaluate each split on that many random samples")
    add("--check_images", **(switch | {"default": True}), help="decode every image once before training")
    add("--skip_corrupt_images", **switch, help="count images that cannot be decoded and go on without them")
    add("--image_size", type=positive, help="side of the model's input, pixels; default: the image processor's")
    add("--train_crop", choices=CROPS, default="random_resized", help="; ".join(f"{k}: {v}" for k, v in CROPS.items()))
    add("--crop_scale", type=real, default=0.08, help="least share of the image in a random_resized crop")
    add("--clip_frames", type=positive, help="frames of each video, whose column holds lists of images")
    add("--horizontal_flip", type=real, default=0.5, help="probability of a mirrored image in training")

    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", required=True, help="checkpoint on the Hub or local folder")
    add("--model_revision", default="main", help="branch, tag or commit of the checkpoint")
    add("--image_processor_name", help="default: the checkpoint's")
    add("--ignore_mismatched_sizes", **switch, help="replace a head for another number of classes")
    add("--interpolate_pos_encoding", **switch, help="for an --image_size other than that of pretraining")
    add("--method", required=True, help="name of the method, linear or full")

    add = parser.add_argument_group("training").add_argument
    add("--per_device_train_batch_size", type=positive, default=32)
    add("--per_device_eval_batch_size", type=positive, default=64)
    add("--gradient_accumulation_steps", type=positive, default=1)
    add("--num_train_epochs", type=positive, default=10)
    add("--max_train_steps", type=positive, help="optimizer steps; overrides --num_train_epochs")
    add("--optim", choices=["adamw_torch", "sgd"], default="adamw_torch", help="sgd has momentum 0.9")
    add("--learning_rate", type=real, default=1e-3)
    add("--weight_decay", type=real, default=1e-4)
    add("--lr_scheduler_type", choices=SCHEDULES, default="cosine")
    add("--num_warmup_steps", type=real, default=0, help="below 1: share of all steps")
    add("--label_smoothing_factor", type=real, default=0.0)
    add("--max_grad_norm", type=real, default=0.0, help="0: no clipping")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: that of `accelerate launch`")
    add("--gradient_checkpointing", **switch)
    add("--cache_features", help="folder for features of the frozen backbone, computed once for all epochs and runs")
    add("--cache_dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of these features")
    add("--cache_views", type=positive, help="fixed augmentations of each training image among these features")
    add("--dataloader_num_workers", type=natural, default=0)
    add("--seed", type=natural, default=42)
    add("--top_k", type=positive, help="k of the top-k accuracy; default: 5 where there are more classes")
    add("--select", choices=["best", "last"], default="best", help="epoch to keep: best on validation, or last")
    add("--metric_for_best_model", choices=["accuracy", "mean_per_class_accuracy"], default="accuracy")

    add = parser.add_argument_group("output").add_argument
    add("--config", help="YAML file of flags")
    add("--output_dir", type=Path, required=True)
    add("--overwrite_output_dir", **switch, help="delete checkpoints and results of an earlier run there")
    add("--checkpointing_steps", default="epoch", help="number of optimizer steps, epoch, or no")
    add("--save_total_limit", type=positive, default=2, help="checkpoints to keep")
    add("--resume_from_checkpoint", help="path of a checkpoint, or latest")
    add("--logging_steps", type=positive, default=10)
    add("--report_to", nargs="+", default=["none"], help=f"none, or some of {', '.join(TRACKERS)}")
    add("--push_to_hub", **switch, help="upload the adapter and its card")
    add("--hub_model_id", help="repository to push to")
    add("--hub_private_repo", **(switch | {"default": None}), help="make a new repository private")
    add("--hub_token", help="default: that of `hf auth login`")
    return parser


def flags_of(path: str) -> list[str]:
    """The flags in a YAML file, as they would stand on the command line."""
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: expected flags and values, got {type(content).__name__}.")
    flags: list[str] = []
    for name, value in content.items():
        if isinstance(value, list) and value:
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
    return flags


def method_config(method: str) -> tuple[type[PeftConfig] | None, dict[str, Any]]:
    """The config class of a method and what its name says of the fields; no class for `linear` and `full`."""
    if method in ("linear", "full"):
        return None, {}
    try:
        found = any_method(method)
    except ValueError:
        ours, peft = ", ".join(hf_visual_peft.list_methods()), ", ".join(PEFT_METHODS)
        raise ValueError(f"--method {method}: choose one of {ours}, linear, full, or of peft's: {peft}.") from None
    return found.config_cls, dict(found.chosen) if isinstance(found, PeftMethod) else {}


def parse_args(argv: list[str], description: str | None = None) -> tuple[argparse.Namespace, PeftConfig | None]:
    """All flags, and the method's config, None for linear and full. Bad ones end the program with a message.

    Args:
        argv: the words of the command line behind the script's name.
        description: what `--help` says before the flags.
    """
    parser = build_parser(description)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--method")
    try:
        if path := early.parse_known_args(argv)[0].config:
            argv = flags_of(path) + argv
        method = early.parse_known_args(argv)[0].method
        config_cls, given = method_config(method) if method else (None, {})
    except (ValueError, OSError, yaml.YAMLError) as error:
        parser.error(str(error))
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    fields = [f for f in dataclasses.fields(config_cls) if f.init and f.name not in inherited] if config_cls else []
    group = parser.add_argument_group(f"fields of {method}")
    for field in fields:
        text = str(field.metadata.get("help", "")).replace("%", "%%")
        group.add_argument(
            f"--{field.name}", dest=f"={field.name}", nargs="+", type=literal, metavar="VALUE", help=text
        )
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        names = ", ".join(f"--{field.name}" for field in fields) or "none"
        parser.error(f"unknown: {' '.join(unknown)}. --help lists the flags; those of --method {method} are: {names}")
    for field in fields:
        values = vars(args).pop(f"={field.name}")
        if values is not None:
            given[field.name] = values if len(values) > 1 or str(field.type).startswith("tuple") else values[0]
    try:
        check(args)
        return args, config_cls(**given) if config_cls else None
    except (ValueError, TypeError) as error:
        parser.error(str(error))


def check(args: argparse.Namespace) -> None:
    """Raise an error for flags that are right one by one and wrong together."""
    sources = [name for name in ("dataset_name", "train_dir", "train_file") if getattr(args, name)]
    if len(sources) != 1:
        raise ValueError(f"one of --dataset_name, --train_dir and --train_file is needed, got {len(sources)}")
    if args.train_split == "none":
        raise ValueError("--train_split none: training needs samples; name a split, or a slice as train[:800]")
    if args.trust_remote_code:
        raise ValueError(
            "--trust_remote_code: code that comes with a data set or a checkpoint is not run here. Take the data "
            "set's parquet files (its branch refs/convert/parquet on the Hub), and checkpoints of transformers or timm"
        )
    for name in ("train_val_split", "horizontal_flip", "crop_scale", "label_smoothing_factor"):
        if (getattr(args, name) or 0) > 1:
            raise ValueError(f"--{name} must be between 0 and 1, got {getattr(args, name)}")
    if not re.fullmatch("epoch|no|[1-9][0-9]*", args.checkpointing_steps):
        raise ValueError(f"--checkpointing_steps must be epoch, no, or a number, got {args.checkpointing_steps}")
    for tracker in set(args.report_to) - {"none", "all"}:
        if tracker not in TRACKERS:
            raise ValueError(f"--report_to {tracker}: choose none, or some of {', '.join(TRACKERS)}")
        if tracker not in get_available_trackers():
            raise ValueError(f"--report_to {tracker}: the package {tracker!r} is not installed: pip install {tracker}")
    ours = hf_visual_peft.list_methods().get(args.method.lower())
    if bool(args.clip_frames) != (ours is not None and ours.video):
        wanted = (
            "takes single images: leave --clip_frames out" if args.clip_frames else "takes videos: give --clip_frames"
        )
        raise ValueError(f"--method {args.method} {wanted}")
    check_augmentation(args)
    if args.push_to_hub and (args.method in ("linear", "full") or not args.hub_model_id):
        raise ValueError("--push_to_hub needs --hub_model_id, and an adapter: a --method other than linear and full")
    left = [path.name for path in earlier_output(args.output_dir)]
    if left and not args.resume_from_checkpoint and not args.overwrite_output_dir:
        raise ValueError(
            f"--output_dir {args.output_dir} has a run ({', '.join(left)}): go on with it by --resume_from_checkpoint "
            "latest, or delete it by --overwrite_output_dir"
        )


def earlier_output(folder: Path) -> list[Path]:
    return [*sorted(folder.glob("checkpoint-*")), *folder.glob("all_results.json")]


def data_title(args: argparse.Namespace) -> str:
    """The data set as the card names it: its id on the Hub, or the name of its folder and not where that lies."""
    if args.dataset_name and not Path(args.dataset_name).exists():
        return args.dataset_name
    path = Path(args.dataset_name or args.train_dir or args.train_file).resolve()
    return path.parent.name if path.stem in SPLITS else path.stem


def shown(argv: list[str]) -> str:
    """The command for the card and the results, without the secrets in it."""
    words = re.sub(r"--(hub_|data_)?token[ =]\S+ ?", "", shlex.join(argv)).strip()
    return f"accelerate launch recipes/image_classification.py {words}"
