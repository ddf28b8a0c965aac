"""Sparse-Tuning: its equation in plain torch, what blocks compute, which models it refuses, and what it goes with."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from equations import adapted, assert_equal, both, weights_of
from families import FAMILIES, images
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from hf_visual_peft import (
    AttnScaleConfig,
    CompositeConfig,
    ConvpassConfig,
    DyTConfig,
    LSTConfig,
    PrefixConfig,
    SparseTuningConfig,
    VPTConfig,
    find_backbone,
)
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.coverage.plain import PATCHED


LABELS = torch.tensor([0, 1])


def config(**fields):
    return SparseTuningConfig(**{"r": 4, "inner": 2, "keep": 0.6, "groups": 3, "init_weights": False} | fields)


def dense(w, z):
    h = F.relu(z @ w["down.weight"].T + w["down.bias"])
    t = h @ w["inner_down.weight"].T + w["inner_down.bias"]
    u = t @ w["inner_up.weight"].T + w["inner_up.bias"]
    joined = torch.cat([t, u], -1) @ w["join.weight"].T + w["join.bias"] + h
    return joined @ w["up.weight"].T + w["up.bias"]


def attention_to_patches(block, x, prefix):
    """Weights of CLS, or of all patches in the mean where there is none, of each head: their mean."""
    (wq, bq), (wk, bk), _ = block.qkv
    n = block.norm(1, x)
    q, k = ((n @ w.T + b).unflatten(-1, (block.heads, -1)).transpose(1, 2) for w, b in ((wq, bq), (wk, bk)))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)
    return weights[:, 0, prefix:] if prefix else weights.mean(1)


def run(blocks, adapters, x, prefix, keep, groups, merge=True):
    """The stream after the blocks, image by image: token sets are lists of rows."""
    starts = [number * len(blocks) // groups for number in range(groups)]
    outputs, lengths = [], []
    for one in x.split(1):
        total, lengths = 0.0, []
        for index, block in enumerate(blocks):
            z = one + block.attention(block.norm(1, one))
            if index in starts[1:]:
                a = attention_to_patches(block, one, prefix)[0]
                count = math.ceil(keep * len(a))
                if count < len(a):
                    chosen = sorted(a.topk(count).indices.tolist())
                    rest = [j for j in range(len(a)) if j not in chosen]
                    rows = [z[:, :prefix], z[:, [prefix + j for j in chosen]]]
                    if merge:
                        rows.append(sum(a[j] * z[:, prefix + j] for j in rest)[:, None])
                    z = torch.cat(rows, 1)
            if index in starts:
                total = 0.0
            own = dense(adapters[index], z)
            total = total + own
            one = z + block.mlp(block.norm(2, z)) + own
            if index + 1 in (*starts, len(blocks)):
                one = one + total
            lengths.append(one.shape[1])
        outputs.append(one)
    return torch.cat(outputs), lengths


@both
@pytest.mark.parametrize(
    ("keep", "groups", "merge"), [(0.6, 3, True), (0.3, 2, False), (1.0, 3, True), (0.5, 1, True)]
)
def test_equation(name, keep, groups, merge):
    (blocks, x, norm), model, actual, family = adapted(name, config(keep=keep, groups=groups, merge=merge))
    with torch.no_grad():
        stream, lengths = run(blocks, weights_of(model, "sparsetuning_dense"), x, family.prefix, keep, groups, merge)
    assert actual.shape[1] == lengths[-1]
    # the order of tokens has no meaning where no position is left: compare what is kept in its order, the merged last
    assert_equal(actual, norm(stream))


@both
def test_gradients_are_those_of_the_equation(name):
    (blocks, x, norm), model, _, family = adapted(name, config())
    adapters = weights_of(model, "sparsetuning_dense")
    backbone = getattr(model.get_base_model(), model.get_base_model().base_model_prefix)
    (wanted, _), actual = run(blocks, adapters, x, family.prefix, 0.6, 3), backbone(**family.inputs(2))
    parameters = [p for each in adapters.values() for p in each.values()]
    direction = torch.linspace(-1, 1, wanted.numel()).view(wanted.shape)
    expected = torch.autograd.grad((norm(wanted) * direction).sum(), parameters)
    found = torch.autograd.grad((actual.last_hidden_state * direction).sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("training", [False, True])
def test_what_leaves_is_not_computed(training):
    """Not by later blocks, nor by the MLP of the block in which it leaves; in training, too."""
    model = get_peft_model(FAMILIES["vit"].model(), config(keep=0.5, groups=3)).train(training)
    seen = []
    for block in find_backbone(model.get_base_model()).blocks:
        for role in ("query", "fc1"):
            linear = model.get_base_model().get_submodule(block.roles[role][0])
            linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel() // args[0].shape[-1]))
    model(**images(1))
    if not training:  # a trial of the MLP, once a block
        seen.clear()
        model(**images(1))
    seen = [count for count in seen if count not in (2, 4)]
    # 16 patches and CLS; 8, one merged and CLS; ceil(9 / 2), one merged and CLS
    assert seen == [17, 17, 17, 10, 10, 7]


def test_fewer_operations_than_the_plain_backbone():
    plain, model = FAMILIES["vit"].model().eval(), get_peft_model(FAMILIES["vit"].model(), config(r=1, inner=1)).eval()
    counts = []
    for each in (plain, model):
        each(**images(1))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            each(**images(1))
        counts.append(counter.get_total_flops())
    assert counts[1] < 0.9 * counts[0]


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "siglip", "timm_vit", "clip"])
def test_models_train_and_their_heads_read_what_is_left(name):
    entry = MODELS[name]
    torch.manual_seed(0)
    model = get_peft_model(entry.model(), config()).train()
    output = entry.call(model, entry.arguments(2))
    first = output if isinstance(output, torch.Tensor) else output[0]
    first.sum().backward()
    # with one group nothing leaves, so the last adapter has no gradient only where the head reads CLS alone
    grads = {n: p.grad for n, p in model.named_parameters() if "sparsetuning" in n}
    assert all(g is not None and g.isfinite().all() for g in grads.values())


@torch.no_grad()
def test_groups_are_those_of_all_blocks():
    """With some blocks only, patches leave where groups begin, and the sum is of the blocks that have an adapter."""
    for layers, lengths in ([1], [17, 17, 10, 10]), ([0, 2], [17, 17, 17, 10]), ([0], [17, 17, 17, 17]):
        model = get_peft_model(FAMILIES["vit"].model(), config(keep=0.5, layers_to_transform=layers)).eval()
        states = model(**images(1), output_hidden_states=True).hidden_states
        assert [state.shape[1] for state in states] == lengths


@torch.no_grad()
def test_a_head_that_pools_reads_the_tokens_that_are_left():
    model = get_peft_model(FAMILIES["dinov2"].model(), config(keep=0.5)).eval()
    inner = model.get_base_model()
    tokens = inner.dinov2(**images(2)).last_hidden_state
    assert tokens.shape[1] == 7
    features = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
    assert_equal(model(**images(2)).logits, inner.classifier(features))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin", "SwinModel: its blocks form stages of several widths.*groups=1"),
        ("hiera", "its blocks form stages"),
        ("pvt_v2", "its blocks form stages"),
        ("convnext", "ConvNext.*"),
        ("beit", "BeitModel: its attention has a bias for each pair of places"),
        ("dinov3_vit", "takes position_embeddings, the positions of all tokens"),
        ("siglip2", "its images are padded"),
        ("videomae", "the frames of a video share one sequence"),
        ("beit_segmentation", "reads every place of the image|has a bias"),
        ("dpt_depth", "reads every place of the image"),
        ("upernet_swin", "its blocks form stages"),
        ("shieldgemma2", "ShieldGemma2ForImageClassification may need each token in its place"),
        ("imagegpt", "which of its tokens are patches of the image is not known"),
        ("sam", "windows"),
        ("timm_dinov3", "positions of all tokens|knows the places"),
    ],
)
def test_models_that_need_all_tokens(name, message):
    refused(MODELS[name].model(), message)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (FAMILIES["beit_shared_bias"].model, "a bias for each pair of places"),
        (lambda: tf.Dinov2Backbone(tf.Dinov2Config(**PATCHED)), "Dinov2Backbone returns maps of the tokens"),
        (lambda: tf.ViTForMaskedImageModeling(tf.ViTConfig(**PATCHED)), "its task head, decoder, reads every place"),
        (
            lambda: tf.YolosForObjectDetection(tf.YolosConfig(**PATCHED | {"image_size": [32, 32]})),
            "class_labels_classifier, bbox_predictor, reads every place",
        ),
    ],
)
def test_more_that_need_all_tokens(build, message):
    refused(build(), message)


def refused(model, message):
    before = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(groups=2))
    assert before == {path: type(module) for path, module in model.named_modules()}
    assert not hasattr(model, "peft_config")


@torch.no_grad()
def test_beside_other_adapters():
    """Prompts stay; convolutions see cells whose patch has left as empty; changed logits change who stays."""
    for other in (
        VPTConfig(num_virtual_tokens=2, modules_to_save=[], init_weights=False),
        ConvpassConfig(r=2, modules_to_save=[], init_weights=False),
        PrefixConfig(num_virtual_tokens=2, modules_to_save=[], init_weights=False),
        AttnScaleConfig(modules_to_save=[], init_weights=False, layers_to_transform=[0, 1]),
        DyTConfig(r=2, modules_to_save=[], init_weights=False),
        LoraConfig(r=2, target_modules=["fc1", "q_proj"], init_lora_weights=False),
    ):
        model = FAMILIES["vit"].model()
        torch.manual_seed(0)
        model.add_adapter(config(modules_to_save=[], keep=0.5), "sparse")
        alone = model.eval()(**images(2)).logits
        model.add_adapter(other, "other")
        model.set_adapter(["sparse", "other"])
        both_active = model.eval()(**images(2), output_hidden_states=True)
        assert [state.shape[1] for state in both_active.hidden_states] == [17, 17, 10, 7]
        assert not torch.allclose(alone, both_active.logits)
        with torch.enable_grad():  # in which DyT's MLPs run on all tokens
            again = model(**images(2)).logits.detach()
        torch.testing.assert_close(again, both_active.logits, rtol=0, atol=1e-5 * again.abs().max().item())


@torch.no_grad()
def test_padding_and_prefixes_in_the_weights():
    """Keys that join take their share of the softmax, as in the block's own attention."""
    torch.manual_seed(0)
    parts = [config(init_weights=True), PrefixConfig(num_virtual_tokens=2)]
    seen = {}
    for implementation in ("sdpa", "eager"):
        torch.manual_seed(0)
        model = FAMILIES["vit"].model()
        model.set_attn_implementation(implementation)
        model = get_peft_model(model, CompositeConfig(parts=parts, init_weights=False)).eval()
        seen[implementation] = model(**images(2)).logits
    torch.testing.assert_close(seen["sdpa"], seen["eager"], rtol=0, atol=1e-5)


