"""Visual query tuning: what its queries see, what the head reads, and what training keeps."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from families import DEPTH, FAMILIES, WIDTH, images, output_of
from peft import PeftModel, get_peft_model
from plain import plain_parts
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import hf_visual_peft
from hf_visual_peft.cli.catalogue import methods_markdown
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.methods.prefix.vqt import QueryTokens, VQTConfig
from hf_visual_peft.sharing.card import SavedAdapter


FEW = 3
# without positions in their attention, so that a query equal to a token must become what the token becomes
POSITIONLESS = (
    *("vit", "dinov2_with_registers", "vit_mae", "clip", "siglip", "siglip2", "videomae", "vivit", "owlvit", "blip_2"),
    *("beit", "data2vec-vision", "dpt", "perceiver", "timm_vit_registers", "torchvision_vit"),
)
ROTARY = ("dinov3_vit", "timm_dinov3")  # where prefix tokens have none


def adapted(model, **fields):
    torch.manual_seed(2)
    return get_peft_model(model, VQTConfig(**{"num_virtual_tokens": FEW, "init_weights": False} | fields)).eval()


def pieces_of(model, adapter="default"):
    return [m.vqt_queries[adapter] for m in model.modules() if hasattr(m, "vqt_queries")]


def masked_block(block, x, queries):
    """A pre-norm block on [x; Q] in which nobody sees Q, in plain torch."""
    tokens = x.shape[1]
    both = torch.cat([x, queries], dim=1)
    mask = torch.zeros(both.shape[1], both.shape[1])
    mask[:, tokens:] = -math.inf
    normed = block.norm(1, both)
    q, k, v = ((normed @ w.T + b).unflatten(-1, (block.heads, -1)).transpose(1, 2) for w, b in block.qkv)
    weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5 + mask, dim=-1)
    both = both + block.scale1 * ((weights @ v).transpose(1, 2).flatten(2) @ block.out[0].T + block.out[1])
    both = both + block.mlp(block.norm(2, both))
    return both[:, :tokens], both[:, tokens:]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", ["vit", "dinov2_registers"])
def test_is_masked_attention_and_one_linear_on_everything(name, normalize):
    family = FAMILIES[name]
    base = family.model()
    inputs = family.inputs(2)
    read = []
    handle = base.classifier.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    base(**inputs)
    handle.remove()
    blocks, x, _ = plain_parts(name, base, inputs["pixel_values"])
    model = adapted(base, normalize=normalize)
    unit = (lambda t: t / t.norm(dim=-1, keepdim=True)) if normalize else (lambda t: t)
    features = [unit(read[0])]
    weights = [base.classifier.modules_to_save.default.weight]
    for block, piece in zip(blocks, pieces_of(model), strict=True):
        x, queries = masked_block(block, x, piece.queries.expand(2, -1, -1))
        features.append(unit(queries.flatten(1)))
        weights.append(piece.head_columns[0].weight)
    whole = torch.cat(features, dim=1)
    assert whole.shape[1] == read[0].shape[1] + DEPTH * FEW * WIDTH
    expected = F.linear(whole, torch.cat(weights, dim=1), base.classifier.modules_to_save.default.bias)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "beit", "dinov2_registers", "deit_teacher", "siglip2"])
def test_features_stay_the_same_to_the_bit(name):
    family = FAMILIES[name]
    base = family.model().requires_grad_(False)
    inputs = family.inputs(2)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    before = base(**inputs, **wanted)
    model = adapted(copy.deepcopy(base)).train()
    after = model(**inputs, **wanted)
    assert len(after.hidden_states) == len(before.hidden_states) == DEPTH + 1
    for mine, own in zip(after.hidden_states, before.hidden_states, strict=True):
        assert torch.equal(mine, own)
        assert not mine.requires_grad
    if before.attentions is not None:
        assert [a.shape for a in after.attentions] == [a.shape for a in before.attentions]
    assert not torch.allclose(after.logits, before.logits)


@pytest.mark.parametrize("name", [*POSITIONLESS, *ROTARY])
def test_a_query_like_a_token_becomes_what_the_token_becomes(name):
    tiny = MODELS[name]
    if tiny.missing_package:
        pytest.skip(f"{tiny.missing_package} is not installed")
    base = tiny.model()
    for table in (p for n, p in base.named_parameters() if "relative_position_bias" in n):
        nn.init.zeros_(table)
    model = adapted(base).double()
    prefix = hf_visual_peft.find_backbone(model.get_base_model()).prefix_tokens
    taps = []
    for piece in pieces_of(model):
        piece.register_forward_pre_hook(lambda module, args: taps.append((args[1].after, args[1].ask)))
    arguments = tiny.arguments(2, None)
    with torch.no_grad():
        tiny.call(model, {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()})
    compared = slice(0, prefix) if name in ROTARY else slice(None)
    assert len(taps) > 1
    for (before, _), (behind, ask) in itertools.pairwise(taps):
        assert behind[:, compared].numel()
        if name == "siglip2":  # padding is part of the sequence, and no token sees it
            assert (arguments["pixel_attention_mask"] == 0).any()
        torch.testing.assert_close(ask(before)[:, compared], behind[:, compared])


def test_queries_have_no_position_bias():
    family = FAMILIES["beit"]
    model = adapted(family.model()).double()
    block = model.get_base_model().beit.layers[1]
    taps = []
    for piece in pieces_of(model):
        piece.register_forward_pre_hook(lambda module, args: taps.append((args[1].after, args[1].ask)))
    with torch.no_grad():
        model(images(2)["pixel_values"].double())
        x, ask = taps[0][0], taps[1][1]
        queries = torch.randn(2, FEW, WIDTH, dtype=torch.float64)
        found = ask(queries)
        attention = block.attention
        heads = [
            t.unflatten(-1, (2, -1)).transpose(1, 2)
            for t in (
                attention.q_proj(block.layernorm_before(queries)),
                attention.k_proj(block.layernorm_before(x)),
                attention.v_proj(block.layernorm_before(x)),
            )
        ]
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        z = queries + block.lambda_1 * attention.o_proj(mixed)
        torch.testing.assert_close(found, z + block.lambda_2 * block.mlp(block.layernorm_after(z)))


def kept_bytes(model, pixels):
    """Of activations that one forward pass keeps for the backward pass, the largest number of elements among them."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(pixels).logits.square().sum()
    total = sum(kept.values())
    loss.backward()
    return total


