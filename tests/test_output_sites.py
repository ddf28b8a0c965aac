"""An equation at one module changes the output of this module as it says, and nothing else in the model."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from written_blocks import MODELS_OF

from hf_visual_peft import BitFitConfig, SSFConfig, find_backbone
from hf_visual_peft.coverage.cell import tensors_of
from hf_visual_peft.sites import output_channels


MODELS = ("vit", "swin", "dinov3_vit")  # plain, windowed, rotary
PATHS = {
    name: [*backbone.outside, *backbone.blocks[1].modules(("norm1", "query", "output", "norm2", "fc2"))]
    for name in MODELS
    for backbone in [find_backbone(MODELS_OF[name].model())]
}


@pytest.fixture(scope="module")
def bases():
    return {name: MODELS_OF[name].model().eval() for name in MODELS}


def called(tiny, model):
    """The model's output, and that of every module of the base that is called."""
    seen, handles = {}, []
    for path, module in model.named_modules():
        if not any(True for _ in module.children()) and ".adapters." not in path and "ssf_" not in path:
            name = path.removeprefix("base_model.model.").replace(".base_layer", "")
            keep = lambda module, args, output, name=name: seen.setdefault(name, []).append(output)  # noqa: E731
            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        found = tensors_of(tiny.call(model, tiny.arguments(2, None)))
    for handle in handles:
        handle.remove()
    return found, seen


@pytest.mark.parametrize("config", [SSFConfig, BitFitConfig], ids=lambda config: config.__name__)
@pytest.mark.parametrize(("name", "path"), [(name, path) for name, paths in PATHS.items() for path in paths])
def test_one_module_alone(bases, name, path, config):
    base, tiny = bases[name], MODELS_OF[name]
    module = base.get_submodule(path)
    if config is BitFitConfig and module.bias is None:
        pytest.skip("it has no bias to shift")
    torch.manual_seed(1)
    fields = {"target_modules": [path], "init_weights": False, "modules_to_save": []}
    model = get_peft_model(copy.deepcopy(base), config(**fields)).eval()
    weights = {n.rpartition(".")[2]: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    shape = (-1, 1, 1) if isinstance(module, torch.nn.Conv2d) else (-1,)
    assert weights
    assert all(weight.shape == (output_channels(module),) for weight in weights.values())

    def changed(module, args, output):
        scale, shift = weights.get("scale"), weights["shift"].view(shape)
        return (output if scale is None else output * scale.view(shape)) + shift

    expected_model = copy.deepcopy(base)
    expected_model.get_submodule(path).register_forward_hook(changed)
    expected, others = called(tiny, expected_model)
    found, seen = called(tiny, model)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
    assert seen.keys() >= others.keys() - {path}
    before = [each for each in others if each != path]
    for each in before[: list(others).index(path)]:  # what runs before the module is the same to the bit
        pairs = zip(tensors_of(seen[each]), tensors_of(others[each]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
