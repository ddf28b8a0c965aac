"""DyT: its equation and loss against plain torch, and that the MLP leaves out what was not chosen."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from equations import adapted, assert_equal, both, weights_by_path, weights_of
from families import FAMILIES, images
from peft import LoraConfig, get_peft_model

from hf_visual_peft import AdaptFormerConfig, DyTConfig, HoulsbyConfig, VPTConfig, auxiliary_loss, find_backbone
from hf_visual_peft.coverage.cell import tensors_of
from hf_visual_peft.coverage.models import MODELS


LABELS = torch.tensor([0, 1])


def config(**fields):
    return DyTConfig(**{"r": 3, "dropout": 0.0, "init_weights": False} | fields)


def spread(model, threshold=0.0):
    """Let dispatchers choose by content: of random weights, all patches would get about the same number."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dyt_dispatcher" in name and name.endswith("weight"):
                torch.manual_seed(len(name) + int(name.split("layers.")[-1][0] if "layers." in name else 0))
                parameter.copy_(torch.randn_like(parameter))
            elif "dyt_dispatcher" in name:
                parameter.fill_(threshold)
    return model


def branch(w, z):
    return F.relu(z @ w["down.weight"].T + w["down.bias"]) @ w["up.weight"].T + w["up.bias"]


def run(blocks, dispatchers, adapters, x, prefix, every=False):
    """The stream, and the decisions on all patches."""
    decisions = []
    for index, block in enumerate(blocks):
        z = x + block.attention(block.norm(1, x))
        w = dispatchers[index]
        m = (torch.sigmoid(z @ w["linear.weight"].T + w["linear.bias"]) > 0.5).float()
        m[:, :prefix] = 1
        decisions.append(m[:, prefix:, 0])
        x = z + (1.0 if every else m) * block.mlp(block.norm(2, z)) + branch(adapters[index], z)
    return x, torch.stack(decisions)


def keep_input(seen, path, module, args):
    seen.setdefault(path, [args[0]])


def keep_output(seen, path, module, args, output):
    seen[path].append(output[0] if isinstance(output, tuple) else output)


class Counter:
    """How many tokens the first linears of MLPs have read, and which share of all these are."""

    def __init__(self, model):
        self.tokens, self.blocks = 0, find_backbone(model).blocks
        for block in self.blocks:
            model.get_submodule(block.roles["fc1"][0]).register_forward_pre_hook(self.count)

    def count(self, module, args):
        self.tokens += args[0].numel() // module.weight.shape[1]

    def take(self):
        found, self.tokens = self.tokens, 0
        return found


@both
def test_equation_loss_and_what_the_mlp_reads(name):
    (blocks, x, norm), model, _, family = adapted(name, config())
    spread(model)
    dispatchers, adapters = weights_of(model, "dyt_dispatcher"), weights_of(model, "dyt_mlp")
    backbone = getattr(model.get_base_model(), model.get_base_model().base_model_prefix)
    counter = Counter(model.get_base_model())
    with torch.no_grad():
        stream, decisions = run(blocks, dispatchers, adapters, x, family.prefix)
        actual = backbone(**family.inputs(2)).last_hidden_state
    assert_equal(actual, norm(stream))
    assert 0.1 < decisions.mean() < 0.9
    assert counter.take() == decisions.sum() + len(blocks) * len(x) * family.prefix
    # with gradients, the MLP acts on all tokens, and the result is the same
    assert_equal(backbone(**family.inputs(2)).last_hidden_state.detach(), actual)
    assert counter.take() == len(blocks) * len(x) * x.shape[1]

    out = model(**family.inputs(2), labels=LABELS)
    plain = F.cross_entropy(out.logits, LABELS)
    complete = copy.deepcopy(model)
    with torch.no_grad():
        for each, parameter in complete.named_parameters():
            if "dyt_dispatcher" in each:
                parameter.fill_(1e4 if each.endswith("bias") else 0.0)
    teacher = complete(**family.inputs(2)).logits.detach()
    p, q = (F.softmax(logits, dim=-1) for logits in (teacher, out.logits))
    wanted = 2 * (decisions.mean() - 0.5) ** 2 + F.cross_entropy(teacher, LABELS)
    wanted = wanted + (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(out.loss - plain, wanted, rtol=1e-4, atol=1e-5)
    model(**family.inputs(2))
    found = auxiliary_loss(model, LABELS, lambda logits: F.cross_entropy(logits, LABELS))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["swin", "swinv2", "timm_swin", "timm_vit", "pvt_v2", "poolformer"])
@torch.no_grad()
def test_other_blocks(name):
    """The MLP's output is that of the base model on the tokens before it, where chosen, in windows and maps, too."""
    entry = MODELS[name]
    torch.manual_seed(0)
    alone = config(complete_weight=0.0, distillation=0.0)  # without the pass of the complete model
    model = spread(get_peft_model(entry.model(), alone).eval())
    for path, module in model.named_modules():
        if path.endswith("dyt_mlp"):
            module["default"].scale = 0.0
    entry.call(model, entry.arguments(1))  # which tries once whether the MLP can leave tokens out
    counter = Counter(model.get_base_model())
    first = tensors_of(entry.call(model, entry.arguments(2)))
    read = counter.take()
    with torch.enable_grad():
        second = tensors_of(entry.call(model, entry.arguments(2)))
    every = counter.take()
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-5 * b.abs().max().item())
    assert read == every if name in ("pvt_v2",) else read < 0.9 * every


