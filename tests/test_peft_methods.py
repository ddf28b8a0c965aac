"""peft's own methods on vision backbones: their targets by model type and by the model, and that they work there."""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
import transformers as tf
from families import FAMILIES
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    TaskType,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

import hf_visual_peft
from hf_visual_peft import find_backbone, freeze_norms, with_visual_targets
from hf_visual_peft.coverage.cell import Cell, run_cell
from hf_visual_peft.coverage.command import add_arguments
from hf_visual_peft.coverage.matrix import choose_cells
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.coverage.plain import _two_towers
from hf_visual_peft.coverage.report import summary, to_markdown
from hf_visual_peft.coverage.sizes import small_config_of_peft
from hf_visual_peft.demo.models import default_config
from hf_visual_peft.peft_methods.methods import PEFT_METHODS, any_method
from hf_visual_peft.peft_methods.targets import fill_targets


pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:.*is_activation_checkpointing")

SPECIAL = {"beft", "ia3", "ln_tuning", "osf"}
LORA_LIKE = sorted(set(PEFT_METHODS) - SPECIAL)
# entries of peft's own, which stay though they name modules that are no more
STALE = {("adamss", "vit"), ("frod", "vit"), ("pvera", "dinov2")}

HIERA = ((0, 0), (1, 0), (1, 1), (2, 0))  # stage and block
POOLFORMER = ((0, 0), (1, 0), (1, 1), (2, 0), (3, 0))

# every adapted module, written out
ATTENTION = {
    "vit": [f"vit.layers.{i}.attention.{n}_proj" for i in range(3) for n in "qv"],
    "swin": [
        f"swin.encoder.layers.{s}.blocks.{i}.attention.{n}_proj" for s in range(2) for i in range(2) for n in "qv"
    ],
    "hiera": [f"hiera.encoder.stages.{s}.layers.{i}.attn.qkv" for s, i in HIERA],
    "timm_wrapper": [f"timm_model.blocks.{i}.attn.qkv" for i in range(3)],
    "poolformer": [f"poolformer.encoder.block.{s}.{i}.output.conv{n}" for s, i in POOLFORMER for n in (1, 2)],
}
IA3 = {
    "vit": [f"vit.layers.{i}.{n}" for i in range(3) for n in ("attention.k_proj", "attention.v_proj", "mlp.fc2")],
    "swin": [
        f"swin.encoder.layers.{s}.blocks.{i}.{n}"
        for s in range(2)
        for i in range(2)
        for n in ("attention.k_proj", "attention.v_proj", "mlp.fc2")
    ],
    "hiera": [f"hiera.encoder.stages.{s}.layers.{i}.{n}" for s, i in HIERA for n in ("attn.qkv", "mlp.fc2")],
    "timm_wrapper": [f"timm_model.blocks.{i}.{n}" for i in range(3) for n in ("attn.qkv", "mlp.fc2")],
    "poolformer": [f"poolformer.encoder.block.{s}.{i}.output.conv2" for s, i in POOLFORMER],
}  # fmt: skip
VALUE = {"vit": [f"vit.layers.{i}.attention.v_proj" for i in range(3)]}
LINEARS = {
    "vit": [
        f"vit.layers.{i}.{n}"
        for i in range(3)
        for n in (*(f"attention.{p}_proj" for p in "qkvo"), "mlp.fc1", "mlp.fc2")
    ]
}


def adapted(model: nn.Module) -> set[str]:
    """Full names that the adapted modules have in the base model."""
    inner = model.get_base_model()
    return {name for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer)}


def bare_config(name, model, **fields):
    """The method's own config with nothing of targets, and small sizes."""
    config = small_config_of_peft(PEFT_METHODS[name], model)
    config.target_modules = config.modules_to_save = None
    if name == "ia3":
        config.feedforward_modules = None
    for field, value in fields.items():
        setattr(config, field, value)
    return config


