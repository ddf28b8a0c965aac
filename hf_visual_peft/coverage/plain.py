"""Tiny plain transformers: one width and one grid from the first block to the last."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

from .tiny import LABELS, Size, TinyModel, WithHead, images


WIDTHS: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
PATCHED: dict[str, Any] = WIDTHS | {"image_size": 32, "patch_size": 8}
STILL: dict[str, Any] = {"drop_path_rate": 0.0}
WIDER = (48, 32)
TEXT: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 9,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def _masked(batch: int, size: Size) -> dict[str, Any]:
    """Images and noise for a masked autoencoder: without the noise every call would drop other patches."""
    noise = torch.rand(batch, size[0] * size[1] // 64, generator=torch.Generator().manual_seed(batch))
    return images(batch, size) | {"noise": noise}


def _patches(batch: int, size: Size) -> dict[str, Any]:
    """Images cut into patches of 8 x 8, as by the processor of SigLIP 2; every other one is smaller than its row."""
    rows, columns = size[0] // 8, size[1] // 8
    shapes = torch.tensor([[rows, columns] if index % 2 == 0 else [rows + 1, columns - 1] for index in range(batch)])
    mask = (torch.arange(rows * columns) < shapes.prod(1, keepdim=True)).long()
    pixels = torch.randn(batch, rows * columns, 3 * 64, generator=torch.Generator().manual_seed(batch))
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _with_image_tokens(batch: int, size: Size) -> dict[str, Any]:
    """A text prompt in which four tokens stand for the image."""
    tokens = torch.tensor([[2, 12, 13, 13, 13, 13, 11, 5]]).expand(batch, -1)
    return images(batch, size) | {"input_ids": tokens, "token_type_ids": (tokens == 13).long()}


def _frames(batch: int, size: Size) -> dict[str, Any]:
    pixels = images(batch * 4, size)["pixel_values"]
    return {"pixel_values": pixels.unflatten(0, (batch, 4))}


def _two_towers(config: Any, vision: dict[str, Any] = PATCHED, **fields: Any) -> Any:
    return config(vision_config=vision, text_config=TEXT, projection_dim=8, **fields)


def _shieldgemma() -> nn.Module:
    text = TEXT | {"hidden_size": 16, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 16}
    config = tf.ShieldGemma2Config(
        text_config=text,
        vision_config=PATCHED,
        mm_tokens_per_image=4,
        boi_token_index=12,
        eoi_token_index=11,
        image_token_index=13,
    )
    config.yes_token_index, config.no_token_index = 3, 4
    return tf.ShieldGemma2ForImageClassification(config)


def _perceiver() -> nn.Module:
    sizes = {"num_latents": 8, "d_latents": 16, "d_model": 512, "num_self_attends_per_block": 3}
    heads = {"num_self_attention_heads": 2, "num_cross_attention_heads": 1, "qk_channels": 16, "v_channels": 16}
    return tf.PerceiverForImageClassificationLearned(tf.PerceiverConfig(**sizes, **heads, image_size=8, **LABELS))


def _color_clusters(batch: int, size: Size) -> dict[str, Any]:
    """Random color ids: ImageGPT reads these instead of pixels."""
    generator = torch.Generator().manual_seed(batch)
    return {"input_ids": torch.randint(0, 8, (batch, math.prod(size)), generator=generator)}


def _plain(name: str, build: Callable[[], nn.Module], **fields: Any) -> TinyModel:
    return TinyModel(name, "plain", build, **fields)


def _resizable(name: str, build: Callable[[], nn.Module], **fields: Any) -> TinyModel:
    return _plain(name, build, other_size=WIDER, interpolates=True, **fields)


PLAIN = (
    _resizable("vit", lambda: tf.ViTForImageClassification(tf.ViTConfig(**PATCHED, **LABELS))),
    _resizable("deit", lambda: tf.DeiTForImageClassification(tf.DeiTConfig(**PATCHED, **LABELS))),
    _resizable(
        "beit",
        lambda: tf.BeitForImageClassification(
            tf.BeitConfig(**PATCHED, **LABELS, **STILL, use_relative_position_bias=True)
        ),
    ),
    _resizable(
        "data2vec-vision",
        lambda: tf.Data2VecVisionForImageClassification(
            tf.Data2VecVisionConfig(**PATCHED, **LABELS, **STILL, use_relative_position_bias=True)
        ),
    ),
    _plain(
        "dinov2",
        lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**PATCHED, **LABELS)),
        other_size=WIDER,
    ),
    _plain(
        "dinov2_with_registers",
        lambda: tf.Dinov2WithRegistersForImageClassification(tf.Dinov2WithRegistersConfig(**PATCHED, **LABELS)),
        other_size=WIDER,
    ),
    _plain(
        "dinov3_vit",
        lambda: WithHead(tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**PATCHED, num_register_tokens=4)), 16),
        other_size=WIDER,
    ),
    _resizable("ijepa", lambda: tf.IJepaForImageClassification(tf.IJepaConfig(**PATCHED, **LABELS))),
    _resizable("vit_msn", lambda: tf.ViTMSNForImageClassification(tf.ViTMSNConfig(**PATCHED, **LABELS))),
    _resizable(
        "vit_mae", lambda: WithHead(tf.ViTMAEModel(tf.ViTMAEConfig(**PATCHED, mask_ratio=0.5)), 16), inputs=_masked
    ),
    _resizable("clip", lambda: tf.CLIPForImageClassification(_two_towers(tf.CLIPConfig, **LABELS))),
    _resizable("metaclip_2", lambda: tf.MetaClip2ForImageClassification(_two_towers(tf.MetaClip2Config, **LABELS))),
    _resizable("siglip", lambda: tf.SiglipForImageClassification(_two_towers(tf.SiglipConfig, **LABELS))),
    _plain(
        "siglip2",
        lambda: tf.Siglip2ForImageClassification(
            _two_towers(tf.Siglip2Config, WIDTHS | {"patch_size": 8, "num_patches": 16}, **LABELS)
        ),
        other_size=WIDER,
        inputs=_patches,
    ),
    _plain("shieldgemma2", _shieldgemma, inputs=_with_image_tokens),
    TinyModel("perceiver", "plain", _perceiver, size=(8, 8), other_size=(12, 8), interpolates=True),
    _plain(
        "imagegpt",
        lambda: tf.ImageGPTForImageClassification(
            tf.ImageGPTConfig(n_embd=16, n_layer=3, n_head=2, n_positions=64, vocab_size=9, **LABELS)
        ),
        size=(8, 8),
        other_size=(4, 8),
        inputs=_color_clusters,
    ),
    _plain(
        "vitdet",
        lambda: WithHead(
            tf.VitDetModel(
                tf.VitDetConfig(
                    hidden_size=16,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    image_size=32,
                    pretrain_image_size=32,
                    patch_size=8,
                    window_block_indices=[0, 1],
                    window_size=2,
                    residual_block_indices=[1],
                    use_relative_position_embeddings=True,
                    **STILL,
                )
            ),
            16,
            channels_first=True,
        ),
        other_size=WIDER,
    ),
    _plain(
        "videomae",
        lambda: tf.VideoMAEForVideoClassification(tf.VideoMAEConfig(**PATCHED, num_frames=4, **LABELS)),
        inputs=_frames,
        video=True,
    ),
    _plain(  # transformers' interpolation for another size forgets that the positions count frames as well
        "vivit",
        lambda: tf.VivitForVideoClassification(
            tf.VivitConfig(**WIDTHS, image_size=32, tubelet_size=[2, 8, 8], num_frames=4, **LABELS)
        ),
        inputs=_frames,
        video=True,
    ),
    _plain(
        "timesformer",
        lambda: tf.TimesformerForVideoClassification(tf.TimesformerConfig(**PATCHED, num_frames=4, **LABELS)),
        other_size=WIDER,
        inputs=_frames,
        video=True,
    ),
    _plain(
        "dpt",
        lambda: WithHead(tf.DPTModel(tf.DPTConfig(**PATCHED, backbone_out_indices=[0, 1, 2])), 16),
        other_size=WIDER,
    ),
    _plain(
        "sam",
        lambda: WithHead(
            tf.SamVisionModel(
                tf.SamVisionConfig(**PATCHED, window_size=2, global_attn_indexes=[2], output_channels=16, mlp_dim=32)
            ),
            16,
            channels_first=True,
        ),
    ),
    # the vision tower alone: CLIPSegForImageSegmentation calls it without gradients, so nothing could train
    _resizable("clipseg", lambda: WithHead(tf.CLIPSegVisionModel(tf.CLIPSegVisionConfig(**PATCHED)), 16)),
    _resizable("owlvit", lambda: WithHead(tf.OwlViTVisionModel(tf.OwlViTVisionConfig(**PATCHED)), 16)),
    _resizable("blip_2", lambda: WithHead(tf.Blip2VisionModel(tf.Blip2VisionConfig(**PATCHED)), 16)),
)

# families of the same classes whose blocks differ by an option, for the tests only
PLAIN_VARIANTS = (
    _resizable("deit_teacher", lambda: tf.DeiTForImageClassificationWithTeacher(tf.DeiTConfig(**PATCHED, **LABELS))),
    _resizable(
        "beit_shared_bias",
        lambda: tf.BeitForImageClassification(
            tf.BeitConfig(**PATCHED, **LABELS, **STILL, use_shared_relative_position_bias=True)
        ),
    ),
    _resizable(
        "data2vec_shared_bias",
        lambda: tf.Data2VecVisionForImageClassification(
            tf.Data2VecVisionConfig(**PATCHED, **LABELS, **STILL, use_shared_relative_position_bias=True)
        ),
    ),
    _plain(
        "dinov2_swiglu",
        lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**PATCHED, **LABELS, use_swiglu_ffn=True)),
        other_size=WIDER,
    ),
    _plain(
        "dinov3_gated",
        lambda: WithHead(
            tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**PATCHED, num_register_tokens=2, use_gated_mlp=True)), 16
        ),
        other_size=WIDER,
    ),
)
