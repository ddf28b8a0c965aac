"""Flags of the recipe for image classification: of data, model, training and output, and the fields of a method."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import streaming
import yaml
from accelerate.tracking import get_available_trackers
from augmentation import add_augmentation_flags, check_flags
from cached_features import check_augmentation
from image_data import CROPS
from image_sources import FORMATS, SPLITS
from output_folder import earlier_output
from peft import PeftConfig
from prediction import add_prediction_flags, check_prediction
from training_options import (
    SWITCH,
    TRACKERS,
    add_output_flags,
    add_training_flags,
    check_training,
    fill_defaults,
    positive,
    real,
)

import hf_visual_peft
from hf_visual_peft.language.support import SupportConfig
from hf_visual_peft.peft_methods.methods import PEFT_METHODS, PeftMethod, any_method
from hf_visual_peft.tables import close_names, did_you_mean


CONFIGS = Path(__file__).parent / "configs"


def program(script: str = "image_classification.py") -> str:
    """How the recipe was called: `hf-visual-peft train` sets the variable."""
    return os.environ.get("HF_VISUAL_PEFT_PROGRAM", f"accelerate launch recipes/{script}")


def literal(text: str) -> Any:
    """Parse the value of a method's field: a number, true, false, null, a list in brackets, or text."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return yaml.safe_load(text)


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage=f"{program()} [--config FILE] [flags]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", help="on the Hub, or a local folder for `load_dataset` or `load_from_disk`")
    add("--dataset_config_name", help="configuration of that data set")
    for split in SPLITS:
        add(f"--{split}_dir", help=f"folder for {split}, with one folder of images a class")
        add(f"--{split}_file", help=f"file for {split}: {', '.join(suffix.lstrip('.') for suffix in FORMATS)}")
        add(f"--{split}_split", help=f"split for {split} ('{split}'), or a slice as 'train[:800]', or none")
    add("--streaming", **SWITCH, help="read samples as a stream, without a copy on disk")
    add("--shuffle_buffer", type=positive, default=1000, help="samples among which --streaming draws the next one")
    add("--cache_dir", help="folder for downloads; default: that of each library")
    add("--token", help="access token for data set and checkpoint on the Hub; default: that of `hf auth login`")
    add("--data_token", help="access token for the data set, if it differs")
    add("--trust_remote_code", **SWITCH, help="refused: code from the Hub is never run")
    add("--train_val_split", type=real, help="fraction of train to validate on without such a split (best: 0.15)")
    add("--image_column_name", help="default: the only column of images")
    add(
        "--label_column_name",
        nargs="+",
        help="default: the only column of class labels, else 'label'; several: columns of 0 and 1, one a class",
    )
    add("--class_weights", nargs="+", metavar="WEIGHT", help="in the loss: balanced, or CLASS=NUMBER for some (1)")
    add("--sampler", choices=["shuffle", "balanced"], default="shuffle", help="balanced: each class equally often")
    add("--threshold", type=real, help="probability from which a class counts, for F1 of multi-label samples (0.5)")
    add("--max_train_samples", type=positive, help="train on that many random samples")
    add("--max_eval_samples", type=positive, help="evaluate each split on that many random samples")
    add("--check_images", **(SWITCH | {"default": True}), help="decode every image once before training")
    add("--skip_corrupt_images", **SWITCH, help="skip and count images that cannot be decoded")
    add("--image_size", type=positive, help="side of the model's input, pixels; default: the image processor's")
    add(
        "--train_crop",
        choices=CROPS,
        help="default: the method's; " + "; ".join(f"{k}: {v}" for k, v in CROPS.items()),
    )
    add("--crop_scale", type=real, help="smallest fraction of the image in a random_resized crop; default: 0.5")
    add("--clip_frames", type=positive, help="frames of each video, whose column holds lists of images")
    add("--horizontal_flip", type=real, help="probability of a mirrored image in training; default: 0")

    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", required=True, help="checkpoint on the Hub or local folder")
    add("--model_revision", default="main", help="branch, tag or commit of the checkpoint")
    add("--image_processor_name", help="default: the checkpoint's")
    add("--ignore_mismatched_sizes", **SWITCH, help="replace a head that has a different number of classes")
    add("--interpolate_pos_encoding", **SWITCH, help="for an --image_size other than that of pretraining")
    add("--method", help="name of the method, linear or full")

    add_prediction_flags(parser)
    add_augmentation_flags(parser)
    add_training_flags(parser)
    add_output_flags(parser)
    return parser


