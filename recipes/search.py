r"""Search for the parts of an adapter that suit an image data set, under a cap on trained parameters.

    accelerate launch recipes/search.py --space noah --max_parameters 200000 \
        --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name beans --output_dir out/found

A supernet trains first: the largest adapter of the space, of which every step runs a part at random. Then evolution
looks for the part with the highest --metric_for_best_model on the validation split, with at most --max_parameters
trained parameters beside the head. `--space` is `noah` (prompts, low-rank updates and bottlenecks, each with a size
for every block, arXiv 2206.04673), `glora` (the forms of peft's GLORA, arXiv 2306.07967), or a YAML file like those in
`hf_visual_peft/search/`. All flags of `image_classification.py` on data, model, training and output mean the same.

`--output_dir` then holds the adapter that was found with the weights that it has in the supernet (loadable by
`PeftModel.from_pretrained`), `all_results.json`, and `subnet.yaml`, from which

    accelerate launch recipes/image_classification.py --config out/found/subnet.yaml ...

trains it anew. A killed search continues with `--resume_from_checkpoint auto` and gives what it would have given: the
supernet has checkpoints, and `search-STEP.json` has the fitness of every part that was measured.

Exit status: 0 done, 1 error, 2 wrong flags, 143 or 130 stopped by SIGTERM or SIGINT.
"""

from __future__ import annotations


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
from typing import Any

import evaluate
import torch
import transformers
import yaml
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, set_seed
from arguments import data_title, flags_of, parse_args, program, shown
from augmentation import Mixing
from checkpoints import Checkpoints, saved_state
from image_classification import FREE, Measures, evaluate_split
from image_data import load_processor, prepare_data, save_processor
from image_sources import load_splits
from labels import BalancedSampler, Loss, check_flags, class_weights
from model import load_model
from optimization import build_optimizer, build_schedule
from output_folder import CARD, clear, is_own_readme, publish
from screen import Screen, progress_kind
from stopping import run_readably
from torch.utils.data import DataLoader
from training import Training, rank_of
from training_options import natural, positive

from hf_visual_peft.metrics import Accuracy, MacroF1, MeanAveragePrecision, MeanPerClassAccuracy, MultilabelF1
from hf_visual_peft.search import Choice, Space, Supernet, evolve, read_space
from hf_visual_peft.search.composite import CompositeSpace
from hf_visual_peft.sharing import hub


