"""E3VA against its equation in plain torch: outputs, stages, and what is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equations import adapted, assert_equal, both, weights_of
from families import DEPTH, FAMILIES, WIDTH, images
from peft import get_peft_model
from plain_swin import pieces_of, pooled, run_swin, swin_with
from side_networks import kept, vit

from hf_visual_peft import E3VAConfig
from hf_visual_peft.sites import BlockAdapters


def adapter(x, w, which):
    def weight(part):
        return w[f"{which}.{part}.1.weight"] @ w[f"{which}.{part}.0.weight"]

    hidden = F.gelu(x @ weight("down").T + w[f"{which}.down.1.bias"])
    return hidden @ weight("up").T + w[f"{which}.up.1.bias"]


@both
@pytest.mark.parametrize(("r", "rank", "layers"), [(8, 3, None), (5, 2, [0, 1])], ids=str)
@torch.no_grad()
def test_e3va(name, r, rank, layers):
    config = E3VAConfig(r=r, rank=rank, init_weights=False, layers_to_transform=layers)
    (blocks, x, norm), model, actual, _ = adapted(name, config)
    weights = weights_of(model, "e3va_piece")
    assert sorted(weights) == (layers or list(range(DEPTH)))
    h = torch.zeros_like(x)
    for index, block in enumerate(blocks):
        z = x + block.attention(block.norm(1, x))
        x = z + block.mlp(block.norm(2, z))
        if index in weights:
            w = weights[index]
            assert w["mlp.down.0.weight"].shape == (rank, WIDTH)
            assert w["mlp.down.1.weight"].shape == (r, rank)
            h = h + adapter(z, w, "attention") + adapter(x, w, "mlp")
    assert_equal(actual, norm(x + h))


@torch.no_grad()
def test_stages_of_swin():
    base, model, pixels, actual = swin_with(E3VAConfig(r=6, rank=3, init_weights=False))
    pieces = list(pieces_of(model, "e3va_piece"))
    assert ["enter.weight" in piece for piece in pieces] == [False, True, False, True]
    h = None

    def change(place, x, z, y):
        nonlocal h
        w = pieces[place.index]
        if h is None:
            h = torch.zeros_like(y)
        elif place.first:
            h = pooled(h, 2 * place.side) @ w["enter.weight"].T
        h = h + adapter(z, w, "attention") + adapter(y, w, "mlp")
        return y + h if place.index == 3 else y

    assert_equal(actual, run_swin(base, pixels, change))


@torch.no_grad()
def test_several_adapters_add_up():
    """To what the backbone's last block returns, which is there once."""
    model = get_peft_model(vit(), E3VAConfig(r=4, rank=2, init_weights=False, modules_to_save=[]))
    model.add_adapter("second", E3VAConfig(r=6, rank=3, init_weights=False, modules_to_save=[]))

    def last():
        return model.eval()(**images(2), output_hidden_states=True).hidden_states[-1]

    with model.disable_adapter():
        plain = last()
    changes = []
    for names in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        changes.append(last() - plain)
    assert changes[0].abs().max() > 0.1
    torch.testing.assert_close(changes[2], changes[0] + changes[1])


def test_initialisation():
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), E3VAConfig(r=8, rank=4))
    for w in weights_of(model, "e3va_piece").values():
        for which in ("attention", "mlp"):
            assert not w[f"{which}.up.1.weight"].any()
            assert not w[f"{which}.up.1.bias"].any()
            assert all(w[f"{which}.{name}.weight"].any() for name in ("down.0", "down.1", "up.0"))


def test_count_by_hand():
    """ViT-B: down d k + k r + r, up r k + k d + d, twice in twelve blocks."""
    d, r, k = 768, 64, 8
    assert 24 * (d * k + k * r + r + r * k + k * d + d) == 339_456


def test_no_activation_of_the_backbone_is_kept():
    def sizes(**kwargs):
        return kept(get_peft_model(vit(**kwargs), E3VAConfig(r=6, rank=3)).train(), images(2))

    plain = sizes()
    assert sizes(intermediate_size=128) == sizes(num_attention_heads=4) == plain
    stream = 2 * 17 * 16
    # the two streams that adapters read in three blocks, the input of the last norm, and the pooled token
    assert [size for channels, size in plain if channels == 16] == [2 * 16] + [stream] * 7


def test_no_gradient_crosses_the_blocks():
    model = get_peft_model(vit(), E3VAConfig(r=6, rank=3, init_weights=False)).train()
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


@pytest.mark.parametrize("name", ["r", "rank"])
def test_bad_fields(name):
    with pytest.raises(ValueError, match=rf"E3VAConfig\.{name} is 0: must be an integer of at least 1"):
        E3VAConfig(**{name: 0})
    with pytest.raises(
        ValueError, match=rf"E3VAConfig\.{name} is 17: must be an integer from 1 to 16 \(the backbone's"
    ):
        get_peft_model(FAMILIES["vit"].model(), E3VAConfig(**{"r": 4, "rank": 2, name: 17}))
