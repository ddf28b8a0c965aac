"""APT, LAE and PATT against their equations in plain torch, also in windows, and keys with a softmax of their own."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from equations import adapted, assert_equal, both, weights_by_path, weights_of
from families import DEPTH, FAMILIES, output_of
from peft import get_peft_model
from test_prefix import windows, with_prefixes

from hf_visual_peft import (
    APTConfig,
    BAPATConfig,
    CompositeConfig,
    LAEAdapterConfig,
    LAELoRAConfig,
    LAEPrefixConfig,
    PATTConfig,
    VPTConfig,
    find_backbone,
)
from hf_visual_peft.coverage.cell import tensors_of
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.methods.prefix.apt import AttentionPrompts
from hf_visual_peft.methods.prefix.lae import ScaledPrefixes
from hf_visual_peft.methods.prefix.patt import Offsets


COUNT = 3


def by_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def compensated(block, x, keys, values):
    """The attention of a `PlainBlock`: weights of all keys, those of prefixes divided by their own sum."""
    q, k, v = (by_heads(x @ w.T + b, block.heads) for w, b in block.qkv)
    keys, values = (by_heads(p, block.heads).expand(len(x), -1, -1, -1) for p in (keys, values))
    weights = torch.softmax(q @ torch.cat([k, keys], dim=2).mT / q.shape[-1] ** 0.5, dim=-1)
    own, new = weights[..., : -keys.shape[2]], weights[..., -keys.shape[2] :]
    mixed = own @ v + (new / new.sum(-1, keepdim=True)) @ values
    return block.scale1 * (mixed.transpose(1, 2).flatten(2) @ block.out[0].T + block.out[1])


def scaled(w, heads=1):
    """Keys and values of APT, for all heads, or of LAE."""
    if heads > 1:
        return [(w[n] * w[f"{n[:-1]}_scale"].clamp(min=1).unsqueeze(-1)).repeat(1, heads) for n in ("keys", "values")]
    return [w[n] * w[f"{n[:-1]}_scale"] for n in ("keys", "values")]


@both
@torch.no_grad()
def test_apt(name):
    """One set of keys and values for all heads; factors below 1 do not count."""
    (blocks, x, norm), model, _, family = adapted(name, APTConfig(num_virtual_tokens=COUNT, init_weights=False))
    prompts = weights_of(model, "apt_prompts")
    for index, w in prompts.items():
        w["key_scale"].copy_(torch.tensor([0.5, 1.5, 2.0]))
        w["value_scale"].copy_(torch.tensor([1.7, -1.0, 1.0 + index]))
    actual = getattr(model.get_base_model(), model.get_base_model().base_model_prefix)(**family.inputs(2))
    for index, block in enumerate(blocks):
        x = x + with_prefixes(block, block.norm(1, x), *scaled(prompts[index], block.heads))
        x = x + block.mlp(block.norm(2, x))
    assert_equal(actual.last_hidden_state, norm(x))


@both
@pytest.mark.parametrize("own", [True, False])
@torch.no_grad()
def test_lae_prefixes(name, own):
    config = LAEPrefixConfig(num_virtual_tokens=COUNT, depth=2, compensated=own, init_weights=False)
    (blocks, x, norm), model, actual, _ = adapted(name, config)
    prefixes = weights_of(model, "laeprefix_heads")
    assert prefixes.keys() == {0, 1}
    attention = compensated if own else with_prefixes
    for index, block in enumerate(blocks):
        n = block.norm(1, x)
        x = x + (attention(block, n, *scaled(prefixes[index])) if index < 2 else block.attention(n))
        x = x + block.mlp(block.norm(2, x))
    assert_equal(actual, norm(x))


@pytest.mark.parametrize("name", ["swin", "timm_swin", "swinv2", "pvt", "timm_vit"])
@torch.no_grad()
def test_keys_with_a_softmax_of_their_own_in_windows(name):
    """Each attention is that with the values of prefixes at zero, plus attention to prefixes alone."""
    base = MODELS[name].model()
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), LAEPrefixConfig(num_virtual_tokens=COUNT, init_weights=False)).eval()
    seen, expected = {}, {}
    for block in find_backbone(base).blocks[:5]:
        within = model.get_submodule(f"base_model.model.{block.path}")
        path = block.roles["value"][0].rpartition(".")[0]
        heads = within.adapters.laeprefix_heads["default"]
        within.get_submodule(path.removeprefix(f"{block.path}.")).register_forward_hook(
            lambda module, args, kwargs, output, path=path: seen.__setitem__(path, (args, kwargs, output)),
            with_kwargs=True,
        )
        expected[path] = scaled(dict(heads.named_parameters()))
    tensors_of(MODELS[name].call(model, MODELS[name].arguments(2)))
    assert len(expected) > 1
    for path, (keys, values) in expected.items():
        args, kwargs, output = seen[path]
        output = output[0] if isinstance(output, tuple) else output
        attention = base.get_submodule(path)
        found = of_module(attention, (*args, *kwargs.values()), keys, values)
        torch.testing.assert_close(output, found, rtol=0, atol=1e-5)


def of_module(attention, args, keys, values):
    from test_prefix import reduced

    if not hasattr(attention, "qkv") and hasattr(attention, "sequences_reduction_ratio"):
        x, number = args[0], attention.num_attention_heads
        q = by_heads(attention.query(x), number)
        with_zeros = reduced(attention, args, keys, torch.zeros_like(values))
        return with_zeros + alone(q, q.shape[-1] ** -0.5, keys, values)
    plain = all(not hasattr(attention, each) for each in ("relative_position_bias_table", "logit_scale"))
    plain = plain and not hasattr(attention, "relative_position_bias")
    x, number = args[0], getattr(attention, "num_heads", None) or attention.num_attention_heads
    if hasattr(attention, "qkv"):
        q = by_heads(attention.qkv(x).chunk(3, dim=-1)[0], number)
    else:
        q = by_heads(getattr(attention, "q_proj", getattr(attention, "query", None))(x), number)
    scale = q.shape[-1] ** -0.5
    if plain:  # timm's ViT
        k, v = (by_heads(part, number) for part in attention.qkv(x).chunk(3, dim=-1)[1:])
        joined = torch.cat([k, by_heads(keys, number).expand(len(x), -1, -1, -1)], dim=2)
        mixed = torch.softmax(q @ joined.mT * scale, dim=-1)[..., : k.shape[2]] @ v
        return attention.proj(mixed.transpose(1, 2).flatten(2) + alone(q, scale, keys, values))
    output = getattr(attention, "proj", getattr(attention, "o_proj", torch.nn.Identity()))
    if hasattr(attention, "logit_scale"):
        q, scale = torch.nn.functional.normalize(q, dim=-1), attention.logit_scale.clamp(max=4.6051702).exp()
        keys = torch.nn.functional.normalize(by_heads(keys, number), dim=-1).transpose(0, 1).flatten(1)
    with_zeros = windows(attention, args, keys, torch.zeros_like(values))
    added = alone(q, scale, keys, values)
    return with_zeros + (added if isinstance(output, torch.nn.Identity) else added @ output.weight.T)


def alone(q, scale, keys, values):
    """Attention to these keys and nothing else, (batch, queries, width)."""
    keys, values = (by_heads(x, q.shape[1]) for x in (keys, values))
    return (torch.softmax(q @ keys.mT * scale, dim=-1) @ values).transpose(1, 2).flatten(2)


@both
@torch.no_grad()
def test_lae_bottlenecks_and_updates(name):
    """Beside attention on its normed input, and on keys and values, each with a factor; in the first blocks only."""
    parts = [LAEAdapterConfig(r=2, depth=1), LAELoRAConfig(r=2, layers_to_transform=[0, 2])]
    (blocks, x, norm), model, actual, _ = adapted(name, CompositeConfig(parts=parts, init_weights=False))
    branches = weights_of(model, "composite_laeadapter_attention")
    assert branches.keys() == {0}
    updates = {
        role: [w for _, w in sorted(weights_by_path(model, f"composite_laelora_{role}").items())]
        for role in ("key", "value")
    }
    for index, block in enumerate(blocks):
        if index != 1:
            for role, place in (("key", 1), ("value", 2)):
                w, (weight, bias) = updates[role][index // 2], block.qkv[place]
                block.qkv[place] = (weight + w["scale"] * w["up.weight"] @ w["down.weight"], bias)
        n = block.norm(1, x)
        x = x + block.attention(n)
        if index == 0:
            w = branches[0]
            hidden = torch.nn.functional.gelu(n @ w["down.weight"].T + w["down.bias"])
            x = x + w["scale"] * (hidden @ w["up.weight"].T + w["up.bias"])
        x = x + block.mlp(block.norm(2, x))
    assert_equal(actual, norm(x))


@pytest.mark.parametrize("name", ["swin", "timm_vit", "timm_swin"])
@torch.no_grad()
def test_offsets_and_updates_of_fused_projections(name):
    """The rows of keys and values only, whichever linears hold them."""
    entry, arguments = MODELS[name], MODELS[name].arguments(2)
    for config, key_slot in ((PATTConfig(r=3, scale=0.7), "patt"), (LAELoRAConfig(r=2), "laelora")):
        base = entry.model()
        torch.manual_seed(0)
        config.init_weights = False
        model = get_peft_model(copy.deepcopy(base), config).eval()
        for block in find_backbone(base).blocks:
            rows = {}
            for role in ("query", "key", "value"):
                rows.setdefault(block.roles[role][0], []).append(role)
            networks = [
                m
                for n, m in model.named_modules()
                if re.search(rf"patt_network{block.index}(_stage\d+)?\.default$", n)
            ]
            for path, roles in rows.items():
                layer = model.get_submodule(f"base_model.model.{path}")
                linear = base.get_submodule(path)
                x = torch.randn(2, 5, linear.in_features)
                parts = list(linear(x).chunk(len(roles), dim=-1))
                for role in {"key", "value"} & set(roles):
                    index = roles.index(role)
                    if key_slot == "laelora":
                        w = getattr(layer, f"laelora_{role}")["default"]
                        parts[index] = parts[index] + w.scale * x @ (w.up.weight @ w.down.weight).T
                    else:
                        (network,) = networks
                        hidden = torch.tanh(x @ network.down.weight.T + network.down.bias)
                        both_halves = (hidden @ network.up.weight.T + network.up.bias).chunk(2, dim=-1)
                        parts[index] = parts[index] + 0.7 * both_halves[role == "value"]
                torch.testing.assert_close(layer(x), torch.cat(parts, dim=-1), rtol=0, atol=1e-5)
        assert not torch.allclose(
            tensors_of(entry.call(model, arguments))[0], tensors_of(entry.call(base, arguments))[0]
        )


@both
@pytest.mark.parametrize("offsets", [("key", "value"), ("value", "query"), "key"])
@torch.no_grad()
def test_patt(name, offsets):
    config = PATTConfig(r=3, scale=0.6, offsets=offsets, init_weights=False)
    (blocks, x, norm), model, actual, _ = adapted(name, config)
    roles = [
        role for role in ("query", "key", "value") if role in ((offsets,) if isinstance(offsets, str) else offsets)
    ]
    for index, block in enumerate(blocks):
        (w,) = weights_by_path(model, f"patt_network{index}").values()
        n = block.norm(1, x)
        made = torch.tanh(n @ w["down.weight"].T + w["down.bias"]) @ w["up.weight"].T + w["up.bias"]
        qkv = {
            role: n @ weight.T + bias
            for role, (weight, bias) in zip(("query", "key", "value"), block.qkv, strict=True)
        }
        for role, offset in zip(roles, made.chunk(len(roles), dim=-1), strict=True):
            qkv[role] = qkv[role] + 0.6 * offset
        q, k, v = (by_heads(part, block.heads) for part in qkv.values())
        mixed = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v
        x = x + block.scale1 * (mixed.transpose(1, 2).flatten(2) @ block.out[0].T + block.out[1])
        x = x + block.mlp(block.norm(2, x))
    assert_equal(actual, norm(x))


@both
@torch.no_grad()
def test_bapat(name):
    config = BAPATConfig(attention_r=2, r=3, attention_scale=0.5, scale=0.3, init_weights=False)
    (blocks, x, norm), model, actual, _ = adapted(name, config)
    branches = weights_of(model, "bapat_mlp_mlp")
    for index, block in enumerate(blocks):
        (w,) = weights_by_path(model, f"bapat_patt_network{index}").values()
        n = block.norm(1, x)
        made = torch.tanh(n @ w["down.weight"].T + w["down.bias"]) @ w["up.weight"].T + w["up.bias"]
        q, k, v = (n @ weight.T + bias for weight, bias in block.qkv)
        key, value = (0.5 * part for part in made.chunk(2, dim=-1))
        q, k, v = (by_heads(part, block.heads) for part in (q, k + key, v + value))
        mixed = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v
        x = x + block.scale1 * (mixed.transpose(1, 2).flatten(2) @ block.out[0].T + block.out[1])
        read, w = block.norm(2, x), branches[index]
        hidden = torch.relu(read @ w["down.weight"].T + w["down.bias"])
        x = x + block.mlp(read) + 0.3 * (hidden @ w["up.weight"].T + w["up.bias"])
    assert_equal(actual, norm(x))


def test_starts():
    torch.manual_seed(0)
    prompts = AttentionPrompts(200, 3, (4, 4), 20, 0.1, True)
    assert 0.9 * 0.5 < prompts.keys.abs().max() <= 0.5
    assert torch.equal(prompts.key_scale, torch.ones(200))
    assert AttentionPrompts(2, 3, (4, 4), 20, 0.1, False).value_scale is None
    prefixes = ScaledPrefixes(200, 2, (4, 4))
    assert 0 <= prefixes.values.min() < 0.001
    assert 0.009 < prefixes.values.max() <= 0.01
    offsets = Offsets(200, 50, 400, bias=True)
    assert abs(offsets.up.weight.std() - 0.02) < 0.002
    assert not offsets.up.bias.any()
    assert Offsets(8, 2, 8, bias=False).up.bias is None
    model = get_peft_model(FAMILIES["vit"].model(), LAEAdapterConfig(r=2))
    for w in weights_of(model, "laeadapter_attention").values():
        assert w["down.weight"].any()
        assert not w["up.weight"].any()
        assert w["scale"] == 1


def test_heads_share_prompts_and_their_dropout():
    torch.manual_seed(0)
    prompts = AttentionPrompts(5, 3, (4, 4), 20, 0.5, True).train()
    keys, values = prompts(8)
    assert keys.shape == values.shape == (8, 3, 5, 4)
    assert torch.equal(keys[:, 0], keys[:, 2])
    assert not torch.equal(keys[0], keys[1])
    assert 0.3 < (keys == 0).float().mean() < 0.7


def test_gradients_of_factors():
    """A factor below 1 has none, as in the authors' code."""
    prompts = AttentionPrompts(2, 1, (4, 4), 20, 0.0, True)
    with torch.no_grad():
        prompts.key_scale.copy_(torch.tensor([0.5, 1.5]))
    prompts(1)[0].square().sum().backward()
    assert prompts.key_scale.grad[0] == 0
    assert prompts.key_scale.grad[1] != 0


