"""Parameter groups: what decays, and that nothing else moves by decay."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, WIDTH, images, output_of
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPConfig, CLIPModel

import hf_visual_peft
from hf_visual_peft import BitFitConfig, GPSConfig, HydraConfig, SSFConfig, calibrate, parameter_groups
from hf_visual_peft.coverage.sizes import small_fields


class Odd(nn.Module):
    """One of each kind of parameter."""

    no_weight_decay = ("kept",)

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(3, 4))
        self.kept = nn.Parameter(torch.ones(3, 4))
        self.vector = nn.Parameter(torch.ones(3))
        self.number = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.ones(3, 4), requires_grad=False)
        self.norm = nn.LayerNorm(4)
        self.convolution = nn.Conv2d(2, 2, 3)
        self.tied = self.matrix


def members(groups):
    return [parameter for group in groups for parameter in group["params"]]


def named(model, group):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


def decay(model, steps=3):
    """Steps of AdamW with strong decay, where all gradients are zero."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1)
    for _ in range(steps):
        for parameter in members(optimizer.param_groups):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


def test_two_groups():
    model = Odd()
    decays, keeps = parameter_groups(model, 0.05)
    assert (decays["weight_decay"], keeps["weight_decay"]) == (0.05, 0.0)
    assert named(model, decays) == {"matrix", "convolution.weight"}
    assert named(model, keeps) == {"kept", "vector", "number", "norm.weight", "norm.bias", "convolution.bias"}


def test_a_learning_rate_for_each_tower():
    config = CLIPConfig(
        text_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
        projection_dim=4,
    )
    encoder = CLIPModel(config)
    groups = parameter_groups(encoder, 0.1, {"text": 1e-3, "vision": 1e-4})
    assert len(members(groups)) == len(list(encoder.parameters()))
    names = [(group.get("lr"), group["weight_decay"], named(encoder, group)) for group in groups]
    for rate, _, found in names:
        tower = {1e-3: "text_", 1e-4: "vis"}.get(rate)
        assert found == {"logit_scale"} if tower is None else all(name.startswith(tower) for name in found)
    assert sorted((rate or 0, weight) for rate, weight, _ in names) == [
        (0, 0.0),
        (1e-4, 0.0),
        (1e-4, 0.1),
        (1e-3, 0.0),
        (1e-3, 0.1),
    ]
    model = get_peft_model(encoder, SSFConfig(tower="both"))
    groups = parameter_groups(model, 0.1, {"text": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all("text_model" in name for name in named(model, groups[1]))
    alone = get_peft_model(model.unload(), SSFConfig())
    with pytest.raises(ValueError, match=r"learning_rates\['text'\] is 0.1: nothing of a text tower trains in PeftM"):
        parameter_groups(alone, 0.1, {"text": 0.1})
    with pytest.raises(ValueError, match="learning_rates has 'texts': must be among 'vision', 'text'"):
        parameter_groups(alone, 0.1, {"texts": 0.1})
    with pytest.raises(ValueError, match=r"learning_rates\['vision'\] is -1: must be 0 or greater"):
        parameter_groups(alone, 0.1, {"vision": -1})
    with pytest.raises(ValueError, match="nothing of a vision tower trains in Odd"):
        parameter_groups(Odd(), 0.1, {"vision": 0.1})


def test_a_parameter_in_two_places_is_one():
    """What a module names holds wherever the parameter stands."""
    outer = nn.Module()
    outer.odd = Odd()
    outer.alias = nn.Linear(4, 3, bias=False)
    outer.alias.weight = outer.odd.kept
    ids = [id(parameter) for parameter in members(parameter_groups(outer, 0.1))]
    assert len(ids) == len(set(ids)) == 8
    assert id(outer.odd.kept) in {id(p) for p in parameter_groups(outer, 0.1)[1]["params"]}


def test_names_hold_for_the_module_that_owns_the_parameter():
    outer = nn.ModuleDict({"odd": Odd(), "other": nn.Module()})
    outer["other"].kept = nn.Parameter(torch.ones(2, 2))
    assert "other.kept" in named(outer, parameter_groups(outer, 0.1)[0])
    assert "odd.kept" in named(outer, parameter_groups(outer, 0.1)[1])


def test_empty_groups_are_left_out():
    (keeps,) = parameter_groups(nn.LayerNorm(3), 0.1)
    assert keeps["weight_decay"] == 0.0
    (decays,) = parameter_groups(nn.Linear(3, 3, bias=False), 0.1)
    assert decays["weight_decay"] == 0.1


@pytest.mark.parametrize("method", hf_visual_peft.list_methods().values(), ids=lambda method: method.name)
def test_groups_are_complete_and_disjoint(method):
    model = get_peft_model(FAMILIES["vit"].model(), method.config_cls(**_small(method)))
    parts = members(parameter_groups(model, 0.1))
    assert len({id(p) for p in parts}) == len(parts), "none twice"
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in parts} == trainable


def _small(method):
    return small_fields(method.config_cls, {}, WIDTH)


@pytest.mark.parametrize("method", hf_visual_peft.list_methods().values(), ids=lambda method: method.name)
def test_decay_alone_moves_matrices_only(method):
    model = get_peft_model(FAMILIES["vit"].model(), method.config_cls(**_small(method), init_weights=False))
    named_only = {
        id(p)
        for m in model.modules()
        for n, p in m.named_parameters(recurse=False)
        if n in getattr(m, "no_weight_decay", ())
    }
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    decay(model)
    for name, parameter in model.named_parameters():
        moves = parameter.requires_grad and parameter.ndim > 1 and id(parameter) not in named_only
        assert torch.equal(parameter, before[name]) == (not moves or not before[name].any()), name


def test_sparse_values_of_gps_do_not_decay():
    model = get_peft_model(FAMILIES["vit"].model(), GPSConfig(init_weights=False))
    values = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(".values")}
    assert values
    assert all(value.any() for value in values.values())
    assert {n for n, p in model.named_parameters() if p.requires_grad} - values.keys() == {
        f"base_model.model.classifier.modules_to_save.default.{n}" for n in ("weight", "bias")
    }
    decay(model)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in values.items())
    head = after["base_model.model.classifier.modules_to_save.default.weight"]
    torch.testing.assert_close(head, FAMILIES["vit"].model().classifier.weight * (1 - 0.1 * 0.5) ** 3)


