r"""Adapt a pretrained vision model to an image data set with a parameter-efficient method.

    accelerate launch recipes/image_classification.py --config recipes/configs/vpt.yaml \
        --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name beans --output_dir out/vpt

Everything is a flag; `--config` reads flags from a YAML file, and those on the command line win. `--method` takes any
method that `hf-visual-peft methods` lists, of this library or of peft, with the fields of its config as flags
(`--help --method vpt` lists them), `linear` for a linear probe and `full` for fine-tuning. The script reads from top
to bottom; README.md describes the files beside it: copy the folder and change what you need.

The weights to keep are the best on a validation split (`--select best`) or the last; the test split is used once, at
the end. `--output_dir` then holds the adapter with its head (loadable by `PeftModel.from_pretrained`), the image
processor, `all_results.json` and checkpoints, which hold only what trains. With such a folder as
`--model_name_or_path`, `--do_predict photos` predicts and `--eval_only` evaluates.

Exit status: 0 done, 1 error, 2 wrong flags, 143 or 130 stopped by SIGTERM or SIGINT, with a checkpoint to resume from.
"""

from __future__ import annotations

import hf_visual_peft  # first: it hides notices that other packages print on import


# isort: split
import argparse
import functools
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import evaluate
import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, set_seed
from arguments import data_title, parse_args, shown
from augmentation import Mixing
from cached_features import cache_features
from checkpoints import Checkpoints, load_trainable, saved_state
from fingerprints import fingerprint
from huggingface_hub import HfApi
from image_data import load_processor, prepare_data, save_processor
from image_sources import load_splits
from labels import BalancedSampler, Loss, check_flags, class_weights
from model import load_model, refuse_adapter
from optimization import MovingAverage, build_optimizer, build_schedule
from output_folder import CARD, clear, is_own_readme, make, publish, unless_it_fails
from peft import PeftConfig
from prediction import predict
from screen import Screen, progress_kind
from stopping import DivergedError, run_readably
from streaming import StreamLoader, prepare_stream
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from training import Hooks, Training, rank_of

from hf_visual_peft.metrics import (
    Accuracy,
    MacroF1,
    MeanAveragePrecision,
    MeanPerClassAccuracy,
    MultilabelF1,
    TopKAccuracy,
)
from hf_visual_peft.sharing import hub


# flags that may change when a run resumes
FREE = """config output_dir overwrite_output_dir resume_from_checkpoint checkpointing_steps save_total_limit
    logging_steps report_to push_to_hub hub_model_id hub_private_repo hub_token dataloader_num_workers check_images
    cache_features cache_dir token data_token num_train_epochs max_train_steps early_stopping_patience progress
    traceback by_default"""


NO_HOOKS = Hooks()


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
        "--ema_decay": getattr(args, "ema_decay", None) is not None,
        "--select other than last": kind == DistributedType.DEEPSPEED and args.select != "last",
    }
    if any(wrong.values()):
        names = ", ".join(name for name, given in wrong.items() if given)
        raise ValueError(f"{kind.value} does not go with {names}.")


class Measures(NamedTuple):
    """What is measured on a split: the figures and the loss."""

    figures: Any
    loss: Loss


@torch.no_grad()
def evaluate_split(
    accelerator: Accelerator,
    model: nn.Module,
    loader: DataLoader[Any],
    metrics: Measures,
    inputs: dict[str, Any],
    name: str,
) -> dict[str, float]:
    """Metrics and mean loss on a split, the same on every process."""
    model.eval()
    losses = []
    for batch in tqdm(loader, desc=f"Evaluate on {name}", leave=False, disable=not Screen.bars):
        labels = batch.pop("labels")
        real = batch.pop("real", None)  # of a stream, whose batches are filled
        logits = model(**batch, **inputs).logits.float()
        loss = metrics.loss.samples(logits, labels)
        logits, labels, loss = accelerator.gather_for_metrics((logits, labels, loss))
        if real is not None:
            logits, labels, loss = (tensor[accelerator.gather(real)] for tensor in (logits, labels, loss))
        if not logits.isfinite().all():
            raise DivergedError(f"predictions on {name} are not finite")
        metrics.figures.add_batch(predictions=logits, references=labels)
        losses.append(loss)
    return {**metrics.figures.compute(), "loss": torch.cat(losses).mean().item()}


