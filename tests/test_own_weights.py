"""Methods that train weights of the towers themselves equal a dual encoder that has these weights, and interpolate."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dual_encoders import NAMES, classifier, images
from peft import get_peft_model
from test_language_methods import LABELS, SCALE, compare, equation_of, features_of, prepared, randomised
from torch import nn

import hf_visual_peft
from hf_visual_peft import Interpolation, interpolate, load_classifier, second_stage


def shaken(model):
    """The model with other trained weights, near those that it starts with."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def with_weights(base, weights):
    """A copy of the classifier whose dual encoder has other weights, and nothing else of an adapter."""
    other = copy.deepcopy(base)
    other.adapters = other.adapters.base_layer
    found = dict(other.encoder.named_parameters())
    for name, value in weights.by_name().items():
        found[name].data.copy_(value.detach())
    return other.requires_grad_(True)


@pytest.mark.parametrize(("chunk", "checkpointing"), [(256, False), (3, True)])
def test_first_stage_of_2sfs_is_training_of_the_norms(folders, family, chunk, checkpointing):
    base = classifier(folders[family], class_chunk=chunk)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = shaken(get_peft_model(base, hf_visual_peft.TwoSFSConfig())).train()
    norms = equation_of(model).norms
    output = model(**images(family), labels=LABELS)
    output.loss.backward()
    base.gradient_checkpointing_disable()
    other = with_weights(base, norms)
    image, text = features_of(other, family)
    expected = compare(family, image, text)
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
    F.cross_entropy(expected, LABELS).backward()
    owners = dict(other.encoder.named_modules())
    gradients = {
        name: parameter.grad
        for name, parameter in other.encoder.named_parameters()
        if type(owners[name.rpartition(".")[0]]) is nn.LayerNorm
    }
    assert set(gradients) == set(norms.by_name())
    for name, parameter in norms.by_name().items():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-3)


