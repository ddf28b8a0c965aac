"""Task heads that no table names: found by looking at the model, with a word about it where that is not certain."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import timm
import torch
import transformers as tf
from families import FAMILIES, images
from peft import LoraConfig, get_peft_model
from torch import nn

import hf_visual_peft as hvp
from hf_visual_peft.backbones.architectures.table import _HEADS
from hf_visual_peft.backbones.task_heads import heads_around
from hf_visual_peft.coverage.dense import DETR
from hf_visual_peft.coverage.models import MODELS


VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT |= {"image_size": 32, "patch_size": 8}
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]}
SWIN |= {"window_size": 2}
MOBILEVIT = {"hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [8] * 7, "num_attention_heads": 2, "image_size": 64}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
TEXT |= {"intermediate_size": 16, "vocab_size": 32}
MAE = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
MAE |= {"decoder_intermediate_size": 8}
TAKEN, MISSING = "trained with the adapter", "No task head was found in"


@pytest.fixture
def _tables(monkeypatch):
    """Heads registered in a test are gone after it."""
    monkeypatch.setattr("hf_visual_peft.backbones.architectures.table._HEADS", dict(_HEADS))


def _depth_anything():
    backbone = tf.Dinov2Config(**VIT, out_features=["stage1", "stage2"], reshape_hidden_states=False)
    fields = {
        "neck_hidden_sizes": [8, 8],
        "reassemble_factors": [1, 1],
        "fusion_hidden_size": 8,
        "head_hidden_size": 8,
    }
    return tf.DepthAnythingForDepthEstimation(
        tf.DepthAnythingConfig(backbone_config=backbone, patch_size=8, reassemble_hidden_size=16, **fields)
    )


def _gemma():
    config = tf.Gemma3Config(text_config=TEXT, vision_config=VIT, mm_tokens_per_image=4, num_labels=3)
    return tf.Gemma3ForSequenceClassification(config)


def _oneformer():
    with torch.device("meta"):
        return tf.OneFormerForUniversalSegmentation(tf.OneFormerConfig(num_labels=7))


def _owlv2():
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return tf.Owlv2ForObjectDetection(tf.Owlv2Config(vision_config=VIT, text_config=text, projection_dim=8))


TASKS = {
    "masked_vit": (lambda: tf.ViTForMaskedImageModeling(tf.ViTConfig(**VIT)), ("decoder",)),
    "masked_beit": (
        lambda: tf.BeitForMaskedImageModeling(tf.BeitConfig(**VIT, vocab_size=9)),
        ("layernorm", "lm_head"),
    ),
    "masked_swin": (lambda: tf.SwinForMaskedImageModeling(tf.SwinConfig(**SWIN)), ("decoder",)),
    "mae": (lambda: tf.ViTMAEForPreTraining(tf.ViTMAEConfig(**VIT, **MAE)), ("decoder",)),
    "mobilevit": (
        lambda: tf.MobileViTForSemanticSegmentation(tf.MobileViTConfig(**MOBILEVIT, aspp_out_channels=8)),
        ("segmentation_head",),
    ),
    "depth_anything": (_depth_anything, ("neck", "head")),
    "gemma3": (_gemma, ("score",)),
    "oneformer": (_oneformer, ("model.transformer_module.decoder.class_embed",)),
}
OF_LABELS = {"mobilevit", "gemma3", "oneformer"}  # with a row for each label, which leaves no doubt


@pytest.mark.parametrize("name", TASKS)
def test_heads_of_task_models_are_found_by_structure(name):
    build, expected = TASKS[name]
    model = build()
    backbone = hvp.find_backbone(model)
    assert set(expected) == set(backbone.heads)
    if name in OF_LABELS:
        assert not backbone.head_note
    else:
        assert TAKEN in backbone.head_note
        assert repr(backbone.heads[0]) in backbone.head_note
        assert "modules_to_save" in backbone.head_note
    assert backbone.dense == (name != "gemma3")


def test_of_two_heads_with_one_weight_the_one_that_is_called():
    """RT-DETR's kind holds its heads twice and reads those in the decoder."""
    stages = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    config = tf.RTDetrV2Config(
        backbone_config=tf.RTDetrResNetConfig(embedding_size=8, **stages, out_indices=[2, 3, 4]),
        encoder_hidden_dim=16,
        encoder_in_channels=[8, 16, 16],
        decoder_in_channels=[16, 16, 16],
        num_denoising=0,
        hidden_expansion=0.5,
        num_labels=3,
        **(DETR | {"decoder_layers": 2}),
    )
    heads = hvp.find_backbone(tf.RTDetrV2ForObjectDetection(config)).heads
    both = [f"model.decoder.{kind}_embed.{layer}" for kind in ("class", "bbox") for layer in (0, 1)]
    assert set(heads) == {*both, "model.enc_score_head"}


