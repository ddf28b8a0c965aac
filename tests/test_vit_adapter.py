"""ViT-Adapter: deformable attention, the way of the stream, and the pyramid."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from families import DEPTH, FAMILIES, WIDTH, images
from peft import PeftModel, get_peft_model
from plain import plain_parts
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import hf_visual_peft
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.methods.side.deformable import DeformableAttention, centres
from hf_visual_peft.methods.side.interaction import Interaction
from hf_visual_peft.methods.side.spatial_prior import group_norm
from hf_visual_peft.methods.side.vit_adapter import ViTAdapterConfig


CHANNELS = 6


def adapted(model, **fields):
    torch.manual_seed(2)
    fields = {"channels": CHANNELS, "init_weights": False, "num_points": 2} | fields
    return get_peft_model(model, ViTAdapterConfig(**fields)).eval()


def pieces_of(model):
    return [m for m in model.modules() if isinstance(m, Interaction)]


def tokens(maps):
    return maps.flatten(2).transpose(1, 2)


def bilinear(maps, x, y):
    """The value at a point of (channels, height, width), 0 to 1 from edge to edge, zero outside, of four cells."""
    height, width = maps.shape[1:]
    column, row = x * width - 0.5, y * height - 0.5
    value = torch.zeros(maps.shape[0])
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                value = value + maps[:, i, j] * (1 - abs(row - i)) * (1 - abs(column - j))
    return value


def sampled(attention, queries, places, maps):
    """Deformable attention in plain torch, one query, head and point after the other."""
    heads, levels, points = attention.num_heads, attention.levels, attention.points
    batch, count, _ = queries.shape
    out = []
    for b in range(batch):
        values = []
        for each in maps:
            projected = tokens(each[b : b + 1])[0] @ attention.to_value.weight.T + attention.to_value.bias
            values.append(projected.T.unflatten(1, each.shape[2:]))
        for q in range(count):
            query = queries[b, q]
            offsets = (attention.offsets.weight @ query + attention.offsets.bias).view(heads, levels, points, 2)
            logits = (attention.weights.weight @ query + attention.weights.bias).view(heads, levels * points)
            weights = logits.softmax(dim=-1).view(heads, levels, points)
            mixed = []
            for h in range(heads):
                total = 0
                for level, value in enumerate(values):
                    height, width = value.shape[1:]
                    own = value.chunk(heads)[h]
                    for k in range(points):
                        x = places[q, 0] + offsets[h, level, k, 0] / width
                        y = places[q, 1] + offsets[h, level, k, 1] / height
                        total = total + weights[h, level, k] * bilinear(own, x.item(), y.item())
                mixed.append(total)
            out.append(attention.from_value.weight @ torch.cat(mixed) + attention.from_value.bias)
    return torch.stack(out).unflatten(0, (batch, count))


@torch.no_grad()
def test_deformable_attention_looks_where_it_says():
    torch.manual_seed(0)
    attention = DeformableAttention(width=8, num_heads=2, levels=2, points=3, value_width=4)
    for parameter in attention.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    maps = [torch.randn(2, 8, 3, 5), torch.randn(2, 8, 2, 2)]
    sizes = [(3, 5), (2, 2)]
    queries, places = torch.randn(2, 12, 8), centres([(4, 3)], maps[0])
    first = torch.tensor([[1 / 6, 1 / 8], [1 / 2, 1 / 8], [5 / 6, 1 / 8], [1 / 6, 3 / 8]])  # x and y of a row, and on
    torch.testing.assert_close(places[:4], first)
    found = attention(queries, places, torch.cat([tokens(m) for m in maps], dim=1), sizes)
    torch.testing.assert_close(found, sampled(attention, queries, places, maps))


def test_points_start_on_rays():
    attention = DeformableAttention(width=8, num_heads=4, levels=2, points=3, value_width=8)
    start = attention.offsets.bias.view(4, 2, 3, 2)
    rays = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    for step in range(3):
        torch.testing.assert_close(start[:, :, step], (step + 1) * rays[:, None].expand(-1, 2, -1))
    for zero in (attention.offsets.weight, attention.weights.weight, attention.weights.bias):
        assert not zero.any()


def plain_prior(prior, pixels):
    """The convolutions' maps at 1/4 to 1/32."""
    stem = prior.stem
    x = pixels
    for (convolution, norm, _), stride in zip(stem[:3], (2, 1, 1), strict=True):
        x = F.relu(norm(F.conv2d(x, convolution.weight, stride=stride, padding=1)))
    x = F.max_pool2d(x, 3, 2, 1)
    found = [x]
    for convolution, norm, _ in prior.steps:
        x = F.relu(norm(F.conv2d(x, convolution.weight, stride=2, padding=1)))
        found.append(x)
    return found


