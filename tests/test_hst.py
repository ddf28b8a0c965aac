"""Hierarchical side-tuning against its equation in plain torch, its norms' statistics, and where it fits."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, images
from peft import PeftModel, get_peft_model
from plain import plain_parts
from torch import nn
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from hf_visual_peft import HSTConfig
from hf_visual_peft.coverage.models import MODELS


SMALL = {"dims": (4, 6, 8, 10), "num_heads": (2, 3, 4, 5), "init_weights": False}


def vit(depth=5, **kwargs):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": depth, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(
        ViTConfig(**sizes | {"image_size": 32, "patch_size": 4, "num_labels": 3} | kwargs)
    )


def weights_of(model, slot):
    """{block: {name: weight}} of one slot, running statistics among them."""
    found = {}
    for name, value in model.state_dict().items():
        path, _, tail = name.partition(f".hst_{slot}.default.")
        if tail:
            found.setdefault(path.removeprefix("base_model.model.").removesuffix(".adapters"), {})[tail] = value
    return found


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x, w, name, eps=1e-6):
    x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + eps)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def stem(w, pixels):
    x = F.conv2d(pixels, w["enter.0.weight"], stride=2, padding=1)
    mean, var, gamma, beta = (
        w[f"enter.1.{n}"][:, None, None] for n in ("running_mean", "running_var", "weight", "bias")
    )
    x = F.relu((x - mean) / torch.sqrt(var + 1e-5) * gamma + beta)
    return F.conv2d(x, w["enter.3.weight"], w["enter.3.bias"], stride=2)


def cross_attention(w, s, tokens, heads):
    q, k, v = (linear(x, w, f"block.{name}") for x, name in ((s, "query"), (tokens, "key"), (tokens, "value")))
    parts = q.tensor_split(heads, -1), k.tensor_split(heads, -1), v.tensor_split(heads, -1)
    mixed = [torch.softmax(a @ b.mT / a.shape[-1] ** 0.5, dim=-1) @ c for a, b, c in zip(*parts, strict=True)]
    return linear(torch.cat(mixed, dim=-1), w, "block.proj")


def as_tokens(maps):
    return maps.flatten(2).transpose(1, 2)


def hst(model, base, name, pixels, grid, prefix, heads):
    """What takes the place of the last block's output, and the width of the maps beside each block."""
    blocks, x, _ = plain_parts(name, base, pixels)
    rungs, meta = list(weights_of(model, "rung").values()), list(weights_of(model, "tokens").values())
    deltas = [list(weights_of(model, f"norm{i}").values()) for i in (1, 2)]
    bridges = {}
    for key, value in model.state_dict().items():
        if ".hst_bridge" in key:
            bridges.setdefault(value.shape[0], {})[f"bridge.{key.rpartition('.')[2]}"] = value
    maps, used = pixels, []
    for index, (block, w) in enumerate(zip(blocks, rungs, strict=True)):
        count = meta[index]["tokens"].shape[1]
        changed = [
            (weight + d["weight.values"], bias + d["bias.values"])
            for (weight, bias), d in zip((block.norm1, block.norm2), (each[index] for each in deltas), strict=True)
        ]
        block = replace(block, norm1=changed[0], norm2=changed[1])
        # tokens have no places: the order of the sequence does not matter
        x = torch.cat([meta[index]["tokens"].expand(len(x), -1, -1), x], dim=1)
        x = x + block.attention(block.norm(1, x))
        x = x + block.mlp(block.norm(2, x))
        tokens, x = x[:, :count], x[:, count:]

        dim = w["token_norm.weight"].shape[0]
        used.append(dim)
        if index == 0:
            maps = stem(w, maps)
        elif "enter.weight" in w:
            maps = F.conv2d(maps, w["enter.weight"], w["enter.bias"], stride=2, padding=1)
        s, size = as_tokens(maps), maps.shape[2:]
        if "enter_norm.weight" in w:
            s = norm(s, w, "enter_norm", eps=1e-5)
        bridge = bridges[dim]
        features = x[:, prefix:].transpose(1, 2).unflatten(2, grid)
        features = linear(as_tokens(F.interpolate(features, size, mode="bilinear")), bridge, "bridge")
        tokens = norm(linear(tokens, bridge, "bridge"), w, "token_norm", eps=1e-5)
        seen = torch.cat([tokens, features.mean(1, keepdim=True)], dim=1)
        s = s + cross_attention(w, norm(s, w, "block.norm1"), seen, heads[dim]) + features
        s = s + linear(F.gelu(linear(norm(s, w, "block.norm2"), w, "block.fc1")), w, "block.fc2")
        if "norm.weight" in w:
            s = norm(s, w, "norm")
        maps = s.transpose(1, 2).unflatten(2, size)
    patches = as_tokens(F.interpolate(maps, grid, mode="bilinear"))
    result = torch.cat([s.mean(1, keepdim=True).expand(-1, prefix, -1), patches], dim=1)
    return linear(result, rungs[-1], "up"), used


