"""eTT's pieces against their equations in plain torch: keys and values, offsets, the map, and the prototypes."""

from __future__ import annotations

import copy

import pytest
import torch
from equations import adapted, assert_equal, both, weights_of
from families import DEPTH, FAMILIES, WIDTH
from peft import PeftModel, get_peft_model
from plain import plain_parts
from test_prefix import windows, with_prefixes
from torch import nn

from hf_visual_peft import ETTConfig, NotCalibratedError, calibrate, find_backbone, store_prefixes
from hf_visual_peft.coverage.cell import tensors_of
from hf_visual_peft.coverage.models import MODELS


FIELDS = {"num_virtual_tokens": 3, "reparam_dim": 5}
LABELS = torch.tensor([0, 2, 1, 2])


def produced(w, index, depth=DEPTH):
    """Keys and values of a block, (classes, channels) each, from the network's weights."""
    hidden = torch.tanh(w["embedding"] @ w["down.weight"].T + w["down.bias"])
    made = (hidden @ w["up.weight"].T + w["up.bias"]).view(len(hidden), depth, 2, -1)
    return made[:, index, 0], made[:, index, 1]


@both
@torch.no_grad()
def test_equation(name):
    (blocks, x, norm), model, actual, _ = adapted(name, ETTConfig(**FIELDS, init_weights=False))
    (network,) = weights_of(model, "ett_network").values()
    after = {sublayer: weights_of(model, f"ett_{sublayer}") for sublayer in ("attention", "mlp")}
    (mapped,) = weights_of(model, "ett_map").values()
    assert len(after["attention"]) == len(after["mlp"]) == DEPTH
    for index, block in enumerate(blocks):
        x = x + with_prefixes(block, block.norm(1, x), *produced(network, index)) + after["attention"][index]["offset"]
        x = x + block.mlp(block.norm(2, x)) + after["mlp"][index]["offset"]
    assert_equal(actual, norm(x) @ mapped["weight"].T)


@torch.no_grad()
def test_equation_in_windows():
    """Module by module; each stage has a network, and every window has the keys and values of its block."""
    base = MODELS["swin"].model()
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), ETTConfig(**FIELDS, init_weights=False)).eval()
    store_prefixes(model)
    seen, expected = {}, {}

    def keep(path):
        return lambda module, args, kwargs, output: seen.__setitem__(path, (args, kwargs, output))

    for block in find_backbone(base).blocks:
        heads = model.get_submodule(f"base_model.model.{block.path}").adapters.ett_heads["default"]
        path = block.roles["value"][0].rpartition(".")[0]
        model.get_submodule(f"base_model.model.{path}").register_forward_hook(keep(path), with_kwargs=True)
        expected[path] = heads.keys, heads.values
    tensors_of(MODELS["swin"].call(model, MODELS["swin"].arguments(2)))
    for path, pair in expected.items():
        args, kwargs, output = seen[path]
        found = windows(base.get_submodule(path), (*args, *kwargs.values()), *pair)
        torch.testing.assert_close(output[0] if isinstance(output, tuple) else output, found, rtol=0, atol=1e-5)
    assert len(expected) > 2


def chosen(name, batches=((0, 4),), attention="sdpa", **fields):
    """The model with prototypes of the labels, its images, its base model, and the family."""
    family = FAMILIES[name]
    base = family.model()
    base.set_attn_implementation(attention)
    model = get_peft_model(copy.deepcopy(base), ETTConfig(**(FIELDS | fields)))
    inputs = family.inputs(4)
    data = [{key: x[a:b] for key, x in inputs.items()} | {"labels": LABELS[a:b]} for a, b in batches]
    calibrate(model, data, progress=False)
    return model, inputs, base, family


