"""Res-Tuning and Res-Tuning-Bypass against their equations in plain torch, and what they keep."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equations import weights_by_path
from families import FAMILIES, images, output_of
from peft import get_peft_model
from plain import plain_parts
from side_networks import kept, vit
from transformers import (
    HieraConfig,
    HieraForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from hf_visual_peft import LSTConfig, ResTuningConfig, get_method
from hf_visual_peft.sites import BlockAdapters


def adapter(w, x, name=""):
    hidden = F.gelu(x @ w[f"{name}down.weight"].T + w[f"{name}down.bias"])
    return hidden @ w[f"{name}up.weight"].T + w[f"{name}up.bias"]


def attend(x, keys, values, heads):
    """Attention to learned tokens, head by head."""
    size = x.shape[-1] // heads
    parts = [slice(i * size, (i + 1) * size) for i in range(heads)]
    weights = [torch.softmax(x[..., p] @ keys[:, p].T / size**0.5, dim=-1) for p in parts]
    return torch.cat([w @ values[:, p] for w, p in zip(weights, parts, strict=True)], dim=-1)


def bypass(w, s, x):
    share = torch.sigmoid(w["gate"])
    return share * (x + adapter(w, x, "horizontal.")) + (1 - share) * (s + adapter(w, s, "vertical."))


@pytest.mark.parametrize("name", ["vit", "dinov2_registers"])
@torch.no_grad()
def test_bypass(name):
    family = FAMILIES[name]
    model = get_peft_model(family.model(), ResTuningConfig(r=4, init_weights=False)).eval()
    states = model(**family.inputs(2), output_hidden_states=True).hidden_states
    blocks, x, _ = plain_parts(name, family.model(), family.inputs(2)["pixel_values"])
    s, pieces = x, weights_by_path(model, "restuning_bypass")
    assert len(pieces) == len(blocks)
    for w, block, state in zip(pieces.values(), blocks, states[:-1], strict=True):
        torch.testing.assert_close(state, x, rtol=1e-4, atol=1e-5)  # the backbone goes on as ever
        x = x + block.attention(block.norm(1, x))
        x = x + block.mlp(block.norm(2, x))
        s = bypass(w, s, x)
    torch.testing.assert_close(states[-1], s, rtol=1e-4, atol=1e-5)
    assert (s - x).abs().max() > 0.1


@torch.no_grad()
def test_bypass_crosses_stages():
    """What comes to the next stage is averaged over the cells that became one, and a linear widens it."""
    torch.manual_seed(0)
    config = SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[2, 1, 1], num_heads=[1, 2, 2], window_size=2)
    model = get_peft_model(SwinForImageClassification(config), ResTuningConfig(r=4, init_weights=False)).eval()
    base = model.base_model.model
    seen, inputs = [], []
    layers = [module for module in model.modules() if isinstance(module, BlockAdapters)]
    for layer in layers:
        layer.restuning_bypass["default"].register_forward_pre_hook(lambda module, args: seen.append(args[1].after))
    layers[0].get_base_layer().register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    logits = model(**images(2)).logits
    s = inputs[0]
    for w, x in zip(weights_by_path(model, "restuning_bypass").values(), seen, strict=True):
        if s.shape[1] != x.shape[1]:
            side = int(s.shape[1] ** 0.5)
            cells = s.view(2, side // 2, 2, side // 2, 2, -1).mean(dim=(2, 4)).flatten(1, 2)
            s = cells @ w["enter.weight"].T + w["enter.bias"]
        else:
            assert "enter.weight" not in w
        s = bypass(w, s, x)
    assert s.shape == (2, 16, 32)
    expected = base.classifier(base.swin.layernorm(s).mean(dim=1))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_tuners_in_the_backbone():
    family = FAMILIES["vit"]
    fields = {"attention": "prefix", "mlp": "adapter", "block": "prompt", "num_virtual_tokens": 3}
    model = get_peft_model(family.model(), ResTuningConfig(bypass=False, r=4, **fields, init_weights=False)).eval()
    logits = output_of(model, family.inputs(2))
    base = family.model()
    blocks, x, norm = plain_parts("vit", base, family.inputs(2)["pixel_values"])
    slots = [weights_by_path(model, f"restuning_{place}").values() for place in ("attention", "mlp", "block")]
    for block, prefix, mlp, prompt in zip(blocks, *slots, strict=True):
        assert set(prefix) == {"keys", "values"}
        assert set(prompt) == {"keys"}
        normed, before = block.norm(1, x), x
        x = x + block.attention(normed) + attend(normed, prefix["keys"], prefix["values"], block.heads)
        normed = block.norm(2, x)
        x = x + block.mlp(normed) + adapter(mlp, normed)
        x = x + attend(before, prompt["keys"], prompt["keys"], block.heads)
    head = model.base_model.model.classifier.modules_to_save["default"]
    torch.testing.assert_close(logits, head(norm(x)[:, 0]), rtol=1e-4, atol=1e-5)


def test_nothing_stands_beside_blocks_that_pool():
    torch.manual_seed(0)
    config = HieraConfig(
        image_size=(32, 32), patch_size=(3, 3), patch_stride=(2, 2), patch_padding=(1, 1), embed_dim=8, depths=[1, 2],
        num_heads=[1, 2], mlp_ratio=2.0, masked_unit_size=(4, 4), num_query_pool=1, num_labels=3,
    )  # fmt: skip
    model = get_peft_model(HieraForImageClassification(config), ResTuningConfig(bypass=False, r=4)).eval()
    layers = [module for module in model.modules() if isinstance(module, BlockAdapters)]
    whole = ("restuning_attention", "restuning_mlp", "restuning_block")
    assert [layer.adapter_layer_names for layer in layers] == [whole, ("restuning_mlp",), whole]
    assert model(**images(2)).logits.isfinite().all()


def test_bypass_keeps_nothing_of_the_backbone():
    def step(config=None, **kwargs):
        return kept(get_peft_model(vit(**kwargs), config or ResTuningConfig(r=4)).train(), images(2))

    plain = step()
    assert step(intermediate_size=128) == plain
    assert step(num_attention_heads=4) == plain
    assert step(ResTuningConfig(r=4, layers_to_transform=[2, 3, 4]), num_hidden_layers=5) == plain
    # as wide as the backbone: what the trained linears read, of each block its output, which is also what the piece
    # behind it mixes, and s; and what the frozen norm behind the blocks and the head read
    stream = 2 * 17 * 16
    wide = [size for channels, size in plain if channels == 16 and size >= stream]
    assert wide == [stream] * (3 + 3 + 1)


def test_a_config_says_how_far_gradients_go():
    assert get_method("restuning").gradients == "none"
    assert ResTuningConfig().gradients == "none"
    assert ResTuningConfig(bypass=False).gradients == "full"
    assert LSTConfig().gradients == "none"


@pytest.mark.parametrize("bypass", [True, False])
def test_what_is_recorded(bypass):
    model = get_peft_model(vit(), ResTuningConfig(r=4, bypass=bypass)).train()
    blocks = [module for module in model.modules() if isinstance(module, BlockAdapters)]
    recorded = []
    for block in blocks[1:]:
        hook = lambda module, args, output: recorded.append(output.requires_grad)  # noqa: E731
        block.get_base_layer().mlp.fc1.register_forward_hook(hook)
    model(**images(2))
    assert recorded == [not bypass] * 2


def test_places():
    config = ResTuningConfig(bypass=False)
    assert (config.attention, config.mlp, config.block) == ("adapter",) * 3
    config = ResTuningConfig(bypass=False, mlp="prefix")
    assert (config.attention, config.mlp, config.block) == (None, "prefix", None)
    slots = {name.split(".restuning_")[1].split(".")[0] for name, _ in get_peft_model(vit(), config).named_parameters()
             if ".restuning_" in name}  # fmt: skip
    assert slots == {"mlp"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bypass": "yes"}, r"bypass is 'yes': must be one of True, False"),
        ({"r": 0}, r"r is 0: must be an integer of at least 1"),
        ({"num_virtual_tokens": 0}, r"num_virtual_tokens is 0: must be an integer of at least 1"),
        ({"bypass": False, "mlp": "lora"}, r"mlp is 'lora': must be one of 'adapter', 'prefix', 'prompt', None"),
        ({"mlp": "adapter"}, r"mlp is 'adapter': must be None with bypass=True"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=rf"^ResTuningConfig\.{message}"):
        ResTuningConfig(**fields)


def test_bottleneck_wider_than_the_backbone():
    with pytest.raises(ValueError, match=r"r is 17: must be an integer from 1 to 16 \(the backbone's width\)"):
        get_peft_model(vit(), ResTuningConfig(r=17))
