"""Role tables of convolutional networks: blocks whose operations have no role of a transformer's block."""

from dataclasses import replace

from .table import Architecture


_RESNET = Architecture(
    backbones=("ResNetModel", "ResNetBackbone"),
    blocks="encoder.stages.*.layers",
    patch_embedding="embedder.embedder.convolution",
    embeddings="embedder",
    prefix_tokens=(),
    norms=(),
    between="all",
    norm1=(),
    query=(),
    key=(),
    value=(),
    output=(),
    norm2=(),
    fc1=(),
    fc2=(),
    operations="all",
    drop_path=(),
    sublayers=(),
    softmax=False,
    prompts=None,
    grid=None,
)
_RT_DETR_RESNET = replace(
    _RESNET,
    backbones=("RTDetrResNetBackbone",),
    patch_embedding="embedder.embedder.0.convolution",
)
_REGNET = replace(_RESNET, backbones=("RegNetModel",))
_BIT = replace(_RESNET, backbones=("BitModel",), patch_embedding="embedder.convolution")
_EFFICIENTNET = replace(
    _RESNET,
    backbones=("EfficientNetModel",),
    blocks="encoder.blocks",
    patch_embedding="embeddings.convolution",
    embeddings="embeddings",
)
_MOBILENET_V1 = replace(
    _RESNET,
    backbones=("MobileNetV1Model",),
    blocks="layer",
    patch_embedding="conv_stem.convolution",
    embeddings="conv_stem",
)
_MOBILENET_V2 = replace(
    _MOBILENET_V1,
    backbones=("MobileNetV2Model",),
    patch_embedding="conv_stem.first_conv.convolution",
)
_HGNET_V2 = replace(
    _RESNET,
    backbones=("HGNetV2ForImageClassification", "HGNetV2Backbone"),
    blocks="encoder.stages.*.blocks",
    patch_embedding="embedder.stem1.convolution",
    own_heads=("fc",),
)
_PP_LCNET = replace(
    _RESNET,
    backbones=("PPLCNetForImageClassification", "PPLCNetBackbone"),
    blocks="encoder.blocks.*.layers",
    patch_embedding="encoder.convolution.convolution",
    embeddings="encoder.convolution",
    own_heads=("head",),
)
_TEXTNET = replace(
    _RESNET,
    backbones=("TextNetModel",),
    blocks="encoder.stages.*.stage",
    patch_embedding="stem.conv",
    embeddings="stem",
    heads=("fc",),
)
_CONVNEXT = replace(
    _RESNET,
    backbones=("ConvNextModel", "ConvNextV2Model"),
    patch_embedding="embeddings.patch_embeddings",
    embeddings="embeddings",
    input_norms=("embeddings.layernorm",),
    norms=("layernorm",),
    norm2=("layernorm",),
    fc1=("pwconv1",),
    fc2=("pwconv2",),
    drop_path=("drop_path",),
    stream="channels_first",
    grid="map",
)
_CONVNEXT_BACKBONE = replace(
    _CONVNEXT,
    backbones=("ConvNextBackbone", "ConvNextV2Backbone"),
    norms=("hidden_states_norms.*",),
)
_DINOV3_CONVNEXT = replace(
    _CONVNEXT,
    backbones=("DINOv3ConvNextModel", "DINOv3ConvNextBackbone"),
    blocks="model.stages.*.layers",
    patch_embedding="model.stages.0.downsample_layers.0",
    embeddings="model.stages.0.downsample_layers",
    input_norms=("model.stages.0.downsample_layers.1",),
    norms=("layer_norm",),
    norm2=("layer_norm",),
    fc1=("pointwise_conv1",),
    fc2=("pointwise_conv2",),
)

CONVOLUTIONAL = (
    _RESNET,
    _RT_DETR_RESNET,
    _REGNET,
    _BIT,
    _EFFICIENTNET,
    _MOBILENET_V1,
    _MOBILENET_V2,
    _HGNET_V2,
    _PP_LCNET,
    _TEXTNET,
    _CONVNEXT,
    _CONVNEXT_BACKBONE,
    _DINOV3_CONVNEXT,
)
