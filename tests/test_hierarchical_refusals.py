"""What backbones with several stages, windows or no tokens refuse, before anything is changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from test_hierarchical import assert_close

from hf_visual_peft import AdaptFormerConfig, ConvpassConfig, SSFConfig, VPTConfig, get_method
from hf_visual_peft.backbones.architectures import architecture_of
from hf_visual_peft.backbones.architectures import table as tables
from hf_visual_peft.backbones.backbone import BackboneError
from hf_visual_peft.coverage.cell import tensors_of
from hf_visual_peft.coverage.models import MODELS


SWIN_ROLES = {
    "norm1": "layernorm_before",
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "output": "attention.o_proj",
    "norm2": "layernorm_after",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


@pytest.mark.parametrize("role", SWIN_ROLES)
def test_a_role_missing_in_one_block(role):
    """Nothing is adapted, whatever method needs of the blocks."""
    model = MODELS["swin"].model()
    block = model.get_submodule("swin.encoder.layers.1.blocks.0")
    parent, _, name = SWIN_ROLES[role].rpartition(".")
    delattr(block.get_submodule(parent), name)
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(
        BackboneError,
        match=rf"SwinModel does not fit its role table: 'swin.encoder.layers.1.blocks.0' has no '{role}' "
        rf"\(looked for {SWIN_ROLES[role]}\).*register_architecture",
    ):
        get_peft_model(model, AdaptFormerConfig(r=4))
    assert names == [n for n, _ in model.named_modules()]


@pytest.mark.parametrize("role", [role for role in SWIN_ROLES if role != "fc1"])
def test_two_candidates_for_a_role(role, monkeypatch):
    model = MODELS["swin"].model()
    other = "mlp.fc1" if role != "norm1" else "layernorm_after"
    table = replace(architecture_of(model.swin), **{role: (SWIN_ROLES[role], other)})
    monkeypatch.setitem(tables._ARCHITECTURES["vision"], "SwinModel", table)
    path = "swin.encoder.layers.0.blocks.0"
    with pytest.raises(
        BackboneError,
        match=rf"'{path}' has several modules for role '{role}': {path}.{SWIN_ROLES[role]}, {path}.{other}\. ",
    ):
        get_peft_model(model, SSFConfig())


@pytest.mark.parametrize("name", ["resnet", "convnext", "convnextv2", "timm_resnet", "efficientnet"])
@pytest.mark.parametrize("method", ["vpt", "adaptformer", "convpass", "mona"])
def test_sequence_methods_on_convolutional_networks(name, method):
    """The error names methods that work there, and these do."""
    small = {"r": 2} if method != "vpt" else {}
    model = MODELS[name].model()
    names = [n for n, _ in model.named_modules()]
    config = get_method(method).config_cls(**small)
    with pytest.raises(
        BackboneError, match=rf"^{type(config).__name__}: .*Methods that work on it: .*ssf\b.*\.$"
    ) as error:
        get_peft_model(model, config)
    assert names == [n for n, _ in model.named_modules()]
    advised = str(error.value).rpartition(": ")[2].removesuffix(".").split(", ")
    assert method not in advised
    for other in advised:
        get_peft_model(MODELS[name].model(), get_method(other).config_cls())


@pytest.mark.parametrize("size", [(48, 32), (64, 16), (16, 64)], ids=str)
@torch.no_grad()
def test_hiera_knows_the_places_of_tokens_for_one_size(size):
    """Also where another shape has as many tokens as the one it knows."""
    tiny = MODELS["hiera"]
    model = get_peft_model(tiny.model(), ConvpassConfig(r=4, init_weights=False)).eval()
    with pytest.raises(ValueError, match="HieraEncoder knows the places of tokens for one image size only"):
        tiny.call(model, tiny.arguments(2, size))
    with model.disable_adapter():
        assert_close(
            tensors_of(tiny.call(model, tiny.arguments(2, size))),
            tensors_of(tiny.call(tiny.model(), tiny.arguments(2, size))),
        )
    assert tiny.call(model, tiny.arguments(2)).logits.isfinite().all()


def test_prompts_that_stay_in_the_sequence_of_windows():
    model = MODELS["swin"].model()
    with pytest.raises(ValueError, match=r"^VPTConfig does not fit SwinModel with tokens that pass .*deep=True\.$"):
        get_peft_model(model, VPTConfig(num_virtual_tokens=2, deep=False))
    assert not any("vpt" in name for name, _ in model.named_modules())
