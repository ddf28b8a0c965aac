"""Salient channel tuning against its equation and its rule of choice, in plain torch."""

from __future__ import annotations

import pytest
import torch
from equations import assert_equal, both, weights_of
from families import DEPTH, FAMILIES, WIDTH, images, output_of
from peft import PeftModel, get_peft_model
from plain import plain_parts

from hf_visual_peft import NotCalibratedError, SCTConfig, calibrate
from hf_visual_peft.methods.adapter.sct import SCT


def labelled(batch, labels):
    return images(batch) | {"labels": torch.tensor(labels)}


BATCHES = (labelled(3, [0, 2, 0]), labelled(5, [2, 2, 0, 1, 0]))


def channels_of(model):
    return {
        int(name.partition(".adapters.sct_")[0].rsplit(".", 1)[1]): buffer
        for name, buffer in model.named_buffers()
        if name.endswith("salient.indices")
    }


@both
@torch.no_grad()
def test_sct(name):
    family = FAMILIES[name]
    inputs = family.inputs(2)
    blocks, x, norm = plain_parts(name, family.model(), inputs["pixel_values"])
    torch.manual_seed(3)
    model = get_peft_model(family.model(), SCTConfig(channels=5, init_weights=False)).eval()
    backbone = getattr(model.get_base_model(), model.get_base_model().base_model_prefix)
    actual = backbone(**inputs).last_hidden_state
    weights, channels = weights_of(model, "sct_attention"), channels_of(model)
    assert len({tuple(index.tolist()) for index in channels.values()}) > 1
    for index, block in enumerate(blocks):
        z = x + block.attention(block.norm(1, x))
        chosen = channels[index].tolist()
        y = z.clone()
        w = weights[index]
        y[..., chosen] = z[..., chosen] + z[..., chosen] @ w["linear.weight"].T + w["linear.bias"]
        x = y + block.mlp(block.norm(2, y))
    assert_equal(actual, norm(x))


@both
@torch.no_grad()
def test_sct_chooses_by_the_mean_over_classes(name):
    family = FAMILIES[name]
    model = get_peft_model(family.model(), SCTConfig(channels=8))
    batches = [  # classes that differ in size, so that the mean over them is not one norm
        {**batch, "pixel_values": batch["pixel_values"] * (1 + 4 * batch["labels"])[:, None, None, None]}
        for batch in BATCHES
    ]
    calibrate(model, batches, progress=False)
    streams: list[list[torch.Tensor]] = [[] for _ in range(DEPTH)]
    for batch in batches:
        blocks, x, _ = plain_parts(name, family.model(), batch["pixel_values"])
        for index, block in enumerate(blocks):
            z = x + block.attention(block.norm(1, x))
            streams[index].append(z[:, family.prefix :])
            x = z + block.mlp(block.norm(2, z))
    labels = torch.cat([batch["labels"] for batch in batches])
    everything = []
    for index, patches in enumerate(streams):
        of_class = [torch.cat(patches)[labels == label].flatten(0, 1).norm(dim=0) for label in range(3)]
        order = torch.stack(of_class).mean(dim=0).argsort(descending=True)
        assert channels_of(model)[index].tolist() == sorted(order[:8].tolist())
        everything.append(torch.cat(patches).flatten(0, 1).norm(dim=0).argsort(descending=True)[:8].sort().values)
    assert any(channels_of(model)[i].tolist() != chosen.tolist() for i, chosen in enumerate(everything)), (
        "one norm over all images would have chosen the same: the test cannot tell"
    )


def test_sct_does_not_look_at_padding():
    """SigLIP 2 pads: what stands in the padding changes nothing."""
    family = FAMILIES["siglip2"]
    batch = family.inputs(4) | {"labels": torch.tensor([0, 1, 1, 0])}
    loud = batch | {"pixel_values": batch["pixel_values"].clone()}
    loud["pixel_values"][:, :, ::2][batch["pixel_attention_mask"] == 0] = 1000.0
    chosen = []
    for data in (batch, loud):
        model = get_peft_model(family.model(), SCTConfig(channels=5))
        calibrate(model, [data], progress=False)
        chosen.append(channels_of(model))
    assert all(torch.equal(chosen[0][i], chosen[1][i]) for i in range(DEPTH))


def test_sct_initialisation():
    equation = SCT(200, 100)
    assert equation.linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not equation.linear.bias.any()
    assert (equation.salient.indices == -1).all()
    assert equation.salient.indices.dtype == torch.int32


def test_sct_number_of_channels():
    model = get_peft_model(FAMILIES["vit"].model(), SCTConfig())
    assert weights_of(model, "sct_attention")[0]["linear.weight"].shape == (WIDTH, WIDTH), "all, as there are not 96"
    with pytest.raises(
        ValueError, match=rf"SCTConfig.channels is 17: must be an integer from 1 to {WIDTH} \(the back"
    ):
        get_peft_model(FAMILIES["vit"].model(), SCTConfig(channels=17))
    with pytest.raises(ValueError, match="channels is 0: must be an integer of at least 1"):
        SCTConfig(channels=0)


@torch.no_grad()
def test_sct_saves_its_choice(tmp_path):
    family = FAMILIES["vit"]
    model = get_peft_model(family.model(), SCTConfig(channels=5)).eval()
    with pytest.raises(NotCalibratedError, match="SCT has not yet chosen"):
        output_of(model, family.inputs(2))
    model.save_pretrained(tmp_path / "early")
    early = PeftModel.from_pretrained(family.model(), tmp_path / "early")
    with pytest.raises(NotCalibratedError):
        output_of(early, family.inputs(2))
    calibrate(model, BATCHES, progress=False)
    expected = output_of(model, family.inputs(2))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(family.model(), tmp_path / "adapter").eval()
    assert torch.equal(output_of(loaded, family.inputs(2)), expected)
    assert all(
        torch.equal(a, b) for a, b in zip(channels_of(model).values(), channels_of(loaded).values(), strict=True)
    )
    assert model.get_base_model().vit.layers[0].layernorm_after._forward_pre_hooks.keys()  # the layer's own is left
    hooks = [len(b.layernorm_after._forward_pre_hooks) for b in model.get_base_model().vit.layers]
    assert hooks == [1] * DEPTH