@pytest.mark.parametrize("architecture", ["vit", "swin", "hiera", "timm_wrapper"])
def test_a_bare_config_acts_on_query_and_value(architecture):
    base = MODELS[architecture].build()
    for name in LORA_LIKE:
        if (name, base.config.model_type) in STALE or (name == "frod" and architecture in ("swin", "hiera")):
            continue
        model = get_peft_model(MODELS[architecture].build(), bare_config(name, base))
        assert adapted(model) == set(ATTENTION[architecture]), name


def test_without_attention_they_act_on_the_mlp_where_they_can():
    base = MODELS["poolformer"].build()
    for name in LORA_LIKE:
        model = MODELS["poolformer"].build()
        if PEFT_METHODS[name].convolutional:
            assert adapted(get_peft_model(model, bare_config(name, base))) == set(ATTENTION["poolformer"]), name
        else:
            with pytest.raises(ValueError, match="nothing to act on in PoolFormerModel: its blocks have no linears"):
                PEFT_METHODS[name].config(model)
            with pytest.raises(ValueError, match="nothing to act on in PoolFormerModel: its blocks have no linears"):
                get_peft_model(model, PEFT_METHODS[name].config_cls())


@pytest.mark.parametrize("architecture", IA3)
def test_ia3_acts_on_keys_values_and_the_mlp(architecture):
    model = get_peft_model(MODELS[architecture].build(), IA3Config())
    assert adapted(model) == set(IA3[architecture])
    layers = {name: module for name, module in model.get_base_model().named_modules() if name in IA3[architecture]}
    ends = ("fc2", "conv2")
    assert {name for name, layer in layers.items() if layer.is_feedforward} == {n for n in layers if n.endswith(ends)}


def test_ia3_scales_values_also_where_other_names_end_alike():
    """Of data2vec's `attention.output.dense` and `output.dense` a name tells only the end."""
    wanted = {f"data2vec_vision.encoder.layer.{i}.{n}" for i in range(3) for n in
              ("attention.attention.key", "attention.attention.value", "output.dense")}  # fmt: skip
    assert adapted(get_peft_model(MODELS["data2vec-vision"].build(), IA3Config())) == wanted


@pytest.mark.parametrize(("name", "wanted"), [("beft", VALUE["vit"]), ("osf", LINEARS["vit"])])
def test_the_other_methods(name, wanted):
    base = MODELS["vit"].build()
    assert adapted(get_peft_model(MODELS["vit"].build(), bare_config(name, base))) == set(wanted)


@pytest.mark.parametrize(("name", "architecture"), sorted(STALE))
def test_where_peft_has_an_entry_of_its_own_the_helper_helps(name, architecture):
    model = MODELS[architecture].build()
    with pytest.raises(ValueError, match="not found in the base model|No layer types compatible|No layers types"):
        get_peft_model(MODELS[architecture].build(), bare_config(name, model))
    config = small_config_of_peft(PEFT_METHODS[name], model)
    assert len(adapted(get_peft_model(model, config))) == 6


# what peft's code does not do with these, as its own errors say
LIMITS = {
    ("frod", "swin"): "RuntimeError: Sizes of tensors must match",  # all of a name must be of one size
    ("frod", "pvt"): "RuntimeError: Sizes of tensors must match",
    ("frod", "hiera"): "mat1 and mat2 shapes cannot be multiplied",
    ("frod", "convnext"): "RuntimeError: Sizes of tensors must match",
    ("gralora", "convnext"): "ValueError: too many values to unpack",  # (batch, tokens, channels) only
    ("oft", "convnext"): "RuntimeError: shape ",
}


@pytest.mark.parametrize(
    "architecture", ["vit", "dinov2", "swin", "pvt", "hiera", "convnext", "timm_vit", "poolformer"]
)
def test_trains_saves_loads_and_switches_off(architecture):
    tiny = MODELS[architecture]
    base = tiny.model()
    few = (
        {"lora", "ia3", "ln_tuning", "vera", "oft"} if architecture in ("vit", "dinov2", "pvt") else set(PEFT_METHODS)
    )
    for name in few:
        cell = run_cell(PEFT_METHODS[name], tiny, base)
        if (name, architecture) in LIMITS:
            assert cell.reason.startswith("peft, "), name
            assert LIMITS[name, architecture] in cell.reason, name
        elif architecture == "poolformer" and not PEFT_METHODS[name].convolutional and name != "ln_tuning":
            assert "nothing to act on in PoolFormerModel" in str(cell), name
        elif (name, architecture) == ("beft", "convnext"):
            assert str(cell).endswith("it has no linear for values"), name
        else:
            assert cell == Cell("works"), name