def test_gradient_checkpointing_and_the_places_of_patches_after_it():
    """Convolutions in later blocks find the places of the patches that are left, in the backward pass, too."""
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        parts = [config(init_weights=True), ConvpassConfig(r=2, dropout=0.0)]
        model = get_peft_model(FAMILIES["vit"].model(), CompositeConfig(parts=parts, init_weights=False)).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**images(2), labels=LABELS).loss
        with torch.no_grad():
            model(**images(3))  # the model sees other images in between
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_what_it_does_not_go_with():
    model = FAMILIES["vit"].model()
    model.add_adapter(config(modules_to_save=[]), "sparse")
    model.add_adapter(LSTConfig(modules_to_save=[]), "ladder")
    model.set_adapter(["sparse", "ladder"])
    with pytest.raises(ValueError, match=r"'ladder' has a network beside the blocks.*row for each token, and 'sp"):
        model(**images(2))
    model.add_adapter(config(modules_to_save=[]), "second")
    model.set_adapter(["sparse", "second"])
    with pytest.raises(ValueError, match=r"'sparse', 'second' both take tokens out of the stream in 'vit.layers.1'"):
        model(**images(2))
    model.set_adapter("second")
    model(**images(2))


def test_mixed_batches_are_refused():
    model = get_peft_model(FAMILIES["vit"].model(), config()).eval()
    model.add_adapter("other", config())
    with pytest.raises(ValueError, match=r"adapter_names: an adapter takes tokens out of the stream.*set_adapter"):
        model(**images(2), adapter_names=["default", "__base__"])
    alone = model(**images(2)).logits
    torch.testing.assert_close(model(**images(2), adapter_names=["default", "default"]).logits, alone)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 0.0}, "SparseTuningConfig.keep is 0.0: must be a share greater than 0, and at most 1"),
        ({"keep": 1.2}, "SparseTuningConfig.keep is 1.2"),
        ({"keep": float("nan")}, "SparseTuningConfig.keep is nan"),
        ({"groups": 0}, "SparseTuningConfig.groups is 0"),
        ({"r": 17}, r"r is 17: must be an integer from 1 to 16 \(the backbone's width\)"),
        ({"inner": 5}, r"inner is 5: must be an integer from 1 to 4 \(r\)"),
        ({"merge": "yes"}, "merge is 'yes': must be one of True, False"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(FAMILIES["vit"].model(), config(**fields))
