"""Prompts at the pixels and label maps: equations in plain torch, merging, other models, refusals."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    VivitConfig,
    VivitForVideoClassification,
)

from hf_visual_peft import (
    AutoVPConfig,
    BitFitConfig,
    EVPPixelConfig,
    ILMVPConfig,
    LoRVPConfig,
    LSTConfig,
    SSFConfig,
    VPConfig,
    VPTConfig,
)
from hf_visual_peft.core.label_maps import (
    IterativeLabelMap,
    assign,
    frequent_label_map,
    random_label_map,
    semantic_label_map,
    set_label_map,
)


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
SPACE = {"image_mean": MEAN, "image_std": STD}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 12}


def vit(**fields):
    torch.manual_seed(0)
    config = ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=12, **fields)
    return ViTForImageClassification(config).eval()


def swin():
    torch.manual_seed(0)
    return SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    ).eval()


def mobilenet():  # which pads before its first convolution
    torch.manual_seed(0)
    config = MobileNetV2Config(depth_multiplier=0.1, min_depth=8, image_size=32, num_labels=12)
    model = MobileNetV2ForImageClassification(config)
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(8, 3, 32, 32))  # else outputs are all but zero
    return model.eval()


def timm_vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **TIMM).eval()


def images(*size, seed=1):
    return torch.randn(*(size or (2, 3, 32, 32)), generator=torch.Generator().manual_seed(seed))


def logits(model, x):
    output = model(x)
    return getattr(output, "logits", output)


def adapted(base, config, names=".adapters."):
    torch.manual_seed(3)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{names.strip('.')}." in name or "adapters." in name:
                parameter.normal_(std=0.5)
    return model, {n.rpartition("_pixels.default.")[2]: p for n, p in model.named_parameters() if "_pixels." in n}


def beside(base, config, name):
    """An adapter beside those that a model has."""
    with pytest.warns(UserWarning, match="peft_config"):
        return get_peft_model(base, config, name)


def unit(x):
    return x * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]


def normalised(x):
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def frame(x, p, border):
    x = x.clone()
    x[:, :, :border] += p["frame.top"]
    x[:, :, -border:] += p["frame.bottom"]
    x[:, :, border:-border, :border] += p["frame.left"]
    x[:, :, border:-border, -border:] += p["frame.right"]
    return x


def small(x, size, canvas):
    x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
    out = x.new_zeros(*x.shape[:2], *canvas)
    top, left = (canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2
    out[:, :, top : top + size[0], left : left + size[1]] = x
    inside = torch.zeros(canvas, dtype=torch.bool)
    inside[top : top + size[0], left : left + size[1]] = True
    return out, inside


def sampling(n, scale):
    """Rows of weights: each pixel of a line that is scaled about its middle, from two of the old ones."""
    source = (torch.arange(n) - (n - 1) / 2) / scale + (n - 1) / 2
    return (1 - (source[:, None] - torch.arange(n)).abs()).clamp(min=0)


def vp(x, p):
    return frame(x, p, 3)


def vp_patch(x, p):
    x = x.clone()
    x[:, :, :5, :5] += p["patch"]
    return x


def evp(x, p):
    out, _ = small(unit(x), (26, 26), (32, 32))
    return normalised(frame(out, p, 3))


def ilm(x, p):
    out, inside = small(unit(x), (16, 16), (32, 32))
    return normalised(torch.where(inside, out, p["program"].sigmoid()))


def auto(x, p):
    out, _ = small(unit(x), (16, 16), (32, 32))
    rows = sampling(32, p["scale"])
    out = rows @ out @ rows.T
    far = (torch.arange(32) - 15.5).abs() > 8 * p["scale"]
    return normalised(out + p["program"].sigmoid() * (far[:, None] | far))


def lor(x, p):
    return normalised(unit(x) + p["left"] @ p["right"])


EQUATIONS = {
    "vp": (VPConfig(width=3), vp),
    "vp-patch": (VPConfig(width=5, kind="patch"), vp_patch),
    "evp": (EVPPixelConfig(width=3, **SPACE), evp),
    "ilm": (ILMVPConfig(inner_size=16, **SPACE), ilm),
    "auto": (AutoVPConfig(inner_size=16, **SPACE), auto),
    "lor": (LoRVPConfig(r=2, **SPACE), lor),
}
ADDITIONS = ("vp", "vp-patch", "lor")


@pytest.mark.parametrize("name", EQUATIONS)
@pytest.mark.parametrize("make", [vit, swin, mobilenet, timm_vit])
def test_the_model_reads_what_the_equation_gives(make, name):
    base, (config, equation) = make(), EQUATIONS[name]
    model, weights = adapted(base, copy.deepcopy(config))
    if name == "auto":
        weights["scale"].data.fill_(1.3)
    with torch.no_grad():
        expected = logits(base, equation(images(), weights))
        torch.testing.assert_close(logits(model, images()), expected, rtol=1e-4, atol=5e-5)
        assert not torch.allclose(expected, logits(base, images()), atol=1e-4)


def test_gradients_are_those_of_the_equation():
    base, (config, equation) = vit(), EQUATIONS["auto"]
    model, weights = adapted(base, config)
    weights["scale"].data.fill_(0.8)
    trained = list(weights.values())
    found = torch.autograd.grad(logits(model, images()).square().sum(), trained)
    expected = torch.autograd.grad(logits(base, equation(images(), weights)).square().sum(), trained)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", EQUATIONS)
def test_other_sizes_are_refused(name):
    model, _ = adapted(vit(), copy.deepcopy(EQUATIONS[name][0]))
    with pytest.raises(ValueError, match=r"an image of \(32, 32\) pixels, and the images have \(40, 36\)"):
        model(images(2, 3, 40, 36), interpolate_pos_encoding=True)


def test_canvases_that_are_no_squares():
    base = timm.create_model("vit_tiny_patch16_224", **TIMM | {"img_size": (32, 48)}).eval()
    model, weights = adapted(base, LoRVPConfig(r=3, **SPACE))
    assert weights["left"].shape == (3, 32, 3)
    assert weights["right"].shape == (3, 3, 48)
    model, weights = adapted(base, ILMVPConfig(inner_size=16, **SPACE))
    x = images(2, 3, 32, 48)
    out, inside = small(unit(x), (16, 16), (32, 48))
    expected = logits(base, normalised(torch.where(inside, out, weights["program"].sigmoid())))
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_sizes_by_default_are_parts_of_the_images():
    sizes = {VPConfig: 4, EVPPixelConfig: 4}  # 30 of 224 are 4.3 of 32
    for config, border in sizes.items():
        assert adapted(vit(), config())[1]["frame.left"].shape == (3, 32 - 2 * border, border)
    assert adapted(vit(), VPConfig(kind="patch"))[1]["patch"].shape == (3, 7, 7)
    model, weights = adapted(vit(), ILMVPConfig(**SPACE))
    out, inside = small(unit(images()), (18, 18), (32, 32))
    expected = logits(vit(), normalised(torch.where(inside, out, weights["program"].sigmoid())))
    torch.testing.assert_close(logits(model, images()), expected, rtol=1e-4, atol=1e-5)


def test_statistics_of_timm_and_a_default_for_others():
    told = timm_vit().pretrained_cfg
    x = images()
    model, weights = adapted(timm_vit(), LoRVPConfig(r=2))
    assert told["std"] == (0.5, 0.5, 0.5)
    expected = x + (weights["left"] @ weights["right"]) / torch.tensor(told["std"])[:, None, None]
    torch.testing.assert_close(logits(model, x), logits(timm_vit(), expected))
    base = timm.create_model("vit_small_patch8_224.dino", **TIMM | {"patch_size": 8}).eval()
    model, weights = adapted(base, LoRVPConfig(r=2))
    expected = x + (weights["left"] @ weights["right"]) / torch.tensor(base.pretrained_cfg["std"])[:, None, None]
    assert base.pretrained_cfg["std"][0] != 0.5
    torch.testing.assert_close(logits(model, x), logits(base, expected))


# ---- merging


@pytest.mark.parametrize("name", ADDITIONS)
@pytest.mark.parametrize("make", [vit, timm_vit])
def test_merges_exactly_into_position_embeddings(make, name):
    base = make()
    model, _ = adapted(base, copy.deepcopy(EQUATIONS[name][0]))
    expected, before = logits(model, images()), copy.deepcopy(model.state_dict())
    model.merge_adapter(safe_merge=True)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert len(changed) == 1
    assert "pos" in changed[0]
    torch.testing.assert_close(logits(model, images()), expected, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, images()), expected, rtol=1e-5, atol=1e-6)
    assert not any(name.endswith("adapters") for name, _ in merged.named_modules())


def test_merges_two_and_into_clip_before_its_norm():
    torch.manual_seed(0)
    tower = SIZES | {"image_size": 32, "patch_size": 8}
    text = SIZES | {"vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=tower, projection_dim=8)).eval()
    model, _ = adapted(clip, VPConfig(width=3, modules_to_save=[]))
    model.add_adapter("second", VPConfig(width=4, modules_to_save=[]))
    model.base_model.set_adapter(["default", "second"])
    words = torch.tensor([[0, 5, 1]])
    expected = model(pixel_values=images(), input_ids=words).logits_per_image
    merged = model.eval().merge_and_unload()
    found = merged(pixel_values=images(), input_ids=words).logits_per_image
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_no_merge_without_position_embeddings_and_nothing_changes():
    beit = BeitForImageClassification(BeitConfig(**SIZES, image_size=32, patch_size=8, num_labels=12)).eval()
    for base in (beit, mobilenet(), swin()):
        model, _ = adapted(base, VPConfig(width=3))
        expected, before = logits(model, images()), copy.deepcopy(model.state_dict())
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="Cannot merge an adapter at the images of .*position embeddings"):
                merge()
        assert torch.equal(logits(model, images()), expected)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_merge_of_what_is_no_addition():
    model, _ = adapted(vit(), VPConfig(width=3, label_map=[1, 2]))
    with pytest.raises(ValueError, match="vp_labels, vp_pixels cannot be merged"):
        model.merge_adapter()


def test_weak_additions_merge_no_worse():
    for make in (vit, timm_vit, swin, mobilenet):
        model, weights = adapted(make(), LoRVPConfig(r=2, modules_to_save=[]))
        for parameter in weights.values():
            parameter.data.mul_(0.02)
        state, expected = torch.get_rng_state(), logits(model, images())
        if make in (swin, mobilenet):
            with pytest.raises(ValueError, match="adds no position embeddings"):
                model.merge_adapter()
            continue
        merged = model.merge_and_unload()
        assert torch.equal(state, torch.get_rng_state())
        torch.testing.assert_close(logits(merged, images()), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(logits(merged, images()), logits(make(), images()))


def test_no_merge_into_models_for_videos():
    torch.manual_seed(0)
    config = VivitConfig(**SIZES, image_size=32, tubelet_size=[2, 8, 8], num_frames=4, num_labels=3)
    model, _ = adapted(VivitForVideoClassification(config).eval(), VPConfig(width=3))
    x = torch.randn(1, 4, 3, 32, 32)
    expected = logits(model, x)
    with pytest.raises(ValueError, match="Cannot merge an adapter at the images of Vivit"):
        model.merge_adapter()
    assert torch.equal(logits(model, x), expected)


# ---- label maps


def test_label_map_and_its_loss_and_file(tmp_path):
    base = vit()
    model, weights = adapted(base, VPConfig(width=3, label_map=[[3, 1], [0, 7], [5, 6]]))
    own = logits(base, vp(images(), weights))
    expected = torch.stack([own[:, pair].mean(1) for pair in ([3, 1], [0, 7], [5, 6])], dim=1)
    labels = torch.tensor([2, 0])
    output = model(images(), labels=labels)
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.loss, F.cross_entropy(expected, labels), rtol=1e-4, atol=1e-5)
    assert all("_pixels." in name for name, p in model.named_parameters() if p.requires_grad)
    config = model.get_base_model().config
    config.id2label = {0: "cat", 1: "dog", 2: "owl"}
    with model.disable_adapter():
        assert config.num_labels == 12
        assert logits(model, images()).shape == (2, 12)
    assert config.id2label[2] == "owl"
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vit(), tmp_path)
    assert torch.equal(logits(loaded, images()), output.logits)
    assert loaded.get_base_model().config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    unloaded = loaded.unload()
    assert unloaded.config.num_labels == 12
    assert logits(unloaded, images()).shape == (2, 12)


def test_label_map_of_a_model_without_a_config():
    base = timm_vit()
    model, weights = adapted(base, VPConfig(width=3, label_map=[4, 2]))
    torch.testing.assert_close(logits(model, images()), logits(base, vp(images(), weights))[:, [4, 2]])
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, images()), logits(model, images()))
    assert torch.equal(logits(model.unload(), images()), logits(base, images()))


def test_greedy_assignment():
    counts = torch.tensor([[5, 9, 0], [5, 8, 0], [1, 1, 0], [0, 0, 0]])
    assert assign(counts) == [[1], [0], [2]]  # class 2 has no images: the first source class that is left
    counts = torch.tensor([[4, 3], [4, 3], [0, 9], [2, 0]])
    assert assign(counts, per_class=2) == [[0, 1], [2, 3]]


def test_frequent_map_counts_predictions_with_the_active_prompt():
    base = vit()
    batches = [{"pixel_values": images(4, 3, 32, 32, seed=i), "labels": torch.tensor([0, 1, 2, 1])} for i in range(3)]

    def expected(change):
        counts = torch.zeros(12, 3, dtype=torch.long)
        for batch in batches:
            for source, label in zip(
                logits(base, change(batch["pixel_values"])).argmax(-1), batch["labels"], strict=True
            ):
                counts[source, label] += 1
        return assign(counts)

    assert frequent_label_map(base, batches, 3) == expected(lambda x: x)
    model, weights = adapted(base, VPConfig(width=3, label_map=[0, 1, 2]))
    for parameter in weights.values():
        parameter.data.mul_(20)
    found = frequent_label_map(model.train(), batches, 3)
    assert found == expected(lambda x: vp(x, weights))
    assert model.training
    set_label_map(model, found)
    assert model.peft_config["default"].label_map == found
    with torch.no_grad():
        own = logits(base, vp(images(), weights))[:, [source for (source,) in found]]
        torch.testing.assert_close(logits(model.eval(), images()), own, rtol=1e-4, atol=1e-4)


def test_iterative_map_in_a_trainer(tmp_path):
    model, _ = adapted(vit(), ILMVPConfig(inner_size=16, label_map=[0, 1, 2]))
    samples = [{"pixel_values": images(3, 32, 32, seed=i), "labels": i % 3} for i in range(6)]
    loader = [{"pixel_values": torch.stack([s["pixel_values"] for s in samples]), "labels": torch.arange(6) % 3}]
    arguments = TrainingArguments(
        tmp_path, num_train_epochs=2, per_device_train_batch_size=3, learning_rate=0.5, use_cpu=True, disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=samples, callbacks=[IterativeLabelMap(loader)]).train()
    assert len({source for (source,) in model.peft_config["default"].label_map}) == 3
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(vit(), tmp_path / "adapter")
    assert torch.equal(logits(loaded, images()), logits(model.eval(), images()))


def test_random_and_semantic_maps():
    state = torch.get_rng_state()
    found = random_label_map(12, 4, per_class=3, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert sorted(source for row in found for source in row) == list(range(12))
    assert found == random_label_map(12, 4, per_class=3, seed=5) != random_label_map(12, 4, per_class=3, seed=6)
    source = torch.eye(4)
    names = torch.tensor([[2.0, 1.0, 0.0, 0.0], [5.0, 4.0, 0.1, 0.0]])
    assert semantic_label_map(source, names) == [[0], [1]]
    assert semantic_label_map(source, names, per_class=2) == [[0, 2], [1, 3]]


# ---- with others


def test_beside_a_side_network_gradients_cross_the_blocks_in_any_order():
    for first, second in ((VPConfig, LSTConfig), (LSTConfig, VPConfig)):
        fields = {VPConfig: {"width": 3}, LSTConfig: {"r": 4}}
        base = vit()
        get_peft_model(base, first(**fields[first], modules_to_save=[]))
        beside(base, second(**fields[second], modules_to_save=[]), "second")
        logits(base.train(), images()).square().sum().backward()
        frames = [p for n, p in base.named_parameters() if "vp_pixels" in n]
        assert len(frames) == 4
        assert all(p.grad is not None and p.grad.any() for p in frames)


def test_together_with_other_methods_and_back():
    base = vit()
    before, modules = logits(base, images()), dict(base.named_modules())
    model = get_peft_model(base, VPTConfig(num_virtual_tokens=2, modules_to_save=[], init_weights=False))
    second = beside(base, VPConfig(width=3, modules_to_save=[]), "pixels")
    third = beside(base, SSFConfig(modules_to_save=[], init_weights=False), "scales")
    third.eval()
    all_three = logits(third, images())
    second.unload()
    assert not torch.allclose(logits(third, images()), all_three)
    third.unload()
    model.unload()
    assert torch.equal(logits(base, images()), before)
    assert dict(base.named_modules()) == modules
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in base.modules())


def test_mixed_batches():
    model, _ = adapted(vit(), VPConfig(width=3, modules_to_save=[]))
    model.add_adapter("second", VPConfig(width=4, modules_to_save=[]))
    x = images(3, 3, 32, 32)
    expected = []
    for row, name in zip(x, ("second", "default"), strict=False):
        model.set_adapter(name)
        expected.append(logits(model.eval(), row[None]))
    with model.disable_adapter():
        expected.append(logits(model, x[2:]))
    found = model(x, adapter_names=["second", "default", "__base__"]).logits
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_only_the_images_of_a_language_model():
    torch.manual_seed(0)
    vision = {"model_type": "clip_vision_model", **SIZES, "image_size": 32, "patch_size": 8, "projection_dim": 8}
    text = {"model_type": "llama", **SIZES, "vocab_size": 50, "num_key_value_heads": 2}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=40, vision_feature_layer=-1)
    base = LlavaForConditionalGeneration(config).eval()
    model, weights = adapted(base, VPConfig(width=3, modules_to_save=[]))
    words = torch.tensor([[1, *[40] * 16, 2], [1, *[40] * 16, 3]])
    found = model(input_ids=words, pixel_values=images()).logits
    torch.testing.assert_close(found, base(input_ids=words, pixel_values=vp(images(), weights)).logits)
    only_text = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(input_ids=only_text).logits, base(input_ids=only_text).logits)


# ---- refusals, before the model is touched


def untouched(base, config, match):
    before = {name: id(module) for name, module in base.named_modules()}
    with pytest.raises(ValueError, match=match):
        get_peft_model(base, config)
    assert {name: id(module) for name, module in base.named_modules()} == before
    assert not hasattr(base, "peft_config")


def test_inputs_that_are_no_images():
    torch.manual_seed(0)
    siglip = Siglip2VisionModel(Siglip2VisionConfig(**SIZES, patch_size=8, num_patches=16))
    for config in (VPConfig(), LoRVPConfig(), ILMVPConfig(), AutoVPConfig(), EVPPixelConfig()):
        untouched(siglip, config, r"Config does not fit Siglip2\w+: its input is not images")


def test_prompts_that_do_not_fit_the_images():
    untouched(
        vit(), VPConfig(width=16), r"VPConfig\.width is 16: must be an integer from 1 to 15 \(for images of 32 x 32"
    )
    untouched(vit(), VPConfig(width=33, kind="patch"), r"VPConfig\.width is 33.* to 32")
    untouched(vit(), EVPPixelConfig(width=16), r"EVPPixelConfig\.width is 16")
    untouched(vit(), ILMVPConfig(inner_size=128), r"ILMVPConfig\.inner_size is 128.* to 31 \(for a canvas")
    untouched(vit(), AutoVPConfig(inner_size=32), r"AutoVPConfig\.inner_size is 32")
    untouched(vit(), LoRVPConfig(r=40), r"LoRVPConfig\.r is 40.* to 32")
    config = LoRVPConfig(image_mean=[0.5, 0.5])
    untouched(vit(), config, r"LoRVPConfig\.image_mean .* one for each of the 3 channels")
    no_size = timm.create_model("resnet18", num_classes=2, pretrained_cfg={}).eval()
    no_size.pretrained_cfg = no_size.default_cfg = {}
    untouched(no_size, VPConfig(), r"VPConfig\.prompt_size is None: must be given for ResNet")


def test_label_maps_that_do_not_fit():
    untouched(vit(), VPConfig(width=3, label_map=[12]), r"label_map is \[12\]: .* 0 to 11")
    too_many = [[i % 12, (i + 1) % 12] for i in range(7)]
    untouched(
        vit(), VPConfig(width=3, label_map=too_many), r"from no more classes than the model's own head has \(12\)"
    )
    config = VPConfig(width=3, label_map=[1], modules_to_save=["classifier"])
    untouched(vit(), config, r"modules_to_save is \['classifier'\].*the head stays frozen")
    untouched(vit().vit, VPConfig(width=3, label_map=[1]), "it has no linear head")
    for bad in ([], [-1], [True], [[1], [2, 3]], [[]], "1", [1.5]):
        with pytest.raises(ValueError, match=r"VPConfig\.label_map"):
            VPConfig(label_map=bad)
    with pytest.raises(ValueError, match="num_classes is 13 and per_class 1: the head has only 12 classes"):
        random_label_map(12, 13)
    batch = {"pixel_values": images(), "labels": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match="num_classes is 7 and per_class 2: the head has only 12"):
        frequent_label_map(vit(), [batch], 7, per_class=2)
    with pytest.raises(ValueError, match="labels must be from 0 to 0"):
        frequent_label_map(vit(), [batch], 1)
    model = get_peft_model(vit(), VPConfig(width=3))
    with pytest.raises(ValueError, match="has no label map"):
        set_label_map(model, [[1]])
    with pytest.raises(ValueError, match="must be"):
        semantic_label_map(torch.ones(3, 4), torch.ones(2, 5))


def test_fields():
    for cls in (VPConfig, EVPPixelConfig, ILMVPConfig, LoRVPConfig):
        for bad in (0, -1, True, 1.5, [1, 2, 3], "32"):
            with pytest.raises(ValueError, match=rf"{cls.__name__}\.prompt_size"):
                cls(prompt_size=bad)
        with pytest.raises(ValueError, match=rf"{cls.__name__}\.layers_to_transform is \[0\]: must be None"):
            cls(layers_to_transform=[0])
    for bad in (0, [0.5, 0, 0.5], "x", float("nan"), [], float("inf")):
        with pytest.raises(ValueError, match=r"LoRVPConfig\.image_std"):
            LoRVPConfig(image_std=bad)
    with pytest.raises(ValueError, match=r"VPConfig\.kind is 'bar'"):
        VPConfig(kind="bar")


def test_what_reaches_the_model_must_be_images():
    model, _ = adapted(vit(), VPConfig(width=3))
    for x in (images(2, 1, 32, 32), images(3, 32, 32), images().to(torch.uint8)):
        with pytest.raises(ValueError, match=r"gets images of .*3, height, width"):
            model(x)


def test_a_model_that_calls_all_its_children():
    base = torch.nn.Sequential(*timm_vit().children())
    with pytest.raises(ValueError, match="Sequential"):
        get_peft_model(base, VPConfig(width=3))
    base = vit()
    base.vit.adapters = torch.nn.Identity()
    untouched(base, VPConfig(width=3), "ViTModel takes no child 'adapters'.*it has one")


def test_beside_bias_of_the_patch_embedding():
    base = vit()
    get_peft_model(base, VPConfig(width=3, modules_to_save=[]))
    model = beside(base, BitFitConfig(modules_to_save=[], init_weights=False), "bias").eval()
    weights = {n.rpartition("_pixels.default.")[2]: p for n, p in base.named_parameters() if "_pixels." in n}
    expected = logits(model, images())
    get = [m for m in base.modules() if hasattr(m, "handles") and hasattr(m, "run")]
    assert len(get) == 1
    get[0]._off_now = True
    torch.testing.assert_close(logits(model, vp(images(), weights)), expected)
