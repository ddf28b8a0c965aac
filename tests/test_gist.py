"""GIST: its token, what the head makes of it, and the loss, against plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equations import adapted, assert_equal, both, weights_of
from families import FAMILIES
from peft import get_peft_model

from hf_visual_peft import BackboneError, GISTConfig, SharedLoRAConfig, auxiliary_loss
from hf_visual_peft.coverage.models import MODELS


LABELS = torch.tensor([0, 1])
HEADS = {"vit": lambda x: x[:, 0], "dinov2_registers": lambda x: torch.cat([x[:, 0], x[:, 5:].mean(1)], dim=1)}


def run(blocks, x, prefix, token, bottlenecks):
    """The blocks with the token after the prefix tokens; patches and prefix, and the token."""
    x = torch.cat([x[:, :prefix], token.expand(len(x), -1, -1), x[:, prefix:]], dim=1)
    for block, bottleneck in zip(blocks, bottlenecks, strict=True):
        x = x + block.attention(block.norm(1, x)) + 0.1 * bottleneck(x)
        x = x + block.mlp(block.norm(2, x)) + 0.1 * bottleneck(x)
    return torch.cat([x[:, :prefix], x[:, prefix + 1 :]], dim=1), x[:, prefix : prefix + 1]


def bottleneck(w):
    return lambda x: F.gelu(x @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]


@both
@pytest.mark.parametrize("r", [0, 3])
def test_equation_and_loss(name, r):
    config = GISTConfig(r=r, dropout=0.0, init_weights=False)
    (blocks, x, norm), model, actual, family = adapted(name, config)
    (token,) = (w["token"] for w in weights_of(model, "gist_token").values())
    branches = [lambda x: torch.zeros(())] * len(blocks)
    if r:
        branches = [bottleneck(weights_of(model, f"gist_bottleneck{i}")[i]) for i in range(len(blocks))]
    stream, gist = run(blocks, x, family.prefix, token, branches)
    assert_equal(actual, norm(stream))
    base = model.get_base_model()
    head = base.classifier.modules_to_save["default"]
    logits = head(HEADS[name](norm(stream)))
    token_logits = head(HEADS[name](norm(gist).expand_as(stream)))
    p, q = (F.softmax(z / 3.0, dim=-1) for z in (logits, token_logits))
    divergences = ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / len(p)
    auxiliary = 0.5 * F.cross_entropy(token_logits, LABELS) + 0.75 * divergences
    out = model.train()(**family.inputs(2), labels=LABELS)
    assert_equal(out.logits, logits)
    torch.testing.assert_close(out.loss, F.cross_entropy(logits, LABELS) + auxiliary, rtol=1e-4, atol=1e-5)
    model(**family.inputs(2))
    found = auxiliary_loss(model, LABELS, lambda z: F.cross_entropy(z, LABELS))
    torch.testing.assert_close(found, auxiliary, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        out = model(**family.inputs(2), labels=LABELS)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, LABELS))


def test_around_another_method():
    family = FAMILIES["vit"]
    native = family.model()
    native.add_adapter(SharedLoRAConfig(r=2, dropout=0.0, init_weights=False, modules_to_save=[]), "lora")
    native.add_adapter(GISTConfig(dropout=0.0, modules_to_save=[]), "gist")
    native.set_adapter(["lora", "gist"])
    out = native.train()(**family.inputs(2), labels=LABELS)
    plain = F.cross_entropy(out.logits, LABELS)
    assert out.loss > plain
    out.loss.backward()
    names = [name for name, p in native.named_parameters() if p.grad is not None and p.grad.any()]
    assert any("sharedlora_" in name for name in names)
    assert any("gist_token" in name for name in names)
    native.set_adapter("lora")
    out = native(**family.inputs(2), labels=LABELS)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, LABELS))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    family = FAMILIES["vit"]
    torch.manual_seed(0)
    model = get_peft_model(family.model(), GISTConfig(r=2, dropout=0.0, init_weights=False)).train()

    def gradients():
        model.zero_grad()
        model(**family.inputs(2), labels=LABELS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_labels_are_asked_for():
    family = FAMILIES["vit"]
    model = get_peft_model(family.model(), GISTConfig()).train()
    model(**family.inputs(2))
    with pytest.raises(
        ValueError, match="'default' holds the loss of the task a second time. Call the model with labels"
    ):
        auxiliary_loss(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": -1}, "GISTConfig.r is -1: must be an integer of at least 0"),
        ({"temperature": 0}, "GISTConfig.temperature is 0"),
        ({"interaction": -0.5}, "GISTConfig.interaction is -0.5"),
        ({"token_weight": float("nan")}, "GISTConfig.token_weight is nan"),
        ({"layers_to_transform": [0, 1]}, "consecutive up to 2, but they are .0, 1."),
        ({"layers_to_transform": [0, 2]}, "consecutive up to 2, but they are .0, 2."),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(FAMILIES["vit"].model(), GISTConfig(**fields))


def test_windows_get_no_token():
    """A token that passes through all blocks cannot join windows."""
    with pytest.raises((ValueError, BackboneError), match="GISTConfig"):
        get_peft_model(MODELS["swin"].model(), GISTConfig())