def main(argv: Sequence[str] | None = None, hooks: Hooks = NO_HOOKS) -> dict[str, Any]:
    """Train, evaluate and save as the flags say; return the content of `all_results.json`, or the predictions.

    Args:
        argv: the flags; those of the process when `None`.
        hooks: of the program that calls this one.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    args, config = parse_args(argv, __doc__)
    with unless_it_fails(args.output_dir):
        return predict(args) if args.do_predict or args.eval_only else train(args, config, argv, hooks)


def train(
    args: argparse.Namespace, config: PeftConfig | None, argv: list[str], hooks: Hooks = NO_HOOKS
) -> dict[str, Any]:
    """As `main`, for a run that trains.

    Args:
        args: the flags.
        config: of the method.
        argv: the words of the command line, which the results show.
        hooks: of the program that calls this one.
    """
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
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU: on a CPU nothing would run in fp16; use bf16 or no.")
    main_process = accelerator.is_main_process
    transformers.logging.set_verbosity(transformers.logging.WARNING if main_process else transformers.logging.ERROR)
    screen = Screen(accelerator, progress_kind(args.progress))
    if main_process:
        if args.push_to_hub:
            HfApi(token=args.hub_token).whoami()  # missing access is an error now, not after training
        make(args.output_dir)

    refuse_adapter(args)
    set_seed(args.seed)
    processor = load_processor(args)
    with accelerator.main_process_first():  # the others then read its cache
        splits = load_splits(args)
    data, names, skipped = (prepare_stream if args.streaming else prepare_data)(args, processor, splits)
    for flag in ("early_stopping_patience", "eval_steps", "eval_epochs"):
        if getattr(args, flag) and "validation" not in data:
            raise ValueError(f"--{flag} needs a validation split: name one, or give --train_val_split above 0.")
    ids = data["train"].ids
    several = ids.ndim == 2
    check_flags(args, several, len(names))
    model = load_model(args, config, names, several, hooks.pretrained)
    if isinstance(config, hf_visual_peft.VisualPeftConfig) and config.chooses_from_data:
        if args.streaming:
            raise ValueError(
                f"--method {args.method} reads samples before training, which does not work with --streaming."
            )
        # every process reads the same batches, so that all make the same choice; a resumed run chooses again
        sampler = torch.Generator().manual_seed(args.seed)
        size = args.per_device_train_batch_size
        hf_visual_peft.calibrate(
            model.to(accelerator.device),
            DataLoader(data["train"], batch_size=size, shuffle=True, generator=sampler),
            seed=args.seed,
            progress=screen.bars,
        )
    results: dict[str, Any] = {"images": {split: len(images) for split, images in data.items()}}
    measured = "test" if "test" in data else "validation"
    if main_process and measured in data and not args.streaming:  # what the figures are figures of
        images = data[measured]
        results["fingerprint"] = {measured: fingerprint(images.data, images.ids, names)}
    inputs = {"interpolate_pos_encoding": True} if args.interpolate_pos_encoding else {}
    if args.cache_features:
        data = cache_features(accelerator, model, data, args, inputs)
    set_seed(args.seed, device_specific=True)  # dropout differs between processes
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trainable)
    hooks.prepared(count, list(data))
    sizes = ", ".join(f"{len(images)} {split}" for split, images in data.items())
    accelerator.print(f"{sizes} images of {len(names)} classes; {skipped} corrupt ones skipped.")
    accelerator.print(f"{count:,} of {sum(p.numel() for p in model.parameters()):,} parameters train.")
    if args.by_default:
        accelerator.print(f"Defaults for {args.method}: {', '.join(f'{k} {v}' for k, v in args.by_default.items())}.")

    weights = class_weights(args.class_weights, ids, names)
    criterion = Loss(weights, several=several, smoothing=args.label_smoothing_factor)
    memory = {"keep_in_memory": True}
    if several:
        logit = math.log(args.threshold / (1 - args.threshold))
        scores: list[evaluate.Metric] = [MeanAveragePrecision(**memory), MultilabelF1(threshold=logit, **memory)]
    else:
        scores = [Accuracy(**memory), MeanPerClassAccuracy(**memory), MacroF1(**memory)]
        if args.top_k or len(names) > 5:
            scores.append(TopKAccuracy(k=args.top_k or 5, **memory))
    metrics = Measures(evaluate.combine(scores), criterion)

    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if deepspeed:  # the loaders are prepared before the model
        plugin = accelerator.state.deepspeed_plugin.deepspeed_config
        plugin["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size
    loaders = {}
    for split, images in data.items():
        if args.streaming:
            loaders[split] = StreamLoader(accelerator, images)  # type: ignore[arg-type]
            continue
        train = split == "train"
        balances = train and args.sampler == "balanced"
        loader = DataLoader(
            images,
            batch_size=args.per_device_train_batch_size if train else args.per_device_eval_batch_size,
            shuffle=train and args.sampler == "shuffle",
            sampler=BalancedSampler(ids, args.seed, again=not args.cache_features) if balances else None,
            num_workers=args.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator().manual_seed(args.seed),  # its draws must not change those of dropout
            collate_fn=getattr(images, "collate", None),
        )
        loaders[split] = accelerator.prepare(loader)
    plain = build_optimizer(model, args)
    per_epoch = math.ceil(len(loaders["train"]) / args.gradient_accumulation_steps)
    if deepspeed and len(loaders["train"]) % args.gradient_accumulation_steps:
        raise ValueError(
            f"DeepSpeed divides gradients by --gradient_accumulation_steps {args.gradient_accumulation_steps}, but "
            f"the last group of the {len(loaders['train'])} batches of an epoch has fewer: choose a divisor of these."
        )
    max_steps = args.max_train_steps or args.num_train_epochs * per_epoch
    wrapped, optimizer, scheduler = accelerator.prepare(model, plain, build_schedule(plain, args, max_steps))
    average = None
    if args.ema_decay is not None:
        average = MovingAverage([p for p in wrapped.parameters() if p.requires_grad], args.ema_decay)
        accelerator.register_for_checkpointing(average)

    run: dict[str, Any] = {name: str(value) for name, value in vars(args).items() if name not in FREE.split()}
    run |= {"stream_workers": str(args.dataloader_num_workers)} if args.streaming else {}
    run |= {"max_steps": max_steps, "num_processes": accelerator.num_processes, "classes": names}
    run |= {
        "fields": config.to_dict() if config else {},
        "images": {split: len(images) for split, images in data.items()},
    }

    def validate() -> dict[str, float]:
        found = evaluate_split(accelerator, wrapped, loaders["validation"], metrics, inputs, "validation")
        hooks.evaluated(rank_of(found, args.metric_for_best_model)[0], training.progress.step)
        return found

    training = Training(
        accelerator, args, model, wrapped, optimizer, scheduler, loaders["train"], data["train"],
        evaluate=validate if "validation" in loaders else None,
        checkpoints=Checkpoints(accelerator, model, args.output_dir, args.save_total_limit, run),
        screen=screen, max_steps=max_steps, loss=criterion, inputs=inputs, mixing=Mixing(args, len(names)),
        average=average,
    )  # fmt: skip
    if main_process and args.overwrite_output_dir:  # only after everything has loaded
        clear(args.output_dir)
    accelerator.wait_for_everyone()
    if args.resume_from_checkpoint:
        training.resume(args.resume_from_checkpoint)
    if trackers:
        named = {"trackio": {"name": Path(args.output_dir).name}}
        accelerator.init_trackers("image_classification", {key: str(value) for key, value in run.items()}, named)
    training.run()
    progress = training.progress

    if training.best_state is not None:
        load_trainable(model, training.best_state, "The best epoch")
    elif average is not None:
        average.exchange()
    training.check_result()
    state = accelerator.get_state_dict(wrapped) if deepspeed else saved_state(model)
    if main_process:  # before the test split, so that no error there can lose the adapter
        save = functools.partial(model.save_pretrained, state_dict=state)
        publish(args.output_dir, save, functools.partial(save_processor, processor, model))
    kept = progress.kept or {"epoch": training.epoch_number(), "step": progress.step}
    results = {
        **{name if name in ("epoch", "step") else f"eval_{name}": value for name, value in kept.items()},
        **results,
    }
    if "test" in loaders:
        found = evaluate_split(accelerator, wrapped, loaders["test"], metrics, inputs, "test")
        results |= {f"test_{name}": value for name, value in found.items()}
    accelerator.log({name: value for name, value in results.items() if name.startswith("test")}, step=progress.step)
    if "validation" in loaders:
        results["metric_for_best_model"] = args.metric_for_best_model
    results["train_loss"] = progress.train_loss[0] / max(progress.train_loss[1], 1)
    results |= {"steps": progress.step, "trainable_parameters": count, "skipped_images": skipped}
    results |= {"num_processes": accelerator.num_processes, "train_runtime": time.perf_counter() - training.started}
    results["command"] = command = shown(argv)
    if main_process:
        text = json.dumps(results, indent=2)
        publish(args.output_dir, lambda folder: (folder / "all_results.json").write_text(text, encoding="utf-8"))
        accelerator.print(text)
        if config is not None:
            split, prefix = ("test", "test_") if "test" in loaders else ("validation", "eval_")
            figures = {
                k.removeprefix(prefix): v
                for k, v in results.items()
                if re.match(f"{prefix}.*(accuracy|precision|f1)", k)
            }
            report: dict[str, Any] = {
                "metrics": figures,
                "dataset": data_title(args),
                "dataset_split": split,
                "command": command,
                "interpolate_pos_encoding": args.interpolate_pos_encoding,
            }
            if is_own_readme(args.output_dir):
                accelerator.print(f"{args.output_dir / CARD} is not the card of a run, so it is not changed.")
            else:
                hub.write_card(args.output_dir, model.peft_config["default"], labels=names, **report)
        if args.push_to_hub:
            private, token = args.hub_private_repo, args.hub_token
            commit = hub.push(model, args.hub_model_id, private=private, token=token, processor=processor, **report)
            accelerator.print(f"Pushed: {commit.commit_url}")
    accelerator.end_training()
    return results


if __name__ == "__main__":
    run_readably(main, show_traceback=parse_args(sys.argv[1:], __doc__)[0].traceback)
