"""Modules and weights under several names, and modules that are called as peft's layers call theirs."""

import warnings

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hf_visual_peft import (
    AdaptFormerConfig,
    BitFitConfig,
    LinearProbeConfig,
    LSTConfig,
    RepAdapterConfig,
    RLRRConfig,
    SSFConfig,
    VPTConfig,
    with_visual_targets,
)


class Shared(nn.Module):
    """One block under two names, one of its linears under a third, and two heads with one weight."""

    def __init__(self):
        super().__init__()
        block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.first, self.second = nn.ModuleList([block]), nn.ModuleList([block, nn.Linear(4, 4)])
        self.alias = block[0]
        self.head, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.head.weight

    def forward(self, x):
        x = self.second[0](self.first[0](x))
        x = self.second[1](self.alias(x))
        return self.head(x), self.tied(x)


def shared():
    torch.manual_seed(0)
    return Shared().double().eval()


def run(model):
    with torch.no_grad():
        return torch.stack(model(torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)))


def adapted(config, base=None):
    torch.manual_seed(1)
    return get_peft_model(base or shared(), config).double().eval()


NAMES = ["first.0.0", "alias", "second.0.0"]
ALL = ["0.0", "0.1", "head"]


@pytest.mark.parametrize("config_cls", [SSFConfig, BitFitConfig, RLRRConfig])
@pytest.mark.parametrize("targets", [["0.0"], ["alias"], ALL, [*ALL, "tied"], "all-linear"], ids=str)
def test_a_shared_module_is_adapted_wherever_it_is_called(config_cls, targets, tmp_path):
    config = config_cls(target_modules=targets, init_weights=False)
    model = adapted(config)
    base = model.get_base_model()
    assert len({id(base.get_submodule(name)) for name in NAMES}) == 1
    expected = run(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(shared(), tmp_path).double().eval()
    assert torch.equal(run(again), expected)
    low = PeftModel.from_pretrained(shared(), tmp_path, low_cpu_mem_usage=True).double().eval()
    assert torch.equal(run(low), expected)
    model.merge_adapter()
    torch.testing.assert_close(run(model), expected)
    model.unmerge_adapter()
    assert torch.equal(run(model), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged), expected)
    assert len({id(merged.get_submodule(name)) for name in NAMES}) == 1
    assert type(merged.alias) is nn.Linear


def test_a_module_is_left_alone_under_all_names_if_under_one():
    model = adapted(SSFConfig(target_modules=["0.0", "head"], exclude_modules=["alias"], init_weights=False))
    assert {name.partition(".ssf_")[0] for name, _ in model.named_parameters() if "ssf_" in name} == {
        "base_model.model.head"
    }


def shared_blocks():
    torch.manual_seed(0)
    config = tf.ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    config.update({"image_size": 16, "patch_size": 8, "num_labels": 3})
    model = tf.ViTForImageClassification(config)
    model.vit.layers[2] = model.vit.layers[0]
    return model.double().eval()


@pytest.mark.parametrize("layers", [None, [0]], ids=str)
@pytest.mark.parametrize("config_cls", [SSFConfig, BitFitConfig, RepAdapterConfig])
def test_by_roles_a_shared_block_has_one_adapter(config_cls, layers, tmp_path):
    fields = {"r": 4} if config_cls is RepAdapterConfig else {}
    config = config_cls(init_weights=False, modules_to_save=[], layers_to_transform=layers, **fields)
    model = adapted(config, shared_blocks())
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = model(pixels).logits
        assert not torch.equal(expected, shared_blocks()(pixels).logits)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(shared_blocks(), tmp_path).double().eval()
        torch.testing.assert_close(again(pixels).logits, expected)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(pixels).logits, expected)
        assert merged.vit.layers[2] is merged.vit.layers[0]


