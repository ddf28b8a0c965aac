from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from families import DEPTH, FAMILIES, PATCH, WIDTH
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification, ViTModel

import hf_visual_peft
from hf_visual_peft import AdaptFormerConfig, Architecture, BackboneError, ConvpassConfig, SSFConfig, VPTConfig
from hf_visual_peft.backbones.architectures.table import _ARCHITECTURES
from hf_visual_peft.backbones.backbone import BLOCK_ROLES


@pytest.fixture
def _tables(monkeypatch):
    """Tables registered in a test are gone after it."""
    monkeypatch.setattr("hf_visual_peft.backbones.architectures.table._ARCHITECTURES", copy.deepcopy(_ARCHITECTURES))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("bare", [False, True], ids=["head", "bare"])
def test_every_family_resolves(family, bare):
    model = family.backbone() if bare else family.model()
    backbone = hf_visual_peft.find_backbone(model)
    assert backbone.depth == len(backbone.blocks) == DEPTH
    assert backbone.width == WIDTH
    assert backbone.prefix_tokens == family.prefix
    assert backbone.patch_features == 3 * PATCH * PATCH
    for index, block in enumerate(backbone.blocks):
        assert block.index == index
        assert block.path.endswith(f".{index}")
        for role in BLOCK_ROLES:
            for path in block.roles[role]:
                expected = nn.LayerNorm if role.startswith("norm") else nn.Linear
                assert isinstance(model.get_submodule(path), expected)
    assert all(isinstance(model.get_submodule(path), nn.LayerNorm) for path in backbone.norms)
    if family.classifier is None or bare:
        assert backbone.heads == ()
    else:
        assert backbone.heads
        assert all(model.get_submodule(path).out_features == 3 for path in backbone.heads)
    assert pickle.loads(pickle.dumps(backbone)) == backbone


def test_distilled_model_trains_both_heads():
    backbone = hf_visual_peft.find_backbone(FAMILIES["deit_teacher"].model())
    assert backbone.heads == ("cls_classifier", "distillation_classifier")


def test_head_without_weights_is_none():

    model = ViTForImageClassification(
        ViTConfig(num_labels=0, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    assert hf_visual_peft.find_backbone(model).heads == ()


def test_the_same_backbone_is_found_under_an_adapter():
    model = FAMILIES["dinov2_registers"].model()
    before = hf_visual_peft.find_backbone(model)
    for config in (AdaptFormerConfig(r=4), SSFConfig(), VPTConfig()):
        adapted = get_peft_model(model, config)
        assert hf_visual_peft.find_backbone(adapted.get_base_model()) == before
        model = adapted.unload()


def test_model_inside_a_larger_one():
    """The head belongs to the model around the backbone; other parts are left alone."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = FAMILIES["vit"].model()
            self.neck = nn.Linear(3, 3)

        def forward(self, pixel_values):
            return self.neck(self.encoder(pixel_values).logits)

    with pytest.warns(
        UserWarning, match="'neck': frozen, 'encoder.classifier': trained with the adapter; name modules"
    ):
        model = get_peft_model(Detector(), AdaptFormerConfig(r=4))
    assert model.peft_config["default"].modules_to_save == ["encoder.classifier"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("neck" in name for name in trained)


def test_text_model_is_refused():
    model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    before = dict(model.named_modules())
    for method in hf_visual_peft.list_methods().values():
        with pytest.raises(BackboneError, match="^BertModel has no vision backbone: none of its parts takes images"):
            get_peft_model(model, method.config_cls())
    assert dict(model.named_modules()) == before


def test_two_backbones_are_refused():
    model = nn.ModuleDict({"left": FAMILIES["vit"].model(), "right": FAMILIES["beit"].model()})
    with pytest.raises(BackboneError, match=r"'left.vit' \(ViTModel\), 'right.beit' \(BeitModel\)"):
        get_peft_model(model, VPTConfig())


class OwnBlock(nn.Module):
    """A block of a user's own, with one linear for queries, keys and values."""

    def __init__(self, width):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.ln1(x)).chunk(3, dim=-1)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.down(self.up(self.ln2(x)).relu())


class OwnViT(nn.Module):
    """A vision transformer of a user's own."""

    def __init__(self, width=8, depth=2):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.stem = nn.Identity()
        self.stem.cls = nn.Parameter(torch.randn(1, 1, width))
        self.body = nn.ModuleList(OwnBlock(width) for _ in range(depth))
        self.last = nn.LayerNorm(width)

    def forward(self, pixel_values):
        x = self.patch(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.stem.cls.expand(len(x), -1, -1), x], dim=1)
        for block in self.body:
            x = block(x)
        return self.last(x)