def vit(**sizes):
    torch.manual_seed(0)
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(
        ViTConfig(**common | {"image_size": 64, "patch_size": 8, "num_labels": 3} | sizes)
    )


def test_training_keeps_keys_values_and_queries():
    pixels = torch.randn(2, 3, 64, 64)

    def kept(queries=1, **sizes):
        return kept_bytes(adapted(vit(**sizes), num_virtual_tokens=queries, dropout=0.0).train(), pixels)

    one, depth, batch, tokens, width = kept(), 2, 2, 65, 32
    keys_and_values = depth * batch * 2 * tokens * width * 4
    assert keys_and_values <= one <= 1.25 * keys_and_values
    # the MLP is on the queries' way: a few numbers a hidden unit, a block, an image and a query, none a token
    assert kept(intermediate_size=64 + 1000) - one <= 3 * depth * batch * 1000 * 4
    assert kept(num_attention_heads=8) - one <= 0.05 * one
    assert kept(num_hidden_layers=4) <= 2.05 * one
    full = vit().train().requires_grad_(True)
    assert kept_bytes(full, pixels) > 4 * one


def test_backbone_runs_in_eval_mode_and_without_gradients():
    model = adapted(vit(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5), dropout=0.0).train()
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(pixels).logits, model(pixels).logits)
    model(pixels).logits.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in model.named_parameters() if ".vqt_" in n or ".modules_to_save." in n}
    dropped = adapted(vit(), dropout=0.5).train()
    assert not torch.equal(dropped(pixels).logits, dropped(pixels).logits)


@pytest.mark.parametrize("modules_to_save", [None, []])
@pytest.mark.parametrize("name", ["vit", "deit_teacher"])
def test_mixed_batches(name, modules_to_save):
    family = FAMILIES[name]
    model = adapted(family.model(), modules_to_save=modules_to_save)
    second = {"num_virtual_tokens": 2, "normalize": False, "init_weights": False}
    model.add_adapter("second", VQTConfig(**second, modules_to_save=modules_to_save))
    with torch.no_grad():
        for part in (p for n, p in model.named_parameters() if ".second." in n):
            part.add_(torch.randn_like(part), alpha=0.1)
    model.eval()
    names = ["second", "default", "__base__", "second", "default"]
    inputs = family.inputs(5)
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=names).logits
        for row, adapter in enumerate(names):
            alone = model.disable_adapter() if adapter == "__base__" else torch.no_grad()
            if adapter != "__base__":
                model.set_adapter(adapter)
            with alone:
                expected = model(**{key: value[row : row + 1] for key, value in inputs.items()}).logits
            torch.testing.assert_close(mixed[row : row + 1], expected)


def test_two_heads_have_columns_of_their_own():
    model = adapted(FAMILIES["deit_teacher"].model())
    inputs = FAMILIES["deit_teacher"].inputs(2)
    before = model(**inputs)
    with torch.no_grad():
        for piece in pieces_of(model):
            assert len(piece.head_columns) == 2
            piece.head_columns[1].weight.add_(1.0)
    after = model(**inputs)
    assert torch.equal(after.cls_logits, before.cls_logits)
    assert not torch.allclose(after.distillation_logits, before.distillation_logits)


