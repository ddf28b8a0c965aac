"""Models that are compiled, distributed or adapted already are refused before anything of them changes."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hf_visual_peft as hvp


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.fc2(self.fc1(self.norm(x)).relu())


class Unlisted(nn.Module):
    """A network of a class that no table knows."""

    def __init__(self):
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, 16, 8, 8), nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x.mean(dim=1)


class Around(nn.Module):
    """A model whose backbone only is wrapped."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def compiled(model):
    return torch.compile(model)


def compiled_in_place(model):
    model.compile()
    return model


def compiled_block(model):
    next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0].compile()
    return model


def wrapped_inside(model):
    return Around(nn.DataParallel(model))


CASES = {
    compiled: "is compiled",
    compiled_in_place: "is compiled",
    compiled_block: "is compiled",
    nn.DataParallel: "is wrapped in DataParallel",
    wrapped_inside: "is wrapped in DataParallel",
}


def state(model):
    """Modules with their hooks, parameters with their values, and what stands in each module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    modules = [(n, id(m), type(m), *(len(getattr(m, each)) for each in hooks)) for n, m in model.named_modules()]
    own = [(n, sorted(vars(m))) for n, m in model.named_modules()]
    values = [(n, id(p), p.requires_grad, p.detach().sum().item()) for n, p in model.named_parameters()]
    return modules, own, values


@pytest.mark.parametrize("make", [Unlisted, FAMILIES["vit"].model], ids=["unlisted", "listed"])
@pytest.mark.parametrize("wrap", CASES, ids=lambda wrap: wrap.__name__)
def test_compiled_and_wrapped_models_are_refused(wrap, make):
    model = wrap(make())
    before = state(model)
    for config in (hvp.AdaptFormerConfig(r=4), hvp.SSFConfig()):
        with pytest.raises(hvp.BackboneError, match=f"{CASES[wrap]}.*get_peft_model on the plain model: .* after"):
            get_peft_model(model, config)
        assert state(model) == before


def distributed(model):
    return nn.parallel.DistributedDataParallel(model)


def sharded(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def sharded_block(model):
    fully_shard(
        next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0], mesh=init_device_mesh("cpu", (1,))
    )
    return model


@pytest.mark.parametrize("make", [Unlisted, FAMILIES["vit"].model], ids=["unlisted", "listed"])
@pytest.mark.parametrize(
    ("wrap", "said"),
    [(distributed, "wrapped in DistributedDataParallel"), (sharded, "sharded"), (sharded_block, "sharded")],
    ids=["ddp", "fsdp", "fsdp_block"],
)
def test_distributed_models_are_refused(wrap, said, make, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = wrap(make())
        before = state(model)
        for config in (hvp.AdaptFormerConfig(r=4), hvp.SSFConfig(), hvp.SSFConfig(target_modules=["fc1"])):
            with pytest.raises(hvp.BackboneError, match=f"is {said}.*get_peft_model on the plain model: .* after"):
                get_peft_model(model, config)
            assert state(model) == before
        with pytest.raises(hvp.BackboneError, match=f"is {said}"):
            hvp.with_visual_targets(LoraConfig(), model)
        assert state(model) == before
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", CASES, ids=lambda wrap: wrap.__name__)
def test_named_targets_and_methods_of_peft_refuse_the_same(wrap):
    model = wrap(FAMILIES["vit"].model())
    before = state(model)
    with pytest.raises(hvp.BackboneError, match=CASES[wrap]):
        get_peft_model(model, hvp.SSFConfig(target_modules=["fc1"]))
    with pytest.raises(hvp.BackboneError, match=CASES[wrap]):
        hvp.with_visual_targets(LoraConfig(), model)
    assert state(model) == before


@pytest.mark.filterwarnings("ignore:You are trying to modify a model")
@pytest.mark.parametrize("first", [hvp.SSFConfig(), LoraConfig(r=2, target_modules=["fc1"])], ids=["ours", "peft"])
@pytest.mark.parametrize("make", [Unlisted, FAMILIES["vit"].model], ids=["unlisted", "listed"])
def test_a_peft_model_is_not_adapted_again_from_outside(make, first):
    model = get_peft_model(make(), copy.deepcopy(first))
    before = state(model)
    with pytest.raises(ValueError, match=r"AdaptFormerConfig: the model is a PeftModel\w* already.*add_adapter"):
        get_peft_model(model, hvp.AdaptFormerConfig(r=4))
    assert state(model) == before


def test_an_adapted_model_may_be_compiled_and_take_another_adapter():
    model = get_peft_model(FAMILIES["vit"].model(), hvp.SSFConfig())
    model.get_base_model().compile()
    model.add_adapter("second", hvp.SSFConfig())
    assert set(model.peft_config) == {"default", "second"}
