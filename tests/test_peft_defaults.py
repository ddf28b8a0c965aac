"""What peft's own methods act on where nobody says: looked up in the model itself."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import transformers as tf
from families import FAMILIES, output_of
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as IA3_FEEDFORWARD
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_TARGETS
from peft.utils import TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING as LN_TUNING
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA
from peft.utils import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING as VERA
from torch import nn

from hf_visual_peft import Architecture, find_backbone, register_architecture, with_visual_targets
from hf_visual_peft.backbones.architectures import table
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.coverage.plain import _two_towers


pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT |= {"image_size": 32, "patch_size": 8}
NECK = {"neck_hidden_sizes": [8, 8], "reassemble_factors": [1, 1], "fusion_hidden_size": 8}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
TEXT |= {"intermediate_size": 16, "vocab_size": 64, "head_dim": 8}


@pytest.fixture
def _restored(monkeypatch):
    """Whatever a test registers is gone after it."""
    monkeypatch.setattr(table, "_ARCHITECTURES", copy.deepcopy(table._ARCHITECTURES))


def trained(model: nn.Module) -> set[str]:
    """Names that the trained parameters have in the base model."""
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name.removeprefix("base_model.model.").replace(".ln_tuning_layers.default", "") for name in names}


def norms_by_type(model: nn.Module, below: str = "") -> set[str]:
    """All parameters of layer norms below a path, found without any table."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and path.startswith(below)
        for name, _ in module.named_parameters()
    }


def test_vit_b16_has_38400():
    with torch.device("meta"):
        model = tf.ViTForImageClassification(tf.ViTConfig())
    # two norms of 2 x 768 in each of 12 blocks, and the one behind them
    assert get_peft_model(model, LNTuningConfig()).get_nb_trainable_parameters()[0] == (2 * 12 + 1) * 2 * 768 == 38_400


KINDS = [
    (name, kind) for name, family in FAMILIES.items() for kind in ("classifier", "backbone") if getattr(family, kind)
]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_trains_exactly_the_norms_of_the_roles(name, kind):
    model = getattr(FAMILIES[name], kind)()
    backbone = find_backbone(model)
    in_blocks = {path for block in backbone.blocks for role in ("norm1", "norm2") for path in block.roles[role]}
    assert len(in_blocks) == 2 * backbone.depth
    wanted = {f"{path}.{part}" for path in (*in_blocks, *backbone.norms) for part in ("weight", "bias")}
    # and these are all layer norms there are, but SigLIP's in the attention pooling, CLIP's that classifiers pass by
    left_out = {"siglip": "head.layernorm", "siglip2": "head.layernorm", "clip": "vision_model.post_layernorm"}
    others = {n for n in norms_by_type(model) if n.rpartition(".")[0].endswith(left_out.get(name, "nothing"))}
    assert norms_by_type(model) - others == wanted
    assert trained(get_peft_model(model, LNTuningConfig())) == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_trains_saves_and_loads(name, tmp_path):
    family = FAMILIES[name]
    model = get_peft_model(family.model(), LNTuningConfig())
    inputs = family.inputs(2)
    before = output_of(model, inputs).square().mean()
    before.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    torch.optim.SGD(parameters, lr=0.01).step()
    after = output_of(model, inputs)
    assert after.square().mean() < before

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(family.model(), tmp_path)
    assert torch.equal(output_of(again, inputs), after)


@pytest.mark.parametrize(("name", "left"), [("CLIP", ""), ("Siglip", "head.layernorm"), ("Siglip2", "head.layernorm")])
def test_leaves_the_text_tower_alone(name, left):
    naflex = {key: value for key, value in SMALL.items() if key != "image_size"} | {"num_patches": 16}
    config = _two_towers(getattr(tf, f"{name}Config"), naflex if name == "Siglip2" else SMALL)
    model = getattr(tf, f"{name}Model")(config)
    text, vision = norms_by_type(model, "text_model."), norms_by_type(model, "vision_model.")
    assert {n.partition(".encoder.")[2] for n in text} & {n.partition(".encoder.")[2] for n in vision}  # same names
    pooled = {f"vision_model.{left}.{part}" for part in ("weight", "bias")} if left else set()
    assert pooled < vision
    assert trained(get_peft_model(model, LNTuningConfig())) == vision - pooled


