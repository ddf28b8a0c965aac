"""Sensitivity-aware tuning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...backbones.backbone import VisionBackbone, unwrapped
from ...core.calibration import Calibration
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import LinearSite, Placement, WeightSite, as_matrix
from ...training.defaults import Training
from .deltas import summed_gradients
from .spt_parts import LORA, WHOLE, SPTEntries, SPTLoRA, largest, named_modules, tensors_of


SHARE = 0.005  # fraction of the entries, if the budget is not given
BATCHES = 16  # as in the authors' code


@register(
    name="spt",
    paper=Paper("Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning", "ICCV 2023", "2303.08566"),
    summary="the most sensitive entries, or low-rank updates",
    visual_tuning="parameter: weight and bias",
    equation="W + dW: dW = B A where many entries of W are sensitive, else non-zero at those that are",
    counts=(({}, 0),),  # before calibration; afterwards it depends on the budget and the data
    mergeable=True,
    identity_at_start=True,
    calibrated=True,
    training=Training(3e-3),
)
@dataclass
class SPTConfig(VisualPeftConfig):
    """Config of sensitivity-aware tuning (SPT-LoRA), arXiv 2303.08566.

    The entries of the backbone's linears and norms are ranked by sensitivity: the squared gradient of the cross
    entropy, summed over batches. So the model needs a head. `budget` entries are chosen. A matrix with so many chosen
    entries that a low-rank update costs at most alpha times as much gets that update; else its chosen entries train.
    All entries of a vector train if at least one in beta is chosen; else only the chosen ones. The choice is part of
    the config, which is complete after `calibrate`; the indices of the entries are saved with the weights.

    The authors search for the budget whose trained parameters come closest to a given size; here the budget is the
    number of chosen entries. They measure in training mode; here dropout and stochastic depth are off. Their code does
    not train the chosen entries of a norm that does not train as a whole; here these train. There, queries, keys and
    values share one dropout mask and CLS trains; here each has its own mask and CLS is frozen. SPT-Adapter is not
    implemented.

    Args:
        budget: number of chosen entries; by default 0.5% of all. The authors tune it per task.
        r: rank of the low-rank updates.
        alpha: a matrix gets a low-rank update if at least (parameters of the update) / alpha of its entries are
            chosen.
        beta: a vector trains as a whole if at least (its length) / beta of its entries are chosen.
        dropout: probability, on a low-rank update's input, except at the attention's output
            projection.
        drop_path: rate of the stochastic depth of each low-rank update.
        chosen: what trains, set by `calibrate`. Keys are names of weights and biases, such as `"0.query.weight"` (a
            block and a role) or `"norms.0.bias"`; values are a number of entries, `"lora"` or `"whole"`.
    """

    budget: int | None = field(default=None, metadata={"help": "Number of chosen entries; by default 0.5% of all."})
    r: int = field(default=8, metadata={"help": "Rank of the low-rank updates."})
    alpha: float = field(default=10.0, metadata={"help": "Low-rank update from its parameters / alpha entries on."})
    beta: float = field(default=5.0, metadata={"help": "A vector trains as a whole from length / beta entries on."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability on the input."})
    drop_path: float = field(default=0.1, metadata={"help": "Rate of each low-rank update's stochastic depth."})
    chosen: dict[str, int | str] | None = field(default=None, metadata={"help": "What trains; set by calibrate."})

    per_stage: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            self._require_integer("budget", 1)
        self._require_integer("r", 1)
        for name in ("alpha", "beta"):
            self._require_number(name)
            if getattr(self, name) <= 0:
                self._fail(name, "a finite number above 0")
        for name in ("dropout", "drop_path"):
            self._require_number(name, 0.0, below=1.0)
        if self.chosen is not None and (not isinstance(self.chosen, dict) or not self.chosen):
            self._fail("chosen", "None or a dictionary that is not empty")

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """At every linear and norm; those that are not chosen have no weights."""
        if backbone.linears:
            self._require_integer("r", 1, backbone.width, "the backbone's width")
        modules = named_modules(backbone)
        if self.chosen is None and not self.init_weights:  # a small choice of random entries
            self.chosen = {}
            some = {"value": LORA, "fc2": LORA, "fc1": 4, "norm1": WHOLE, "operations": 4, "further_norms": WHOLE}
            for block in backbone.blocks:
                names = {f"{block.index}.{role}": kind for role, kind in some.items()}
                self.chosen |= {f"{name}.weight": kind for name, kind in names.items() if name in modules}  # type: ignore[misc]
        for key in self.chosen or ():
            if key.rpartition(".")[0] not in modules or key.rpartition(".")[2] not in ("weight", "bias"):
                raise ValueError(
                    f"{type(self).__name__}.chosen has {key!r}: must be weights or biases of {', '.join(modules)} of "
                    "this model."
                )
        for name, path in modules.items():
            yield Placement(path, "entries", WeightSite(), partial(SPTEntries, name=name, chosen=self.chosen))
            if path in backbone.linears:
                dropout = 0.0 if name.endswith(".output") else self.dropout
                structured = (self.chosen or {}).get(f"{name}.weight") == LORA
                build = partial(SPTLoRA, r=self.r, dropout=dropout, drop_path=self.drop_path, structured=structured)
                yield Placement(path, "lora", LinearSite(), build)

    def choose(self, calibration: Calibration) -> None:
        """Choose the entries with the largest sensitivity.

        Raises:
            ValueError: there is no head, no entry is sensitive, or the budget is larger than the number of entries.
        """
        entries = dict(calibration.equations("entries"))
        tensors, modules = {}, {}
        for path, part in entries.items():
            module = unwrapped(calibration.model.get_submodule(path))
            for kind, tensor in tensors_of(module).items():
                tensors[part.sizes[kind][1]], modules[part.sizes[kind][1]] = tensor, module
        total = sum(tensor.numel() for tensor in tensors.values())
        budget = max(1, round(SHARE * total)) if self.budget is None else self.budget
        if budget > total:
            self._fail("budget", f"at most the {total} entries of the linears and norms of this model")
        sensitivity = self._sensitivity(calibration, tensors)
        matrices = (as_matrix(module, found) for module, found in zip(modules.values(), sensitivity, strict=True))
        best, indices = largest(matrices, budget)
        if not best.isfinite().all() or not best.any():
            raise ValueError("SPT: no gradient of the loss is finite and non-zero. Is the head's weight zero?")
        found = dict(zip(tensors, indices, strict=True))
        chosen = {key: self._choice(tensors[key], len(where)) for key, where in found.items() if len(where)}
        loras = dict(calibration.equations("lora"))
        dtype = next(p.dtype for parts in (entries, loras) for e in parts.values() for p in e.parameters())
        for path, part in entries.items():
            like = torch.empty(0, dtype=dtype, device=tensors[part.sizes["weight"][1]].device)
            part.decide(chosen, like)
            for kind, (_, key) in part.sizes.items():
                if isinstance(chosen.get(key), int):
                    getattr(part, kind).entries.choose(found[key])
            if path in loras:
                loras[path].decide(chosen.get(part.sizes["weight"][1]) == LORA, like)
            layer = calibration.layers[path]
            if calibration.adapter not in layer.active_adapters:
                layer.set_requires_grad(calibration.adapter, requires_grad=False)
        self.chosen = chosen

    def _choice(self, tensor: Tensor, count: int) -> int | str:
        if tensor.ndim == 1:
            return WHOLE if count >= len(tensor) / self.beta else count
        matrix = tensor.ndim == 2 or tensor.shape[2:].numel() == 1
        return LORA if matrix and count >= self.r * sum(tensor.shape[:2]) / self.alpha else count

    def _sensitivity(self, calibration: Calibration, tensors: Mapping[str, nn.Parameter]) -> list[Tensor]:
        with summed_gradients(list(tensors.values()), of=torch.square) as sums:
            for batch in calibration.batches(default_max=BATCHES):
                calibration.loss(batch, "SPT measures sensitivity").backward()
        return [sums[tensor] for tensor in tensors.values()]
