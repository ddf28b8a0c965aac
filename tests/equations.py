"""What the tests of methods against their equations share."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from peft import get_peft_model
from plain import plain_parts


OUTPUTS = ("attention.o_proj", "mlp.fc2")
LINEARS = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
both = pytest.mark.parametrize("name", ["vit", "dinov2_registers"])


def weights_of(model, slot):
    """{block index: {name: weight}} of one slot of the adapter."""
    found = {}
    for name, parameter in model.named_parameters():
        head, _, tail = name.partition(f".{slot}.default.")
        head = head.removesuffix(".adapters")
        if tail:
            found.setdefault(int(head.rsplit(".", 1)[1]) if head[-1].isdigit() else head, {})[tail] = parameter
    return found


def adapted(name, config):
    """Plain parts of the base model with one batch, and the adapted model with that batch's last hidden state."""
    family = FAMILIES[name]
    inputs = family.inputs(2)
    parts = plain_parts(name, family.model(), inputs["pixel_values"])
    torch.manual_seed(3)
    model = get_peft_model(family.model(), config).eval()
    backbone = getattr(model.get_base_model(), model.get_base_model().base_model_prefix)
    with torch.no_grad():
        return parts, model, backbone(**inputs).last_hidden_state, family


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def weights_by_path(model, slot):
    """{full name of the block or module in the base model: {name: weight}} of one slot of the adapter."""
    found = {}
    for name, parameter in model.named_parameters():
        head, _, tail = name.partition(f".{slot}.default.")
        if tail:
            found.setdefault(head.removeprefix("base_model.model."), {})[tail] = parameter
    return found
