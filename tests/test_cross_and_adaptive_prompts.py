"""Prompts that the stream attends to apart (CVPT), and prompts that are made of it (VAPT)."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from equations import adapted, assert_equal, both, weights_by_path, weights_of
from families import DEPTH, FAMILIES, WIDTH, images, output_of
from peft import LoraConfig, PeftModel, get_peft_model
from test_prefix import windows
from torch import nn

from hf_visual_peft import CVPTConfig, VAPTConfig, find_backbone
from hf_visual_peft.coverage.cell import tensors_of
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.sites import Grid, TokenLayout


COUNT = 3


def crossing(block, x, prompts):
    """Attention of a `PlainBlock` from x to prompts, (tokens, width), without norm and layer scale."""
    (wq, bq), (wk, bk), (wv, bv) = block.qkv
    q, k, v = x @ wq.T + bq, prompts @ wk.T + bk, prompts @ wv.T + bv
    size = x.shape[-1] // block.heads
    heads = []
    for head in range(block.heads):
        part = slice(head * size, (head + 1) * size)
        heads.append(torch.softmax(q[..., part] @ k[:, part].T / size**0.5, dim=-1) @ v[:, part])
    return torch.cat(heads, dim=-1) @ block.out[0].T + block.out[1]


@both
@pytest.mark.parametrize("place", ["before", "between", "after"])
@torch.no_grad()
def test_cvpt(name, place):
    config = CVPTConfig(num_virtual_tokens=COUNT, place=place, init_weights=False)
    (blocks, x, norm), model, actual, _ = adapted(name, config)
    found = weights_of(model, "cvpt_cross")
    for index, block in enumerate(blocks):
        prompts = found[index]["prompts"]
        x = x + crossing(block, x, prompts) if place == "before" else x
        x = x + block.attention(block.norm(1, x))
        x = x + crossing(block, x, prompts) if place == "between" else x
        x = x + block.mlp(block.norm(2, x))
        x = x + crossing(block, x, prompts) if place == "after" else x
    assert_equal(actual, norm(x))


def plain_cross(attention, output, x, prompts):
    """The same with modules, of which each holds its projections under one of a few names."""
    number = getattr(attention, "num_heads", None) or attention.num_attention_heads
    groups = getattr(attention, "num_key_value_groups", 1)
    if hasattr(attention, "qkv"):
        q, k, v = (attention.qkv(each).chunk(3, dim=-1)[i] for i, each in enumerate((x, prompts, prompts)))
    else:
        names = ("q_proj", "k_proj", "v_proj") if hasattr(attention, "q_proj") else ("query", "key", "value")
        q, k, v = (getattr(attention, n)(each) for n, each in zip(names, (x, prompts, prompts), strict=True))
    q = q.unflatten(-1, (number, -1)).transpose(1, 2)
    k, v = (each.unflatten(-1, (number // groups, -1)).transpose(0, 1) for each in (k, v))
    k, v = (each.repeat_interleave(groups, dim=0) for each in (k, v))
    mixed = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v
    return output(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", ["swin", "timm_swin", "timm_vit", "dinov3_vit", "beit", "clip"])
@torch.no_grad()
def test_cvpt_in_windows_with_rotation_and_in_one_linear(name):
    """Block by block: what comes to the norm before the MLP is what came out of attention, and the crossing."""
    entry = MODELS[name]
    base = entry.model()
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), CVPTConfig(num_virtual_tokens=COUNT, init_weights=False)).eval()
    seen = {}

    def keep(path):
        return lambda module, args: seen.__setitem__(path, args[0])

    backbone = find_backbone(base)
    inner = model.get_base_model()
    blocks = [block for block in backbone.blocks if block.roles["query"]]
    for block in blocks:
        entrance = inner.get_submodule(block.entrances["mlp"])
        hooks = dict(entrance._forward_pre_hooks)
        entrance._forward_pre_hooks.clear()
        entrance.register_forward_pre_hook(keep((block.path, "own")))
        entrance._forward_pre_hooks.update(hooks)
        entrance.register_forward_pre_hook(keep((block.path, "all")))
    tensors_of(entry.call(model, entry.arguments(2)))
    weights = weights_by_path(model, "adapters.cvpt_cross")
    for block in blocks:
        own, total = (seen[block.path, which].flatten(1, -2) for which in ("own", "all"))
        attention = base.get_submodule(block.roles["query"][0].rpartition(".")[0])
        output, prompts = base.get_submodule(block.roles["output"][0]), weights[block.path]["prompts"]
        expected = plain_cross(attention, output, own, prompts)
        torch.testing.assert_close(total - own, expected, rtol=0, atol=1e-5 * total.abs().max().item())
    assert len(blocks) > 1


@torch.no_grad()
def test_adapters_at_the_projections_stay_out_of_the_crossing():
    """LoRA changes the block's own attention and not that to prompts, whichever of the two came first."""
    (blocks, x, norm), model, _, _ = adapted("vit", CVPTConfig(num_virtual_tokens=COUNT, init_weights=False))
    prompts = weights_of(model, "cvpt_cross")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    torch.manual_seed(5)
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    inner = model.get_base_model()
    stacked = get_peft_model(inner, lora).eval()
    scale = lora.lora_alpha / lora.r

    def changed(block, index):
        found = []
        names = dict(stacked.named_parameters())
        for target, (weight, bias) in zip(targets, (*block.qkv, block.out), strict=True):
            path = f"base_model.model.vit.layers.{index}.attention.{target}"
            a, b = (names[f"{path}.lora_{which}.default.weight"] for which in "AB")
            found.append((weight + scale * b @ a, bias))
        block = copy.copy(block)
        block.qkv, block.out = found[:3], found[3]
        return block

    for index, block in enumerate(blocks):
        x = x + changed(block, index).attention(block.norm(1, x))
        x = x + crossing(block, x, prompts[index]["prompts"])
        x = x + block.mlp(block.norm(2, x))
    actual = stacked.get_base_model().vit(**FAMILIES["vit"].inputs(2)).last_hidden_state
    assert_equal(actual, norm(x))


