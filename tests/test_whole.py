"""The methods that train modules as a whole: linear probe and Partial-k."""

from __future__ import annotations

import copy

import pytest
import torch
from equations import assert_equal
from families import DEPTH, FAMILIES, output_of
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from hf_visual_peft import LinearProbeConfig, PartialConfig
from hf_visual_peft.coverage.models import MODELS


# family: blocks, norm behind them that the head reads, head
LAST = {
    "vit": ("vit.layers", "vit.layernorm", "classifier"),
    "clip": ("vision_model.encoder.layers", None, "classifier"),  # its head reads the patches before the norm
    "dinov2": ("dinov2.encoder.layer", "dinov2.layernorm", "classifier"),
}
on_three = pytest.mark.parametrize("name", LAST)
both_methods = pytest.mark.parametrize("config_cls", [LinearProbeConfig, PartialConfig])


def train(model, family, steps=2, lr=0.05):
    """A few steps of all that trains; the model is in evaluation mode afterwards."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        model.train()
        optimizer.zero_grad()
        output_of(model, family.inputs(2 + step)).float().square().mean().backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def run(model, family):
    return output_of(model, family.inputs(2))


def trained_names(model):
    """Names in the base model of what trains."""
    return {
        name.removeprefix("base_model.model.")
        .replace(".modules_to_save.default", "")
        .replace(".partial_copy.default", "")
        .replace(".linearprobe_copy.default", "")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def names_below(base, *prefixes):
    return {n for n, _ in base.named_parameters() if any(p is not None and n.startswith(f"{p}.") for p in prefixes)}


class _ConvolvedHead(nn.Module):
    """A backbone whose head is a convolution of 1 x 1, as DLA's and those of many segmenters are."""

    def __init__(self):
        super().__init__()
        self.backbone = MODELS["resnet"].model().resnet
        self.classifier = nn.Conv2d(self.backbone.config.hidden_sizes[-1], 3, 1)

    def forward(self, pixel_values):
        return self.classifier(self.backbone(pixel_values).last_hidden_state)


def test_a_head_that_is_a_convolution_of_1_x_1(tmp_path):
    """Its copy is a convolution, too."""
    torch.manual_seed(0)
    base = _ConvolvedHead().eval()
    pixels = MODELS["resnet"].arguments(2)["pixel_values"]
    model = get_peft_model(copy.deepcopy(base), LinearProbeConfig(init_weights=False)).eval()
    found = model(pixels)
    assert found.shape == base(pixels).shape
    assert not torch.allclose(found, base(pixels))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(pixels), found)
    merged = model.merge_and_unload()
    assert torch.equal(merged(pixels), found)
    assert type(merged.classifier) is nn.Conv2d


