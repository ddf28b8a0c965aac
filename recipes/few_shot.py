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

import hf_visual_peft  # first: it hides notices that other packages print on import


# isort: split
import argparse
import copy
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import arguments
import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from arguments import parse_args, shown
from augmentation import Mixing
from cached_features import cache_features
from checkpoints import Checkpoints
from draws import draw, halves, text_names
from few_shot_flags import RECIPE, frozen_images
from image_classification import Measures, evaluate_split
from image_data import Images, columns_of_all, encode_all, load_processor, save_processor, usable_rows
from image_folders import tell
from image_sources import load_splits
from labels import Loss, hold_out, read_labels
from optimization import build_optimizer, build_schedule
from output_folder import clear, publish
from peft import PeftConfig, get_peft_model
from screen import Screen, progress_kind
from stopping import run_readably
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from training import Training

from hf_visual_peft import CachedFeatures, TaskResConfig, VisualPeftConfig, ZeroShotClassifier
from hf_visual_peft.language.support import SupportConfig
from hf_visual_peft.metrics import Accuracy
from hf_visual_peft.tables import format_table


PENALTY = 31.6  # of the linear probe: CLIP's authors take 0.316 for features of norm 10, here they have norm 1


class Part(Dataset[dict[str, Any]]):
    """Some samples, with the places of their classes among those of the run as labels.

    Args:
        images: the samples: images, or features of them, (views, samples, width).
        rows: numbers of the samples.
        labels: of these.
    """

    def __init__(self, images: Images | Tensor, rows: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.rows, self.labels = images, rows, labels
        self._epoch = 0

    @property
    def epoch(self) -> int:
        """The number of the augmentation."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = epoch
        if isinstance(self.images, Images):
            self.images.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, label = int(self.rows[index]), int(self.labels[index])
        if isinstance(self.images, Images):
            return {**self.images[row], "labels": label}
        return {"image_features": self.images[self.epoch % len(self.images), row], "labels": label}


@dataclass
class FewShotTraining(Training):
    """The loop of the recipes, where the model computes the loss: methods for class texts add to it there.

    Attributes:
        epochs: mean of the weights of all epochs, to keep; None: the last weights.
    """

    epochs: hf_visual_peft.GaussianAverage | None = None

    def epoch(self) -> None:
        """The rest of an epoch."""
        super().epoch()
        if self.epochs is not None:
            self.epochs.update()

    def loss_of(self, batch: dict[str, Any], labels: Tensor) -> Tensor:
        """The loss of a batch, with that of the method."""
        loss: Tensor = self.wrapped(**batch, **self.inputs, labels=labels).loss
        return loss


@dataclass
class Data:
    """The images of all runs.

    Attributes:
        train: those that a draw has.
        test: to measure on; None for none.
        train_ids: the classes of the former.
        test_ids: the classes of the latter.
        draws: by shots and seed: the places in `train` of a draw's images.
        names: the text of each class.
        records: of each image in `train`, for `samples.jsonl`.
    """

    train: Any
    test: Any
    train_ids: np.ndarray
    test_ids: np.ndarray
    draws: dict[tuple[int, int], np.ndarray]
    names: list[str]
    records: list[dict[str, Any]]


@dataclass
class Job:
    """What all runs have in common.

    Attributes:
        accelerator: of the program.
        args: flags.
        config: of the method.
        classifier: without an adapter.
        data: its images.
        processor: of images.
        screen: shows the progress.
        seen: the classes that are trained on.
        unseen: the classes that are tested apart; None for none.
        rows: of the table: method, shots, seed, accuracy on seen classes, on unseen classes.
    """

    accelerator: Accelerator
    args: argparse.Namespace
    config: PeftConfig
    classifier: ZeroShotClassifier
    data: Data
    processor: Any
    screen: Screen
    seen: range
    unseen: range | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of the model beside images and labels."""
        on_images = self.args.interpolate_pos_encoding and isinstance(self.data.train, Images)
        return {"interpolate_pos_encoding": True} if on_images else {}

    def part(self, classes: range) -> Part:
        """The images to measure some classes on."""
        rows = np.flatnonzero(np.isin(self.data.test_ids, classes))
        return Part(self.data.test, rows, self.data.test_ids[rows] - classes.start)

    def drawn(self, shots: int, seed: int) -> Part:
        """The images to learn from."""
        rows = self.data.draws[shots, seed]
        return Part(self.data.train, rows, self.data.train_ids[rows] - self.seen.start)

    def name_classes(self, classes: range) -> None:
        """Give the classifier the texts of some classes."""
        self.classifier.set_class_names([self.data.names[number] for number in classes])

    def measure(self, model: Any) -> dict[str, float]:
        """The accuracy on seen classes, and on unseen ones, each among themselves."""
        found = {}
        for key, classes in (("accuracy", self.seen), ("new", self.unseen)):
            if classes is None or self.data.test is None:
                continue
            self.name_classes(classes)
            size = self.args.per_device_eval_batch_size
            loader = self.accelerator.prepare(
                DataLoader(self.part(classes), size, num_workers=self.args.dataloader_num_workers)
            )
            metrics = Measures(evaluate.combine([Accuracy(keep_in_memory=True)]), Loss())
            found[key] = evaluate_split(self.accelerator, model, loader, metrics, self.inputs, key)["accuracy"]
        self.name_classes(self.seen)
        return found

    def record(self, method: str, shots: int, seed: int | None, found: dict[str, float]) -> None:
        """Add a row of results."""
        if "new" in found:
            base, new = found.pop("accuracy"), found.pop("new")
            found = {"base": base, "new": new, "harmonic_mean": 2 * base * new / (base + new) if base + new else 0.0}
        self.rows.append({"method": method, "shots": shots, "seed": seed, **found})
        told = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        self.screen.say(f"{method}, {shots} shots{'' if seed is None else f', seed {seed}'}: {told or 'not measured'}")


# ----------------------------------------------------------------------------------------------------------- data


def load_data(accelerator: Accelerator, args: argparse.Namespace, processor: Any) -> tuple[Data, range, range | None]:
    """The images of all runs, the classes to learn, and those that are tested apart."""
    with accelerator.main_process_first():  # the others then read its cache
        splits = dict(load_splits(args))
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits["validation"]
    splits.pop("validation", None)
    columns = columns_of_all(splits, args)
    names, ids = encode_all({split: read_labels(data, columns[split][1]) for split, data in splits.items()})
    if ids["train"].ndim == 2:
        raise ValueError("Few-shot runs need one class for each image, and the samples here may have several.")
    images = {
        split: data.select_columns([columns[split][0]]).cast_column(columns[split][0], datasets.Image(decode=False))
        for split, data in splits.items()
    }
    pool = np.arange(len(images["train"]))
    if args.skip_corrupt_images:
        pool = usable_rows(images["train"], "train", args)
    tests = np.arange(len(images["test"])) if "test" in images else np.array([], dtype=np.int64)
    if "test" not in images and args.train_val_split and args.test_split != "none":
        kept, held = hold_out(ids["train"][pool], args.train_val_split, args.seed)
        pool, tests = pool[kept], pool[held]
        images["test"], ids["test"] = images["train"], ids["train"]
        tell(f"There is no test split: {len(tests)} of {len(kept) + len(held)} images of train are held out to test.")
    seen, unseen = halves(len(names), args.split)
    free = np.full(len(ids["train"]), -1)
    free[pool] = ids["train"][pool]
    draws = {(shots, seed): draw(free, names, seen, shots, seed) for shots in args.shots for seed in args.seeds}
    union = np.unique(np.concatenate(list(draws.values())))
    if args.max_eval_samples:
        tests = np.random.default_rng(args.seed).permutation(tests)[: args.max_eval_samples]
    tests = tests[np.isin(ids["test"][tests], [*seen, *(unseen or [])])] if len(tests) else tests
    texts = text_names(args.class_names, names) if args.class_names else names
    found: dict[str, Any] = {"test": None}
    for split, rows in (("train", union), ("test", tests)):
        if len(rows):
            chosen = images[split].select(rows)
            good = usable_rows(chosen, split, args)
            rows = rows[good]
            found[split] = Images(chosen.select(good), ids[split][rows], split, processor, args)
    test = found["test"]
    measured = [] if "test" not in images else [("learned", seen), ("new", unseen)]
    for kind, classes in measured:
        if classes is not None and (test is None or not np.isin(test.ids, classes).any()):
            raise ValueError(
                f"No image to test is of the {kind} classes. Give a test split that has them, or --test_split none."
            )
    places = {row: place for place, row in enumerate(union.tolist())}
    values = images["train"].select(union)[columns["train"][0]][:]
    records = [
        {"index": row, "label": names[ids["train"][row]], "image": (value or {}).get("path")}
        for row, value in zip(union.tolist(), values, strict=True)
    ]
    drawn = {key: np.array([places[row] for row in rows.tolist()]) for key, rows in draws.items()}
    test_ids = ids["train"][:0] if test is None else test.ids
    return Data(found["train"], test, found["train"].ids, test_ids, drawn, texts, records), seen, unseen


def encode_images(job: Job) -> None:
    """Put features of the images in their place, each computed once and kept on disk."""
    held = get_peft_model(job.classifier, TaskResConfig())  # any method that leaves the image tower as it is
    there = {split: images for split in ("train", "test") if (images := getattr(job.data, split)) is not None}
    for split, kept in cache_features(job.accelerator, held, there, job.args, job.inputs).items():
        views = (job.args.cache_views or 1) if split == "train" else 1
        with torch.no_grad():
            found = [torch.cat(_encoded(job, held, kept, view)) for view in range(views)]
        setattr(job.data, split, torch.stack(found))
    held.unload()


def _encoded(job: Job, held: Any, kept: CachedFeatures, view: int) -> list[Tensor]:
    kept.epoch = view
    found: list[Tensor] = []
    handle = job.classifier.adapters.register_forward_hook(
        lambda _, args, output: found.append(output.image.float().cpu())
    )
    for batch in DataLoader(kept, job.args.per_device_eval_batch_size, collate_fn=kept.collate):
        batch.pop("labels")
        held.eval()(**_moved(batch, job.accelerator.device))
    handle.remove()
    return found


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _moved(each, device) for key, each in value.items()}
    return value.to(device)