@torch.no_grad()
def test_cvpt_starts_from_all_blocks_and_drops_per_image():
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), CVPTConfig(num_virtual_tokens=20, dropout=0.5))
    bound = (6 / ((20 + DEPTH) * WIDTH)) ** 0.5
    for weights in weights_of(model, "cvpt_cross").values():
        assert 0.9 * bound < weights["prompts"].abs().max() <= bound
    equation = model.get_base_model().vit.layers[0].adapters.cvpt_cross["default"]
    given = []
    equation.train()(torch.zeros(2, 4, WIDTH), lambda x, others: given.append(others) or x)
    kept = given[0] != 0
    assert 0.3 < kept.float().mean() < 0.7
    assert not torch.equal(kept[0], kept[1])
    equation.eval()(torch.zeros(2, 4, WIDTH), lambda x, others: given.append(others) or x)
    assert torch.equal(given[1], equation.prompts[None])


@pytest.mark.parametrize("name", ["swinv2", "poolformer", "resnet", "levit", "cvt"])
def test_attention_that_is_no_plain_softmax_of_projections_is_refused(name):
    model = MODELS[name].model()
    before = {key: id(module) for key, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"CVPTConfig|cannot be that of tokens to others, by its projections alone"):
        get_peft_model(model, CVPTConfig())
    assert before == {key: id(module) for key, module in model.named_modules()}


# ---- VAPT --------------------------------------------------------------------------------------------------------


def made(weights, projector, patches, size):
    """Prompts of patches (batch, height x width, channels): convolved cell by cell, then mixed."""
    normed = F.layer_norm(patches, patches.shape[-1:], weights["norm.weight"], weights["norm.bias"])
    maps = normed.unflatten(1, size)
    kernel = weights["kernel"][0, 0]
    rows, columns = size[0] - len(kernel) + 1, size[1] - len(kernel) + 1
    cells = [
        sum(kernel[a, b] * maps[:, r + a, c + b] for a in range(len(kernel)) for b in range(len(kernel)))
        for r in range(rows)
        for c in range(columns)
    ]
    mixed = torch.einsum("pn,nbc->bpc", weights["mix.weight"], torch.stack(cells)) + weights["mix.bias"][:, None]
    return mixed + F.relu(mixed @ projector["down.weight"].T) @ projector["up.weight"].T


