"""Models that differ from their family's table in a detail: stems, norms, prefix tokens, projections."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

import hf_visual_peft as hvp
from hf_visual_peft.backbones.architectures import architecture_of
from hf_visual_peft.coverage.sizes import small_config


timm = pytest.importorskip("timm")

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
CONVNEXT = {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}
RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}


def build(name, **fields):
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=3, **fields).eval()


def stirred(model, config):
    """The model with random adapter weights."""
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "modules_to_save" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return adapted.eval()


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"])
def test_timm_tells_how_many_tokens_come_first(name):
    model = build(name, **VIT)
    backbone = hvp.find_backbone(model)
    assert backbone.prefix_tokens == model.num_prefix_tokens == (2 if "distilled" in name else 1)
    assert backbone.heads == (("head", "head_dist") if "distilled" in name else ("head",))
    adapted = stirred(model, hvp.ConvpassConfig(r=4))
    adapted(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "expected"), [("resnet10t", "conv1.6"), ("resnet18d", "conv1.6"), ("resnet18", "conv1")]
)
def test_a_deep_stem_ends_in_the_patch_embedding(name, expected):
    model = build(name, **RESNET)
    backbone = hvp.find_backbone(model)
    assert backbone.patch_embedding == (expected,)
    if expected != "conv1":
        assert {"conv1.0", "conv1.3"} <= set(backbone.between)
    pixels = torch.randn(2, 3, 64, 64)
    before = model(pixels)
    adapted = stirred(model, hvp.SSFConfig())
    assert not torch.allclose(adapted(pixels), before)
    with torch.no_grad():
        torch.testing.assert_close(adapted.merge_and_unload()(pixels), adapted(pixels))


def test_a_patch_embedding_that_leaves_the_work_to_its_stem():
    model = build("vit_base_mci_224", img_size=64, depth=1)
    assert isinstance(model.patch_embed.proj, nn.Identity)
    backbone = hvp.find_backbone(model)
    assert backbone.patch_embedding == ("patch_embed.backbone.2.conv",)
    stirred(model, hvp.ConvpassConfig(r=4))(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("name", "norms", "patches"),
    [("convnext_atto_ols", ("stem.2",), "stem.1"), ("convnext_zepto_rms_ols", ("stem.3",), "stem.2")],
)
def test_norms_of_a_stem_are_norms(name, norms, patches):
    """Of the modules in an overlapping stem, by their kind and not by their number."""
    backbone = hvp.find_backbone(build(name, **CONVNEXT))
    assert (backbone.input_norms, backbone.patch_embedding) == (norms, (patches,))
    assert "stem.0" in backbone.between


@pytest.mark.parametrize("name", ["vit_base_patch16_rpn_224", "eva02_base_patch14_224"])
def test_branches_beside_an_mlp_whose_norm_follows_read_the_stream(name):
    """AdaptFormer's branch reads what the MLP reads, and not what it returns."""
    blocks = {} if "rpn" in name else {"use_post_norm": True, "qkv_fused": False}
    model = build(name, **VIT, **blocks)
    assert {type(block).__name__ for block in model.blocks} <= {"ResPostBlock", "EvaBlockPostNorm"}
    assert all(block.post_norm for block in hvp.find_backbone(model).blocks)
    seen = {}
    model.blocks[0].mlp.register_forward_pre_hook(lambda _, args: seen.update(mlp=args[0]))
    adapted = stirred(model, hvp.AdaptFormerConfig(r=4))
    branch = next(m for name, m in adapted.named_modules() if name.endswith("adaptformer_mlp.default"))
    branch.register_forward_pre_hook(lambda _, args: seen.update(branch=args[0]))
    adapted(torch.randn(2, 3, 32, 32))
    assert torch.equal(seen["branch"], seen["mlp"])


