"""The defaults of peft's own methods: those of LN tuning train all norms of a backbone and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import transformers as tf
from families import FAMILIES, _two_towers, output_of
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA
from torch import nn

from hf_visual_peft import Architecture, find_backbone, register_architecture, with_visual_targets
from hf_visual_peft.backbones.architectures import table
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.peft_methods import defaults as peft_defaults


pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
# model_type of the config: every model of these types gets a default
MODEL_TYPES = {
    *("vit", "vit_msn", "ijepa", "deit", "vit_mae", "beit", "data2vec-vision"),
    *("dinov2", "dinov2_with_registers", "dinov3_vit"),
    *("clip", "clip_vision_model", "siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"),
}


@pytest.fixture
def _restored(monkeypatch):
    """Whatever a test registers is gone after it."""
    monkeypatch.setattr(table, "_ARCHITECTURES", dict(table._ARCHITECTURES))
    monkeypatch.setattr(peft_defaults, "_added", dict(peft_defaults._added))
    monkeypatch.setattr(peft_defaults, "_timm", dict(peft_defaults._timm))
    mappings = [mapping for mapping, _ in peft_defaults._MAPPINGS.values()]
    before = [dict(mapping) for mapping in mappings]
    yield
    for mapping, entries in zip(mappings, before, strict=True):
        mapping.clear()
        mapping.update(entries)


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


def test_every_family_has_a_default():
    for method, (mapping, _) in peft_defaults._MAPPINGS.items():
        added = {name: entry for (of, name), entry in peft_defaults._added.items() if of == method and entry}
        unclear = {"siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"} if "IA3" in method else set()
        of_peft = {name for name in MODEL_TYPES - unclear if name not in added}
        assert of_peft == {"ADAMSS": {"vit"}, "FROD": {"vit"}, "PVERA": {"dinov2"}}.get(method, set())
        assert added.items() <= mapping.items()
    for family in FAMILIES.values():
        assert family.model().config.model_type in MODEL_TYPES
        assert family.backbone().config.model_type in MODEL_TYPES


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


@pytest.mark.parametrize(
    ("name", "left"), [("CLIP", "post_layernorm"), ("Siglip", "head.layernorm"), ("Siglip2", "head.layernorm")]
)
def test_leaves_the_text_tower_alone(name, left):
    naflex = {key: value for key, value in SMALL.items() if key != "image_size"} | {"num_patches": 16}
    config = _two_towers(getattr(tf, f"{name}Config"), naflex if name == "Siglip2" else SMALL)
    model = getattr(tf, f"{name}Model")(config)
    text, vision = norms_by_type(model, "text_model."), norms_by_type(model, "vision_model.")
    assert {n.partition(".encoder.")[2] for n in text} & {n.partition(".encoder.")[2] for n in vision}  # same names
    pooled = {f"vision_model.{left}.{part}" for part in ("weight", "bias")}
    assert pooled < vision
    assert trained(get_peft_model(model, LNTuningConfig())) == vision - pooled


def test_beit_without_mean_pooling_takes_its_final_norm_by_name():
    def beit() -> nn.Module:
        return tf.BeitForImageClassification(tf.BeitConfig(**SMALL, use_mean_pooling=False))

    every = norms_by_type(beit())
    final = {"beit.layernorm.weight", "beit.layernorm.bias"}
    assert trained(get_peft_model(beit(), LNTuningConfig())) == every - final
    named = LNTuningConfig(target_modules=["layernorm_before", "layernorm_after", "layernorm"])
    assert trained(get_peft_model(beit(), named)) == every


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

    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(OwnModel(), LNTuningConfig())
    own = Architecture(
        backbones=("OwnModel",),
        blocks="blocks",
        patch_embedding="patches",
        norm1=("norm1",),
        norm2=("norm2",),
        input_norms=("stem_norm",),
        norms=("last",),
        model_types=("own",),
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
def test_batch_norms_alone_are_no_default(name):
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(MODELS[name].build(), LNTuningConfig())


@pytest.mark.usefixtures("_restored")
def test_entries_of_peft_and_of_users_stay():
    before = {method: dict(mapping) for method, (mapping, _) in peft_defaults._MAPPINGS.items()}
    for mapping, _ in peft_defaults._MAPPINGS.values():
        mapping["llama"], mapping["vit"] = ["of_peft"], ["of_the_user"]
    for model_type in ("llama", "vit"):
        register_architecture(
            Architecture(("Own",), blocks="blocks", patch_embedding="patches", model_types=(model_type,))
        )
    for method, (mapping, _) in peft_defaults._MAPPINGS.items():
        assert mapping == before[method] | {"llama": ["of_peft"], "vit": ["of_the_user"]}


@pytest.mark.usefixtures("_restored")
def test_a_new_table_brings_new_targets():
    vit = table._ARCHITECTURES["ViTModel"]
    register_architecture(replace(vit, query=("attention.o_proj",), value=("attention.o_proj",)))
    assert LORA["vit"] == ["attention.o_proj"]
    register_architecture(replace(vit, query=(), key=(), value=(), fc1=(), fc2=()))
    for config in (LoraConfig(), IA3Config()):
        with pytest.raises(ValueError, match="Please specify `target_modules`"):
            get_peft_model(FAMILIES["vit"].model(), config)


@pytest.mark.usefixtures("_restored")
def test_a_name_that_is_the_end_of_another_becomes_a_pattern():
    vit = table._ARCHITECTURES["ViTModel"]
    register_architecture(replace(vit, query=("proj",), value=("proj",), output=("inner.proj",), model_types=("own",)))
    (model_type, pattern) = ("own", LORA["own"])
    assert re.fullmatch(pattern, "vit.layers.3.proj"), model_type
    assert not re.fullmatch(pattern, "vit.layers.3.inner.proj")
    assert not re.fullmatch(pattern, "vit.proj")


def test_importing_adds_only_what_peft_lacks():
    """In a new process: entries that were there before the import stay; a second import changes nothing."""
    code = """
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
mappings = [PEFT_TYPE_TO_TUNER_MAPPING[name].target_module_mapping for name in ("LN_TUNING", "LORA", "VERA")]
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING, constants
mappings.append(TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING)
before = [dict(mapping) for mapping in mappings]
for mapping in mappings:
    mapping["dinov2"] = ["mine"]
