"""The statistics of a frozen backbone's norms stay, or move and are saved with the adapter."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

import hf_visual_peft
from hf_visual_peft.backbones.frozen_norms import (
    NormStatistics,
    freeze_norms,
    keeps_statistics,
    move_statistics,
    norms_with_statistics,
    thaw_norms,
)
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.coverage.tiny import LABELS


CLASSIFIERS = (
    "cvt",
    "efficientnet",
    "hgnet_v2",
    "levit",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilevit",
    "mobilevitv2",
    "pp_lcnet",
    "regnet",
    "resnet",
    "swiftformer",
    "textnet",
)
on_classifiers = pytest.mark.parametrize("tiny", [MODELS[name] for name in CLASSIFIERS], ids=CLASSIFIERS)
RESNET = MODELS["resnet"]


def lora(model, **fields):
    """LoRA at every linear and ungrouped convolution but those of the head, which trains as a whole."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    heads = [name for name, layer in layers.items() if getattr(layer, "out_features", None) == LABELS["num_labels"]]
    targets = [name for name, layer in layers.items() if getattr(layer, "groups", 1) == 1 and name not in heads]
    if "mobilenet_v" in model.config.model_type:  # it reads `stride` off its convolutions, which those of LoRA lack
        return LoraConfig(r=2, target_modules=heads, **fields)
    fields["modules_to_save"] = [*fields.get("modules_to_save", []), *heads]
    return LoraConfig(r=2, target_modules=targets, **fields)


# A matrix product of torch's takes another way, and rounds differently, where a weight asks for a gradient. So the
# outputs compared are those of models whose weights ask for the same.
def frozen(tiny):
    return tiny.model().requires_grad_(False)


def output_of(tiny, model, batch):
    out = tiny.call(model, tiny.arguments(batch))
    return getattr(out, "logits", getattr(out, "last_hidden_state", out))


@torch.no_grad()
def logits(tiny, model):
    return output_of(tiny, model.eval(), 3)


def train(tiny, model, steps=2):
    model.train()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for _ in range(steps):
        output_of(tiny, model, 4).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def reloaded(tiny, model, folder, freeze=True):
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(tiny.model(), folder, is_trainable=True)
    if freeze:
        freeze_norms(loaded)
    return loaded


def test_these_are_all_classifiers_with_batch_norm():
    mapping = set(tf.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    found = [
        name
        for name, tiny in MODELS.items()
        if name in mapping and tiny.missing_package is None and norms_with_statistics(tiny.model())
    ]
    assert sorted(found) == list(CLASSIFIERS)


@on_classifiers
def test_backbone_stays_and_adapter_reloads(tiny, tmp_path):
    before = logits(tiny, frozen(tiny))
    base = tiny.model()
    model = get_peft_model(base, lora(base))
    assert len(freeze_norms(model)) == sum(keeps_statistics(module) for module in tiny.model().modules()) > 0
    train(tiny, model)
    after = logits(tiny, model)
    assert after.isfinite().all()
    assert not torch.equal(before, after)
    with model.disable_adapter():
        assert torch.equal(logits(tiny, model), before)
    assert torch.equal(logits(tiny, reloaded(tiny, model, tmp_path)), after)


@on_classifiers
def test_without_it_the_backbone_moves(tiny, tmp_path):
    before = logits(tiny, frozen(tiny))
    base = tiny.model()
    model = get_peft_model(base, lora(base))
    train(tiny, model)
    after = logits(tiny, model)
    with model.disable_adapter():
        assert not torch.equal(logits(tiny, model), before)
    assert not torch.equal(logits(tiny, reloaded(tiny, model, tmp_path, freeze=False)), after)


@on_classifiers
def test_modules_to_save_of_peft_move_and_are_saved(tiny, tmp_path):
    before = logits(tiny, frozen(tiny))
    base = tiny.model()
    norms = norms_with_statistics(base)
    model = get_peft_model(base, lora(base, modules_to_save=norms))
    assert len(freeze_norms(model)) == len(norms)
    start = {name: module.running_mean.clone() for name, module in tiny.model().named_modules() if name in norms}
    train(tiny, model)
    for name in norms:
        wrapper = model.base_model.model.get_submodule(name)
        copied = wrapper.modules_to_save["default"]
        assert torch.equal(wrapper.original_module.running_mean, start[name])
        assert not torch.equal(copied.running_mean, start[name])
        assert copied.num_batches_tracked - wrapper.original_module.num_batches_tracked == 2
    after = logits(tiny, model)
    with model.disable_adapter():
        assert torch.equal(logits(tiny, model), before)
    assert torch.equal(logits(tiny, reloaded(tiny, model, tmp_path)), after)


@pytest.mark.parametrize(
    "tiny", [MODELS[name] for name in MODELS if MODELS[name].kind == "timm"], ids=lambda t: t.name
)
def test_timm_models(tiny, tmp_path):
    if tiny.missing_package:
        pytest.skip(f"needs {tiny.missing_package}")
    base = tiny.model()
    before = logits(tiny, frozen(tiny))
    norms = norms_with_statistics(base)
    targets = [name for name, m in base.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets[:3], init_lora_weights=False))
    assert len(freeze_norms(model)) == len(norms)
    train(tiny, model)
    with model.disable_adapter():
        assert torch.equal(logits(tiny, model), before)
    after = logits(tiny, model)
    assert torch.equal(logits(tiny, reloaded(tiny, model, tmp_path)), after)