@both
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_prototypes(name, attention):
    """Patches as they enter the first block, weighted by the last block's attention of CLS to patches alone."""
    model, inputs, base, family = chosen(name, ((0, 3), (3, 4)), attention=attention)
    blocks, x, _ = plain_parts(name, base, inputs["pixel_values"])
    patches = x[:, family.prefix :]
    for block in blocks[:-1]:
        x = x + block.attention(block.norm(1, x))
        x = x + block.mlp(block.norm(2, x))
    n = blocks[-1].norm(1, x)
    q, k = ((n @ w.T + b).unflatten(-1, (blocks[-1].heads, -1)).transpose(1, 2) for w, b in blocks[-1].qkv[:2])
    logits = (q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5)[:, :, 0, family.prefix :]
    pooled = (torch.softmax(logits, dim=-1).unsqueeze(-1) * patches.unsqueeze(1)).sum(2).mean(1)
    expected = torch.stack([pooled[0], pooled[2], pooled[[1, 3]].mean(0)])
    (network,) = weights_of(model, "ett_network").values()
    torch.testing.assert_close(network["embedding"].data, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_prototypes_without_cls_are_means_of_patches_of_each_stage():
    tiny = MODELS["swin"]
    base = tiny.model()
    model = get_peft_model(copy.deepcopy(base), ETTConfig(**FIELDS))
    inputs = tiny.arguments(4)
    seen = {}
    backbone = find_backbone(base)
    firsts = {block.width: block.path for block in reversed(backbone.blocks)}
    for width, path in firsts.items():
        base.get_submodule(path).register_forward_pre_hook(lambda _, args, width=width: seen.update({width: args[0]}))
    base(**inputs)
    calibrate(model, [inputs | {"labels": LABELS}], progress=False)
    for stage, width in enumerate(sorted(firsts)):
        means = seen[width].mean(dim=1)
        expected = torch.stack([means[0], means[2], means[[1, 3]].mean(0)])
        (network,) = weights_of(model, f"ett_network_stage{stage}").values()
        torch.testing.assert_close(network["embedding"].data, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_does_not_count():
    tiny = MODELS["siglip2"]
    inputs = tiny.arguments(4)
    base = tiny.model()
    changed = {key: value.clone() for key, value in inputs.items()}
    mask = changed["pixel_attention_mask"]
    assert (mask == 0).any()
    changed["pixel_values"][mask == 0] = 7.0
    found = []
    for each in (inputs, changed):
        model = get_peft_model(copy.deepcopy(base), ETTConfig(**FIELDS))
        calibrate(model, [each | {"labels": LABELS}], progress=False)
        (network,) = weights_of(model, "ett_network").values()
        found.append(network["embedding"].data)
    torch.testing.assert_close(*found)


def test_stored_and_loaded(tmp_path):
    """After training the MLP goes; outputs stay, and both files give them."""
    model, inputs, base, _ = chosen("vit", num_virtual_tokens=None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**inputs, labels=LABELS).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "ett_" in name)
    optimizer.step()
    model.eval()
    before = model(**inputs).logits
    model.save_pretrained(tmp_path / "trained")
    store_prefixes(model)
    torch.testing.assert_close(model(**inputs).logits, before)
    assert not weights_of(model, "ett_network")
    assert all(p.shape == (3, WIDTH) for pair in weights_of(model, "ett_heads").values() for p in pair.values())
    model.save_pretrained(tmp_path / "stored")
    for folder in ("trained", "stored"):
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder).eval()
        torch.testing.assert_close(again(**inputs).logits, before)


def test_what_does_not_fit_is_named():
    family = FAMILIES["vit"]
    inputs = family.inputs(4)
    model = get_peft_model(family.model(), ETTConfig(**FIELDS))
    with pytest.raises(NotCalibratedError, match="eTT has not yet chosen"):
        model(**inputs)
    for labels, message in (
        (torch.tensor([0, 1, 1, 0]), r"no image of class 2; ETTConfig makes .* each of its 3 classes"),
        (torch.tensor([0, 1, 2, 3]), "labels must be from 0 to 2"),
        (
            torch.eye(4),
            r"ETTConfig compares classes: labels must be one class per image, \(batch,\), got shape \(4, 4\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(model, [inputs | {"labels": labels}], progress=False)
    with pytest.raises(NotCalibratedError):  # nothing was set
        model(**inputs)
    bare = family.model().vit
    with pytest.raises(ValueError, match="num_virtual_tokens is None: must be a number of classes: the head of"):
        get_peft_model(bare, ETTConfig())
    random = get_peft_model(family.model(), ETTConfig(**FIELDS, init="random"))
    with pytest.raises(ValueError, match="chooses nothing from data"):
        calibrate(random, [inputs | {"labels": LABELS}], progress=False)
    random(**inputs)
    some = get_peft_model(family.model(), ETTConfig(**FIELDS, init="random", layers_to_transform=[1]))
    assert not weights_of(some, "ett_map")
    assert isinstance(weights_of(some, "ett_attention")[1]["offset"], nn.Parameter)
    assert weights_of(random, "ett_network")[0]["embedding"].shape == (3, WIDTH)