@pytest.mark.parametrize("config_cls", [AdaptFormerConfig, VPTConfig, LSTConfig])
def test_methods_on_blocks_refuse_a_block_that_is_two(config_cls):
    base = shared_blocks()
    names = list(base.state_dict())
    fields = {"r": 4} if hasattr(config_cls, "r") else {}
    with pytest.raises(ValueError, match=r"vit.layers.0, vit.layers.2 are one module.*as SSFConfig"):
        get_peft_model(base, config_cls(**fields))
    assert list(base.state_dict()) == names


def test_a_list_of_blocks_may_have_two_names(tmp_path):
    base = detector(lambda: shared_blocks().float())
    base.vit.layers[2] = type(base.vit.layers[1])(base.config)
    base.blocks = base.vit.layers
    model = get_peft_model(base.eval(), AdaptFormerConfig(r=4, init_weights=False, modules_to_save=[])).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(pixels).logits
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if "adaptformer" in name}
        assert len(weights) == 2 * len({id(p) for n, p in model.named_parameters() if "adaptformer" in n})
        model.save_pretrained(tmp_path)
        unloaded = model.unload()
        assert not torch.equal(unloaded(pixels).logits, expected)
        again = PeftModel.from_pretrained(unloaded, tmp_path).eval()
        assert torch.equal(again(pixels).logits, expected)


def test_unload_puts_back_what_was_there():
    base = shared()
    before, modules = run(base), dict(base.named_modules(remove_duplicate=False))
    unloaded = adapted(SSFConfig(target_modules=ALL, init_weights=False), base).unload()
    assert torch.equal(run(unloaded), before)
    assert all(unloaded.get_submodule(name) is module for name, module in modules.items())


def test_merging_into_a_tied_weight_leaves_the_other_module():
    model = adapted(SSFConfig(target_modules=["head"], init_weights=False))
    weight = model.get_base_model().tied.weight
    expected = run(model)
    model.merge_adapter()
    torch.testing.assert_close(run(model), expected)
    model.unmerge_adapter()
    assert model.get_base_model().head.base_layer.weight is model.get_base_model().tied.weight is weight
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged), expected)
    assert merged.tied.weight is weight


