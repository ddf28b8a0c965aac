"""Where queries meet keys, found in attention modules of many kinds, and what they project tokens to."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.sites.attention import Acts, attention_path
from hf_visual_peft.sites.forms import Projections, alone, head_sizes, project, spread
from hf_visual_peft.sites.interception import intercepted


COUNT = 3
pytest.importorskip("timm")


def nothing(*args):
    return None


def of_timm(name, *args, **kwargs):
    """A module of `timm.<name>`, made in evaluation mode with weights that are not small."""
    path, _, cls = name.rpartition(".")
    torch.manual_seed(0)
    module = getattr(importlib.import_module(f"timm.{path}"), cls)(*args, **kwargs)
    module.eval()  # LeViT's returns nothing
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module


def tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


SIZE = [4, 4]
FUSED, QKV = ("qkv",) * 3, ("q", "k", "v")
# class, its arguments, those of its forward after the tokens, the tokens, and its projections
MODULES = {
    "beit": ("models.beit.Attention", (16, 2), {"qkv_bias": True, "window_size": (4, 4)}, (), (2, 17, 16), FUSED),
    "convit": ("models.convit.MHSA", (16, 2), {}, (), (2, 17, 16), FUSED),
    "cross": ("models.crossvit.CrossAttention", (16, 2), {}, (), (2, 17, 16), ("wq", "wk", "wv")),
    "davit": ("models.davit.WindowAttention", (16, (2, 2), 2), {}, (), (8, 4, 16), FUSED),
    "efficientformer": ("models.efficientformer.Attention", (16, 4, 2), {"resolution": 4}, (), (2, 16, 16), FUSED),
    "eva": ("models.eva.EvaAttention", (16, 2), {"qk_norm": True, "norm_layer": nn.LayerNorm}, (), (2, 17, 16), FUSED),
    "gcvit": ("models.gcvit.WindowAttentionGlobal", (16, 2, (2, 2)), {"use_global": False}, (), (8, 4, 16), FUSED),
    "hiera": (
        "models.hiera.MaskUnitAttention",
        (16, 16, 2),
        {"window_size": 4, "use_mask_unit_attn": True},
        (),
        (2, 16, 16),
        FUSED,
    ),
    "hiera_pooled": ("models.hiera.MaskUnitAttention", (16, 16, 2), {"q_stride": 4}, (), (2, 16, 16), FUSED),
    "hieradet": ("models.hieradet_sam2.MultiScaleAttention", (16, 16, 2), {}, (), (2, 4, 4, 16), FUSED),
    "levit": ("models.levit.Attention", (16, 4, 2), {"resolution": 4}, (), (2, 16, 16), FUSED),
    "levit_conv": (
        "models.levit.Attention",
        (16, 4, 2),
        {"resolution": 4, "use_conv": True},
        (),
        (2, 16, 4, 4),
        FUSED,
    ),
    "maxvit": ("models.maxxvit.AttentionCl", (16, 16), {"dim_head": 8}, (), (2, 4, 4, 16), FUSED),
    "maxvit_parts": (
        "models.maxxvit.AttentionCl",
        (16, 16),
        {"dim_head": 8, "head_first": False},
        (),
        (2, 4, 4, 16),
        FUSED,
    ),
    "maxvit_maps": ("models.maxxvit.Attention2d", (16, 16), {"dim_head": 8}, (), (2, 16, 4, 4), FUSED),
    "metaformer": ("models.metaformer.Attention", (16,), {"head_dim": 8}, (), (2, 16, 16), FUSED),
    "nest": ("models.nest.Attention", (16, 2), {}, (), (2, 4, 4, 16), FUSED),
    "nextvit": ("models.nextvit.EfficientAttention", (16,), {"head_dim": 8, "sr_ratio": 1}, (), (2, 16, 16), QKV),
    "pvt_v2": ("models.pvt_v2.Attention", (16, 2), {}, (SIZE,), (2, 16, 16), ("q", "kv", "kv")),
    "swin": ("models.swin_transformer.WindowAttention", (16, 2), {"window_size": 2}, (), (8, 4, 16), FUSED),
    "swin_v2": ("models.swin_transformer_v2.WindowAttention", (16, (2, 2), 2), {}, (), (8, 4, 16), FUSED),
    "swin_v2_cr": (
        "models.swin_transformer_v2_cr.WindowMultiHeadAttention",
        (16, 2, (2, 2)),
        {},
        (),
        (8, 4, 16),
        FUSED,
    ),
    "tiny_vit": ("models.tiny_vit.Attention", (16, 8, 2), {"resolution": (4, 4)}, (), (2, 16, 16), FUSED),
    "tnt": ("models.tnt.Attention", (16, 16, 2), {}, (), (2, 17, 16), ("qk", "qk", "v")),
    "twins_windows": ("models.twins.LocallyGroupedAttn", (16, 2), {"ws": 2}, (SIZE,), (2, 16, 16), FUSED),
    "twins": ("models.twins.GlobalSubSampleAttn", (16, 2), {}, (SIZE,), (2, 16, 16), ("q", "kv", "kv")),
    "visformer": ("models.visformer.Attention", (16, 2), {}, (), (2, 16, 4, 4), FUSED),
    "vit": (
        "layers.attention.Attention",
        (16, 2),
        {"qk_norm": True, "norm_layer": nn.LayerNorm},
        (),
        (2, 17, 16),
        FUSED,
    ),
    "relpos": ("models.vision_transformer_relpos.RelPosAttention", (16, 2), {}, (), (2, 16, 16), FUSED),
    "sam": (
        "models.vision_transformer_sam.Attention",
        (16, 2),
        {"use_rel_pos": True, "input_size": (4, 4)},
        (),
        (2, 4, 4, 16),
        FUSED,
    ),
    "volo": ("models.volo.Attention", (16, 2), {}, (), (2, 4, 4, 16), FUSED),
}
every_module = pytest.mark.parametrize("name", MODULES)
both_ways = pytest.mark.parametrize("fused", [True, False])


def made(name, fused=True):
    cls, args, kwargs, rest, shape, names = MODULES[name]
    module = of_timm(cls, *args, **kwargs)
    for each in module.modules():
        if hasattr(each, "fused_attn"):
            each.fused_attn = fused
    form = Projections(module, *map(module.get_submodule, names))
    return module, form, (tokens(*shape), *rest)


@every_module
@both_ways
@torch.no_grad()
def test_keys_that_nobody_sees_change_nothing(name, fused):
    module, _, args = made(name, fused)
    assert attention_path(nn.ModuleDict({"attn": module}), f"attn.{MODULES[name][-1][0]}") == "attn"
    expected = module(*args)
    kept = []
    forward = partial(type(module).forward, module)
    found = intercepted(module, Acts(nothing, nothing, lambda *pair: kept.extend(pair), nothing), forward, args, {})
    torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def join(key):
        return tokens(*key.shape[:-2], COUNT, key.shape[-1]), tokens(*key.shape[:-2], COUNT, kept[1].shape[-1])

    def hide(logits):
        assert logits.shape[-1] == kept[0].shape[-2] + COUNT
        return torch.cat([logits[..., :-COUNT], logits[..., -COUNT:] - 1e4], dim=-1)

    found = intercepted(module, Acts(join, lambda: hide, nothing, nothing), forward, args, {})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    seen = intercepted(module, Acts(join, nothing, nothing, nothing), forward, args, {})
    assert not torch.allclose(seen, expected, atol=1e-3)


def without_queries(module, form):
    """The module with queries of zero, so that only biases are left of its logits."""
    heads, key_width, value_width = head_sizes(form)
    for parameter in form.query.parameters():
        if form.query is form.key and (getattr(module, "head_first", False) or hasattr(module, "val_dim")):
            parameter.unflatten(0, (heads, -1))[:, : -key_width - value_width].zero_()
        elif form.query is form.key:
            others = heads * key_width + (heads * value_width if form.key is form.value else 0)
            parameter[:-others].zero_()
        else:
            parameter.zero_()
    if getattr(module, "q_bias", None) is not None:
        module.q_bias.zero_()
    return module


# but SAM's biases, which are of the queries, and norms of queries, which make no zeros of zeros
@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("sam", "vit", "eva")])
@both_ways
@torch.no_grad()
def test_logits_are_those_without_biases(name, fused):
    module, form, args = made(name, fused)
    forward = partial(type(module).forward, module)
    found = intercepted(module, Acts(nothing, lambda: torch.zeros_like, nothing, nothing), forward, args, {})
    expected = without_queries(module, form)(*args)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@every_module
@torch.no_grad()
def test_fused_and_written_out_attention_give_the_same(name):
    outputs = []
    for fused in (True, False):
        module, form, args = made(name, fused)
        heads, key_width, value_width = head_sizes(form)
        pair = (tokens(2, heads, COUNT, key_width), tokens(2, heads, COUNT, value_width))
        join = partial(lambda pair, heads, own: spread(pair, own, heads), pair, heads)
        forward = partial(type(module).forward, module)
        outputs.append(intercepted(module, Acts(join, nothing, nothing, nothing), forward, args, {}))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5 * outputs[0].abs().max().item())


@every_module
@torch.no_grad()
def test_tokens_are_projected_as_the_module_does(name):
    """Its own tokens, which then are keys and values at the places where it has them; nothing rotates here."""
    module, form, args = made(name)
    read, kept = [], []
    hook = form.key.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    forward = partial(type(module).forward, module)
    intercepted(module, Acts(nothing, nothing, lambda *pair: kept.extend(pair), nothing), forward, args, {})
    hook.remove()
    x = read[0] if read else args[0]  # BEiT's and EVA's read the weight only
    if any(isinstance(part, nn.Conv2d) for part in form.key.modules()):
        x = x.flatten(2).mT
    heads = head_sizes(form)[0]
    for found, own in zip(project(form, x.reshape(len(x), -1, x.shape[-1])), kept, strict=True):
        own = own if own.ndim > 3 else own.unflatten(0, (-1, heads))
        where = 2 if own.ndim == 5 and name == "twins_windows" else 1
        found, own = (each.movedim(dim, 0).flatten(1, -2) for each, dim in ((found, 1), (own, where)))
        places = [each.sort(dim=1).values for each in (found, own)]
        if name.startswith("swin_v2") and not torch.allclose(*places, atol=1e-5):
            places[0] = F.normalize(found, dim=-1).sort(dim=1).values
        torch.testing.assert_close(*places, rtol=0, atol=1e-5)


@torch.no_grad()
def test_dropout_is_for_weights_of_all_keys():
    """In training, as if the keys that join were the module's own."""
    module, _, (x,) = made("vit", fused=False)
    module.attn_drop.p = 0.5
    pair = tokens(2, 2, COUNT, 8), tokens(2, 2, COUNT, 8)
    forward = partial(type(module).forward, module)
    torch.manual_seed(0)
    found = intercepted(module.train(), Acts(lambda own: pair, nothing, nothing, nothing), forward, (x,), {})
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in module.qkv(x).chunk(3, dim=-1))
    q, k = module.q_norm(q), module.k_norm(k)
    torch.manual_seed(0)
    weights = torch.softmax(q @ torch.cat([k, pair[0]], dim=2).mT / 8**0.5, dim=-1)
    mixed = F.dropout(weights, 0.5) @ torch.cat([v, pair[1]], dim=2)
    torch.testing.assert_close(found, module.proj(mixed.transpose(1, 2).flatten(2)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("models.cait.TalkingHeadAttn", (16, 2), "attention of TalkingHeadAttn.* nowhere"),
        ("models.convit.GPSA", (16, 4), "attention of GPSA.* nowhere"),
        ("layers.diff_attention.DiffAttention", (16, 2), "attention of DiffAttention.* twice"),
    ],
    ids=lambda value: value.rpartition(".")[2] if isinstance(value, str) else "",
)
@torch.no_grad()
def test_other_attention_is_refused(name, args, message):
    module = of_timm(name, *args)
    x = tokens(2, 16, 16)
    with pytest.raises(ValueError, match=message):
        intercepted(module, Acts(nothing, nothing, nothing, nothing), partial(type(module).forward, module), (x,), {})