@torch.no_grad()
def test_the_stream_of_a_token_that_is_left_out_is_as_before_the_mlp():
    for name in ("swin", "swinv2"):
        entry = MODELS[name]
        model = get_peft_model(entry.model(), config()).eval()
        spread(model, -1e4)  # chooses none, and there is no CLS
        weights = weights_by_path(model, "adapters.dyt_mlp")
        inner, seen = model.get_base_model(), {}
        for block in find_backbone(inner).blocks:
            entrance = inner.get_submodule(block.entrances["mlp"])
            # before the hook that takes tokens away; a trial of the MLP comes later
            entrance.register_forward_pre_hook(partial(keep_input, seen, block.path), prepend=True)
            inner.get_submodule(block.path).register_forward_hook(partial(keep_output, seen, block.path))
        entry.call(model, entry.arguments(2))
        for path, (z, out) in seen.items():
            expected = z + branch(weights[path], z)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_beside_prompts_and_other_adapters():
    """Prompts pass the MLP; branches at its output read zeros where it was left out, however that was computed."""
    for other in (
        VPTConfig(num_virtual_tokens=2, modules_to_save=[], init_weights=False),
        HoulsbyConfig(r=2, modules_to_save=[], init_weights=False),
        AdaptFormerConfig(r=2, modules_to_save=[], init_weights=False),
        LoraConfig(r=2, target_modules=["fc1", "fc2"], init_lora_weights=False),
    ):
        model = FAMILIES["vit"].model()
        torch.manual_seed(0)
        model.add_adapter(config(modules_to_save=[]), "dyt")
        model.add_adapter(other, "other")
        model.set_adapter(["dyt", "other"])
        spread(model.eval())
        first = model(**images(2)).logits
        with torch.enable_grad():
            second = model(**images(2)).logits.detach()
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5 * first.abs().max().item())


@torch.no_grad()
def test_mixed_batches():
    model = get_peft_model(FAMILIES["vit"].model(), config()).eval()
    model.add_adapter("second", config())
    spread(model)
    pixels = images(3)["pixel_values"]
    wanted = []
    for adapter, row in zip(("default", "second"), pixels, strict=False):
        model.set_adapter(adapter)
        wanted.append(model.eval()(pixel_values=row[None]).logits)
    with model.disable_adapter():
        wanted.append(model(pixel_values=pixels[2:]).logits)
    mixed = model(pixel_values=pixels, adapter_names=["default", "second", "__base__"]).logits
    torch.testing.assert_close(mixed, torch.cat(wanted), rtol=0, atol=1e-5 * mixed.abs().max().item())


def test_training_draws_and_trains_the_dispatchers():
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), config(init_weights=True)).train()
    a, b = (model(**images(2)).logits for _ in range(2))
    assert not torch.equal(a, b)
    model(**images(2), labels=LABELS).loss.backward()
    for name, parameter in model.named_parameters():
        if "dyt_dispatcher" in name:
            assert parameter.grad.abs().sum() > 0, name
    # the share of chosen tokens alone moves them, too
    model.zero_grad()
    model.base_model.peft_config["default"].complete_weight = 0.0
    model.base_model.peft_config["default"].distillation = 0.0
    model(**images(2))
    auxiliary_loss(model).backward()
    grads = [p.grad for name, p in model.named_parameters() if "dyt_dispatcher.default.linear.bias" in name]
    assert all(g is not None and g.abs().sum() > 0 for g in grads)


def test_half_of_the_tokens_are_chosen_at_the_start_and_keep_moves_the_share():
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), config(init_weights=True, keep=1.0)).train()
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "dispatcher" in n], lr=0.3)
    shares = []
    for _ in range(12):
        model(**images(4))
        losses = auxiliary_loss(model, torch.tensor([0, 1, 2, 0]), lambda z: 0.0 * z.sum())
        shares.append(losses.item())
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
    assert 0.2 < math.sqrt(shares[0] / 2) < 0.8
    assert shares[-1] < 0.5 * shares[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 1.5}, "DyTConfig.keep is 1.5: must be a share from 0 to 1"),
        ({"keep": -0.1}, "DyTConfig.keep is -0.1"),
        ({"r": 0}, "DyTConfig.r is 0"),
        ({"r": 17}, r"DyTConfig.r is 17: must be an integer from 1 to 16 \(the backbone's width\)"),
        ({"scale": "large"}, "DyTConfig.scale is 'large': must be a finite number or \"learnable\""),
        ({"temperature": 0.0}, "DyTConfig.temperature is 0.0"),
        ({"distillation": float("inf")}, "DyTConfig.distillation is inf"),
        ({"complete_weight": -1}, "DyTConfig.complete_weight is -1"),
        ({"keep_weight": float("nan")}, "DyTConfig.keep_weight is nan"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(FAMILIES["vit"].model(), DyTConfig(**fields))
