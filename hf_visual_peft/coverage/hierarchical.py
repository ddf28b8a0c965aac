"""Tiny hierarchical transformers: stages that halve the grid, with a block that shifts its windows where one does.

Other sizes leave a remainder in the windows wherever an architecture pads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as tf
from torch import nn

from .tiny import LABELS, Size, TinyModel, WithHead


STILL: dict[str, Any] = {"drop_path_rate": 0.0}
WINDOWS: dict[str, Any] = {
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 2,
    "image_size": 32,
    "patch_size": 4,
}
UNEVEN, WIDER, WIDEST = (40, 32), (48, 32), (96, 64)


def _hierarchical(name: str, build: Callable[[], nn.Module], other: Size | None = WIDER, **fields: Any) -> TinyModel:
    return TinyModel(name, "hierarchical", build, other_size=other, **fields)


def _cvt() -> nn.Module:
    widths = {"embed_dim": [8, 16, 16], "depth": [1, 2, 3], "num_heads": [1, 2, 2]}  # stage i needs more than i blocks
    return tf.CvtForImageClassification(tf.CvtConfig(**widths, drop_path_rate=[0.0, 0.0, 0.0], **LABELS))


def _sam2() -> nn.Module:
    backbone = tf.Sam2HieraDetConfig(
        hidden_size=8,
        num_attention_heads=1,
        image_size=[32, 32],
        window_positional_embedding_background_size=[4, 4],
        num_query_pool_stages=2,
        blocks_per_stage=[1, 2, 1],
        embed_dim_per_stage=[8, 16, 32],
        num_attention_heads_per_stage=[1, 2, 4],
        window_size_per_stage=[2, 2, 2],
        global_attention_blocks=[2],
    )
    config = tf.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[32, 16, 8],
        backbone_feature_sizes=[[8, 8], [4, 4], [2, 2]],
        fpn_hidden_size=8,
        fpn_top_down_levels=[1, 2],
    )
    return WithHead(tf.Sam2VisionModel(config), 32)


HIERARCHICAL = (
    _hierarchical("swin", lambda: tf.SwinForImageClassification(tf.SwinConfig(**WINDOWS, **STILL, **LABELS)), UNEVEN),
    _hierarchical(
        "swinv2", lambda: tf.Swinv2ForImageClassification(tf.Swinv2Config(**WINDOWS, **STILL, **LABELS)), UNEVEN
    ),
    _hierarchical(
        "donut-swin",
        lambda: tf.DonutSwinForImageClassification(tf.DonutSwinConfig(**WINDOWS, **STILL, **LABELS)),
        UNEVEN,
    ),
    _hierarchical(
        "dinat",
        lambda: tf.DinatForImageClassification(
            tf.DinatConfig(
                embed_dim=8,
                depths=[2, 2],
                num_heads=[2, 4],
                kernel_size=3,
                dilations=[[1, 2], [1, 1]],
                **STILL,
                **LABELS,
            )
        ),
        package="natten",
    ),
    _hierarchical(
        "hiera",
        lambda: tf.HieraForImageClassification(
            tf.HieraConfig(
                embed_dim=8,
                depths=[1, 2, 1],
                num_heads=[1, 2, 4],
                image_size=[32, 32],
                masked_unit_size=[4, 4],
                masked_unit_attention=[True, True, False],
                num_query_pool=2,
                **LABELS,
            )
        ),
        interpolates=True,
    ),
    _hierarchical(
        "pvt",
        lambda: tf.PvtForImageClassification(
            tf.PvtConfig(
                image_size=32,
                hidden_sizes=[8, 8, 16, 16],
                depths=[1, 2, 1, 1],
                num_attention_heads=[1, 2, 2, 2],
                mlp_ratios=[2, 2, 2, 2],
                **STILL,
                **LABELS,
            )
        ),
        None,
    ),
    _hierarchical(
        "pvt_v2",
        lambda: tf.PvtV2ForImageClassification(
            tf.PvtV2Config(
                image_size=32,
                hidden_sizes=[8, 8, 16, 16],
                depths=[1, 2, 1, 1],
                num_attention_heads=[1, 2, 2, 2],
                mlp_ratios=[2, 2, 2, 2],
                **STILL,
                **LABELS,
            )
        ),
    ),
    _hierarchical("cvt", _cvt),
    _hierarchical(
        "segformer",
        lambda: tf.SegformerForImageClassification(
            tf.SegformerConfig(
                hidden_sizes=[8, 8, 16, 16],
                depths=[1, 2, 1, 1],
                num_attention_heads=[1, 2, 2, 2],
                mlp_ratios=[2, 2, 2, 2],
                **STILL,
                **LABELS,
            )
        ),
    ),
    _hierarchical(
        "focalnet",
        lambda: tf.FocalNetForImageClassification(
            tf.FocalNetConfig(
                image_size=32,
                embed_dim=8,
                hidden_sizes=[8, 16],
                depths=[1, 2],
                focal_levels=[2, 2],
                focal_windows=[3, 3],
                **STILL,
                **LABELS,
            )
        ),
    ),
    _hierarchical(
        "levit",
        lambda: tf.LevitForImageClassification(
            tf.LevitConfig(
                image_size=64,
                hidden_sizes=[8, 16, 16],
                num_attention_heads=[1, 2, 2],
                depths=[1, 2, 1],
                key_dim=[4, 4, 4],
                **LABELS,
            )
        ),
        None,
        size=(64, 64),
    ),
    _hierarchical(
        "swiftformer",
        lambda: tf.SwiftFormerForImageClassification(
            tf.SwiftFormerConfig(image_size=64, depths=[1, 2, 1, 1], embed_dims=[8, 8, 16, 16], mlp_ratio=2, **LABELS)
        ),
        WIDEST,
        size=(64, 64),
    ),
    _hierarchical(
        "mobilevit",
        lambda: tf.MobileViTForImageClassification(
            tf.MobileViTConfig(
                hidden_sizes=[8, 16, 16],
                neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
                image_size=64,
                num_attention_heads=2,
                expand_ratio=2.0,
                **LABELS,
            )
        ),
        WIDEST,
        size=(64, 64),
    ),
    _hierarchical(
        "mobilevitv2",
        lambda: tf.MobileViTV2ForImageClassification(
            tf.MobileViTV2Config(
                image_size=64,
                width_multiplier=0.125,
                base_attn_unit_dims=[128, 128, 128],
                n_attn_blocks=[1, 2, 1],
                **LABELS,
            )
        ),
        WIDEST,
        size=(64, 64),
    ),
    _hierarchical(
        "poolformer",
        lambda: tf.PoolFormerForImageClassification(
            tf.PoolFormerConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 2, 1, 1], **STILL, **LABELS)
        ),
    ),
    _hierarchical("sam2", _sam2),
)