@torch.no_grad()
def test_positions_beside_the_softmax_are_refused_where_keys_join():
    """ConViT adds weights of positions to those of the softmax, which know nothing of other keys."""
    module = of_timm("models.convit.GPSA", 16, 4)
    join = partial(torch.randn, 2, 4, COUNT, 4)
    acts = Acts(lambda own: (join(), join()), nothing, nothing, nothing)
    with pytest.raises(ValueError, match="attention of GPSA.* nowhere"):
        intercepted(module, acts, partial(type(module).forward, module), (tokens(2, 16, 16),), {})


@torch.no_grad()
def test_values_of_another_width_are_refused():
    module, _, args = made("vit")
    for fused in (True, False):
        module.fused_attn = fused
        acts = Acts(lambda own: (tokens(2, 2, COUNT, 8), tokens(2, 2, COUNT, 4)), nothing, nothing, nothing)
        with pytest.raises(ValueError, match=r"shape \(2, 2, 3, 4\) cannot join an attention's own of shape"):
            intercepted(module, acts, partial(type(module).forward, module), args, {})


def test_keys_that_lie_in_another_way_are_refused():
    pair = tokens(2, 4, COUNT, 8), tokens(2, 4, COUNT, 8)
    with pytest.raises(ValueError, match=r"Keys of shape \(2, 4, 3, 8\) cannot join keys of shape \(2, 4, 9, 16\)"):
        spread(pair, tokens(2, 4, 9, 16), 4)
    with pytest.raises(ValueError, match=r"layout of heads and windows is not known in keys of shape \(3, 4, 9, 8\)"):
        spread(pair, tokens(3, 4, 9, 8), 4)
    # as many windows as heads: heads are neighbouring channels of one projection
    own = tokens(2, 4, 9, 4 * 8).unflatten(-1, (4, 8))
    for dims, at in ((own.transpose(2, 3), 2), (own.permute(0, 3, 1, 2, 4), 1)):
        keys, _ = spread(pair, dims, 4)
        torch.testing.assert_close(keys.movedim(at, 1)[:, :, 0], pair[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vit", "beit", "relpos", "davit", "swin", "convit"])
@torch.no_grad()
def test_other_tokens_have_no_position(name):
    """A module alone, on sequences of another length, without its biases."""
    module, form, _ = made(name, fused=True)
    x = tokens(5, 3, 16)
    query, keys, values = (F.linear(x, w) for w in form.key.weight.chunk(3))
    if form.key.bias is not None:
        query, keys, values = (a + b for a, b in zip((query, keys, values), form.key.bias.chunk(3), strict=True))
    elif getattr(module, "q_bias", None) is not None:
        query, keys, values = query + module.q_bias, keys + module.k_bias, values + module.v_bias
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (query, keys, values))
    for norm, which in (("q_norm", 0), ("k_norm", 1)):
        if getattr(module, norm, None) is not None:
            q, k = (getattr(module, norm)(q), k) if which == 0 else (q, getattr(module, norm)(k))
    mixed = (torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(alone(module, x, False), module.proj(mixed), rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_tokens_without_a_position_get_no_bias_from_windows(implementation):
    """As many of them as a window has tokens: a bias would fit, and must still be left out."""
    torch.manual_seed(0)
    model = MODELS["swin"].model().eval()
    model.set_attn_implementation(implementation)
    module = model.swin.encoder.layers[0].blocks[0].attention
    for name, parameter in module.named_parameters():
        if "bias_table" in name:
            nn.init.normal_(parameter, std=5.0)
    tokens = torch.randn(3, 4, module.q_proj.in_features)
    heads = [p(tokens).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for p in
             (module.q_proj, module.k_proj, module.v_proj)]  # fmt: skip
    logits = heads[0] @ heads[1].mT * module.head_dim**-0.5
    expected = module.o_proj((logits.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2))
    with torch.no_grad():
        torch.testing.assert_close(alone(module, tokens, interface=True), expected)