@pytest.mark.parametrize("name", ["vit", "dinov2_registers"])
def test_equation(name):
    pixels = images(2)["pixel_values"]
    if name == "vit":
        base, again, grid, prefix, widths = vit(), vit(), (8, 8), 1, [4, 4, 6, 8, 10]
    else:
        family = FAMILIES[name]
        base, again, grid, prefix, widths = family.model(), family.model(), (4, 4), family.prefix, [4, 6, 8]
    model = get_peft_model(base, HSTConfig(**SMALL, num_virtual_tokens=2))
    with torch.no_grad():
        model.train()(pixel_values=pixels)  # the stem's statistics move
        states = model.eval()(pixel_values=pixels, output_hidden_states=True).hidden_states
        heads = dict(zip(SMALL["dims"], SMALL["num_heads"], strict=True))
        expected, used = hst(model, again.eval(), name, pixels, grid, prefix, heads)
    assert used == widths
    torch.testing.assert_close(states[-1], expected, rtol=1e-3, atol=1e-4)


def test_gradients_reach_meta_tokens_and_norms_of_the_first_block():
    model = get_peft_model(vit(), HSTConfig(**SMALL)).train()
    model(**images(2)).logits.square().sum().backward()
    first = {name: p.grad for name, p in model.named_parameters() if ".layers.0." in name and ".hst_" in name}
    assert {name.split(".hst_")[1].split(".")[0] for name in first} == {"tokens", "norm1", "norm2", "rung", "bridge0"}
    assert all(gradient.abs().sum() > 0 for gradient in first.values())


def test_what_is_counted():
    with torch.device("meta"):
        model = get_peft_model(ViTForImageClassification(ViTConfig()), HSTConfig())
    counts = {}
    for name, parameter in model.named_parameters():
        if ".hst_" in name:
            slot, _, tail = name.split(".hst_")[1].partition(".default.")
            part = tail.split(".")[0] if slot == "rung" else slot.rstrip("0123456789")
            counts[part] = counts.get(part, 0) + parameter.numel()
    assert counts == {
        "tokens": 9_216,
        "norm": 36_864 + 432,  # those of the backbone's blocks, and of the four stages
        "bridge": 166_104,
        "enter": 864 + 64 + 4_128 + 13_872 + 27_712 + 41_544,
        "enter_norm": 432,
        "token_norm": 1_296,
        "block": 462_312,
        "up": 56_064,
    }
    assert sum(counts.values()) - counts["up"] == 764_840


def test_running_statistics_move_and_are_saved(tmp_path):
    model = get_peft_model(vit(), HSTConfig(**SMALL)).train()
    (stem_norm,) = (module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    before = stem_norm.running_mean.clone()
    model(**images(4))
    assert not torch.equal(stem_norm.running_mean, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vit(), tmp_path, is_trainable=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**images(2)).logits, model.eval()(**images(2)).logits)
    config = model.peft_config["default"]
    counted = sum(config.trained_parameters(n, tuple(v.shape)) for n, v in model.state_dict().items() if ".hst_" in n)
    assert counted == sum(p.numel() for n, p in model.named_parameters() if ".hst_" in n)


