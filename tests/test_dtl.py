"""DTL and DTL+ against their equation in plain torch: outputs, gradients, stages, and what is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equations import adapted, assert_equal, both, weights_of
from families import DEPTH, FAMILIES, WIDTH, images
from peft import get_peft_model
from plain_swin import pieces_of, run_swin, swin_with, tiny_swin
from side_networks import kept, vit
from torch import nn

from hf_visual_peft import DTLConfig
from hf_visual_peft.methods.side.dtl import CompactPiece
from hf_visual_peft.sites import BlockAdapters, BlockView


def swish(h, beta):
    return h / (1 + torch.exp(-beta * h))


def convolved(h, kernel, prefix, side):
    maps = h[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    maps = F.conv2d(maps, kernel, padding=kernel.shape[-1] // 2, groups=len(kernel))
    return torch.cat([h[:, :prefix], maps.flatten(2).transpose(1, 2)], dim=1)


def plain_dtl(blocks, x, weights, beta, add_from, kernel=None, prefix=1):
    """Also what came to each block."""
    h = torch.zeros_like(x)
    came = []
    for index, block in enumerate(blocks):
        came.append(x)
        if index in weights:
            h = h + x @ weights[index]["down"].T @ weights[index]["up"].T
        x = x + block.attention(block.norm(1, x))
        x = x + block.mlp(block.norm(2, x))
        if index in weights and index >= add_from:
            added = swish(h, beta)
            x = x + (added if kernel is None else convolved(added, kernel, prefix, 4))
    return x, came


@both
@pytest.mark.parametrize(
    ("fields", "add_from", "size"),
    [
        ({}, 1, None),
        ({"beta": 3.0, "add_from": 0}, 0, None),
        ({"add_from": 2, "layers_to_transform": [0, 2]}, 2, None),
        ({"plus": True}, 1, 5),
        ({"plus": True, "kernel_size": 3, "add_from": 2}, 2, 3),
    ],
    ids=str,
)
@torch.no_grad()
def test_dtl(name, fields, add_from, size):
    config = DTLConfig(r=3, init_weights=False, **fields)
    (blocks, x, norm), model, actual, family = adapted(name, config)
    weights = weights_of(model, "dtl_piece")
    assert sorted(weights) == (config.layers or list(range(DEPTH)))
    convs = weights_of(model, "dtl_conv")
    assert len(convs) == (size is not None)  # one for all blocks
    kernel = next(iter(convs.values()))["weight"] if convs else None
    assert kernel is None or kernel.shape == (WIDTH, 1, size, size)
    expected, _ = plain_dtl(blocks, x, weights, config.beta, add_from, kernel, family.prefix)
    assert_equal(actual, norm(expected))


def test_gradients_are_those_of_the_equation():
    """x is not detached: behind the first addition gradients also go through A."""
    config = DTLConfig(r=3, beta=2.0, init_weights=False, add_from=0)
    (blocks, x, norm), model, _, family = adapted("vit", config)
    weights = weights_of(model, "dtl_piece")
    trained = [w for piece in weights.values() for w in piece.values()]
    expected, _ = plain_dtl(blocks, x.detach(), weights, 2.0, 0)
    actual = model.get_base_model().vit(**family.inputs(2)).last_hidden_state
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    grads = [torch.autograd.grad((out * direction).sum(), trained) for out in (actual, norm(expected))]
    for ours, theirs in zip(*grads, strict=True):
        assert ours.any()
        assert_equal(ours, theirs)


@pytest.mark.parametrize("plus", [False, True])
@torch.no_grad()
def test_stages_of_swin(plus):
    """In each stage h begins with zeros; the first has no addition, so nothing stands there."""
    base, model, pixels, actual = swin_with(
        DTLConfig(r=3, init_weights=False, plus=plus, **{"kernel_size": 3} if plus else {})
    )
    pieces = list(pieces_of(model, "dtl_piece"))
    assert [piece is None for piece in pieces] == [True, False, False, False]
    kernels = [w["weight"] for stage in (1, 2) for w in pieces_of(model, f"dtl_conv_stage{stage}") if w is not None]
    assert [len(kernel) for kernel in kernels] == ([16, 32] if plus else [])
    h = None

    def change(place, x, z, y):
        nonlocal h
        w = pieces[place.index]
        if w is None:
            return y
        h = x @ w["down"].T @ w["up"].T + (0 if place.first else h)
        if place.index < 2:
            return y
        added = swish(h, 100.0)
        return y + (convolved(added, kernels[place.stage - 1], 0, place.side) if plus else added)

    assert_equal(actual, run_swin(base, pixels, change))


def test_initialisation():
    torch.manual_seed(0)
    piece = CompactPiece(400, 2, 100.0, begins=True, adds=True)
    assert not piece.up.any()
    assert 0.045 < piece.down.abs().max() <= 1 / 400**0.5
    h, added = piece(None, BlockView(before=torch.randn(2, 5, 400)))
    assert not h.any()
    assert not added.any()


@pytest.mark.parametrize("add_from", [None, 0, 2])
def test_gradients_cross_only_blocks_behind_the_first_addition(add_from):
    model = get_peft_model(vit(), DTLConfig(add_from=add_from)).train()
    first = 1 if add_from is None else add_from
    recorded, trains, came = [], [], []
    for layer in model.modules():
        if isinstance(layer, BlockAdapters):
            linear = next(m for m in layer.get_base_layer().modules() if isinstance(m, nn.Linear))
            linear.register_forward_hook(lambda module, args, output: recorded.append(torch.is_grad_enabled()))
            trains.append(layer.get_base_layer().training)
            layer.get_base_layer().register_forward_pre_hook(lambda module, args: came.append(args[0].requires_grad))
    model(**images(2)).logits.sum().backward()
    expected = [index > first for index in range(3)]
    assert recorded == trains == came == expected
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)


def test_kept_of_the_early_blocks_is_what_comes_to_them():
    def sizes(config, **kwargs):
        return kept(get_peft_model(vit(**kwargs), config).train(), images(2))

    late = DTLConfig(add_from=2)  # nothing is crossed
    plain = sizes(late)
    assert sizes(late, intermediate_size=128) == plain
    stream = 2 * 17 * 16
    # what comes to three blocks, the activation's and the norm's input, and the pooled token
    assert [size for channels, size in plain if channels == 16] == [2 * 16] + [stream] * 5
    deeper = sizes(DTLConfig(add_from=5), num_hidden_layers=6)
    assert sum(size for _, size in deeper) - sum(size for _, size in plain) == 3 * (stream + 2 * 17 * 2)  # x and A x


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"DTLConfig\.r is 0: must be an integer of at least 1"),
        ({"beta": 0.0}, r"DTLConfig\.beta is 0.0: must be greater than 0"),
        ({"add_from": -1}, r"DTLConfig\.add_from is -1"),
        ({"plus": 1}, r"DTLConfig\.plus is 1: must be one of True, False"),
        ({"kernel_size": 4}, r"DTLConfig\.kernel_size is 4: must be odd"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        DTLConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 17}, r"DTLConfig\.r is 17: must be an integer from 1 to 16 \(the backbone's width\)"),
        ({"add_from": 3}, r"DTLConfig\.add_from is 3: must be an integer from 0 to 2 \(the last block\)"),
        ({"layers_to_transform": [0]}, r"layers_to_transform is \[0\]: must be None or have an index of at least 1"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(FAMILIES["vit"].model(), DTLConfig(**fields))


def test_count_on_swin():
    """r = 2: stages of 16 and 32 channels have two pieces and one, and a 5 x 5 convolution each."""
    model = get_peft_model(tiny_swin(), DTLConfig(plus=True, modules_to_save=[]))
    expected = 2 * (2 * 2 * 16) + 2 * 2 * 32 + 25 * (16 + 32)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
