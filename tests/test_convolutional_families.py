"""Networks of timm without a role table: norms, convolutions and head are found, and methods at modules work."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model

from hf_visual_peft import SSFConfig, find_backbone, freeze_norms, with_visual_targets


timm = pytest.importorskip("timm")

NETWORKS = (
    "test_efficientnet",  # norms that end in an activation
    "test_coatnet",  # of a class with a table, which it does not fit
    "efficientvit_b0",  # linears of maps with activations in place
)
CONFIGS = {
    "ssf": SSFConfig,
    "lora": LoraConfig,
    "ln_tuning": LNTuningConfig,
}


def build(name):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    torch.manual_seed(0)
    sized = {"img_size": 64} if name == "test_coatnet" else {}
    model = timm.create_model(name, num_classes=3, **sized)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval().requires_grad_(False)  # as below an adapter, by which torch rounds


def pixels(batch=2):
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:.*gets a bias by merging")
@pytest.mark.parametrize("name", NETWORKS)
def test_methods_at_modules(name, tmp_path):
    base = build(name)
    x = pixels()
    with torch.no_grad():
        before = base(x)
    for method, config_cls in CONFIGS.items():
        model = get_peft_model(copy.deepcopy(base), with_visual_targets(config_cls(), base))
        freeze_norms(model)  # as methods of peft need it
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        torch.manual_seed(0)
        torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1])).backward()
        optimizer.step()
        model.eval().save_pretrained(tmp_path / method)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / method).eval()
        with torch.no_grad():
            found = model(x)
            assert not torch.allclose(found, before, rtol=1e-4), method
            assert torch.equal(again(x), found), method
            with model.disable_adapter():
                assert torch.equal(model(x), before), method
            merged = model.double().merge_and_unload()
            assert torch.allclose(merged(x.double()), again.double()(x.double()), rtol=1e-6, atol=1e-8), method


@pytest.mark.parametrize("name", ["test_efficientnet", "test_coatnet"])
def test_what_is_found_is_found_without_weights(name):
    """Of a model on the meta device, which cannot run as it is."""
    with torch.device("meta"):
        empty = build(name)
    found, expected = find_backbone(empty), find_backbone(build(name))
    assert found.heads == expected.heads
    assert found.outside == expected.outside
    assert [block.path for block in found.blocks] == [block.path for block in expected.blocks]
    assert [block.roles for block in found.blocks] == [block.roles for block in expected.blocks]
    assert all(parameter.is_meta for parameter in empty.parameters())