def test_copies_of_shared_and_tied_modules_are_shared_and_tied(tmp_path):
    fields = {"modules_to_save": ["head", "tied", "alias"], "init_weights": False}
    model = adapted(SSFConfig(target_modules=["second.1"], **fields))
    base = model.get_base_model()
    assert len({id(base.get_submodule(name)) for name in NAMES}) == 1
    copies = [base.get_submodule(name).modules_to_save["default"] for name in ("head", "tied")]
    assert copies[0].weight is copies[1].weight
    assert copies[0].bias is not copies[1].bias
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    expected = run(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(shared(), tmp_path, is_trainable=True).double().eval()
    assert torch.equal(run(again), expected)
    copies = [again.get_base_model().get_submodule(name).modules_to_save["default"] for name in ("head", "tied")]
    assert copies[0].weight is copies[1].weight
    with model.disable_adapter():
        assert torch.equal(run(model), run(shared()))
    assert torch.equal(run(model.unload()), run(shared()))


def test_coat_comes_back_from_a_file(tmp_path):
    """timm's CoaT has its position encodings in every block that uses them."""
    timm = pytest.importorskip("timm")
    sizes = {"embed_dims": (16,) * 4, "serial_depths": (2, 1, 1, 1), "parallel_depth": 1, "mlp_ratios": (1,) * 4}

    def coat():
        torch.manual_seed(0)
        fields = {"img_size": 32, "patch_size": 4, "num_heads": 2, "num_classes": 3, "crpe_window": {3: 2}}
        return timm.models.coat.CoaT(**fields, **sizes).eval()

    pixels = torch.randn(2, 3, 32, 32)
    for config in (SSFConfig(target_modules="all-linear"), BitFitConfig(target_modules=r".*(cpe\d?\.proj|qkv)")):
        config.init_weights = False
        model = get_peft_model(coat(), config).eval()
        with torch.no_grad():
            expected = model(pixels)
            model.save_pretrained(tmp_path)
            assert torch.equal(PeftModel.from_pretrained(coat(), tmp_path).eval()(pixels), expected)
            torch.testing.assert_close(model.merge_and_unload()(pixels), expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ names as peft's


class Named(nn.Module):
    """Modules and methods called as those of adapter layers."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.inner = nn.ModuleDict({"base_layer": nn.Linear(4, 4), "modules_to_save": nn.Linear(4, 4)})
        self.original_module = nn.Linear(4, 4)

    def forward(self, x):
        x = self.inner["base_layer"](self.base_layer(x))
        return self.original_module(self.inner["modules_to_save"](x))

    def merge(self):
        raise AssertionError("not to be called")

    unload_and_optionally_merge_module = get_base_layer = unmerge = merge


def named():
    torch.manual_seed(0)
    target = nn.Linear(4, 4)
    target.base_layer = nn.Linear(4, 4)
    return nn.ModuleDict({"block": Named(), "target": target}).double().eval()


def run_named(model):
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        return base["target"](base["block"](torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)))


@pytest.mark.parametrize("config_cls", [SSFConfig, BitFitConfig])
@pytest.mark.parametrize("targets", [["0", "base_layer"], ["target"], ["modules_to_save", "original_module"]], ids=str)
def test_modules_may_be_called_as_those_of_peft(config_cls, targets, tmp_path):
    targets = r"block\.(base_layer\.0|inner\.base_layer)" if "base_layer" in targets else targets
    model = get_peft_model(named(), config_cls(target_modules=targets, init_weights=False)).double().eval()
    expected = run_named(model)
    assert not torch.equal(expected, run_named(named()))
    model.merge_adapter()
    torch.testing.assert_close(run_named(model), expected)
    model.unmerge_adapter()
    assert torch.equal(run_named(model), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(run_named(merged), expected)
    assert type(merged["block"].base_layer[0]) is nn.Linear
    assert merged["target"].base_layer.weight.shape == (4, 4)
    model = get_peft_model(named(), config_cls(target_modules=targets, init_weights=False)).double()
    assert torch.equal(run_named(model.unload()), run_named(named()))


def test_dla_merges():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    base = timm.create_model("dla46x_c", num_classes=3).double().eval()
    model = get_peft_model(base, SSFConfig(target_modules=["conv1", "fc"], init_weights=False)).double().eval()
    pixels = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model(pixels)
        torch.testing.assert_close(model.merge_and_unload()(pixels), expected)


# ------------------------------------------------------------------ detectors with tied heads

RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
RT = {
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_layers": 2,
    "num_queries": 5,
    "encoder_in_channels": [8, 16, 16],
    "decoder_in_channels": [32, 32, 32],
    "num_denoising": 0,
    "num_labels": 3,
}
DETR = {
    "d_model": 32,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 5,
    "num_labels": 3,
}
HGNET = {
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 16, 16],
    "stage_mid_channels": [8, 8, 8],
    "stage_out_channels": [16, 16, 16],
    "stage_num_blocks": [1, 1, 1],
    "stage_downsample": [False, True, True],
    "stage_light_block": [False] * 3,
    "stage_kernel_size": [3, 3, 3],
    "stage_numb_of_layers": [1, 1, 1],
    "hidden_sizes": [16, 16, 16],
    "depths": [1, 1, 1],
    "out_features": ["stage1", "stage2", "stage3"],
}
SWIN = {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 1, 2], "window_size": 2, "image_size": 64}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 50,
}


def rt_detr_v2():
    config = tf.RTDetrV2Config(backbone_config=tf.RTDetrResNetConfig(**RESNET), **RT)
    return tf.RTDetrV2ForObjectDetection(config)


def d_fine():
    backbone = tf.HGNetV2Config(**HGNET)
    config = tf.DFineConfig(backbone_config=backbone, **{**RT, "encoder_in_channels": [16, 16, 16]})
    return tf.DFineForObjectDetection(config)


def deformable_detr(**fields):
    config = tf.DeformableDetrConfig(backbone_config=tf.ResNetConfig(**RESNET), **DETR, num_feature_levels=3, **fields)
    return tf.DeformableDetrForObjectDetection(config)


def two_stage():
    return deformable_detr(with_box_refine=True, two_stage=True, two_stage_num_proposals=5)


def grounding_dino():
    backbone = tf.SwinConfig(**SWIN, out_indices=[2, 3])
    fields = {**DETR, "num_feature_levels": 3, "text_config": tf.BertConfig(**TEXT)}
    return tf.GroundingDinoForObjectDetection(tf.GroundingDinoConfig(backbone_config=backbone, **fields))


DETECTORS = {f.__name__: f for f in (rt_detr_v2, d_fine, deformable_detr, two_stage, grounding_dino)}
every_detector = pytest.mark.parametrize("build", DETECTORS.values(), ids=DETECTORS)


def detector(build):
    torch.manual_seed(0)
    return build().eval()


def detected(model):
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    inputs = {"pixel_values": pixels}
    if "GroundingDino" in type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__:
        inputs |= {"input_ids": torch.tensor([[1, 2, 3, 4]])}
    with torch.no_grad():
        output = model(**inputs)
    return torch.cat([output.logits.nan_to_num(neginf=-9, posinf=9), output.pred_boxes], dim=-1)


@pytest.mark.filterwarnings("ignore:No table names the task head")
@every_detector
def test_methods_take_detectors_with_tied_heads(build, tmp_path):
    config = SSFConfig(init_weights=False)
    config = AdaptFormerConfig(r=4, init_weights=False) if build is grounding_dino else config
    torch.manual_seed(1)
    model = get_peft_model(detector(build), config).eval()
    expected = detected(model)
    assert not torch.equal(expected, detected(detector(build)))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(detector(build), tmp_path).eval()
    torch.testing.assert_close(detected(again), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:No table names the task head")
@pytest.mark.parametrize("build", [rt_detr_v2, grounding_dino])
@pytest.mark.parametrize("told", [True, False])
def test_methods_of_peft_take_them(build, told, tmp_path):
    """They look for weights that are tied to the input embeddings, which these models do not tell."""
    config = LoraConfig(r=2, init_lora_weights=False)
    torch.manual_seed(1)
    base = detector(build)
    model = get_peft_model(base, with_visual_targets(config, base) if told else config).eval()
    expected = detected(model)
    assert not torch.equal(expected, detected(detector(build)))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(detector(build), tmp_path).eval()
    torch.testing.assert_close(detected(again), expected, rtol=1e-5, atol=1e-6)


def test_whole_modules_merge_into_tied_weights_one_by_one():
    """The linear probe trains a copy of each head; merged, each has its own, and unmerged they are tied again."""
    base = detector(deformable_detr)
    tied = dict(base.named_parameters(remove_duplicate=False))
    model = get_peft_model(base, LinearProbeConfig(init_weights=False)).eval()
    expected = detected(model)
    model.merge_adapter()
    torch.testing.assert_close(detected(model), expected)
    model.unmerge_adapter()
    assert torch.equal(detected(model), expected)
    after = dict(model.unload().named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in tied.items())


def test_tied_heads_train_as_one(tmp_path):
    """Of a detector whose heads share their weights, and through the files of the adapter and of the merged model."""

    def tied_heads(model):
        modules = [m for n, m in model.named_modules() if n.endswith(("class_embed.0", "class_embed.1"))]
        copies = [getattr(module, "modules_to_save", {"default": module})["default"] for module in modules]
        return {id(copy.weight) for copy in copies}

    base = detector(deformable_detr)
    count = len(tied_heads(base))
    names = [n for n, _ in base.named_modules() if n.endswith(("class_embed.0", "class_embed.1"))]
    assert count < len(names)
    model = get_peft_model(base, SSFConfig(init_weights=False, modules_to_save=names)).eval()
    assert len(tied_heads(model)) == count
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.5)
    expected = detected(model)
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(
        detected(PeftModel.from_pretrained(detector(deformable_detr), tmp_path / "adapter").eval()), expected
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*gets a bias by merging")
        merged = model.merge_and_unload()
    torch.testing.assert_close(detected(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(detected(again), expected, rtol=1e-4, atol=1e-5)