def plain_extractor(extractor, c, sizes, x, grid):
    """With the deformable attention of the library, which a test of its own checks."""
    values = F.layer_norm(x, x.shape[-1:], extractor.value_norm.weight, extractor.value_norm.bias, 1e-6)
    query = F.layer_norm(c, c.shape[-1:], extractor.query_norm.weight, extractor.query_norm.bias, 1e-6)
    c = c + extractor.deformable(query, centres(sizes, c), values, [grid])
    ffn = extractor.ffn
    hidden = F.layer_norm(c, c.shape[-1:], extractor.ffn_norm.weight, extractor.ffn_norm.bias, 1e-6)
    parts = (hidden @ ffn.fc1.weight.T + ffn.fc1.bias).split([h * w for h, w in sizes], dim=1)
    mixed = []
    for part, (height, width) in zip(parts, sizes, strict=True):
        maps = part.transpose(1, 2).unflatten(2, (height, width))
        weight, bias = ffn.convolution.weight, ffn.convolution.bias
        mixed.append(tokens(F.conv2d(maps, weight, bias, padding=1, groups=weight.shape[0])))
    return c + F.gelu(torch.cat(mixed, dim=1)) @ ffn.fc2.weight.T + ffn.fc2.bias


@torch.no_grad()
@pytest.mark.parametrize("interactions", [1, 2, 3])
@pytest.mark.parametrize("name", ["vit", "dinov2_registers"])
def test_is_the_papers_network(name, interactions):
    family = FAMILIES[name]
    base = family.model()
    pixels = images(2, 64, 64)["pixel_values"]
    read = base.get_submodule("vit" if name == "vit" else "dinov2_with_registers")
    position = {"interpolate_pos_encoding": True} if name == "vit" else {}
    embeddings = read.embeddings(pixels, **position)
    blocks, _, norm = plain_parts(name, base, family.inputs(2)["pixel_values"])
    model = adapted(base, interactions=interactions, pyramid=True)
    maps = hf_visual_peft.feature_pyramid(model, pixel_values=pixels, **position)
    stream = read(pixels, **position).last_hidden_state

    pieces, grid, prefix = pieces_of(model), (8, 8), family.prefix
    sizes = [(16, 16), (8, 8), (4, 4), (2, 2)]
    prior = pieces[0].prior
    found = plain_prior(prior, pixels)
    c1 = prior.first_to_width(found[0])
    c = torch.cat(
        [tokens(to(m)) + level for m, to, level in zip(found[1:], prior.to_width, prior.levels, strict=True)], dim=1
    )
    groups = {1: [[0, 1, 2]], 2: [[0], [1, 2]], 3: [[0], [1], [2]]}[interactions]
    x, streams, number = embeddings, [], 0
    for group in groups:
        injector = pieces[number].injector
        patches = x[:, prefix:]
        query = F.layer_norm(patches, (WIDTH,), injector.query_norm.weight, injector.query_norm.bias, 1e-6)
        values = F.layer_norm(c, (WIDTH,), injector.value_norm.weight, injector.value_norm.bias, 1e-6)
        patches = patches + injector.gamma * injector.deformable(query, centres([grid], c), values, sizes[1:])
        x = torch.cat([x[:, :prefix], patches], dim=1)
        for index in group:
            x = x + blocks[index].attention(blocks[index].norm(1, x))
            x = x + blocks[index].mlp(blocks[index].norm(2, x))
        number += len(group) > 1
        for extractor in pieces[number].extractors:
            c = plain_extractor(extractor, c, sizes[1:], x[:, prefix:], grid)
        number += 1
        streams.append(x[:, prefix:].transpose(1, 2).unflatten(2, grid))
    assert number == len(pieces)
    assert len(pieces[-1].extractors) == 3
    torch.testing.assert_close(stream, norm(x), rtol=1e-4, atol=1e-4)

    c2, c3, c4 = (
        part.transpose(1, 2).unflatten(2, size)
        for part, size in zip(c.split([64, 16, 4], dim=1), sizes[1:], strict=True)
    )
    pyramid = pieces[-1].pyramid
    c1 = c1 + F.conv_transpose2d(c2, pyramid.up.weight, pyramid.up.bias, stride=2)
    which = {1: (0, 0, 0, 0), 2: (0, 0, 1, 1), 3: (0, 0, 1, 2)}[interactions]
    for level, own in enumerate((c1, c2, c3, c4)):
        resized = F.interpolate(streams[which[level]], size=sizes[level], mode="bilinear", align_corners=False)
        expected = pyramid.norms[level](own + resized)
        assert maps[level].shape == (2, WIDTH, *sizes[level])
        torch.testing.assert_close(maps[level], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_starts_as_the_backbone_and_leaves_prefix_tokens_alone():
    base = FAMILIES["dinov2_registers"].model()
    inputs = FAMILIES["dinov2_registers"].inputs(2)
    before = base(**inputs, output_hidden_states=True)
    model = get_peft_model(base, ViTAdapterConfig(channels=CHANNELS)).eval()
    assert torch.equal(model(**inputs).logits, before.logits)
    piece = pieces_of(model)[0]
    read = []
    handle = piece.injector.register_forward_hook(lambda module, args, output: read.append(output))
    piece.injector.gamma.fill_(1.0)
    after = model(**inputs).logits
    handle.remove()
    assert not read[0][:, :5].any()
    assert read[0][:, 5:].abs().amax(dim=-1).all()
    assert not torch.allclose(after, before.logits)


def test_counts():
    def count(**fields):
        with torch.device("meta"):
            model = get_peft_model(ViTForImageClassification(ViTConfig()), ViTAdapterConfig(**fields))
        return sum(p.numel() for name, p in model.named_parameters() if ".vitadapter_" in name), pieces_of(model)

    total, pieces = count()
    parts = (sum(p.numel() for p in m.parameters()) for m in (pieces[0].prior, pieces[0].injector))
    assert [*parts, sum(p.numel() for p in pieces[1].extractors.parameters())] == [1_531_712, 927_024, 1_004_112]
    assert total == 8_252_144 == 1_531_712 + 4 * 927_024 + 3 * 1_004_112
    assert len(pieces) == 7
    assert count(pyramid=True)[0] == 13_680_608
    assert count(train_backbone=True)[0] == 8_252_144 + 85_054_464
    assert count(pyramid=True, extra_extractors=0)[0] == 13_680_608 - 2 * 1_004_112


@pytest.mark.parametrize("name", ["vit", "beit", "dinov3", "vit_mae", "clip"])
def test_pyramid_of_any_size_trains(name, tmp_path):
    family = FAMILIES[name]
    model = adapted(family.model(), pyramid=True, modules_to_save=[]).train()
    inputs = family.inputs(2)
    maps = hf_visual_peft.feature_pyramid(model, **inputs)
    assert [m.shape for m in maps] == [(2, WIDTH, size, size) for size in (8, 4, 2, 1)]
    head = nn.ModuleList(nn.Conv2d(WIDTH, 2, 1) for _ in maps)
    loss = sum(convolution(m).square().mean() for convolution, m in zip(head, maps, strict=True))
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".vitadapter_" in parameter_name)
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, parameter_name
    model.eval()
    with torch.no_grad():
        expected = hf_visual_peft.feature_pyramid(model, **inputs)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(family.model(), tmp_path).eval()
        for mine, own in zip(hf_visual_peft.feature_pyramid(loaded, **inputs), expected, strict=True):
            assert torch.equal(mine, own)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vitdet", "sam", "timm_vit_registers", "timm_vit_gray", "dinov3_vit"])
