"""Label maps: which classes of a frozen head stand for the classes of other data.

    import hf_visual_peft
    from hf_visual_peft.core.label_maps import frequent_label_map

    found = frequent_label_map(model, dataloader, num_classes=10)
    model = get_peft_model(model, hf_visual_peft.ILMVPConfig(label_map=found))

`IterativeLabelMap` finds the map again in every epoch of a `Trainer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from ..backbones.finding import find_backbone
from ..backbones.modes import in_eval_mode
from .calibration import Calibration
from .outcome import logits_of


LabelMapping = list[list[int]]


class LabelMap(nn.Module):
    """Logits of other classes, each the mean of those of some classes of the head. It has no parameters.

        z_j = mean of y_i over the source classes i of j

    Args:
        sources: for each class, the head's classes that stand for it; equally many for all.
    """

    def __init__(self, sources: LabelMapping) -> None:
        super().__init__()
        self.sources = sources  # no buffer, as the config has them
        self.passes = False  # whether logits pass unchanged

    def forward(self, logits: Tensor) -> Tensor:
        """Map (samples, ..., source classes) to (samples, ..., classes)."""
        if self.passes:
            return logits
        return logits[..., torch.tensor(self.sources, device=logits.device)].mean(dim=-1)


def random_label_map(source_classes: int, num_classes: int, per_class: int = 1, seed: int = 0) -> LabelMapping:
    """Source classes drawn at random, each at most once.

    Args:
        source_classes: number of classes of the head.
        num_classes: number of classes of the data.
        per_class: source classes for each of them.
        seed: of the draw; the global random state stays as it is.

    Raises:
        ValueError: the head has too few classes.
    """
    _require_enough(source_classes, num_classes, per_class)
    order = torch.randperm(source_classes, generator=torch.Generator().manual_seed(seed))
    return order[: num_classes * per_class].view(num_classes, per_class).tolist()


def frequent_label_map(
    model: Any,
    dataloader: Iterable[Mapping[str, Any]],
    num_classes: int,
    per_class: int = 1,
    max_batches: int | None = None,
    progress: bool = False,
) -> LabelMapping:
    """For each class the source classes that the model predicts most often for its images.

    The pair with the highest count goes first; no source class stands for two. Ties go to the lowest index, and so do
    classes without images. A prompt that is active acts, so that the map can be found again while it trains.

    Args:
        model: with a head; a `PeftModel` or not.
        dataloader: gives mappings with `pixel_values` and `labels`. In a distributed run give every process the same.
        num_classes: number of classes of the data.
        per_class: source classes for each of them.
        max_batches: most batches to read; None for all.
        progress: whether to show a bar.

    Raises:
        ValueError: the head has too few classes, or the data or the logits are invalid.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    reader = Calibration(base, find_backbone(base), "", {}, max_batches, dataloader, progress)
    counts: Tensor | None = None
    with _own_logits(base), torch.no_grad():
        for batch in reader.batches():
            labels = batch.pop("labels")
            logits = logits_of(reader.output(batch))
            if logits is None or logits.shape[:-1] != labels.shape or not logits.isfinite().all():
                raise ValueError(f"{type(base).__name__} does not return finite (batch, classes) logits.")
            if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
                raise ValueError(f"dataloader: labels must be from 0 to {num_classes - 1} (num_classes).")
            if counts is None:
                _require_enough(logits.shape[-1], num_classes, per_class)
                counts = torch.zeros(logits.shape[-1], num_classes, dtype=torch.long)
            pairs = torch.stack([logits.argmax(dim=-1), labels]).cpu()
            counts.index_put_(tuple(pairs), torch.ones(len(labels), dtype=torch.long), accumulate=True)
    assert counts is not None  # else there was no batch
    return assign(counts, per_class)


