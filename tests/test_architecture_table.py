"""The role table of an architecture: its parts, and the example that its docstring gives."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import textwrap

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

import hf_visual_peft
from hf_visual_peft import AdaptFormerConfig, Architecture, ConvpassConfig, SSFConfig, VPTConfig
from hf_visual_peft.backbones.architectures import table


PARTS = (table.ArchitecturePaths, table.ArchitectureBlocks, table.ArchitectureTokens)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(8), Attention(), nn.LayerNorm(8)
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MyViT(nn.Module):
    """The transformer of the example."""

    def __init__(self):
        super().__init__()
        self.patch_embed, self.cls_token = nn.Conv2d(3, 8, 4, stride=4), nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 17, 8))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def test_the_example_describes_the_model_that_it_names(monkeypatch):
    monkeypatch.setattr(table, "_ARCHITECTURES", copy.deepcopy(table._ARCHITECTURES))
    example = re.search(
        r"^ {4}register_architecture\(.*?^ {4}\)", inspect.getdoc(Architecture), re.DOTALL | re.MULTILINE
    )
    exec(textwrap.dedent(example[0]), vars(hf_visual_peft))
    model = MyViT().eval()
    backbone = hf_visual_peft.find_backbone(model)
    assert (backbone.depth, backbone.width, backbone.prefix_tokens, backbone.heads) == (2, 8, 1, ("head",))
    pixels = torch.randn(2, 3, 16, 16)
    before = model(pixels)
    for config in (VPTConfig(), AdaptFormerConfig(r=4), ConvpassConfig(r=4), SSFConfig()):
        config.init_weights = False
        adapted = get_peft_model(model, config)
        assert not torch.allclose(adapted(pixels), before)
        model = adapted.unload()
        assert torch.equal(model(pixels), before)


def test_the_parts_are_all_of_it_and_every_field_is_described():
    names = [field.name for part in PARTS for field in dataclasses.fields(part)]
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(Architecture))
    assert [field.name for field in dataclasses.fields(Architecture)][:3] == ["backbones", "blocks", "patch_embedding"]
    for part in PARTS:
        described = re.findall(r"^    (\w+): ", inspect.getdoc(part), re.MULTILINE)
        assert described == [field.name for field in dataclasses.fields(part)]
    marked = {name for part in PARTS for name in re.findall(r"(\w+): \(!\)", inspect.getdoc(part))}
    assert {"prefix_tokens", "softmax", "post_norm", "equal_parts", "grid", "norm1_readers"} <= marked


def test_a_table_without_a_backbone_is_refused():
    with pytest.raises(ValueError, match="Architecture.backbones is empty"):
        hf_visual_peft.register_architecture(Architecture((), "blocks", "patch_embed"))
