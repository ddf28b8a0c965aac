"""Prefix tuning and VFPT against their equations in plain torch, and the site of keys and values."""

from __future__ import annotations

import copy

import pytest
import torch
from equations import adapted, assert_equal, both, weights_of
from families import DEPTH, FAMILIES, images, output_of
from peft import PeftModel, get_peft_model
from torch import nn

from hf_visual_peft import PrefixConfig, VFPTConfig, VPTConfig, find_backbone, store_prefixes
from hf_visual_peft.coverage.cell import tensors_of
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.methods.prefix.prefix_tuning import PrefixNetwork, ProducedPrefixes
from hf_visual_peft.methods.prompt.vfpt import FourierPrompts
from hf_visual_peft.sites.block_attention import AttentionLayer


COUNT = 3


def with_prefixes(block, x, keys, values):
    """The attention of a `PlainBlock` with further keys and values, (tokens, width)."""
    q, k, v = (x @ w.T + b for w, b in block.qkv)
    k, v = (torch.cat([own, new.expand(len(x), -1, -1)], dim=1) for own, new in ((k, keys), (v, values)))
    q, k, v = (part.unflatten(-1, (block.heads, -1)).transpose(1, 2) for part in (q, k, v))
    mixed = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v
    return block.scale1 * (mixed.transpose(1, 2).flatten(2) @ block.out[0].T + block.out[1])


@both
@pytest.mark.parametrize("reparam_dim", [None, 5])
@torch.no_grad()
def test_equation(name, reparam_dim):
    config = PrefixConfig(num_virtual_tokens=COUNT, reparam_dim=reparam_dim, init_weights=False)
    (blocks, x, norm), model, actual, _ = adapted(name, config)
    if reparam_dim is None:
        found = weights_of(model, "prefix_heads")
        pairs = [(found[index]["keys"], found[index]["values"]) for index in range(DEPTH)]
    else:
        (w,) = weights_of(model, "prefix_network").values()
        hidden = torch.tanh(w["embedding"] @ w["down.weight"].T + w["down.bias"])
        made = (hidden @ w["up.weight"].T + w["up.bias"]).view(COUNT, DEPTH, 2, -1)
        pairs = [(made[:, index, 0], made[:, index, 1]) for index in range(DEPTH)]
    for block, pair in zip(blocks, pairs, strict=True):
        x = x + with_prefixes(block, block.norm(1, x), *pair)
        x = x + block.mlp(block.norm(2, x))
    assert_equal(actual, norm(x))