@pytest.mark.parametrize("mean", [True, False])
def test_beit_trains_the_final_norm_that_it_has(mean):
    model = tf.BeitForImageClassification(tf.BeitConfig(**SMALL, use_mean_pooling=mean))
    every = norms_by_type(model)
    assert trained(get_peft_model(model, LNTuningConfig())) == every


def test_leaves_the_decoder_alone():
    sizes = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    model = tf.ViTMAEForPreTraining(tf.ViTMAEConfig(**SMALL, **sizes, decoder_intermediate_size=16))
    encoder = norms_by_type(model, "vit.")
    assert norms_by_type(model, "decoder.")
    assert trained(get_peft_model(model, LNTuningConfig())) == encoder


@pytest.mark.usefixtures("_restored")
def test_leaves_norms_inside_attention_alone():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_norm, self.k_norm, self.norm = nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm(4)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2, self.attn = nn.LayerNorm(4), nn.LayerNorm(4), Attention()

    class OwnModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"model_type": "own"}
            self.stem_norm, self.last = nn.LayerNorm(4), nn.LayerNorm(4)
            self.blocks = nn.ModuleList(Layer() for _ in range(2))
            self.patches = nn.Conv2d(3, 4, 2)

    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(OwnModel(), LNTuningConfig())
    own = Architecture(
        backbones=("OwnModel",),
        blocks="blocks",
        patch_embedding="patches",
        embeddings="patches",
        norm1=("norm1",),
        norm2=("norm2",),
        input_norms=("stem_norm",),
        norms=("last",),
        **dict.fromkeys(("query", "key", "value", "output", "fc1", "fc2"), ()),
    )
    register_architecture(own)
    names = {"stem_norm", "last", *(f"blocks.{index}.norm{number}" for index in range(2) for number in (1, 2))}
    wanted = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    assert trained(get_peft_model(OwnModel(), LNTuningConfig())) == wanted

    # a new table for the class brings new targets
    register_architecture(replace(own, norms=()))
    assert trained(get_peft_model(OwnModel(), LNTuningConfig())) == wanted - {"last.weight", "last.bias"}


@pytest.mark.parametrize("name", ["swin", "pvt", "pvt_v2", "segformer", "focalnet", "convnext", "dinov3_convnext"])
def test_trains_the_norms_of_hierarchies(name):
    """Those of the blocks, inside attention, and between stages."""
    model = MODELS[name].build()
    norms = {path for path, module in model.named_modules() if "LayerNorm" in type(module).__name__}
    wanted = {f"{path}.{part}" for path in norms for part in ("weight", "bias")}
    assert len(wanted) > 12
    assert trained(get_peft_model(model, LNTuningConfig())) == wanted


@pytest.mark.parametrize("name", ["cvt", "mobilevit", "poolformer", "hiera", "timesformer"])
def test_leaves_batch_norms_alone(name):
    model = MODELS[name].build()
    norms = {path for path, module in model.named_modules() if isinstance(module, nn.LayerNorm | nn.GroupNorm)}
    wanted = {f"{path}.{part}" for path in norms for part in ("weight", "bias")}
    assert trained(get_peft_model(model, LNTuningConfig())) == wanted


@pytest.mark.parametrize("name", ["resnet", "levit", "swiftformer"])
def test_batch_norms_alone_train(name):
    model = MODELS[name].build()
    norms = {path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)}
    read = {path for path in norms if not path.startswith("classifier")}
    wanted = {f"{path}.{part}" for path in read for part in ("weight", "bias")}
    assert trained(get_peft_model(model, LNTuningConfig())) == wanted


