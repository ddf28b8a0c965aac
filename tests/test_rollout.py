"""Attention roll-out of models with and without adapters."""

import pytest
import torch
from peft import get_peft_model
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

import hf_visual_peft
from hf_visual_peft.report.rollout import NoRolloutError, rollout


SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}


def vit(attention):
    torch.manual_seed(0)
    config = ViTConfig(**SIZES, image_size=32, patch_size=8, attn_implementation=attention)
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def written(weights, kept):
    """The roll-out of transformers' own weights among some tokens, the first of which is the output."""
    total = torch.eye(len(kept))
    for each in weights:
        own = each.mean(1)[:, kept][:, :, kept]
        total = (own / own.sum(-1, keepdim=True) + torch.eye(len(kept))) / 2 @ total
    return total[:, 0, 1:].unflatten(1, (4, 4))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_equals_the_product_of_transformers_weights(attention, pixels):
    with torch.no_grad():
        expected = written(vit("eager")(pixels, output_attentions=True).attentions, [*range(17)])
    torch.testing.assert_close(rollout(vit(attention), {"pixel_values": pixels}), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_prompts_are_left_out_and_the_base_stays(attention, pixels):
    plain = rollout(vit(attention), {"pixel_values": pixels})
    model = get_peft_model(vit(attention), hf_visual_peft.VPTConfig(num_virtual_tokens=5)).eval()
    model(pixels)  # methods set theirs with the first images
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    adapted = rollout(model, {"pixel_values": pixels})
    assert (adapted - plain).abs().max() > 1e-4
    with model.disable_adapter():
        torch.testing.assert_close(rollout(model, {"pixel_values": pixels}), plain)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_windows_have_none(pixels):
    config = SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, image_size=32, patch_size=2)
    with pytest.raises(NoRolloutError, match="without softmax attention among all tokens"):
        rollout(SwinForImageClassification(config), {"pixel_values": pixels})
