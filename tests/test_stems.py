"""Where images enter a backbone whose patch embedding is the last of several convolutions."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LevitConfig, LevitForImageClassification

import hf_visual_peft
from hf_visual_peft import Architecture, SideTuningConfig, VPTConfig
from hf_visual_peft.methods.side.side_tuning import SideTuning


class Stemmed(nn.Module):
    """A transformer with a stem of three convolutions, of which a table names the last one only."""

    def __init__(self, channels=2):
        super().__init__()
        self.first, self.norm = nn.Conv2d(channels, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 8, 2, stride=2)
        self.blocks = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x):
        x = self.third(self.second(self.norm(self.first(x)))).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return x


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.fc2(torch.relu(self.fc1(self.norm2(x))))


@pytest.fixture
def _tables(monkeypatch):
    from hf_visual_peft.backbones.architectures import table

    monkeypatch.setattr(table, "_ARCHITECTURES", copy.deepcopy(table._ARCHITECTURES))
    fused = dict.fromkeys(("query", "key", "value"), ("qkv",))
    hf_visual_peft.register_architecture(
        Architecture(
            backbones=("Stemmed",),
            blocks="blocks",
            patch_embedding="third",
            embeddings="third",
            prefix_tokens=(),
            norms=(),
            norm1=("norm1",),
            **fused,
            output=("proj",),
            norm2=("norm2",),
            fc1=("fc1",),
            fc2=("fc2",),
            drop_path=(),
            heads=(),
        )
    )


def levit(channels):
    sizes = {"image_size": 64, "hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1]}
    return LevitForImageClassification(LevitConfig(**sizes, key_dim=[8, 8, 8], num_channels=channels))


@pytest.mark.usefixtures("_tables")
@pytest.mark.parametrize(("build", "size", "patch"), [(levit, 64, 16), (Stemmed, 16, 4)], ids=["levit", "own"])
@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_side_tuning_sees_the_image(build, size, patch, channels):
    pixels = torch.randn(2, channels, size, size)
    model = get_peft_model(build(channels), SideTuningConfig(channels=4)).eval()
    backbone = hf_visual_peft.find_backbone(model.get_base_model())
    assert (backbone.image_channels, backbone.patch_features) == (channels, channels * patch * patch)
    (side,) = (module for module in model.modules() if isinstance(module, SideTuning))
    seen = []
    side.features[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(pixels)
    assert torch.equal(seen[0], pixels)


@pytest.mark.usefixtures("_tables")
def test_a_table_that_says_nothing_of_prompts_lets_none_in():
    model = Stemmed()
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"VPTConfig does not fit Stemmed: no tokens .*prompts is None, the default"):
        get_peft_model(model, VPTConfig())
    assert model.state_dict().keys() == before.keys()
