"""Figures of every method, computed in plain torch: `python tests/reference_vectors.py` writes reference_vectors.json.

Of the library it takes names and shapes of weights, no number. Written anew only where a method's arithmetic was found
to be another than its authors', or its weights get other names or shapes.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from reference_backbone import (
    CLASSES,
    DEPTH,
    HEADS,
    HIDDEN,
    PATCH,
    ROLES,
    SIZE,
    WIDTH,
    Vit,
    Weights,
    backbone_weights,
    checksum,
    images,
    loss_of,
    numbers,
)
from reference_choices import LABELS
from reference_table import METHODS
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_visual_peft import calibrate, find_backbone, get_method


PATH = Path(__file__).with_suffix(".json")


def roles_of(model: nn.Module) -> dict[str, str]:
    """The modules of a transformers model by what they are called here."""
    backbone = find_backbone(model)
    (patch,), (norm,), (head,) = backbone.patch_embedding, backbone.final_norms, backbone.heads
    roles = {patch: "patch", norm: "norm", head: "head", backbone.path: "images"}
    for block in backbone.blocks:
        roles[block.path] = str(block.index)
        roles |= {block.roles[role][0]: f"{block.index}.{role}" for role in ("norm1", "norm2", *ROLES)}
    return roles


def base_model() -> ViTForImageClassification:
    """transformers' model with the weights of the plain one."""
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=HIDDEN,
        image_size=SIZE,
        patch_size=PATCH,
        num_labels=CLASSES,
    )
    model, weights = ViTForImageClassification(config).eval(), backbone_weights()
    with torch.no_grad():
        for path, role in roles_of(model).items():
            module = model.get_submodule(path)
            for kind in ("weight", "bias"):
                if f"{role}.{kind}" in weights:
                    getattr(module, kind).copy_(weights.pop(f"{role}.{kind}"))
        embeddings = model.get_submodule(find_backbone(model).embeddings[0])
        embeddings.cls_token.copy_(weights.pop("cls"))
        embeddings.position_embeddings.copy_(weights.pop("position"))
    assert not weights
    return model


def method_of(name: str) -> str:
    """The method of an entry of the table."""
    return name.partition("-")[0]


def adapted(name: str) -> PeftModel:
    """The model with a fresh adapter, which has chosen if it chooses."""
    torch.manual_seed(0)
    reference = METHODS[name]
    config_cls = get_method(method_of(name)).config_cls
    model = get_peft_model(base_model(), config_cls(**reference.fields)).eval()
    if reference.chooses:
        batch = {"pixel_values": images(len(LABELS)), "labels": torch.tensor(LABELS)}
        calibrate(model, [batch], progress=False)
    return model


def adapter_of(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters by the names that the plain arithmetic has."""
    roles, name = roles_of(base_model()), method_of(name)
    inside = {path.partition(".")[2].partition(".")[2].partition(".")[2]: role for path, role in roles.items()}
    found = {}
    for full, parameter in model.named_parameters():
        head, method, tail = full.removeprefix("base_model.model.").partition(f".{name}_")
        if not method:
            continue
        head = roles[head.replace(".base_layer", "").removesuffix(".adapters")]
        head = head.partition(".")[0] if name == "hst" else head  # whose norms are told apart by their slots
        tail = tail.replace(".default.", ".")
        if name == "partial" and head.isdigit():  # a copy of a block, whose modules have roles, too
            path, _, kind = tail.removeprefix("copy.").rpartition(".")
            tail = f"copy.{inside[path].partition('.')[2]}.{kind}"
        found[f"{head}.{name}_{tail}"] = parameter
    return found


def figures(name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """A method's vector: logits in evaluation and in training, and a checksum of the gradients in training."""
    reference = METHODS[name]

    def logits(training: bool) -> tuple[torch.Tensor, Weights]:
        weights = Weights({key: numbers(key, shape).requires_grad_() for key, shape in shapes.items()})
        vit = Vit(training, reference.frames, reference.early)
        return reference.logits(vit, weights), weights

    evaluation, _ = logits(training=False)
    training, weights = logits(training=True)
    gradients = torch.autograd.grad(loss_of(training), list(weights.values()), allow_unused=True)
    total, size = checksum(weights, dict(zip(weights, gradients, strict=True)))
    return {
        "source": reference.source,
        "fields": reference.fields,
        "weights": sum(torch.Size(shape).numel() for shape in shapes.values()),
        "evaluation": rounded(evaluation),
        "training": rounded(training),
        "gradients": [float(f"{total:.7g}"), float(f"{size:.7g}")],
    }


def rounded(logits: torch.Tensor) -> list[list[float]]:
    return [[float(f"{value:.7g}") for value in row] for row in logits.tolist()]


def base_figures() -> dict[str, list[list[float]]]:
    """What the model gives without an adapter: of images, and of videos whose frames become one in two places."""
    kinds = {"images": (1, False), "frames": (2, False), "frames before the norm": (2, True)}
    with torch.no_grad():
        return {kind: rounded(Vit(False, *how).logits()) for kind, how in kinds.items()}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = [f'"base": {json.dumps(base_figures())}']
    for name in METHODS:
        shapes = {key: tuple(parameter.shape) for key, parameter in adapter_of(adapted(name), name).items()}
        lines.append(f'"{name}": {json.dumps(figures(name, shapes))}')
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(METHODS)} methods: {PATH}", file=sys.stderr)


if __name__ == "__main__":
    main()
