"""Adapt a pretrained vision transformer to an image data set by one parameter-efficient method.

    accelerate launch recipes/image_classification.py --config recipes/configs/vpt.yaml \
        --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name beans --output_dir out/vpt

Everything is a flag; `--config` reads flags from a YAML file, and those on the command line win. `--method` takes any
method that `hf-visual-peft methods` lists, of this library or of peft, with the fields of its config as flags
(`--help --method vpt` lists them), `linear` for a linear probe and `full` for fine-tuning. The script is flat from
top to bottom, with images in `image_data.py`, saving in `checkpoints.py` and features in `cached_features.py` beside
it: copy the four and change what you need.

The epoch to keep is chosen on a validation split (`--select best`) or is the last one; the test split is used once,
at the end. `--output_dir` then holds the adapter with its head (loadable by `PeftModel.from_pretrained`), the image
processor, `all_results.json` and checkpoints, which hold only what trains.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import inspect
import json
import math
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import evaluate
import torch
import torch.nn.functional as F
import transformers
import yaml
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, LoggerType, set_seed
from cached_features import cache_features, check_augmentation
from checkpoints import Checkpoints, Progress, load_trainable, publish, saved_state, trainable_state
from huggingface_hub import HfApi
from image_data import CROPS, SPLITS, load_processor, prepare_data
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.hf_argparser import string_to_bool

import hf_visual_peft
from hf_visual_peft import hub
from hf_visual_peft.metrics import Accuracy, MeanPerClassAccuracy, TopKAccuracy
from hf_visual_peft.peft_methods import PEFT_METHODS, PeftMethod, any_method


TRACKERS = sorted(LoggerType.list())
SCHEDULES = ("cosine", "cosine_with_restarts", "linear", "polynomial", "constant", "constant_with_warmup")
# flags that may change when a run resumes
FREE = """config output_dir overwrite_output_dir resume_from_checkpoint checkpointing_steps save_total_limit
    logging_steps report_to push_to_hub hub_model_id hub_private_repo hub_token dataloader_num_workers check_images
    cache_features"""


# ----------------------------------------------------------------------------------------------------- arguments


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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="accelerate launch recipes/image_classification.py [--config FILE] [flags]",
        description=__doc__,
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
        add(f"--{split}_file", help=f"parquet, csv or json file for {split}")
        add(f"--{split}_split", help=f"split for {split} ('{split}'), or a slice as 'train[:800]', or none")
    add("--train_val_split", type=real, help="share of train to validate on where there is no such split (best: 0.15)")
    add("--image_column_name", help="default: the only column of images")
    add("--label_column_name", help="default: the only column of class labels, else 'label'")
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


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, PeftConfig | None]:
    """All flags, and the method's config, None for linear and full. Bad ones end the program with a message."""
    parser = build_parser()
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
    """The command for the card and the results, without the secret in it."""
    words = re.sub(r"--hub_token[ =]\S+ ?", "", shlex.join(argv)).strip()
    return f"accelerate launch recipes/image_classification.py {words}"


# --------------------------------------------------------------------------------------------------------- model


def load_model(args: argparse.Namespace, config: PeftConfig | None, names: list[str]) -> Any:
    """The pretrained model with a head for the classes, and the method applied."""
    model, loading = transformers.AutoModelForImageClassification.from_pretrained(
        args.model_name_or_path, revision=args.model_revision, ignore_mismatched_sizes=args.ignore_mismatched_sizes,
        num_labels=len(names), id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
        dtype=torch.float32, output_loading_info=True,
    )  # fmt: skip
    takers = [m for m in model.modules() if "interpolate_pos_encoding" in inspect.signature(m.forward).parameters]
    if args.interpolate_pos_encoding and not takers:
        raise ValueError(f"--interpolate_pos_encoding: {type(model).__name__} takes no such argument; leave it away.")
    if args.method != "full":
        given = getattr(config, "modules_to_save", None)
        heads = list(hf_visual_peft.find_backbone(model).heads if given is None else given)
        fresh = [key for key in loading["missing_keys"] if not key.startswith(tuple(heads))]
        if fresh:
            raise ValueError(f"{args.model_name_or_path} lacks weights that would stay random: {', '.join(fresh)}.")
        if config is None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(tuple(f"{head}." for head in heads)))
        else:
            model = get_peft_model(model, hf_visual_peft.with_visual_targets(config, model))
            if not isinstance(config, hf_visual_peft.VisualPeftConfig):
                hf_visual_peft.freeze_norms(model)  # ours do it themselves
    if args.gradient_checkpointing:
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


# ------------------------------------------------------------------------------------------------------- training


