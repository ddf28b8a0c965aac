"""Side-tuning against its equation in plain torch, on images of any size, and what it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equations import adapted, assert_equal, both, weights_of
from families import FAMILIES, PATCH, images
from peft import get_peft_model
from plain_swin import pieces_of, run_swin, swin_with
from side_networks import kept, vit
from transformers import ViTConfig, ViTForImageClassification

from hf_visual_peft import SideTuningConfig
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.methods.side.side_tuning import SideTuning
from hf_visual_peft.sites import BlockView, Grid, TokenLayout


def side(pixels, w, depth, rows, columns, prefix):
    """S by the docstring: convolutions by unfolding, norms and averages over cells by hand."""
    x = pixels
    for index in range(depth):
        kernel = w[f"features.{3 * index}.weight"]
        height, width = (-(-size // 2) for size in x.shape[2:])
        patches = F.unfold(x, 3, stride=2, padding=1)
        x = (kernel.flatten(1) @ patches).unflatten(2, (height, width))
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        var = x.var(dim=(1, 2, 3), keepdim=True, unbiased=False)
        x = (x - mean) / torch.sqrt(var + 1e-5)
        scale, shift = (w[f"features.{3 * index + 1}.{name}"][:, None, None] for name in ("weight", "bias"))
        x = torch.clamp(x * scale + shift, min=0)
    height, width = x.shape[2:]
    cells = []
    for i in range(rows):
        for j in range(columns):
            part = x[:, :, i * height // rows : -(-(i + 1) * height // rows)]
            cells.append(part[..., j * width // columns : -(-(j + 1) * width // columns)].mean(dim=(2, 3)))
    tokens = torch.stack(cells, dim=1) @ w["proj.weight"].flatten(1).T
    return torch.cat([tokens.mean(dim=1, keepdim=True)] * prefix + [tokens], dim=1)


def blend(b, s, w):
    a = 1 / (1 + torch.exp(-w["alpha"])) if "alpha" in w else 0.5
    return a * b + (1 - a) * s


@both
@pytest.mark.parametrize(
    ("fields", "depth"),
    [({}, 4), ({"depth": 2, "channels": 5}, 2), ({"merge": "half", "depth": 1}, 1), ({"layers_to_transform": 1}, 4)],
    ids=str,
)
@torch.no_grad()
def test_side_tuning(name, fields, depth):
    config = SideTuningConfig(init_weights=False, **fields)
    (blocks, x, norm), model, actual, family = adapted(name, config)
    ((place, w),) = weights_of(model, "sidetuning_side").items()
    assert place == fields.get("layers_to_transform", 2)
    assert ("alpha" in w) == ("merge" not in fields)
    for block in blocks[: place + 1]:
        x = x + block.attention(block.norm(1, x))
        x = x + block.mlp(block.norm(2, x))
    s = side(family.inputs(2)["pixel_values"], w, depth, 4, 4, family.prefix)
    assert_equal(actual, norm(blend(x, s, w)))


@torch.no_grad()
def test_half_of_each_at_the_start():
    (blocks, x, norm), model, actual, family = adapted("vit", SideTuningConfig(channels=6))
    (w,) = weights_of(model, "sidetuning_side").values()
    for block in blocks:
        x = x + block.attention(block.norm(1, x))
        x = x + block.mlp(block.norm(2, x))
    s = side(family.inputs(2)["pixel_values"], w, 4, 4, 4, 1)
    assert_equal(actual, norm((x + s) / 2))


@torch.no_grad()
def test_last_stage_of_swin():
    base, model, pixels, actual = swin_with(SideTuningConfig(channels=6, depth=3, init_weights=False))
    *others, w = pieces_of(model, "sidetuning_side")
    assert others == [None] * 3

    def change(place, x, z, y):
        if place.index < 3:
            return y
        return blend(y, side(pixels, w, 3, place.side, place.side, 0), w)

    assert_equal(actual, run_swin(base, pixels, change))


@torch.no_grad()
def test_images_of_another_size_and_shape():
    torch.manual_seed(3)
    model = get_peft_model(FAMILIES["vit"].model(), SideTuningConfig(channels=6, init_weights=False)).eval()
    (w,) = weights_of(model, "sidetuning_side").values()
    base = FAMILIES["vit"].model().vit
    pixels = images(2, 5 * PATCH, 7 * PATCH)["pixel_values"]
    stream = []
    base.layers[-1].register_forward_hook(lambda module, args, output: stream.append(output))
    base(pixels, interpolate_pos_encoding=True)
    actual = model.get_base_model().vit(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert_equal(actual, base.layernorm(blend(stream[0], side(pixels, w, 4, 5, 7, 1), w)))


@torch.no_grad()
def test_videos_and_images_in_several_sequences():
    """The network sees the mean of the frames that make one grid; sequences of one image are all given the same."""
    piece = SideTuning(3, 4, 2, 6, learned=True)
    video = torch.randn(2, 3, 4, 8, 8)
    tokens = torch.randn(2, 1 + 2 * 4, 6)
    view = BlockView(after=tokens, layout=TokenLayout(1, Grid(2, 2, times=2)), pixels=video)
    w = dict(piece.named_parameters())
    halves = [side(video[:, :, i : i + 2].mean(dim=2), w, 2, 2, 2, 0) for i in (0, 2)]
    expected = torch.cat(halves, dim=1)
    assert_equal(piece.side(view), torch.cat([expected.mean(dim=1, keepdim=True), expected], dim=1))

    pixels = torch.randn(2, 3, 8, 8)
    view = BlockView(after=torch.randn(6, 4, 6), layout=TokenLayout(0, Grid(2, 2)), pixels=pixels)
    assert_equal(piece.side(view), side(pixels, w, 2, 2, 2, 0).repeat_interleave(3, dim=0))


def test_kept_activations_do_not_depend_on_the_backbone():
    width, config = 24, SideTuningConfig(channels=6)
    few = kept(get_peft_model(vit(hidden_size=width), config).train(), images(2))
    other = vit(hidden_size=width, intermediate_size=128, num_attention_heads=4, num_hidden_layers=5)
    assert kept(get_peft_model(other, config).train(), images(2)) == few
    # of the backbone's width: B(x) and S(x), for the gradient of a; what the frozen norm behind the blocks reads; and
    # the pooled token, which the head reads
    stream = 2 * 17 * width
    assert [size for channels, size in few if channels == width] == [2 * width] + [stream] * 3


def test_the_same_output_twice_in_training():
    model = vit(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model = get_peft_model(model, SideTuningConfig(channels=6)).train()
    assert torch.equal(model(**images(2)).logits, model(**images(2)).logits)
    # nothing in it remembers a batch
    assert not any(".sidetuning_" in name for name, _ in model.named_buffers())


@pytest.mark.parametrize(("channels", "depth", "merge"), [(64, 4, "alpha"), (10, 1, "half"), (32, 5, "alpha")])
def test_count(channels, depth, merge):
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_hidden_layers=1, num_channels=4))
    model = get_peft_model(base, SideTuningConfig(channels=channels, depth=depth, merge=merge, modules_to_save=[]))
    expected = 9 * 4 * channels + 9 * (depth - 1) * channels**2 + 2 * depth * channels + channels * 768
    assert model.get_nb_trainable_parameters()[0] == expected + (merge == "alpha")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 0}, "SideTuningConfig.channels is 0: must be an integer from 1 to"),
        ({"depth": 2.0}, r"SideTuningConfig.depth is 2.0: must be an integer from 1 to"),
        ({"merge": "concat"}, "SideTuningConfig.merge is 'concat': must be one of 'alpha', 'half'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        SideTuningConfig(**fields)


@pytest.mark.parametrize("name", ["siglip2", "imagegpt"])
def test_backbones_without_images(name):
    with pytest.raises(ValueError, match="SideTuningConfig does not fit .*: its input is not images"):
        get_peft_model(MODELS[name].model(), SideTuningConfig())