# ------------------------------------------------------------------------------------------------------- baselines


@torch.no_grad()
def features_of(job: Job, part: Part) -> tuple[Tensor, Tensor]:
    """Normalised features of images, and their labels, on every process."""
    part.epoch = 0
    found = []
    for batch in job.accelerator.prepare(DataLoader(part, job.args.per_device_eval_batch_size)):
        labels = batch.pop("labels")
        features = job.classifier.eval()(**batch, **job.inputs).image_embeds
        found.append(job.accelerator.gather_for_metrics((features, labels)))
    features, labels = zip(*found, strict=True)
    return torch.cat(features), torch.cat(labels)


def linear_probe(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Weights and biases of logistic regression on features, (width + 1, classes), found by L-BFGS."""
    inputs = F.pad(features.double(), (0, 1), value=1.0)
    weight = torch.zeros(inputs.shape[1], classes, dtype=torch.float64, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = weight[:-1].square().sum() / (2 * PENALTY * len(labels))
        loss = F.cross_entropy(inputs @ weight, labels) + penalty
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach()


def measure_baselines(job: Job) -> None:
    """Zero-shot classification, and a linear probe on the images of each draw."""
    if job.data.test is None:
        return
    job.record("zero-shot", 0, None, job.measure(job.classifier))
    features, labels = features_of(job, job.part(job.seen))
    for shots, seed in job.data.draws:
        weight = linear_probe(*features_of(job, job.drawn(shots, seed)), len(job.seen))
        predictions = (F.pad(features.double(), (0, 1), value=1.0) @ weight).argmax(1)
        job.record("linear probe", shots, seed, {"accuracy": (predictions == labels).double().mean().item()})


# -------------------------------------------------------------------------------------------------------- the method


def adapt(job: Job, shots: int, seed: int) -> None:
    """One run: learn from one draw, measure, save."""
    args, accelerator = copy.copy(job.args), job.accelerator
    args.seed = seed
    set_seed(seed)
    job.name_classes(job.seen)
    config = copy.deepcopy(job.config)
    if not frozen_images(args.method):
        config = hf_visual_peft.with_visual_targets(config, job.classifier)
    model = get_peft_model(job.classifier, config)
    if args.gradient_checkpointing:
        job.classifier.gradient_checkpointing_enable({"use_reentrant": False})
    part = job.drawn(shots, seed)
    size = args.per_device_train_batch_size
    if isinstance(config, SupportConfig):
        hf_visual_peft.fit(model.to(accelerator.device), every_view(part, args.cache_views or 1, size))
    if isinstance(config, VisualPeftConfig) and config.chooses_from_data:
        order = torch.Generator().manual_seed(seed)
        hf_visual_peft.calibrate(
            model.to(accelerator.device), DataLoader(part, size, shuffle=True, generator=order), seed=seed
        )
    if any(parameter.requires_grad for parameter in model.parameters()):
        set_seed(seed, device_specific=True)
        train(job, args, model, part, shots)
    job.record(args.method, shots, seed, job.measure(model))
    if accelerator.is_main_process:
        folder = args.output_dir / f"shots_{shots}_seed_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        publish(folder, model.save_pretrained, lambda aside: save_processor(job.processor, model, aside))
    model.unload()
    accelerator.free_memory()


def every_view(part: Part, views: int, size: int) -> Any:
    """Batches of all images, in every augmentation."""
    for view in range(views):
        part.epoch = view
        yield from DataLoader(part, size)
    part.epoch = 0


def train(job: Job, args: argparse.Namespace, model: Any, part: Part, shots: int) -> None:
    """Train what trains in a model with one draw."""
    accelerator = job.accelerator
    loader = accelerator.prepare(
        DataLoader(
            part,
            args.per_device_train_batch_size,
            shuffle=True,
            num_workers=args.dataloader_num_workers,
            generator=torch.Generator().manual_seed(args.seed),
        )
    )
    per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    steps = args.max_train_steps or args.epochs_by_shots.get(shots, args.num_train_epochs) * per_epoch
    if args.steps_per_shot:
        steps = args.steps_per_shot * shots
    plain = build_optimizer(model, args)
    wrapped, optimizer, scheduler = accelerator.prepare(model, plain, build_schedule(plain, args, steps))
    training = FewShotTraining(
        accelerator, args, model, wrapped, optimizer, scheduler, loader, part,
        evaluate=None, checkpoints=Checkpoints(accelerator, model, args.output_dir, 1, {}), screen=job.screen,
        max_steps=steps, loss=Loss(), inputs=job.inputs, mixing=Mixing(args, len(job.seen)), average=None,
    )  # fmt: skip
    if args.epoch_average:
        training.epochs = hf_visual_peft.GaussianAverage(model, math.ceil(steps / per_epoch), *args.epoch_average)
    training.run()
    if training.epochs is not None:
        training.epochs.apply()
    training.check_result()


# ------------------------------------------------------------------------------------------------------------ the job


def build_parser() -> argparse.ArgumentParser:
    """The parser of the flags, without the fields of a method."""
    parser = arguments.build_parser(__doc__)
    RECIPE.add_flags(parser)
    return parser


def table_of(rows: list[dict[str, Any]]) -> str:
    """The results, averaged over seeds, in percent."""
    figures = [name for name in ("accuracy", "base", "new", "harmonic_mean") if any(name in row for row in rows)]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["shots"]), []).append(row)

    def cell(group: list[dict[str, Any]], name: str) -> str:
        values = [100 * row[name] for row in group if name in row]
        if not values and name == "base":  # a linear probe has no classes but those of training
            values = [100 * row["accuracy"] for row in group if "accuracy" in row]
        if not values:
            return "-"
        return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")

    if "base" in figures:
        figures.remove("accuracy") if "accuracy" in figures else None
    cells = [
        [method, str(shots), *(cell(group, name) for name in figures)] for (method, shots), group in groups.items()
    ]
    header = ["method", "shots", *(name.replace("_", " ") for name in figures)]
    return format_table(header, cells, right=header[1:])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run everything as the flags say; return the content of `all_results.json`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args, config = parse_args(argv, __doc__, RECIPE)
    assert config is not None
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
    if frozen_images(args.method):
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