def check_sharded(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Raise an error for flags that need the whole model in each process where it lies in shards."""
    kind = accelerator.distributed_type
    if kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    wrong = {
        "--checkpointing_steps other than no": args.checkpointing_steps != "no",  # they would hold the whole model
        "--resume_from_checkpoint": args.resume_from_checkpoint,
        "--push_to_hub": args.push_to_hub,
        "--cache_features": args.cache_features,
        "--method full": args.method == "full",
        "--select other than last": kind == DistributedType.DEEPSPEED and args.select != "last",
    }
    if any(wrong.values()):
        names = ", ".join(name for name, given in wrong.items() if given)
        raise ValueError(f"{kind.value} does not go with {names}.")


@torch.no_grad()
def evaluate_split(
    accelerator: Accelerator,
    model: nn.Module,
    loader: DataLoader[Any],
    metrics: Any,
    inputs: dict[str, Any],
    name: str,
) -> dict[str, float]:
    """Metrics and mean loss on a split, the same on every process."""
    model.eval()
    losses = []
    for batch in tqdm(loader, desc=f"Evaluate on {name}", leave=False, disable=not accelerator.is_local_main_process):
        labels = batch.pop("labels")
        logits = model(**batch, **inputs).logits.float()
        loss = F.cross_entropy(logits, labels, reduction="none")
        logits, labels, loss = accelerator.gather_for_metrics((logits, labels, loss))
        metrics.add_batch(predictions=logits, references=labels)
        losses.append(loss)
    return {**metrics.compute(), "loss": torch.cat(losses).mean().item()}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate and save as the flags say; returns the content of `all_results.json`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args, config = parse_args(argv)
    trackers = [name for name in args.report_to if name != "none"]
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=trackers or None,
        project_dir=args.output_dir,
        step_scheduler_with_optimizer=False,  # the schedule counts optimizer steps, on any number of processes
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=args.method == "full")],
    )
    check_sharded(accelerator, args)
    main_process = accelerator.is_main_process
    transformers.logging.set_verbosity(transformers.logging.WARNING if main_process else transformers.logging.ERROR)
    if main_process:
        if args.push_to_hub:
            HfApi(token=args.hub_token).whoami()  # no access is an error now and not after training
        args.output_dir.mkdir(parents=True, exist_ok=True)
        if args.overwrite_output_dir:
            for path in earlier_output(args.output_dir):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    accelerator.wait_for_everyone()

    set_seed(args.seed)
    processor = load_processor(args)
    with accelerator.main_process_first():  # the others find what it has cached
        data, names, skipped = prepare_data(args, processor)
    model = load_model(args, config, names)
    if isinstance(config, hf_visual_peft.VisualPeftConfig) and config.chooses_from_data:
        # every process reads the same batches, so that all choose the same; a run that resumes chooses again
        sampler = torch.Generator().manual_seed(args.seed)
        size = args.per_device_train_batch_size
        hf_visual_peft.calibrate(
            model.to(accelerator.device),
            DataLoader(data["train"], batch_size=size, shuffle=True, generator=sampler),
            seed=args.seed,
            progress=accelerator.is_local_main_process,
        )
    inputs = {"interpolate_pos_encoding": True} if args.interpolate_pos_encoding else {}
    if args.cache_features:
        data = cache_features(accelerator, model, data, args, inputs)
    set_seed(args.seed, device_specific=True)  # dropout differs between processes
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trainable)
    sizes = ", ".join(f"{len(images)} {split}" for split, images in data.items())
    accelerator.print(f"{sizes} images of {len(names)} classes; {skipped} corrupt ones skipped.")
    accelerator.print(f"{count:,} of {sum(p.numel() for p in model.parameters()):,} parameters train.")

    scores: list[evaluate.Metric] = [Accuracy(keep_in_memory=True), MeanPerClassAccuracy(keep_in_memory=True)]
    if args.top_k or len(names) > 5:
        if (args.top_k or 5) > len(names):
            raise ValueError(f"--top_k {args.top_k}: there are {len(names)} classes.")
        scores.append(TopKAccuracy(k=args.top_k or 5, keep_in_memory=True))
    metrics = evaluate.combine(scores)

    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # the loaders are prepared before the model
        deepspeed = accelerator.state.deepspeed_plugin.deepspeed_config
        deepspeed["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size
    loaders = {}
    for split, images in data.items():
        train = split == "train"
        loader = DataLoader(
            images,
            batch_size=args.per_device_train_batch_size if train else args.per_device_eval_batch_size,
            shuffle=train,
            num_workers=args.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator().manual_seed(args.seed),  # its draws must not shift those of dropout
            collate_fn=getattr(images, "collate", None),
        )
        loaders[split] = accelerator.prepare(loader)
    groups = hf_visual_peft.parameter_groups(model, args.weight_decay)
    sgd = functools.partial(torch.optim.SGD, momentum=0.9)
    plain = (sgd if args.optim == "sgd" else torch.optim.AdamW)(groups, lr=args.learning_rate)
    per_epoch = math.ceil(len(loaders["train"]) / args.gradient_accumulation_steps)
    max_steps = args.max_train_steps or args.num_train_epochs * per_epoch
    warmup = args.num_warmup_steps * max_steps if args.num_warmup_steps < 1 else args.num_warmup_steps
    wrapped, optimizer, scheduler = accelerator.prepare(
        model, plain, transformers.get_scheduler(args.lr_scheduler_type, plain, round(warmup), max_steps)
    )

    trainable = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]  # shards are others

    run: dict[str, Any] = {name: str(value) for name, value in vars(args).items() if name not in FREE.split()}
    run |= {"max_steps": max_steps, "num_processes": accelerator.num_processes, "classes": names}
    run |= {
        "fields": config.to_dict() if config else {},
        "images": {split: len(images) for split, images in data.items()},
    }
    checkpoints = Checkpoints(accelerator, model, args.output_dir, args.save_total_limit, run)
    progress, best_state = Progress(), None
    if args.resume_from_checkpoint:
        progress, best_state = checkpoints.load(args.resume_from_checkpoint)
        accelerator.print(f"Going on after step {progress.step} of {max_steps}.")
    if trackers:
        accelerator.init_trackers("image_classification", {key: str(value) for key, value in run.items()})

    started = time.perf_counter() - progress.seconds

    def save_checkpoint() -> None:
        progress.seconds = time.perf_counter() - started
        checkpoints.save(progress, best_state)

    losses: list[Tensor] = []
    bar = tqdm(total=max_steps, initial=progress.step, desc="Train", disable=not accelerator.is_local_main_process)
    for epoch in range(progress.epoch, math.ceil(max_steps / per_epoch)):
        data["train"].epoch = epoch
        loaders["train"].set_epoch(epoch)
        batches = loaders["train"]
        if progress.batch:
            batches = accelerator.skip_first_batches(batches, progress.batch)
        wrapped.train()
        for batch in batches:
            if progress.step >= max_steps:
                break
            with accelerator.accumulate(wrapped):
                labels = batch.pop("labels")
                logits = wrapped(**batch, **inputs).logits.float()
                loss = F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing_factor)
                accelerator.backward(loss)
                if accelerator.sync_gradients and args.max_grad_norm:
                    accelerator.clip_grad_norm_(trainable, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            progress.batch += 1
            if not accelerator.sync_gradients:
                continue
            if not accelerator.optimizer_step_was_skipped:
                scheduler.step()
            progress.step += 1
            bar.update()
            if progress.step % args.logging_steps == 0:
                value = accelerator.gather(torch.stack(losses)).mean().item()
                losses.clear()
                if not math.isfinite(value):
                    raise FloatingPointError(f"The loss is {value} at step {progress.step}: lower --learning_rate.")
                bar.set_postfix(loss=f"{value:.4f}")
                accelerator.log({"train_loss": value, "learning_rate": scheduler.get_last_lr()[0]}, step=progress.step)
            if args.checkpointing_steps.isdigit() and progress.step % int(args.checkpointing_steps) == 0:
                save_checkpoint()
        if "validation" in loaders:
            found = evaluate_split(accelerator, wrapped, loaders["validation"], metrics, inputs, "validation")
            accelerator.log({f"eval_{name}": value for name, value in found.items()}, step=progress.step)
            if main_process:
                bar.write(f"Epoch {epoch + 1}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
            criterion = args.metric_for_best_model
            if args.select == "last" or progress.kept is None or found[criterion] > progress.kept[criterion]:
                progress.kept = {"epoch": epoch + 1, **found}
                best_state = trainable_state(model) if args.select == "best" else None
        progress.epoch, progress.batch = epoch + 1, 0
        if args.checkpointing_steps == "epoch":
            save_checkpoint()
    bar.close()

    if best_state is not None:
        load_trainable(model, best_state, "The best epoch")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        state = accelerator.get_state_dict(wrapped)
    else:
        state = saved_state(model)
    if main_process:  # before the test split, so that nothing there can cost the adapter
        save = functools.partial(model.save_pretrained, state_dict=state)
        publish(args.output_dir, save, processor.save_pretrained)
    kept = progress.kept or {"epoch": progress.epoch}
    results = {f"eval_{name}" if name != "epoch" else name: value for name, value in kept.items()}
    if "test" in loaders:
        found = evaluate_split(accelerator, wrapped, loaders["test"], metrics, inputs, "test")
        results |= {f"test_{name}": value for name, value in found.items()}
    accelerator.log({name: value for name, value in results.items() if name.startswith("test")}, step=progress.step)
    results |= {"steps": progress.step, "trainable_parameters": count, "skipped_images": skipped}
    results |= {"num_processes": accelerator.num_processes, "train_runtime": time.perf_counter() - started}
    results["command"] = command = shown(argv)
    if main_process:
        text = json.dumps(results, indent=2)
        publish(args.output_dir, lambda folder: (folder / "all_results.json").write_text(text, encoding="utf-8"))
        accelerator.print(text)
        if config is not None:
            split, prefix = ("test", "test_") if "test" in loaders else ("validation", "eval_")
            figures = {k.removeprefix(prefix): v for k, v in results.items() if re.match(f"{prefix}.*accuracy", k)}
            report: dict[str, Any] = {
                "metrics": figures,
                "dataset": data_title(args),
                "dataset_split": split,
                "command": command,
            }
            hub.write_card(args.output_dir, model.peft_config["default"], labels=names, **report)
        if args.push_to_hub:
            private, token = args.hub_private_repo, args.hub_token
            commit = hub.push(model, args.hub_model_id, private=private, token=token, **report)
            accelerator.print(f"Pushed: {commit.commit_url}")
    accelerator.end_training()
    return results


if __name__ == "__main__":
    main()