def test_statistics_have_the_precision_of_their_norm():
    base = vit().to(torch.bfloat16)
    for raised, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(base, HSTConfig(**SMALL), autocast_adapter_dtype=raised)
        (stem_norm,) = (module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
        assert stem_norm.weight.dtype == stem_norm.running_mean.dtype == stem_norm.running_var.dtype == dtype
        assert stem_norm.num_batches_tracked.dtype == torch.int64
        base = model.unload()


@pytest.mark.parametrize(
    ("depth", "layers", "widths"),
    [
        (8, None, [4, 4, 6, 6, 8, 8, 10, 10]),
        (6, None, [4, 4, 6, 8, 8, 10]),
        (5, [1, 3], [4, 6]),
        (1, None, [4]),
    ],
)
def test_blocks_are_cut_into_stages(depth, layers, widths):
    model = get_peft_model(vit(depth), HSTConfig(**SMALL, layers_to_transform=layers)).eval()
    rungs = weights_of(model, "rung")
    assert [int(path.rpartition(".")[2]) for path in rungs] == (layers or list(range(depth)))
    assert [w["token_norm.weight"].shape[0] for w in rungs.values()] == widths
    assert model(**images(2)).logits.isfinite().all()


@torch.no_grad()
def test_stochastic_depth_of_side_blocks(monkeypatch):
    """Both branches of each, at a rate that rises from 0, and none of the backbone's; off unless asked for."""
    seen = []
    side = sys.modules[HSTConfig.__module__]
    monkeypatch.setattr(side, "drop_path", lambda x, rate, training: (seen.append((rate, training)), x)[1])
    model = get_peft_model(vit(5), HSTConfig(**SMALL, drop_path=0.2)).train()
    model(**images(2))
    assert seen == [(0.2 * index / 4, True) for index in range(5) for _ in ("attention", "mlp")]
    assert HSTConfig().drop_path == 0.0


def test_a_norm_can_be_left_alone():
    model = get_peft_model(vit(), HSTConfig(**SMALL, exclude_modules=["layers.1.layernorm_after"]))
    norms = [*weights_of(model, "norm1"), *weights_of(model, "norm2")]
    assert "vit.layers.1.layernorm_before" in norms
    assert "vit.layers.1.layernorm_after" not in norms
    assert len(norms) == 9
    assert model(**images(2)).logits.isfinite().all()


def test_images_of_other_channels():
    model = get_peft_model(vit(num_channels=1), HSTConfig(**SMALL)).eval()
    assert model(pixel_values=torch.randn(2, 1, 32, 32)).logits.isfinite().all()


def test_what_does_not_fit():
    swin = SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    )
    for model in (swin, MODELS["videomae"].model()):
        with pytest.raises(ValueError, match=r"^HSTConfig does not fit \w+: it needs blocks of one width for images"):
            get_peft_model(model, HSTConfig(**SMALL))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dims": ()}, r"dims is \(\): must be a number of at least 1 for each stage"),
        ({"dims": (4, 0, 8, 8)}, r"dims is \(4, 0, 8, 8\): must be a number of at least 1"),
        ({"num_heads": (2, 4)}, r"num_heads is \(2, 4\): must be one number for each of the 4 dims"),
        ({"num_heads": (2, 5, 8, 12)}, r"num_heads is \(2, 5, 8, 12\): must be numbers that divide the dims"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio is 0\.0: must be a finite number of at least"),
        ({"num_virtual_tokens": 0}, r"num_virtual_tokens is 0: must be an integer from 1 to 10000"),
        ({"drop_path": 1.0}, r"drop_path is 1\.0: must be a finite number of at least 0 and less than 1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=rf"^HSTConfig\.{message}"):
        HSTConfig(**fields)
