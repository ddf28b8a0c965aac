"""CLIP-LoRA, as settings of peft's LoRA."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig


CLIP_LORA: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 1,
    "use_rslora": True,
    "lora_dropout": 0.25,
    "target_modules": ["q_proj", "k_proj", "v_proj"],
}


def clip_lora(**fields: Any) -> LoraConfig:
    """LoRA as in CLIP-LoRA (arXiv 2405.18541): rank 2 on queries, keys and values of both towers.

    184,320 parameters on CLIP ViT-B/16. The scale is alpha / sqrt(r); the input of the down projection has dropout.
    The authors train with AdamW at 2e-4, weight decay 0.01 and a cosine for 500 steps an image of a class.

    Args:
        fields: of `LoraConfig`, instead of these; `target_modules` for text towers with other names, such as BERT's
            `["query", "key", "value"]`.
    """
    return LoraConfig(**{**CLIP_LORA, **fields})
