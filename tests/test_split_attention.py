"""Splitting `nn.MultiheadAttention`: the same results, linears for adapters, and the old layout back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from hf_visual_peft import (
    AdaptFormerConfig,
    BackboneError,
    FacTConfig,
    SplitAttention,
    SSFConfig,
    VPTConfig,
    find_backbone,
    merge_attention,
    split_attention,
)
from hf_visual_peft.coverage.models import MODELS


BATCH, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 7, 8, 2


def attention(**fields: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(WIDTH, HEADS, **fields)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def split(module: nn.MultiheadAttention) -> SplitAttention:
    found = split_attention(nn.Sequential(copy.deepcopy(module)))[0]
    assert type(found) is SplitAttention
    return found


def inputs(module: nn.MultiheadAttention, keys: int = KEYS) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    made = [
        torch.randn(BATCH, length, width)
        for length, width in ((QUERIES, WIDTH), (keys, module.kdim), (keys, module.vdim))
    ]
    query, key, value = made if module.batch_first else [x.transpose(0, 1) for x in made]
    return query, key, value


def assert_same(found: tuple, expected: tuple) -> None:
    assert len(found) == len(expected) == 2
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def masks() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(2)
    hidden = torch.rand(QUERIES, KEYS) < 0.4
    hidden[:, 0] = False
    padding = torch.arange(KEYS) >= torch.tensor([[7], [4], [5]])
    each = torch.rand(BATCH * HEADS, QUERIES, KEYS) < 0.4
    each[..., 0] = False
    return {
        "none": {},
        "hidden": {"attn_mask": hidden},
        "added": {"attn_mask": torch.randn(QUERIES, KEYS)},
        "of every head": {"attn_mask": each},
        "padding": {"key_padding_mask": padding},
        "added padding": {"key_padding_mask": torch.randn(BATCH, KEYS)},
        "both": {"attn_mask": each, "key_padding_mask": padding},
    }


@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=str)
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize(
    "fields", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 6, "vdim": 10, "batch_first": True}], ids=str
)
@torch.no_grad()
def test_results_are_the_same(fields, mask, weights):
    module = attention(**fields)
    arguments = masks()[mask] | weights
    assert_same(split(module)(*inputs(module), **arguments), module(*inputs(module), **arguments))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_results_are_the_same_for_self_attention_of_one_sample(batch_first, need_weights):
    """In eval mode without gradients torch takes another path for self-attention, and it takes inputs unbatched."""
    module = attention(batch_first=batch_first).eval()
    ours = split(module)
    x = inputs(module)[0]
    with torch.no_grad():
        assert_same(ours(x, x, x, need_weights=need_weights), module(x, x, x, need_weights=need_weights))
    one = torch.randn(QUERIES, WIDTH)
    assert_same(ours(one, one, one, need_weights=need_weights), module(one, one, one, need_weights=need_weights))
    every_head = {"need_weights": need_weights, "attn_mask": torch.randn(HEADS, QUERIES, QUERIES)}
    assert_same(ours(one, one, one, **every_head), module(one, one, one, **every_head))


def test_causal_hint():
    module = attention(batch_first=True)
    x = inputs(module)[0]
    causal = nn.Transformer.generate_square_subsequent_mask(QUERIES)
    arguments = {"attn_mask": causal, "is_causal": True, "need_weights": False}
    assert_same(split(module)(x, x, x, **arguments), module(x, x, x, **arguments))
    with pytest.raises(ValueError, match="pass the causal mask as attn_mask"):
        split(module)(x, x, x, is_causal=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_is_for_training_only(need_weights):
    module = attention(dropout=0.5, batch_first=True)
    ours = split(module)
    x = inputs(module)[0]
    assert ours.training
    torch.manual_seed(0)
    first, second = (ours(x, x, x, need_weights=need_weights)[0] for _ in range(2))
    assert not torch.allclose(first, second)
    assert_same(ours.eval()(x, x, x, need_weights=need_weights), module.eval()(x, x, x, need_weights=need_weights))
    assert not split(module).training


def test_gradients_are_the_same():
    module = attention(kdim=6, batch_first=True)
    ours = split(module)
    for each in (module, ours):
        each(*inputs(module))[0].square().sum().backward()
    packed = torch.cat([ours.q_proj.bias.grad, ours.k_proj.bias.grad, ours.v_proj.bias.grad])
    torch.testing.assert_close(packed, module.in_proj_bias.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.k_proj.weight.grad, module.k_proj_weight.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.out_proj.weight.grad, module.out_proj.weight.grad, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_transformer_of_torch_calls_the_linears():
    """Its layers compute with the packed weights themselves where they find some."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(BATCH, QUERIES, WIDTH)
    padding = torch.arange(QUERIES) >= torch.tensor([[5], [4], [3]])
    expected = encoder(x, src_key_padding_mask=padding)
    split_attention(encoder)
    calls = []
    for name in ("q_proj", "out_proj"):
        encoder.layers[0].self_attn.get_submodule(name).register_forward_hook(lambda *args: calls.append(1))
    torch.testing.assert_close(encoder(x, src_key_padding_mask=padding), expected, atol=1e-6, rtol=1e-5)
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_nested_tensors_are_refused():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    encoder = split_attention(nn.TransformerEncoder(layer, 1)).eval()
    padding = torch.arange(QUERIES) >= torch.tensor([[5], [4], [3]])
    with pytest.raises(ValueError, match="set `use_nested_tensor`"):
        encoder(torch.randn(BATCH, QUERIES, WIDTH), src_key_padding_mask=padding)


