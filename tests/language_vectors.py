"""Figures of every method for class texts in plain torch: `python tests/language_vectors.py` writes the JSON beside.

Of the library it takes names and shapes of weights, no number. Written anew only where a method's arithmetic was found
to be another than its authors', or its weights get other names or shapes.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from dual_encoders import classifier, saved
from language_reference import LABELS, METHODS, NAMES, SCALE, SUPPORT, Clip, pixels
from peft import PeftModel, get_peft_model
from reference_backbone import Weights, checksum, numbers
from torch import nn

import hf_visual_peft
from hf_visual_peft.language.support import SupportEquation


PATH = Path(__file__).with_suffix(".json")


def value_of(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight by the formula."""
    plain = name.replace("/", ".")
    return torch.tensor(SCALE) if plain.endswith("logit_scale") else numbers(plain, shape)


def base_of(folder: str) -> hf_visual_peft.ZeroShotClassifier:
    """The library's classifier around transformers' CLIP with weights by the formula."""
    base = classifier(folder, NAMES)
    with torch.no_grad():
        for name, parameter in base.encoder.named_parameters():
            parameter.copy_(value_of(name, tuple(parameter.shape)))
    return base


def clip_of(base: hf_visual_peft.ZeroShotClassifier) -> Clip:
    """The plain one, which takes names and shapes."""
    return Clip(Weights({name: value_of(name, tuple(p.shape)) for name, p in base.encoder.named_parameters()}))


def adapted(base: hf_visual_peft.ZeroShotClassifier, name: str) -> tuple[PeftModel, dict[str, nn.Parameter]]:
    """A model with an adapter whose weights are by the formula, and these."""
    fields = copy.deepcopy(METHODS[name].fields)
    model = get_peft_model(base, hf_visual_peft.list_language_methods()[name].config_cls(**fields)).eval()
    equation = model.base_model.model.adapters.active()
    if isinstance(equation, SupportEquation):
        hf_visual_peft.fit(model, [{"pixel_values": pixels("support", len(SUPPORT)), "labels": SUPPORT}])
    weights = {key: parameter for key, parameter in equation.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for key, parameter in weights.items():
            parameter.copy_(value_of(f"{name} {key}", tuple(parameter.shape)))
    return model, weights


def figures(name: str, clip: Clip, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """A method's vector: logits, loss, and a checksum of the gradients."""
    reference = METHODS[name]
    weights = Weights({key: value_of(f"{name} {key}", shape).requires_grad_() for key, shape in shapes.items()})
    found = reference.result(clip, pixels("images", len(LABELS)), weights)
    gradients = found.gradients
    if gradients is None and weights:
        values = torch.autograd.grad(found.loss, list(weights.values()))
        gradients = dict(zip(weights, values, strict=True))
    total, size = checksum(weights, gradients or {})
    return {
        "source": reference.source,
        "fields": reference.fields,
        "weights": sum(torch.Size(shape).numel() for shape in shapes.values()),
        "logits": [[float(f"{value:.7g}") for value in row] for row in found.logits.tolist()],
        "loss": float(f"{found.loss.item():.7g}"),
        "gradients": [float(f"{total:.7g}"), float(f"{size:.7g}")],
    }


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        saved("clip", folder)
        lines = []
        for name in METHODS:
            base = base_of(folder)
            clip = clip_of(base)
            shapes = {key: tuple(parameter.shape) for key, parameter in adapted(base, name)[1].items()}
            lines.append(f'"{name}": {json.dumps(figures(name, clip, shapes))}')
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
