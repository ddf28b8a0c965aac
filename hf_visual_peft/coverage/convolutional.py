"""Tiny convolutional networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as tf
from torch import nn

from .tiny import LABELS, TinyModel


STAGES: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 2, 1, 1]}
WIDER = (48, 32)


def _convolutional(name: str, build: Callable[[], nn.Module], **fields: Any) -> TinyModel:
    return TinyModel(name, "convolutional", build, other_size=WIDER, **fields)


def _hgnet() -> nn.Module:
    config = tf.HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16],
        stage_mid_channels=[8, 8],
        stage_out_channels=[16, 16],
        stage_num_blocks=[1, 2],
        stage_downsample=[False, True],
        stage_light_block=[False, True],
        stage_kernel_size=[3, 5],
        stage_numb_of_layers=[2, 2],
        hidden_sizes=[16, 16],
        depths=[1, 2],
        **LABELS,
    )
    return tf.HGNetV2ForImageClassification(config)


def _pp_lcnet() -> nn.Module:
    blocks = [  # kernel size, channels in and out, stride, whether with squeeze and excitation
        [[3, 32, 32, 1, False]],
        [[3, 32, 32, 2, False], [3, 32, 32, 1, False]],
        [[3, 32, 64, 1, False]],
        [[5, 64, 64, 2, True]],
        [[5, 64, 64, 1, True]],
    ]
    config = tf.PPLCNetConfig(
        scale=0.25, block_configs=blocks, stem_channels=32, class_expand=16, hidden_dropout_prob=0.0, **LABELS
    )
    return tf.PPLCNetForImageClassification(config)


def _textnet() -> nn.Module:
    config = tf.TextNetConfig(
        stem_out_channels=8,
        image_size=[32, 32],
        conv_layer_kernel_sizes=[[[3, 3]], [[3, 3], [1, 3]], [[3, 1]], [[3, 3]]],
        conv_layer_strides=[[1], [2, 1], [2], [2]],
        hidden_sizes=[8, 8, 8, 16, 16],
        **LABELS,
    )
    return tf.TextNetForImageClassification(config)


def _efficientnet() -> nn.Module:
    config = tf.EfficientNetConfig(
        image_size=32,
        width_coefficient=0.1,  # of these channels and of the 32 of the stem, in steps of 8
        depth_coefficient=1.0,
        kernel_sizes=[3, 3, 5],
        in_channels=[32, 16, 160],
        out_channels=[16, 160, 320],
        strides=[1, 2, 2],
        num_block_repeats=[1, 2, 1],
        expand_ratios=[1, 2, 2],
        hidden_dim=128,
        batch_norm_eps=1e-5,  # its own, 1e-3, drowns what tiny weights let through
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        **LABELS,
    )
    return tf.EfficientNetForImageClassification(config)


CONVOLUTIONAL = (
    _convolutional("convnext", lambda: tf.ConvNextForImageClassification(tf.ConvNextConfig(**STAGES, **LABELS))),
    _convolutional("convnextv2", lambda: tf.ConvNextV2ForImageClassification(tf.ConvNextV2Config(**STAGES, **LABELS))),
    _convolutional("dinov3_convnext", lambda: tf.DINOv3ConvNextModel(tf.DINOv3ConvNextConfig(**STAGES))),
    _convolutional(
        "resnet",
        lambda: tf.ResNetForImageClassification(
            tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], **LABELS)
        ),
    ),
    _convolutional(
        "bit",
        lambda: tf.BitForImageClassification(
            tf.BitConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_groups=2, **LABELS)
        ),
    ),
    _convolutional(
        "regnet",
        lambda: tf.RegNetForImageClassification(
            tf.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], groups_width=4, **LABELS)
        ),
    ),
    _convolutional("efficientnet", _efficientnet),
    _convolutional(
        "mobilenet_v1",
        lambda: tf.MobileNetV1ForImageClassification(
            tf.MobileNetV1Config(
                depth_multiplier=0.02, min_depth=8, image_size=32, classifier_dropout_prob=0.0, **LABELS
            )
        ),
    ),
    _convolutional(
        "mobilenet_v2",
        lambda: tf.MobileNetV2ForImageClassification(
            tf.MobileNetV2Config(
                depth_multiplier=0.05,
                min_depth=8,
                expand_ratio=2,
                image_size=32,
                classifier_dropout_prob=0.0,
                **LABELS,
            )
        ),
    ),
    _convolutional("hgnet_v2", _hgnet),
    _convolutional("pp_lcnet", _pp_lcnet),
    _convolutional("textnet", _textnet),
)