def test_chosen_values_do_not_decay_in_training():
    """Decayed or not, training gives the sparse values the same steps."""
    batch = images(4) | {"labels": torch.tensor([0, 1, 0, 1])}
    results = []
    for weight_decay in (0.0, 0.5):
        model = get_peft_model(FAMILIES["vit"].model(), GPSConfig(modules_to_save=[]))
        calibrate(model, [batch], progress=False)
        optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        results.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    first, second = results
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(value.any() for value in first.values())


@pytest.mark.parametrize("config", [SSFConfig(), HydraConfig(), BitFitConfig()], ids=lambda c: c.peft_type.value)
def test_frozen_weights_and_norms_stay(config):
    base = FAMILIES["vit"].model()
    before = {name: p.clone() for name, p in base.named_parameters()}
    decay(get_peft_model(base, config), steps=5)
    frozen = {n.replace(".base_layer", ""): p for n, p in base.named_parameters() if not p.requires_grad}
    assert len(frozen) >= len(before) - 2
    for name, parameter in frozen.items():
        assert torch.equal(parameter, before[name.replace(".original_module", "")]), name


def test_bitfit_leaves_biases_without_gradient_as_they_were():
    family = FAMILIES["vit"]
    model = get_peft_model(family.model(), BitFitConfig())
    shifts = {n: p for n, p in model.named_parameters() if n.endswith(".shift")}
    untouched = {n for n in shifts if ".layers.2." in n or "vit.layernorm" in n}
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        hidden = model.get_base_model().vit(**family.inputs(2), output_hidden_states=True).hidden_states
        hidden[2].square().mean().backward()  # before the last block, which thus gets no gradient
        optimizer.step()
    assert untouched
    assert all(shifts[n].grad is None and not shifts[n].any() for n in untouched)
    assert all(p.any() for n, p in shifts.items() if n not in untouched and "k_proj" not in n)
    merged = model.merge_and_unload()
    start = dict(family.model().named_parameters())
    moved = {n for n, p in merged.named_parameters() if not torch.equal(p, start[n])}
    assert moved
    assert all(n.endswith("bias") for n in moved)
    assert not any(n.startswith(("vit.layers.2.", "vit.layernorm")) for n in moved)


def test_biases_of_bitfit_move_by_the_gradient_alone():
    results = []
    for weight_decay in (0.0, 0.5):
        torch.manual_seed(1)
        model = get_peft_model(FAMILIES["vit"].model(), BitFitConfig(modules_to_save=[]))
        optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            output_of(model, images(2)).square().mean().backward()
            optimizer.step()
        results.append(dict(model.merge_and_unload().named_parameters()))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("value", [-1.0, -1e-9, float("nan"), float("inf")])
def test_decay_that_makes_no_sense(value):
    with pytest.raises(ValueError, match=rf"weight_decay is {value}: must be 0 or greater"):
        parameter_groups(nn.Linear(2, 2), value)


def test_nothing_to_train():
    with pytest.raises(ValueError, match=r"Linear has no parameter that trains\."):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)
    with pytest.raises(ValueError, match=r"ReLU has no parameter that trains\."):
        parameter_groups(nn.ReLU(), 0.0)


class Told(nn.Module):
    """As models of timm: a method tells what does not decay, with dots for what lies deeper."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.ones(3, 4))
        self.block = nn.ModuleDict({"proj": nn.Linear(4, 4), "out": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 2)

    def no_weight_decay(self):
        return {"position", "block.proj.weight", "head.weight"}

    def forward(self, x):
        return self.head(self.block["out"](self.block["proj"](x)))


def test_a_method_may_name_what_does_not_decay():
    model = Told()
    decays, keeps = parameter_groups(model, 0.05)
    assert named(model, decays) == {"block.out.weight"}
    assert {"position", "block.proj.weight", "head.weight"} <= named(model, keeps)


def test_names_hold_behind_what_peft_puts_between():
    config = LoraConfig(target_modules=["block.proj"], modules_to_save=["head"], bias="all")
    model = get_peft_model(Told(), config)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    _, keeps = parameter_groups(model, 0.05)
    found = {name.removeprefix("base_model.model.") for name in named(model, keeps)}
    assert {"position", "block.proj.base_layer.weight", "head.modules_to_save.default.weight"} <= found
    assert not any("lora" in name or "out.weight" in name for name in found)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "deit_tiny_patch16_224"])
def test_models_of_timm_keep_what_they_name_from_decay(name):
    timm = pytest.importorskip("timm")
    small = {"img_size": 32, "embed_dim": 16, "num_classes": 3}
    shape = (
        {"depths": (1, 1), "num_heads": (1, 1), "window_size": 4} if "swin" in name else {"depth": 1, "num_heads": 2}
    )
    model = timm.create_model(name, **small, **shape)
    _, keeps = parameter_groups(model, 0.05)
    assert model.no_weight_decay()
    assert model.no_weight_decay() & {n for n, _ in model.named_parameters()} <= named(model, keeps)
    adapted = get_peft_model(model, BitFitConfig())
    assert parameter_groups(adapted, 0.1)
