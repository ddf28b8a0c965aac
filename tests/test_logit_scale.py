"""The factor of the cosine trains beside every method for class texts, for images and of peft, as one parameter."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dual_encoders import FAMILIES, NAMES, assert_learns_from_cache, classifier, images
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_language_methods import BIAS, LABELS, equation_of, prepared, randomised

import hf_visual_peft
from hf_visual_peft import ZeroShotClassifier, interpolate, load_classifier
from hf_visual_peft.language.scale import LogitScale


WITHOUT = {"flyp", "lp_plus_plus"}
METHODS = [name for name in hf_visual_peft.list_language_methods() if name not in WITHOUT]
BESIDE = {
    "adaptformer": hf_visual_peft.AdaptFormerConfig(r=4, tower="both", modules_to_save=["logit_scale"]),
    "vpt": hf_visual_peft.VPTConfig(num_virtual_tokens=2, modules_to_save=["logit_scale"]),
    "ssf": hf_visual_peft.SSFConfig(tower="text", modules_to_save=["logit_scale"]),
    "clip_lora": hf_visual_peft.clip_lora(modules_to_save=["logit_scale"], lora_dropout=0.0),
}


def config_of(name, **fields):
    if name in BESIDE:
        return copy.deepcopy(BESIDE[name])
    return hf_visual_peft.list_language_methods()[name].config_cls(train_logit_scale=True, **fields)


def made(base, name, config):
    """A model with an adapter that has seen what it must see."""
    return get_peft_model(base, config) if name in BESIDE else prepared(base, "clip", config)


def offset_of(model):
    """The learned logarithm of the factor."""
    return next(p for n, p in model.named_parameters() if n.endswith("logit_scale.modules_to_save.default.offset"))


@pytest.mark.parametrize("name", [*METHODS, *BESIDE])
def test_one_more_parameter_that_trains_is_saved_and_switched(folders, tmp_path, name):
    base = classifier(folders["clip"])
    zero_shot = base(**images("clip")).logits
    config = config_of(name)
    alone = config_of(name)
    setattr(alone, *(("modules_to_save", []) if name in BESIDE else ("train_logit_scale", False)))
    plain = made(copy.deepcopy(base), name, alone)
    without = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    model = made(base, name, config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == without + 1
    model(**images("clip"), labels=LABELS).loss.backward()
    offset = offset_of(model)
    assert offset.grad.abs() > 0
    with torch.no_grad():
        before = model.eval()(**images("clip")).logits
        offset.fill_(0.5)
        after = model(**images("clip")).logits
    if name not in ("tip_adapter", "wise_ft"):  # where all of the logits are a cosine
        torch.testing.assert_close(after, before * torch.tensor(0.5).exp(), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after, before, atol=1e-2)
    model.save_pretrained(tmp_path)
    again = load_classifier(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(again(**images("clip")).logits, after)
        with again.disable_adapter():
            torch.testing.assert_close(again(**images("clip")).logits, zero_shot)
    (key,) = [key for key in load_file(tmp_path / "adapter_model.safetensors") if "logit_scale" in key]
    assert key == "base_model.model.logit_scale.offset"


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "clip_of_2021"])
def test_loss_and_gradient_are_those_of_the_scaled_cosine(folders, family):
    """On every dual encoder, ALIGN with its temperature and SigLIP with its bias too."""
    base = classifier(folders[family])
    output = base(**images(family))
    scale, bias = base.towers.scale()
    cosine = (output.image_embeds @ output.text_embeds.T).detach()
    offset = torch.tensor(0.3, requires_grad=True)
    logits = offset.exp() * scale.detach() * cosine + (0 if bias is None else bias.detach())
    loss = F.cross_entropy(logits, LABELS)
    loss.backward()
    model = get_peft_model(base, hf_visual_peft.TaskResConfig(train_logit_scale=True))
    offset_of(model).data.fill_(0.3)
    found = model(**images(family), labels=LABELS)
    found.loss.backward()
    torch.testing.assert_close(found.loss, loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(offset_of(model).grad, offset.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_methods_whose_logits_have_no_fixed_scale_say_so(name):
    with pytest.raises(ValueError, match=r"train_logit_scale is True: must be False: "):
        config_of(name)
    with pytest.raises(ValueError, match="train_logit_scale is 1: must be"):
        hf_visual_peft.TaskResConfig(train_logit_scale=1)


def test_adapters_with_and_without_a_scale_of_their_own(base, family):
    model = get_peft_model(base, hf_visual_peft.TaskResConfig(train_logit_scale=True), "scaled")
    model.add_adapter("plain", hf_visual_peft.TaskResConfig())
    model.add_adapter("other", hf_visual_peft.TaskResConfig(train_logit_scale=True))
    randomised(model)
    wrapper = base.logit_scale.modules_to_save
    wrapper["scaled"].offset.data.fill_(0.5)
    wrapper["other"].offset.data.fill_(-0.5)
    for equation in base.adapters.equations.values():
        equation.residual.data.zero_()
    with torch.no_grad():
        cosine = base(**images(family))
        cosine = cosine.image_embeds @ cosine.text_embeds.T
        scale = base.towers.scale()[0]
        for name, offset in (("scaled", 0.5), ("plain", 0.0), ("other", -0.5), ("scaled", 0.5)):
            model.set_adapter(name)
            expected = torch.tensor(offset).exp() * scale * cosine + BIAS[family]
            torch.testing.assert_close(model(**images(family)).logits, expected, atol=1e-4, rtol=1e-4)
            trains = [n for n, p in model.named_parameters() if p.requires_grad]
            assert len(trains) == (1 if name == "plain" else 2)
            assert all(f".{name}." in n for n in trains)
        with pytest.raises(ValueError, match=r"'other' is not active.*set_adapter\('other'\)"):
            model.merge_adapter(adapter_names=["other"])
        model.delete_adapter("other")
        torch.testing.assert_close(
            model(**images(family)).logits, torch.tensor(0.5).exp() * scale * cosine + BIAS[family]
        )


@pytest.mark.parametrize("name", ["taskres", "cross_modal", "clap"])
@torch.no_grad()
def test_merged_classes_have_the_learned_scale(base, family, folders, tmp_path, name):
    zero_shot = base(**images(family)).logits
    model = randomised(prepared(base, family, config_of(name))).eval()
    offset_of(model).fill_(0.4)
    expected = model(**images(family)).logits
    base.set_class_names(["sea", "kite"])
    expected_new = model(**images(family)).logits
    base.set_class_names(NAMES)
    model.merge_adapter()
    torch.testing.assert_close(model(**images(family)).logits, expected, atol=1e-4, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(copy.deepcopy(model).unload()(**images(family)).logits, zero_shot)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    for each in (merged, ZeroShotClassifier.from_pretrained(str(tmp_path))):
        assert isinstance(each.logit_scale, LogitScale)
        torch.testing.assert_close(each(**images(family)).logits, expected, atol=1e-4, rtol=1e-5)
        each.set_class_names(["sea", "kite"])
        torch.testing.assert_close(each(**images(family)).logits, expected_new, atol=1e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", BESIDE)
def test_adapters_in_the_towers_merge_with_it(folders, name):
    base = classifier(folders["clip"])
    model = get_peft_model(base, config_of(name)).eval()
    offset_of(model).fill_(0.4)
    expected = model(**images("clip")).logits
    if name in ("vpt", "adaptformer"):
        with pytest.raises(ValueError, match="cannot be merged"):
            model.merge_and_unload()
        return
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**images("clip")).logits, expected, atol=1e-3, rtol=1e-4)
    assert isinstance(merged.logit_scale, LogitScale)


def test_a_method_for_texts_beside_adapters_in_a_tower(folders):
    base = classifier(folders["clip"])
    zero_shot = base(**images("clip")).logits
    tower = get_peft_model(base, hf_visual_peft.SSFConfig(tower="text", init_weights=False))
    inside = tower(**images("clip")).logits
    with pytest.warns(UserWarning, match="multiple adapters"):
        model = get_peft_model(base, hf_visual_peft.TaskResConfig(train_logit_scale=True), "classes")
    base.logit_scale.modules_to_save["classes"].offset.data.fill_(0.5)
    torch.testing.assert_close(model(**images("clip")).logits, inside * torch.tensor(0.5).exp(), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(inside, zero_shot, atol=1e-2)


def test_targets_of_distillation_keep_the_scale_of_the_dual_encoder(folders):
    """What ProGrad and PromptSRC hold the predictions to does not move with what is learned."""
    base = classifier(folders["clip"])
    zero_shot = base(**images("clip")).logits.detach()
    model = get_peft_model(base, config_of("prograd", num_virtual_tokens=3))
    offset_of(model).data.fill_(0.4)
    randomised(model)
    model(**images("clip"), labels=LABELS).loss.backward()
    weights = [equation_of(model).vectors, offset_of(model)]
    ours = [weight.grad.clone() for weight in weights]
    base.adapters.equations["default"].objective = lambda view, outcome, loss, labels: loss
    logits = model(**images("clip"), labels=LABELS).logits
    g = torch.autograd.grad(F.cross_entropy(logits, LABELS), weights, retain_graph=True)
    h = torch.autograd.grad(-(zero_shot.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean(), weights)
    for found, own, general in zip(ours, g, h, strict=True):
        product = (own * general).sum()
        expected = own - product.clamp(max=0) * general / general.square().sum()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_weights_between(folders):
    base = classifier(folders["clip"])
    zero_shot = base(**images("clip")).logits
    for config in (config_of("taskres"), config_of("clip_lora")):
        model = get_peft_model(copy.deepcopy(base), config)
        offset_of(model).fill_(0.6)
        for alpha in (0.0, 0.5, 1.0):
            logits = interpolate(model, alpha)(**images("clip")).logits
            torch.testing.assert_close(logits, zero_shot * torch.tensor(0.6 * alpha).exp(), atol=1e-4, rtol=1e-4)


def test_cached_features_and_groups_of_parameters(folders, tmp_path):
    for name in ("kgcoop", "taskres"):
        model = get_peft_model(classifier(folders["clip"]), config_of(name))
        offset_of(model).data.fill_(0.2)
        assert_learns_from_cache(model, "clip", tmp_path / name)
        groups = hf_visual_peft.parameter_groups(model, 0.1)
        (free,) = [group for group in groups if not group["weight_decay"]]
        assert any(p is offset_of(model) for p in free["params"])


def test_classifiers_of_earlier_versions_load(folders, tmp_path, recwarn):
    model = classifier(folders["clip"])
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.pop("logit_scale.offset") == 0
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    again = ZeroShotClassifier.from_pretrained(str(tmp_path))
    assert again.logit_scale.offset == 0
    assert torch.equal(again(**images("clip")).logits, model(**images("clip")).logits)


def test_half_precision_keeps_the_digits_of_the_scale(folders):
    model = get_peft_model(classifier(folders["clip"], dtype=torch.bfloat16), config_of("taskres"))
    assert offset_of(model).dtype == torch.float32
    model(pixel_values=images("clip")["pixel_values"].bfloat16(), labels=LABELS).loss.backward()
    assert offset_of(model).grad.abs() > 0


def test_a_name_that_is_a_parameter_only_is_told(folders):
    """A dual encoder without the classifier has its scale as a parameter, which peft would pass over in silence."""
    with pytest.raises(ValueError, match="logit_scale"):
        get_peft_model(classifier(folders["clip"]).encoder, BESIDE["vpt"])
    assert LoraConfig(modules_to_save=["logit_scale"]).modules_to_save == ["logit_scale"]