@pytest.mark.parametrize("fields", [{}, {"bias": False}, {"kdim": 6, "vdim": 10}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_old_layout_comes_back(fields, dtype):
    model = nn.Sequential(nn.Linear(2, 2), attention(**fields, dropout=0.25)).to(dtype)
    model[1].requires_grad_(False)
    before = copy.deepcopy(model)
    assert split_attention(model) is model
    assert all(p.dtype == dtype and not p.requires_grad for p in model[1].parameters())
    assert all(p.requires_grad for p in model[0].parameters())
    assert merge_attention(model) is model
    assert type(model[1]) is nn.MultiheadAttention
    assert list(model.state_dict()) == list(before.state_dict())
    assert all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert (model[1].dropout, model[1].batch_first) == (0.25, before[1].batch_first)


def test_shared_attention_stays_shared():
    shared = attention()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": attention()})
    split_attention(model)
    assert model["a"] is model["b"][0]
    assert model["a"] is not model["c"]
    merge_attention(model)
    assert model["a"] is model["b"][0]


def test_what_cannot_be_split_is_refused_before_anything_changes():
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    parametrized = nn.utils.parametrizations.weight_norm(attention(), "in_proj_weight")
    for bad, match in (
        (attention(add_bias_kv=True), "1: add_bias_kv is True"),
        (attention(add_zero_attn=True), "1: add_zero_attn is True"),
        (Own(WIDTH, HEADS), "1: Own has its own forward"),
        (parametrized, "1: its weights are parametrized"),
    ):
        model = nn.Sequential(attention(), bad)
        with pytest.raises(ValueError, match=match):
            split_attention(model)
        assert type(model[0]) is nn.MultiheadAttention
    with pytest.raises(ValueError, match="Linear holds no MultiheadAttention: already split"):
        split_attention(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Linear holds no SplitAttention"):
        merge_attention(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="itself a MultiheadAttention"):
        split_attention(attention())


def test_adapters_must_be_merged_first():
    model = split_attention(nn.Sequential(attention()))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    for change in (merge_attention, split_attention):
        with pytest.raises(ValueError, match=r"An adapter is in the model.*merge_and_unload"):
            change(adapted)
    assert type(merge_attention(adapted.unload())[0]) is nn.MultiheadAttention


def test_bias_that_merging_added_is_kept():
    """SSF shifts the output of every linear, so merging gives those a bias that had none."""
    model = split_attention(nn.Sequential(attention(bias=False)))
    model[0].q_proj.bias = nn.Parameter(torch.ones(WIDTH))
    expected = model[0](*inputs(attention()))
    merged = merge_attention(model)[0]
    assert torch.equal(merged.in_proj_bias, torch.cat([torch.ones(WIDTH), torch.zeros(2 * WIDTH)]))
    assert_same(merged(*inputs(attention())), expected)


# ---- OpenCLIP and torchvision ------------------------------------------------------------------------------------


def tiny(name: str) -> Any:
    entry = MODELS[name]
    if entry.missing_package:
        pytest.skip(f"needs {entry.missing_package}")
    return entry


def in_usual_layout(name: str) -> nn.Module:
    """As its package builds it."""
    return merge_attention(tiny(name).model())


BOTH = pytest.mark.parametrize("name", ["open_clip", "torchvision_vit"])


@BOTH
@torch.no_grad()
def test_model_is_the_same(name):
    before = in_usual_layout(name)
    pixels = tiny(name).arguments(2)["pixel_values"]
    expected = before(pixels)
    torch.testing.assert_close(split_attention(copy.deepcopy(before))(pixels), expected, atol=1e-5, rtol=1e-5)


@BOTH
def test_error_before_splitting_names_the_remedy(name):
    with pytest.raises(BackboneError, match=r"has no 'query'.*call hf_visual_peft\.split_attention\(model\) first"):
        get_peft_model(in_usual_layout(name), VPTConfig())


@BOTH
def test_roles(name):
    backbone = find_backbone(tiny(name).model())
    assert backbone.depth == 3
    assert [(b.width, b.num_heads, b.prefix_tokens) for b in backbone.blocks] == [(16, 2, 1)] * 3
    assert all(len(b.modules(("query", "key", "value", "output", "fc1", "fc2"))) == 6 for b in backbone.blocks)
    assert backbone.final_norms
    assert backbone.patch_features == 3 * 8 * 8
    assert backbone.heads == (("heads.head",) if name == "torchvision_vit" else ())


@BOTH
@pytest.mark.parametrize(
    "config",
    [
        SSFConfig(init_weights=False),
        FacTConfig(r=4, init_weights=False),
        LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], init_lora_weights=False),
    ],
    ids=lambda config: type(config).__name__,
)
@torch.no_grad()
def test_merged_adapter_goes_back_to_the_usual_layout(name, config, tmp_path):
    torch.manual_seed(0)
    before = in_usual_layout(name)
    pixels = tiny(name).arguments(2)["pixel_values"]
    base_output = before(pixels)
    model = get_peft_model(split_attention(copy.deepcopy(before)), copy.deepcopy(config)).eval()
    expected = model(pixels)
    assert not torch.allclose(expected, base_output, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(split_attention(copy.deepcopy(before)), tmp_path).eval()
    torch.testing.assert_close(loaded(pixels), expected, atol=1e-5, rtol=1e-5)
    merged = merge_attention(model.merge_and_unload())
    assert set(merged.state_dict()) >= set(before.state_dict())
    before.load_state_dict(merged.state_dict(), strict=isinstance(config, LoraConfig | FacTConfig))
    torch.testing.assert_close(merged(pixels), expected, atol=1e-4, rtol=1e-4)


@BOTH
@pytest.mark.parametrize(
    "config", [VPTConfig(num_virtual_tokens=3), AdaptFormerConfig(r=4)], ids=lambda c: type(c).__name__
)
def test_blocks_are_adapted(name, config):
    """Prompts join after the class token; the outside sees as many tokens as before."""
    torch.manual_seed(0)
    model = get_peft_model(tiny(name).model(), copy.deepcopy(config)).eval()
    tokens = []
    blocks = find_backbone(model.get_base_model()).blocks
    for block in blocks:
        model.get_base_model().get_submodule(block.path).register_forward_hook(
            lambda module, args, output: tokens.append(output.shape)
        )
    model(tiny(name).arguments(2)["pixel_values"]).square().mean().backward()
    assert tokens == [(2, 17, 16)] * 3
    own = [p for key, p in model.named_parameters() if f".{config.peft_type.lower()}_" in key]
    assert own
    assert all(p.grad is not None for p in own)


@torch.no_grad()
def test_whole_open_clip_model():
    """The visual tower of a CLIP that holds a text tower, too: only the visual one is adapted."""
    if tiny("open_clip"):
        from open_clip.model import CLIP
    torch.manual_seed(0)
    model = CLIP(
        embed_dim=8,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
        text_cfg={"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2},
    ).eval()
    pixels, words = torch.randn(2, 3, 32, 32), torch.randint(0, 20, (2, 6))
    image, text, _ = model(pixels, words)
    adapted = get_peft_model(split_attention(model), VPTConfig(num_virtual_tokens=3, init_weights=False)).eval()
    new_image, new_text, _ = adapted(pixels, words)
    torch.testing.assert_close(new_text, text, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(new_image, image, atol=1e-3)
    assert all(".visual." in name for name, p in adapted.named_parameters() if p.requires_grad)
