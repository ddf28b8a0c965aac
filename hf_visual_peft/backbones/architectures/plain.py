"""Role tables of plain vision transformers: one width, one grid."""

from dataclasses import replace

from .table import Architecture


_VIT = Architecture(
    backbones=("ViTModel", "ViTMSNModel", "IJepaModel"),
    blocks="layers",
    patch_embedding="embeddings.patch_embeddings.projection",
    prompts="sequence",
)
_DEIT = replace(
    _VIT,
    backbones=("DeiTModel",),
    prefix_tokens=("cls_token", "distillation_token"),
    heads=("classifier", "cls_classifier", "distillation_classifier"),
)
_VIT_MAE = replace(_VIT, backbones=("ViTMAEModel",), grid="masked")
_BEIT = replace(
    _VIT,
    backbones=("BeitModel",),
    norms=("layernorm", "pooler.layernorm"),
    position_bias=("relative_position_bias",),
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
)
_DINOV3 = replace(
    _DINOV2,
    backbones=("DINOv3ViTModel", "DINOv3ViTBackbone"),
    blocks="model.layer",
    patch_embedding="embeddings.patch_embeddings",
    norms=("norm",),
)
_CLIP = Architecture(
    backbones=("CLIPVisionModel", "CLIPVisionTransformer", "MetaClip2VisionModel", "CLIPSegVisionModel"),
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
    prompts="sequence",
)
_SIGLIP = replace(
    _CLIP,
    backbones=("SiglipVisionModel", "SiglipVisionTransformer"),
    prefix_tokens=(),
    input_norms=(),
    norms=("post_layernorm",),
    pooled_norms=(),
)
_SIGLIP2 = replace(
    _SIGLIP,
    backbones=("Siglip2VisionModel", "Siglip2VisionTransformer"),
    grid="spatial_shapes",
)
_OWLVIT = replace(
    _CLIP,
    backbones=("OwlViTVisionTransformer", "Owlv2VisionTransformer"),
    input_norms=("pre_layernorm",),
    norms=("post_layernorm",),
    pooled_norms=(),
)
_BLIP2 = replace(
    _CLIP,
    backbones=("Blip2VisionModel", "BlipVisionModel", "InstructBlipVisionModel"),
    input_norms=(),
    norms=("post_layernorm",),
    pooled_norms=(),
    query=("self_attn.qkv",),
    key=("self_attn.qkv",),
    value=("self_attn.qkv",),
    output=("self_attn.projection",),
)
_DPT = replace(
    _DATA2VEC,
    backbones=("DPTModel",),
    patch_embedding=("embeddings.patch_embeddings.projection", "embeddings.projection"),  # the latter after a BiT
    norms=("layernorm",),
    position_bias=(),
)
_VIDEOMAE = replace(
    _DPT,
    backbones=("VideoMAEModel",),
    outer_norms=("fc_norm",),
    video=True,
    heads=("classifier",),
)
_VIVIT = replace(_VIT, backbones=("VivitModel",), video=True)
_TIMESFORMER = replace(
    _DPT,
    backbones=("TimesformerModel",),
    query=("attention.attention.qkv",),
    key=("attention.attention.qkv",),
    value=("attention.attention.qkv",),
    operations=(
        "temporal_layernorm",
        "temporal_attention.attention.qkv",
        "temporal_attention.output.dense",
        "temporal_dense",
    ),
    heads=("classifier",),
    reads_attention="",  # the norm sees frames, the block videos
    prompts="keys",
    grid="frames_last",
    video=True,
)
_VITDET = replace(
    _DINOV2,
    backbones=("VitDetModel", "VitDetBackbone"),
    patch_embedding="embeddings.projection",
    prefix_tokens=(),
    norms=(),
    query=("attention.qkv",),
    key=("attention.qkv",),
    value=("attention.qkv",),
    output=("attention.proj",),
    fc1=("mlp.fc1",),
    fc2=("mlp.fc2",),
    operations=("residual.conv1", "residual.conv2", "residual.conv3"),
    reads_result=("residual",),
    stream="channels_first",
    stream_inside="channels_last",
    prompts="keys",
    grid="map",
)
_SAM = Architecture(
    backbones=("SamVisionEncoder", "SamHQVisionEncoder"),
    blocks="layers",
    patch_embedding="patch_embed.projection",
    embeddings="patch_embed",
    prefix_tokens=(),
    norms=(),
    norm1=("layer_norm1",),
    query=("attn.qkv",),
    key=("attn.qkv",),
    value=("attn.qkv",),
    output=("attn.proj",),
    norm2=("layer_norm2",),
    fc1=("mlp.lin1",),
    fc2=("mlp.lin2",),
    drop_path=(),
    stream="channels_last",
    prompts="keys",
    grid="map",
)
_PERCEIVER = Architecture(
    backbones=("PerceiverModel",),
    blocks="encoder.self_attends",
    patch_embedding=(
        "input_preprocessor.convnet_1x1",
        "input_preprocessor.convnet.conv",
        "encoder.cross_attention.attention.self.key",  # it reads pixels with their positions
    ),
    embeddings="embeddings",
    prefix_tokens=(),
    norms=(),
    norm1=("attention.self.layernorm1",),
    query=("attention.self.query",),
    key=("attention.self.key",),
    value=("attention.self.value",),
    output=("attention.output.dense",),
    norm2=("layernorm",),
    fc1=("mlp.dense1",),
    fc2=("mlp.dense2",),
    drop_path=(),
    heads=(),
    own_heads=("decoder.decoder.final_layer",),
    prompts="sequence",
    grid=None,  # its tokens are not patches
)
_IMAGEGPT = Architecture(
    backbones=("ImageGPTModel",),
    blocks="h",
    patch_embedding=(),  # its tokens are colours from a list
    embeddings="",
    prefix_tokens=(),
    norms=("ln_f",),
    norm1=("ln_1",),
    query=("attn.c_attn",),
    key=("attn.c_attn",),
    value=("attn.c_attn",),
    output=("attn.c_proj",),
    norm2=("ln_2",),
    fc1=("mlp.c_fc",),
    fc2=("mlp.c_proj",),
    drop_path=(),
    heads=("score",),
    softmax=False,  # each token sees those before it
    prompts=None,
    grid=None,
)

_QWEN_VL = Architecture(
    backbones=(
        "Qwen2VisionTransformerPretrainedModel",
        "Qwen2_5_VisionTransformerPretrainedModel",
        "Qwen3VLVisionModel",
    ),
    blocks="blocks",
    patch_embedding="patch_embed.proj",
    embeddings="patch_embed",
    prefix_tokens=(),
    norms=(),
    norm1=("norm1",),
    query=("attn.qkv",),
    key=("attn.qkv",),
    value=("attn.qkv",),
    output=("attn.proj",),
    norm2=("norm2",),
    fc1=("mlp.fc1", "mlp.gate_proj", "mlp.up_proj", "mlp.linear_fc1"),
    fc2=("mlp.fc2", "mlp.down_proj", "mlp.linear_fc2"),
    drop_path=(),
    heads=(),
    stream="packed",
    grid=None,
)

PLAIN = (
    _VIT,
    _DEIT,
    _VIT_MAE,
    _BEIT,
    _DATA2VEC,
    _DINOV2,
    _DINOV3,
    _CLIP,
    _SIGLIP,
    _SIGLIP2,
    _OWLVIT,
    _BLIP2,
    _DPT,
    _VIDEOMAE,
    _VIVIT,
    _TIMESFORMER,
    _VITDET,
    _SAM,
    _PERCEIVER,
    _IMAGEGPT,
    _QWEN_VL,
)
