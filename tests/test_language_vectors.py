"""Every method for class texts gives the figures that its authors' arithmetic gave: logits, loss and gradients."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from language_reference import LABELS, METHODS, pixels
from language_vectors import PATH, adapted, base_of
from reference_backbone import checksum

import hf_visual_peft


VECTORS = json.loads(PATH.read_text())


def close(actual, expected):
    expected = torch.tensor(expected)
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.fixture(scope="module")
def clip(folders):
    return base_of(folders["clip"])


def test_every_method_has_a_vector():
    ours = {
        name
        for name, method in hf_visual_peft.list_language_methods().items()
        if method.config_cls.__module__.startswith("hf_visual_peft.")
    }
    assert METHODS.keys() == VECTORS.keys() == ours
    for name, reference in METHODS.items():
        assert VECTORS[name]["source"] == reference.source
        assert VECTORS[name]["fields"] == reference.fields


@pytest.mark.parametrize("name", METHODS)
def test_figures(clip, name):
    vector, base, inputs = VECTORS[name], copy.deepcopy(clip), {"pixel_values": pixels("images", len(LABELS))}
    with torch.no_grad():
        before = base(**inputs).logits
    model, weights = adapted(base, name)
    assert sum(parameter.numel() for parameter in weights.values()) == vector["weights"]
    output = model(**inputs, labels=LABELS)
    close(output.logits, vector["logits"])
    close(output.loss, vector["loss"])
    assert (output.logits - before).abs().max() > 1e-3 * before.abs().max(), "no effect"
    if not weights:
        return
    output.loss.backward()
    total, size = checksum(weights, {key: parameter.grad for key, parameter in weights.items()})
    expected, expected_size = vector["gradients"]
    assert abs(total - expected) <= 5e-5 * expected_size
    assert size == pytest.approx(expected_size, rel=2e-4)