@pytest.mark.parametrize(
    ("config", "mapping"),
    [(LoraConfig, LORA), (IA3Config, IA3_TARGETS), (LNTuningConfig, LN_TUNING), (VeraConfig, VERA)],
)
def test_entries_of_peft_and_of_users_come_first(config, mapping, monkeypatch):
    assert "vit" not in mapping  # nothing is written there
    monkeypatch.setitem(mapping, "vit", ["o_proj"])
    monkeypatch.setitem(IA3_FEEDFORWARD, "vit", [])
    adapted = get_peft_model(FAMILIES["vit"].model(), config())
    assert adapted.peft_config["default"].target_modules == {"o_proj"}


@pytest.mark.usefixtures("_restored")
def test_a_new_table_brings_new_targets():
    vit = table._ARCHITECTURES["vision"]["ViTModel"]
    register_architecture(replace(vit, query=("attention.o_proj",), value=("attention.o_proj",)))
    assert get_peft_model(FAMILIES["vit"].model(), LoraConfig()).peft_config["default"].target_modules == {"o_proj"}
    register_architecture(replace(vit, query=(), key=(), value=(), fc1=(), fc2=()))
    for config in (LoraConfig(), IA3Config()):
        with pytest.raises(ValueError, match="has nothing to act on in ViTModel"):
            get_peft_model(FAMILIES["vit"].model(), config)


@pytest.mark.parametrize("config", [LoraConfig(r=2, init_lora_weights=False), IA3Config(init_ia3_weights=False)])
def test_short_names_fit_the_bare_backbone_and_the_whole_model(config, tmp_path):
    """As the names that users of peft write."""
    base = FAMILIES["vit"].backbone()
    model = get_peft_model(copy.deepcopy(base), config).eval()
    names = model.peft_config["default"].target_modules
    assert names == ({"q_proj", "v_proj"} if isinstance(config, LoraConfig) else {"k_proj", "v_proj", "fc2"})
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    inputs = FAMILIES["vit"].inputs(2)
    assert torch.equal(output_of(again, inputs), output_of(model, inputs))
    assert get_peft_model(FAMILIES["vit"].model(), config).peft_config["default"].target_modules == names


def test_chosen_blocks_are_counted_in_the_backbone():
    model = get_peft_model(MODELS["swin"].build(), LoraConfig(layers_to_transform=[1]))
    assert {name.partition(".lora")[0].rpartition(".")[0] for name in trained(model)} == {
        "swin.encoder.layers.0.blocks.1.attention"
    }


def test_a_language_model_is_left_to_peft():
    text = tf.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = get_peft_model(tf.BertModel(text), LoraConfig())
    assert model.peft_config["default"].target_modules == {"query", "value"}
    with pytest.raises(ValueError, match="^Please specify `target_modules`.*in `peft_config`$"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig())


