"""Ladder side-tuning against its equation in plain torch, and side blocks that start as parts of the backbone's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equations import adapted, assert_equal, both, weights_of
from families import DEPTH, FAMILIES, WIDTH, images
from peft import PeftModel, get_peft_model
from plain_swin import pieces_of, pooled, run_swin, swin_with, tiny_swin
from side_networks import kept, vit
from transformers import Dinov2Config, Dinov2Model, Swinv2Config, Swinv2Model, ViTConfig, ViTForImageClassification

from hf_visual_peft import LSTConfig, NotCalibratedError, calibrate, find_backbone, get_method
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.methods.side.lst import Piece, SideBlock
from hf_visual_peft.methods.side.pruning import parts_of
from hf_visual_peft.sites import BlockView


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x, w, name):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(var + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def side_block(s, w, heads):
    width = s.shape[-1]
    projected = linear(norm(s, w, "block.norm1"), w, "block.qkv")
    mixed = []
    for head in range(heads):
        channels = slice(head * width // heads, (head + 1) * width // heads)
        query, key, value = (part[..., channels] for part in projected.split(width, dim=-1))
        logits = query @ key.transpose(1, 2) / (width // heads) ** 0.5
        mixed.append(torch.softmax(logits, dim=-1) @ value)
    s = s + linear(torch.cat(mixed, dim=-1), w, "block.proj")
    return s + linear(F.gelu(linear(norm(s, w, "block.norm2"), w, "block.fc1")), w, "block.fc2")


def rung(s, b, w, heads, temperature):
    down = linear(b, w, "down")
    if "gate" in w:
        gate = 1 / (1 + torch.exp(-w["gate"] / temperature))
        s = gate * s + (1 - gate) * down
    else:
        s = s + down
    return side_block(s, w, heads)


@both
@pytest.mark.parametrize(
    ("fields", "heads", "temperature"),
    [
        ({}, 1, 0.1),
        ({"num_heads": 2, "mlp_ratio": 1.5, "temperature": 0.5}, 2, 0.5),
        ({"gate": False}, 1, None),
        ({"layers_to_transform": [0, 1]}, 1, 0.1),
        ({"layers_to_transform": [1, 2], "num_heads": 4}, 4, 0.1),
    ],
    ids=str,
)
@torch.no_grad()
def test_lst(name, fields, heads, temperature):
    config = LSTConfig(r=2, init_weights=False, **fields)
    (blocks, x, last_norm), model, actual, _ = adapted(name, config)
    weights = weights_of(model, "lst_rung")
    assert sorted(weights) == fields.get("layers_to_transform", [0, 1, 2])
    hidden = int(fields.get("mlp_ratio", 4) * WIDTH / 2)
    assert {w["block.fc1.weight"].shape for w in weights.values()} == {(hidden, WIDTH // 2)}
    s = None
    for index, block in enumerate(blocks):
        before = x
        x = x + block.attention(block.norm(1, x))
        x = x + block.mlp(block.norm(2, x))
        if index in weights:
            s = linear(before, weights[index], "enter") if s is None else s
            s = rung(s, x, weights[index], heads, temperature)
    end = weights[max(weights)]
    assert_equal(actual, last_norm(linear(norm(s, end, "norm"), end, "up")))


@torch.no_grad()
def test_stages_of_swin():
    base, model, pixels, actual = swin_with(LSTConfig(r=2, init_weights=False))
    pieces = list(pieces_of(model, "lst_rung"))
    assert [len(w["down.bias"]) for w in pieces] == [4, 8, 8, 16]
    state, before = None, 0

    def change(place, x, z, y):
        nonlocal state, before
        w = pieces[place.index]
        if state is None:
            state = linear(x, w, "enter")
        elif place.first:
            state = linear(pooled(state, before), w, "enter")
        state = rung(state, y, w, 1, 0.1)
        before = place.side
        return linear(norm(state, w, "norm"), w, "up") if place.index == len(pieces) - 1 else y

    assert_equal(actual, run_swin(base, pixels, change))


def test_equation_works_without_peft():
    piece = Piece(12, SideBlock(6, 2, 9), 6, 0.1, enters_from=12, ends=True)
    from hf_visual_peft.sites import BlockView

    state, added = piece(None, BlockView(before=torch.randn(2, 5, 12), after=torch.randn(2, 5, 12)))
    assert state.shape == (2, 5, 12)
    assert added is None


def test_kept_activations_do_not_depend_on_what_is_bypassed():
    few = kept(get_peft_model(vit(), LSTConfig(r=2)).train(), images(2))
    other = vit(intermediate_size=128, num_attention_heads=4, hidden_act="relu")
    assert kept(get_peft_model(other, LSTConfig(r=2)).train(), images(2)) == few
    dropped = kept(get_peft_model(vit(num_hidden_layers=5), LSTConfig(r=2, layers_to_transform=[0, 2, 4])), images(2))
    assert dropped == few  # blocks without a side block keep nothing, either


@torch.no_grad()
def test_dropout_stands_where_the_authors_have_it(monkeypatch):
    """On what enters, on attention's weights, behind it, twice in the MLP, and behind the last norm."""
    places = []
    monkeypatch.setattr(F, "dropout", lambda x, p, training, inplace: (places.append((x.shape[-1], p)), 0.5 * x)[1])
    block = SideBlock(6, 2, 9, 0.3)
    weights = []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *args, dropout_p, **kwargs: (weights.append(dropout_p), attention(*args, **kwargs))[1],
    )
    piece = Piece(12, block, 6, 0.1, enters_from=12, ends=True).train()
    stream = torch.randn(2, 5, 12)
    actual, _ = piece(None, BlockView(before=stream, after=stream))
    assert places == [(12, 0.3), (6, 0.3), (9, 0.3), (6, 0.3), (6, 0.3)]
    assert weights == [0.3]
    w = dict(piece.named_parameters())
    s = (linear(0.5 * stream, w, "enter") + linear(stream, w, "down")) / 2  # the gate is open by half
    attended = side_block(s, {**w, "block.fc2.weight": 0 * w["block.fc2.weight"], "block.fc2.bias": 0}, 2) - s
    s = s + 0.5 * attended
    hidden = 0.5 * F.gelu(linear(norm(s, w, "block.norm2"), w, "block.fc1"))
    s = s + 0.5 * linear(hidden, w, "block.fc2")
    assert_equal(actual, linear(0.5 * norm(s, w, "norm"), w, "up"))
    piece.eval()(None, BlockView(before=stream, after=stream))
    assert weights == [0.3, 0.0]