def test_pyramid_on_other_plain_backbones(name):
    tiny = MODELS[name]
    if tiny.missing_package:
        pytest.skip(f"{tiny.missing_package} is not installed")
    model = adapted(tiny.model(), pyramid=True)
    arguments = tiny.arguments(2, None)
    pixels = arguments.get("pixel_values", next(iter(arguments.values())))
    if name.startswith("timm"):
        maps = hf_visual_peft.feature_pyramid(model, pixels)
    else:
        maps = hf_visual_peft.feature_pyramid(model, **arguments)
    height, width = pixels.shape[2:]
    for level, each in enumerate(maps, start=2):
        assert each.shape[2:] == (math.ceil(height / 2**level), math.ceil(width / 2**level))
        assert each.isfinite().all()


@torch.no_grad()
def test_odd_images():
    model = adapted(FAMILIES["dinov2"].model(), pyramid=True)
    maps = hf_visual_peft.feature_pyramid(model, **images(1, 40, 56))
    assert [tuple(m.shape[2:]) for m in maps] == [(10, 14), (5, 7), (3, 4), (2, 2)]


@torch.no_grad()
def test_who_may_ask_for_a_pyramid():
    family = FAMILIES["vit"]
    inputs = family.inputs(2)
    with pytest.raises(ValueError, match="but there are 0"):
        hf_visual_peft.feature_pyramid(family.model(), **inputs)
    with pytest.raises(ValueError, match="but there are 0"):
        hf_visual_peft.feature_pyramid(adapted(family.model()), **inputs)
    model = adapted(family.model(), pyramid=True, modules_to_save=[])
    before = model(**inputs).logits
    alone = hf_visual_peft.feature_pyramid(model, **inputs)
    assert torch.equal(model(**inputs).logits, before)
    with pytest.raises(ValueError, match="mixes adapters"):
        hf_visual_peft.feature_pyramid(model, **inputs, adapter_names=["default"] * 2)
    model.add_adapter("second", ViTAdapterConfig(channels=CHANNELS, pyramid=True, modules_to_save=[]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="but there are 2"):
        hf_visual_peft.feature_pyramid(model.eval(), **inputs)
    model.base_model.set_adapter("default")
    assert all(map(torch.equal, hf_visual_peft.feature_pyramid(model.eval(), **inputs), alone))
    with model.disable_adapter(), pytest.raises(ValueError, match="but there are 0"):
        hf_visual_peft.feature_pyramid(model, **inputs)


def test_backbone_is_frozen_and_its_stream_is_not():
    model = adapted(FAMILIES["vit"].model()).train()
    out = model(**FAMILIES["vit"].inputs(2), output_hidden_states=True)
    assert all(h.requires_grad for h in out.hidden_states[1:])
    out.logits.square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, _ in model.named_parameters() if ".vitadapter_" in n or ".modules_to_save.default." in n
    }


