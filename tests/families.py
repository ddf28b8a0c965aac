"""Tiny random models of every family of plain vision transformers, with inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from hf_visual_peft import find_backbone
from hf_visual_peft.sites import VisualTunerLayer


SIZE, PATCH, WIDTH, DEPTH = 32, 8, 16, 3
_COMMON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIZE,
    "patch_size": PATCH,
}


@dataclass(frozen=True)
class Family:
    """One family: its model with the usual head, its bare backbone, and inputs for both."""

    name: str
    classifier: Callable[[], nn.Module] | None
    backbone: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    prefix: int
    patches: int = (SIZE // PATCH) ** 2
    before_norms: bool = False  # where frames of videos meet in models that are not adapted

    def model(self) -> nn.Module:
        """With its head where the family has one; the same weights every time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return liven((self.classifier or self.backbone)())


def liven(model: nn.Module) -> nn.Module:
    """Move every weight off its initial value, so that nothing is hidden by zeros, ones or tiny layer scales."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def images(batch: int, height: int = SIZE, width: int = SIZE) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))}


def _masked(batch: int) -> dict[str, Tensor]:
    noise = torch.rand(batch, (SIZE // PATCH) ** 2, generator=torch.Generator().manual_seed(batch))
    return images(batch) | {"noise": noise}


def _naflex(batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    shapes = torch.tensor([[4, 4] if index % 2 == 0 else [3, 5] for index in range(batch)])
    mask = (torch.arange(16) < shapes.prod(1, keepdim=True)).long()
    pixels = torch.randn(batch, 16, 3 * PATCH * PATCH, generator=generator)
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _family(name, classifier, backbone, config, prefix=1, inputs=images, **kwargs) -> Family:
    def bare():
        whole = config()
        return backbone(getattr(whole, "vision_config", whole))

    return Family(name, classifier and (lambda: classifier(config())), bare, inputs, prefix, **kwargs)


def _two_towers(config_cls, vision=None):
    vision = vision or _COMMON
    text = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return config_cls(vision_config=vision, text_config=text | tokens, num_labels=3)


_SIGLIP2 = {key: value for key, value in _COMMON.items() if key != "image_size"} | {"num_patches": 16}
_LABELS = {"num_labels": 3}
_MOVING = {"drop_path_rate": 0.0}

FAMILIES = {
    family.name: family
    for family in (
        _family("vit", tf.ViTForImageClassification, tf.ViTModel, lambda: tf.ViTConfig(**_COMMON, **_LABELS)),
        _family("deit", tf.DeiTForImageClassification, tf.DeiTModel, lambda: tf.DeiTConfig(**_COMMON, **_LABELS), 2),
        _family(
            "deit_teacher",
            tf.DeiTForImageClassificationWithTeacher,
            tf.DeiTModel,
            lambda: tf.DeiTConfig(**_COMMON, **_LABELS),
            2,
        ),
        _family(
            "beit",
            tf.BeitForImageClassification,
            tf.BeitModel,
            lambda: tf.BeitConfig(**_COMMON, **_LABELS, use_relative_position_bias=True, **_MOVING),
        ),
        _family(
            "beit_shared_bias",
            tf.BeitForImageClassification,
            tf.BeitModel,
            lambda: tf.BeitConfig(**_COMMON, **_LABELS, use_shared_relative_position_bias=True, **_MOVING),
        ),
        _family(
            "data2vec",
            tf.Data2VecVisionForImageClassification,
            tf.Data2VecVisionModel,
            lambda: tf.Data2VecVisionConfig(**_COMMON, **_LABELS, use_relative_position_bias=True, **_MOVING),
        ),
        _family(
            "data2vec_shared_bias",
            tf.Data2VecVisionForImageClassification,
            tf.Data2VecVisionModel,
            lambda: tf.Data2VecVisionConfig(**_COMMON, **_LABELS, use_shared_relative_position_bias=True, **_MOVING),
        ),
        _family(
            "dinov2", tf.Dinov2ForImageClassification, tf.Dinov2Model, lambda: tf.Dinov2Config(**_COMMON, **_LABELS)
        ),
        _family(
            "dinov2_swiglu",
            tf.Dinov2ForImageClassification,
            tf.Dinov2Model,
            lambda: tf.Dinov2Config(**_COMMON, **_LABELS, use_swiglu_ffn=True),
        ),
        _family(
            "dinov2_registers",
            tf.Dinov2WithRegistersForImageClassification,
            tf.Dinov2WithRegistersModel,
            lambda: tf.Dinov2WithRegistersConfig(**_COMMON, **_LABELS, num_register_tokens=4),
            5,
        ),
        _family("dinov3", None, tf.DINOv3ViTModel, lambda: tf.DINOv3ViTConfig(**_COMMON, num_register_tokens=4), 5),
        _family(
            "dinov3_gated",
            None,
            tf.DINOv3ViTModel,
            lambda: tf.DINOv3ViTConfig(**_COMMON, num_register_tokens=2, use_gated_mlp=True),
            3,
        ),
        _family(
            "ijepa", tf.IJepaForImageClassification, tf.IJepaModel, lambda: tf.IJepaConfig(**_COMMON, **_LABELS), 0
        ),
        _family(
            "vit_msn", tf.ViTMSNForImageClassification, tf.ViTMSNModel, lambda: tf.ViTMSNConfig(**_COMMON, **_LABELS)
        ),
        _family(
            "vit_mae",
            None,
            tf.ViTMAEModel,
            lambda: tf.ViTMAEConfig(**_COMMON, mask_ratio=0.5),
            inputs=_masked,
            patches=8,
        ),
        _family("clip", tf.CLIPForImageClassification, tf.CLIPVisionModel, lambda: _two_towers(tf.CLIPConfig)),
        _family(
            "siglip", tf.SiglipForImageClassification, tf.SiglipVisionModel, lambda: _two_towers(tf.SiglipConfig), 0
        ),
        _family(
            "siglip2",
            tf.Siglip2ForImageClassification,
            tf.Siglip2VisionModel,
            lambda: _two_towers(tf.Siglip2Config, _SIGLIP2),
            0,
            inputs=_naflex,
        ),
    )
}


def video(family: Family, method: Any, frames: int = 2) -> Family:
    """The family fed with videos; their frames meet where those of the method do."""

    def clips(batch: int) -> dict[str, Tensor]:
        inputs = family.inputs(batch * frames)
        return inputs | {"pixel_values": inputs["pixel_values"].unflatten(0, (batch, frames))}

    return replace(family, inputs=clips, before_norms=method.config_cls.frames_meet_before_norms)


def takes_videos(model: nn.Module) -> bool:
    return any(isinstance(m, VisualTunerLayer) and m.exchange.frame_handles for m in model.modules())


def call(model: nn.Module, inputs: dict[str, Tensor], before_norms: bool = False, **kwargs) -> Any:
    """The model's output; one for images gets the frames of videos, and its heads, or norms, the mean over them."""
    pixels = inputs["pixel_values"]
    if pixels.ndim < 5 or takes_videos(model):
        return model(**inputs, **kwargs)

    def mean_over_frames(module: nn.Module, args: tuple) -> tuple:
        whole = len(args[0]) == pixels.shape[0] * pixels.shape[1]
        return (args[0].unflatten(0, pixels.shape[:2]).mean(dim=1), *args[1:]) if whole else args

    backbone = find_backbone(model)
    norms = backbone.final_norms if before_norms and backbone.heads else ()
    heads = [model.get_submodule(path) for path in (*norms, *backbone.heads)]
    handles = [head.register_forward_pre_hook(mean_over_frames) for head in heads]
    try:
        return model(**inputs | {"pixel_values": pixels.flatten(0, 1)}, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def output_of(model: nn.Module, inputs: dict[str, Tensor], before_norms: bool = False) -> Tensor:
    """Logits, or the last hidden state where there is no head."""
    out = call(model, inputs, before_norms)
    return out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state