@both
@pytest.mark.parametrize("kernel_size", [1, 2, 3])
@torch.no_grad()
def test_vapt(name, kernel_size):
    config = VAPTConfig(num_virtual_tokens=COUNT, r=2, kernel_size=kernel_size, init_weights=False)
    (blocks, x, norm), model, actual, family = adapted(name, config)
    found, shared = weights_of(model, "vapt_tokens"), weights_of(model, "vapt_projector")
    assert len(shared) == 1
    (projector,) = shared.values()
    for index, block in enumerate(blocks):
        if index == 0:
            prompts = found[0]["prompts"].expand(2, -1, -1)
        else:
            prompts = made(found[index], projector, x[:, family.prefix :], (4, 4))
            assert not torch.allclose(prompts[0], prompts[1]), "of the image"
        x = torch.cat([x[:, : family.prefix], prompts, x[:, family.prefix :]], dim=1)
        x = x + block.attention(block.norm(1, x))
        x = x + block.mlp(block.norm(2, x))
        x = torch.cat([x[:, : family.prefix], x[:, family.prefix + COUNT :]], dim=1)
    assert_equal(actual, norm(x))


@pytest.mark.parametrize("name", ["swin", "timm_swin"])
@torch.no_grad()
def test_vapt_in_windows(name):
    """Module by module: the prompts of the one image are keys and values in all of its windows."""
    entry = MODELS[name]
    base = entry.model()
    torch.manual_seed(0)
    config = VAPTConfig(num_virtual_tokens=COUNT, r=2, kernel_size=1, grid_size=4, init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    inner, seen = model.get_base_model(), {}

    def keep(path):
        return lambda module, args, kwargs, *output: seen.__setitem__(path, (args, kwargs, *output))

    blocks = find_backbone(base).blocks
    for block in blocks:
        inner.get_submodule(block.path).register_forward_pre_hook(keep(block.path), with_kwargs=True)
        path = block.roles["value"][0].rpartition(".")[0]
        inner.get_submodule(path).register_forward_hook(keep(path), with_kwargs=True)
    tensors_of(entry.call(model, entry.arguments(1)))
    weights, adaptive = weights_by_path(model, "adapters.vapt_tokens"), 0
    for block in blocks:
        own = weights[block.path]
        if "prompts" in own:
            prompts = own["prompts"][None]
        else:
            adaptive += 1
            (projector,) = (
                w
                for slot in {n.partition(".default.")[0].rpartition(".")[2] for n, _ in model.named_parameters()}
                if slot.startswith("vapt_projector")
                for w in weights_by_path(model, f"adapters.{slot}").values()
                if w["down.weight"].shape[1] == block.width
            )
            x = seen[block.path][0][0]
            side = int(x[..., 0].numel() ** 0.5)
            patches = x.reshape(1, side * side, -1)
            normed = F.layer_norm(patches, patches.shape[-1:], own["norm.weight"], own["norm.bias"])
            maps = normed.mT.unflatten(2, (side, side))
            if side != 4:
                maps = F.interpolate(maps, (4, 4), mode="bilinear", align_corners=False)
            mixed = own["kernel"].squeeze() * maps.flatten(2) @ own["mix.weight"].T + own["mix.bias"]
            prompts = mixed.mT + F.relu(mixed.mT @ projector["down.weight"].T) @ projector["up.weight"].T
        path = block.roles["value"][0].rpartition(".")[0]
        attention = base.get_submodule(path)
        normed = base.get_submodule(block.roles["norm1"][0])(prompts)[0]
        if hasattr(attention, "qkv"):
            _, keys, values = attention.qkv(normed).chunk(3, dim=-1)
        else:
            keys, values = (base.get_submodule(block.roles[role][0])(normed) for role in ("key", "value"))
        args, kwargs, output = seen[path]
        output = output[0] if isinstance(output, tuple) else output
        expected = windows(attention, (*args, *kwargs.values()), keys, values)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    assert adaptive


@torch.no_grad()
def test_vapt_starts_with_prompts_of_zeros():
    torch.manual_seed(0)
    base = FAMILIES["vit"].model()
    before = output_of(base, images(2))
    model = get_peft_model(base, VAPTConfig(num_virtual_tokens=COUNT, layers_to_transform=[1, 2])).eval()
    seen = []
    equation = model.get_base_model().vit.layers[2].adapters.vapt_tokens["default"]
    equation.register_forward_hook(lambda module, args, output: seen.append(output))
    after = output_of(model, images(2))
    assert seen[0].shape == (2, COUNT, WIDTH)
    assert not seen[0].any()
    assert not torch.allclose(before, after), "attention sees them all the same"


@torch.no_grad()
def test_vapt_at_other_sizes(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), VAPTConfig(num_virtual_tokens=COUNT, init_weights=False)).eval()
    large = images(2, height=48, width=64)
    outputs = [model(**pixels, interpolate_pos_encoding=True).logits for pixels in (images(2), large)]
    assert all(output.isfinite().all() for output in outputs)
    equation = model.get_base_model().vit.layers[1].adapters.vapt_tokens["default"]
    assert isinstance(equation.mix, nn.Linear)
    assert equation.mix.in_features == 9
    assert model(**images(1, height=8, width=32), interpolate_pos_encoding=True).logits.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(FAMILIES["vit"].model(), tmp_path).eval()
    assert_equal(loaded(**large, interpolate_pos_encoding=True).logits, outputs[1])


