"""DA-VPT against its equations, and how its classes get proxies."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from equations import adapted, assert_equal, both, weights_of
from families import DEPTH, FAMILIES, WIDTH
from peft import PeftModel, get_peft_model
from plain import plain_parts
from plain_swin import run_swin, swin_with, tiny_swin
from test_prompts import through
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from hf_visual_peft import DAVPTConfig, NotCalibratedError, VPTConfig, auxiliary_loss, calibrate
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.methods.prompt.da_vpt import proxy_anchor, refresh_class_map


SIZES = {"num_virtual_tokens": 3, "num_proxies": 2}
LABELS = torch.tensor([0, 2, 1, 2])


def config_of(**fields):
    return DAVPTConfig(**SIZES | {"class_map": [0, 1, 1], "init_weights": False} | fields)


def cosine(a, b):
    return float(sum(x * y for x, y in zip(a, b, strict=True)) / (a.norm() * b.norm()))


def anchored(features, proxies, labels, class_map, scale=1.0):
    """The proxy-anchor loss as sums over lists."""
    pulls, pushes = [], []
    for number, proxy in enumerate(proxies):
        similar = [scale * cosine(feature, proxy) for feature in features]
        own = [s for s, label in zip(similar, labels, strict=True) if class_map[label] == number]
        others = [s for s, label in zip(similar, labels, strict=True) if class_map[label] != number]
        pulls.append(math.log(1 + sum(math.exp(-32 * (s - 0.1)) for s in own)))
        pushes.append(math.log(1 + sum(math.exp(32 * (s + 0.1)) for s in others)))
    return sum(pulls) / len(pulls) + sum(pushes) / len(pushes)


@both
@pytest.mark.parametrize("norm", ["none", "l2", "layer"])
@torch.no_grad()
def test_equation(name, norm):
    (blocks, x, final), model, actual, family = adapted(name, config_of(norm=norm))
    found = weights_of(model, "davpt_tokens")
    shared = weights_of(model, f"davpt_norm{WIDTH}").get(0)
    for index, block in enumerate(blocks):
        prompts = found[index]["prompts"]
        assert len(prompts) == (2 if index == DEPTH - 1 else 3)
        if norm == "l2":
            prompts = prompts / prompts.norm(dim=-1, keepdim=True)
        if norm == "layer":
            prompts = F.layer_norm(prompts, (WIDTH,), shared["weight"], shared["bias"], 1e-6)
        x, _ = through(block, x, family.prefix, prompts.expand(len(x), -1, -1))
    assert_equal(actual, final(x))


@pytest.mark.parametrize(
    ("name", "layers", "weights"),
    [("vit", None, (0.5, 0.25)), ("vit", [0, 2], (0.0, 0.25)), ("dinov2_registers", [0, 2], (0.5, 0.25))],
)
def test_loss(name, layers, weights):
    config = config_of(proxy_layers=layers, patch_weight=weights[0], cls_weight=weights[1], proxy_scale=1.5)
    (blocks, _, _), model, _, family = adapted(name, config)
    inputs, class_map = family.inputs(4), [0, 1, 1]
    with torch.no_grad():
        base = family.model()
        x = plain_parts(name, base, inputs["pixel_values"])[1]
        found, expected, chosen = weights_of(model, "davpt_tokens"), 0.0, layers or [DEPTH - 1]
        for index, block in enumerate(blocks):
            prompts = found[index]["prompts"]
            if index in chosen:
                patches = x[:, family.prefix :].mean(dim=1)
                query = block.norm(1, x[:, 0]) @ block.qkv[0][0].T + block.qkv[0][1]
                expected += weights[0] * anchored(patches, prompts, LABELS, class_map, 1.5) / len(chosen)
                expected += weights[1] * anchored(query, prompts, LABELS, class_map, 1.5) / len(chosen)
            x, _ = through(block, x, family.prefix, prompts.expand(len(x), -1, -1))
    out = model(**inputs, labels=LABELS)
    task = F.cross_entropy(out.logits, LABELS)
    assert float((out.loss - task).detach()) == pytest.approx(expected, rel=1e-4)
    logits = model(**inputs).logits
    assert auxiliary_loss(model, labels=LABELS).item() == pytest.approx(expected, rel=1e-4)
    F.cross_entropy(logits, LABELS).backward()
    out.loss.backward()
    assert all(p.grad is not None for key, p in model.named_parameters() if "davpt_" in key)


def test_loss_in_windows():
    """Prompts are keys and values of all windows; the loss has the mean of the last stage's patches."""
    config = config_of(cls_weight=0.0, patch_weight=0.5)
    _, model, pixels, _ = swin_with(config)
    seen = []
    run_swin(model.get_base_model(), pixels, lambda place, x, z, y: (seen.append(x), y)[1])
    prompts = [p for key, p in model.named_parameters() if "davpt_tokens" in key]
    assert [tuple(p.shape) for p in prompts] == [(3, 8), (3, 16), (3, 16), (2, 32)]
    vpt = get_peft_model(tiny_swin(), VPTConfig(num_virtual_tokens=3)).eval()
    last = len(prompts) - 1
    with torch.no_grad():
        for index, (key, own) in enumerate((k, p) for k, p in vpt.named_parameters() if "vpt_tokens" in k):
            # twice the first of two tokens weighs other than once, so the last block is compared by itself
            own.copy_(prompts[index] if index < last else torch.cat([prompts[index], prompts[index][:1]]))
            assert "layers.2" in key or index < last
    inner = []
    run_swin(vpt.get_base_model(), pixels, lambda place, x, z, y: (inner.append(x), y)[1])
    torch.testing.assert_close(inner[last], seen[last])
    out = model(pixels, labels=LABELS[:2])
    expected = 0.5 * anchored(seen[last].mean(dim=1), prompts[last], LABELS[:2], [0, 1, 1])
    assert (out.loss - F.cross_entropy(out.logits, LABELS[:2])).item() == pytest.approx(expected, rel=1e-4)