import hf_visual_peft
for mapping, earlier in zip(mappings, before):
    assert mapping["dinov2"] == ["mine"]
    assert {key: mapping[key] for key in earlier} == earlier
    assert len(mapping) > len(earlier) + 10
after = [dict(mapping) for mapping in mappings]
import importlib, hf_visual_peft.peft_methods.defaults, hf_visual_peft.backbones.architectures
importlib.reload(hf_visual_peft.peft_methods.defaults)
importlib.reload(hf_visual_peft.backbones.architectures)
assert [dict(mapping) for mapping in mappings] == after
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("_restored")
def test_costs_no_time_to_speak_of():
    tables = {id(one): one for one in table._ARCHITECTURES.values()}
    start = time.perf_counter()
    for one in tables.values():
        peft_defaults.add_defaults(one)
    assert time.perf_counter() - start < 0.1  # importing peft takes seconds


@pytest.mark.parametrize("config_cls", [LoraConfig, LNTuningConfig])
@pytest.mark.parametrize(
    "name", ["upernet_swin", "upernet_convnext", "mask2former_swin", "maskformer_swin", "detr_resnet"]
)
def test_backbones_that_others_hold(name, config_cls):
    """A model type that says nothing of the backbone: the pattern finds what the roles of the model tell."""

    def adapted(config):
        model = get_peft_model(MODELS[name].build(), config).get_base_model()
        return {path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}

    if name == "detr_resnet" and config_cls is LNTuningConfig:
        with pytest.raises(ValueError, match="not found in the base model"):  # there are batch norms alone
            adapted(config_cls())
        return
    exact = adapted(with_visual_targets(config_cls(), MODELS[name].build()))
    assert exact
    assert adapted(config_cls()) == exact


VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT |= {"image_size": 32, "patch_size": 8}
NECK = {"neck_hidden_sizes": [8, 8], "reassemble_factors": [1, 1], "fusion_hidden_size": 8}


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
