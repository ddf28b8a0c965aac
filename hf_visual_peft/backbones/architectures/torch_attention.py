"""Role tables of vision transformers that are built on `nn.MultiheadAttention`, once `split_attention` was applied."""

from dataclasses import replace

from .table import Architecture


_OPEN_CLIP = Architecture(
    backbones=("open_clip.transformer.VisionTransformer",),
    blocks="transformer.resblocks",
    patch_embedding="conv1",
    embeddings="",
    prefix_tokens=("class_embedding",),
    input_norms=("ln_pre",),
    norms=("ln_post",),
    norm1=("ln_1",),
    query=("attn.q_proj",),
    key=("attn.k_proj",),
    value=("attn.v_proj",),
    output=("attn.out_proj",),
    norm2=("ln_2",),
    fc1=("mlp.c_fc",),
    fc2=("mlp.c_proj",),
    drop_path=(),
    heads=(),
    prompts="sequence",
    remedy="Its attention keeps them in one parameter: call hf_visual_peft.split_attention(model) first.",
)
_TORCHVISION = replace(
    _OPEN_CLIP,
    backbones=("torchvision.models.vision_transformer.VisionTransformer",),
    blocks="encoder.layers",
    patch_embedding=("conv_proj.conv_last", "conv_proj"),
    prefix_tokens=("class_token",),
    input_norms=(),
    norms=("encoder.ln",),
    query=("self_attention.q_proj",),
    key=("self_attention.k_proj",),
    value=("self_attention.v_proj",),
    output=("self_attention.out_proj",),
    fc1=("mlp.0",),
    fc2=("mlp.3",),
    own_heads=("heads.head",),
)

TORCH_ATTENTION = (_OPEN_CLIP, _TORCHVISION)
