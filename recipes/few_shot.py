r"""Adapt a model of images and texts to class names with a few labelled images a class.

    accelerate launch recipes/few_shot.py --config few_shot/kgcoop --model_name_or_path openai/clip-vit-base-patch16 \
        --train_dir photos --shots 1 2 4 --output_dir out

For every number in `--shots` and every one of `--seeds` a few images of each class are drawn, and `--method` learns
from them, beside zero-shot classification and a linear probe. Nothing is chosen on other images: each method keeps its
last step. Images to test are the test split, else the validation split, else `--train_val_split` of train (0.3).
Flags are those of image classification, `--split base` for unseen classes, and the group "few-shot" below.
`--output_dir` then holds a folder for every run, such as `shots_4_seed_1`, for `hf_visual_peft.load_classifier`;
`samples.jsonl` with the images of each draw, `all_results.json`, and features of images.

Exit status: 0 done, 1 error, 2 wrong flags, 143 or 130 stopped by SIGTERM or SIGINT.
"""

from __future__ import annotations

import hf_visual_peft  # noqa: F401 - first: it hides notices that other packages print on import


# isort: split
import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import arguments
import transformers
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from arguments import parse_args, shown
from few_shot_data import load_data
from few_shot_features import encode_images, keeps_features, measure_baselines
from few_shot_flags import RECIPE, with_learned_scale
from few_shot_job import Job, table_of
from few_shot_runs import adapt
from image_data import load_processor
from output_folder import clear, publish
from screen import Screen, progress_kind
from stopping import run_readably

from hf_visual_peft import ZeroShotClassifier


def build_parser() -> argparse.ArgumentParser:
    """The parser of the flags, without the fields of a method."""
    parser = arguments.build_parser(__doc__)
    RECIPE.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run everything as the flags say; return the content of `all_results.json`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args, config = parse_args(argv, __doc__, RECIPE)
    assert config is not None
    if args.train_logit_scale:
        config = with_learned_scale(config)
    if getattr(config, "tower", None) == "text":  # images stay the same, as with methods for class texts
        vars(args).update(
            {k: v for k, v in {"train_crop": "none", "horizontal_flip": 0.0}.items() if k in args.by_default}
        )
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,  # the schedule counts optimizer steps, on any number of processes
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    main_process = accelerator.is_main_process
    transformers.logging.set_verbosity(transformers.logging.WARNING if main_process else transformers.logging.ERROR)
    screen = Screen(accelerator, progress_kind(args.progress))
    started = time.perf_counter()
    set_seed(args.seed)
    processor = load_processor(args)
    if main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    data, seen, unseen = load_data(accelerator, args, processor)
    templates = args.template[0] if len(args.template) == 1 else args.template
    access = {"cache_dir": args.cache_dir, "token": args.token, "revision": args.model_revision}
    classifier = ZeroShotClassifier.from_pretrained(
        args.model_name_or_path,
        class_names=data.names,
        templates=templates,
        class_chunk=args.class_chunk,
        **{name: value for name, value in access.items() if value is not None},
    ).to(accelerator.device)
    keeps = keeps_features(classifier, config, args)
    if main_process and args.overwrite_output_dir:  # only after everything has loaded
        clear(args.output_dir)
        for folder in args.output_dir.glob("shots_*_seed_*"):
            shutil.rmtree(folder)
    if main_process:
        lines = [
            json.dumps({"shots": shots, "seed": seed, **data.records[place]})
            for (shots, seed), places in data.draws.items()
            for place in places.tolist()
        ]
        publish(args.output_dir, lambda aside: (aside / "samples.jsonl").write_text("\n".join(lines) + "\n", "utf-8"))
    accelerator.wait_for_everyone()
    job = Job(accelerator, args, config, classifier, data, processor, screen, seen, unseen)
    if keeps:
        encode_images(job)
    job.name_classes(seen)
    measure_baselines(job)
    for shots, seed in data.draws:
        adapt(job, shots, seed)
    tested = 0 if data.test is None else len(data.test_ids)
    results = {
        "results": job.rows,
        "classes": {"learned": [data.names[n] for n in seen], "new": [data.names[n] for n in unseen or []]},
        "templates": classifier.config.templates,
        "test_images": tested,
        "runtime": time.perf_counter() - started,
        "command": shown(argv),
    }
    if main_process:
        text = json.dumps(results, indent=2)
        publish(args.output_dir, lambda folder: (folder / "all_results.json").write_text(text, encoding="utf-8"))
        accelerator.print(table_of(job.rows))
        first = args.output_dir / f"shots_{args.shots[-1]}_seed_{args.seeds[0]}"
        accelerator.print(f'Load one again: hf_visual_peft.load_classifier("{first}")')
    accelerator.end_training()
    return results


if __name__ == "__main__":
    os.environ.setdefault("HF_VISUAL_PEFT_PROGRAM", "accelerate launch recipes/few_shot.py")
    run_readably(main, show_traceback=parse_args(sys.argv[1:], __doc__, RECIPE)[0].traceback)
