"""Calibration: bad data, what it leaves as it was, and that what was chosen travels."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import FAMILIES, images, output_of
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch.utils.data import DataLoader, IterableDataset

from hf_visual_peft import GPSConfig, NotCalibratedError, SCTConfig, SSFConfig, VPTConfig, calibrate
from hf_visual_peft.core.calibration import Calibration
from hf_visual_peft.sites.block_checks import NormFirst


CONFIGS = {"sct": lambda: SCTConfig(channels=5), "gps": lambda: GPSConfig()}
both_methods = pytest.mark.parametrize("name", CONFIGS)
FAMILY = FAMILIES["vit"]
BATCH = images(4) | {"labels": torch.tensor([0, 1, 0, 1])}
OTHER = images(5) | {"labels": torch.tensor([2, 1, 2, 1, 0])}


def fresh(name, **kwargs):
    return get_peft_model(FAMILY.model(), CONFIGS[name](), **kwargs)


def choices(model, adapter="default"):
    return {n: b.clone() for n, b in model.named_buffers() if n.endswith(".indices") and f".{adapter}." in n}


def same(one, other):
    assert one.keys() == other.keys()
    assert one
    return all(torch.equal(one[key], other[key]) for key in one)


class Samples(torch.utils.data.Dataset):
    """Images with labels, one by one; random numbers of all kinds are drawn on the way, as by augmentation."""

    def __init__(self, count=24):
        self.images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return {"pixel_values": self.images[index] * (1 + noise), "labels": index % 3}


def broken(message, name, dataloader, **kwargs):
    """Calibration fails and leaves model and adapter as they were."""
    model = fresh(name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        calibrate(model, dataloader, progress=False, **kwargs)
    assert_unchanged(before, model)
    assert all((value == -1).all() for value in choices(model).values()), "nothing is chosen"
    with pytest.raises(NotCalibratedError):
        output_of(model, images(2))


def snapshot(model):
    modules = dict(model.named_modules())
    return {
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
        "training": {name: module.training for name, module in modules.items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {
            name: (id(p.grad), None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()
        },
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "active": {
            n: (m.active_adapters, m.disable_adapters) for n, m in modules.items() if isinstance(m, BaseTunerLayer)
        },
        "hooks": {n: (len(m._forward_hooks), _lasting(m._forward_pre_hooks)) for n, m in modules.items()},
        "hooks of parameters": {n: len(p._post_accumulate_grad_hooks or ()) for n, p in model.named_parameters()},
    }


def _lasting(hooks):
    """How many there are, but for those that look at the first call and then go."""
    return sum(not isinstance(getattr(hook, "__self__", None), NormFirst) for hook in hooks.values())


def assert_unchanged(before, model):
    after = snapshot(model)
    for key in ("training", "requires_grad", "active", "hooks", "hooks of parameters"):
        assert before[key] == after[key], key
    for one, other in zip(before["random"], after["random"], strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert all(torch.equal(before["weights"][n], value) for n, value in after["weights"].items())
    for n, (identity, value) in before["gradients"].items():
        assert after["gradients"][n][0] == identity, n
        assert value is None or torch.equal(after["gradients"][n][1], value)


# ------------------------------------------------------------ bad input


@both_methods
@pytest.mark.parametrize("empty", [list, lambda: iter(()), lambda: DataLoader([])], ids=["list", "iterator", "loader"])
def test_no_batch(name, empty):
    broken("dataloader gives no batch: there is nothing to choose from", name, empty())


@both_methods
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_name_their_batch(name, value):
    bad = {**BATCH, "pixel_values": BATCH["pixel_values"].clone()}
    bad["pixel_values"][2, 1, 5, 5] = value
    broken(r"pixel_values of batch 2 are not finite \(NaN or infinity\)", name, [BATCH, BATCH, bad, BATCH])


@both_methods
@pytest.mark.parametrize(
    ("batch", "got"),
    [
        (images(4), r"pixel_values \(Tensor\)\."),
        ({"labels": BATCH["labels"], "image": BATCH["pixel_values"]}, r"labels \(Tensor\), image \(Tensor\)\."),
        (BATCH | {"labels": None}, r"pixel_values \(Tensor\), labels \(NoneType\)\."),
        (BATCH | {"labels": [0, 1, 0, 1]}, r"labels \(list\)\."),
        ((BATCH["pixel_values"], BATCH["labels"]), r"tuple\."),
        ({}, r"dict\."),
    ],
    ids=["no labels", "no pixels", "None", "list", "pair", "nothing"],
)
def test_batches_without_images_or_labels(name, batch, got):
    broken(rf"batch 1 must be a mapping with the tensors pixel_values and labels, got .*{got}", name, [BATCH, batch])


def test_loss_and_contrast_of_images_with_several_classes():
    """The loss is binary cross entropy; GPS, which contrasts one class an image, refuses."""
    several = {**images(4), "labels": torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])}
    broken(r"GPS contrasts classes: .* got shape \(4, 3\)", "gps", [several])
    logits = torch.randn(4, 3)
    model = SimpleNamespace(backbone=SimpleNamespace(heads=["head"]), model=None, output=lambda batch: logits)
    p, y = logits.sigmoid(), several["labels"]
    by_hand = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    torch.testing.assert_close(Calibration.loss(model, dict(several), "this test"), by_hand)


@both_methods
def test_unknown_adapter(name):
    broken("adapter_name is 'other': the model has default", name, [BATCH], adapter_name="other")


@both_methods
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "all"])
def test_max_batches(name, value):
    broken(rf"max_batches is {value!r}: must be None or an integer of at least 1", name, [BATCH], max_batches=value)


@pytest.mark.parametrize("config", [VPTConfig(), SSFConfig()], ids=lambda c: c.peft_type.value)
def test_methods_that_choose_nothing(config):
    model = get_peft_model(FAMILY.model(), config)
    with pytest.raises(ValueError, match=rf"{type(config).__name__} chooses nothing from data: train it without"):
        calibrate(model, [BATCH])


def test_model_without_adapter_and_method_of_peft():
    from peft import LoraConfig

    with pytest.raises(ValueError, match="adapter_name is 'default': the model has no adapter"):
        calibrate(FAMILY.model(), [BATCH])
    with pytest.raises(ValueError, match="LoraConfig chooses nothing from data"):
        calibrate(get_peft_model(FAMILY.model(), LoraConfig(target_modules=["q_proj"])), [BATCH])


@both_methods
def test_an_error_of_the_loader_leaves_all_as_it_was(name):
    def loader():
        yield BATCH
        raise OSError("disk gone")

    model = fresh(name)
    before = snapshot(model)
    with pytest.raises(OSError, match="disk gone"):
        calibrate(model, loader(), progress=False)
    assert_unchanged(before, model)


def test_a_pass_that_fails_keeps_the_choice_before():
    model = fresh("sct")
    calibrate(model, [BATCH], progress=False)
    before = choices(model)
    bad = {**BATCH, "pixel_values": torch.full_like(BATCH["pixel_values"], float("nan"))}
    with pytest.raises(ValueError, match="batch 1"):
        calibrate(model, [OTHER, bad], progress=False)
    assert same(before, choices(model))


# ------------------------------------------------------------ what it leaves as it was


@both_methods
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_everything_is_as_before(name, mode):
    model = fresh(name)
    model.add_adapter("second", CONFIGS[name]())
    model.train(mode != "eval")
    if mode == "mixed":
        model.get_base_model().vit.embeddings.eval()
    for index, parameter in enumerate(model.parameters()):
        if index % 3 == 0:
            parameter.grad = torch.randn_like(parameter)
    dict(model.named_parameters())["base_model.model.vit.embeddings.cls_token"].requires_grad_(True)
    random.seed(5)
    np.random.seed(6)
    before = snapshot(model)
    calibrate(model, DataLoader(Samples(), batch_size=6, shuffle=True), adapter_name="second", progress=False)
    assert_unchanged(before, model)
    assert model.active_adapter == "default"
    assert all((value >= 0).all() for value in choices(model, "second").values())
    assert all((value == -1).all() for value in choices(model).values())


@both_methods
def test_choice_is_made_with_adapters_off(name):
    """Another adapter, active and random, changes nothing; nor does what the caller switched off."""
    alone = fresh(name)
    calibrate(alone, [BATCH], progress=False)
    beside = get_peft_model(FAMILY.model(), CONFIGS[name]().__class__(init_weights=False), adapter_name="first")
    beside.add_adapter("default", CONFIGS[name]())
    assert beside.active_adapter == "first"
    calibrate(beside, [BATCH], progress=False)
    assert same(choices(alone), choices(beside))
    off = fresh(name)
    with off.disable_adapter():
        calibrate(off, [BATCH], progress=False)
        assert torch.equal(output_of(off, images(2)), output_of(FAMILY.model(), images(2)))
    assert same(choices(alone), choices(off))


@both_methods
def test_seed_decides(name):
    def chosen(seed, noise):
        random.seed(noise)
        np.random.seed(noise)
        torch.manual_seed(noise)
        loader = DataLoader(Samples(), batch_size=6, shuffle=True)
        calibrate(model, loader, seed=seed, max_batches=1, progress=False)
        return choices(model)

    model = fresh(name).train()
    first = chosen(seed=1, noise=1)
    assert same(first, chosen(seed=1, noise=2))
    assert not all(same(first, chosen(seed=seed, noise=1)) for seed in range(2, 8))


@both_methods
@pytest.mark.parametrize("wrap", [DataLoader, iter], ids=["loader", "iterator"])
@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (3, 3), (None, 5), (9, 5)])
def test_max_batches_limits_what_is_read(name, limit, expected, wrap):
    read = []

    class Stream(IterableDataset):
        def __iter__(self):
            for _ in range(5):
                read.append(1)
                yield BATCH

    model = fresh(name)
    loader = DataLoader(Stream(), batch_size=None) if wrap is DataLoader else iter(Stream())
    calibrate(model, loader, max_batches=limit, progress=False)
    assert len(read) == expected
    assert all((value >= 0).all() for value in choices(model).values())


@both_methods
def test_batches_after_the_limit_do_not_count(name):
    one, two, both = fresh(name), fresh(name), fresh(name)
    calibrate(one, [BATCH], progress=False)
    calibrate(two, [BATCH, OTHER], max_batches=1, progress=False)
    calibrate(both, [BATCH, OTHER], progress=False)
    assert same(choices(one), choices(two))
    assert not same(choices(one), choices(both))


@both_methods
def test_progress(name, capsys):
    calibrate(fresh(name), [BATCH] * 7, max_batches=3)
    assert "Calibrating: 100%" in (bar := capsys.readouterr().err)
    assert "3/3" in bar
    calibrate(fresh(name), [BATCH], progress=False)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------ before and after the choice


@both_methods
def test_forward_before_the_choice_says_what_to_do(name):
    model = fresh(name)
    for mode in (True, False):
        model.train(mode)
        with pytest.raises(
            NotCalibratedError,
            match=rf"{name.upper()} has not yet chosen what to train\. Call hf_visual_peft\.calibrate\(model, "
            r"dataloader\) after get_peft_model, or load a trained adapter\.",
        ):
            output_of(model, images(2))
    with model.disable_adapter():
        output_of(model, images(2))
    calibrate(model, [BATCH], progress=False)
    assert output_of(model, images(2)).isfinite().all()


@both_methods
def test_choice_travels_with_the_weights(name, tmp_path):
    model = fresh(name)
    calibrate(model, [BATCH, OTHER], progress=False)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if f".{name}_" in n:
                p.add_(torch.randn_like(p), alpha=0.1)
        expected = output_of(model.eval(), images(2))
    model.save_pretrained(tmp_path)
    saved = {n: v for n, v in load_file(tmp_path / "adapter_model.safetensors").items() if n.endswith(".indices")}
    chosen = {n.replace(".default", ""): value for n, value in choices(model).items()}
    assert same(saved, chosen)
    assert {value.dtype for value in saved.values()} == {torch.int32}
    loaded = PeftModel.from_pretrained(FAMILY.model(), tmp_path).eval()
    assert same(choices(loaded), choices(model))
    with torch.no_grad():
        assert torch.equal(output_of(loaded, images(2)), expected)
    native = FAMILY.model()
    native.load_adapter(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(output_of(native.eval(), images(2)), expected)


@both_methods
def test_model_of_transformers(name):
    """A model with `add_adapter`, without a `PeftModel` around it, chooses the same."""
    model = fresh(name)
    calibrate(model, [BATCH], progress=False)
    native = FAMILY.model()
    native.add_adapter(CONFIGS[name](), adapter_name="mine")
    before = snapshot(native)
    with pytest.raises(ValueError, match="adapter_name is 'default': the model has mine"):
        calibrate(native, [BATCH])
    calibrate(native, [BATCH], adapter_name="mine", progress=False)
    assert_unchanged(before, native)
    chosen = {f"base_model.model.{n}".replace(".mine.", ".default."): b for n, b in choices(native, "mine").items()}
    assert same(chosen, choices(model))
    assert output_of(native, images(2)).isfinite().all()