def test_trained_backbone(tmp_path):
    family = FAMILIES["dinov2_registers"]
    inputs = family.inputs(2)
    base = family.model()
    before = base(**inputs).logits
    fields = {"channels": CHANNELS, "train_backbone": True, "modules_to_save": []}
    model = get_peft_model(base, ViTAdapterConfig(**fields)).train()
    assert torch.equal(model(**inputs).logits, before)
    model(**inputs).logits.square().sum().backward()
    whole = (
        family.model().train()
    )  # as it starts, the adapter is the identity: gradients are those of full fine-tuning
    whole(**inputs).logits.square().sum().backward()
    blocks = model.get_base_model().dinov2_with_registers.encoder.layer
    for block, own in zip(blocks, whole.dinov2_with_registers.encoder.layer, strict=True):
        addends = block.adapters.vitadapter_block.default.addends
        parameters = dict(own.named_parameters())
        assert addends.keys() == {name.replace(".", "__") for name in parameters}
        for name, parameter in parameters.items():
            addend = addends[name.replace(".", "__")].values
            torch.testing.assert_close(addend.grad.view_as(parameter), parameter.grad)
    with torch.no_grad():
        for addend in (p for name, p in model.named_parameters() if ".vitadapter_block." in name):
            addend.copy_(torch.randn_like(addend) * 0.05)
    expected = model.eval()(**inputs).logits
    assert not torch.allclose(expected, before)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, before)
    names = ["__base__", "default"]
    mixed = model(**inputs, adapter_names=names).logits
    torch.testing.assert_close(mixed, torch.stack([before[0], expected[1]]))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family.model(), tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, expected)
    assert torch.equal(model.unload()(**inputs).logits, before)