def semantic_label_map(source_names: Tensor, names: Tensor, per_class: int = 1) -> LabelMapping:
    """For each class the source classes whose names mean the most similar, by embeddings of a text encoder.

    Classes take turns, each with its most similar source class that is still free.

    Args:
        source_names: embeddings of the names of the head's classes, (source classes, channels).
        names: embeddings of the names of the data's classes, (classes, channels).
        per_class: source classes for each of them.

    Raises:
        ValueError: the shapes do not fit, or the head has too few classes.
    """
    if source_names.ndim != 2 or names.ndim != 2 or source_names.shape[1] != names.shape[1]:
        raise ValueError(
            f"Embeddings have shapes {tuple(source_names.shape)} and {tuple(names.shape)}: must be (source classes, "
            "channels) and (classes, channels)."
        )
    _require_enough(len(source_names), len(names), per_class)
    similar = F.normalize(names.float(), dim=-1) @ F.normalize(source_names.float(), dim=-1).T
    found: LabelMapping = [[] for _ in names]
    for _ in range(per_class):
        for index, sources in enumerate(found):
            best = int(similar[index].argmax())
            similar[:, best] = -torch.inf
            sources.append(best)
    return found


def assign(counts: Tensor, per_class: int = 1) -> LabelMapping:
    """Pairs of source classes and classes, the highest count first; each source class stands for at most one.

    Args:
        counts: (source classes, classes), how often the one is predicted for the other.
        per_class: source classes for each class.
    """
    left = counts.clone()
    found: LabelMapping = [[] for _ in range(counts.shape[1])]
    for _ in range(counts.shape[1] * per_class):
        source, index = divmod(int(left.flatten().argmax()), counts.shape[1])
        found[index].append(source)
        left[source] = -1
        if len(found[index]) == per_class:
            left[:, index] = -1
    return found


def set_label_map(model: Any, label_map: LabelMapping, adapter_name: str = "default") -> None:
    """Give an adapter with a label map another one, of as many classes; it is saved with its config.

    Args:
        model: with the adapter.
        label_map: for each class, the head's classes that stand for it.
        adapter_name: of the adapter.

    Raises:
        ValueError: the adapter has no label map, or one of another number of classes.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    classes = getattr(config, "output_classes", None)
    if config is None or classes is None:
        raise ValueError(f"adapter_name is {adapter_name!r}: that adapter has no label map. Give its config one.")
    if len(label_map) != classes:
        raise ValueError(f"label_map has {len(label_map)} classes, and the adapter {adapter_name!r} has {classes}.")
    rows = [each if isinstance(each, list) else [each] for each in label_map]
    for path, module in _maps(model):
        if path.rpartition(".")[2] == adapter_name:
            module.sources = rows
    config.label_map = rows


class IterativeLabelMap(TrainerCallback):
    """Finds the label map of an adapter again at the start of every epoch, with the current prompt.

    Args:
        dataloader: gives mappings with `pixel_values` and `labels`.
        per_class: source classes for each class.
        adapter_name: of the adapter.
        max_batches: most batches to read; None for all.
    """

    def __init__(
        self,
        dataloader: Iterable[Mapping[str, Any]],
        per_class: int = 1,
        adapter_name: str = "default",
        max_batches: int | None = None,
    ) -> None:
        self.dataloader, self.per_class = dataloader, per_class
        self.adapter_name, self.max_batches = adapter_name, max_batches

    def on_epoch_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Find it."""
        classes = model.peft_config[self.adapter_name].output_classes or 0
        found = frequent_label_map(model, self.dataloader, classes, self.per_class, self.max_batches)
        set_label_map(model, found, self.adapter_name)


def _maps(model: nn.Module) -> Iterator[tuple[str, LabelMap]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, LabelMap))


@contextmanager
def _own_logits(model: nn.Module) -> Iterator[None]:
    """Let the head's own logits pass inside the context, in eval mode."""
    maps = [module for _, module in _maps(model)]
    for each in maps:
        each.passes = True
    try:
        with in_eval_mode(model):
            yield
    finally:
        for each in maps:
            each.passes = False


def _require_enough(source_classes: int, num_classes: int, per_class: int) -> None:
    if num_classes < 1 or per_class < 1:
        raise ValueError(f"num_classes is {num_classes}, per_class {per_class}: both must be at least 1.")
    if num_classes * per_class > source_classes:
        raise ValueError(
            f"num_classes is {num_classes} and per_class {per_class}: the head has only {source_classes} classes, and "
            "each stands for at most one. Train a head instead."
        )
