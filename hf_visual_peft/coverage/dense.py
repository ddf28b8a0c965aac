"""Tiny models for segmentation, depth and detection, whose backbone is one part of several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as tf
from torch import nn

from .hierarchical import STILL, WINDOWS
from .plain import PATCHED
from .tiny import LABELS, Size, TinyModel


FOUR_BLOCKS: dict[str, Any] = PATCHED | {"num_hidden_layers": 4}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 2, 1, 1]}
FOUR_WINDOWS: dict[str, Any] = WINDOWS | STILL | {"depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 2], "image_size": 64}
EVERY_STAGE = ["stage1", "stage2", "stage3", "stage4"]
DETR: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 4,
    "dropout": 0.0,
}
LARGE, SQUARE, WIDER, WIDEST = (64, 64), (48, 48), (48, 32), (96, 64)


def _dense(name: str, build: Callable[[], nn.Module], other: Size | None = WIDEST, **fields: Any) -> TinyModel:
    return TinyModel(name, "dense", build, other_size=other, **fields)


def _swin() -> Any:
    return tf.SwinConfig(**FOUR_WINDOWS, out_features=EVERY_STAGE)


def _upernet(backbone: Any) -> nn.Module:
    return tf.UperNetForSemanticSegmentation(
        tf.UperNetConfig(
            backbone_config=backbone, hidden_size=8, pool_scales=[1, 2], use_auxiliary_head=False, **LABELS
        )
    )


def _mask2former() -> nn.Module:
    config = tf.Mask2FormerConfig(
        backbone_config=_swin(),
        feature_size=32,  # its norms have 32 groups
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=4,
        **LABELS,
    )
    return tf.Mask2FormerForUniversalSegmentation(config)


def _maskformer() -> nn.Module:
    config = tf.MaskFormerConfig(
        backbone_config=_swin(),
        decoder_config=tf.MaskFormerDetrConfig(**DETR, backbone_config=tf.ResNetConfig()),
        fpn_feature_size=32,  # its norms have 32 groups
        mask_feature_size=16,
        num_queries=4,
        **LABELS,
    )
    return tf.MaskFormerForInstanceSegmentation(config)


def _beit() -> nn.Module:
    config = tf.BeitConfig(
        **FOUR_BLOCKS,
        **STILL,
        **LABELS,
        out_indices=[1, 2, 3, 4],  # BEiT counts from the embeddings, so its last block ends unused
        use_relative_position_bias=True,
        add_fpn=True,
        reshape_hidden_states=True,
        pool_scales=[1, 2],
        auxiliary_channels=8,
    )
    return tf.BeitForSemanticSegmentation(config)


def _dpt() -> nn.Module:
    config = tf.DPTConfig(
        **FOUR_BLOCKS,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
    )
    return tf.DPTForDepthEstimation(config)


def _detr() -> nn.Module:
    backbone = tf.ResNetConfig(embedding_size=8, **STAGES, out_features=["stage4"])
    return tf.DetrForObjectDetection(tf.DetrConfig(backbone_config=backbone, **DETR, **LABELS))


def _rt_detr() -> nn.Module:
    backbone = tf.RTDetrResNetConfig(embedding_size=8, **STAGES, out_indices=[2, 3, 4])
    config = tf.RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=16,
        encoder_in_channels=[8, 16, 16],
        decoder_in_channels=[16, 16, 16],
        num_denoising=0,
        hidden_expansion=0.5,
        **DETR,
        **LABELS,
    )
    return tf.RTDetrForObjectDetection(config)


DENSE = (
    _dense(
        "segformer_segmentation",
        lambda: tf.SegformerForSemanticSegmentation(
            tf.SegformerConfig(
                **STAGES,
                **STILL,
                **LABELS,
                num_attention_heads=[1, 2, 2, 2],
                mlp_ratios=[2] * 4,
                decoder_hidden_size=8,
            )
        ),
        WIDER,
    ),
    _dense("upernet_swin", lambda: _upernet(_swin()), size=LARGE),
    _dense(
        "upernet_convnext",
        lambda: _upernet(tf.ConvNextConfig(**STAGES, out_features=EVERY_STAGE)),
        size=LARGE,
    ),
    _dense("mask2former_swin", _mask2former, size=LARGE),
    _dense("maskformer_swin", _maskformer, size=LARGE),
    _dense("beit_segmentation", _beit, WIDER),
    _dense("dpt_depth", _dpt, SQUARE),  # its neck takes the root of the number of patches for height and width
    _dense("detr_resnet", _detr, size=LARGE),
    _dense("rt_detr_resnet", _rt_detr, size=LARGE),
)