def test_a_pass_that_does_not_reach_the_head_leaves_nothing_to_the_next():
    family = FAMILIES["vit"]
    base = family.model()
    inputs = family.inputs(2)
    before = base(**inputs).logits
    model = adapted(base)
    base.vit(family.inputs(3)["pixel_values"])
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, before)


def test_chosen_blocks():
    model = adapted(FAMILIES["vit"].model(), layers_to_transform=[0, 1]).train()
    assert len(pieces_of(model)) == 2
    model(**FAMILIES["vit"].inputs(2)).logits.sum().backward()
    assert all(p.grad.any() for piece in pieces_of(model) for p in piece.parameters())


def test_counts_say_what_is_in_the_head(tmp_path):
    with torch.device("meta"):
        model = get_peft_model(ViTForImageClassification(ViTConfig(num_labels=100)), VQTConfig())
    pieces = pieces_of(model)
    assert sum(piece.queries.numel() for piece in pieces) == 9_216
    assert sum(linear.weight.numel() for piece in pieces for linear in piece.head_columns) == 100 * 9_216
    method = hf_visual_peft.get_method("vqt")
    assert method.head_inputs == 9_216
    assert f"{9_216:,} a class" in methods_markdown()
    model = adapted(FAMILIES["vit"].model())
    model.save_pretrained(tmp_path)
    saved = SavedAdapter.read(tmp_path, model.peft_config["default"])
    assert saved.parameters == DEPTH * FEW * WIDTH
    assert saved.head_parameters == 3 * (WIDTH + 1) + 3 * DEPTH * FEW * WIDTH
    assert saved.num_labels == 3
    loaded = PeftModel.from_pretrained(FAMILIES["vit"].model(), tmp_path).eval()
    inputs = FAMILIES["vit"].inputs(2)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_start():
    torch.manual_seed(0)
    piece = QueryTokens(200, 64, 768, (50, 20), 0.0, normalize=True)
    bound = math.sqrt(6 / (768 + 64))
    assert piece.queries.abs().max() <= bound
    assert piece.queries.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    for linear, classes in zip(piece.head_columns, (50, 20), strict=True):
        assert linear.bias is None
        assert linear.weight.std().item() == pytest.approx(math.sqrt(2 / classes), rel=0.02)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_virtual_tokens", 0), ("num_virtual_tokens", 1.5), ("dropout", 1.0), ("dropout", "a"), ("normalize", 1)],
)
def test_bad_fields(field, value):
    with pytest.raises(ValueError, match=rf"VQTConfig.{field} is {value!r}: must be"):
        VQTConfig(**{field: value})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin", "SwinLayer has no plain softmax attention over all tokens"),
        ("segformer", "SegformerLayer has no plain softmax attention over all tokens"),
        ("imagegpt", "ImageGPTBlock has no plain softmax attention over all tokens"),
        ("mobilevit", "MobileViTTransformerLayer has no plain softmax attention over all tokens"),
        ("timesformer", "TimesformerLayer has no plain softmax attention over all tokens"),
        ("levit", "is not a linear on features of the image"),
        ("beit_segmentation", "is not a linear on features of the image"),
        ("shieldgemma2", "it has no task head here"),
        ("resnet", "convolutional network"),
    ],
)
def test_refusals(name, reason):
    model = MODELS[name].model()
    before = {key: id(module) for key, module in model.named_modules()}
    with pytest.raises(ValueError, match=reason):
        get_peft_model(model, VQTConfig())
    assert before == {key: id(module) for key, module in model.named_modules()}


def test_equation_works_without_the_library():
    from hf_visual_peft.sites import BlockView

    piece = QueryTokens(2, 4, 12, (3,), 0.0, normalize=False)
    tap = BlockView(after=torch.zeros(5, 7, 4), ask=nn.Identity())
    logits, added = piece(None, tap)
    assert added is None
    torch.testing.assert_close(logits, piece.head_columns[0](piece.queries.flatten()).expand(5, -1))
    torch.testing.assert_close(piece(logits, tap)[0], 2 * logits)


def test_output_of_several_adapters_adds_up():
    family = FAMILIES["vit"]
    model = adapted(family.model(), modules_to_save=[], normalize=False)
    model.add_adapter("second", VQTConfig(init_weights=False, modules_to_save=[], normalize=False))
    inputs = family.inputs(2)
    outputs = {}
    for names in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        outputs[len(outputs)] = output_of(model.eval(), inputs)
    with model.disable_adapter():
        own = output_of(model, inputs)
    torch.testing.assert_close(outputs[2], outputs[0] + outputs[1] - own)
