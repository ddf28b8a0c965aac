"""Towers whose stream has the tokens of all images of a batch in one row, without a dimension for the batch."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.models.glm4v.configuration_glm4v import Glm4vVisionConfig
from transformers.models.glm4v.modeling_glm4v import Glm4vVisionModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

import hf_visual_peft as hvp
from hf_visual_peft.coverage.sizes import small_config_for


# frames, rows and columns of patches
SMALL, LARGE, VIDEO = torch.tensor([[1, 4, 4]]), torch.tensor([[1, 4, 8]]), torch.tensor([[2, 4, 8]])
SIZES = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 8}


def moved(model, by=0.1):
    """The model with parameters away from zeros and ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=by)
    return model.eval()


def qwen():
    """A tower with a table."""
    torch.manual_seed(0)
    return moved(Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(embed_dim=16, mlp_ratio=2, **SIZES)))


def glm():
    """A tower without a table."""
    torch.manual_seed(0)
    fields = SIZES | {"image_size": 32, "intermediate_size": 32, "out_hidden_size": 16}
    return moved(Glm4vVisionModel(Glm4vVisionConfig(**fields)))


class Rows(nn.Module):
    """A tower of nobody: patches in one row, with images as its input."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, 8)
        self.layers = nn.ModuleList(Row() for _ in range(2))

    def forward(self, pixel_values):
        rows = self.embed(pixel_values).flatten(2).transpose(1, 2).flatten(0, 1)
        for layer in self.layers:
            rows = layer(rows)
        return rows


class Row(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.mixer, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        x = x + self.mixer(self.norm1(x)).tanh()
        return x + self.down(self.up(self.norm2(x)).relu())


def patches(grid, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(int(grid.prod()), 3 * 2 * 8 * 8, generator=generator)


def outputs(model, *grids):
    """The floating-point outputs for the images of these grids in one batch."""
    pixels = torch.cat([patches(grid, seed) for seed, grid in enumerate(grids)])
    return [value for value in model(pixels, grid_thw=torch.cat(grids)).values() if value.is_floating_point()]


@pytest.mark.parametrize("make", [qwen, glm])
def test_a_packed_stream_is_found(make):
    model = make()
    backbone = hvp.find_backbone(model)
    assert backbone.architecture.stream == "packed"
    assert [block.sublayers for block in backbone.blocks] == [("attention", "mlp")] * 2
    assert backbone.grid is None
    assert backbone.architecture.prompts is None


def test_adaptformer_equals_its_equation():
    model = qwen()
    adapted = moved(get_peft_model(copy.deepcopy(model), hvp.AdaptFormerConfig(r=4, scale=0.7, modules_to_save=[])))
    parts = [dict(block.named_parameters()) for block in adapted.get_base_model().blocks]
    rows = patches(VIDEO)
    for block, own in zip(model.blocks, parts, strict=True):
        down, up = ([each for name, each in own.items() if f".{part}." in name] for part in ("down", "up"))
        assert [each.shape for each in (*down, *up)] == [(4, 16), (4,), (16, 4), (16,)]

        # its branch reads the stream before the norm of the MLP
        def keep(norm, args):
            norm.stream = args[0]

        def add(module, args, output, norm=block.norm2, down=down, up=up):
            return output + 0.7 * ((norm.stream @ down[0].T + down[1]).relu() @ up[0].T + up[1])

        block.norm2.register_forward_pre_hook(keep)
        block.mlp.register_forward_hook(add)
    with torch.no_grad():
        expected = model(rows, grid_thw=VIDEO).last_hidden_state
        found = adapted(rows, grid_thw=VIDEO).last_hidden_state
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(hvp.list_methods()))
def test_images_in_one_row_do_not_see_each_other(name):
    """A method either says that it does not fit, or treats images of a batch as it does each alone."""
    model, method = qwen(), hvp.list_methods()[name]
    modules = [(path, id(module)) for path, module in model.named_modules()]
    try:
        adapted = get_peft_model(model, small_config_for(method, model))
    except ValueError as error:
        assert "Qwen2VisionTransformerPretrainedModel" in str(error)  # noqa: PT017
        assert modules == [(path, id(module)) for path, module in model.named_modules()]
        return
    moved(adapted, 0.3)
    with torch.no_grad():
        together = outputs(adapted, SMALL, VIDEO)
        alone = outputs(adapted, SMALL)
        both = [torch.cat(each) for each in zip(alone, _second(adapted), strict=True)]
        assert all(not torch.allclose(one, other) for one, other in zip(alone, outputs(qwen(), SMALL), strict=True))
    for one, other in zip(together, both, strict=True):
        torch.testing.assert_close(one, other)


def _second(model):
    values = model(patches(VIDEO, 1), grid_thw=VIDEO).values()
    return [value for value in values if value.is_floating_point()]


@pytest.mark.parametrize("make", [qwen, glm])
@pytest.mark.parametrize("name", ["vpt", "lst", "convpass", "dyt"])
def test_methods_that_need_the_tokens_of_each_image_apart_say_so(make, name):
    config = hvp.get_method(name).config_cls(modules_to_save=[])
    with pytest.raises(ValueError, match=r"does not fit \w+: its stream has the tokens of all images in one row"):
        get_peft_model(make(), config)


@pytest.mark.parametrize("make", [qwen, glm])
@pytest.mark.parametrize(
    "config",
    [hvp.AdaptFormerConfig(r=4, modules_to_save=[]), hvp.SSFConfig(modules_to_save=[]), LoraConfig(r=2)],
    ids=["adaptformer", "ssf", "lora"],
)
def test_train_save_load_and_switch_off(make, config, tmp_path):
    model = make()
    before = outputs(model, SMALL, LARGE)
    adapted = get_peft_model(copy.deepcopy(model), hvp.with_visual_targets(copy.deepcopy(config), model)).eval()
    starts_equal = not isinstance(config, hvp.SSFConfig)  # which starts with random numbers around 1 and 0
    same = [torch.equal(one, other) for one, other in zip(outputs(adapted, SMALL, LARGE), before, strict=True)]
    assert all(same) is starts_equal
    moved(adapted)
    adapted.get_base_model().gradient_checkpointing_enable()
    after = outputs(adapted.train(), SMALL, LARGE)
    sum(each.square().sum() for each in after).backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    adapted.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        after = outputs(adapted, SMALL, LARGE)
        loaded = outputs(PeftModel.from_pretrained(make(), tmp_path).eval(), SMALL, LARGE)
        assert all(torch.equal(one, other) for one, other in zip(after, loaded, strict=True))
        with adapted.disable_adapter():
            restored = outputs(adapted, SMALL, LARGE)
    assert all(torch.equal(one, other) for one, other in zip(before, restored, strict=True))


def test_a_packed_tower_of_nobody():
    model = moved(Rows())
    backbone = hvp.find_backbone(model, example_inputs=torch.randn(2, 3, 32, 32))
    assert backbone.architecture.stream == "packed"
    assert [block.path for block in backbone.blocks] == ["layers.0", "layers.1"]
    adapted = moved(get_peft_model(copy.deepcopy(model), hvp.AdaptFormerConfig(r=4, modules_to_save=[])))
    images = torch.randn(2, 3, 32, 32)
    found = adapted(images)
    torch.testing.assert_close(found, torch.cat([adapted(image[None]) for image in images]))
    assert not torch.allclose(found, model(images), atol=1e-3)