def _circular(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1 and module.in_channels > 3:
            module.padding_mode = "circular"
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: build("resnet18", output_stride=8, **RESNET),
        lambda: build("skresnet18"),
        lambda: _circular(build("resnet18", **RESNET)),
    ],
    ids=["dilated", "dilated_in_part", "circular"],
)
def test_targets_for_lora_are_convolutions_that_it_can_stand_beside(make):
    model = make()
    config = hvp.with_visual_targets(LoraConfig(r=2), model)
    chosen = [model.get_submodule(path) for path in config.target_modules]
    assert chosen
    assert all(conv.padding_mode == "zeros" for conv in chosen)
    pixels = torch.randn(2, 3, 64, 64)
    adapted = stirred(model, config)
    expected = adapted(pixels)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(pixels), expected, rtol=1e-3, atol=1e-3)


def _bit(**fields):
    return tf.BitConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_groups=2, **fields)


def test_bit_as_a_backbone_and_under_a_transformer():
    backbone = hvp.find_backbone(tf.BitBackbone(_bit(out_features=["stage2", "stage4"])))
    assert (backbone.path, backbone.class_name) == ("bit", "BitModel")
    config = tf.DPTConfig(
        is_hybrid=True,
        backbone_config=_bit(out_features=["stage1", "stage2", "stage3"], global_padding="same"),
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=64,
        backbone_out_indices=[0, 1, 2, 3],
        backbone_featmap_shape=[1, 16, 4, 4],
        neck_hidden_sizes=[8, 8, 8, 8],
        neck_ignore_stages=[0, 1],
        fusion_hidden_size=8,
    )
    hybrid = tf.DPTForDepthEstimation(config)
    backbone = hvp.find_backbone(hybrid)
    assert (backbone.class_name, backbone.patch_embedding) == ("DPTModel", ("dpt.embeddings.projection",))
    adapted = stirred(hybrid, hvp.AdaptFormerConfig(r=4, modules_to_save=backbone.heads))
    adapted(pixel_values=torch.randn(1, 3, 64, 64)).predicted_depth.sum().backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if ".adaptformer_" in n)


class MaskedBias(nn.Linear):
    """A linear that does more than one: as DINOv3's own code has it, part of its bias is masked."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias * (torch.arange(self.out_features) % 2))


class Scaled(nn.Linear):
    """And one that changes its output."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", [MaskedBias, Scaled])
def test_linears_with_a_forward_of_their_own_keep_it(kind):
    """Where an equation changes weight and bias; one behind the module cannot merge into it, and says so."""
    torch.manual_seed(0)
    model = nn.Sequential(kind(6, 6))
    x = torch.randn(3, 6)
    adapted = stirred(model, hvp.RLRRConfig(target_modules=["0"], init_weights=False))
    expected = adapted(x)
    with torch.no_grad():
        torch.testing.assert_close(adapted.merge_and_unload()(x), expected)
    model = nn.Sequential(kind(6, 6))
    before = model[0].weight.clone()
    adapted = stirred(model, hvp.BitFitConfig(target_modules=["0"], init_weights=False))
    with pytest.raises(ValueError, match=f"Cannot merge an adapter into {kind.__name__}.*more than a linear"):
        adapted.merge_and_unload()
    assert torch.equal(model[0].weight, before)


