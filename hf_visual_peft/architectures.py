"""Role tables: which module plays which part in each family of backbones. Data, and the way to add to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .peft_defaults import add_defaults


Names = tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """Where the parts of one family of vision transformers are found.

    Paths are dotted attribute names. Those of blocks are relative to a block, those of heads to the model that holds
    the backbone, all others to the backbone. A role with several names takes every module that exists under one of
    them; a role marked *optional* may have none.

    Attributes:
        backbones: names of the backbone's classes; subclasses are recognised.
        blocks: the `nn.ModuleList` of transformer blocks.
        patch_embedding: the convolution or linear that turns pixels into tokens.
        embeddings: the module that returns the first block's input.
        prefix_tokens: optional; parameters of `embeddings` that are put before the patches (CLS, distillation,
            registers), each of shape (1, tokens, width) or (width,).
        input_norms: optional; norms of the backbone before its blocks.
        norms: optional; norms of the backbone behind its blocks.
        pooled_norms: optional; norms of the pooled output alone, which the `heads` do not read.
        norm1: norm before attention.
        query: projection to queries; may be the same module as `key` and `value` where they are fused.
        key: projection to keys.
        value: projection to values.
        output: projection after attention.
        norm2: norm before the MLP.
        fc1: first linear(s) of the MLP; two where it is gated.
        fc2: last linear of the MLP.
        drop_path: optional; the block's stochastic depth, with its rate in `drop_prob`.
        position_bias: optional; module that makes the block's bias on attention logits.
        heads: optional; task heads.
        grid: how the patch tokens lie in the image. `"full"`: all cells of the patch embedding's output, row by row;
            `"spatial_shapes"`: as told by the embeddings' argument of that name, padded at the end; `"masked"`: some
            cells, shuffled, as told by the embeddings' third output `ids_restore`.
        model_types: optional; `model_type` of the transformers configs of the backbones and of the models that hold
            one. For these peft's own `LNTuningConfig()` finds the norms; see `peft_defaults`.
    """

    backbones: Names
    blocks: str
    patch_embedding: str
    embeddings: str = "embeddings"
    prefix_tokens: Names = ("cls_token",)
    input_norms: Names = ()
    norms: Names = ("layernorm",)
    pooled_norms: Names = ()
    norm1: Names = ("layernorm_before",)
    query: Names = ("attention.q_proj",)
    key: Names = ("attention.k_proj",)
    value: Names = ("attention.v_proj",)
    output: Names = ("attention.o_proj",)
    norm2: Names = ("layernorm_after",)
    fc1: Names = ("mlp.fc1",)
    fc2: Names = ("mlp.fc2",)
    drop_path: Names = ("drop_path",)
    position_bias: Names = ()
    heads: Names = ("classifier",)
    grid: Literal["full", "spatial_shapes", "masked"] = "full"
    model_types: Names = ()


_VIT = Architecture(
    backbones=("ViTModel", "ViTMSNModel", "IJepaModel"),
    blocks="layers",
    patch_embedding="embeddings.patch_embeddings.projection",
    model_types=("vit", "vit_msn", "ijepa"),
)
_DEIT = replace(
    _VIT,
    backbones=("DeiTModel",),
    prefix_tokens=("cls_token", "distillation_token"),
    heads=("classifier", "cls_classifier", "distillation_classifier"),
    model_types=("deit",),
)
_VIT_MAE = replace(_VIT, backbones=("ViTMAEModel",), heads=(), grid="masked", model_types=("vit_mae",))
_BEIT = replace(
    _VIT,
    backbones=("BeitModel",),
    norms=("layernorm", "pooler.layernorm"),
    position_bias=("relative_position_bias",),
    model_types=("beit",),
)
_DATA2VEC = replace(
    _BEIT,
    backbones=("Data2VecVisionModel",),
    blocks="encoder.layer",
    query=("attention.attention.query",),
    key=("attention.attention.key",),
    value=("attention.attention.value",),
    output=("attention.output.dense",),
    fc1=("intermediate.dense",),
    fc2=("output.dense",),
    position_bias=("attention.attention.relative_position_bias",),
    model_types=("data2vec-vision",),
)
_DINOV2 = replace(
    _VIT,
    backbones=("Dinov2Model", "Dinov2Backbone", "Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
    blocks="encoder.layer",
    prefix_tokens=("cls_token", "register_tokens"),
    norm1=("norm1",),
    norm2=("norm2",),
    fc1=("mlp.fc1", "mlp.gate_proj", "mlp.up_proj"),
    fc2=("mlp.fc2", "mlp.down_proj"),
    model_types=("dinov2", "dinov2_with_registers"),
)
_DINOV3 = replace(
    _DINOV2,
    backbones=("DINOv3ViTModel", "DINOv3ViTBackbone"),
    blocks="model.layer",
    patch_embedding="embeddings.patch_embeddings",
    norms=("norm",),
    model_types=("dinov3_vit",),
)
_CLIP = Architecture(
    backbones=("CLIPVisionModel", "CLIPVisionTransformer"),
    blocks="encoder.layers",
    patch_embedding="embeddings.patch_embedding",
    prefix_tokens=("class_embedding",),
    input_norms=("pre_layrnorm",),
    norms=(),
    pooled_norms=("post_layernorm",),
    norm1=("layer_norm1",),
    query=("self_attn.q_proj",),
    key=("self_attn.k_proj",),
    value=("self_attn.v_proj",),
    output=("self_attn.out_proj",),
    norm2=("layer_norm2",),
    drop_path=(),
    model_types=("clip", "clip_vision_model"),
)
_SIGLIP = replace(
    _CLIP,
    backbones=("SiglipVisionModel", "SiglipVisionTransformer"),
    prefix_tokens=(),
    input_norms=(),
    norms=("post_layernorm",),
    pooled_norms=(),
    model_types=("siglip", "siglip_vision_model"),
)
_SIGLIP2 = replace(
    _SIGLIP,
    backbones=("Siglip2VisionModel", "Siglip2VisionTransformer"),
    grid="spatial_shapes",
    model_types=("siglip2", "siglip2_vision_model"),
)

_ARCHITECTURES: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture) -> None:
    """Make a family of backbones known, also one of the user's own; to peft's methods, too, by its model types.

    Args:
        architecture: the role table. A backbone class that has a table already gets the new one.

    Raises:
        ValueError: the table names no backbone class.
    """
    if not architecture.backbones:
        raise ValueError("Architecture.backbones is empty: name at least one class of backbone.")
    for name in architecture.backbones:
        _ARCHITECTURES[name] = architecture
    add_defaults(architecture)


def architecture_of(cls: type) -> Architecture | None:
    """The role table for a class or the nearest of its bases, or None."""
    return next((_ARCHITECTURES[base.__name__] for base in cls.__mro__ if base.__name__ in _ARCHITECTURES), None)


def known_backbones() -> Names:
    """Names of all backbone classes that have a table, sorted."""
    return tuple(sorted(_ARCHITECTURES))


for _table in (_VIT, _DEIT, _VIT_MAE, _BEIT, _DATA2VEC, _DINOV2, _DINOV3, _CLIP, _SIGLIP, _SIGLIP2):
    register_architecture(_table)