def test_the_same_output_twice_in_training():
    model = get_peft_model(vit(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5), LSTConfig(r=2)).train()
    assert torch.equal(model(**images(2)).logits, model(**images(2)).logits)


@pytest.mark.parametrize(
    ("width", "backbone_heads", "fields", "heads"),
    [(768, 12, {}, 3), (384, 6, {}, 1), (160, 10, {}, 1), (768, 12, {"num_heads": 12}, 12), (768, 2, {}, 2)],
)
def test_heads(width, backbone_heads, fields, heads):
    with torch.device("meta"):
        base = ViTForImageClassification(
            ViTConfig(hidden_size=width, num_attention_heads=backbone_heads, num_hidden_layers=1)
        )
    model = get_peft_model(base, LSTConfig(**fields))
    assert {m.num_heads for m in model.modules() if isinstance(m, SideBlock)} == {heads}


def rungs_of(model):
    return [module for module in model.modules() if isinstance(module, Piece)]


def best(scores, count):
    """Indices of the largest, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


def expected_parts(blocks, scores, width, heads, hidden):
    """By the rule, entry by entry: the stream's channels, and the block's state for each of some ViT blocks.

    `scores` has the importance of the same weights, as `PlainBlock`s.
    """
    stream_scores = [0.0] * WIDTH
    for score in scores:
        readers = [w for w, _ in score.qkv] + [score.fc1[0], score.out[0].T, score.fc2[0].T]
        for c in range(WIDTH):
            stream_scores[c] += sum(float(w[:, c].double().sum()) for w in readers)
    stream = best(stream_scores, width)
    states = []
    for block, score in zip(blocks, scores, strict=True):
        size = WIDTH // block.heads
        (q, _), (k, _), (v, _) = score.qkv
        joint = [float((q[i, stream] + k[i, stream]).sum()) for i in range(WIDTH)]
        mixed = [float((v[i, stream] + score.out[0][stream, i]).sum()) for i in range(WIDTH)]
        by_head = [
            sum(joint[h * size : (h + 1) * size] + mixed[h * size : (h + 1) * size]) for h in range(block.heads)
        ]
        matched, carried = [], []
        for h in best(by_head, heads):
            matched += [h * size + i for i in best(joint[h * size : (h + 1) * size], width // heads)]
            carried += [h * size + i for i in best(mixed[h * size : (h + 1) * size], width // heads)]
        inner = len(score.fc1[0])
        mlp = best(
            [float(score.fc1[0][i, stream].sum() + score.fc2[0][stream, i].sum()) for i in range(inner)], hidden
        )
        rows = (matched, matched, carried)
        states.append(
            {
                "norm1.weight": block.norm1[0][stream],
                "norm1.bias": block.norm1[1][stream],
                "norm2.weight": block.norm2[0][stream],
                "norm2.bias": block.norm2[1][stream],
                "qkv.weight": torch.cat([w[r][:, stream] for (w, _), r in zip(block.qkv, rows, strict=True)]),
                "qkv.bias": torch.cat([b[r] for (_, b), r in zip(block.qkv, rows, strict=True)]),
                "proj.weight": block.out[0][stream][:, carried],
                "proj.bias": block.out[1][stream],
                "fc1.weight": block.fc1[0][mlp][:, stream],
                "fc1.bias": block.fc1[1][mlp],
                "fc2.weight": block.fc2[0][stream][:, mlp],
                "fc2.bias": block.fc2[1][stream],
            }
        )
    return stream, states


def importance(of):
    """The blocks of the tiny ViT with something else in place of their parameters."""
    from plain import vit_blocks

    blocks = vit_blocks(of)
    for block in blocks:
        for name in ("norm1", "norm2", "out", "fc1", "fc2"):
            setattr(block, name, tuple(p.importance for p in getattr(block, name)))
        block.qkv = [tuple(p.importance for p in pair) for pair in block.qkv]
    return blocks


def assert_parts(model, base, heads):
    from plain import vit_blocks

    stream, states = expected_parts(vit_blocks(base), importance(base), 8, heads, 20)
    pieces = rungs_of(model)
    assert len(pieces) == len(states) == DEPTH
    selection = torch.zeros(8, WIDTH)
    selection[range(8), stream] = 1
    for piece, state in zip(pieces, states, strict=True):
        found = piece.block.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], value) for name, value in state.items())
        assert torch.equal(piece.down.weight, selection)
        assert not piece.down.bias.any()
    assert torch.equal(pieces[0].enter.weight, selection)
    return stream


@pytest.mark.parametrize("heads", [1, 2])
@torch.no_grad()
def test_magnitude_takes_the_largest_weights(heads):
    base = FAMILIES["vit"].model()
    for parameter in base.parameters():
        parameter.importance = parameter.abs()
    model = get_peft_model(
        FAMILIES["vit"].model(), LSTConfig(r=2, num_heads=heads, mlp_ratio=2.5, init="magnitude", modules_to_save=[])
    )
    stream = assert_parts(model, base, heads)
    assert stream != list(range(8))
    assert not get_method("lst").calibrated
    with pytest.raises(ValueError, match="chooses nothing from data"):
        calibrate(model, [], progress=False)


def labelled(batch):
    return images(batch) | {"labels": torch.arange(batch) % 3}


def test_fisher_sums_squared_gradients_of_single_images(tmp_path):
    family = FAMILIES["vit"]
    base = family.model()
    for parameter in base.parameters():
        parameter.importance = torch.zeros_like(parameter)
    for batch in (labelled(3), labelled(2)):
        for image, label in zip(batch["pixel_values"], batch["labels"], strict=True):
            base.zero_grad()
            F.cross_entropy(base(image[None]).logits, label[None]).backward()
            for parameter in base.parameters():
                parameter.importance += 0 if parameter.grad is None else parameter.grad.square()
    config = LSTConfig(r=2, num_heads=2, mlp_ratio=2.5, init="fisher")
    assert config.chooses_from_data
    model = get_peft_model(family.model(), config)
    with pytest.raises(NotCalibratedError, match="LST has not yet chosen"):
        model(**images(2))
    calibrate(model, (labelled(3), labelled(2)), progress=False)
    with torch.no_grad():
        stream = assert_parts(model, base, 2)
    assert all(piece.stream.indices.tolist() == stream for piece in rungs_of(model))
    expected = model.eval()(**images(2)).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family.model(), tmp_path).eval()
    assert torch.equal(loaded(**images(2)).logits, expected)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


def test_fisher_reads_no_more_images_than_it_needs(monkeypatch):
    monkeypatch.setattr("hf_visual_peft.methods.side.lst.SAMPLES", 4)
    model = get_peft_model(FAMILIES["vit"].model(), LSTConfig(r=2, init="fisher"))
    read = []
    calibrate(model, (read.append(i) or labelled(3) for i in range(9)), progress=False)
    assert read == [0, 1]
    read.clear()
    calibrate(model, (read.append(i) or labelled(3) for i in range(9)), max_batches=3, progress=False)
    assert read == [0, 1, 2]


def test_fisher_needs_a_classifier():
    model = get_peft_model(FAMILIES["vit"].backbone(), LSTConfig(r=2, init="fisher"))
    with pytest.raises(ValueError, match="LST measures Fisher information by a classifier's loss: ViTModel has no"):
        calibrate(model, [labelled(2)], progress=False)


@torch.no_grad()
def test_each_stage_has_channels_of_its_own():
    model = get_peft_model(tiny_swin(), LSTConfig(r=2, mlp_ratio=2, init="magnitude"))
    base = tiny_swin()
    backbone = find_backbone(base)
    pieces = rungs_of(model)
    for piece, block in zip(pieces, backbone.blocks, strict=True):
        parts = parts_of(block, base, torch.Tensor.detach)
        picked = piece.down.weight.argmax(dim=1)
        assert torch.equal(piece.block.norm1.weight, parts["norm1.weight"][picked])
        assert torch.equal(piece.block.proj.bias, parts["output.bias"][picked])
    assert torch.equal(pieces[1].down.weight, pieces[2].down.weight)
    assert pieces[1].enter.weight.unique().numel() > 2  # from another stage: at random


@torch.no_grad()
def test_fused_projections_are_taken_apart():
    base = MODELS["timm_vit"].model()
    block = find_backbone(base).blocks[0]
    assert block.roles["query"] == block.roles["key"]
    qkv = base.get_submodule(block.roles["query"][0])
    parts = parts_of(block, base, torch.Tensor.detach)
    assert torch.equal(torch.cat([parts[f"{role}.weight"] for role in ("query", "key", "value")]), qkv.weight)
    assert torch.equal(torch.cat([parts[f"{role}.bias"] for role in ("query", "key", "value")]), qkv.bias)
    model = get_peft_model(base, LSTConfig(r=2, mlp_ratio=1, init="magnitude"))
    assert rungs_of(model)[0].block.norm1.weight.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"LSTConfig.r is 0: must be an integer of at least 1"),
        ({"num_heads": 0}, r"LSTConfig.num_heads is 0"),
        ({"mlp_ratio": 0.0}, r"LSTConfig.mlp_ratio is 0.0: must be a finite number above 0"),
        ({"temperature": -1.0}, r"LSTConfig.temperature is -1.0"),
        ({"gate": 1}, r"LSTConfig.gate is 1: must be one of True, False"),
        ({"init": "pruned"}, r"LSTConfig.init is 'pruned': must be one of 'random', 'magnitude', 'fisher'"),
        ({"r": 17}, r"LSTConfig.r is 17: must be an integer from 1 to 8 \(half the width"),
        ({"r": 2, "num_heads": 3}, r"LSTConfig.num_heads is 3: must be a divisor of 8, the width of the side network"),
        (
            {"r": 2, "init": "magnitude", "mlp_ratio": 9},
            r"'random' for the blocks of ViTModel: they have 2 heads of 8",
        ),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(FAMILIES["vit"].model(), LSTConfig(**fields))


def test_backbones_whose_blocks_make_no_side_blocks():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    gated = Dinov2Model(Dinov2Config(**sizes, use_swiglu_ffn=True))
    message = "LSTConfig.init is 'magnitude': must be 'random' for the blocks of"
    with pytest.raises(ValueError, match=f"{message} Dinov2Model: not every one has exactly one fc1"):
        get_peft_model(gated, LSTConfig(r=2, mlp_ratio=1, init="magnitude"))
    cosine = Swinv2Model(Swinv2Config(image_size=32, embed_dim=8, depths=[1], num_heads=[2], window_size=2))
    with pytest.raises(ValueError, match=f"{message} Swinv2Model: their attention is not the softmax"):
        get_peft_model(cosine, LSTConfig(r=2, init="magnitude"))


def test_magnitude_in_half_precision_and_beside_another_adapter():
    model = get_peft_model(FAMILIES["vit"].model().bfloat16(), LSTConfig(r=2, init="magnitude"))
    (first, *_) = rungs_of(model)
    assert first.block.proj.weight.dtype == torch.float32
    weight = first.block.proj.weight.clone()
    with torch.no_grad():
        first.block.proj.weight.zero_()
    model.add_adapter("second", LSTConfig(r=2, init="magnitude"))
    again = next(m for m in rungs_of(model) if m is not first)
    assert torch.equal(again.block.proj.weight, weight)
    assert not first.block.proj.weight.any()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loaded_weights_are_kept(tmp_path, low_cpu_mem_usage):
    torch.manual_seed(3)
    model = get_peft_model(FAMILIES["vit"].model(), LSTConfig(r=2, init="magnitude")).eval()
    with torch.no_grad():
        for piece in rungs_of(model):
            piece.block.proj.weight.mul_(2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(FAMILIES["vit"].model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(loaded(**images(2)).logits, model(**images(2)).logits)


def test_quantised_backbones_make_no_side_blocks():
    base = FAMILIES["vit"].model()
    base.vit.layers[1].mlp.fc1.weight = torch.nn.Parameter(torch.zeros(32, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="'random' for ViTLayer: it is quantised"):
        get_peft_model(base, LSTConfig(r=2, init="fisher"))
    get_peft_model(base, LSTConfig(r=2))