def adapted_resnet(freeze=True):
    base = RESNET.model()
    model = get_peft_model(base, lora(base))
    if freeze:
        freeze_norms(model)
    return model


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("way", ["unload", "merge_and_unload"])
@pytest.mark.parametrize("training", [True, False])
def test_unloading_undoes_it(way, training):
    model = adapted_resnet()
    train(RESNET, model)
    model.train(training)
    assert not any(norm.training for norm in norms_of(model))
    plain = getattr(model, way)()
    assert all(norm.training == training for norm in norms_of(plain))
    assert not any("train" in vars(module) for module in plain.modules())
    assert not {"unload", "merge_and_unload"} & vars(model.base_model).keys()
    plain.train()
    mean = norms_of(plain)[0].running_mean.clone()
    plain(**RESNET.arguments(4))
    assert not torch.equal(norms_of(plain)[0].running_mean, mean)


def test_unloading_that_fails_leaves_it(monkeypatch):
    model = adapted_resnet()

    def fail(*args, **kwargs):
        raise ValueError("cannot be merged")

    monkeypatch.setattr(type(model.base_model), "_unload_and_optionally_merge", fail)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    model.train()
    assert not any(norm.training for norm in norms_of(model))


def test_thawing_gives_the_mode_that_was_asked_for():
    model = RESNET.model().train()
    norms_of(model)[0].eval()  # by the user's own choice
    freeze_norms(model)
    thaw_norms(model)
    assert [norm.training for norm in norms_of(model)] == [False] + [True] * (len(norms_of(model)) - 1)
    freeze_norms(model)
    model.eval()
    thaw_norms(model)
    assert not any(norm.training for norm in norms_of(model))
    assert not any("train" in vars(module) for module in model.modules())


def test_is_idempotent_and_returns_the_module():
    model = adapted_resnet()
    assert freeze_norms(model) == freeze_norms(model)
    norm = norms_of(model)[0]
    assert norm.train() is norm
    assert norm.eval() is norm
    model.unload()
    assert "train" not in vars(norm)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "accelerate", "inner"])
def test_survives(how):
    model = adapted_resnet()
    before = logits(RESNET, frozen(RESNET))
    original = model
    if how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif how == "accelerate":
        model = Accelerator(cpu=True).prepare(model)
    else:
        model.base_model.model.train()
    train(RESNET, model)
    if how in ("deepcopy", "pickle"):
        assert all(vars(norm)["train"].norm is norm for norm in norms_of(model))
        assert not set(map(id, norms_of(model))) & set(map(id, norms_of(original)))
        assert vars(model.base_model)["unload"].tuner is model.base_model
    with model.disable_adapter():
        assert torch.equal(logits(RESNET, model), before)
    plain = model.unload()
    plain.train()
    assert all(norm.training for norm in norms_of(plain))


@pytest.mark.slow
def test_survives_compilation():
    base = RESNET.model()
    statistics = [norm.running_mean.clone() for norm in norms_of(base)]
    model = get_peft_model(base, lora(base))
    freeze_norms(model)
    model.train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    train(RESNET, compiled)
    assert all(map(torch.equal, statistics, [norm.running_mean for norm in norms_of(base)]))


def test_injected_adapters_and_other_modules():
    base = RESNET.model()
    model = inject_adapter_in_model(lora(base), base)
    assert freeze_norms(model) == norms_with_statistics(model)
    model.train()
    assert not any(norm.training for norm in norms_of(model) if "train" in vars(norm))
    thaw_norms(model)
    assert all(norm.training for norm in norms_of(model))