@on_three
@pytest.mark.parametrize("k", [1, 2, DEPTH])
def test_partial_trains_the_last_blocks_the_norm_and_the_head(name, k):
    family = FAMILIES[name]
    blocks, norm, head = LAST[name]
    base = family.model()
    expected = names_below(base, *(f"{blocks}.{DEPTH - 1 - i}" for i in range(k)), norm, head)
    before = {n: p.clone() for n, p in base.named_parameters()}
    model = get_peft_model(base, PartialConfig(k=k))
    assert trained_names(model) == expected
    train(model, family)
    merged = model.merge_and_unload()
    changed = {n for n, p in merged.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= expected
    keys = {n for n in expected if n.endswith(("k_proj.bias", "key.bias"))}  # softmax does not see them
    assert changed >= expected - keys


@on_three
def test_linear_probe_trains_the_head(name):
    family = FAMILIES[name]
    base = family.model()
    before = {n: p.clone() for n, p in base.named_parameters()}
    model = get_peft_model(base, LinearProbeConfig())
    expected = names_below(base.eval(), LAST[name][2])
    assert trained_names(model) == {"classifier.weight", "classifier.bias"}
    assert expected == {"classifier.base_layer.weight", "classifier.base_layer.bias"} | {
        "classifier.linearprobe_copy.default.weight",
        "classifier.linearprobe_copy.default.bias",
    }
    train(model, family)
    merged = model.merge_and_unload()
    changed = {n for n, p in merged.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("config", "frozen"), [(LinearProbeConfig(), DEPTH), (PartialConfig(k=1), DEPTH - 1)], ids=["probe", "k=1"]
)
def test_gradients_go_no_further_back_than_what_trains(config, frozen):
    family = FAMILIES["vit"]
    model = get_peft_model(family.model(), config).train()
    out = model(**family.inputs(2), output_hidden_states=True)
    assert [h.requires_grad for h in out.hidden_states] == [index > frozen for index in range(DEPTH + 1)]


def test_partial_of_a_bare_backbone():
    family = FAMILIES["clip"]
    model = get_peft_model(family.backbone(), PartialConfig())
    names = trained_names(model)
    assert "post_layernorm.weight" in {name.rpartition("vision_model.")[2] for name in names}
    assert not any("classifier" in name for name in names)


def test_linear_probe_needs_a_head():
    with pytest.raises(
        ValueError, match=r"LinearProbeConfig: ViTModel has no task head, so nothing would train\. Load it with one"
    ):
        get_peft_model(FAMILIES["vit"].backbone(), LinearProbeConfig())


def test_linear_probe_cannot_save_its_head_twice():
    with pytest.raises(
        ValueError, match=r"LinearProbeConfig.modules_to_save is \['classifier'\]: .* \(classifier\) trains"
    ):
        get_peft_model(FAMILIES["vit"].model(), LinearProbeConfig(modules_to_save=["classifier"]))


def test_linear_probe_with_further_modules():
    base = FAMILIES["vit"].model()
    model = get_peft_model(base, LinearProbeConfig(modules_to_save=["layernorm"]))
    assert trained_names(model) == {
        "classifier.weight",
        "classifier.bias",
        "vit.layernorm.weight",
        "vit.layernorm.bias",
    }


@pytest.mark.parametrize("k", [0, -1, 1.0, True, "1", None])
def test_k_is_a_number_of_blocks(k):
    with pytest.raises(ValueError, match=rf"PartialConfig.k is {k!r}: must be an integer of at least 1"):
        PartialConfig(k=k)


def test_k_is_at_most_the_number_of_blocks():
    base = FAMILIES["vit"].model()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=rf"k is {DEPTH + 1}: must be an integer from 1 to {DEPTH} \(the backbone's"):
        get_peft_model(base, PartialConfig(k=DEPTH + 1))
    assert [name for name, _ in base.named_modules()] == names


@both_methods
@pytest.mark.parametrize(
    "fields",
    [{"layers_to_transform": [1]}, {"layers_to_transform": 0}, {"exclude_modules": ["classifier"]}],
    ids=str,
)
def test_selections_that_have_nothing_to_act_on(config_cls, fields):
    (field,) = fields
    with pytest.raises(
        ValueError, match=rf"{config_cls.__name__}.{field} is .*must be None: {config_cls.__name__} itself decides"
    ):
        config_cls(**fields)