@torch.no_grad()
def test_prefixes_of_both_kinds_and_other_methods_meet():
    """Beside prompts and others' keys, compensated prefixes add their own softmax, in every implementation."""
    family = FAMILIES["vit"]
    parts = [LAEPrefixConfig(num_virtual_tokens=2), VPTConfig(num_virtual_tokens=2), APTConfig(num_virtual_tokens=2)]
    torch.manual_seed(0)
    model = get_peft_model(family.model(), CompositeConfig(parts=parts, init_weights=False)).eval()
    first = output_of(model, family.inputs(2))
    model.base_model.model.set_attn_implementation("eager")
    torch.testing.assert_close(output_of(model, family.inputs(2)), first, rtol=0, atol=1e-5)


def test_blocks():
    model = get_peft_model(FAMILIES["vit"].model(), LAEPrefixConfig(layers_to_transform=[2]))
    assert weights_of(model, "laeprefix_heads").keys() == {2}
    assert weights_of(
        get_peft_model(FAMILIES["vit"].model(), LAEAdapterConfig(r=1)), "laeadapter_attention"
    ).keys() == {*range(DEPTH)}


@pytest.mark.parametrize(
    ("config_cls", "field", "value"),
    [
        (APTConfig, "num_virtual_tokens", 0),
        (APTConfig, "dropout", 1.0),
        (APTConfig, "scaled", 1),
        (LAEPrefixConfig, "num_virtual_tokens", 1.5),
        (LAEPrefixConfig, "compensated", None),
        (LAEPrefixConfig, "depth", 0),
        (LAEAdapterConfig, "r", 0),
        (LAELoRAConfig, "r", True),
        (PATTConfig, "r", 0),
        (PATTConfig, "scale", float("nan")),
        (PATTConfig, "offsets", ("output",)),
        (PATTConfig, "offsets", ()),
        (PATTConfig, "biases", "none"),
        (BAPATConfig, "attention_r", 0),
        (BAPATConfig, "attention_scale", "x"),
        (BAPATConfig, "dropout", -0.1),
    ],
)
def test_bad_fields(config_cls, field, value):
    with pytest.raises(ValueError, match=rf"{config_cls.__name__}.{field} is .*: must be"):
        config_cls(**{field: value})


def test_fields_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"LAEPrefixConfig.depth is 2: must be 5, its default, where layers_to_tr"):
        LAEPrefixConfig(depth=2, layers_to_transform=[0])
    with pytest.raises(ValueError, match=r"PATTConfig.r is 1000: must be an integer from 1 to 16"):
        get_peft_model(FAMILIES["vit"].model(), PATTConfig(r=1000))


@pytest.mark.parametrize("config_cls", [APTConfig, LAEPrefixConfig])
@pytest.mark.parametrize("name", ["poolformer", "resnet", "imagegpt"])
def test_models_without_softmax_attention_are_refused(name, config_cls):
    model = MODELS[name].model()
    before = {key: id(module) for key, module in model.named_modules()}
    with pytest.raises(ValueError, match=config_cls.__name__):
        get_peft_model(model, config_cls())
    assert before == {key: id(module) for key, module in model.named_modules()}
