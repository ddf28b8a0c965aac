"""Adapters at blocks of hierarchical, windowed, map-shaped and post-norm backbones, against equations in plain torch.

The reference is a second copy of each backbone whose blocks run as `written_blocks` has them, with the adapter's
equation at its place.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from written_blocks import BACKBONES, MODELS_OF, rewritten

from hf_visual_peft import (
    AdapterPlusConfig,
    AdaptFormerConfig,
    ConvpassConfig,
    DTLConfig,
    HoulsbyConfig,
    LSTConfig,
    MonaConfig,
)
from hf_visual_peft.coverage.cell import tensors_of
from hf_visual_peft.methods.adapter.convpass import Convpass


# equations, of what a block has at a sub-layer: the stream before it, that after its norm, what the sub-layer adds


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def adaptformer(w, stream, normed, added, layout):
    return 2.0 * linear(F.relu(linear(stream, w, "down")), w, "up")


def convpass(w, stream, normed, added, layout):
    def convolve(maps):
        return F.conv2d(maps, w["conv.weight"], w["conv.bias"], padding=1)

    hidden = linear(normed, w, "down")
    hidden = layout.convolved(hidden * torch.sigmoid(1.702 * hidden), convolve)
    return 0.5 * linear(hidden * torch.sigmoid(1.702 * hidden), w, "up")


def houlsby(w, stream, normed, added, layout):
    return linear(F.gelu(linear(added, w, "down")), w, "up")


def mona(w, stream, normed, added, layout):
    def convolve(maps):
        sizes = (
            F.conv2d(maps, w[f"convs.{i}.weight"], w[f"convs.{i}.bias"], padding=k // 2, groups=maps.shape[1])
            for i, k in enumerate((3, 5, 7))
        )
        maps = maps + sum(sizes) / 3
        return maps + F.conv2d(maps, w["mix.weight"], w["mix.bias"])

    x = stream + added
    own = F.layer_norm(x, x.shape[-1:], w["norm.weight"], w["norm.bias"])
    hidden = layout.convolved(linear(own * w["gamma"] + x * w["gamma_x"], w, "down"), convolve)
    return linear(F.gelu(hidden), w, "up")


def adapterplus(w, stream, normed, added, layout):
    x = stream + added
    return w["scale"] * linear(F.gelu(linear(x, w, "bottleneck.down")), w, "bottleneck.up")


BOTH = ("attention", "mlp")
METHODS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "adaptformer": (AdaptFormerConfig(r=4, scale=2.0, init_weights=False), adaptformer, ("mlp",)),
    "convpass": (ConvpassConfig(r=4, scale=0.5, conv_init="xavier", init_weights=False), convpass, BOTH),
    "houlsby": (HoulsbyConfig(r=4, init_weights=False), houlsby, BOTH),
    "mona": (MonaConfig(r=6, init_weights=False), mona, BOTH),
    "adapterplus": (AdapterPlusConfig(r=4, init_weights=False), adapterplus, ("mlp",)),
}


def weights_of(model: nn.Module, slot: str) -> dict[str, dict[str, Tensor]]:
    """{block: {name: weight}} of one slot of the adapter."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        path, _, tail = name.partition(f".{slot}.default.")
        if tail:
            found.setdefault(path.removeprefix("base_model.model.").removesuffix(".adapters"), {})[tail] = parameter
    return found


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-5 * e.abs().max().item())


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_blocks_are_written_right(name):
    """Without an adapter, the blocks as they are written here are those of the backbone."""
    tiny = MODELS_OF[name]
    arguments = tiny.arguments(2, BACKBONES[name][2])
    base = tiny.model()
    expected = tensors_of(tiny.call(base, arguments))
    rewritten(base, name, {}, None)
    assert_close(tensors_of(tiny.call(base, arguments)), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_adapters(name, method):
    config, equation, sublayers = METHODS[method]
    tiny = MODELS_OF[name]
    arguments = tiny.arguments(2, BACKBONES[name][2])
    model = get_peft_model(tiny.model(), config).eval()
    actual = tensors_of(tiny.call(model, arguments))
    weights = {sublayer: weights_of(model, f"{method}_{sublayer}") for sublayer in sublayers}
    base = tiny.model()
    before = tensors_of(tiny.call(base, arguments))
    seen = rewritten(base, name, weights, equation)
    assert_close(actual, tensors_of(tiny.call(base, arguments)))
    assert sorted(seen) == sorted((path, sublayer) for sublayer in weights for path in weights[sublayer])
    assert all((a - b).abs().max() > 1e-2 * b.abs().max() for a, b in zip(actual, before, strict=True))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["swin", "swinv2", "hiera", "sam", "vitdet", "focalnet", "swiftformer", "mobilevit"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    """Checkpoints are around blocks, around stages, or around both."""
    tiny = MODELS_OF[name]
    arguments = tiny.arguments(2)
    found, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny.model(), ConvpassConfig(r=4, dropout=0.0, init_weights=False)).train()
        calls.append(0)
        for module in model.modules():
            if isinstance(module, nn.Dropout | nn.BatchNorm2d):
                module.eval()
            if isinstance(module, Convpass):
                module.register_forward_hook(lambda *_: calls.append(calls.pop() + 1))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        outputs = tensors_of(tiny.call(model, arguments))
        sum(output.square().sum() for output in outputs).backward()
        found.append([p.grad for n, p in model.named_parameters() if ".convpass_" in n])
    assert_close(found[1], found[0])
    assert calls[1] >= 2 * calls[0] > 0


CHECKPOINTED = [
    "swin",
    "swinv2",
    "hiera",
    "pvt_v2",
    "segformer",
    "focalnet",
    "swiftformer",
    "mobilevit",
    "mobilevitv2",
]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("config", [LSTConfig(r=2, init_weights=False), DTLConfig(add_from=0, init_weights=False)])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_states_of_side_networks_survive_checkpoints(name, config):
    """Also where transformers puts checkpoints around stages: what went from block to block is gone by then."""
    tiny = MODELS_OF[name]
    first, second = tiny.arguments(2), tiny.arguments(2)
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny.model(), config).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout | nn.BatchNorm2d):
                module.eval()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        outputs = [x for given in (first, second) for x in tensors_of(tiny.call(model, given)) if x.requires_grad]
        sum(output.square().sum() for output in outputs).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[1]) == len(found[0]) > 0
    assert_close(found[1], found[0])
