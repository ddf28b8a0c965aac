"""Switching looks at the backbone and at the adapters that it concerns, and does what peft's does."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, output_of
from peft import LoraConfig, get_peft_model
from peft.tuners import tuners_utils

import hf_visual_peft
from hf_visual_peft.core.switching import concerned


FAMILY = FAMILIES["vit"]
FIELDS = {"ssf": {}, "adaptformer": {"r": 4}, "vpt": {"num_virtual_tokens": 3}, "hydra": {"r": 2}, "partial": {}}
METHODS = list(FIELDS)


def config(method, **fields):
    return hf_visual_peft.get_method(method).config_cls(init_weights=False, **FIELDS[method], **fields)


def with_adapters(method, count, **fields):
    torch.manual_seed(0)
    model = get_peft_model(FAMILY.model(), config(method, **fields), adapter_name="a0")
    for number in range(1, count):
        model.add_adapter(f"a{number}", config(method, **fields))
    return model.eval()


def state(model):
    """Which parameters train, and what is active where."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = (m for m in model.modules() if isinstance(m, tuners_utils.BaseTunerLayer))
    return trained, [tuple(layer.active_adapters) for layer in layers]


@pytest.mark.parametrize("method", METHODS)
def test_as_peft_does(method):
    ours, peft = with_adapters(method, 4), with_adapters(method, 4)
    for names, inference in (("a2", False), (["a1"], False), ("a3", True), ("a0", False)):
        ours.base_model.set_adapter(names, inference_mode=inference)
        tuners_utils.set_adapter(peft.base_model.model, names, inference_mode=inference)
        assert state(ours) == state(peft)
        assert torch.equal(output_of(ours, FAMILY.inputs(1)), output_of(peft, FAMILY.inputs(1)))
    assert state(ours)[0]
    assert all(".a0." in name for name in state(ours)[0])


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_were_turned_on_go_off_again(method):
    ours, peft = with_adapters(method, 3), with_adapters(method, 3)
    for model in (ours, peft):
        model.base_model.set_requires_grad("a1", True)
    assert any(".a1." in name for name in state(ours)[0])
    ours.set_adapter("a2")
    tuners_utils.set_adapter(peft.base_model.model, "a2")
    assert state(ours) == state(peft)
    assert not any(".a1." in name and "modules_to_save" not in name for name in state(ours)[0])


@pytest.mark.parametrize("method", METHODS)
def test_what_is_looked_at_does_not_grow(method):
    seen = [len(list(concerned(with_adapters(method, n).base_model.model, ["a1"]))) for n in (2, 6)]
    assert seen[0] == seen[1]


def test_copies_are_switched_with_their_adapters():
    """A copy that `modules_to_save` makes of a module holds no layers, as the method leaves that module out."""
    path = hf_visual_peft.find_backbone(FAMILY.model()).patch_embedding[0].rpartition(".")[0]
    with pytest.warns(UserWarning, match=rf"SSFConfig leaves out {path}"):
        ours, peft = (with_adapters("ssf", 3, modules_to_save=[path]) for _ in range(2))
    for name in ("a1", "a2", "a0"):
        ours.base_model.set_adapter(name)
        tuners_utils.set_adapter(peft.base_model.model, name)
        assert torch.equal(output_of(ours, FAMILY.inputs(1)), output_of(peft, FAMILY.inputs(1)))
        wrapper = ours.get_submodule(f"base_model.model.{path}")
        assert wrapper.active_adapters == [name]
        assert not any(isinstance(module, tuners_utils.BaseTunerLayer) for module in wrapper.modules())


@pytest.mark.parametrize("method", ["ssf", "hydra", "partial"])
def test_merged_adapters_are_taken_out_first(method):
    model = with_adapters(method, 2)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        model.set_adapter("a1")
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, tuners_utils.BaseTunerLayer))


@pytest.mark.parametrize(
    "config", [hf_visual_peft.VPTConfig(num_virtual_tokens=2), LoraConfig(r=2, target_modules=["q_proj"])]
)
def test_what_transformers_turns_off_it_turns_on_again(config):
    """Also the copy of the head: transformers leaves it off."""
    model, inputs = FAMILY.model(), FAMILY.inputs(1)
    config = copy.deepcopy(config)
    config.modules_to_save = ["classifier"]
    model.eval()
    before = output_of(model, inputs)
    model.add_adapter(config)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_()
    adapted = output_of(model, inputs)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for _ in range(2):
        model.disable_adapters()
        assert torch.equal(output_of(model, inputs), before)
        model.enable_adapters()
        assert torch.equal(output_of(model, inputs), adapted)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert not torch.equal(before, adapted)