def test_what_peft_is_told_alone_and_before_agree():
    """Everywhere, by each kind of method: `LoraConfig()` acts where `with_visual_targets` makes it act."""
    kinds = {"lora", "vera", "beft", "osf", "ia3", "ln_tuning"}
    compared = dict.fromkeys(kinds, 0)
    for architecture, tiny in MODELS.items():
        if tiny.missing_package:
            continue
        model = tiny.build()
        for name in kinds:
            kind = PEFT_METHODS[name]
            told = kind.config_cls(**kind.chosen)
            try:
                exact = kind.config(model, modules_to_save=[])
            except ValueError as error:
                with pytest.raises(ValueError, match=re.escape(str(error))):
                    fill_targets(told, model, find_backbone(model), short=True)
                continue
            fill_targets(told, model, find_backbone(model), short=True)
            names = [path for path, _ in model.named_modules()]
            by_look, by_config = ({p for p in names if check_target_module_exists(c, p)} for c in (told, exact))
            assert by_look == by_config, (architecture, name)
            compared[name] += 1
    assert min(compared.values()) > 25, compared


def test_convolutional_networks_get_their_dense_convolutions():
    for architecture in ("resnet", "regnet", "efficientnet", "hgnet_v2", "pp_lcnet", "textnet"):
        model = get_peft_model(MODELS[architecture].build(), LoraConfig())
        layers = [model.get_base_model().get_submodule(name).base_layer for name in adapted(model)]
        assert len(layers) >= 3, architecture
        assert all(isinstance(layer, nn.Conv2d) and layer.groups == 1 for layer in layers), architecture
        with pytest.raises(ValueError, match="VeraConfig has nothing to act on in .*: its blocks have no linears"):
            get_peft_model(MODELS[architecture].build(), VeraConfig())


# ------------------------------------------------------------------------------------------- with_visual_targets


def test_fills_targets_and_head_and_leaves_the_given_config():
    base, given = FAMILIES["vit"].model(), LoraConfig(r=3)
    config = with_visual_targets(given, base)
    assert config.target_modules == set(ATTENTION["vit"])
    assert config.modules_to_save == ["classifier"]
    assert (config.r, given.target_modules, given.modules_to_save) == (3, None, None)
    model = get_peft_model(base, config)
    assert adapted(model) == set(ATTENTION["vit"])
    assert isinstance(base.classifier, ModulesToSaveWrapper)


def test_what_the_user_says_stays():
    model = FAMILIES["vit"].model()
    given = LoraConfig(target_modules=["fc1"], modules_to_save=[])
    config = with_visual_targets(given, model)
    assert (config.target_modules, config.modules_to_save) == ({"fc1"}, [])
    config = with_visual_targets(LoraConfig(target_parameters=["mlp.fc1.weight"]), model)
    assert config.target_modules is None
    config = with_visual_targets(IA3Config(target_modules=["k_proj", "fc2"]), model)
    assert config.target_modules == {"k_proj", "fc2"}
    ours = hf_visual_peft.VPTConfig()
    assert with_visual_targets(ours, model) is ours
    excluded = get_peft_model(
        FAMILIES["vit"].model(), with_visual_targets(LoraConfig(exclude_modules=r".*v_proj"), model)
    )
    assert adapted(excluded) == {name for name in ATTENTION["vit"] if name.endswith("q_proj")}


