"""The pretrained model of a run, with its head, method and stochastic depth."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

import hf_visual_peft
from hf_visual_peft.backbones.modes import modes_kept


def load_model(
    args: argparse.Namespace,
    config: PeftConfig | None,
    names: list[str],
    several: bool = False,
    pretrained: Callable[..., Any] | None = None,
) -> Any:
    """The pretrained model with a head for the classes, and the method applied.

    Args:
        args: the flags.
        config: of the method.
        names: of the classes.
        several: whether an image may have several of them.
        pretrained: called in place of `AutoModelForImageClassification.from_pretrained`.
    """
    pretrained = pretrained or transformers.AutoModelForImageClassification.from_pretrained
    own = {"pretrained_model_name_or_path": args.model_name_or_path, "revision": args.model_revision}
    own |= {"cache_dir": args.cache_dir, "token": args.token}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its table says that the head is new; other gaps are errors
    try:
        model, loading = pretrained(
            **own, **drop_path_options(args, own), ignore_mismatched_sizes=args.ignore_mismatched_sizes,
            num_labels=len(names), id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
            problem_type="multi_label_classification" if several else None,
            dtype=torch.float32, output_loading_info=True,
        )  # fmt: skip
    except RuntimeError as error:
        if args.ignore_mismatched_sizes or "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"The head of {args.model_name_or_path} has a different number of classes from the {len(names)} of the "
            "data: give --ignore_mismatched_sizes for a new one."
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    if hasattr(model.config, "label_names"):  # timm's wrapper would save those of the checkpoint
        model.config.label_names = list(names)
    takers = [m for m in model.modules() if "interpolate_pos_encoding" in inspect.signature(m.forward).parameters]
    if args.interpolate_pos_encoding and not takers:
        raise ValueError(f"--interpolate_pos_encoding: {type(model).__name__} has no such argument; remove it.")
    if args.method != "full":
        given = getattr(config, "modules_to_save", None)
        named = getattr(config, "backbone", None)
        heads = list(hf_visual_peft.find_backbone(model, named).heads if given is None else given)
        fresh = [key for key in loading["missing_keys"] if not key.startswith(tuple(heads))]
        if fresh:
            raise ValueError(f"{args.model_name_or_path} lacks weights that would stay random: {', '.join(fresh)}.")
        if config is None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(tuple(f"{head}." for head in heads)))
        else:
            adapted = hf_visual_peft.with_visual_targets(config, model)
            # so that the adapter is loaded with exactly this checkpoint; a folder has no revisions
            named = args.model_revision != "main" and not Path(args.model_name_or_path).exists()
            model = get_peft_model(model, adapted, revision=args.model_revision if named else None)
        if not isinstance(config, hf_visual_peft.VisualPeftConfig):
            hf_visual_peft.freeze_norms(model)  # methods of the library do it themselves
    if args.drop_path_rate:
        check_drop_path(model, args)
    if args.gradient_checkpointing:
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def refuse_adapter(args: argparse.Namespace) -> None:
    """Raise an error if the pretrained model is an adapter.

    transformers would load it with its base, and what is saved after training would lack it.
    """
    where = args.model_name_or_path
    access = {"revision": args.model_revision, "cache_dir": args.cache_dir, "token": args.token}
    if find_adapter_config_file(where, **access) is None:
        return
    base = PeftConfig.from_pretrained(where, **access).base_model_name_or_path
    raise ValueError(
        f"--model_name_or_path {where} holds an adapter, and training starts from a whole model: give its base, "
        f"{base}, or merge the adapter into it (hf-visual-peft merge). --resume_from_checkpoint continues a run."
    )


def drop_path_options(args: argparse.Namespace, own: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` for `--drop_path_rate`."""
    if args.drop_path_rate is None:
        return {}
    found = transformers.AutoConfig.from_pretrained(**own)
    if found.model_type == "timm_wrapper":
        return {"model_args": {**(found.model_args or {}), "drop_path_rate": args.drop_path_rate}}
    if not hasattr(found, "drop_path_rate"):
        raise ValueError(f"--drop_path_rate: {found.model_type} models have no stochastic depth; remove it.")
    return {"drop_path_rate": args.drop_path_rate}


def check_drop_path(model: nn.Module, args: argparse.Namespace) -> None:
    """Raise an error if no stochastic depth of the backbone would act in training."""
    with modes_kept(model):
        model.train()
        acts = any(type(m).__name__.endswith("DropPath") and m.training for m in model.modules())
    if not acts:
        raise ValueError(
            f"--drop_path_rate {args.drop_path_rate} has no effect in this model with --method {args.method}."
        )