@both_methods
@on_three
def test_disable_switch_merge_and_unmerge(config_cls, name):
    family = FAMILIES[name]
    base = family.model()
    before = run(base, family)
    weights = {n: p.clone() for n, p in base.named_parameters()}
    model = train(get_peft_model(base, config_cls()), family)
    first = run(model, family)
    assert not torch.allclose(first, before)
    with model.disable_adapter():
        assert torch.equal(run(model, family), before)
    assert torch.equal(run(model, family), first)

    model.add_adapter("second", config_cls())
    model.set_adapter("second")
    assert torch.equal(run(model.eval(), family), before), "a new copy is one of the base model, not of the first"
    second = run(train(model, family, lr=0.1), family)
    assert not torch.allclose(second, first)
    model.set_adapter("default")
    assert torch.equal(run(model.eval(), family), first)

    state = {n: value.clone() for n, value in model.state_dict().items()}
    model.merge_adapter(safe_merge=True)
    assert torch.equal(run(model, family), first)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, state[n])}
    assert changed
    assert all(".base_layer." in n for n in changed), "merging leaves the copies and all other weights alone"
    with model.disable_adapter():  # takes the merged weights out
        assert torch.equal(run(model, family), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert all(torch.equal(value, state[n]) for n, value in model.state_dict().items())

    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(run(model, family), first)
    unloaded = model.unload()
    assert all(torch.equal(p, weights[n]) for n, p in unloaded.named_parameters())
    assert torch.equal(run(unloaded, family), before)


@both_methods
def test_two_at_once_are_refused(config_cls):
    family = FAMILIES["vit"]
    model = get_peft_model(family.model(), config_cls(modules_to_save=[])).eval()
    model.add_adapter("second", config_cls(modules_to_save=[]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"Only one of default, second can be active: each has a whole (ViT|Lin)"):
        run(model, family)
    state = {n: value.clone() for n, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="Cannot merge default, second: each is a whole module"):
        model.merge_adapter()
    assert all(torch.equal(value, state[n]) for n, value in model.state_dict().items())
    model.base_model.set_adapter("default")
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot merge default, second: each is a whole module"):
        model.merge_adapter(adapter_names=["second"])


@both_methods
def test_an_adapter_added_while_another_is_merged_starts_at_the_pretrained_weights(config_cls):
    family = FAMILIES["vit"]
    base = family.model()
    before = run(base, family)
    model = train(get_peft_model(base, config_cls()), family)
    model.merge_adapter()
    model.add_adapter("second", config_cls())
    model.unmerge_adapter()
    model.set_adapter("second")
    assert torch.equal(run(model.eval(), family), before)


@on_three
@both_methods
def test_float32_copies_in_a_half_precision_backbone(config_cls, name):
    family = FAMILIES[name]
    base = family.model().to(torch.bfloat16)
    half = {"pixel_values": family.inputs(2)["pixel_values"].to(torch.bfloat16)}
    with torch.no_grad():
        before = output_of(base, half)
    model = get_peft_model(base, config_cls())
    copies = {p.dtype for n, p in model.named_parameters() if "_copy." in n}
    assert copies == {torch.float32}
    frozen = {p.dtype for n, p in model.named_parameters() if not p.requires_grad}
    assert torch.bfloat16 in frozen
    after = output_of(model.eval(), half)
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.05 * before.abs().max().item())
    after.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)
    model.merge_adapter()
    merged = {n: p for n, p in model.named_parameters() if ".base_layer." in n}
    assert {p.dtype for p in merged.values()} == {torch.bfloat16}
    with torch.no_grad():
        torch.testing.assert_close(output_of(model, half), before, rtol=0.05, atol=0.05 * before.abs().max().item())
        with model.disable_adapter():
            assert torch.equal(output_of(model, half), before)


@on_three
@pytest.mark.parametrize(
    "config", [LinearProbeConfig(), PartialConfig(k=1), PartialConfig(k=2)], ids=["probe", "k=1", "k=2"]
)
def test_file_holds_what_trains_and_nothing_else(name, config, tmp_path):
    family = FAMILIES[name]
    blocks, norm, head = LAST[name]
    base = family.model()
    k = getattr(config, "k", None)
    kept = names_below(base, *(f"{blocks}.{DEPTH - 1 - i}" for i in range(k)), norm) if k else set()
    kept |= names_below(base, head)
    sizes = {n: p.shape for n, p in base.named_parameters()}
    model = train(get_peft_model(base, config), family)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    in_base = {
        n.removeprefix("base_model.model.").replace(".partial_copy", "").replace(".linearprobe_copy", ""): value
        for n, value in saved.items()
    }
    assert {n: value.shape for n, value in in_base.items()} == {n: sizes[n] for n in kept}
    loaded = PeftModel.from_pretrained(family.model(), tmp_path).eval()
    assert torch.equal(run(loaded, family), run(model, family))
    assert_equal(run(loaded.merge_and_unload(), family), run(model, family))
