"""The demonstration of class names: `hf-visual-peft demo --task zero-shot`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ..language.classifier import ZeroShotClassifier
from ..language.config import LanguageConfig
from ..language.methods.coop import CoOpConfig
from ..language.methods.kgcoop import KgCoOpConfig
from ..language.methods.lp_plus_plus import LPPlusPlusConfig
from ..language.methods.proker import ProKeRConfig
from ..language.methods.taskres import TaskResConfig
from ..language.support import SupportConfig, fit
from ..sharing.files import write_aside
from ..tables import format_table
from .dual_encoder import DESCRIPTION, align, find_text_tower, load_towers, pooled_images, pooled_texts
from .emoji import SETS, Emoji, load_emoji
from .weights import cache_folder, demo_checkpoint


TEMPLATE = "an emoji of a {}."
SIZE, LEARNED = 56, 600  # pixels; names to align on, the others are unseen
CLASSES = 80  # of the unseen ones, for base and new
HEADS: tuple[LanguageConfig, ...] = (ProKeRConfig(), LPPlusPlusConfig(), TaskResConfig())
PROMPTS: tuple[LanguageConfig, ...] = (CoOpConfig(init_text="an emoji of a"), KgCoOpConfig(init_text="an emoji of a"))
IGNORED = ("json", "emoji_dir", "seed", "output_dir", "task", "traceback", "command")


def check(arguments: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Refuse flags of the other task.

    Raises:
        ValueError: one is given.
    """
    wrong = [name for name, value in vars(arguments).items() if name not in IGNORED and value != vars(defaults)[name]]
    if wrong:
        flags = ", ".join(f"--{name}" for name in wrong)
        raise ValueError(f"{flags}: not for --task zero-shot, which has its own images, model and methods. Remove it.")


class Encoded:
    """Features of all pictures, and a classifier whose names change.

    Args:
        classifier: of any names.
        names: of the emoji.
        features: of pictures, (sets, names, width).
    """

    def __init__(self, classifier: ZeroShotClassifier, names: Sequence[str], features: Tensor) -> None:
        self.classifier, self.names, self.features = classifier, list(names), features

    def take(self, rows: Sequence[int]) -> None:
        """Make some names the classes."""
        self.classifier.set_class_names([self.names[row] for row in rows])

    def batch(self, rows: Sequence[int], sets: Sequence[int]) -> dict[str, Tensor]:
        """The pictures of some names in some sets."""
        features = self.features[list(sets)][:, list(rows)].flatten(0, 1)
        return {"image_features": features, "labels": torch.arange(len(rows)).repeat(len(sets))}

    @torch.no_grad()
    def accuracy(self, model: Any, batch: dict[str, Tensor]) -> float:
        """The fraction that a model names rightly."""
        logits = model(image_features=batch["image_features"]).logits
        return (logits.argmax(-1) == batch["labels"]).double().mean().item()