def test_second_stage_of_2sfs_trains_a_head_on_what_the_first_left(base, family, tmp_path):
    model = shaken(get_peft_model(base, hf_visual_peft.TwoSFSConfig()))
    with torch.no_grad():
        first = model(**images(family)).logits
    other = with_weights(base, equation_of(model).norms)
    second_stage(model)
    assert model.peft_config["default"].stage == 2
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.adapters.two_sfs_equation.default.head"
    ]
    torch.testing.assert_close(model(**images(family)).logits, first, atol=1e-5, rtol=1e-5)
    shaken(model)
    head = equation_of(model).head
    image, _ = features_of(other, family)
    expected = compare(family, image, head)
    losses = []
    for inputs in (images(family), {"image_features": image.detach()}):
        head.grad = None
        output = model(**inputs, labels=LABELS)
        torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
        output.loss.backward()
        losses.append((output.loss.detach(), head.grad.clone()))
    torch.testing.assert_close(*losses)
    model.eval().save_pretrained(tmp_path)
    again = load_classifier(str(tmp_path), class_names=["sea", "big dog", "kite", "cat"])
    logits = again(**images(family)).logits
    torch.testing.assert_close(logits[:, [0, 3]], expected[:, [3, 0]], atol=1e-4, rtol=1e-4)
    # a name that is written otherwise is another class, as is a new one: the adapted text tower reads them
    other.set_class_names(["big dog", "kite"])
    torch.testing.assert_close(logits[:, 1:3], other(**images(family)).logits, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_stages(base, family, folders):
    with pytest.raises(ValueError, match="ZeroShotClassifier has no stages"):
        second_stage(base)
    model = get_peft_model(base, hf_visual_peft.TwoSFSConfig())
    with pytest.raises(ValueError, match="image_features: the adapter acts inside the image tower"):
        model(image_features=torch.randn(2, 12))
    base.set_class_names(["sea"])
    with pytest.raises(ValueError, match="second_stage: the classifier has the classes"):
        second_stage(model)
    base.set_class_names(NAMES)
    second_stage(model)
    with pytest.raises(ValueError, match="second stage already"):
        second_stage(model)
    with pytest.raises(ValueError, match="stage is 3"):
        hf_visual_peft.TwoSFSConfig(stage=3)
    with pytest.raises(ValueError, match="the image tower of AlignModel has no LayerNorm"):
        get_peft_model(classifier(folders["align"]), hf_visual_peft.TwoSFSConfig())


def test_wise_ft_is_training_of_image_tower_and_head(base, family):
    model = shaken(get_peft_model(base, hf_visual_peft.WiSEFTConfig()))
    equation = equation_of(model)
    output = model(**images(family), labels=LABELS)
    output.loss.backward()
    other = with_weights(base, equation.weights)
    image, text = features_of(other, family)
    # the authors' linear: the texts times the scale at the start
    head = torch.tensor(SCALE[family]).exp() * F.normalize(text.detach(), dim=-1) + equation.residual.detach()
    head.requires_grad_()
    expected = F.normalize(image, dim=-1) @ head.T
    bias = {"clip": 0.0, "siglip": -3.0}[family]
    torch.testing.assert_close(output.logits, expected + bias, atol=1e-4, rtol=1e-4)
    F.cross_entropy(expected, LABELS).backward()
    torch.testing.assert_close(equation.residual.grad, head.grad, atol=1e-4, rtol=1e-3)
    found = dict(other.encoder.named_parameters())
    names = {name for name in found if name.startswith(("vision_model", "visual_projection"))}
    assert set(equation.weights.by_name()) == names
    for name, parameter in equation.weights.by_name().items():
        torch.testing.assert_close(parameter.grad, found[name].grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("loss_of", ["pretraining", "softmax", "sigmoid"])
@pytest.mark.parametrize("soft", [True, False])
def test_flyp_has_the_loss_of_pretraining(base, family, soft, loss_of):
    model = shaken(get_peft_model(base, hf_visual_peft.FLYPConfig(soft_targets=soft, loss=loss_of))).train()
    equation = equation_of(model)
    labels = torch.tensor([2, 0, 2])
    output = model(**images(family), labels=labels)
    output.loss.backward()
    other = with_weights(base, equation.weights)
    image, text = features_of(other, family)
    scale = other.encoder.logit_scale.exp()
    bias = getattr(other.encoder, "logit_bias", 0.0)
    every = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T + bias
    torch.testing.assert_close(output.logits, every, atol=1e-4, rtol=1e-4)
    table = every[:, labels]  # images and the texts of the batch
    rows, columns = table.log_softmax(1), table.log_softmax(0)
    if loss_of == "sigmoid" or (loss_of == "pretraining" and family == "siglip"):
        right = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]) if soft else torch.eye(3)
        loss = F.binary_cross_entropy_with_logits(table, right.to(table), reduction="sum") / 3
    elif soft:
        loss = -(rows[1, 1] + rows[[0, 0, 2, 2], [0, 2, 0, 2]].sum() / 2) / 3
        loss = (loss - (columns[1, 1] + columns[[0, 0, 2, 2], [0, 2, 0, 2]].sum() / 2) / 3) / 2
    else:
        loss = -(rows.diagonal().mean() + columns.diagonal().mean()) / 2
    torch.testing.assert_close(output.loss, loss, atol=1e-4, rtol=1e-4)
    loss.backward()
    found = dict(other.encoder.named_parameters())
    assert set(equation.weights.by_name()) == set(found)
    for name, parameter in equation.weights.by_name().items():
        torch.testing.assert_close(parameter.grad, found[name].grad, atol=1e-4, rtol=1e-3)
    other.config.problem_type = base.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="text of one class"):
        model(**images(family), labels=torch.eye(4)[:3])


def test_flyp_draws_a_template_for_each_class(folders):
    templates = ["a photo of a {}.", "the {}.", "{}"]
    base = classifier(folders["clip"], templates=templates)
    model = get_peft_model(base, hf_visual_peft.FLYPConfig()).train()
    torch.manual_seed(0)
    drawn = [model(**images("clip"), labels=LABELS).text_embeds.detach() for _ in range(6)]
    each = torch.stack([classifier(folders["clip"], templates=text).class_features().detach() for text in templates])
    nearest = [(each - text).norm(dim=-1).min(0) for text in drawn]
    assert all(distance.max() < 1e-5 for distance, _ in nearest)
    assert len({tuple(which.tolist()) for _, which in nearest}) > 2
    torch.testing.assert_close(model.eval()(**images("clip")).text_embeds, base.class_features())


