"""Which backbone of several is adapted, and what is said where none can be."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from families import FAMILIES, images
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

import hf_visual_peft as hvp


VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 64}


class Pair(nn.Module):
    """Two backbones of one class, one of another in a module of its own, and a head."""

    def __init__(self):
        super().__init__()
        self.near, self.far = FAMILIES["dinov2"].backbone(), FAMILIES["dinov2"].backbone()
        self.held = nn.ModuleDict({"inner": FAMILIES["vit"].backbone()})
        self.classifier = nn.Linear(48, 3)

    def forward(self, pixel_values):
        towers = (self.near, self.far, self.held["inner"])
        return self.classifier(torch.cat([tower(pixel_values).last_hidden_state[:, 0] for tower in towers], dim=1))


def video_llava():
    towers = {"vision_config": tf.CLIPVisionConfig(**VIT), "text_config": tf.LlamaConfig(**TEXT)}
    return tf.VideoLlavaForConditionalGeneration(tf.VideoLlavaConfig(**towers))


def adapted_below(model):
    """First parts of the names of what trains but the head."""
    names = (n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad)
    return {name.split(".")[0] for name in names if not name.startswith("classifier")}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "config", [hvp.AdaptFormerConfig(r=4), hvp.SSFConfig(), hvp.VPTConfig(num_virtual_tokens=2), hvp.LSTConfig(r=4)]
)
@pytest.mark.parametrize("named", ["near", "far", "held.inner", "held"])
@pytest.mark.filterwarnings("ignore:No task head")
def test_a_path_chooses(config, named, tmp_path):
    model = Pair()
    with pytest.raises(
        hvp.BackboneError, match=r"several .*'near' \(Dinov2Model\), 'far' .*'held.inner' \(ViTModel\)"
    ):
        get_peft_model(model, config)
    chosen = hvp.with_visual_targets(config, model, backbone=named)
    assert config.backbone is None
    assert chosen.backbone == named
    base = copy.deepcopy(model)
    model = get_peft_model(model, chosen).eval()
    assert adapted_below(model) == {named.partition(".")[0]}
    with torch.no_grad():
        for _name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)
        answer = model(**images(2))
        model.save_pretrained(tmp_path)
        assert PeftConfig.from_pretrained(tmp_path).backbone == named
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(**images(2)), answer)
        with model.disable_adapter():
            assert not torch.equal(model(**images(2)), answer)


@pytest.mark.parametrize("named", ["near", "far", "held"])
def test_a_path_chooses_for_methods_of_peft(named):
    model = Pair()
    with pytest.raises(hvp.BackboneError, match=r"several .*with_visual_targets\(config, model, backbone='near'\)"):
        hvp.with_visual_targets(LoraConfig(), model)
    config = hvp.with_visual_targets(LoraConfig(r=2), model, backbone=named)
    assert {path.partition(".")[0] for path in config.target_modules} == {named}
    assert config.modules_to_save == ["classifier"]
    assert adapted_below(get_peft_model(model, config)) == {named}


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("nearest", r"'nearest': Pair has no such module\. Pair has 'near' \(Dinov2Model\), 'far'"),
        ("near.encoder", r"'near.encoder', which is a part of the backbone 'near' \(Dinov2Model\)"),
        ("classifier", r"Linear \('classifier' in Pair\) is no vision backbone"),
        ("", r"several vision backbones: 'near'"),
    ],
)
@pytest.mark.parametrize("config", [hvp.SSFConfig(), LoraConfig()], ids=["ours", "peft"])
def test_a_path_without_a_backbone_is_refused(named, message, config):
    model = Pair()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, hvp.with_visual_targets(config, model, backbone=named))
    with pytest.raises(hvp.BackboneError, match=message):
        hvp.find_backbone(model, named)
    assert state(model).keys() == before.keys()
    assert not any(hasattr(module, "base_layer") for module in model.modules())


def test_a_path_is_a_string_and_not_beside_target_modules():
    with pytest.raises(ValueError, match=r"SSFConfig.backbone is 3: must be None or the path of a module"):
        hvp.SSFConfig(backbone=3)
    with pytest.raises(ValueError, match=r"SSFConfig.backbone is 'near': must be None, .* where target_modules"):
        hvp.SSFConfig(backbone="near", target_modules=["q_proj"])


def test_the_only_backbone_may_be_named():
    model = FAMILIES["vit"].model()
    assert hvp.find_backbone(model, "vit") == hvp.find_backbone(model, "") == hvp.find_backbone(model)


def test_later_adapters_take_the_backbone_of_the_first():
    model = get_peft_model(Pair(), hvp.SSFConfig(backbone="far"))
    model.add_adapter("again", hvp.SSFConfig())
    assert hvp.find_backbone(model.get_base_model()).path == "far"
    names = [name for name, _ in model.named_parameters() if ".again." in name and "classifier" not in name]
    assert names
    assert all(".far." in name for name in names)
    before = state(model)
    with pytest.raises(ValueError, match=r"the adapter 'default' acts on 'far', and this one would act on 'near'"):
        model.add_adapter("other", hvp.SSFConfig(backbone="near"))
    assert state(model).keys() == before.keys()
    model.add_adapter("same", hvp.SSFConfig(backbone="far"))


def test_towers_of_a_multimodal_model():
    model = video_llava()
    with pytest.raises(hvp.BackboneError, match=r"'model.video_tower' \(CLIPVisionModel\), 'model.image_tower'"):
        hvp.find_backbone(model)
    for tower in ("video_tower", "image_tower"):
        assert hvp.find_backbone(model, f"model.{tower}").path == f"model.{tower}"
    with pytest.raises(hvp.BackboneError, match=r"'model' of VideoLlava.* several vision backbones"):
        hvp.find_backbone(model, "model")
    with pytest.raises(hvp.BackboneError, match=r"'model.language_model' in VideoLlava"):
        hvp.find_backbone(model, "model.language_model")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Unlisted(nn.Module):
    """A network of a class that no table knows."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x.mean(dim=1)


class TwoUnlisted(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = Unlisted(), Unlisted()
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(torch.cat([self.left(x), self.right(x)], dim=1))


def test_a_path_chooses_among_networks_without_a_table():
    model = TwoUnlisted()
    with pytest.raises(hvp.BackboneError, match=r"several .*'left' \(Unlisted\), 'right'.*backbone='left'"):
        get_peft_model(model, hvp.SSFConfig())
    adapted = get_peft_model(model, hvp.SSFConfig(backbone="right", modules_to_save=[]))
    assert adapted_below(adapted) == {"right"}
    adapted(torch.randn(1, 3, 32, 32)).sum().backward()
