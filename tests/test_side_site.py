"""Networks beside a backbone: what crosses the blocks, what is kept, and how state goes from block to block."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from families import FAMILIES, images
from peft import get_peft_model
from side_networks import kept, vit
from torch import nn
from transformers import (
    SwinConfig,
    SwinForImageClassification,
)

from hf_visual_peft import (
    DTLConfig,
    E3VAConfig,
    LSTConfig,
    ResTuningConfig,
    SideTuningConfig,
    ViTAdapterConfig,
    VPTConfig,
    VQTConfig,
)
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.sites import BlockAdapters, Grid, SideSite, TokenLayout, resized


def swin():
    torch.manual_seed(0)
    return SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 2, 1], num_heads=[1, 2, 2], window_size=2)
    )


def test_backbone_runs_in_eval_mode_while_the_side_network_trains():
    model = vit(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    assert not torch.equal(model(**images(2)).logits, model(**images(2)).logits)
    model = get_peft_model(model, LSTConfig(r=2))
    for _ in range(2):
        assert torch.equal(model(**images(2)).logits, model(**images(2)).logits)
        model.train()
    base = model.base_model.model
    layers = [module for module in model.modules() if isinstance(module, BlockAdapters)]
    assert len(layers) == 3
    assert not base.vit.embeddings.training
    assert all(layer.training and not layer.get_base_layer().training for layer in layers)
    with model.disable_adapter():
        model.train()
        assert base.vit.embeddings.training
        assert all(layer.get_base_layer().training for layer in layers)
    assert not any(layer.get_base_layer().training for layer in layers)
    base = model.unload().train()
    assert all(module.training for module in base.modules())
    assert not torch.equal(base(**images(2)).logits, base(**images(2)).logits)


def test_no_activation_of_a_bypassed_backbone_is_kept():
    plain = kept(get_peft_model(vit(), LSTConfig(r=2)).train(), images(2))
    assert plain
    wider = get_peft_model(vit(intermediate_size=128), LSTConfig(r=2)).train()
    assert kept(wider, images(2)) == plain
    # of 16 channels: what trained linears read, that is what the embeddings and the three blocks return; what the
    # frozen norm behind the blocks reads; and the pooled token, which the head reads
    stream = 2 * 17 * 16
    of_backbone = [size for channels, size in plain if channels == 16]
    assert sorted(of_backbone) == [2 * 16] + [stream] * 5
    everything = [size for channels, size in kept(vit().train(), images(2)) if channels == 16]
    assert sum(everything) > 2 * sum(of_backbone)


def test_no_gradient_crosses_the_blocks():
    model = get_peft_model(vit(), LSTConfig(r=2)).train()
    model.enable_input_require_grads()
    pixels = images(2)["pixel_values"].requires_grad_()
    model(pixel_values=pixels).logits.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)
    base = model.base_model.model
    assert all(p.grad is None for n, p in base.vit.layers[0].named_parameters() if "adapters" not in n)


def test_result_is_what_the_last_block_returns():
    model = get_peft_model(vit(), LSTConfig(r=2, layers_to_transform=[0])).eval()
    layers = [module for module in model.modules() if isinstance(module, BlockAdapters)]
    assert [len(layer.adapter_layer_names) for layer in layers] == [1, 0, 0]
    sites = [site for layer in layers for (_, site, *_) in layer.plans["default"]]
    assert all(isinstance(site, SideSite) for site in sites)
    assert [(s.takes, s.hands_on, s.exits) for s in sites] == [
        (False, True, False),
        (True, True, False),
        (True, False, True),
    ]
    seen = []
    layers[0].lst_rung["default"].register_forward_hook(lambda module, args, output: seen.append(output[0]))
    states = model(**images(2), output_hidden_states=True).hidden_states
    assert torch.equal(states[-1], seen[0])
    with model.disable_adapter():
        plain = model(**images(2), output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(states[:-1], plain[:-1], strict=True))


def test_results_of_several_networks_add_up():
    model = get_peft_model(vit(), LSTConfig(r=2, modules_to_save=[])).eval()
    model.add_adapter("second", LSTConfig(r=4, modules_to_save=[]))
    results = []
    for names in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        results.append(model.eval()(**images(2), output_hidden_states=True).hidden_states[-1])
    torch.testing.assert_close(results[2], results[0] + results[1])


@pytest.mark.parametrize("prefix", [(1, 1), (0, 1), (2, 1)])
def test_state_is_averaged_over_cells_that_became_one(prefix):
    before, now = TokenLayout(prefix[0], Grid(4, 6)), TokenLayout(prefix[1], Grid(2, 3))
    state = torch.randn(2, prefix[0] + 24, 5)
    result = resized(state, before, now)
    assert result.shape == (2, prefix[1] + 6, 5)
    cells = state[:, prefix[0] :].view(2, 2, 2, 3, 2, 5).mean(dim=(2, 4)).flatten(1, 2)
    torch.testing.assert_close(result[:, prefix[1] :], cells)
    expected = state[:, :1] if prefix[0] else state.mean(dim=1, keepdim=True)
    torch.testing.assert_close(result[:, : prefix[1]], expected)


def test_state_crosses_the_stages_of_a_hierarchical_backbone():
    model = get_peft_model(swin(), LSTConfig(r=2)).eval()
    seen = []
    for module in model.modules():
        if isinstance(module, BlockAdapters):
            rung = module.lst_rung["default"]
            rung.register_forward_hook(lambda module, args, output: seen.append((args[0], output[0])))
    model(**images(2))
    assert [out.shape for _, out in seen] == [(2, 256, 4), (2, 64, 8), (2, 64, 8), (2, 16, 32)]
    maps = seen[0][1].transpose(1, 2).unflatten(2, (16, 16))
    pooled = nn.functional.avg_pool2d(maps, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(seen[1][0], pooled)
    assert seen[2][0] is seen[1][1]


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"layers_to_transform is \[0, 1\]: the network must end in the last stage"):
        get_peft_model(swin(), LSTConfig(r=2, layers_to_transform=[0, 1]))


@pytest.mark.parametrize("name", ["vit", "beit", "dinov2_registers", "data2vec"])
def test_bypassed_blocks_run_without_being_recorded(name):
    model = get_peft_model(FAMILIES[name].model(), LSTConfig(r=2)).train()
    recorded = []
    for block in [module for module in model.modules() if isinstance(module, BlockAdapters)]:
        linear = next(m for m in block.get_base_layer().modules() if isinstance(m, nn.Linear))
        linear.register_forward_hook(lambda module, args, output: recorded.append(torch.is_grad_enabled()))
    model(**FAMILIES[name].inputs(2))
    assert recorded
    assert not any(recorded)


def modes(model):
    """Whether the blocks, and the embeddings, train."""
    blocks = [module.get_base_layer() for module in model.modules() if isinstance(module, BlockAdapters)]
    return {module.training for module in (*blocks, model.get_base_model().vit.embeddings)}


def test_the_backbone_trains_again_where_nothing_bypasses_it():
    model = get_peft_model(vit(), ResTuningConfig(modules_to_save=[])).train()
    model.add_adapter("inside", ResTuningConfig(bypass=False, modules_to_save=[]))
    assert modes(model) == {False}
    model.set_adapter("inside")
    assert modes(model) == {True}
    model.set_adapter("default")
    assert modes(model) == {False}
    with model.disable_adapter():
        assert modes(model) == {True}
    assert modes(model) == {False}
    model.delete_adapter("default")
    assert model.active_adapters == ["inside"]
    assert modes(model) == {True}
    assert modes(model.eval()) == {False}
    model.add_adapter("bypass", ResTuningConfig(modules_to_save=[]))
    model.set_adapter("bypass")
    model.set_adapter("inside")
    assert modes(model) == {False}, "the whole model is in eval mode"


def test_what_is_put_into_eval_mode_by_hand_stays_there():
    model = get_peft_model(vit(), ResTuningConfig(bypass=False, modules_to_save=[])).train()
    layer = next(module for module in model.modules() if isinstance(module, BlockAdapters))
    layer.get_base_layer().mlp.eval()
    model.add_adapter("other", ResTuningConfig(bypass=False, modules_to_save=[]))
    model.set_adapter("other")
    assert not layer.get_base_layer().mlp.training


def test_unloading_gives_the_backbone_its_mode_back():
    model = get_peft_model(vit(), LSTConfig(r=2)).train()
    assert all(module.training for module in model.unload().modules())


def test_a_second_adapter_trains_though_the_backbone_is_bypassed():
    model = get_peft_model(vit(), VQTConfig(modules_to_save=[])).train()
    model.add_adapter("second", VQTConfig(modules_to_save=[], dropout=0.5))
    model.set_adapter("second")
    drops = [m for name, m in model.named_modules() if "second" in name and isinstance(m, nn.Dropout)]
    assert drops
    assert all(drop.training for drop in drops)


def test_layers_take_the_mode_of_the_model():
    model = get_peft_model(vit().eval(), LSTConfig(r=2))
    layers = [module for module in model.modules() if isinstance(module, BlockAdapters)]
    assert not any(layer.training for layer in layers)


@pytest.mark.parametrize("config", [LSTConfig(r=2), SideTuningConfig(channels=4), VQTConfig()])
def test_nothing_of_a_pass_is_copied_or_saved(config, tmp_path):
    model = get_peft_model(vit(), config)
    torch.save(model, tmp_path / "before")
    pixels = torch.randn(64, 3, 32, 32, requires_grad=True) * 1.0  # no leaf, which could not be copied
    model.get_base_model().vit(pixel_values=pixels)  # without the head: its part of the logits is left
    torch.save(model, tmp_path / "after")
    assert (tmp_path / "after").stat().st_size < (tmp_path / "before").stat().st_size + 5000
    copied = copy.deepcopy(model).eval()
    torch.testing.assert_close(copied(**images(2)).logits, model.eval()(**images(2)).logits)


def test_a_block_alone_says_what_is_missing():
    model = get_peft_model(vit(), LSTConfig(r=2))
    with pytest.raises(ValueError, match="call the whole model, not a block of it"):
        model.get_base_model().vit.layers[1](torch.randn(1, 17, 16))


def test_checkpoints_around_blocks_of_timm_are_refused():
    model = get_peft_model(MODELS["timm_vit"].model(), DTLConfig(add_from=0)).train()
    pixels = images(2)["pixel_values"]
    model.get_base_model().set_grad_checkpointing(True)
    loss = model(pixels).sum()
    with pytest.raises(ValueError, match=r"checkpointing around several modules .* `set_grad_checkpointing\(False\)`"):
        loss.backward()
    model.get_base_model().set_grad_checkpointing(False)
    model(pixels).sum().backward()


def test_prompts_are_cut_out_of_all_that_side_networks_read():
    """The stream between attention and MLP has the prompts' tokens, too, while the block runs."""
    model = vit()
    model.add_adapter(E3VAConfig(r=4, rank=2, modules_to_save=[]), "side")
    model.add_adapter(VPTConfig(num_virtual_tokens=2, modules_to_save=[]), "prompts")
    model.set_adapter(["side", "prompts"])
    shapes = []
    for module in model.modules():
        if isinstance(module, BlockAdapters):
            module.e3va_piece["side"].register_forward_pre_hook(lambda _, args: shapes.append(args[1].between.shape))
    model(**images(2))
    assert shapes == [(2, 17, 16)] * 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (partial(DTLConfig, kernel_size=3), "kernel_size is 3: must be 5, its default"),
        (
            partial(LSTConfig, gate=False, temperature=7.0),
            "temperature is 7.0: must be 0.1, its default",
        ),
        (
            partial(ResTuningConfig, num_virtual_tokens=99),
            "num_virtual_tokens is 99: must be 10, its default",
        ),
        (
            partial(ViTAdapterConfig, extra_extractors=7),
            "extra_extractors is 7: must be 2, its default",
        ),
    ],
)
def test_fields_without_an_effect_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config()


def test_blocks_left_alone_are_named_as_the_reason():
    with pytest.raises(ValueError, match=r"LSTConfig\.exclude_modules is .* must end in the last stage"):
        get_peft_model(swin(), LSTConfig(r=2, exclude_modules=r"swin\.encoder\.layers\.2.*"))
    with pytest.raises(ValueError, match=r"DTLConfig\.exclude_modules is .* has nothing to act on"):
        get_peft_model(vit(), DTLConfig(exclude_modules=r"vit\.layers\.[12].*"))
    with pytest.raises(ValueError, match=r"LSTConfig\.r is 9: .* 8 \(half the width"):
        get_peft_model(vit(), LSTConfig(r=9))