@pytest.mark.parametrize("name", ["swin", "timm_swin", "swinv2", "donut-swin", "dinov3_vit", "timm_dinov3", "pvt"])
@pytest.mark.parametrize("reparam_dim", [None, 4])
@torch.no_grad()
def test_equation_in_windows_with_rotation_and_on_reduced_keys(name, reparam_dim):
    """Module by module, with position biases, masks and rotation for the module's own keys only."""
    base = MODELS[name].model()
    torch.manual_seed(0)
    config = PrefixConfig(num_virtual_tokens=COUNT, reparam_dim=reparam_dim, init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    if reparam_dim is not None:
        store_prefixes(model)
    seen, expected = {}, {}

    def keep(path):
        return lambda module, args, kwargs, output: seen.__setitem__(path, (args, kwargs, output))

    for block in find_backbone(base).blocks:
        within = model.get_submodule(f"base_model.model.{block.path}")
        heads = within.adapters.prefix_heads["default"]
        path = block.roles["value"][0].rpartition(".")[0]
        outer = path.removeprefix(f"{block.path}.")
        attention = within.get_submodule(outer)
        attention.register_forward_hook(keep(path), with_kwargs=True)
        expected[path] = (heads.keys, heads.values)
    tensors_of(MODELS[name].call(model, MODELS[name].arguments(2)))
    reference = {"dinov3_vit": rotated, "timm_dinov3": rotated, "pvt": reduced}.get(name, windows)
    for path, pair in expected.items():
        args, kwargs, output = seen[path]
        found = reference(base.get_submodule(path), (*args, *kwargs.values()), *pair)
        output = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(output, found, rtol=0, atol=1e-5)
    assert len(expected) > 1


def windows(attention, args, keys, values):
    """What windows make of (windows, tokens, channels), with the module's weights."""
    x, mask = args[0], args[1] if len(args) > 1 and isinstance(args[1], torch.Tensor) else None
    number = getattr(attention, "num_heads", None) or attention.num_attention_heads
    if hasattr(attention, "qkv"):
        q, k, v = attention.qkv(x).chunk(3, dim=-1)
    else:
        names = ("q_proj", "k_proj", "v_proj") if hasattr(attention, "q_proj") else ("query", "key", "value")
        q, k, v = (getattr(attention, name)(x) for name in names)
    k, v = (torch.cat([own, new.expand(len(x), -1, -1)], dim=1) for own, new in ((k, keys), (v, values)))
    q, k, v = (part.unflatten(-1, (number, -1)).transpose(1, 2) for part in (q, k, v))
    if hasattr(attention, "logit_scale"):
        q, k = (part / part.norm(dim=-1, keepdim=True) for part in (q, k))
        logits = q @ k.mT * attention.logit_scale.clamp(max=torch.log(torch.tensor(100.0))).exp()
        table = attention.continuous_position_bias_mlp(attention.relative_coords_table).view(-1, number)
        bias = 16 * torch.sigmoid(table[attention.relative_position_index.flatten()])
    else:
        logits = q @ k.mT / q.shape[-1] ** 0.5
        holder = getattr(attention, "relative_position_bias", attention)
        bias = holder.relative_position_bias_table[holder.relative_position_index.flatten()]
    area = x.shape[1]
    logits[..., :area] += bias.view(area, area, number).permute(2, 0, 1)
    if mask is not None:
        twice = 2 if hasattr(attention, "logit_scale") else 1  # the model adds it twice
        logits[..., :area] += twice * mask.unsqueeze(1).repeat(len(x) // len(mask), 1, 1, 1)
    mixed = (torch.softmax(logits, dim=-1) @ v).transpose(1, 2).flatten(2)
    output = getattr(attention, "proj", getattr(attention, "o_proj", nn.Identity()))
    return output(mixed)


def rotated(attention, args, keys, values):
    """Of DINOv3 in transformers and in timm: the module's own tokens are rotated, prefixes are not."""
    x, *others = args
    number = attention.num_heads
    if getattr(attention, "qkv", None) is not None:
        q, k, v = attention.qkv(x).chunk(3, dim=-1)
    else:
        q, k, v = (getattr(attention, name)(x) for name in ("q_proj", "k_proj", "v_proj"))
    q, k, v = (part.unflatten(-1, (number, -1)).transpose(1, 2) for part in (q, k, v))
    position = next(each for each in others if each is not None)
    if isinstance(position, tuple):
        cos, sin = position
    else:
        sin, cos = position.tensor_split(2, dim=-1)
    cos, sin = (table.expand(1, 1, *table.shape[-2:]) for table in (cos, sin))
    patches = cos.shape[-2]

    def rotate(part):
        first, second = part[:, :, -patches:].chunk(2, dim=-1)
        turned = part[:, :, -patches:] * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([part[:, :, :-patches], turned], dim=2)

    own = [part.unflatten(-1, (number, -1)).transpose(0, 1).expand(len(x), -1, -1, -1) for part in (keys, values)]
    logits = rotate(q) @ torch.cat([rotate(k), own[0]], dim=2).mT / q.shape[-1] ** 0.5
    mixed = (torch.softmax(logits, dim=-1) @ torch.cat([v, own[1]], dim=2)).transpose(1, 2).flatten(2)
    return getattr(attention, "o_proj", getattr(attention, "proj", None))(mixed)


def reduced(attention, args, keys, values):
    """Of PVT: keys and values of a smaller map, prefixes as they are."""
    x, height, width = args[:3]
    number, small = attention.num_attention_heads, x
    if attention.sequences_reduction_ratio > 1:
        maps = attention.sequence_reduction(x.mT.reshape(len(x), -1, height, width))
        small = attention.layer_norm(maps.flatten(2).mT)
    q, k, v = attention.query(x), attention.key(small), attention.value(small)
    k, v = (torch.cat([own, new.expand(len(x), -1, -1)], dim=1) for own, new in ((k, keys), (v, values)))
    q, k, v = (part.unflatten(-1, (number, -1)).transpose(1, 2) for part in (q, k, v))
    return (torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v).transpose(1, 2).flatten(2)


NOBODY = ["vit", "data2vec-vision", "swin", "swinv2", "timm_swin", "pvt", "cvt", "segformer", "hiera", "sam"]
NOBODY += ["timm_dinov3", "timm_vit", "timm_maxvit", "vitdet", "timesformer", "mobilevit", "open_clip"]


@pytest.mark.parametrize("name", NOBODY)
@torch.no_grad()
def test_keys_that_nobody_sees_change_nothing(name, monkeypatch):
    """The output is the base's, whatever the values are."""
    entry = MODELS[name]
    base = entry.model()
    arguments = entry.arguments(2)
    before = tensors_of(entry.call(base, arguments))
    hiding = False
    monkeypatch.setattr(AttentionLayer, "_logit_change", lambda self: hidden if hiding else None)
    model = get_peft_model(base, PrefixConfig(num_virtual_tokens=COUNT, init_weights=False)).eval()
    after = tensors_of(entry.call(model, arguments))
    assert not all(torch.allclose(a, b, atol=1e-6) for a, b in zip(after, before, strict=True))
    hiding = True
    for found, expected in zip(tensors_of(entry.call(model, arguments)), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def hidden(logits):
    """With the logits of the last keys so low that no query sees them."""
    return torch.cat([logits[..., :-COUNT], logits[..., -COUNT:] - 1e4], dim=-1)


@pytest.mark.parametrize("name", ["vit", "dinov2_registers"])
@torch.no_grad()
def test_storing_the_prefixes_changes_no_output(name, tmp_path):
    family = FAMILIES[name]
    config = PrefixConfig(num_virtual_tokens=COUNT, reparam_dim=5, dropout=0.3, init_weights=False)
    model = get_peft_model(family.model(), config).eval()
    model.add_adapter("other", PrefixConfig(num_virtual_tokens=2, reparam_dim=4, init_weights=False))
    before = output_of(model, family.inputs(2))
    store_prefixes(model)
    torch.testing.assert_close(output_of(model, family.inputs(2)), before, rtol=0, atol=1e-6)
    names = [n for n, p in model.named_parameters() if p.requires_grad and "prefix" in n]
    assert names
    assert all("prefix_heads.default." in n for n in names)
    with pytest.raises(ValueError, match="'default' has no MLP that makes prefixes: its reparam_dim is None"):
        store_prefixes(model)
    with pytest.raises(ValueError, match="'nobody' has no MLP that makes prefixes: there is none"):
        store_prefixes(model, "nobody")
    saved = output_of(model, family.inputs(2))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(family.model(), tmp_path).eval()
    torch.testing.assert_close(output_of(loaded, family.inputs(2)), saved, rtol=0, atol=0)
    model.set_adapter("other")
    assert "prefix_network.other" in "".join(n for n, p in model.named_parameters() if p.requires_grad)


def test_storing_refuses_another_method():
    model = get_peft_model(FAMILIES["vit"].model(), VPTConfig())
    with pytest.raises(ValueError, match="has no MLP that makes prefixes: its config is VPTConfig"):
        store_prefixes(model)


def test_start():
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), PrefixConfig())
    for w in weights_of(model, "prefix_heads").values():
        for x in w.values():
            bound = (6 / (11 * x.shape[1])) ** 0.5
            assert 0.9 * bound < x.abs().max() <= bound
    network = PrefixNetwork(300, 8, 4, (8, 8))
    assert abs(network.embedding.std() - 1) < 0.1


def test_dropout_acts_on_the_prefixes_of_each_image_in_training_only():
    torch.manual_seed(0)
    network = PrefixNetwork(4, 8, 5, (8, 8, 8, 8))
    prefixes = ProducedPrefixes(1, 2, 0.5)
    keys, values = prefixes.train()(64, network)
    whole, own = prefixes.eval()(1, network)
    kept = keys != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(keys[kept], (2 * whole).expand_as(keys)[kept])
    assert not torch.equal(keys[0], keys[1])
    assert own.shape == values[:1].shape == (1, 2, 4, 4)


@pytest.mark.parametrize(
    ("field", "value"), [("num_virtual_tokens", 0), ("reparam_dim", 0), ("reparam_dim", 1.5), ("dropout", 1.0)]
)
def test_bad_fields(field, value):
    with pytest.raises(ValueError, match=rf"PrefixConfig.{field} is {value!r}: must be"):
        PrefixConfig(**{field: value})


@pytest.mark.parametrize("name", ["poolformer", "resnet", "imagegpt", "levit"])
def test_models_without_softmax_attention_are_refused(name):
    model = MODELS[name].model()
    before = {key: id(module) for key, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"PrefixConfig"):
        get_peft_model(model, PrefixConfig())
    assert before == {key: id(module) for key, module in model.named_modules()}


# ---- VFPT --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.5, 2), (0.99, 4), (1.0, 5)])
@torch.no_grad()
def test_first_prompts_are_transformed(fraction, count):
    torch.manual_seed(0)
    equation = FourierPrompts(5, 6, 12, 0.0, fraction)
    tokens = equation(2)
    prompts = equation.prompts.double()
    for u in range(count):
        for w in range(6):
            t, c = torch.arange(count).view(-1, 1), torch.arange(6)
            angle = 2 * torch.pi * (u * t / count + w * c / 6)
            expected = (prompts[:count] * torch.cos(angle)).sum()
            torch.testing.assert_close(tokens[1, u, w].double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens[1, count:], equation.prompts[count:], rtol=0, atol=0)


@torch.no_grad()
def test_transform_follows_dropout_and_projection():
    torch.manual_seed(0)
    equation = FourierPrompts(4, 6, 12, 0.5, 0.5).train()
    linear = nn.Linear(6, 8)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(linear(equation.prompts).expand(2, -1, -1), 0.5)
    torch.manual_seed(1)
    found = equation(2, linear)
    torch.testing.assert_close(found[:, :2], torch.fft.fft2(dropped[:, :2]).real)
    torch.testing.assert_close(found[:, 2:], dropped[:, 2:])


@torch.no_grad()
def test_none_transformed_is_vpt():
    outputs = []
    for config_cls, fields in ((VPTConfig, {}), (VFPTConfig, {"fraction": 0.0})):
        torch.manual_seed(0)
        model = get_peft_model(FAMILIES["vit"].model(), config_cls(num_virtual_tokens=COUNT, **fields)).eval()
        outputs.append(output_of(model, images(2)))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"VFPTConfig.fraction is 1.5: must be a number from 0 to 1"):
        VFPTConfig(fraction=1.5)