@pytest.mark.parametrize("config", [LoraConfig, VeraConfig, LNTuningConfig, IA3Config])
def test_models_without_a_config(config):
    """timm's, and a user's module."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", num_classes=2)
    exact = with_visual_targets(config(modules_to_save=[]), model)
    wanted = {path for path, _ in model.named_modules() if check_target_module_exists(exact, path)}
    adapted = get_peft_model(model, config())
    layers = {path for path, module in adapted.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)}
    assert layers == wanted
    assert len(layers) >= 6
    assert all("blocks" in path or "norm" in path for path in layers)


def _zoedepth():
    backbone = tf.BeitConfig(**VIT, out_features=["stage1", "stage2"], reshape_hidden_states=False)
    return tf.ZoeDepthForDepthEstimation(tf.ZoeDepthConfig(backbone_config=backbone, **NECK))


def _captioner():
    text = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    decoder = tf.GPT2Config(**text, add_cross_attention=True, is_decoder=True)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(**VIT), decoder)
    return tf.VisionEncoderDecoderModel(config)


def _blip():
    text = {"hidden_size": 16, "encoder_hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 16, "vocab_size": 64, "bos_token_id": 1, "pad_token_id": 0, "sep_token_id": 2}
    return tf.BlipForConditionalGeneration(tf.BlipConfig(vision_config=VIT, text_config=text, projection_dim=16))


def _llava():
    text = tf.LlamaConfig(**TEXT)
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**VIT), text_config=text))


def _paligemma():
    vision = {**VIT, "projection_dim": 16}
    config = tf.PaliGemmaConfig(vision_config=tf.SiglipVisionConfig(**vision), text_config=tf.GemmaConfig(**TEXT))
    return tf.PaliGemmaForConditionalGeneration(config)


@pytest.mark.parametrize("config", [LoraConfig, LNTuningConfig, IA3Config])
@pytest.mark.parametrize(
    ("make", "tower"),
    [
        (_zoedepth, "backbone."),
        (_captioner, "encoder."),
        (_blip, "vision_model."),
        (_llava, "model.vision_tower."),
        (_paligemma, "model.vision_tower."),
    ],
    ids=["zoedepth", "vision_encoder_decoder", "blip", "llava", "paligemma"],
)
def test_models_around_a_backbone_of_any_kind(make, tower, config, monkeypatch):
    model = make()
    monkeypatch.delitem(LN_TUNING, "llava", raising=False)  # an entry of peft's own, which names the language model
    exact = with_visual_targets(config(modules_to_save=[]), make())
    wanted = {path for path, _ in model.named_modules() if check_target_module_exists(exact, path)}
    adapted = get_peft_model(model, config()).get_base_model()
    layers = {path for path, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)}
    assert layers == wanted
    assert layers
    assert all(path.startswith(tower) for path in layers)


def test_several_towers_are_named_in_the_error():
    towers = {"vision_config": tf.CLIPVisionConfig(**VIT), "text_config": tf.LlamaConfig(**TEXT)}
    model = tf.VideoLlavaForConditionalGeneration(tf.VideoLlavaConfig(**towers))
    with pytest.raises(ValueError, match=r"Please specify `target_modules`.*several .*with_visual_targets\(config"):
        get_peft_model(model, LoraConfig())


@pytest.mark.parametrize("config_cls", [LoraConfig, LNTuningConfig])
@pytest.mark.parametrize(
    "name", ["upernet_swin", "upernet_convnext", "mask2former_swin", "maskformer_swin", "detr_resnet"]
)
def test_backbones_that_others_hold(name, config_cls):
    """A model type that says nothing of the backbone."""

    def adapted(config):
        model = get_peft_model(MODELS[name].build(), config).get_base_model()
        return {path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}

    if name == "detr_resnet" and config_cls is LNTuningConfig:
        with pytest.raises(ValueError, match="no norms with weights"):  # there are frozen batch norms alone
            adapted(config_cls())
        return
    exact = adapted(with_visual_targets(config_cls(), MODELS[name].build()))
    assert exact
    assert adapted(config_cls()) == exact


def _maps():
    return tf.Dinov2Config(**VIT, out_features=["stage1", "stage2"], reshape_hidden_states=False)


@pytest.mark.parametrize("config", [LoraConfig, LNTuningConfig])
@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (lambda: tf.DPTForDepthEstimation(tf.DPTConfig(backbone_config=_maps(), **NECK)), "backbone.encoder.layer."),
        (lambda: tf.DPTForDepthEstimation(tf.DPTConfig(**VIT, backbone_out_indices=[0, 1], **NECK)),
         "dpt.encoder.layer."),
        (lambda: tf.DepthAnythingForDepthEstimation(
            tf.DepthAnythingConfig(backbone_config=_maps(), patch_size=8, reassemble_hidden_size=16, **NECK)),
         "backbone.encoder.layer."),
    ],
    ids=["dpt_dinov2", "dpt", "depth_anything"],
)  # fmt: skip
def test_depth_models_hold_backbones_of_their_own_or_of_others(make, blocks, config):
    model = get_peft_model(make(), config())
    names = trained(model)
    inside = {name for name in names if blocks in name}
    kinds = {part for name in inside for part in ("query", "value", "q_proj", "v_proj", "norm") if part in name}
    assert len(inside) >= 8
    if config is LoraConfig:
        assert kinds in ({"query", "value"}, {"q_proj", "v_proj"})
        assert names == inside