def test_dropout_drops_channels_of_maps():
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), VAPTConfig(dropout=0.5))
    equation = model.get_base_model().vit.layers[1].adapters.vapt_tokens["default"].train()
    seen = []
    equation.mix.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(64, 17, WIDTH)
    equation(x, TokenLayout(1, Grid(4, 4)), nn.Identity())
    gone = (seen[0] == 0).all(dim=-1)
    assert 0.4 < gone.float().mean() < 0.6
    assert torch.equal(gone, (seen[0] == 0).any(dim=-1))


@pytest.mark.parametrize(
    ("config_cls", "fields", "message"),
    [
        (CVPTConfig, {"place": "inside"}, "place is 'inside': must be one of 'before', 'between', 'after'"),
        (CVPTConfig, {"num_virtual_tokens": 0}, "num_virtual_tokens is 0: must be an integer from 1"),
        (CVPTConfig, {"dropout": -0.1}, "dropout is -0.1: must be a finite number of at least 0"),
        (VAPTConfig, {"r": 0}, "r is 0: must be an integer of at least 1"),
        (VAPTConfig, {"kernel_size": 0}, "kernel_size is 0: must be an integer of at least 1"),
        (VAPTConfig, {"grid_size": 2.5}, "grid_size is 2.5: must be an integer from 1 to 128"),
        (VAPTConfig, {"dropout": 1}, "dropout is 1: must be"),
    ],
)
def test_bad_fields(config_cls, fields, message):
    with pytest.raises(ValueError, match=rf"{config_cls.__name__}\.{message}"):
        config_cls(**fields)


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (VAPTConfig(), "swin", "VAPTConfig.grid_size is None: must be given, because the config of SwinModel"),
        (VAPTConfig(kernel_size=5), "vit", r"VAPTConfig.kernel_size is 5: must be an integer from 1 to 4 \(rows or c"),
        (VAPTConfig(), "videomae", "VAPTConfig does not fit VideoMAEModel: a sequence of its tokens holds several fr"),
        (VAPTConfig(grid_size=4), "poolformer", "VAPTConfig"),
    ],
)
def test_models_that_do_not_fit_are_left_as_they_were(config, name, message):
    model = MODELS[name].model()
    before = {key: id(module) for key, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert before == {key: id(module) for key, module in model.named_modules()}