def flags_of(path: str) -> list[str]:
    """The flags of a YAML file, or of the one with that name in `configs`, as on the command line."""
    file, shipped = Path(path), CONFIGS / f"{path}.yaml"
    content = yaml.safe_load((shipped if shipped.exists() and not file.exists() else file).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: expected flags and values, got {type(content).__name__}.")
    flags: list[str] = []
    for name, value in content.items():
        if isinstance(value, list) and value:
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            word = "no" if value is False else value if isinstance(value, str) else json.dumps(value)
            flags.append(f"--{name}={word}")  # YAML reads `no` as false, but it is a value of some flags
    return flags


def method_config(method: str) -> tuple[type[PeftConfig] | None, dict[str, Any]]:
    """The config class of a method and the fields that its name sets; no class for `linear` and `full`."""
    if method in ("linear", "full"):
        return None, {}
    if method in (*hf_visual_peft.list_language_methods(), "clip_lora"):
        raise ValueError(
            f"--method {method} adapts a model of images and texts to class names: `hf-visual-peft few-shot`, or "
            "`accelerate launch recipes/few_shot.py`, takes it."
        )
    try:
        found = any_method(method)
    except ValueError:
        ours, peft = ", ".join(hf_visual_peft.list_methods()), ", ".join(PEFT_METHODS)
        meant = likely(method, [*hf_visual_peft.list_methods(), "linear", "full", *PEFT_METHODS])
        told = f"{meant}Choose" if meant else "choose"
        raise ValueError(f"--method {method}: {told} one of {ours}, linear, full, or of peft's: {peft}.") from None
    return found.config_cls, dict(found.chosen) if isinstance(found, PeftMethod) else {}


def likely(word: str, known: Iterable[str]) -> str:
    """The beginning of a message about a word that is not known; empty if no known one is close."""
    by_name = {each.lstrip("-"): each for each in known}  # dashes, which all flags have, make none alike
    question = did_you_mean(by_name[name] for name in close_names(word.lstrip("-"), by_name, 2))
    return f"{question} " if question else ""


def field_value(field: dataclasses.Field[Any], words: list[Any]) -> Any:
    """The value of a field from the words after its flag: one word is a list only where nothing else is allowed."""
    (first, *more) = words
    alone = re.fullmatch(r"(Optional\[)?list\[\w+\]\]?( \| None)?", str(field.type)) is not None
    if more or str(field.type).startswith("tuple") or (alone and first is not None and not isinstance(first, list)):
        return words
    return first


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What distinguishes the flags of a recipe from those of image classification.

    Attributes:
        add_flags: adds its own to the parser, or changes defaults.
        method_config: as the function of that name.
        check: raises an error for flags that do not work together, and may set some; before the check for all recipes.
    """

    add_flags: Callable[[argparse.ArgumentParser], None]
    method_config: Callable[[str], tuple[type[PeftConfig] | None, dict[str, Any]]]
    check: Callable[[argparse.Namespace], None]


def parse_args(
    argv: list[str], description: str | None = None, recipe: Recipe | None = None
) -> tuple[argparse.Namespace, PeftConfig | None]:
    """All flags, and the method's config, None for linear and full. Invalid flags end the program with a message.

    Args:
        argv: the words of the command line after the script's name.
        description: text of `--help` before the flags.
        recipe: None for image classification.
    """
    recipe = recipe or Recipe(lambda parser: None, method_config, lambda args: None)
    parser = build_parser(description)
    recipe.add_flags(parser)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--method")
    try:
        if path := early.parse_known_args(argv)[0].config:
            argv = flags_of(path) + argv
        method = early.parse_known_args(argv)[0].method
        config_cls, given = recipe.method_config(method) if method else (None, {})
    except (ValueError, OSError, yaml.YAMLError) as error:
        parser.error(str(error))
    inherited = {field.name for field in dataclasses.fields(SupportConfig)}  # of peft, or filled in by this library
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
        meant = likely(unknown[0].partition("=")[0], parser._option_string_actions)
        parser.error(
            f"unknown: {' '.join(unknown)}. {meant}--help lists the flags; those of --method {method} are: {names}"
        )
    for field in fields:
        values = vars(args).pop(f"={field.name}")
        if values is not None:
            given[field.name] = field_value(field, values)
    try:
        refuse_code(args)
        if args.do_predict or args.eval_only:
            check_prediction(args)
            return args, None
        if not method:
            raise ValueError("the following arguments are required: --method")
        fill_defaults(args)
        recipe.check(args)
        check(args)
        return args, config_cls(**given) if config_cls else None
    except (ValueError, TypeError) as error:
        parser.error(str(error))


def refuse_code(args: argparse.Namespace) -> None:
    if args.trust_remote_code:
        raise ValueError(
            "--trust_remote_code: code that comes with a data set or a checkpoint is not run here. Take the data "
            "set's parquet files (its branch refs/convert/parquet on the Hub), and checkpoints of transformers or timm"
        )


def check(args: argparse.Namespace) -> None:
    """Raise an error for valid flags that do not work together."""
    sources = [name for name in ("dataset_name", "train_dir", "train_file") if getattr(args, name)]
    if len(sources) != 1:
        raise ValueError(f"one of --dataset_name, --train_dir and --train_file is needed, got {len(sources)}")
    if args.train_split == "none":
        raise ValueError("--train_split none: training needs samples; name a split, or a slice as train[:800]")
    if args.streaming:
        streaming.check_flags(args)
    for name in ("train_val_split", "horizontal_flip", "crop_scale"):
        if (getattr(args, name) or 0) > 1:
            raise ValueError(f"--{name} must be between 0 and 1, got {getattr(args, name)}")
    check_flags(args)
    check_training(args)
    installed = {getattr(tracker, "value", tracker) for tracker in get_available_trackers()}
    for tracker in set(args.report_to) - {"none", "all"}:
        if tracker not in TRACKERS:
            raise ValueError(f"--report_to {tracker}: choose none, or some of {', '.join(TRACKERS)}")
        if tracker not in installed:
            raise ValueError(f"--report_to {tracker}: the package {tracker!r} is not installed: pip install {tracker}")
    ours = hf_visual_peft.list_methods().get(args.method.lower())
    if bool(args.clip_frames) != (ours is not None and ours.video):
        wanted = (
            "takes single images: remove --clip_frames" if args.clip_frames else "takes videos: give --clip_frames"
        )
        raise ValueError(f"--method {args.method} {wanted}")
    check_augmentation(args)
    check_folder(args)


def check_folder(args: argparse.Namespace) -> None:
    """Raise an error if the run would overwrite existing files, or delete files that it needs."""
    folder, resume = args.output_dir, args.resume_from_checkpoint
    left = [path.name for path in earlier_output(folder)]
    if Path(args.model_name_or_path).resolve() == folder.resolve():  # an adapter may be in the folder of its model
        if args.overwrite_output_dir or args.method in ("linear", "full"):
            raise ValueError(f"--output_dir {folder} is --model_name_or_path, which would be overwritten")
        left = [name for name in left if name.startswith(("adapter_", "checkpoint-", "all_results"))]
    inside = resume and (resume in ("latest", "auto") or folder.resolve() in Path(resume).resolve().parents)
    if args.overwrite_output_dir and inside:
        raise ValueError(f"--overwrite_output_dir would delete the checkpoint of --resume_from_checkpoint {resume}")
    runs = [name for name in left if name.startswith("checkpoint-") or name == "all_results.json"]
    if left and not resume and not args.overwrite_output_dir:
        raise ValueError(
            f"--output_dir {folder} has a run ({', '.join(runs or left)}): continue it with --resume_from_checkpoint "
            "latest, or delete it with --overwrite_output_dir"
        )


def data_title(args: argparse.Namespace) -> str:
    """The name of the data set in the card: its id on the Hub, or the name of its folder without the path."""
    if args.dataset_name and not Path(args.dataset_name).exists():
        return args.dataset_name
    path = Path(re.sub(r"[-_.]*[*?].*", "", str(args.dataset_name or args.train_dir or args.train_file))).resolve()
    return path.parent.name if path.stem in SPLITS else path.stem


def shown(argv: list[str], script: str = "image_classification.py") -> str:
    """The command for the card and the results, without secrets and local folders."""
    command = shlex.join(map(without_folders, argv))
    words = re.sub(r"--(hub_|data_)?token[ =]\S+ ?", "", command).strip()
    return f"{program(script)} {words}"


def without_folders(word: str) -> str:
    """A word of a command line; of an absolute path only the last folder and the name are kept."""
    flag, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    if not (path.is_absolute() or value.startswith("~")) or len(path.parts) < 2:
        return word
    return f"{flag}{equals}{'/'.join(path.parts[-2:] if path.stem in SPLITS else path.parts[-1:])}"
