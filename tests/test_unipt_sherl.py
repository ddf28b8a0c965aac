"""UniPT and SHERL on DINOv2 and on Swin, against plain torch, and bad input. (On ViT: reference vectors.)"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equations import adapted, assert_equal, weights_by_path
from peft import get_peft_model

from hf_visual_peft import SHERLConfig, UniPTConfig, find_backbone
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.methods.side.sherl import SHERL
from hf_visual_peft.methods.side.unipt import UniPT
from hf_visual_peft.sites import BlockView


def norm(w, name, x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def unipt(w, states, _):
    *others, anchor = states
    confidence = torch.stack([linear(w, "gate", anchor.mean(1) * u.mean(1)) for u in others]).softmax(0)
    mixed = torch.zeros(())
    for share, u in zip(confidence, others, strict=True):
        likeness = F.relu(anchor @ u.mT)
        mixed = mixed + share[:, None] * (likeness @ u / (likeness.sum(-1, keepdim=True) + 1e-8) + u)
    merged = anchor + norm(w, "project.norm", linear(w, "project.down", mixed))
    return linear(w, "up", F.relu(merged))


def sherl(w, states, x):
    *others, guide = states
    scores = [F.relu(linear(w, "use", u * guide)) for u in others]
    shares = [
        score / sum(F.relu(F.cosine_similarity(u, other, dim=-1)) for other in others)[..., None]
        for score, u in zip(scores, others, strict=True)
    ]
    mixed = guide + sum(a / (sum(shares) + 1e-8) * u for a, u in zip(shares, others, strict=True))
    return norm(w, "norm", linear(w, "up", F.relu(mixed)), 1e-12) + torch.tanh(w["gate"] / 0.1) * x


METHODS = {
    "unipt": (UniPTConfig(r=5, init_weights=False), unipt),
    "sherl": (SHERLConfig(r=5, init_weights=False), sherl),
}


def reduced(w, part, x):
    return norm(w, f"{part}.norm", linear(w, f"{part}.down", x))


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_equation_on_dinov2(method):
    config, equation = METHODS[method]
    (blocks, x, final), model, actual, _ = adapted("dinov2_registers", config)
    pieces = weights_by_path(model, f"{method}_piece")
    states = []
    for block, w in zip(blocks, pieces.values(), strict=True):
        if any(name.startswith("before.") for name in w):
            states.append(reduced(w, "before", x))
        x = x + block.attention(block.norm(1, x))
        x = x + block.mlp(block.norm(2, x))
        states.append(reduced(w, "behind", x))
    assert len(states) == len(blocks) + (method == "unipt")
    assert_equal(actual, final(equation(w, states, x)))


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_equation_on_swin(method):
    """Streams of earlier stages are means over the cells that are merged."""
    config, equation = METHODS[method]
    tiny = MODELS["swin"]
    arguments = tiny.arguments(2)
    base, seen = tiny.model(), []
    paths = [block.path for block in find_backbone(base).blocks]
    for path in paths:
        base.get_submodule(path).register_forward_hook(
            lambda module, args, output: seen.append((args[0], output[0] if isinstance(output, tuple) else output))
        )
    tiny.call(base, arguments)
    torch.manual_seed(0)
    model = get_peft_model(tiny.model(), config).eval()
    found = []
    model.get_submodule(f"base_model.model.{paths[-1]}").register_forward_hook(
        lambda module, args, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    tiny.call(model, arguments)
    pieces = weights_by_path(model, f"{method}_piece")
    states = []
    last = seen[-1][1].shape[1]
    for path, (before, behind) in zip(paths, seen, strict=True):
        w = next(w for name, w in pieces.items() if name.startswith(path))
        parts = [("before", before)] * ("before.down.weight" in w) + [("behind", behind)]
        for part, x in parts:
            state = reduced(w, part, x)
            side, to = (int(count**0.5) for count in (state.shape[1], last))
            maps = state.transpose(1, 2).unflatten(2, (side, side))
            states.append(F.avg_pool2d(maps, side // to).flatten(2).transpose(1, 2))
    assert_equal(found[0], equation(w, states, behind))


@torch.no_grad()
def test_padding_changes_nothing():
    """Tokens that are padding count in no mean and are read by no token."""
    torch.manual_seed(0)
    equation = UniPT(8, 4, first=False).eval()
    state, stream = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    seen = torch.arange(6) < 4
    whole, _ = equation(state, BlockView(after=stream, seen=seen.expand(2, -1)))
    cut, _ = equation(state[:, :4], BlockView(after=stream[:, :4]))
    torch.testing.assert_close(whole[:, :4], cut)


def test_the_gate_of_sherl_starts_closed():
    equation = SHERL(8, 4, 0.0, first=False)
    state = torch.randn(2, 3, 4)
    outputs = [equation(state, BlockView(after=torch.randn(2, 3, 8)))[0] for _ in range(2)]
    assert equation.gate.item() == 0
    assert not torch.equal(*outputs)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UniPTConfig(r=0), "UniPTConfig.r is 0: must be an integer from 1 to 10000"),
        (lambda: SHERLConfig(r=2.0), "SHERLConfig.r is 2.0"),
        (lambda: SHERLConfig(dropout=1), "SHERLConfig.dropout is 1: must be a finite number of at least 0"),
    ],
)
def test_bad_fields(build, message):
    with pytest.raises(ValueError, match=message):
        build()
