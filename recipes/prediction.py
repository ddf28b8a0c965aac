"""Prediction and evaluation with the result of a run: an adapter, or the whole model of `linear` and `full`.

`--do_predict SOURCE` takes any images, with or without labels, `--eval_only` the test split of the usual flags, or
else validation. `--output_dir` then holds `predictions.csv` and `predictions.json`, with the probability of every
class, and where there are labels `evaluation.json`. Images go through the image processor that the run saved.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from image_data import Images, input_size, load_processor
from image_folders import some
from output_folder import make
from peft import PeftConfig
from peft.utils.other import ModulesToSaveWrapper
from prediction_sources import Samples, read_samples
from screen import Screen, progress_kind
from stopping import DivergedError
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from training_options import SWITCH
from transformers.utils import cached_file, find_adapter_config_file

from hf_visual_peft.backbones.input_size import size_to_tell
from hf_visual_peft.core.loading import load_complete
from hf_visual_peft.metrics import (
    Accuracy,
    CalibrationError,
    ConfusionMatrix,
    MacroF1,
    MeanAveragePrecision,
    MeanPerClassAccuracy,
    MultilabelF1,
    PerClassScores,
    TopKAccuracy,
)
from hf_visual_peft.metrics.inputs import per_class
from hf_visual_peft.sharing.card import PROCESSOR_NAME, TIMM_PROCESSOR
from hf_visual_peft.sharing.files import write_aside
from hf_visual_peft.sites import WholeLayer


WRITTEN = ("predictions.csv", "predictions.json", "evaluation.json")
OF_DATA = (
    "dataset_name",
    *(f"{split}_{kind}" for split in ("train", "validation", "test") for kind in ("dir", "file")),
)
OF_TRAINING = ("push_to_hub", "resume_from_checkpoint", "cache_features", "streaming")


def add_prediction_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prediction, with a saved adapter or model as --model_name_or_path").add_argument
    add(
        "--do_predict",
        metavar="SOURCE",
        nargs="+",
        help="predict: images, folders, patterns such as 'in/*.jpg', - for standard input (file names, or one image); "
        "or one file as for --test_file, or one data set",
    )
    add("--eval_only", **SWITCH, help="predict and evaluate on the test split, or else on validation; no training")
    add("--base_model_name_or_path", help="checkpoint for the adapter; default: the one that it names")


def check_prediction(args: argparse.Namespace) -> None:
    """Raise an error for flags that do not work together, and for existing results."""
    if args.do_predict and args.eval_only:
        raise ValueError("--do_predict and --eval_only: give one; with labels, --do_predict also evaluates")
    if args.do_predict:
        given = [f"--{name}" for name in OF_DATA if getattr(args, name)]
        if given:
            raise ValueError(f"--do_predict already names the images: remove {', '.join(given)}")
    given = [f"--{name}" for name in OF_TRAINING if getattr(args, name)]
    if given:
        raise ValueError(f"{', '.join(given)}: nothing trains with --do_predict and --eval_only")
    left = [name for name in WRITTEN if (args.output_dir / name).exists()]
    if left and not args.overwrite_output_dir:
        raise ValueError(f"--output_dir {args.output_dir} has {', '.join(left)}: --overwrite_output_dir replaces them")


# ------------------------------------------------------------------------------------------------------------- model


@dataclass
class Saved:
    """A saved model.

    Attributes:
        model: with the adapter, if there is one.
        processor: of its images.
        names: of its classes.
        several: whether an image may have several classes.
        inputs: extra arguments of the model.
    """

    model: Any
    processor: Any
    names: list[str]
    several: bool
    inputs: dict[str, Any]


def load_saved(args: argparse.Namespace) -> Saved:
    """The model with its own image processor and classes.

    Raises:
        ValueError: the model has no trained head, or its base cannot be loaded.
    """
    where, flag = args.model_name_or_path, f"--model_name_or_path {args.model_name_or_path}"
    access = {"cache_dir": args.cache_dir, "token": args.token}
    local = Path(where).is_dir()
    own = {**access, "revision": None if local else args.model_revision}
    adapter = find_adapter_config_file(where, **own) is not None
    whole = local and Path(where, "config.json").exists()
    if adapter and whole:
        raise ValueError(f"{flag} holds an adapter and a whole model: move adapter_config.json or config.json away.")
    if local and not adapter and not whole:
        raise ValueError(f"{flag} has neither adapter_config.json nor config.json: it is not the result of a run.")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # new weights in its table are an error below
    try:
        model, missing, base = _load_adapter(args, own, access) if adapter else _load_whole(where, own)
    finally:
        transformers.logging.set_verbosity(verbosity)
    if missing:
        raise ValueError(
            f"{flag} lacks weights that would be random ({some(missing)}): give the adapter or model of a run that "
            "trained its head."
        )
    if getattr(model.config, "id2label", None) is None:
        raise ValueError(f"{flag}: its config has no class names.")
    for origin in ((where, own["revision"]), base):
        found = cached_file(
            origin[0], PROCESSOR_NAME, revision=origin[1], **access,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        if found:
            break
    timm = found is not None and TIMM_PROCESSOR in Path(found).read_text(encoding="utf-8")
    chosen = {"model_name_or_path": origin[0], "model_revision": origin[1]}
    processor = load_processor(argparse.Namespace(**vars(args) | chosen), timm_file=PROCESSOR_NAME if timm else None)
    adapted = model.peft_config["default"] if adapter else None
    if bool(args.clip_frames) != bool(getattr(adapted, "video", False)):
        wanted = "single images: remove --clip_frames" if args.clip_frames else "videos: give --clip_frames"
        raise ValueError(f"{flag} takes {wanted}.")
    names = [str(model.config.id2label[index]) for index in range(len(model.config.id2label))]
    several = getattr(model.config, "problem_type", None) == "multi_label_classification"
    size = size_to_tell(model)
    other = args.interpolate_pos_encoding or (size is not None and input_size(processor) != size)
    inputs = {"interpolate_pos_encoding": True} if other else {}
    return Saved(model, processor, names, several, inputs)


def _load_whole(where: str, own: dict[str, Any]) -> tuple[Any, list[str], tuple[str, Any]]:
    model, loading = transformers.AutoModelForImageClassification.from_pretrained(
        where, **own, dtype=torch.float32, output_loading_info=True
    )
    return model, sorted(loading["missing_keys"]), (where, own["revision"])


def _load_adapter(
    args: argparse.Namespace, own: dict[str, Any], access: dict[str, Any]
) -> tuple[Any, list[str], tuple[str, Any]]:
    """The model, its weights that are neither in base nor adapter, and the base with its revision."""
    where = args.model_name_or_path
    config = PeftConfig.from_pretrained(where, **own)
    base = args.base_model_name_or_path or config.base_model_name_or_path
    if not base:
        raise ValueError(f"--model_name_or_path {where} names no base model: give --base_model_name_or_path.")
    revision = None if args.base_model_name_or_path else config.revision
    try:
        model, loading = transformers.AutoModelForImageClassification.from_pretrained(
            base, revision=revision, **access, dtype=torch.float32, output_loading_info=True
        )
    except OSError as error:
        raise ValueError(
            f"--model_name_or_path {where}: its base model {base} cannot be loaded; --base_model_name_or_path says "
            f"where it is. {error}"
        ) from error
    try:
        model = load_complete(model, where, **own)
    except (RuntimeError, ValueError) as error:
        if base == config.base_model_name_or_path:
            raise
        raise ValueError(
            f"--base_model_name_or_path {base}: the adapter was trained on {config.base_model_name_or_path} and does "
            f"not fit. {' '.join(line.strip() for line in str(error).splitlines()[:2])}"
        ) from error
    kinds = ModulesToSaveWrapper | WholeLayer
    copied = tuple(f"{name}." for name, module in model.get_base_model().named_modules() if isinstance(module, kinds))
    missing = [key for key in sorted(loading["missing_keys"]) if not key.startswith(copied)]
    return model, missing, (base, revision)


# ----------------------------------------------------------------------------------------------------------- results


@torch.no_grad()
def logits_of(accelerator: Accelerator, saved: Saved, images: Images, args: argparse.Namespace) -> Tensor:
    """The logits of all samples in order, (N, classes), on every process; ids of `images` are their numbers."""
    loader = DataLoader(
        images, batch_size=args.per_device_eval_batch_size, num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip
    loader = accelerator.prepare(loader)
    model = accelerator.prepare_model(saved.model, evaluation_mode=True).eval()
    found, numbers = [], []
    for batch in tqdm(loader, desc="Predict", leave=False, disable=not Screen.bars):
        rows = batch.pop("labels")
        logits, rows = accelerator.gather_for_metrics((model(**batch, **saved.inputs).logits.float(), rows))
        found.append(logits.cpu())
        numbers.append(rows.cpu())
    logits, order = torch.cat(found), torch.cat(numbers).argsort()
    assert len(order) == len(images)
    if not logits.isfinite().all():
        raise DivergedError("predictions are not finite")
    return logits[order]


def figures(logits: Tensor, labels: list[Any], saved: Saved, top_k: int | None) -> dict[str, Any]:
    """Metrics of labelled samples, and a row of figures for each class."""
    place = {name: number for number, name in enumerate(saved.names)}
    classes = len(saved.names)
    if saved.several:
        truths = torch.tensor([[float(name in row) for name in saved.names] for row in labels])
        given = {"predictions": logits, "references": truths.long()}
        given_out, true = (logits >= 0).numpy(), truths.numpy() > 0
        rows = per_class((given_out & true).sum(0), given_out.sum(0), true.sum(0))
        metrics: list[evaluate.Metric] = [MultilabelF1(keep_in_memory=True)]
        metrics += [MeanAveragePrecision(keep_in_memory=True)] if true.any() else []
        loss = F.binary_cross_entropy_with_logits(logits, truths)
    else:
        ids = torch.tensor([place[row] for row in labels])
        given = {"predictions": logits, "references": ids}
        rows = PerClassScores(classes=classes, keep_in_memory=True).compute(**given)
        metrics = [kind(keep_in_memory=True) for kind in (Accuracy, MeanPerClassAccuracy, MacroF1)]
        if top_k or classes > 5:
            metrics.append(TopKAccuracy(k=min(top_k or 5, classes), keep_in_memory=True))
        loss = F.cross_entropy(logits, ids)
    found: dict[str, Any] = {"samples": len(labels)}
    for metric in metrics:
        found |= metric.compute(**given)
    found["loss"] = loss.item()
    if not saved.several:
        calibration = CalibrationError(keep_in_memory=True)
        found |= calibration.compute(predictions=logits.softmax(-1), references=given["references"])
    found["per_class"] = {
        name: {key: (int if key == "support" else float)(values[number]) for key, values in rows.items()}
        for number, name in enumerate(saved.names)
    }
    if not saved.several:
        found |= ConfusionMatrix(classes=classes, keep_in_memory=True).compute(**given)
    return found


def table_of(found: dict[str, Any], most: int = 30) -> str:
    """The figures of each class and the metrics, as text."""
    shown = list(found["per_class"].items())[:most]
    width = max(len(name) for name, _ in [*shown, ("class", {})])
    lines = [f"{'class':{width}}{'precision':>11}{'recall':>9}{'f1':>9}{'support':>10}"]
    lines += [
        f"{name:{width}}{row['precision']:>11.4f}{row['recall']:>9.4f}{row['f1']:>9.4f}{row['support']:>10,}"
        for name, row in shown
    ]
    if len(found["per_class"]) > most:
        lines.append(f"and {len(found['per_class']) - most} more classes")
    numbers = {name: value for name, value in found.items() if isinstance(value, float)}
    return "\n".join([*lines, ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())])


def predictions_of(logits: Tensor, samples: Samples, saved: Saved) -> list[dict[str, Any]]:
    """A row for each sample: its number, file, label, prediction and probabilities."""
    chances = (logits.sigmoid() if saved.several else logits.softmax(-1)).tolist()
    rows = []
    for number, file, label, values in zip(samples.rows, samples.files, samples.labels, chances, strict=True):
        best = max(range(len(values)), key=values.__getitem__)
        taken = [name for name, value in zip(saved.names, values, strict=True) if value >= 0.5]
        rows.append(
            {
                "row": int(number),
                "file": file,
                "label": label,
                "prediction": taken if saved.several else saved.names[best],
                "probabilities": dict(zip(saved.names, values, strict=True)),
            }
        )
    return rows


def as_csv(rows: list[dict[str, Any]], saved: Saved) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "file", "label", "prediction", *(f"probability of {name}" for name in saved.names)])
    for row in rows:
        cells = [row["row"], row["file"], row["label"], row["prediction"]]
        cells = [";".join(cell) if isinstance(cell, list) else cell for cell in cells]
        writer.writerow([*cells, *(f"{value:.6f}" for value in row["probabilities"].values())])
    return text.getvalue()


def run_prediction(accelerator: Accelerator, args: argparse.Namespace) -> tuple[Saved, list[dict[str, Any]], dict]:
    """The model, a row for each sample, and the figures of the labelled ones, on every process."""
    saved = load_saved(args)
    samples = read_samples(accelerator, args, saved.names, saved.several)
    images = Images(samples.data, np.arange(len(samples.data)), "test", saved.processor, args)
    logits = logits_of(accelerator, saved, images, args)
    rows = predictions_of(logits, samples, saved)
    labelled = [number for number, label in enumerate(samples.labels) if label is not None]
    found: dict[str, Any] = {}
    if labelled:
        found = figures(logits[labelled], [samples.labels[number] for number in labelled], saved, args.top_k)
    return saved, rows, found


def predict(args: argparse.Namespace) -> dict[str, Any]:
    """Predict, evaluate if there are labels, and write both; return the content of `evaluation.json`."""
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    Screen(accelerator, progress_kind(args.progress))
    if accelerator.is_main_process:
        make(args.output_dir)
    saved, rows, found = run_prediction(accelerator, args)
    if accelerator.is_main_process:
        for name in WRITTEN:
            (args.output_dir / name).unlink(missing_ok=True)
        write_aside(args.output_dir / "predictions.csv", as_csv(rows, saved))
        content = {"classes": saved.names, "predictions": rows}
        write_aside(args.output_dir / "predictions.json", json.dumps(content, indent=1, ensure_ascii=False))
        if found:
            found["classes"] = saved.names
            write_aside(args.output_dir / "evaluation.json", json.dumps(found, indent=1, ensure_ascii=False))
            accelerator.print(table_of(found))
        labelled = sum(row["label"] is not None for row in rows)
        accelerator.print(f"{len(rows)} predictions, {labelled} of labelled samples, are in {args.output_dir}.")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return found