@pytest.mark.parametrize("name", ["flyp", "two_sfs", "wise_ft"])
def test_half_precision(folders, name):
    base = classifier(folders["chinese_clip"], dtype=torch.bfloat16)
    config = hf_visual_peft.list_language_methods()[name].config_cls()
    model = get_peft_model(base, config)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    pixels = images("chinese_clip")["pixel_values"].bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, base(pixels).logits, atol=0, rtol=0)
    model(pixels, labels=LABELS).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_another_adapter_inside_is_named(base, family):
    model = get_peft_model(base, hf_visual_peft.FLYPConfig())
    layer = base.encoder.text_model.encoder.layers[0].mlp
    layer.fc1 = nn.Sequential(layer.fc1)
    with pytest.raises(ValueError, match="has no weight text_model.*Take other adapters out"):
        model(**images(family))


START = ["clap", "cross_modal", "flyp", "kgcoop", "lp_plus_plus", "taskres", "two_sfs", "wise_ft"]


@pytest.mark.parametrize("name", START)
def test_weights_between_base_and_adapter(folders, tmp_path, name):
    base = classifier(folders["clip"])
    base.requires_grad_(False)
    zero_shot = base(**images("clip")).logits
    state = {key: value.clone() for key, value in base.encoder.state_dict().items()}
    model = prepared(base, "clip", hf_visual_peft.list_language_methods()[name].config_cls())
    start = {key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad}
    if name == "lp_plus_plus":  # `fit` has moved them
        scale = torch.tensor(SCALE["clip"]).exp()
        start = {key: torch.zeros_like(v) + scale * key.endswith("alpha") for key, v in start.items()}
    shaken(model).eval()
    tuned, trains = model(**images("clip")).logits.detach(), [p.requires_grad for p in model.parameters()]
    between = Interpolation(model)
    with torch.no_grad():
        assert torch.equal(between(0.0)(**images("clip")).logits, zero_shot)
        assert torch.equal(between(1)(**images("clip")).logits, tuned)
        half = between(0.5)
        logits = half(**images("clip")).logits
    learned = dict(model.named_parameters())
    for key, value in half.named_parameters():
        if key in start:
            torch.testing.assert_close(value, (start[key] + learned[key]) / 2)
            assert not torch.equal(value, learned[key])
    assert not torch.equal(logits, tuned)
    half.save_pretrained(tmp_path)
    torch.testing.assert_close(load_classifier(str(tmp_path))(**images("clip")).logits, logits)
    # neither the model nor its base has changed
    assert torch.equal(model(**images("clip")).logits, tuned)
    assert [p.requires_grad for p in model.parameters()] == trains
    assert all(torch.equal(value, state[key]) for key, value in base.encoder.state_dict().items())


def test_features_of_stages_lie_between_as_well(folders):
    base = classifier(folders["clip"]).requires_grad_(False)
    zero_shot = base(**images("clip")).logits
    model = shaken(get_peft_model(base, hf_visual_peft.TwoSFSConfig()))
    second_stage(model)
    tuned = shaken(model).eval()(**images("clip")).logits
    between = Interpolation(model)
    with torch.no_grad():
        assert torch.equal(between(0)(**images("clip")).logits, zero_shot)
        assert torch.equal(between(1)(**images("clip")).logits, tuned)
    norms = equation_of(between(0.25)).norms.by_name()
    ends = dict(base.encoder.named_parameters()), equation_of(model).norms.by_name()
    for key, value in norms.items():
        torch.testing.assert_close(value, 0.75 * ends[0][key] + 0.25 * ends[1][key])


def test_adapters_of_both_towers_lie_between(folders):
    base = classifier(folders["clip"])
    zero_shot = base.requires_grad_(False)(**images("clip")).logits
    model = randomised(get_peft_model(base, hf_visual_peft.clip_lora())).eval()
    between = Interpolation(model)
    assert torch.equal(between(0)(**images("clip")).logits, zero_shot)
    torch.testing.assert_close(
        between(1)(**images("clip")).logits, model(**images("clip")).logits, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["clip_adapter", "cocoop", "coop", "maple", "tcp", "tip_adapter", "upt"])
def test_random_starts_have_nothing_between(base, family, name):
    model = prepared(base, family, hf_visual_peft.list_language_methods()[name].config_cls())
    with pytest.raises(ValueError, match="Config starts from random weights.*FLYPConfig, WiSEFTConfig"):
        interpolate(model, 0.5)


def test_other_templates_are_another_start(base, family):
    model = get_peft_model(base, hf_visual_peft.TaskResConfig())
    base.set_class_names(NAMES, "the {}.")
    with pytest.raises(ValueError, match="started from the templates"):
        interpolate(model, 0.5)