def test_layers_count_the_blocks_of_the_whole_backbone():
    model = MODELS["swin"].build()
    config = with_visual_targets(LoraConfig(layers_to_transform=[1, 2]), model)
    assert adapted(get_peft_model(model, config)) == {
        f"swin.encoder.layers.{s}.blocks.{i}.attention.{n}_proj" for s, i in ((0, 1), (1, 0)) for n in "qv"
    }
    with pytest.raises(ValueError, match=r"layers_to_transform is 4: SwinModel has the blocks 0 to 3\."):
        with_visual_targets(LoraConfig(layers_to_transform=4), MODELS["swin"].build())


def test_raw_timm_models():
    def vit() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=3)

    assert adapted(get_peft_model(vit(), LoraConfig())) == {"blocks.0.attn.qkv", "blocks.1.attn.qkv"}
    model = get_peft_model(vit(), with_visual_targets(LoraConfig(), vit()))
    assert adapted(model) == {"blocks.0.attn.qkv", "blocks.1.attn.qkv"}
    assert isinstance(model.get_base_model().head, ModulesToSaveWrapper)
    # its norm outside the blocks is named as the end of others, of which some are not norms
    model = get_peft_model(vit(), with_visual_targets(LNTuningConfig(), vit()))
    assert adapted(model) == {*(f"blocks.{i}.norm{n}" for i in range(2) for n in (1, 2)), "norm"}


def test_inside_larger_models():
    upernet = MODELS["upernet_swin"].build()
    config = with_visual_targets(LoraConfig(), upernet)
    assert all(name.startswith("backbone.swin.encoder.layers.") for name in config.target_modules)
    assert config.modules_to_save == ["decode_head"]
    assert len(adapted(get_peft_model(upernet, config))) == 10
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    clip = tf.CLIPModel(_two_towers(tf.CLIPConfig, small | {"image_size": 32, "patch_size": 8}))
    for config in (with_visual_targets(LoraConfig(), clip), LoraConfig(), with_visual_targets(IA3Config(), clip)):
        names = adapted(get_peft_model(tf.CLIPModel(clip.config), config))
        assert len(names) in (4, 6)
        assert all(name.startswith("vision_model.") for name in names)


def test_ia3_of_a_deep_model_loads_again(tmp_path):
    """peft shortens sets of twenty names and more; the two fields of IA3 would no longer agree."""
    config = tf.ViTConfig(hidden_size=16, num_hidden_layers=8, num_attention_heads=2, intermediate_size=32,
                          image_size=16, patch_size=8)  # fmt: skip
    base = tf.ViTForImageClassification(config).eval()
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    exact = with_visual_targets(IA3Config(init_ia3_weights=False), base)
    for number, ia3 in enumerate((IA3Config(init_ia3_weights=False), exact)):
        model = get_peft_model(copy.deepcopy(base), ia3).eval()
        assert len(adapted(model)) == 24
        model.save_pretrained(tmp_path / str(number))
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(number)).eval()
        assert adapted(again) == adapted(model)
        with torch.no_grad():
            found = again(**pixels).logits
            assert torch.equal(found, model(**pixels).logits)
            assert not torch.allclose(found, base(**pixels).logits)


def test_a_second_adapter_takes_the_names_of_the_base():
    base = FAMILIES["vit"].model()
    model = get_peft_model(base, with_visual_targets(LoraConfig(), base))
    model.add_adapter("other", with_visual_targets(LoraConfig(r=2), model))
    assert model.peft_config["other"].target_modules == set(ATTENTION["vit"])


def test_what_acts_on_no_modules_is_refused():
    with pytest.raises(ValueError, match="PrefixTuningConfig has no targets in vision backbones: choose one of "):
        with_visual_targets(PrefixTuningConfig(TaskType.FEATURE_EXTRACTION), FAMILIES["vit"].model())
    with pytest.raises(hf_visual_peft.BackboneError):
        with_visual_targets(LoraConfig(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="IA3Config has nothing to act on in ResNetModel: it has no keys"):
        with_visual_targets(IA3Config(), MODELS["resnet"].build())
    with pytest.raises(ValueError, match="LNTuningConfig has nothing to act on in .*: it has no norms with weights"):
        with_visual_targets(LNTuningConfig(), MODELS["detr_resnet"].build())  # where they are frozen for good


def test_batch_norms_train_where_there_are_no_others(tmp_path):
    """A copy of each, with its statistics, is the adapter; those of the base stay."""
    tiny = MODELS["resnet"]
    base = tiny.model()
    pixels = tiny.arguments(4)
    with torch.no_grad():
        before = base(**pixels).logits
    model = get_peft_model(copy.deepcopy(base), with_visual_targets(LNTuningConfig(modules_to_save=[]), base)).train()
    loss = model(**pixels).logits.square().mean()
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**pixels).logits, model(**pixels).logits)
        assert not torch.allclose(again(**pixels).logits, before)
        with model.disable_adapter():
            assert torch.equal(model(**pixels).logits, before)