@pytest.mark.parametrize("name", ["masked_vit", "mae", "depth_anything"])
@pytest.mark.parametrize("config", [hvp.SSFConfig, LoraConfig])
def test_found_heads_train_with_one_line_about_it(name, config):
    build, expected = TASKS[name]
    model = build()
    with pytest.warns(UserWarning, match=TAKEN) as caught:
        adapted = get_peft_model(model, hvp.with_visual_targets(config(), model))
    assert len([each for each in caught if TAKEN in str(each.message)]) == 1
    trained = {n.removeprefix("base_model.model.") for n, p in adapted.named_parameters() if p.requires_grad}
    for head in expected:
        assert any(name.startswith(f"{head}.modules_to_save.") for name in trained)


@pytest.mark.parametrize("chosen", [[], ["decoder"]])
def test_who_names_modules_is_told_nothing(chosen, recwarn):
    model = get_peft_model(TASKS["masked_vit"][0](), hvp.SSFConfig(modules_to_save=chosen))
    assert not [each for each in recwarn if "head" in str(each.message)]
    assert any("decoder" in n for n, p in model.named_parameters() if p.requires_grad) == bool(chosen)


def test_certain_heads_are_taken_in_silence(recwarn):
    """What tables or users name, and what has a row for each label."""
    get_peft_model(FAMILIES["vit"].model(), hvp.SSFConfig())
    get_peft_model(MODELS["segformer_segmentation"].build(), hvp.SSFConfig())
    bare = get_peft_model(FAMILIES["vit"].backbone(), hvp.SSFConfig())
    assert bare.peft_config["default"].modules_to_save is None
    assert not [each for each in recwarn if "head" in str(each.message)]


class Own(nn.Module):
    """A user's module: a backbone and whatever stands beside it."""

    def __init__(self, **parts):
        super().__init__()
        self.backbone = FAMILIES["dinov2"].backbone()
        for name, part in parts.items():
            setattr(self, name, part)
        self.used = list(parts)

    def forward(self, pixel_values):
        x = self.backbone(pixel_values).pooler_output
        for name in self.used:
            x = getattr(self, name)(x)
        return x


@pytest.mark.parametrize(
    ("parts", "expected", "noted"),
    [
        ({"head": nn.Linear(16, 3)}, ("head",), True),
        ({"classifier": nn.Linear(16, 3)}, ("classifier",), False),
        ({"neck": nn.Linear(16, 8), "classifier": nn.Linear(8, 3)}, ("neck", "classifier"), True),
        ({"fc": nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)), "act": nn.ReLU()}, ("fc",), True),
        ({"tail": nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 3))}, ("tail",), True),
    ],
)
@pytest.mark.filterwarnings("ignore:No table names")
def test_what_stands_beside_a_backbone_in_a_users_module(parts, expected, noted):
    model = Own(**parts)
    backbone = hvp.find_backbone(model)
    assert backbone.heads == expected
    assert bool(backbone.head_note) == noted
    assert not backbone.dense
    probe = get_peft_model(model, hvp.LinearProbeConfig())
    probe(**images(2)).sum().backward()
    trained = {name for name, p in probe.named_parameters() if p.requires_grad}
    assert trained
    assert all(any(f".{head}." in name for head in expected) for name in trained)
    assert all(p.grad is not None for p in probe.parameters() if p.requires_grad)


