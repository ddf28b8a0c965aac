"""Dropout and stochastic depth of every method that has them: the rate, the place and training mode only."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

import hf_visual_peft
from hf_visual_peft.coverage.sizes import small_config
from hf_visual_peft.sites import drop_path


def fields_of(method):
    return {each.name for each in dataclasses.fields(method.config_cls)}


METHODS = hf_visual_peft.list_methods()
WITH_DROPOUT = [name for name, method in METHODS.items() if "dropout" in fields_of(method) and not method.video]
RATE = 0.37
# methods that draw other random numbers in training, too: choices, masks, or stochastic depth
DRAWING = ("convlora", "dyt", "mlae", "mosa", "snell", "spt")


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(
        **sizes,
        image_size=32,
        patch_size=8,
        num_labels=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def adapted(name, **fields):
    config = dataclasses.replace(small_config(METHODS[name]), modules_to_save=[], init_weights=False, **fields)
    torch.manual_seed(1)
    return get_peft_model(vit(), config)


@pytest.mark.parametrize("name", WITH_DROPOUT)
@torch.no_grad()
def test_dropout_acts_at_its_rate_in_training_only(name, monkeypatch):
    rates = []
    plain = torch.nn.functional.dropout

    def recorded(input, p=0.5, training=True, inplace=False):
        if training and p:
            rates.append(p)
        return plain(input, p, training, inplace)

    monkeypatch.setattr(torch.nn.functional, "dropout", recorded)
    model = adapted(name, dropout=RATE)
    without = adapted(name, dropout=0.0)
    expected = without.eval()(images()).logits
    torch.testing.assert_close(model.eval()(images()).logits, expected, rtol=0, atol=0)
    assert not rates
    outputs = []
    for seed in (2, 3):
        torch.manual_seed(seed)
        outputs.append(model.train()(images()).logits)
    assert RATE in rates
    assert not torch.equal(*outputs)
    if name not in DRAWING:
        assert set(rates) == {RATE}  # and no dropout of the backbone
        torch.testing.assert_close(without.train()(images()).logits, expected)
    with model.disable_adapter():
        rates.clear()
        model(images())
    assert not rates
    assert model.training


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    x = torch.ones(4000, 3, 2)
    torch.manual_seed(0)
    dropped = drop_path(x, 0.25, True)
    kept = dropped[:, 0, 0] != 0
    assert torch.equal(dropped, torch.where(kept, 1 / 0.75, 0.0)[:, None, None].expand_as(x))
    assert abs(kept.float().mean().item() - 0.75) < 0.03
    assert drop_path(x, 0.25, False) is x
    assert drop_path(x, 0.0, True) is x