def test_convolutions_that_standardise_their_weight_are_left_alone():
    """peft adds to the weight when it merges; what standardises it then would scale the addition."""
    with pytest.raises(ValueError, match="LoraConfig has nothing to act on"):
        with_visual_targets(LoraConfig(), MODELS["bit"].build())


@pytest.mark.parametrize("architecture", ["mobilenet_v1", "mobilenet_v2"])
def test_convolutions_whose_stride_is_read_are_left_alone(architecture):
    model = MODELS[architecture].build()
    with pytest.raises(ValueError, match="nothing to act on in MobileNetV[12]Model"):
        with_visual_targets(LoraConfig(), model)
    config = type(model.config).from_dict(model.config.to_dict() | {"tf_padding": False})
    model = type(model)(config)
    model = get_peft_model(model, with_visual_targets(LoraConfig(), model))
    model(**MODELS[architecture].arguments(2)).logits.sum().backward()


@pytest.mark.parametrize("architecture", ["regnet", "resnet", "mobilevit"])
def test_frozen_norms_keep_the_base(architecture):
    tiny = MODELS[architecture]
    before = tiny.call(tiny.model(), tiny.arguments(2)).logits
    model = tiny.model()
    model = get_peft_model(model, PEFT_METHODS["lora"].config(model))
    assert freeze_norms(model)
    tiny.call(model.train(), tiny.arguments(4)).logits.sum().backward()
    with torch.no_grad(), model.eval().disable_adapter():
        assert torch.equal(tiny.call(model, tiny.arguments(2)).logits, before)


# --------------------------------------------------------------------------------------------------------- names


def test_names():
    assert {"lora", "dora", "loha", "lokr", "oft", "boft", "vera", "ia3", "ln_tuning", "hra", "fourierft"} <= set(
        PEFT_METHODS
    )
    assert not {"adalora", "poly"} & set(PEFT_METHODS), "these need more than a training loop gives"
    assert not set(PEFT_METHODS) & set(hf_visual_peft.list_methods())
    assert any_method("DoRA") is PEFT_METHODS["dora"]
    assert any_method("VPT") is hf_visual_peft.get_method("vpt")
    with pytest.raises(
        ValueError, match=r"Unknown method 'vtp': choose one of .*vqt, or of peft's adamss, .*waveft\."
    ):
        any_method("vtp")


def test_the_demonstration_takes_them():
    base = FAMILIES["vit"].model()
    config = default_config(any_method("dora"), base, 32)
    assert (config.use_dora, config.target_modules) == (True, set(ATTENTION["vit"]))


def test_the_matrix_takes_them_as_a_second_group():
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    names = parser.parse_args(["--methods", "lora,VPT"]).methods
    assert choose_cells(names, ["vit"]) == {"vit": ["lora", "vpt"]}
    assert not set(choose_cells(architectures=["vit"])["vit"]) & set(PEFT_METHODS)
    matrix = {"vit": {"lora": Cell("works"), "vpt": Cell("not applicable", "so")}}
    lines = [line.split("|")[1:3] for line in summary(matrix).splitlines()]
    assert [line[0].strip() for line in lines[2:]] == ["Plain transformers", "Plain transformers, methods of peft"]
    page = to_markdown(matrix)
    assert page.index("| vpt ") < page.index("| method of peft | vit |") < page.index("| lora ")
