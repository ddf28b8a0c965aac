"""The plain transformer that equations are evaluated on, against the backbones."""

from __future__ import annotations

import torch
from equations import assert_equal, both
from families import FAMILIES
from plain import plain_parts


@both
@torch.no_grad()
def test_plain_transformer_is_the_backbone(name):
    family = FAMILIES[name]
    blocks, x, norm = plain_parts(name, family.model(), family.inputs(2)["pixel_values"])
    for block in blocks:
        x = x + block.attention(block.norm(1, x))
        x = x + block.mlp(block.norm(2, x))
    model = family.model()
    assert_equal(norm(x), getattr(model, model.base_model_prefix)(**family.inputs(2)).last_hidden_state)