def test_stochastic_depth_of_the_convffn():
    model = adapted(FAMILIES["vit"].model(), drop_path=0.5, interactions=3)
    inputs = FAMILIES["vit"].inputs(4)
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_chosen_blocks_are_grouped():
    model = adapted(FAMILIES["vit"].model(), layers_to_transform=[1, 2], interactions=1)
    (piece,) = pieces_of(model)
    assert piece.prior is not None
    assert not piece.extractors
    assert model.get_base_model().vit.layers[1].adapters.vitadapter_interaction.default is piece
    assert DEPTH == 3


def test_norms():
    assert group_norm(64).num_groups == 32
    assert group_norm(6).num_groups == 2
    assert not [b for b in get_peft_model(FAMILIES["vit"].model(), ViTAdapterConfig(pyramid=True)).buffers() if b.ndim]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("interactions", 0),
        ("num_heads", 0),
        ("num_points", 0),
        ("channels", 1.5),
        ("deform_ratio", 0),
        ("ffn_ratio", -1.0),
        ("extra_extractors", -1),
        ("drop_path", 1.0),
        ("pyramid", 1),
        ("train_backbone", None),
    ],
)
def test_bad_fields(field, value):
    with pytest.raises(ValueError, match=rf"ViTAdapterConfig.{field} is {value!r}: must be"):
        ViTAdapterConfig(**{field: value})


def test_heads_must_divide_the_values():
    with pytest.raises(ValueError, match=r"ViTAdapterConfig.num_heads is 3: must be a divisor of 8"):
        adapted(FAMILIES["vit"].model(), num_heads=3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin", "SwinModel: it is hierarchical and has its own pyramid of features"),
        ("pvt_v2", "it is hierarchical and has its own pyramid of features"),
        ("convnext", "it is hierarchical and has its own pyramid of features"),
        ("resnet", "convolutional network"),
        ("videomae", "it reads videos"),
        ("siglip2", "its input is not images"),
        ("perceiver", "the layout of its tokens in the image is not known"),
    ],
)
def test_refusals(name, reason):
    model = MODELS[name].model()
    before = {key: id(module) for key, module in model.named_modules()}
    with pytest.raises(ValueError, match=reason):
        get_peft_model(model, ViTAdapterConfig())
    assert before == {key: id(module) for key, module in model.named_modules()}


def test_places_are_precise_in_half_precision():
    """A cell of a map of 128 x 128 is 1/128 wide, and bfloat16 has steps of 1/256 above a half."""
    sizes = [(128, 128)]
    places = centres(sizes, torch.zeros(1, dtype=torch.bfloat16))
    torch.testing.assert_close(places, centres(sizes, torch.zeros(1)))
    torch.manual_seed(0)
    attention = DeformableAttention(8, 2, 1, 2, 8)
    with torch.no_grad():
        attention.weights.weight.normal_()
    queries, values = torch.randn(1, 128 * 128, 8), torch.randn(1, 128 * 128, 8)
    expected = attention(queries, places, values, sizes)
    half = attention.bfloat16()(queries.bfloat16(), places, values.bfloat16(), sizes)
    assert (half.float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(("channels", "groups"), [(6, 2), (8, 2), (32, 8), (48, 16), (64, 32), (768, 32)])
def test_norms_see_more_than_one_number_on_a_map_of_one_cell(channels, groups):
    assert group_norm(channels).num_groups == groups
