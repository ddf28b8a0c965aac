"""E2VPT: prompts, keys that are values too, and what pruning leaves of the prompts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from equations import adapted, assert_equal, both, weights_by_path, weights_of
from families import DEPTH, FAMILIES, WIDTH, images, output_of
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_prefix import windows, with_prefixes
from torch import nn

from hf_visual_peft import E2VPTConfig, VPTConfig, find_backbone, prune_prompts
from hf_visual_peft.coverage.cell import tensors_of
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.methods.prompt.e2vpt import MaskedPrompts, Masks, TiedPrefixes


COUNT, KEYS, PIECES = 6, 2, 4
BATCH = images(4) | {"labels": torch.tensor([0, 1, 2, 1])}


def config(**fields):
    return E2VPTConfig(num_virtual_tokens=COUNT, num_kv_tokens=KEYS, pieces=PIECES, **fields)


def masked(buffers):
    """M by its definition, entry by entry."""
    tokens, pieces = (next(b for n, b in buffers if n.endswith(f"masks.default.{m}_mask")) for m in ("token", "piece"))
    return torch.tensor([[float(tokens[t] * pieces[t, c % PIECES]) for c in range(WIDTH)] for t in range(len(tokens))])


@both
@torch.no_grad()
def test_equation(name):
    (blocks, x, norm), model, _, family = adapted(name, config(init_weights=False))
    buffers = dict(model.named_buffers())
    for key, buffer in buffers.items():
        if key.endswith("_mask"):
            buffer.copy_((torch.rand(buffer.shape, generator=torch.Generator().manual_seed(1)) < 0.6).float())
    inner = model.get_base_model()
    actual = getattr(inner, inner.base_model_prefix)(**family.inputs(2)).last_hidden_state
    m = masked(list(buffers.items()))
    assert 0 < m.mean() < 1
    prompts, prefixes = weights_of(model, "e2vpt_tokens"), weights_of(model, "e2vpt_heads")
    for index, block in enumerate(blocks):
        own = (prompts[index]["prompts"] * m).expand(2, -1, -1)
        keys = prefixes[index]["prompts"].transpose(0, 1).flatten(1)
        x = torch.cat([x[:, : family.prefix], own, x[:, family.prefix :]], dim=1)
        x = x + with_prefixes(block, block.norm(1, x), keys, keys)
        x = x + block.mlp(block.norm(2, x))
        x = torch.cat([x[:, : family.prefix], x[:, family.prefix + COUNT :]], dim=1)
    assert_equal(actual, norm(x))


@pytest.mark.parametrize("name", ["swin", "timm_swin"])
@torch.no_grad()
def test_equation_in_windows(name):
    entry = MODELS[name]
    base = entry.model()
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), config(init_weights=False)).eval()
    inner, seen = model.get_base_model(), {}
    blocks = find_backbone(base).blocks
    for block in blocks:
        path = block.roles["value"][0].rpartition(".")[0]
        keep = lambda module, args, kwargs, output, path=path: seen.update({path: (args, kwargs, output)})  # noqa: E731
        inner.get_submodule(path).register_forward_hook(keep, with_kwargs=True)
    tensors_of(entry.call(model, entry.arguments(2)))
    prompts, prefixes = (weights_by_path(model, f"adapters.e2vpt_{slot}") for slot in ("tokens", "heads"))
    for block in blocks:
        path = block.roles["value"][0].rpartition(".")[0]
        attention = base.get_submodule(path)
        normed = base.get_submodule(block.roles["norm1"][0])(prompts[block.path]["prompts"])
        if hasattr(attention, "qkv"):
            _, keys, values = attention.qkv(normed).chunk(3, dim=-1)
        else:
            keys, values = (base.get_submodule(block.roles[role][0])(normed) for role in ("key", "value"))
        tied = prefixes[block.path]["prompts"].transpose(0, 1).flatten(1)
        args, kwargs, output = seen[path]
        output = output[0] if isinstance(output, tuple) else output
        both_kinds = (torch.cat([each, tied]) for each in (keys, values))
        expected = windows(attention, (*args, *kwargs.values()), *both_kinds)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    assert len({m for m in inner.modules() if isinstance(m, Masks)}) == len({block.width for block in blocks})


def test_start_and_dropout():
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), config(dropout=0.5))
    for w in weights_of(model, "e2vpt_heads").values():
        assert w["prompts"].shape == (2, KEYS, WIDTH // 2)
        bound = (6 / (KEYS * WIDTH // 2)) ** 0.5
        assert 0.7 * bound < w["prompts"].abs().max() <= bound
    keys, values = TiedPrefixes(4, 2, 8, 0.5).train()(64)
    assert not torch.equal(keys, values), "dropped apart, as in the authors' code"
    seen = (keys != 0) & (values != 0)
    assert torch.equal(keys[seen], values[seen])
    equation = MaskedPrompts(4, 8, 12, 0.5).train()
    tokens = equation(64, Masks(4, 2))
    assert 0.4 < (tokens != 0).float().mean() < 0.6
    one, other = (MaskedPrompts(4, 8, 12, 0.0).prompts for _ in range(2))
    assert not torch.equal(one, other)


def trained():
    """A model whose adapter and head have moved away from their start, and what they started from.

    Its norms have a large epsilon, as they hide the length of a whole prompt otherwise.
    """
    torch.manual_seed(0)
    base = FAMILIES["vit"].model()
    for module in base.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.1
    model = get_peft_model(base, config(dropout=0.2))
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, start


@torch.no_grad()
def slopes(model):
    """The change of the loss when prompts, or pieces of them, grow in all blocks at once, by finite differences."""
    model.eval()
    prompts = [w["prompts"] for w in weights_of(model, "e2vpt_tokens").values()]
    model.double()
    pixels = BATCH | {"pixel_values": BATCH["pixel_values"].double()}

    def loss(t, channels, factor):
        for p in prompts:
            p[t, channels] *= factor
        value = F.cross_entropy(model(pixel_values=pixels["pixel_values"]).logits, BATCH["labels"]).item()
        for p in prompts:
            p[t, channels] /= factor
        return value

    def slope(t, channels):
        return (loss(t, channels, 1 + 1e-4) - loss(t, channels, 1 - 1e-4)) / 2e-4

    tokens = torch.tensor([slope(t, slice(None)) for t in range(COUNT)])
    pieces = torch.tensor([[slope(t, slice(c, None, PIECES)) for c in range(PIECES)] for t in range(COUNT)])
    model.float()
    return tokens, pieces


@pytest.mark.parametrize(
    ("token_keep", "piece_keep", "left"), [(0.5, 0.75, (3, 3)), (0.01, 0.01, (1, 1)), (1, 1, (6, 4))]
)
def test_pruning_cuts_off_what_has_the_lowest_gradient(token_keep, piece_keep, left, tmp_path):
    model, start = trained()
    tokens, pieces = slopes(model)
    model.train()
    before = {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
    prune_prompts(model, [BATCH], token_keep=token_keep, piece_keep=piece_keep, progress=False)
    assert model.training
    assert before == {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    (token_mask,) = (b for n, b in buffers.items() if n.endswith("token_mask"))
    (piece_mask,) = (b for n, b in buffers.items() if n.endswith("piece_mask"))
    assert not token_mask.requires_grad
    assert sorted(token_mask.nonzero().flatten().tolist()) == sorted(tokens.topk(left[0]).indices.tolist())
    for t in range(COUNT):
        expected = sorted(pieces[t].topk(left[1]).indices.tolist())
        assert piece_mask[t].nonzero().flatten().tolist() == expected
    for key, value in model.named_parameters():
        if key in start:
            torch.testing.assert_close(value, start[key], rtol=0, atol=1e-7)  # heads, too
    model.eval()
    expected = output_of(model, images(2))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path, is_trainable=True).eval()
    assert torch.equal(output_of(loaded, images(2)), expected)


def test_a_loaded_adapter_rewinds_to_its_own_start(tmp_path):
    model, start = trained()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(FAMILIES["vit"].model(), tmp_path, is_trainable=True)
    prune_prompts(loaded, [BATCH], progress=False)
    for key, value in loaded.named_parameters():
        if ".e2vpt_" in key:
            torch.testing.assert_close(value, start[key], rtol=0, atol=1e-7)


@torch.no_grad()
def test_norms_hide_the_length_of_a_prompt():
    """So the gradient of its mask is next to nothing where a norm comes first, but not those of its pieces."""
    model = get_peft_model(FAMILIES["vit"].model(), config(init_weights=False))
    tokens, pieces = slopes(model)
    assert tokens.abs().max() < 1e-3 * pieces.abs().max()


def test_without_rewinding_the_trained_values_stay():
    model, _ = trained()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    prune_prompts(model, [BATCH], rewind=False, progress=False)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="'default' is pruned already"):
        prune_prompts(model, [BATCH], progress=False)
    model.train()
    model(**BATCH).loss.backward()
    mask = next(b for n, b in model.named_buffers() if n.endswith("token_mask"))
    for w in weights_of(model, "e2vpt_tokens").values():
        assert not w["prompts"].grad[mask == 0].any()
        assert w["prompts"].grad[mask == 1].any()
    assert len(weights_of(model, "e2vpt_tokens")) == DEPTH


def test_bad_pruning_leaves_the_adapter_as_it_was():
    model, _ = trained()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    nothing = BATCH | {"pixel_values": torch.full_like(BATCH["pixel_values"], torch.nan)}
    for fields, batches, message in (
        ({"token_keep": 0}, [BATCH], "token_keep is 0: must be a number above 0 and at most 1"),
        ({"piece_keep": 1.5}, [BATCH], "piece_keep is 1.5: must be"),
        ({"token_keep": True}, [BATCH], "token_keep is True: must be"),
        ({"adapter_name": "nobody"}, [BATCH], "'nobody' has no prompts that can be pruned: there is none"),
        ({}, [], "dataloader gives no batch"),
        ({}, [nothing], "pixel_values of batch 0 are not finite"),
        ({}, [images(2)], "batch 0 must be a mapping with the tensors pixel_values and labels"),
        ({}, [BATCH | {"labels": torch.tensor([0, 1, 2, 3])}], "labels must be from 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_prompts(model, batches, **fields, progress=False)
    model.add_adapter("other", config())
    with pytest.raises(ValueError, match="'other' is not active"):
        prune_prompts(model, [BATCH], adapter_name="other", progress=False)
    after = model.state_dict()
    assert all(torch.equal(after[n], v) for n, v in before.items())
    assert not any(b.requires_grad for b in model.buffers())
    with pytest.raises(ValueError, match="its config is VPTConfig, not E2VPTConfig"):
        prune_prompts(get_peft_model(FAMILIES["vit"].model(), VPTConfig()), [BATCH], progress=False)


def test_trained_parameters_of_a_file(tmp_path):
    model, _ = trained()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    counted = sum(config().trained_parameters(n, tuple(t.shape)) for n, t in saved.items())
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_kv_tokens", 0), ("num_virtual_tokens", 1.5), ("pieces", 0), ("dropout", 1.0), ("dropout", float("nan"))],
)
def test_bad_fields(field, value):
    with pytest.raises(ValueError, match=rf"E2VPTConfig.{field} is {value!r}: must be"):
        E2VPTConfig(**{field: value})


@pytest.mark.parametrize(
    ("fields", "name", "message"),
    [
        ({"pieces": 5}, "vit", r"E2VPTConfig.pieces is 5: must be a divisor of \d+, the backbone's width"),
        ({"pieces": 4}, "poolformer", "E2VPTConfig"),
        ({"pieces": 4}, "resnet", "E2VPTConfig"),
    ],
)
def test_models_that_do_not_fit_are_left_as_they_were(fields, name, message):
    model = MODELS[name].model()
    before = {key: id(module) for key, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, E2VPTConfig(**fields))
    assert before == {key: id(module) for key, module in model.named_modules()}