def test_images_without_a_class_do_not_count():
    torch.manual_seed(0)
    similar = torch.rand(4, 3)
    some = proxy_anchor(similar, torch.tensor([0, -100, 2, -100]))
    torch.testing.assert_close(some, proxy_anchor(similar[[0, 2]], torch.tensor([0, 2])))


def test_without_weights_it_is_vpt():
    """No loss, nothing to calibrate."""
    config = config_of(class_map=None, patch_weight=0.0, cls_weight=0.0)
    assert not config.has_auxiliary_loss
    assert not config.chooses_from_data
    _, model, _, family = adapted("vit", config)
    out = model(**family.inputs(4), labels=LABELS)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, LABELS))
    with pytest.raises(ValueError, match="chooses nothing from data"):
        calibrate(model, [])


def test_first_values():
    torch.manual_seed(0)
    model = get_peft_model(
        FAMILIES["vit"].model(), DAVPTConfig(num_virtual_tokens=40, num_proxies=30, init_scale=0.125)
    )
    for index, weights in weights_of(model, "davpt_tokens").items():
        bound = 0.125 * (6 / (WIDTH * (30 + 1 if index == DEPTH - 1 else 40 + DEPTH - 1))) ** 0.5
        assert 0.95 * bound < weights["prompts"].abs().max() <= bound


def many_classes(count=7):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        num_labels=count,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def loader_of(count=7, each=3):
    """Batches with images of all classes, those of one class alike."""
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randn(count, 3, 16, 16, generator=generator)
    noise = torch.randn(each, count, 3, 16, 16, generator=generator)
    return [{"pixel_values": kinds + 0.3 * n, "labels": torch.arange(count)} for n in noise]


def plain_k_means(points, centres):
    """With lists and loops."""
    for _ in range(20):
        groups = [max(range(len(centres)), key=lambda k, p=p: cosine(p, centres[k])) for p in points]
        moved = []
        for k, centre in enumerate(centres):
            own = [p for p, group in zip(points, groups, strict=True) if group == k]
            moved.append(sum(own) / len(own) if own else centre)
        if sum(float((a - b).norm()) for a, b in zip(moved, centres, strict=True)) < 1e-4:
            break
        centres = moved
    return groups


