"""Flags of the recipe for few-shot classification, beside those of image classification."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from arguments import Recipe, method_config
from augmentation import BATCH_FLAGS
from peft import LoraConfig, PeftConfig
from training_options import SWITCH, positive, real

import hf_visual_peft
from hf_visual_peft.language.config import LanguageConfig
from hf_visual_peft.language.lora import CLIP_LORA
from hf_visual_peft.language.scale import SCALE
from hf_visual_peft.language.templates import DEFAULT


# flags of image classification that have no meaning here: what they are at when they are not given
WITHOUT = {
    "streaming": False,
    "eval_only": False,
    "do_predict": None,
    "resume_from_checkpoint": None,
    "push_to_hub": False,
    "early_stopping_patience": None,
    "eval_steps": None,
    "eval_epochs": None,
    "class_weights": None,
    "sampler": "shuffle",
    "label_smoothing_factor": 0.0,
    "clip_frames": None,
    "max_train_samples": None,
    "metric_for_best_model": None,
    "threshold": None,
    "top_k": None,
    "ema_decay": None,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of few-shot classification, and defaults that differ."""
    add = parser.add_argument_group("few-shot").add_argument
    add("--shots", type=positive, nargs="+", default=[1, 2, 4, 8, 16], help="labelled images a class (1 2 4 8 16)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one draw of images and one training for each (1 2 3)")
    add(
        "--split",
        choices=["base", "new", "all"],
        default="all",
        help="train and test on all classes, train on the first half and test both halves apart (base), or train and "
        "test on the second half (new)",
    )
    add("--class_names", help="file with the text of each class: lines in the order of the labels, or a JSON object "
        "from label to text; default: names of folders or labels")  # fmt: skip
    add("--template", nargs="+", default=[DEFAULT], help=f"text with {{}} for the name ({DEFAULT!r}); several: their "
        "mean; simple or openai: lists of open_clip")  # fmt: skip
    add("--class_chunk", type=positive, default=256, help="texts that are encoded at once")
    add("--steps_per_shot", type=positive, help="optimizer steps for each image of a class, instead of epochs")
    add("--epochs_by_shots", nargs="+", metavar="SHOTS=EPOCHS", help="epochs for each of --shots")
    add("--epoch_average", type=real, nargs=2, metavar=("MEAN", "STD"), help="keep the mean of the weights of all "
        "epochs, with the weights of a normal distribution (PromptSRC: 15 1); default: the last")  # fmt: skip
    add("--interpolate", type=real, nargs="+", metavar="ALPHA", help="also measure weights between those before (0) "
        "and after training (1); what is saved is after it")  # fmt: skip
    add("--train_logit_scale", **SWITCH, help="also train the factor of the cosine in the logits, one parameter")
    parser.set_defaults(
        select="last", checkpointing_steps="no", logging_steps=100, train_val_split=0.3, num_train_epochs=50
    )


def few_shot_method(method: str) -> tuple[type[PeftConfig] | None, dict[str, Any]]:
    """The config class of a method and the fields that its name sets."""
    if method in ("linear", "full", "zero_shot"):
        raise ValueError(
            f"--method {method}: zero-shot and a linear probe are in every table; name a method to put beside them, "
            f"such as {', '.join(hf_visual_peft.list_language_methods())}, clip_lora, or one for images."
        )
    if method == "clip_lora":
        return LoraConfig, dict(CLIP_LORA)
    own = hf_visual_peft.list_language_methods().get(method)
    return (own.config_cls, {}) if own else method_config(method)


def with_learned_scale(config: PeftConfig) -> PeftConfig:
    """The config of a method that also trains the factor of the cosine."""
    if isinstance(config, LanguageConfig):
        return dataclasses.replace(config, train_logit_scale=True)
    modules: Any = config
    modules.modules_to_save = [*(modules.modules_to_save or ()), SCALE]
    return config


def epochs_by_shots(given: list[str] | None, shots: list[int]) -> dict[int, int]:
    """The epochs of each number of shots, from words such as `16=200`.

    Raises:
        ValueError: a word is wrong, or a number of shots has none.
    """
    found = {}
    for word in given or []:
        shot, equals, epochs = word.partition("=")
        if not (equals and shot.isdecimal() and epochs.isdecimal() and int(epochs)):
            raise ValueError(f"--epochs_by_shots {word}: write SHOTS=EPOCHS, such as 16=200.")
        found[int(shot)] = int(epochs)
    if given and (missing := [str(shot) for shot in shots if shot not in found]):
        raise ValueError(f"--epochs_by_shots has no epochs for --shots {' '.join(missing)}: add {missing[0]}=EPOCHS.")
    return found


def check(args: argparse.Namespace) -> None:
    """Raise an error for flags that do not work together, and set those that follow from others."""
    wrong = [name for name, value in WITHOUT.items() if getattr(args, name) != value]
    wrong += [name for name in BATCH_FLAGS if getattr(args, name)]
    if args.select != "last":
        wrong.append("select")
    if args.checkpointing_steps != "no":
        wrong.append("checkpointing_steps")
    if wrong:
        raise ValueError(
            f"{', '.join(f'--{name}' for name in wrong)}: not in few-shot runs, which are short and keep the last "
            "step, with nothing chosen on other images. Remove it."
        )
    for name in ("shots", "seeds"):
        values = getattr(args, name)
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} {' '.join(map(str, values))}: one of them is there twice.")
    args.epochs_by_shots = epochs_by_shots(args.epochs_by_shots, args.shots)
    if args.epoch_average and not args.epoch_average[1]:
        raise ValueError(f"--epoch_average {args.epoch_average[0]:g} 0: the deviation must be above 0.")
    if args.interpolate and max(args.interpolate) > 1:
        raise ValueError(f"--interpolate {max(args.interpolate):g}: must be from 0 to 1.")
    if args.steps_per_shot and (args.epochs_by_shots or args.max_train_steps):
        raise ValueError("Give one of --steps_per_shot, --epochs_by_shots and --max_train_steps.")
    own = hf_visual_peft.list_language_methods().get(args.method)
    if args.train_logit_scale and own is not None and own.config_cls.why_no_scale:
        raise ValueError(f"--train_logit_scale: not with --method {args.method}: {own.config_cls.why_no_scale}.")
    if own is not None and not own.config_cls.needs_images:  # so that flags of augmentation are checked for it
        args.cache_features = args.cache_features or str(args.output_dir / "features")


RECIPE = Recipe(add_flags, few_shot_method, check)
