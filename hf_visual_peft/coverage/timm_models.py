"""Tiny models of timm, raw and through transformers, of torchvision, and the visual tower of OpenCLIP."""

from __future__ import annotations

import importlib
from typing import Any

import transformers as tf
from torch import nn

from ..backbones.split_attention import split_attention
from .tiny import Size, TinyModel, images


VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}
SWIN: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 2,
    "drop_path_rate": 0.0,
}
CONVNEXT: dict[str, Any] = {"dims": (8, 8, 16, 16), "depths": (1, 2, 1, 1)}
UNEVEN, WIDER, WIDEST = (40, 32), (48, 32), (96, 64)


def _raw(
    name: str, architecture: str, other: Size | None, colors: int = 3, size: Size = (32, 32), **fields: Any
) -> TinyModel:
    """A module from `timm.create_model`, whose forward takes only the images."""

    def build() -> nn.Module:
        import timm

        return timm.create_model(architecture, pretrained=False, num_classes=3, in_chans=colors, **fields)

    return TinyModel(
        name,
        "timm",
        build,
        size=size,
        other_size=other,
        inputs=lambda batch, size: images(batch, size, colors),
        positional=True,
        package="timm",
    )


def _wrapped(name: str, architecture: str, other: Size | None, **fields: Any) -> TinyModel:
    """A timm model in transformers' wrapper."""

    def build() -> nn.Module:
        config = tf.TimmWrapperConfig(architecture=architecture, model_args=fields, num_labels=3)
        return tf.TimmWrapperForImageClassification(config)

    return TinyModel(name, "timm", build, other_size=other, package="timm")


def _open_clip() -> nn.Module:
    tower = importlib.import_module("open_clip.transformer").VisionTransformer
    return split_attention(
        tower(image_size=32, patch_size=8, width=16, layers=3, heads=2, mlp_ratio=2.0, output_dim=8)
    )


def _torchvision() -> nn.Module:
    vit = importlib.import_module("torchvision.models.vision_transformer").VisionTransformer
    return split_attention(
        vit(image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3)
    )


TIMM = (
    _wrapped("timm_wrapper", "vit_tiny_patch16_224", None, **VIT),
    _wrapped("timm_wrapper_convnext", "convnext_atto", WIDER, **CONVNEXT),
    _raw("timm_vit", "vit_tiny_patch16_224", None, **VIT),
    _raw("timm_vit_registers", "vit_small_patch14_reg4_dinov2", None, **VIT),
    _raw("timm_vit_attention_pool", "vit_base_patch16_siglip_224", None, **VIT),
    _raw("timm_vit_dynamic", "vit_tiny_patch16_224", WIDER, **VIT, dynamic_img_size=True),
    _raw("timm_vit_gray", "vit_tiny_patch16_224", None, colors=1, **VIT),
    _raw("timm_swin", "swin_tiny_patch4_window7_224", UNEVEN, **SWIN, strict_img_size=False),
    _raw("timm_dinov3", "vit_small_patch16_dinov3", WIDER, **VIT),
    _raw(
        "timm_maxvit",
        "maxvit_tiny_tf_224",
        WIDEST,
        size=(64, 64),
        img_size=64,
        embed_dim=(8, 16),
        depths=(1, 2),
        stem_width=8,
        transformer_dim_head=4,
    ),
    _raw(
        "timm_efficientformer",
        "efficientformerv2_s0",
        None,
        size=(64, 64),
        img_size=64,
        embed_dims=(8, 8, 8, 8),
        depths=(1, 2, 1, 1),
    ),
    _raw("timm_convnext", "convnext_atto", WIDER, **CONVNEXT),
    _raw("timm_resnet", "resnet18", WIDER, layers=(1, 2, 1, 1), channels=(8, 8, 16, 16)),
    TinyModel("open_clip", "timm", _open_clip, positional=True, package="open_clip"),
    TinyModel("torchvision_vit", "timm", _torchvision, positional=True, package="torchvision"),
)
