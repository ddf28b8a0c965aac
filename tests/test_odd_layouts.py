"""Tokens that lie in the image in an order of their own, and weights that lie transposed."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

import hf_visual_peft
from hf_visual_peft import AttnScaleConfig, GPSConfig, STAdapterConfig
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.methods.adapter.st_adapter import STAdapter
from hf_visual_peft.methods.specification.gps import supervised_contrastive_loss
from hf_visual_peft.sites.grid import Grid, unfolded_grid


def test_mobilevitv2_lays_cells_of_patches_in_rows():
    """The model's own unfolding gives the order; the grid puts the tokens back in their places."""
    layer = next(m for m in MODELS["mobilevitv2"].model().modules() if type(m).__name__ == "MobileViTV2Layer")
    maps = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    patches, _ = layer.unfolding(maps)
    tokens = patches.flatten(2).transpose(1, 2)
    grid = unfolded_grid(Grid(16, 24), patches.shape[2], tokens)
    assert (grid.height, grid.width) == (8, 12)
    assert torch.equal(grid.to_map(tokens), maps)
    assert torch.equal(grid.to_tokens(maps), tokens)


@torch.no_grad()
def test_mobilevit_sees_frames_of_one_place_after_each_other():
    """Its blocks get four sequences an image; an adapter for videos gets them place by place."""
    tiny = MODELS["mobilevit"]
    pixels = torch.randn(2, 3, 3, *tiny.size, generator=torch.Generator().manual_seed(0))  # two videos of three frames
    base = tiny.model()
    path = hf_visual_peft.find_backbone(base).blocks[0].path
    seen = {}
    handle = base.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.update(block=args[0].clone()))
    base(pixels.flatten(0, 1))
    handle.remove()
    model = get_peft_model(base, STAdapterConfig(channels=4)).eval()
    equation = next(m for m in model.modules() if isinstance(m, STAdapter))
    equation.register_forward_pre_hook(lambda m, args: seen.update(equation=args[0].clone()))
    model(pixels)
    expected = seen["block"].unflatten(0, (2, 3, 4))  # video, frame, place
    found = seen["equation"].unflatten(0, (2, 4, 3))
    for place in range(4):
        assert torch.equal(found[:, place], expected[:, :, place])


@torch.no_grad()
def test_attnscale_in_windows_scales_the_logits():
    """Equal factors are a factor of the queries."""
    tiny = MODELS["swin"]
    inputs, scaled = tiny.arguments(2), tiny.model()
    for name, module in scaled.named_modules():
        if name.endswith("q_proj"):
            module.weight.mul_(0.5)
            module.bias.mul_(0.5)
    expected = scaled(**inputs).logits
    model = get_peft_model(tiny.model(), AttnScaleConfig()).eval()
    factors = [p for name, p in model.named_parameters() if name.endswith(".factors")]
    windows = {block.window for block in hf_visual_peft.find_backbone(scaled).blocks}
    assert {tuple(p.shape) for p in factors} == {(1, window**2, window**2) for window in windows}
    for p in factors:
        p.fill_(0.5)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    with pytest.raises(ValueError, match="AttnScaleConfig.grid_size is 4: must be None"):
        get_peft_model(tiny.model(), AttnScaleConfig(grid_size=4))


def test_gps_chooses_rows_of_transposed_weights():
    """`Conv1D` has (in, out): the entries with the largest gradient of each output are chosen, not of each input."""
    tiny = MODELS["imagegpt"]
    batch = tiny.arguments(4)
    labels = torch.tensor([0, 1, 0, 1])
    base = tiny.model()
    features = []
    base.score.register_forward_pre_hook(lambda m, args: features.append(args[0]))
    base(**batch)
    weight = base.transformer.h[1].mlp.c_fc.weight
    read = features[0].mean(dim=1) if features[0].ndim == 3 else features[0]
    (gradient,) = torch.autograd.grad(supervised_contrastive_loss(read, labels), weight)
    expected = gradient.T.abs().argmax(dim=1)

    model = get_peft_model(tiny.model(), GPSConfig(k=1))
    hf_visual_peft.calibrate(model, [batch | {"labels": labels}], progress=False)
    part = model.get_submodule("base_model.model.transformer.h.1.mlp.c_fc.gps_entries.default")
    indices = part.weight.entries().view(-1)
    assert isinstance(part, nn.Module)
    assert torch.equal(indices // weight.shape[0], torch.arange(weight.shape[1]))
    assert torch.equal(indices % weight.shape[0], expected)