def test_norms_of_adapters_move(tmp_path):
    names = [name for name, m in RESNET.model().named_modules() if isinstance(m, nn.BatchNorm2d)]
    before = logits(RESNET, frozen(RESNET))
    model = get_peft_model(RESNET.model(), LNTuningConfig(target_modules=names))
    freeze_norms(model)
    train(RESNET, model)
    after = logits(RESNET, model)
    layer = model.base_model.model.get_submodule(names[0])
    seen = RESNET.model().get_submodule(names[0]).num_batches_tracked
    assert layer.base_layer.num_batches_tracked == seen
    assert layer.ln_tuning_layers["default"].num_batches_tracked == seen + 2
    with model.disable_adapter():
        assert torch.equal(logits(RESNET, model), before)
    assert torch.equal(logits(RESNET, reloaded(RESNET, model, tmp_path)), after)


def test_copy_of_a_frozen_norm_moves_once_told():
    model = adapted_resnet()
    base = model.base_model.model
    norms = norms_with_statistics(RESNET.model())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["convolution"], modules_to_save=norms))
    freeze_norms(model)
    model.train()
    wrapper = base.get_submodule(norms[0])
    assert wrapper.modules_to_save["other"].training
    assert not wrapper.original_module.training


def test_instance_norms_and_norms_frozen_by_their_makers():
    frozen = tf.models.detr.modeling_detr.DetrFrozenBatchNorm2d(4)
    tracks = nn.InstanceNorm2d(4, track_running_stats=True)
    model = nn.Sequential(frozen, tracks, nn.BatchNorm2d(4, track_running_stats=False), nn.LayerNorm(4))
    assert freeze_norms(model) == ["1"]
    model.train()
    assert [module.training for module in model] == [True, False, True, True]


def test_children_of_a_norm_keep_their_mode():
    layers = pytest.importorskip("timm.layers")
    norm = layers.BatchNormAct2d(4, drop_layer=nn.Dropout)
    model = nn.Sequential(norm)
    freeze_norms(model)
    model.eval()
    model.train()
    assert not norm.training
    assert norm.drop.training


def moving(base, name="default"):
    model = get_peft_model(base, lora(base))
    move_statistics(model.base_model.model, name)
    freeze_norms(model)
    return model


@on_classifiers
def test_statistics_that_move_are_saved(tiny, tmp_path):
    before = logits(tiny, frozen(tiny))
    base = tiny.model()
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    norms = norms_with_statistics(base)
    plain = {
        name for name, p in get_peft_model(tiny.model(), lora(tiny.model())).named_parameters() if p.requires_grad
    }
    model = moving(base)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == plain
    train(tiny, model)
    after = logits(tiny, model)
    inner = model.base_model.model
    for name in norms:
        moved = inner.get_submodule(name).modules_to_save["default"]
        assert not torch.equal(moved.running_mean, weights[f"{name}.running_mean"])
        assert moved.weight is None or torch.equal(moved.weight, weights[f"{name}.weight"])
    with model.disable_adapter():
        assert torch.equal(logits(tiny, model), before)

    model.save_pretrained(tmp_path)
    again = tiny.model()
    loaded = moving(again)
    loaded.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert torch.equal(logits(tiny, loaded), after)

    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(tiny, merged), after, rtol=0, atol=1e-4 * after.abs().max().item())
    assert merged.state_dict().keys() == weights.keys()


def test_moving_statistics_by_adapter():
    model = moving(RESNET.model())
    model.add_adapter("still", lora(RESNET.model()))
    freeze_norms(model)
    norm = norms_with_statistics(RESNET.model())[0]
    wrapper = model.base_model.model.get_submodule(norm)
    model.set_adapter("still")
    train(RESNET, model)
    seen = RESNET.model().get_submodule(norm).num_batches_tracked
    assert wrapper.modules_to_save["default"].num_batches_tracked == seen
    model.set_adapter("default")
    train(RESNET, model)
    assert wrapper.modules_to_save["default"].num_batches_tracked == seen + 2
    assert wrapper.original_module.num_batches_tracked == seen
    assert not any(p.requires_grad for p in wrapper.parameters())
    move_statistics(model.base_model.model, "still", active=False)
    assert set(wrapper.modules_to_save) == {"default", "still"}
    assert wrapper.active_adapters == ["default"]


def test_statistics_that_cannot_move():
    with pytest.raises(ValueError, match="train_norm_statistics is True, but ViTForImageClassification has no norm"):
        move_statistics(MODELS["vit"].model(), "default")

    names = norms_with_statistics(RESNET.model())
    model = get_peft_model(RESNET.model(), LNTuningConfig(target_modules=names))
    with pytest.raises(ValueError, match=r"batch|norm.*an adapter acts on that norm itself"):
        move_statistics(model.base_model.model, "default")

    base = RESNET.model()
    model = get_peft_model(base, lora(base, modules_to_save=names))
    with pytest.raises(ValueError, match="another adapter has it among its modules_to_save"):
        move_statistics(model.base_model.model, "other")
    move_statistics(model.base_model.model, "default")  # they move already

    base = RESNET.model()
    base.get_submodule(names[-1]).register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=f"{names[-1]}.*it has forward hooks"):
        move_statistics(base, "default")
    assert not any("modules_to_save" in name for name, _ in base.named_modules())