def class_means(model, loader):
    with torch.no_grad():
        features = [model.vit(batch["pixel_values"]).last_hidden_state[:, 0] for batch in loader]
    means = torch.stack(features).mean(dim=0)
    return (means - means.mean(1, keepdim=True)) / (means.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()


def test_classes_are_grouped_by_the_frozen_model(tmp_path):
    loader, base = loader_of(), many_classes()
    points = class_means(base, loader)
    model = get_peft_model(many_classes(), DAVPTConfig(num_virtual_tokens=2, num_proxies=3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calibrate(model, loader, seed=5, progress=False)
    found = model.peft_config["default"].class_map
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    torch.manual_seed(5)
    torch.randint(3, (7,))  # the proxies of classes without images are drawn first
    assert found == plain_k_means(list(points), [points[i] for i in torch.randperm(7)[:3]])
    assert set(found) == {0, 1, 2}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(many_classes(), tmp_path)
    assert loaded.peft_config["default"].class_map == found


def test_groups_are_found_again_from_those_that_there_are():
    loader = loader_of()
    model = get_peft_model(many_classes(), DAVPTConfig(num_virtual_tokens=2, num_proxies=3, init_weights=False))
    calibrate(model, loader, progress=False)
    config = model.peft_config["default"]
    before = list(config.class_map)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * ("davpt" in name))
    model.train()
    refresh_class_map(model, loader)
    assert model.training
    inner = model.get_base_model().eval()
    points = class_means(inner, loader)
    starts = [torch.stack([p for p, g in zip(points, before, strict=True) if g == k]).mean(0) for k in range(3)]
    assert config.class_map == plain_k_means(list(points), starts)


def test_enough_proxies_for_all_classes_and_a_head_less_model():
    model = get_peft_model(many_classes(), DAVPTConfig(num_virtual_tokens=2))
    calibrate(model, loader_of(), progress=False)
    assert model.peft_config["default"].class_map == list(range(7))
    bare = get_peft_model(ViTModel(many_classes().config), DAVPTConfig(num_virtual_tokens=2, num_proxies=3))
    calibrate(bare, loader_of(), progress=False)
    assert len(bare.peft_config["default"].class_map) == 7


def test_before_calibration_and_without_labels():
    model = get_peft_model(many_classes(), DAVPTConfig(**SIZES))
    batch = loader_of()[0]
    with torch.no_grad():
        model(batch["pixel_values"])  # evaluation needs no classes
    with pytest.raises(NotCalibratedError, match="DA-VPT"):
        model(**batch)
    model.peft_config["default"].class_map = [0, 1] * 3 + [0]
    model(batch["pixel_values"])
    with pytest.raises(ValueError, match="compares images by their classes. Call the model with labels"):
        auxiliary_loss(model)
    model(batch["pixel_values"])
    with pytest.raises(ValueError, match="one class for each of 7 images"):
        auxiliary_loss(model, labels=torch.rand(7, 7))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "no batch"),
        ([b | {"labels": b["labels"] + 1} for b in loader_of()], "labels must be from 0 to 6"),
        ([b | {"labels": torch.rand(7, 7)} for b in loader_of()], "one class per image"),
        ([{k: v[:2] for k, v in b.items()} for b in loader_of()], "images of 2 classes, fewer than .*num_proxies, 3"),
        ([b | {"pixel_values": b["pixel_values"] / 0} for b in loader_of()], "not finite"),
    ],
)
def test_bad_data(loader, message):
    model = get_peft_model(many_classes(), DAVPTConfig(num_virtual_tokens=2, num_proxies=3))
    with pytest.raises(ValueError, match=message):
        calibrate(model, loader, progress=False)
    assert model.peft_config["default"].class_map is None
    with pytest.raises(ValueError, match="it has no class_map yet; calibrate it first"):
        refresh_class_map(model, loader)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
        ({"num_proxies": True}, "num_proxies is True: must be an integer"),
        ({"proxy_layers": []}, r"proxy_layers is \[\]"),
        ({"proxy_layers": [-1]}, r"proxy_layers is \[-1\]"),
        ({"norm": "batch"}, "norm is 'batch': must be one of 'none', 'l2', 'layer'"),
        ({"patch_weight": -0.1}, "patch_weight is -0.1"),
        ({"cls_weight": float("nan")}, "cls_weight is nan"),
        ({"proxy_scale": 0.0}, "proxy_scale is 0.0"),
        ({"init_scale": -1.0}, "init_scale is -1.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"biases": "all"}, "biases is 'all': must be one of True, False"),
        (
            {"class_map": [0, 2, 1]},
            r"class_map is .*: must be a list of numbers from 0 to 1 \(num_proxies - 1\)",
        ),
        ({"class_map": []}, r"class_map is \[\]"),
        ({"class_map": [0, 1.0]}, r"class_map is \[0, 1.0\]"),
        ({"class_map": [0, 1]}, r"class_map is \[0, 1\]: must be None, or a list of 3 numbers, one for each class"),
        ({"proxy_layers": 3}, r"proxy_layers is \[3\]: must be indices of adapted blocks: 0, 1, 2"),
        ({"proxy_layers": 2, "layers_to_transform": [0, 1]}, r"proxy_layers is \[2\]: .*: 0, 1\.$"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=f"DAVPTConfig.{message}"):
        get_peft_model(FAMILIES["vit"].model(), DAVPTConfig(**SIZES | fields))


def test_models_without_cls_or_one_class_an_image():
    with pytest.raises(ValueError, match="cls_weight is 0.05: must be 0 for SwinModel, whose tokens have no CLS"):
        get_peft_model(tiny_swin(), DAVPTConfig(**SIZES))
    with pytest.raises(ValueError, match=r"its head has classes for positions.*Set patch_weight and cls_weight to 0"):
        get_peft_model(MODELS["beit_segmentation"].model(), DAVPTConfig(**SIZES))
