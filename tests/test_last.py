"""LAST against its equation in plain torch: outputs, stages, and what is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equations import adapted, assert_equal, both, weights_of
from families import DEPTH, FAMILIES, WIDTH, images
from peft import get_peft_model
from plain_swin import pieces_of, pooled, run_swin, swin_with
from side_networks import kept, vit

from hf_visual_peft import LASTConfig
from hf_visual_peft.sites import BlockAdapters


def lsa(u, w):
    """Low-rank self-attention of the normed u."""
    w = {name.removeprefix("attention."): weight for name, weight in w.items()}
    down = F.layer_norm(u, u.shape[-1:], w["norm.weight"], w["norm.bias"]) @ w["down.weight"].T + w["down.bias"]
    q, k, v = (
        down @ weight.T + bias for weight, bias in zip(w["qkv.weight"].chunk(3), w["qkv.bias"].chunk(3), strict=True)
    )
    scores = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1)
    return scores @ v @ w["up.weight"].T + w["up.bias"]


@both
@pytest.mark.parametrize("r", [4, 7])
@torch.no_grad()
def test_last(name, r):
    """With the u of the paper, and its bias correction at the end."""
    (blocks, z, norm), model, actual, _ = adapted(name, LASTConfig(r=r, init_weights=False))
    weights = weights_of(model, "last_piece")
    assert len(weights) == DEPTH
    u, correction = z, torch.zeros_like(z)
    for index, block in enumerate(blocks):
        correction = correction + z
        z = z + block.attention(block.norm(1, z))
        z = z + block.mlp(block.norm(2, z))
        u = u + lsa(u, weights[index]) + z
    assert_equal(actual, norm(u - correction))


@torch.no_grad()
def test_blocks_without_a_piece_are_not_read():
    """What the network adds comes to the backbone's end, whichever blocks it reads."""
    config = LASTConfig(r=4, init_weights=False, layers_to_transform=[0, 1])
    (blocks, z, norm), model, actual, _ = adapted("vit", config)
    weights = weights_of(model, "last_piece")
    assert sorted(weights) == [0, 1]
    read, added = torch.zeros_like(z), torch.zeros_like(z)
    for index, block in enumerate(blocks):
        if index in weights:
            read = read + z
            added = added + lsa(read + added, weights[index])
        z = z + block.attention(block.norm(1, z))
        z = z + block.mlp(block.norm(2, z))
    assert_equal(actual, norm(z + added))


@torch.no_grad()
def test_stages_of_swin():
    base, model, pixels, actual = swin_with(LASTConfig(r=4, init_weights=False))
    pieces = list(pieces_of(model, "last_piece"))
    widths = [8, 16, 16, 32]
    assert ["enter.weight" in piece for piece in pieces] == [False, True, False, True]
    added = read = None

    def change(place, x, z, y):
        nonlocal added, read
        w = pieces[place.index]
        assert x.shape[-1] == widths[place.index]
        read = x if place.first else read + x
        if added is None:
            added = torch.zeros_like(x)
        elif place.first:
            added = pooled(added, 2 * place.side) @ w["enter.weight"].T
        added = added + lsa(added + read, w)
        return y + added if place.index == 3 else y

    assert_equal(actual, run_swin(base, pixels, change))


def test_initialisation():
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), LASTConfig(r=4))
    weights = weights_of(model, "last_piece")
    for w in weights.values():
        assert not w["attention.up.weight"].any()
        assert not w["attention.up.bias"].any()
        assert w["attention.down.weight"].shape == (4, WIDTH)
        assert w["attention.qkv.weight"].shape == (12, 4)
        assert w["attention.down.weight"].abs().max() <= WIDTH**-0.5


def test_count_by_hand():
    """ViT-B: LayerNorm 2 d, down d r + r, qkv 3 r^2 + 3 r, up r d + d, in twelve blocks."""
    d, r = 768, 32
    assert 12 * (2 * d + d * r + r + 3 * r * r + 3 * r + r * d + d) == 655_872


def test_no_activation_of_the_backbone_is_kept():
    def sizes(**kwargs):
        return kept(get_peft_model(vit(**kwargs), LASTConfig(r=4)).train(), images(2))

    plain = sizes()
    assert sizes(intermediate_size=128) == sizes(num_attention_heads=4) == plain
    stream = 2 * 17 * 16
    # input and output of the norm in three pieces, the input of the last norm, and the pooled token
    assert [size for channels, size in plain if channels == 16] == [2 * 16] + [stream] * 7
    assert max(size for channels, size in plain if channels == 17) == 2 * 17  # sums of rows, no attention weights


def test_no_gradient_crosses_the_blocks():
    model = get_peft_model(vit(), LASTConfig(r=4, init_weights=False)).train()
    came = []
    for layer in model.modules():
        if isinstance(layer, BlockAdapters):
            layer.get_base_layer().register_forward_hook(
                lambda module, args, output: came.append(args[0].requires_grad)
            )
            assert not layer.get_base_layer().training
    model(**images(2)).logits.sum().backward()
    assert came == [False] * 3
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.any() for p in trained)


def test_bad_fields():
    with pytest.raises(ValueError, match=r"LASTConfig\.r is 0: must be an integer of at least 1"):
        LASTConfig(r=0)
    with pytest.raises(
        ValueError, match=r"LASTConfig\.r is 17: must be an integer from 1 to 16 \(the backbone's width"
    ):
        get_peft_model(FAMILIES["vit"].model(), LASTConfig(r=17))