class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        config = tf.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        self.inner = tf.BertModel(config)


def test_pretrained_models_beside_the_backbone_are_no_heads():
    model = Own(head=nn.Linear(16, 3))
    model.text, model.more = Bert(), nn.Linear(3, 3)
    assert hvp.find_backbone(model).heads == ("head", "more")


def test_a_name_that_peft_cannot_tell_from_others_is_said_to_stay_frozen():
    """peft copies every module whose name ends in what `modules_to_save` says."""
    backbone = hvp.find_backbone(Own(proj=nn.Linear(16, 8), last=nn.Linear(8, 3)))  # attention has a q_proj
    assert backbone.heads == ("last",)
    assert "'proj': frozen" in backbone.head_note
    model = Own(head=nn.Sequential(nn.Linear(16, 8), nn.Sequential(nn.Linear(8, 3))))
    model.head.add_module("head", nn.Identity())
    assert hvp.find_backbone(model).heads == ("head.0", "head.1")
    lists = Own()
    lists.heads = nn.ModuleList([nn.Linear(16, 3), nn.Linear(16, 2)])
    assert hvp.find_backbone(lists).heads == ("heads.0", "heads.1")


def test_numbered_heads_of_a_sequence_are_said_to_stay_frozen():
    """Every name that ends in 1, as blocks.1, would be copied, too."""
    tower = timm.create_model("test_vit", num_classes=0)
    model = nn.Sequential(tower, nn.Linear(tower.num_features, 3))
    with pytest.warns(UserWarning, match=r"No task head .* Sequential.*'1': frozen, as names .* by an OrderedDict"):
        get_peft_model(model, hvp.VPTConfig())
    named = nn.Sequential(OrderedDict(tower=tower, answer=nn.Linear(tower.num_features, 3)))
    assert hvp.find_backbone(named).heads == ("answer",)


@pytest.mark.usefixtures("_tables")
def test_where_no_head_is_found_a_warning_says_so():
    class WithoutHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = FAMILIES["vit"].backbone()

        def forward(self, pixel_values):
            return self.encoder(pixel_values).last_hidden_state

    with pytest.warns(UserWarning, match=rf"{MISSING} WithoutHead.*modules_to_save.*register_heads\('WithoutHead'"):
        get_peft_model(WithoutHead(), hvp.VPTConfig())
    with pytest.raises(ValueError, match=r"WithoutHead has no known task head.*register_heads\('WithoutHead'"):
        get_peft_model(WithoutHead(), hvp.LinearProbeConfig(modules_to_save=[]))
    hvp.register_heads("WithoutHead", ())
    assert not hvp.find_backbone(WithoutHead()).head_note


def test_a_language_model_on_top_is_no_task_head():
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VIT),
        text_config=tf.LlamaConfig(**text, vocab_size=32),
        image_token_index=31,
    )
    model = tf.LlavaForConditionalGeneration(config)
    backbone = hvp.find_backbone(model)
    assert backbone.heads == ()
    assert backbone.head_note.startswith(f"{MISSING} LlavaForConditionalGeneration")


@pytest.mark.parametrize(
    "make",
    [lambda: tf.CLIPModel(tf.CLIPConfig(vision_config=VIT)), lambda: tf.SamModel(tf.SamConfig())],
    ids=["clip", "sam"],
)
def test_base_models_need_no_head(make):
    with torch.device("meta"):
        model = make()
    backbone = hvp.find_backbone(model)
    assert (backbone.heads, backbone.head_note) == ((), "")


DENSE = {
    "segformer_segmentation": ("decode_head",),
    "upernet_swin": ("decode_head",),
    "mask2former_swin": ("class_predictor",),
    "maskformer_swin": ("class_predictor", "mask_embedder"),
    "beit_segmentation": ("fpn", "decode_head", "auxiliary_head"),
    "detr_resnet": ("class_labels_classifier", "bbox_predictor"),
    # the class for detection puts them into its base model
    "rt_detr_resnet": ("model.decoder.class_embed.0", "model.decoder.bbox_embed.0", "model.enc_score_head"),
}


