"""Methods at norms and convolutions of a library's or a user's own classes, which do more than those of torch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from hf_visual_peft import BitFitConfig, SSFConfig
from hf_visual_peft.sites.affine import has_channels_first, is_activated, is_linear_in_weight


CHANNELS = 6


class TanhNorm(nn.BatchNorm2d):
    """A user's own, which ends in an activation."""

    def forward(self, x):
        return super().forward(x).tanh()


class MapNorm(nn.LayerNorm):
    """A user's own over the channels of maps."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RootNorm2d(nn.Module):
    """A user's own that has no torch class as a base, nor a bias."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return x * x.pow(2).mean(dim=1, keepdim=True).add(1e-6).rsqrt() * self.weight.view(-1, 1, 1)


class CentredConv(nn.Conv2d):
    """A user's own, which standardises its weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std(dim=(1, 2, 3), keepdim=True), self.bias)


class PaddedConv(nn.Conv2d):
    """A user's own, which pads as it likes and is linear."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 0, 1, 0), mode="reflect"))


def timm_norm(name, *args):
    return getattr(pytest.importorskip("timm.layers"), name)(*args)


# norms by what they do after weight and bias
ACTIVATED = {
    "own": (lambda: TanhNorm(CHANNELS), torch.tanh),
    "batch": (lambda: timm_norm("BatchNormAct2d", CHANNELS), torch.relu),
    "group": (lambda: timm_norm("GroupNormAct", CHANNELS, 2), torch.relu),
    "layer": (lambda: timm_norm("LayerNormAct2d", CHANNELS), torch.relu),
}


def random(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module.eval()


def images(batch=2):
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def adapted(config, *modules):
    base = random(nn.Sequential(nn.Conv2d(3, CHANNELS, 3), *modules, nn.Flatten()))
    return base, get_peft_model(copy.deepcopy(base), config(target_modules=["1"], init_weights=False))


def numbers(model, name):
    (found,) = [p for key, p in model.named_parameters() if p.requires_grad and key.endswith(name)]
    return found.detach()


@pytest.mark.parametrize("name", ACTIVATED)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_what_acts_on_a_norm_acts_before_its_activation(name, mode):
    build, activation = ACTIVATED[name]
    base, model = adapted(SSFConfig, build())
    model.train(mode == "train")  # in which running statistics stay as they are
    scale, shift = (numbers(model, each).view(-1, 1, 1) for each in ("scale", "shift"))
    plain = copy.deepcopy(base)
    with torch.no_grad():
        norm = plain[1]
        weight, bias = norm.weight.clone(), norm.bias.clone()
        norm.weight.copy_(weight * scale.flatten())
        norm.bias.copy_(bias * scale.flatten() + shift.flatten())
    assert torch.allclose(model(images()), plain(images()), atol=1e-6)
    pre = torch.linspace(-1, 1, CHANNELS).view(-1, 1, 1)
    assert not torch.allclose(activation(pre * scale + shift), activation(pre) * scale + shift)  # the place matters


@pytest.mark.parametrize("name", ACTIVATED)
@pytest.mark.parametrize("config", [SSFConfig, BitFitConfig])
def test_it_trains_switches_off_and_merges(name, config):
    base, model = adapted(config, ACTIVATED[name][0]())
    with model.disable_adapter():
        assert torch.equal(model(images()), base(images()))
    found = model(images())
    assert not torch.allclose(found, base(images()), atol=1e-3)
    found.square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(images()), found, atol=1e-5)
    assert type(merged[1]) is type(base[1])


@pytest.mark.parametrize("build", [lambda: MapNorm(CHANNELS), lambda: RootNorm2d(CHANNELS)])
def test_channels_of_maps(build):
    """Height and width are as many as the channels here: shapes tell nothing."""
    base, model = adapted(SSFConfig, build())
    scale, shift = (numbers(model, each).view(-1, 1, 1) for each in ("scale", "shift"))
    assert base[:2](images()).shape[1:] == (CHANNELS, CHANNELS, CHANNELS)
    assert torch.allclose(model(images()), (base[:2](images()) * scale + shift).flatten(1), atol=1e-6)


def test_a_convolution_that_standardises_its_weight_is_not_merged():
    _, model = adapted(SSFConfig, CentredConv(CHANNELS, CHANNELS, 3))
    before = model(images())
    with pytest.raises(ValueError, match=r"into CentredConv\(.*standardises its weight"):
        model.merge_and_unload()
    assert torch.equal(model(images()), before)
    _, model = adapted(SSFConfig, PaddedConv(CHANNELS, CHANNELS, 3))
    before = model(images())
    assert torch.allclose(model.merge_and_unload()(images()), before, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("channels", [1, 2, 3, 8])
def test_what_is_told_of_modules(device, channels):
    """Also of modules without values, and without changing what they hold."""
    norms = {
        TanhNorm(channels): (True, None),
        nn.BatchNorm2d(channels): (False, None),
        timm_norm("BatchNormAct2d", channels): (True, None),
        timm_norm("LayerNormAct2d", channels): (True, True),
        timm_norm("LayerNorm2d", channels): (False, True),
        timm_norm("RmsNorm2d", channels): (False, True),
        timm_norm("RmsNorm", channels): (False, False),
        timm_norm("LayerNorm", channels): (False, False),
    }
    for norm, (activated, first) in norms.items():
        norm = norm.to(device)
        before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
        assert is_activated(norm) is activated, norm
        if first is not None and channels > 1:
            assert has_channels_first(norm) is first, norm
        if device == "cpu":
            assert all(torch.equal(before[name], tensor) for name, tensor in norm.state_dict().items())
    assert not is_linear_in_weight(CentredConv(channels, channels, 3).to(device))
    assert is_linear_in_weight(PaddedConv(channels, channels, 3, groups=channels, bias=False).to(device))
    assert is_linear_in_weight(timm_norm("ScaledStdConv2d", 4, channels, 3).to(device)) is False
    assert is_linear_in_weight(timm_norm("Conv2dSame", 4, channels, 3, 2).to(device))
