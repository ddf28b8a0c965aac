"""Role tables of the text towers of dual encoders, which `tower="text"` and `tower="both"` adapt."""

from dataclasses import replace

from .table import Architecture


_CLIP_TEXT = Architecture(
    backbones=("CLIPTextModel", "MetaClip2TextModel", "SiglipTextModel", "Siglip2TextModel"),
    blocks="encoder.layers",
    patch_embedding=(),
    prefix_tokens=(),
    norms=("final_layer_norm",),
    norm1=("layer_norm1",),
    query=("self_attn.q_proj",),
    key=("self_attn.k_proj",),
    value=("self_attn.v_proj",),
    output=("self_attn.out_proj",),
    norm2=("layer_norm2",),
    heads=(),
    drop_path=(),
    grid=None,
)
_BERT = Architecture(
    backbones=(
        "AlignTextModel",
        "BertModel",
        "CamembertModel",
        "ChineseCLIPTextModel",
        "ElectraModel",
        "RobertaModel",
        "XLMRobertaModel",
    ),
    blocks="encoder.layer",
    patch_embedding=(),
    prefix_tokens=(),
    norms=(),
    input_norms=("embeddings.LayerNorm",),
    norm1=("attention.output.LayerNorm",),
    query=("attention.self.query",),
    key=("attention.self.key",),
    value=("attention.self.value",),
    output=("attention.output.dense",),
    norm2=("output.LayerNorm",),
    fc1=("intermediate.dense",),
    fc2=("output.dense",),
    heads=(),
    drop_path=(),
    post_norm=True,
    grid=None,
)
_ALTCLIP = replace(
    _BERT,
    backbones=("AltCLIPTextModel",),
    blocks=("roberta.encoder.layers", "roberta.encoder.layer"),
    embeddings="roberta.embeddings",
    input_norms=("roberta.embeddings.LayerNorm",),
    norms=("pre_LN",),
)
_OPEN_CLIP = replace(
    _CLIP_TEXT,
    backbones=("open_clip.transformer.TextTransformer", "open_clip.model.CLIP"),
    blocks="transformer.resblocks",
    embeddings="",
    norms=("ln_final",),
    norm1=("ln_1",),
    query=("attn.q_proj",),
    key=("attn.k_proj",),
    value=("attn.v_proj",),
    output=("attn.out_proj",),
    norm2=("ln_2",),
    fc1=("mlp.c_fc",),
    fc2=("mlp.c_proj",),
    remedy="Its attention keeps them in one parameter: call hf_visual_peft.split_attention(model) first.",
)

TEXT = (_CLIP_TEXT, _BERT, _ALTCLIP, _OPEN_CLIP)