def adapt(encoded: Encoded, config: PeftConfig, batch: dict[str, Tensor], steps: int, rate: float) -> Any:
    """A model that learned from a batch: by `fit`, and by steps of Adam if something trains.

    It stays in evaluation mode, without dropout, so that features of texts are kept.
    """
    model = get_peft_model(encoded.classifier, config)
    if isinstance(config, SupportConfig):
        fit(model, [batch])
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=rate) if weights and not isinstance(config, SupportConfig) else None
    for _ in range(steps if optimizer else 0):
        assert optimizer is not None
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def heads_table(encoded: Encoded, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Zero-shot classification and three heads on unseen names; a set of drawings is a shot, another the test."""
    sets = len(encoded.features)
    encoded.take(rows)
    found: list[dict[str, Any]] = []
    tests = [encoded.batch(rows, [held]) for held in range(sets)]
    accuracy = [encoded.accuracy(encoded.classifier, test) for test in tests]
    found.append({"method": "zero-shot", "shots": 0, "accuracy": float(np.mean(accuracy))})
    for config in HEADS:
        for shots in range(1, sets):
            accuracy = []
            for held in range(sets):
                others = [index for index in range(sets) if index != held][:shots]
                torch.manual_seed(0)
                model = adapt(encoded, config, encoded.batch(rows, others), steps=100, rate=2e-3)
                accuracy.append(encoded.accuracy(model, tests[held]))
                model.unload()
            name = type(config).__name__.removesuffix("Config")
            found.append({"method": name, "shots": shots, "accuracy": float(np.mean(accuracy))})
    return found


def prompts_table(encoded: Encoded, rows: Sequence[int], seed: int, steps: int = 60) -> list[dict[str, Any]]:
    """Zero-shot classification, CoOp and KgCoOp: trained on the first half of some names, tested on both halves."""
    half = len(rows) // 2
    parts = {"base": rows[:half], "new": rows[half:]}
    train, test = (0, 1), (2, 3)  # sets
    found = []
    for config in (None, *PROMPTS):
        encoded.take(parts["base"])
        model: Any = encoded.classifier
        if config is not None:
            torch.manual_seed(seed)
            model = adapt(encoded, config, encoded.batch(parts["base"], train), steps, rate=2e-3)
        row: dict[str, Any] = {
            "method": "zero-shot" if config is None else type(config).__name__.removesuffix("Config"),
            "shots": 0 if config is None else len(train),
        }
        for part, names in parts.items():
            encoded.take(names)
            row[part] = encoded.accuracy(model, encoded.batch(names, test))
        row["harmonic_mean"] = 2 * row["base"] * row["new"] / max(row["base"] + row["new"], 1e-9)
        found.append(row)
        if config is not None:
            encoded.take(parts["base"])
            model.unload()
    return found


def encode(emoji: Emoji, folder: Path, seed: int) -> tuple[Encoded, list[int], list[int]]:
    """Align the towers on some names; return features of all pictures, and the learned and the unseen names."""
    model, tokenizer = load_towers(demo_checkpoint(), find_text_tower(), SIZE)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = []
    for each in SETS:
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in emoji.pictures[each.name]]))
        images.append(pooled_images(model, ((pixels / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()))
    texts = pooled_texts(model, tokenizer, [TEMPLATE.replace("{}", name) for name in emoji.names])
    order = np.random.default_rng(seed).permutation(len(emoji.names)).tolist()
    learned, unseen = order[:LEARNED], order[LEARNED:]
    pooled = torch.stack(images)
    align(model, pooled[:, learned], texts[learned], seed)
    checkpoint = folder / f"emoji-dual-encoder-{seed}"
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    classifier = ZeroShotClassifier.from_pretrained(str(checkpoint), class_names=emoji.names[:2], templates=TEMPLATE)
    with torch.no_grad():
        features = classifier.encoder.visual_projection(pooled)
    return Encoded(classifier, emoji.names, features), learned, unseen


def run_zero_shot(arguments: argparse.Namespace) -> int:
    """Run the demonstration and print its tables.

    Returns:
        The exit status.
    """
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()
    folder = arguments.output_dir
    find_text_tower()  # what is missing is said before anything is downloaded
    emoji = load_emoji(arguments.emoji_dir or cache_folder() / "emoji", SIZE)
    print(f"Model:  {DESCRIPTION}")
    sets = ", ".join(f"{each.name} ({each.licence})" for each in SETS)
    print(f"Images: {len(emoji.names)} emoji of the sets {sets}, {SIZE} px", flush=True)
    encoded, learned, unseen = encode(emoji, folder, arguments.seed)
    print(f"Aligned on {len(learned)} names; the {len(unseen)} others are unseen. Chance is {1 / len(unseen):.1%}.")
    heads = heads_table(encoded, unseen)
    prompts = prompts_table(encoded, unseen[:CLASSES], arguments.seed)
    figures = ("accuracy", "base", "new", "harmonic_mean")
    header = ["method", "shots", "unseen names", "base", "new", "harmonic mean"]
    cells = [
        [row["method"], str(row["shots"]), *(f"{row[name]:.1%}" if name in row else "-" for name in figures)]
        for row in (*heads, *prompts)
    ]
    print(f"\n{format_table(header, cells, right=header[1:])}\n")
    print(
        "A shot is one drawing of each name; accuracy is on the drawings of another set, the mean over the four. Base "
        f"and new: {CLASSES // 2} names each, two sets to train on, two to test. Settings are fixed, the last step "
        f"counts. Seed {arguments.seed}, {time.perf_counter() - started:.0f} seconds. Checkpoint: "
        f"{folder / f'emoji-dual-encoder-{arguments.seed}'}",
        flush=True,
    )
    if arguments.json is not None:
        content = {"model": DESCRIPTION, "seed": arguments.seed, "rows": [*heads, *prompts]}
        write_aside(arguments.json, json.dumps(content, indent=2) + "\n")
    return 0