class OwnClassifier(nn.Module):
    """And its head."""

    def __init__(self):
        super().__init__()
        self.vit, self.task = OwnViT(), nn.Linear(8, 3)

    def forward(self, pixel_values):
        return self.task(self.vit(pixel_values)[:, 0])


OWN = Architecture(
    backbones=("OwnViT",),
    blocks="body",
    patch_embedding="patch",
    embeddings="stem",
    prefix_tokens=("cls",),
    norms=("last",),
    norm1=("ln1",),
    query=("qkv",),
    key=("qkv",),
    value=("qkv",),
    output=("proj",),
    norm2=("ln2",),
    fc1=("up",),
    fc2=("down",),
    drop_path=(),
    heads=("task",),
    prompts="sequence",
)


@pytest.mark.usefixtures("_tables")
def test_a_users_own_architecture():
    pixels = torch.randn(2, 3, 16, 8)
    torch.manual_seed(0)
    model = OwnClassifier().eval()
    before = model(pixels)
    assert hf_visual_peft.find_backbone(model).architecture.query == ("qkv",)  # found without a table, too
    hf_visual_peft.register_architecture(OWN)
    for config in (VPTConfig(), VPTConfig(deep=False), AdaptFormerConfig(r=4), ConvpassConfig(r=4), SSFConfig()):
        config.init_weights = False
        adapted = get_peft_model(model, config)
        assert adapted.peft_config["default"].modules_to_save == ["task"]
        out = adapted(pixels)
        assert not torch.allclose(out, before)
        out.sum().backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
        model = adapted.unload()
        assert torch.equal(model(pixels), before)


@pytest.mark.usefixtures("_tables")
def test_subclasses_have_the_table_of_their_base():
    class MyViT(ViTModel):
        pass

    model = MyViT(FAMILIES["vit"].model().config)
    assert hf_visual_peft.find_backbone(model).class_name == "MyViT"
    hf_visual_peft.register_architecture(dataclasses.replace(OWN, backbones=("MyViT",)))  # the nearest table counts
    with pytest.raises(BackboneError, match=r"MyViT does not fit its role table.*'blocks' \(looked for body\)"):
        hf_visual_peft.find_backbone(model)


@pytest.mark.usefixtures("_tables")
def test_table_that_contradicts_the_model():
    hf_visual_peft.register_architecture(dataclasses.replace(OWN, fc2=("shrink",)))
    with pytest.raises(BackboneError, match=r"OwnViT.*'vit.body.0' has no 'fc2' \(looked for shrink\)"):
        get_peft_model(OwnClassifier(), VPTConfig())
    hf_visual_peft.register_architecture(dataclasses.replace(OWN, blocks="last"))
    with pytest.raises(BackboneError, match="'vit.last' is a LayerNorm and not a non-empty nn.ModuleList"):
        get_peft_model(OwnClassifier(), VPTConfig())
    with pytest.raises(ValueError, match="Architecture.backbones is empty"):
        hf_visual_peft.register_architecture(dataclasses.replace(OWN, backbones=()))


@torch.no_grad()
def test_two_methods_on_the_same_blocks():
    """VPT and AdaptFormer share a block layer; prompts pass through the branch like any token."""
    family = FAMILIES["vit"]
    model = family.model()
    model.add_adapter(VPTConfig(num_virtual_tokens=2, init_weights=False, modules_to_save=[]), adapter_name="prompts")
    prompts = model.eval()(**family.inputs(2)).logits
    model.add_adapter(AdaptFormerConfig(r=4, init_weights=False, modules_to_save=[]), adapter_name="branch")
    model.set_adapter(["prompts", "branch"])
    together = model.eval()(**family.inputs(2)).logits
    assert not torch.allclose(together, prompts)
    model.set_adapter("prompts")
    assert torch.equal(model.eval()(**family.inputs(2)).logits, prompts)
