"""Every method gives the figures that its authors' arithmetic gave, in evaluation, in training, and its gradients."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from reference_backbone import checksum, deterministic_training, dropped_path, images, loss_of, numbers
from reference_table import METHODS
from reference_vectors import PATH, adapted, adapter_of, base_model, method_of

from hf_visual_peft import get_method, list_methods
from hf_visual_peft.methods.adapter.mosa import MoSA
from hf_visual_peft.sites import drop_path


VECTORS = json.loads(PATH.read_text())
every_method = pytest.mark.parametrize("name", METHODS)


def close(actual, expected, rtol=1e-5):
    expected = torch.tensor(expected)
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=rtol * expected.abs().max().item())


def pixels_of(name):
    frames = METHODS[name].frames
    return images(2 * frames).unflatten(0, (2, frames)) if frames > 1 else images(2)


def base_of(name):
    """What the model gives without the adapter."""
    reference, base = METHODS[name], VECTORS["base"]
    if reference.frames == 1:
        return base["images"]
    return base["frames before the norm" if reference.early else "frames"]


@torch.no_grad()
def filled(name):
    """The model with the adapter's weights by formula, and these."""
    model = adapted(name)
    weights = adapter_of(model, name)
    for key, parameter in weights.items():
        parameter.copy_(numbers(key, tuple(parameter.shape)))
    for part in model.modules():
        if isinstance(part, MoSA):
            part.owner.copy_((torch.arange(part.owner.numel()) % part.num_modules).view_as(part.owner))
    return model, weights


def let_train(model, monkeypatch):
    """In training mode, with elementwise functions in the place of dropout and stochastic depth."""
    deterministic_training(monkeypatch.setattr)
    for name, module in list(sys.modules.items()):
        if name.startswith("hf_visual_peft.") and getattr(module, "drop_path", None) is drop_path:
            monkeypatch.setattr(module, "drop_path", lambda x, rate, training: dropped_path(x, rate * training))
    return model.train()


def test_every_method_has_a_vector():
    ours = {
        name for name, method in list_methods().items() if method.config_cls.__module__.startswith("hf_visual_peft.")
    }
    assert set(map(method_of, METHODS)) == ours
    assert METHODS.keys() == VECTORS.keys() - {"base"}
    for name, reference in METHODS.items():
        assert VECTORS[name]["source"] == reference.source
        assert VECTORS[name]["fields"] == json.loads(json.dumps(reference.fields))


@torch.no_grad()
def test_the_backbone_is_the_plain_one():
    close(base_model()(pixel_values=images(2)).logits, VECTORS["base"]["images"])


@every_method
@torch.no_grad()
def test_start(name):
    """A fresh adapter changes nothing, or something."""
    model, pixels = adapted(name), pixels_of(name)
    logits = model(pixel_values=pixels).logits
    assert METHODS[name].identity == get_method(method_of(name)).identity_at_start
    if METHODS[name].identity:
        close(logits, base_of(name))
    with model.disable_adapter():
        before = model(pixel_values=pixels).logits
    close(before, base_of(name))
    assert METHODS[name].identity or not torch.equal(logits, before)


@every_method
def test_figures(name, monkeypatch):
    vector, (model, weights) = VECTORS[name], filled(name)
    assert sum(parameter.numel() for parameter in weights.values()) == vector["weights"]
    pixels, before = pixels_of(name), torch.tensor(base_of(name))
    with torch.no_grad():
        close(model(pixel_values=pixels).logits, vector["evaluation"])
    assert (torch.tensor(vector["evaluation"]) - before).abs().max() > 1e-3 * before.abs().max(), "no effect"
    logits = let_train(model, monkeypatch)(pixel_values=pixels).logits
    close(logits, vector["training"])
    loss_of(logits).backward()
    total, size = checksum(weights, {key: parameter.grad for key, parameter in weights.items()})
    expected, expected_size = vector["gradients"]
    assert abs(total - expected) <= 3e-5 * expected_size
    assert size == pytest.approx(expected_size, rel=1e-4)
