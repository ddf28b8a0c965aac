"""Which blocks the model around a backbone reads: adapters and side networks stand there and nowhere else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers as tf
from families import FAMILIES, images
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import hf_visual_peft as hvp
from hf_visual_peft.backbones import probing
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.coverage.sizes import small_config


VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
VIT |= {"image_size": 32, "patch_size": 8}
FOUR = VIT | {"num_hidden_layers": 4}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 64}
IMAGE = 63


def llava(layer=-2, tower=tf.CLIPVisionConfig, kind=tf.LlavaForConditionalGeneration, config=tf.LlavaConfig):
    torch.manual_seed(0)
    fields = {"vision_config": tower(**VIT), "text_config": tf.LlamaConfig(**TEXT), "vision_feature_layer": layer}
    strategy = "default" if tower is tf.CLIPVisionConfig else "full"
    return kind(config(**fields, image_token_index=IMAGE, vision_feature_select_strategy=strategy)).eval()


def answer(model):
    ids = torch.tensor([[1] + [IMAGE] * 16 + [5, 6]])
    return model(input_ids=ids, **images(1)).logits


@pytest.mark.parametrize(
    ("layer", "tower", "read"),
    [
        (-2, tf.CLIPVisionConfig, 2),
        (-1, tf.CLIPVisionConfig, 3),
        ([-3, -2], tf.CLIPVisionConfig, 2),
        (1, tf.CLIPVisionConfig, 1),
        (-2, tf.SiglipVisionConfig, 2),
    ],
)
def test_feature_layer_of_a_multimodal_model(layer, tower, read):
    backbone = hvp.find_backbone(llava(layer, tower))
    assert (len(backbone.blocks), backbone.depth, backbone.unread) == (read, read, 3 - read)
    assert backbone.final_norms == ()  # of what is returned beside the features


@pytest.mark.parametrize("layer", [0, [0], -4, [-4]])
def test_a_model_that_reads_no_block_is_refused(layer):
    """-4 is the state before the first of three blocks."""
    model = llava(layer)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"LlavaForCond.* reads none of the 3 blocks of CLIPVision.*vision_feature_l"):
        get_peft_model(model, hvp.VPTConfig())
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("layer", [-5, [1, 9]])
def test_a_feature_layer_that_is_not_there(layer):
    with pytest.raises(ValueError, match=r"vision_feature_layer is .* has 3 blocks: must be from -4 to 3"):
        get_peft_model(llava(layer), hvp.VPTConfig())


def _methods(*without):
    methods = [m for name, m in hvp.list_methods().items() if name not in without]
    return [method for method in methods if not method.video and not method.calibrated]


@pytest.mark.parametrize("method", _methods("linearprobe", "vqt", "sparsetuning"), ids=lambda method: method.name)
def test_no_method_leaves_dead_weights_behind_what_is_read(method):
    config = dataclasses.replace(small_config(method), modules_to_save=["multi_modal_projector"])
    if method.name == "kadaptation":
        config = dataclasses.replace(config, n=4)
    model = get_peft_model(llava(), config)
    output = answer(model)
    assert not torch.equal(output, answer(llava())) or method.identity_at_start
    output.sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "multi_modal_projector" not in name}
    by_loss = "router.noise"  # Conv-LoRA's: in training alone, by its auxiliary loss
    assert [name for name, p in trained.items() if p.grad is None and by_loss not in name] == []


def test_partial_trains_the_last_block_that_is_read():
    model = get_peft_model(llava(), hvp.PartialConfig(modules_to_save=[]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".layers.1." in name for name in trained)
    with pytest.raises(ValueError, match=r"k is 3: must be an integer from 1 to 2"):
        get_peft_model(llava(), hvp.PartialConfig(k=3, modules_to_save=[]))


def test_a_block_that_nothing_reads_cannot_be_chosen():
    model = llava()
    with pytest.raises(ValueError, match=r"layers_to_transform has 2: .*does not read.* 0 to 1"):
        get_peft_model(model, hvp.AdaptFormerConfig(r=4, layers_to_transform=[0, 2]))
    with pytest.raises(ValueError, match=r"layers_to_transform"):
        hvp.with_visual_targets(LoraConfig(layers_to_transform=[2]), model)


@pytest.mark.filterwarnings("ignore:No task head")
def test_targets_of_peft_are_those_that_are_read():
    model = llava()
    config = hvp.with_visual_targets(LoraConfig(r=2), model)
    assert sorted(config.target_modules) == [
        f"model.vision_tower.encoder.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in ("q", "v")
    ]


def test_adapters_of_what_is_read_are_saved_and_loaded(tmp_path):
    config = hvp.LSTConfig(r=2, init_weights=False, modules_to_save=["multi_modal_projector"])
    model = get_peft_model(llava(), config).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(answer(PeftModel.from_pretrained(llava(), tmp_path).eval()), answer(model))


class Reads(nn.Module):
    """A user's module that reads one of the backbone's states."""

    def __init__(self, index, family="dinov2", grad=True):
        super().__init__()
        self.backbone = FAMILIES[family].backbone()
        self.classifier = nn.Linear(16, 3)
        self.index, self.grad = index, grad

    def forward(self, pixel_values):
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            states = self.backbone(pixel_values, output_hidden_states=True).hidden_states
        return self.classifier(states[self.index].mean(dim=1))


@pytest.mark.parametrize("index", [-2, 1, -1])
@pytest.mark.parametrize("family", ["dinov2", "vit", "beit"])
@pytest.mark.parametrize("config", [hvp.SSFConfig, hvp.LSTConfig, hvp.PartialConfig, hvp.VPTConfig])
def test_what_a_users_module_reads_is_found_by_a_backward_pass(index, family, config):
    torch.manual_seed(0)
    model = Reads(index, family)
    read = 1 if index == 1 else 4 + index
    assert hvp.find_backbone(model).depth == read
    adapted = get_peft_model(model, config(init_weights=False))
    adapted(**images(2)).sum().backward()
    assert [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is None] == []


def _reads_maps(blocks):
    config = tf.DPTConfig(
        **VIT | {"num_hidden_layers": blocks},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8,
    )
    return tf.DPTForDepthEstimation(config)


def _beit():
    return MODELS["beit_segmentation"].model()


def _swin(features):
    swin = {"image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]}
    return tf.SwinBackbone(tf.SwinConfig(**swin, window_size=2, out_features=features, drop_path_rate=0.0))


def _dinov2(features):
    return tf.Dinov2Backbone(tf.Dinov2Config(**FOUR, out_features=features))


@pytest.mark.parametrize(
    ("make", "depth", "unread"),
    [
        (lambda: _reads_maps(5), 4, 1),
        (lambda: _reads_maps(4), 4, 0),
        (_beit, 3, 1),
        (lambda: _swin(["stage1", "stage2"]), 2, 2),
        (lambda: _swin(["stage2", "stage4"]), 4, 0),
        (lambda: _dinov2(["stage2", "stage3"]), 3, 1),
        (lambda: tf.ResNetBackbone(tf.ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4,
                                                   out_features=["stage2"])), 2, 2),
    ],
    ids=["dpt", "dpt_whole", "beit", "swin", "swin_whole", "dinov2", "resnet"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:No table names")
def test_maps_that_are_chosen(make, depth, unread):
    backbone = hvp.find_backbone(make())
    assert (backbone.depth, backbone.unread) == (depth, unread)
    adapted = get_peft_model(make(), hvp.SSFConfig(modules_to_save=[]))
    output = adapted(**images(2, 64, 64) if backbone.class_name.startswith("Swin") else images(2))
    tensors = output.feature_maps if hasattr(output, "feature_maps") else [output[0]]
    torch.stack([tensor.sum() for tensor in tensors]).sum().backward()
    assert [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_side_network_ends_at_the_last_block_that_is_read():
    """BEiT's segmentation counts its states from the embeddings' output on."""
    model = _beit()
    expected = model(**images(2)).logits
    adapted = get_peft_model(_beit(), hvp.LSTConfig(r=2, init_weights=False)).eval()
    assert not torch.allclose(adapted(**images(2)).logits, expected)
    assert not any(".layers.3." in name for name, p in adapted.named_parameters() if "lst_" in name)


def test_where_nothing_gets_a_gradient_nothing_is_left_out():
    model = Reads(-2, grad=False)
    assert hvp.find_backbone(model).depth == 3


@pytest.mark.parametrize("on_meta", [False, True])
def test_the_model_that_is_looked_at_stays_as_it_is(on_meta, monkeypatch):
    monkeypatch.setattr(probing, "_SMALL", 0 if on_meta else 10**9)
    model = Reads(-2).train()
    before = {name: (id(p), p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    assert hvp.find_backbone(model).depth == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for name, p in model.named_parameters():
        assert (id(p), p.requires_grad) == (before[name][0], before[name][2])
        assert torch.equal(p, before[name][1])
        assert p.grad is None
    assert not any(module._forward_hooks for module in model.modules())


def test_under_an_adapter_the_same_is_read():
    model = Reads(-2)
    before = hvp.find_backbone(model)
    adapted = get_peft_model(model, hvp.LSTConfig(r=2))
    assert hvp.find_backbone(adapted.get_base_model()) == before
