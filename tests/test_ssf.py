"""SSF against its equation, and folded into modules."""

from __future__ import annotations

import pytest
import torch
from equations import assert_equal, both
from families import DEPTH, FAMILIES, output_of
from peft import get_peft_model

from hf_visual_peft import (
    SSFConfig,
)


@both
@torch.no_grad()
def test_ssf(name):
    """A scale and a shift after every operation, by names that stand in the models."""
    family = FAMILIES[name]
    inputs = family.inputs(2)
    base = family.model()
    torch.manual_seed(3)
    model = get_peft_model(family.model(), SSFConfig(init_weights=False)).eval()
    pairs = {}
    for key, parameter in model.named_parameters():
        head, _, tail = key.partition(".ssf_output.default.")
        if tail:
            pairs.setdefault(head.removeprefix("base_model.model."), {})[tail] = parameter

    def after(key, module):
        p = pairs.pop(key)

        def hook(_, args, output):
            if isinstance(module, torch.nn.Conv2d):
                return output * p["scale"][None, :, None, None] + p["shift"][None, :, None, None]
            return output * p["scale"] + p["shift"]

        module.register_forward_hook(hook)

    targets = [
        key
        for key, module in base.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm | torch.nn.Conv2d) and key != "classifier"
    ]
    assert len(targets) == 8 * DEPTH + 2
    for key in targets:
        after(key, base.get_submodule(key))
    assert not pairs
    assert_equal(output_of(model, inputs), output_of(base, inputs))


def test_ssf_initialisation():
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), SSFConfig())
    scale = torch.cat([p for n, p in model.named_parameters() if n.endswith("default.scale")])
    shift = torch.cat([p for n, p in model.named_parameters() if n.endswith("default.shift")])
    for values, mean in ((scale, 1.0), (shift, 0.0)):
        assert values.mean().item() == pytest.approx(mean, abs=0.003)
        assert values.std().item() == pytest.approx(0.02, rel=0.1)
    assert SSFConfig().init_std == 0.02
    assert SSFConfig(target_modules=["fc1"]).init_std == 0.0
    assert SSFConfig(target_modules=["fc1"], init_std=0.1).init_std == 0.1


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (torch.nn.Linear(6, 5), (2, 5, 6)),
        (torch.nn.Linear(6, 5, bias=False), (2, 6)),
        (torch.nn.Conv2d(3, 4, 3, padding=1), (2, 3, 4, 4)),  # channels, height and width alike
        (torch.nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 6, 6)),
        (torch.nn.Conv1d(3, 4, 2), (2, 3, 4)),
        (torch.nn.LayerNorm(6), (2, 6, 6)),
        (torch.nn.BatchNorm2d(5), (2, 5, 5, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.filterwarnings("ignore:.*gets a bias by merging")
@torch.no_grad()
def test_ssf_folds_into_any_module(module, shape):
    x = torch.randn(shape)
    net = torch.nn.Sequential(torch.nn.Identity(), module).eval()
    expected = net(x)
    model = get_peft_model(net, SSFConfig(target_modules=["1"], init_std=0.5)).eval()
    w = {name: p for name, p in model.named_parameters() if "ssf" in name}
    scale, shift = w.values()
    dim = 1 if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.BatchNorm2d) else x.ndim - 1
    aligned = [-1 if i == dim else 1 for i in range(expected.ndim)]
    expected = expected * scale.view(aligned) + shift.view(aligned)
    assert_equal(model(x), expected)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged[1]) is type(module)
    assert_equal(merged(x), expected)


def test_ssf_warns_where_merging_adds_a_bias():
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False)), SSFConfig(target_modules=["0"], init_std=0.5)
    )
    with pytest.warns(UserWarning, match="gets a bias by merging"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert model.get_base_model()[0].base_layer.bias is None


def test_ssf_target_modules_override_roles():
    def touched(**kwargs):
        model = get_peft_model(FAMILIES["vit"].model(), SSFConfig(**kwargs))
        assert not any("modules_to_save" in name for name, _ in model.named_parameters())
        return {
            n.partition(".ssf_")[0].removeprefix("base_model.model.")
            for n, _ in model.named_parameters()
            if ".ssf_" in n
        }

    assert touched(target_modules=["fc1"]) == {f"vit.layers.{i}.mlp.fc1" for i in range(DEPTH)}
    assert touched(target_modules=["fc1"], layers_to_transform=[1]) == {"vit.layers.1.mlp.fc1"}
    assert touched(target_modules=r".*layers\.0\..*norm.*") == {
        "vit.layers.0.layernorm_before",
        "vit.layers.0.layernorm_after",
    }
    linears = touched(target_modules="all-linear")
    assert len(linears) == 6 * DEPTH + 1  # as with peft's own methods, the head is one of them
    without = touched(target_modules="all-linear", exclude_modules=["fc2"])
    assert linears - without == {f"vit.layers.{i}.mlp.fc2" for i in range(DEPTH)}