class Normed(nn.Module):
    """A batch norm over tokens behind another module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.norm = nn.BatchNorm1d(17)

    def forward(self, x, *args, **kwargs):
        return self.norm(self.inner(x, *args, **kwargs))


def normed_vit():
    """A vision transformer with batch norms before the blocks and inside them."""
    vit = MODELS["vit"].model()
    vit.vit.embeddings.dropout = Normed(vit.vit.embeddings.dropout)
    for block in vit.vit.layers:
        block.mlp.activation_fn = Normed(block.mlp.activation_fn)
    return vit.eval()


VIT = dataclasses.replace(MODELS["vit"], build=normed_vit)
METHODS = ("adaptformer", "bitfit", "convpass", "linearprobe", "lorand", "partial", "repadapter", "snf", "ssf")
of_methods = pytest.mark.parametrize("method", METHODS)


def visual(method, **fields):
    if method == "adaptformer":
        fields["r"] = 4
    return get_peft_model(normed_vit(), hf_visual_peft.get_method(method).config_cls(**fields))


@of_methods
def test_methods_of_ours_leave_the_backbone(method, tmp_path):
    before = logits(VIT, normed_vit().requires_grad_(False))
    model = visual(method)
    train(VIT, model)
    after = logits(VIT, model)
    assert not torch.equal(before, after)
    with model.disable_adapter():
        assert torch.equal(logits(VIT, model), before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(normed_vit(), tmp_path, is_trainable=True)
    assert torch.equal(logits(VIT, loaded), after)

    plain = model.unload()
    assert not any("train" in vars(module) for module in plain.modules())
    plain.train()
    assert all(module.training for module in plain.modules())


@of_methods
def test_methods_of_ours_move_statistics_when_asked(method, tmp_path):
    before = logits(VIT, normed_vit().requires_grad_(False))
    names = norms_with_statistics(normed_vit())
    model = visual(method, train_norm_statistics=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in visual(method).named_parameters() if p.requires_grad}
    train(VIT, model)
    after = logits(VIT, model)
    moved = [module for module in model.modules() if isinstance(module, NormStatistics)]
    assert len(moved) == len(names) - (method == "partial")  # whose copies of whole blocks have norms of their own
    assert all(norm.modules_to_save["default"].num_batches_tracked == 2 for norm in moved)
    assert all(norm.original_module.num_batches_tracked == 0 for norm in moved)
    with model.disable_adapter():
        assert torch.equal(logits(VIT, model), before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(normed_vit(), tmp_path, is_trainable=True)
    assert torch.equal(logits(VIT, loaded), after)

    still = dataclasses.replace(model.peft_config["default"], train_norm_statistics=False)
    model.add_adapter("still", still)
    assert torch.equal(logits(VIT, model), after)
    model.set_adapter("still")
    train(VIT, model)
    model.set_adapter("default")
    assert torch.equal(logits(VIT, model), after)
    plain = model.unload()
    assert torch.equal(logits(VIT, plain), before)


def test_merging_keeps_statistics_that_moved():
    model = visual("ssf", train_norm_statistics=True)
    train(VIT, model)
    after = logits(VIT, model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(VIT, merged), after, rtol=0, atol=1e-5 * after.abs().max().item())
    assert norms_with_statistics(merged) == norms_with_statistics(normed_vit())
    assert all(norm.num_batches_tracked == 2 for norm in merged.modules() if isinstance(norm, nn.BatchNorm1d))


def test_methods_that_act_on_the_norm_itself():
    norms = norms_with_statistics(RESNET.model())
    with pytest.raises(ValueError, match=f"{norms[0]}.*an adapter acts on that norm itself"):
        get_peft_model(RESNET.model(), hf_visual_peft.SSFConfig(target_modules=norms, train_norm_statistics=True))


def test_transformers_own_way_to_add_an_adapter():
    model = normed_vit()
    before = logits(VIT, normed_vit().requires_grad_(False))
    model.add_adapter(hf_visual_peft.AdaptFormerConfig(r=4))
    train(VIT, model)
    model.disable_adapters()
    assert torch.equal(logits(VIT, model), before)