SCRIPT = "search.py"
SUBNET = "subnet.yaml"
NUMBERS = ("population", "parents", "mutations", "crossovers", "generations")
# flags without a meaning here, and the values that say so
WITHOUT_MEANING: dict[str, tuple[Any, ...]] = {
    "streaming": (False,), "cache_features": (None,), "ema_decay": (None,), "gradient_checkpointing": (False,),
    "early_stopping_patience": (None,), "eval_steps": (None,), "eval_epochs": (None,), "push_to_hub": (False,),
    "do_predict": (None, False), "eval_only": (False,), "clip_frames": (None,),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The flags of this recipe; it also takes those of `image_classification.py`."""
    parser = argparse.ArgumentParser(
        usage=f"{program(SCRIPT)} --space SPACE --max_parameters N [flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("search").add_argument
    add("--space", required=True, help="noah, glora, or a YAML file")
    add("--max_parameters", type=positive, required=True, help="cap on trained parameters, without the head")
    add("--population", type=positive, default=50, help="parts in the first generation")
    add("--parents", type=positive, default=10, help="best parts that others are made of")
    add("--mutations", type=natural, default=25, help="changed copies in a generation")
    add("--crossovers", type=natural, default=25, help="mixtures in a generation")
    add("--generations", type=natural, default=15, help="after the first one")
    return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, argparse.Namespace, Space]:
    """The flags of this recipe, those that it shares with `image_classification.py`, and the search space."""
    words = list(argv)
    parser = build_parser()
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    try:
        if path := early.parse_known_args(words)[0].config:
            words = flags_of(path) + words
        given, others = parser.parse_known_args(words)
        if any(word.split("=")[0] == "--method" for word in others):
            raise ValueError("--method: the space says which methods are searched; remove it")
        space = read_space(given.space)
    except (ValueError, OSError, yaml.YAMLError) as error:
        parser.error(str(error))
    others = [word for index, word in enumerate(others) if not _is_config(others, index)]
    method = "composite" if isinstance(space, CompositeSpace) else "glora"
    args, config = parse_args([*others, "--method", method], __doc__)
    if config is not None and config.to_dict() != type(config)().to_dict():
        parser.error(f"fields of {type(config).__name__} are in the space; remove their flags")
    for name, values in WITHOUT_MEANING.items():
        if getattr(args, name, values[0]) not in values:
            parser.error(f"--{name} has no meaning in a search; remove it")
    return given, args, space


def _is_config(words: Sequence[str], index: int) -> bool:
    """Whether a word is `--config`, or the value of it: that file is read already."""
    return words[index].split("=")[0] == "--config" or (index > 0 and words[index - 1] == "--config")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train the supernet, search, and save what is found; return the content of `all_results.json`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    search, args, space = parse(argv)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        project_dir=args.output_dir,
        step_scheduler_with_optimizer=False,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],  # what a step leaves out
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(f"{accelerator.distributed_type.value}: a search needs the whole model in each process.")
    main_process = accelerator.is_main_process
    transformers.logging.set_verbosity(transformers.logging.WARNING if main_process else transformers.logging.ERROR)
    screen = Screen(accelerator, progress_kind(args.progress))
    if main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)

    set_seed(args.seed)
    processor = load_processor(args)
    with accelerator.main_process_first():
        splits = load_splits(args)
    data, names, skipped = prepare_data(args, processor, splits)
    if not len(data.get("validation", ())):
        raise ValueError("A search needs validation images: name a validation split, or give --train_val_split.")
    ids = data["train"].ids
    several = ids.ndim == 2
    check_flags(args, several, len(names))
    base = load_model(argparse.Namespace(**{**vars(args), "method": "linear"}), None, names, several)
    supernet = Supernet(space.put_on(base), space, args.seed)
    subnets = supernet.subnets
    smallest, largest = subnets.parameters(subnets.smallest()), subnets.parameters(subnets.largest())
    if smallest > search.max_parameters:  # before training
        raise ValueError(
            f"--max_parameters {search.max_parameters}: the smallest part of the space has {smallest:,}. Raise it, or "
            "give the space smaller options."
        )
    inputs = {"interpolate_pos_encoding": True} if args.interpolate_pos_encoding else {}
    set_seed(args.seed, device_specific=True)
    sizes = ", ".join(f"{len(images)} {split}" for split, images in data.items())
    accelerator.print(f"{sizes} images of {len(names)} classes; {skipped} corrupt ones skipped.")
    accelerator.print(
        f"{math.prod(len(gene.options) for gene in subnets.genes):.1e} combinations of {smallest:,} to "
        f"{largest:,} parameters; at most {search.max_parameters:,} are wanted."
    )

    weights = class_weights(args.class_weights, ids, names)
    criterion = Loss(weights, several=several, smoothing=args.label_smoothing_factor)
    memory = {"keep_in_memory": True}
    scores: list[evaluate.Metric] = [Accuracy(**memory), MeanPerClassAccuracy(**memory), MacroF1(**memory)]
    if several:
        logit = math.log(args.threshold / (1 - args.threshold))
        scores = [MeanAveragePrecision(**memory), MultilabelF1(threshold=logit, **memory)]
    metrics = Measures(evaluate.combine(scores), criterion)
    loaders = {}
    for split, images in data.items():
        train = split == "train"
        balances = train and args.sampler == "balanced"
        loaders[split] = accelerator.prepare(
            DataLoader(
                images,
                batch_size=args.per_device_train_batch_size if train else args.per_device_eval_batch_size,
                shuffle=train and args.sampler == "shuffle",
                sampler=BalancedSampler(ids, args.seed, again=True) if balances else None,
                num_workers=args.dataloader_num_workers,
                pin_memory=accelerator.device.type == "cuda",
                generator=torch.Generator().manual_seed(args.seed),
                collate_fn=getattr(images, "collate", None),
            )
        )
    per_epoch = math.ceil(len(loaders["train"]) / args.gradient_accumulation_steps)
    max_steps = args.max_train_steps or args.num_train_epochs * per_epoch
    plain = build_optimizer(supernet.model, args)
    wrapped, optimizer, scheduler = accelerator.prepare(supernet, plain, build_schedule(plain, args, max_steps))
    accelerator.register_for_checkpointing(supernet.draws)
    run: dict[str, Any] = {name: str(value) for name, value in vars(args).items() if name not in FREE.split()}
    run |= {"max_steps": max_steps, "num_processes": accelerator.num_processes, "classes": names, "space": str(space)}
    run |= {"images": {split: len(images) for split, images in data.items()}}
    checkpoints = Checkpoints(accelerator, supernet.model, args.output_dir, args.save_total_limit, run)
    training = Training(
        accelerator, args, supernet.model, wrapped, optimizer, scheduler, loaders["train"], data["train"],
        evaluate=None, checkpoints=checkpoints,
        screen=screen, max_steps=max_steps, loss=criterion, inputs=inputs,
        mixing=Mixing(args, len(names)), average=None,
    )  # fmt: skip
    if main_process and args.overwrite_output_dir:
        clear(args.output_dir)
    accelerator.wait_for_everyone()
    if args.resume_from_checkpoint:
        training.resume(args.resume_from_checkpoint)
    training.run()
    training.check_result()

    def fitness(choice: Choice) -> float:
        supernet.chosen = choice
        found = evaluate_split(accelerator, wrapped, loaders["validation"], metrics, inputs, "validation")
        return rank_of(found, args.metric_for_best_model)[0]

    started = time.perf_counter()
    # of the weights of this step
    record = args.output_dir / f"search-{training.progress.step}.json"
    accelerator.wait_for_everyone()  # every process reads it before the first one writes
    found = evolve(
        subnets, fitness, max_parameters=search.max_parameters, seed=args.seed, record=record,
        writes=main_process, progress=screen.bars, **{name: getattr(search, name) for name in NUMBERS},
    )  # fmt: skip
    subnet = subnets.describe(found.choice)
    model = supernet.extract(found.choice)
    if args.model_revision != "main" and not Path(args.model_name_or_path).exists():
        model.peft_config["default"].revision = args.model_revision
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    results: dict[str, Any] = {}
    for split, prefix in (("validation", "eval"), ("test", "test")):
        if split in loaders:
            measured = evaluate_split(accelerator, prepared, loaders[split], metrics, inputs, split)
            results |= {f"{prefix}_{name}": value for name, value in measured.items()}
    results |= {
        "subnet": subnet,
        "fitness": found.fitness,
        "history": list(found.history),
        "evaluated": found.evaluated,
    }
    results |= {"adapter_parameters": found.parameters, "max_parameters": search.max_parameters}
    results |= {"images": run["images"], "steps": training.progress.step, "num_processes": accelerator.num_processes}
    results |= {"search_runtime": time.perf_counter() - started, "command": shown(argv, SCRIPT)}
    if main_process:
        text = json.dumps(results, indent=2)
        save = functools.partial(model.save_pretrained, state_dict=saved_state(model))
        publish(
            args.output_dir, save, functools.partial(save_processor, processor, model),
            lambda folder: (folder / SUBNET).write_text(_yaml(subnet), encoding="utf-8"),
            lambda folder: (folder / "all_results.json").write_text(text, encoding="utf-8"),
        )  # fmt: skip
        accelerator.print(text)
        if is_own_readme(args.output_dir):
            accelerator.print(f"{args.output_dir / CARD} is not the card of a run, so it is not changed.")
        else:
            split, prefix = ("test", "test_") if "test" in loaders else ("validation", "eval_")
            figures = {k.removeprefix(prefix): v for k, v in results.items()
                       if re.match(f"{prefix}.*(accuracy|precision|f1)", k)}  # fmt: skip
            hub.write_card(
                args.output_dir, model.peft_config["default"], labels=names, metrics=figures, dataset=data_title(args),
                dataset_split=split, command=results["command"],
                interpolate_pos_encoding=args.interpolate_pos_encoding,
            )  # fmt: skip
    accelerator.end_training()
    return results


def _yaml(subnet: dict[str, Any]) -> str:
    head = "# Found by recipes/search.py. Train it anew: image_classification.py --config with this file.\n"
    return head + yaml.safe_dump(subnet, sort_keys=False, default_flow_style=None, width=119)


if __name__ == "__main__":
    run_readably(main, show_traceback="--traceback" in sys.argv)
