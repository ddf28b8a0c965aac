"""Methods beside linears against their equations."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from equations import LINEARS, OUTPUTS, assert_equal, both, weights_by_path
from families import FAMILIES, WIDTH, output_of
from peft import get_peft_model

from hf_visual_peft import (
    AdapterBiasConfig,
    ConsolidatorConfig,
    HydraConfig,
)
from hf_visual_peft.methods.adapter.consolidator import Consolidator


def hydra(x, y, w):
    def low_rank(v, branch):
        hidden = v @ w[f"{branch}.down.weight"].T + w[f"{branch}.down.bias"]
        return hidden @ w[f"{branch}.up.weight"].T + w[f"{branch}.up.bias"]

    return y + 1.5 * low_rank(x, "parallel") + 1.5 * low_rank(y, "sequential")


def adapter_bias(x, y, w):
    return y + (x @ w["weight.weight"].T + w["weight.bias"]) * w["shift"]


def consolidator(x, y, w):
    groups = w["weight"].shape[0]
    weight = w["weight"].flatten(0, 1).unsqueeze(-1)  # as a 1x1 convolution
    return y + F.conv1d(x.transpose(1, 2), weight, w["bias"], groups=groups).transpose(1, 2)


def consolidator_shuffled(x, y, w):
    """The shuffle of ShuffleNet, which torch has."""
    return consolidator(F.channel_shuffle(x.transpose(1, 2), w["weight"].shape[0]).transpose(1, 2), y, w)


@both
@pytest.mark.parametrize(
    ("config", "slot", "equation", "names"),
    [
        (HydraConfig(r=2, scale=1.5), "hydra_branches", hydra, OUTPUTS),
        (AdapterBiasConfig(), "adapterbias_shift", adapter_bias, ("mlp.fc2",)),
        (ConsolidatorConfig(groups=4), "consolidator_groups", consolidator, LINEARS),
        (ConsolidatorConfig(groups=4, shuffle=True), "consolidator_groups", consolidator_shuffled, LINEARS),
        (ConsolidatorConfig(groups=8, shuffle=True), "consolidator_groups", consolidator_shuffled, LINEARS),
    ],
    ids=["hydra", "adapterbias", "consolidator", "consolidator_shuffled", "consolidator_pairs"],
)
@torch.no_grad()
def test_methods_at_linears(name, config, slot, equation, names):
    family = FAMILIES[name]
    inputs = family.inputs(2)
    base = family.model()
    torch.manual_seed(3)
    config = dataclasses.replace(config, init_weights=False)
    model = get_peft_model(family.model(), config).eval()
    weights = weights_by_path(model, slot)
    assert sorted(weights) == sorted(key for key, _ in base.named_modules() if key.endswith(names))
    for key, w in weights.items():
        base.get_submodule(key).register_forward_hook(lambda module, args, output, w=w: equation(args[0], output, w))
    assert_equal(output_of(model, inputs), output_of(base, inputs))
    merged = model.merge_and_unload(safe_merge=True)
    assert_equal(output_of(merged, inputs), output_of(base, inputs))


def test_methods_at_linears_initialisation():
    torch.manual_seed(0)
    for w in weights_by_path(get_peft_model(FAMILIES["vit"].model(), HydraConfig(r=8)), "hydra_branches").values():
        for branch in ("parallel", "sequential"):
            zeros = ("down.bias", "up.weight", "up.bias")
            assert not any(w[f"{branch}.{name}"].any() for name in zeros)
            down = w[f"{branch}.down.weight"]
            bound = math.sqrt(6 / sum(down.shape))  # Xavier
            assert 0.8 * bound < down.abs().max() <= bound
    for w in weights_by_path(
        get_peft_model(FAMILIES["vit"].model(), AdapterBiasConfig()), "adapterbias_shift"
    ).values():
        assert not w["shift"].any()
        assert w["weight.weight"].any()
    config = ConsolidatorConfig(groups=4)
    for w in weights_by_path(get_peft_model(FAMILIES["vit"].model(), config), "consolidator_groups").values():
        for values in w.values():
            assert 5e-4 < values.abs().max() <= 1e-3


def test_shuffled_groups_read_the_channels_of_the_released_code():
    """384 groups on 768 channels: the first reads 0 and 2, the second 4 and 6, the one after the half 1 and 3."""
    module = Consolidator(torch.nn.Linear(768, 768), 384, True, 0.0)
    torch.nn.init.ones_(module.weight)
    torch.nn.init.zeros_(module.bias)
    read = module(torch.zeros(768, 768), torch.eye(768))
    folded, _ = module.fold(torch.zeros(768, 768), None)
    for output, channels in ((0, [0, 2]), (1, [0, 2]), (2, [4, 6]), (384, [1, 3]), (767, [765, 767])):
        assert read[:, output].nonzero().flatten().tolist() == channels
        assert folded[output].nonzero().flatten().tolist() == channels


def test_groups_must_divide_every_linear():
    with pytest.raises(ValueError, match="groups is 384: must be a divisor of the backbone's width 16"):
        get_peft_model(FAMILIES["vit"].model(), ConsolidatorConfig(groups=384))
    model = FAMILIES["dinov2_swiglu"].model()
    model.dinov2.encoder.layer[2].mlp.up_proj = torch.nn.Linear(WIDTH, 46)
    modules = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="groups is 4: must divide out_features 46 of Linear"):
        get_peft_model(model, ConsolidatorConfig(groups=4))
    assert modules == {name: id(module) for name, module in model.named_modules()}