@pytest.mark.parametrize("name", DENSE)
def test_heads_of_dense_models_are_what_the_task_adds_to_its_base_model(name):
    backbone = hvp.find_backbone(MODELS[name].build())
    assert (backbone.heads, backbone.dense, backbone.head_note) == (DENSE[name], True, "")


def test_a_head_that_holds_one_of_its_name_is_named_by_its_parts():
    """peft would copy both, the one inside the other."""
    assert hvp.find_backbone(MODELS["dpt_depth"].build()).heads == ("neck", "head.head")


@pytest.mark.usefixtures("_tables")
def test_heads_that_a_user_registers_come_before_all_else():
    model = _owlv2()
    found = hvp.find_backbone(model)
    assert found.heads == ("class_head", "box_head", "objectness_head")
    assert TAKEN in found.head_note
    hvp.register_heads("Owlv2ForObjectDetection", ("box_head",))
    registered = hvp.find_backbone(model)
    assert (registered.heads, registered.head_note) == (("box_head",), "")


TIMM = [
    *("test_vit", "deit_tiny_distilled_patch16_224", "test_resnet", "test_convnext"),
    *("test_coatnet", "vit_tiny_patch16_dinov3_qkvb", "repvit_m1", "levit_128s", "volo_d1_224"),
    *("test_efficientnet", "test_nfnet", "legacy_seresnet18", "efficientvim_m1"),
]


@pytest.mark.parametrize("name", TIMM)
def test_heads_of_timm_are_what_another_number_of_classes_changes(name):
    """Whether the model has a table or none."""
    newer = {"test_coatnet": "1.0.31", "efficientvim_m1": "1.0.30"}  # the first with these models
    timm = pytest.importorskip("timm", minversion=newer.get(name))
    with torch.device("meta"):
        model, other, without = (timm.create_model(name, num_classes=count) for count in (3, 7, 0))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    changed = {n.rpartition(".")[0] for n, p in other.named_parameters() if shapes[n] != p.shape}
    no_names = hvp.Architecture(backbones=("Any",), blocks="blocks", patch_embedding=(), heads=())
    found = heads_around(model, "", no_names)
    assert set(found.paths) == changed
    assert (found.note, found.dense) == ("", False)
    assert heads_around(without, "", no_names).paths == ()
    held = nn.ModuleDict({"net": model})
    assert set(heads_around(held, "net", no_names).paths) == {f"net.{path}" for path in changed}


def test_a_model_of_timm_that_was_not_made_by_name_tells_its_head():
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    assert hvp.find_backbone(model).heads == ("head",)


def _eomt():
    return tf.EomtForUniversalSegmentation(tf.EomtConfig(**VIT, num_queries=3, num_blocks=1, num_labels=4))


def _pose():
    sizes = VIT | {"image_size": [32, 32], "patch_size": [8, 8]}
    config = tf.VitPoseConfig(backbone_config=tf.VitPoseBackboneConfig(**sizes, num_experts=1), scale_factor=2)
    return tf.VitPoseForPoseEstimation(config)


def _clipseg():
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    sizes = {"extract_layers": [0, 1], "reduce_dim": 8, "decoder_num_attention_heads": 2, "projection_dim": 8}
    config = tf.CLIPSegConfig(vision_config=VIT, text_config=text, decoder_intermediate_size=8, **sizes)
    return tf.CLIPSegForImageSegmentation(config)


@pytest.mark.parametrize(
    ("make", "path", "heads"),
    [(_eomt, "", ("class_predictor",)), (_pose, "backbone", ("head",)), (_clipseg, "clip.vision_model", ("decoder",))],
    ids=["eomt", "pose", "clipseg"],
)
def test_heads_around_and_in_backbones_of_all_kinds(make, path, heads):
    found = hvp.find_backbone(make())
    assert (found.path, found.heads, found.dense) == (path, heads, True)
