"""Attention that reads the weight of its projection without calling it: what acts in attention works, exactly."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from equations import assert_equal
from peft import get_peft_model

from hf_visual_peft import (
    AdaptFormerConfig,
    E2VPTConfig,
    LSTConfig,
    SSFConfig,
    VPTConfig,
    VQTConfig,
    find_backbone,
)


timm = pytest.importorskip("timm")
apply_rot_embed_cat = timm.layers.apply_rot_embed_cat

PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
WINDOWS = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4}
COUNT = 3


def heads(x, number):
    return x.unflatten(-1, (number, -1)).transpose(1, 2)


def projected(m, x, prompts):
    """Queries of the tokens, keys and values of tokens and prompts."""
    zero = torch.zeros_like(m.q_bias)
    both = torch.cat([x, prompts.expand(len(x), -1, -1)], dim=1)
    qkv = both @ m.qkv.weight.T + torch.cat([m.q_bias, zero, m.v_bias])
    q, k, v = (heads(each, m.num_heads) for each in qkv.chunk(3, dim=-1))
    return q[:, :, : x.shape[1]], k, v


def mixed(logits, v):
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def beit(m, prompts, x, shared_rel_pos_bias=None):
    q, k, v = projected(m, x, prompts)
    logits = q @ k.mT * (q.shape[-1] ** -0.5)
    if m.relative_position_bias_table is not None:
        index = m.relative_position_index
        bias = m.relative_position_bias_table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1)
        logits = logits + F.pad(bias, (0, COUNT))
    if shared_rel_pos_bias is not None:
        logits = logits + F.pad(shared_rel_pos_bias, (0, COUNT))
    return m.proj(mixed(logits, v))


def eva(m, prompts, x, rope=None, attn_mask=None, is_causal=False):
    q, k, v = projected(m, x, prompts)
    own, extra = k[:, :, : x.shape[1]], k[:, :, x.shape[1] :]
    first = m.num_prefix_tokens

    def turned(y):
        return torch.cat([y[:, :, :first], apply_rot_embed_cat(y[:, :, first:], rope)], dim=2)

    if rope is not None:
        q, own = turned(q), turned(own)
    return m.proj(m.norm(mixed(q @ torch.cat([own, extra], 2).mT * (q.shape[-1] ** -0.5), v)))


def swin_v2(m, prompts, x, mask=None):
    q, k, v = projected(m, x, prompts)
    unit = [y / y.norm(dim=-1, keepdim=True) for y in (q, k)]
    logits = unit[0] @ unit[1].mT * m.logit_scale.clamp(max=math.log(100.0)).exp()
    index = m.relative_position_index
    bias = m.cpb_mlp(m.relative_coords_table).flatten(0, 2)[index.flatten()].view(*index.shape, -1)
    logits = logits + F.pad(16 * torch.sigmoid(bias.permute(2, 0, 1)), (0, COUNT))
    if mask is not None:
        logits = logits + F.pad(mask, (0, COUNT)).repeat(len(x) // len(mask), 1, 1).unsqueeze(1)
    return m.proj(mixed(logits, v))


# name, arguments, the attention, whether a norm is before it, whether prompts can also pass from block to block
MODELS = {
    "beit": ("beit_base_patch16_224", PLAIN, beit, True),
    "beit_shared": (
        "beit_base_patch16_224",
        {**PLAIN, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "use_abs_pos_emb": True},
        beit,
        True,
    ),
    "eva02": ("eva02_tiny_patch14_224", PLAIN, eva, True),
    "eva02_scale_norm": ("eva02_base_patch14_224", {**PLAIN, "qkv_fused": True}, eva, True),
    "eva": ("eva_giant_patch14_224", PLAIN, eva, True),
    "swinv2": ("swinv2_tiny_window8_256", {**WINDOWS, "num_classes": 5}, swin_v2, False),
}
every_model = pytest.mark.parametrize("name", MODELS)


def made(name):
    cls, fields, *_ = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(cls, **fields).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def hidden(logits):
    return torch.cat([logits[..., :-COUNT], logits[..., -COUNT:] - 1e4], dim=-1)


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def adapted(base, config):
    torch.manual_seed(3)
    config.init_weights = False
    return get_peft_model(copy.deepcopy(base), config).eval()


@every_model
@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_prompts_are_keys_and_values_of_every_attention(name, fused):
    base = made(name)
    *_, attention, normed = MODELS[name]
    for module in base.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    model = adapted(base, VPTConfig(num_virtual_tokens=COUNT, modules_to_save=[]))
    found = model(images())
    assert not torch.allclose(found, base(images()), atol=1e-4)
    for block in find_backbone(base).blocks:
        module = base.get_submodule(block.path)
        adapters = model.get_base_model().get_submodule(block.path).adapters
        prompts = adapters.vpt_tokens["default"].prompts
        prompts = module.norm1(prompts) if normed else prompts
        module.attn.forward = partial(attention, module.attn, prompts)
    assert_equal(found, base(images()))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "eva"])  # where they are tokens of the sequence
@torch.no_grad()
def test_prompts_that_nobody_attends_to_change_nothing(name):
    base = made(name)
    model = adapted(base, VPTConfig(num_virtual_tokens=COUNT, modules_to_save=[]))
    assert not torch.allclose(model(images()), base(images()), atol=1e-4)
    for path, module in model.named_modules():
        if path.endswith(".adapters"):
            module._logit_change = lambda: (
                lambda logits: torch.cat([logits[..., :-COUNT], logits[..., -COUNT:] - 1e4], -1)
            )
    assert_equal(model(images()), base(images()))


@every_model
def test_other_methods_leave_these_projections_out(name):
    base = made(name)
    blocks = find_backbone(base).blocks
    assert all(block.projections and not block.roles["query"] for block in blocks)
    for config in (SSFConfig(), AdaptFormerConfig(r=2), LSTConfig()):
        model = adapted(base, config)
        model(images()).sum().backward()
        idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert not [each for each in idle if "ssf" in each or "adaptformer" in each]
        assert not any(".qkv." in n and "lst" not in n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("config", [E2VPTConfig(num_virtual_tokens=2, num_kv_tokens=2, pieces=4), VQTConfig()])
@pytest.mark.parametrize("name", ["beit", "eva02"])
def test_more_methods_in_attention_train(name, config):
    model = adapted(made(name), copy.deepcopy(config))
    model(images()).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "masks" not in n)


def iformer(m, prompts, x):
    """Single-head attention in windows of a map; values and gate are the halves of one projection's sigmoid."""
    size, (height, width) = m.window_size or x.shape[-1], x.shape[2:]
    padded = F.pad(x, (0, -width % size, 0, -height % size))
    out = torch.zeros_like(padded)
    for top in range(0, padded.shape[2], size):
        for left in range(0, padded.shape[3], size):
            place = (..., slice(top, top + size), slice(left, left + size))
            window = padded[place]
            q, gate = m.q(window).flatten(2).mT, m.v_gate(window).sigmoid().chunk(2, dim=1)[1]
            both = torch.cat([window.flatten(2), prompts.mT.expand(len(x), -1, -1)], dim=2).unsqueeze(-1)
            k, v = m.k(both).flatten(2).mT, m.v_gate(both).sigmoid().chunk(2, dim=1)[0].flatten(2).mT
            heads = (q @ k.mT * m.q.c.weight.shape[0] ** -0.5).softmax(-1) @ v
            out[place] = m.proj(heads.mT.reshape(gate.shape) * gate)
    return out[:, :, :height, :width]


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_values_that_are_more_than_a_projection(fused):
    pytest.importorskip("timm", minversion="1.0.30")  # the first with this model
    torch.manual_seed(0)
    base = timm.create_model(
        "iformer_t", num_classes=5, depths=(1, 1, 4, 4), dims=(4, 8, 16, 16), attn_groups=(0, 0, 1, 1)
    ).eval()
    for parameter in (p for n, p in base.named_parameters() if "mixer.module" in n):
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    x = torch.randn(2, 3, 160, 160)
    model = adapted(base, VPTConfig(num_virtual_tokens=COUNT, modules_to_save=[]))
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    found, plain = model(x), base(x)
    for _, module in model.named_modules():
        if "vpt_tokens" in module._modules:
            module._logit_change = lambda: hidden
    assert_equal(model(x), plain)
    blocks = [block for block in find_backbone(base).blocks if block.projections]
    assert len(blocks) == 2
    for block in blocks:
        prompts = model.get_base_model().get_submodule(block.path).adapters.vpt_tokens["default"].prompts
        attention = base.get_submodule(block.path).mixer.module
        attention.forward = partial(iformer, attention, prompts)
    assert not torch.allclose(found, plain, atol=1e-4)
    assert_equal(found, base(x))