def test_a_linear_of_another_class_that_does_the_same_merges():
    class Logged(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model, x = nn.Sequential(Logged(6, 6)), torch.randn(3, 6)
    adapted = stirred(model, hvp.SSFConfig(target_modules=["0"]))
    expected = adapted(x)
    with torch.no_grad():
        torch.testing.assert_close(adapted.merge_and_unload()(x), expected)


class Maps(nn.Module):
    """A user's module on one of timm's lists of maps."""

    def __init__(self, name, **fields):
        super().__init__()
        self.enc = timm.create_model(name, pretrained=False, features_only=True, **fields)
        self.out = nn.LazyLinear(3)

    def forward(self, pixels):
        x = self.enc(pixels)[-1]
        return self.out(x if self.enc.__class__.__name__ == "FeatureGetterNet" else x.flatten(1))


@pytest.mark.parametrize(
    ("name", "fields", "patches", "blocks"),
    [
        ("resnet18", RESNET, "enc.conv1", 4),
        ("resnet18d", RESNET, "enc.conv1.6", 4),
        ("convnext_atto", CONVNEXT, "enc.stem_0", 4),
        ("convnext_atto_ols", CONVNEXT, "enc.stem_1", 4),
        ("convnext_zepto_rms_ols", CONVNEXT, "enc.stem_2", 4),
        ("vit_tiny_patch16_224", VIT | {"out_indices": (0, 1)}, "enc.model.patch_embed.proj", 2),
        ("swin_tiny_patch4_window7_224", {"img_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2),
                                          "window_size": 2, "out_indices": (0, 1)}, "enc.patch_embed.proj", 2),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:No table names")
def test_timms_lists_of_maps(name, fields, patches, blocks):
    torch.manual_seed(0)
    model, pixels = Maps(name, **fields).eval(), torch.randn(2, 3, 32, 32)
    before = model(pixels)
    backbone = hvp.find_backbone(model)
    assert (backbone.patch_embedding, len(backbone.blocks), backbone.heads) == ((patches,), blocks, ("out",))
    adapted = stirred(model, hvp.BitFitConfig())
    output = adapted(pixels)
    assert not torch.allclose(output, before)
    output.sum().backward()
    assert [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("kind", ["DabDetr", "TableTransformer"])
def test_detectors_on_timms_resnet(kind):
    """Their default config."""
    config = getattr(tf, f"{kind}Config")(encoder_layers=1, decoder_layers=1)
    with torch.device("meta"):
        model = getattr(tf, f"{kind}ForObjectDetection")(config)
    backbone = hvp.find_backbone(model)
    assert (backbone.class_name, len(backbone.blocks), backbone.dense) == ("FeatureListNet", 16, True)
    assert len(backbone.heads) == 2


BEIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "fields", "called"),
    [
        ("beit_base_patch16_224", BEIT, False),
        ("eva02_base_patch14_224", BEIT | {"qkv_fused": True}, False),
        ("eva02_base_patch14_224", BEIT | {"qkv_fused": True, "qkv_bias": False}, True),
        ("swinv2_tiny_window8_256", {"img_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2),
                                     "window_size": 2}, False),
        ("vit_tiny_patch16_224", VIT, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("config", [hvp.SSFConfig, hvp.BitFitConfig])
def test_named_targets_that_are_read_and_not_called(name, fields, called, config):
    model, pixels = build(name, **fields), torch.randn(2, 3, 32, 32)
    before = model(pixels)
    keys = list(model.state_dict())
    if called:
        adapted = stirred(model, hvp.SSFConfig(target_modules=["qkv"]))
        assert not torch.allclose(adapted(pixels), before)
        return
    with pytest.raises(ValueError, match=r"target_modules: '.*attn.qkv'.*without calling the module.*exclude_modules"):
        get_peft_model(model, config(target_modules=["qkv", "proj"]))
    assert list(model.state_dict()) == keys
    adapted = stirred(model, config(target_modules=["qkv", "proj"], exclude_modules=["qkv"]))
    assert not torch.equal(adapted(pixels), before)


class Listed(nn.Module):
    """A block that is called with a list of images' tokens, as in DINOv3's own code."""

    num_heads = 1

    def __init__(self, packed):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.packed = packed

    def one(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])[0])
        return x + self.fc2(self.fc1(self.norm2(x)).relu())

    def forward(self, x):
        return self.one(x) if self.packed else [self.one(each) for each in x]


class ListedTower(nn.Module):
    def __init__(self, packed):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, 8)
        self.layers = nn.ModuleList(Listed(packed) for _ in range(2))
        self.packed = packed

    def forward(self, pixels):
        x = self.embed(pixels).flatten(2).transpose(1, 2)
        x = x.flatten(0, 1) if self.packed else list(x)
        for layer in self.layers:
            x = layer(x)
        return x if self.packed else torch.cat(x)


@pytest.fixture
def _tables(monkeypatch):
    from hf_visual_peft.backbones.architectures.table import _ARCHITECTURES

    monkeypatch.setattr("hf_visual_peft.backbones.architectures.table._ARCHITECTURES", copy.deepcopy(_ARCHITECTURES))
    fused = dict.fromkeys(("query", "key", "value"), ("qkv",))
    table = hvp.Architecture(
        backbones=("ListedTower",), blocks="layers", patch_embedding="embed", embeddings="embed", prefix_tokens=(),
        norms=(), norm1=("norm1",), **fused, output=("proj",), norm2=("norm2",), fc1=("fc1",), fc2=("fc2",),
        drop_path=(), prompts="sequence",
    )  # fmt: skip
    hvp.register_architecture(table)


@pytest.mark.usefixtures("_tables")
@pytest.mark.parametrize("packed", [True, False])
def test_blocks_that_get_no_batch_of_sequences_say_what_works(packed):
    pixels, what = torch.randn(2, 3, 32, 32), "a stream of 2 dimensions" if packed else "a list"
    refused = set()
    for name, method in hvp.list_methods().items():
        if method.video or method.calibrated or name in ("attnscale", "linearprobe", "vqt"):
            continue
        sized = hasattr(method.config_cls, "prompt_size")  # the tower does not say a size
        config = small_config(method, **({"prompt_size": 32} if sized else {}))
        if name == "cvpt":  # which tries the attention before the first call: here it is the whole block's forward
            with pytest.raises(ValueError, match="The attention of Listed cannot be that of tokens to others"):
                get_peft_model(ListedTower(packed), config)
            continue
        model = get_peft_model(ListedTower(packed), config)
        try:
            model(pixels)
        except ValueError as error:
            listed = str(error)
            refused.add(name)
    assert listed.startswith(f"Listed gets {what}, where methods at blocks need (batch, tokens, width)")
    assert "acts on linears and norms, such as SSF, BitFit or peft's LoRA" in listed
    assert not {"adapterbias", "bitfit", "fact", "repadapter", "rlrr", "snell", "ssf"} & refused
    assert {"vpt", "adaptformer", "lst", "convpass"} <= refused


@pytest.mark.usefixtures("_tables")
def test_a_table_that_has_norms_before_what_they_follow_is_refused_at_the_first_call():
    class Post(Listed):
        def one(self, x):
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            x = x + self.norm1(self.proj(nn.functional.scaled_dot_product_attention(q, k, v)))
            return x + self.norm2(self.fc2(self.fc1(x).relu()))

    def tower():
        model = ListedTower(packed=False)
        model.layers = nn.ModuleList(Post(packed=True) for _ in range(2))
        model.forward = lambda pixels: model.layers[0](model.embed(pixels).flatten(2).transpose(1, 2))
        return model

    pixels = torch.randn(2, 3, 16, 16)
    model = get_peft_model(tower(), hvp.AdaptFormerConfig(r=2))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'layers.0.qkv' is called before 'layers.0.norm1'.*post_norm=True"):
            model(pixels)
    table = architecture_of(tower())
    hvp.register_architecture(dataclasses.replace(table, post_norm_blocks=("Post",)))
    get_peft_model(tower(), hvp.AdaptFormerConfig(r=2))(pixels)


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (["vision_model"], ""),
        (["encoder"], ""),
        (r".*\.encoder", ""),
        (["mlp"], "self_attn"),
        (["layers.1"], "layers.0"),
    ],
)
def test_a_module_that_is_left_alone_is_so_with_all_that_lies_in_it(names, left):
    """A name of the tower is not passed by in silence."""
    config = tf.CLIPConfig(vision_config=VISION, text_config=VISION | {"vocab_size": 9, "eos_token_id": 1})
    model = tf.CLIPModel(config)
    if not left:
        with pytest.raises(
            ValueError, match=r"exclude_modules is .*no block is left to adapt in CLIPVisionModel.*target_modules"
        ):
            get_peft_model(model, hvp.SSFConfig(exclude_modules=names))
        return
    adapted = get_peft_model(model, hvp.SSFConfig(exclude_modules=names))
    inside = [name for name, p in adapted.named_parameters() if p.requires_grad and ".layers." in name]
    assert any(left in name for name in inside)
    assert not any(f".{names[0]}." in name for name in inside)


VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION |= {"image_size": 32, "patch_size": 8}


def test_several_towers():
    with torch.device("meta"):
        model = nn.ModuleDict({name: tf.ViTModel(tf.ViTConfig()) for name in ("left", "right")})
    with pytest.raises(hvp.BackboneError, match=r"'left' \(ViTModel\), 'right' .* backbone='left' in the config"):
        get_peft_model(model, hvp.VPTConfig())
