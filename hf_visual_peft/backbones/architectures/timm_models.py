"""Role tables of timm's models, as they are and inside transformers' `TimmWrapperModel`."""

from dataclasses import replace

from .convolutional import CONVOLUTIONAL
from .table import Architecture


_RESNET_LIKE = CONVOLUTIONAL[0]
_VIT = Architecture(
    backbones=("timm.models.vision_transformer.VisionTransformer",),
    blocks="blocks",
    patch_embedding="patch_embed.proj",
    embeddings="",
    prefix_tokens=("cls_token", "reg_token"),
    input_norms=("norm_pre", "patch_embed.norm"),
    norms=("norm", "fc_norm"),
    norm1=("norm1",),
    query=("attn.qkv",),
    key=("attn.qkv",),
    value=("attn.qkv",),
    output=("attn.proj",),
    norm2=("norm2",),
    drop_path=("drop_path1", "drop_path2"),
    heads=(),
    own_heads=("head", "head_dist"),
    prompts="sequence",
    post_norm_blocks=("ResPostBlock",),
)
_EVA = replace(
    _VIT,
    backbones=("timm.models.eva.Eva",),
    query=("attn.qkv", "attn.q_proj"),
    key=("attn.qkv", "attn.k_proj"),
    value=("attn.qkv", "attn.v_proj"),
    fc1=("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x"),
    operations=("mlp.norm", "attn.norm"),
    post_norm_blocks=("EvaBlockPostNorm",),
    prompts="keys",
)
_SWIN = replace(
    _VIT,
    backbones=("timm.models.swin_transformer.SwinTransformer",),
    blocks="layers.*.blocks",
    embeddings="patch_embed",
    prefix_tokens=(),
    input_norms=("patch_embed.norm",),
    norms=("norm",),
    between=("layers.*.downsample.norm", "layers.*.downsample.reduction"),
    own_heads=("head.fc",),
    stream="channels_last",
    prompts="keys",
    grid="map",
)
_MAXVIT = replace(
    _VIT,
    backbones=("timm.models.maxxvit.MaxxVit",),
    blocks="stages.*.blocks.*",
    patch_embedding="stem.conv1",
    embeddings="stem",
    prefix_tokens=(),
    input_norms=(),
    norms=(),
    between="all",
    skipped_blocks=("MbConvBlock", "ConvNeXtBlock"),
    own_heads=("head.fc",),
    stream="channels_last",
    prompts="keys",
    grid="map",
)
_EFFICIENTFORMER = replace(
    _RESNET_LIKE,
    backbones=("timm.models.efficientformer_v2.EfficientFormerV2",),
    blocks="stages.*.blocks",
    patch_embedding="stem.conv1.conv",
    embeddings="stem",
    fc1=("mlp.fc1.conv",),
    fc2=("mlp.fc2.conv",),
    heads=(),
    own_heads=("head", "head_dist"),
    sublayers=("mlp",),
    reads_mlp="mlp",
    stream="channels_first",
    grid="map",
)
_CONVNEXT = replace(
    _RESNET_LIKE,
    backbones=("timm.models.convnext.ConvNeXt",),
    blocks="stages.*.blocks",
    patch_embedding="stem",
    embeddings="stem",
    input_norms=("stem.*",),
    norms=("norm_pre", "head.norm"),
    norm2=("norm",),
    fc1=("mlp.fc1",),
    fc2=("mlp.fc2",),
    drop_path=("drop_path",),
    heads=(),
    own_heads=("head.fc",),
    stream="channels_first",
    grid="map",
)
_RESNET = replace(
    _RESNET_LIKE,
    backbones=("timm.models.resnet.ResNet",),
    blocks=("layer1", "layer2", "layer3", "layer4"),
    patch_embedding="conv1",
    embeddings="",
    heads=(),
    own_heads=("fc",),
)

# as `features_only=True` makes them: without heads, with modules of the first two levels side by side
_LIST = "timm.models._features.FeatureListNet"
_RESNET_MAPS = replace(_RESNET, backbones=(f"{_LIST}:layer1",))
_CONVNEXT_MAPS = replace(
    _CONVNEXT,
    backbones=(f"{_LIST}:stem_0",),
    blocks="stages_*.blocks",
    patch_embedding=("stem_2", "stem_1", "stem_0"),
    embeddings="stem_1",
    input_norms=("stem_*",),
    norms=(),
)
_SWIN_MAPS = replace(
    _SWIN,
    backbones=(f"{_LIST}:layers_0",),
    blocks="layers_*.blocks",
    norms=(),
    between=("layers_*.downsample.norm", "layers_*.downsample.reduction"),
)

TIMM = (_VIT, _EVA, _SWIN, _MAXVIT, _EFFICIENTFORMER, _CONVNEXT, _RESNET, _RESNET_MAPS, _CONVNEXT_MAPS, _SWIN_MAPS)
