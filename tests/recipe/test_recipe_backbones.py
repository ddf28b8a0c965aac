"""The recipe on other backbones: timm's checkpoints, stochastic depth, and learning rates by depth."""

import re

import image_classification
import optimization
import pytest
import torch
from peft import PeftModel, get_peft_model
from recipe_runs import SIZE, accuracy_by_hand
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2Model,
    SwinConfig,
    SwinForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import hf_visual_peft
from hf_visual_peft import AdaptFormerConfig, VPTConfig


CHEAP = ["--max_train_steps", 2, "--checkpointing_steps", "no"]
TIMM = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "resnet18": {"channels": (8, 8, 16, 16)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8)},
}


@pytest.fixture
def timm_checkpoint(tmp_path):
    pytest.importorskip("timm")

    def make(name):
        folder = tmp_path / name
        config = TimmWrapperConfig(architecture=name, model_args=TIMM[name], num_labels=3)
        config.pretrained_cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
        TimmWrapperForImageClassification(config).save_pretrained(folder)
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("name", "method", "flags"),
    [
        ("vit_tiny_patch16_224", "vpt", []),
        ("vit_tiny_patch16_224", "full", ["--train_crop", "random"]),
        ("vit_tiny_patch16_224", "lora", ["--train_crop", "none"]),
        ("vit_tiny_patch16_224", "linear", ["--drop_path_rate", "0.0"]),
        ("resnet18", "linear", ["--image_size", 48]),
        ("resnet18", "bitfit", ["--train_crop", "random"]),
        ("convnext_atto", "full", ["--image_size", 64, "--drop_path_rate", 0.2]),
    ],
)
def test_checkpoints_of_timm_train_and_reload(run, timm_checkpoint, photos, name, method, flags):
    checkpoint = timm_checkpoint(name)
    done = run("--model_name_or_path", checkpoint, *CHEAP, *flags, method=method)
    whole = method in ("full", "linear")
    base = AutoModelForImageClassification.from_pretrained(done.output if whole else checkpoint, num_labels=3)
    model = base if whole else PeftModel.from_pretrained(base, done.output)
    beside = {"image_processor_filename": "preprocessor_config.json"}  # not config.json, which is that of whole models
    if whole:
        processor = AutoImageProcessor.from_pretrained(done.output)
    else:
        processor = TimmWrapperImageProcessor.from_pretrained(done.output, **beside)
        again = AutoModelForImageClassification.from_pretrained(done.output)
        assert list(again.config.id2label.values()) == ["blue", "green", "red"]
    words = ["--model_name_or_path", done.output, "--eval_only", "--test_dir", photos / "test"]
    found = image_classification.main([*map(str, words), "--output_dir", str(done.output / "predicted")])
    assert found["loss"] == pytest.approx(done.results["test_loss"], abs=1e-6)
    side = dict(zip(flags[::2], flags[1::2], strict=True)).get("--image_size", 32)
    assert tuple(processor.data_config["input_size"][1:]) == (side, side)
    assert accuracy_by_hand(model, photos / "test", processor) == done.results["test_accuracy"]


def test_a_crop_for_timm_is_normalised_and_not_cut_again(timm_checkpoint):
    """With crop_pct 0.9 timm would enlarge and cut what is cropped already."""
    import numpy as np
    from image_data import input_size, resampling, without_resize
    from PIL import Image

    processor = AutoImageProcessor.from_pretrained(timm_checkpoint("vit_tiny_patch16_224"))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = without_resize(processor)(images=[Image.fromarray(pixels)], return_tensors="pt")["pixel_values"][0]
    expected = (torch.tensor(pixels).permute(2, 0, 1) / 255 - 0.5) / 0.5
    assert torch.allclose(found, expected, atol=1e-6)
    assert input_size(processor) == (32, 32)
    assert resampling(processor) == Image.Resampling.BICUBIC


# ------------------------------------------------------------------------------------------------ stochastic depth


def swin():
    return SwinForImageClassification(
        SwinConfig(
            image_size=32, patch_size=4, embed_dim=16, depths=[1, 2], num_heads=[1, 2], window_size=4, num_labels=3
        )
    )


def save(model, folder):
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def test_stochastic_depth_acts_where_the_model_has_it(run, tmp_path, monkeypatch):
    checkpoint = save(swin(), tmp_path / "swin")
    rates = {}
    train = hf_visual_peft.parameter_groups

    def look(model, *others):
        rates[len(rates)] = [m.drop_prob for m in model.modules() if type(m).__name__.endswith("DropPath")]
        return train(model, *others)

    monkeypatch.setattr(hf_visual_peft, "parameter_groups", look)
    plain = run("--model_name_or_path", checkpoint, *CHEAP, method="bitfit", output="plain")
    flags = ["--model_name_or_path", checkpoint, *CHEAP, "--drop_path_rate", 0.4]
    dropped = run(*flags, method="bitfit", output="dropped")
    assert max(rates[0], default=0.0) == pytest.approx(0.1)  # as the checkpoint says
    assert max(rates[1]) == pytest.approx(0.4)
    assert dropped.results["train_loss"] != plain.results["train_loss"]


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("vit", "bitfit", "--drop_path_rate: vit models have no stochastic depth"),
        ("dinov2", "lst", "has no effect in this model with --method lst"),
        ("dinov2", "linear", None),
    ],
)
def test_stochastic_depth_is_refused_where_it_would_do_nothing(run, vit, tmp_path, kind, method, message):
    checkpoint = vit
    if kind == "dinov2":
        checkpoint = save(Dinov2Model(Dinov2Config(**SIZE, mlp_ratio=2)), tmp_path / "dinov2")
    flags = ["--model_name_or_path", checkpoint, *CHEAP, "--drop_path_rate", 0.2]
    if message is None:
        run(*flags, method=method)
    else:
        with pytest.raises(ValueError, match=message):
            run(*flags, *(["--r", 4] if method == "lst" else []), method=method)


# -------------------------------------------------------------------------------------- learning rates by depth


def rates(model, decay=0.5):
    args = optimization.argparse.Namespace(
        weight_decay=0.1, learning_rate=1.0, layer_lr_decay=decay, optim="adamw_torch", vision_learning_rate=None,
        text_learning_rate=None, optim_betas=None, optim_momentum=None, optim_eps=None,
    )  # fmt: skip
    optimizer = optimization.build_optimizer(model, args)
    of_parameter = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    names = {name: of_parameter[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert len(names) == sum(len(group["params"]) for group in optimizer.param_groups)
    return names


def vit_model():
    return ViTForImageClassification(ViTConfig(**SIZE | {"num_hidden_layers": 3}, intermediate_size=64, num_labels=3))


def test_each_block_learns_slower_than_the_next():
    found = rates(vit_model())
    for name, rate in found.items():
        block = re.search(r"layers?\.(\d+)\.", name)
        expected = 0.5 ** (3 - int(block[1])) if block else 0.5**4 if "embeddings" in name else 1.0
        assert rate == expected, name


@pytest.mark.parametrize(
    "config", [AdaptFormerConfig(r=4), VPTConfig(num_virtual_tokens=2)], ids=lambda c: c.peft_type
)
def test_adapters_have_the_rate_of_their_block_and_heads_the_whole(config):
    found = rates(get_peft_model(vit_model(), config))
    assert {rate for name, rate in found.items() if "classifier" in name} == {1.0}
    assert {rate for name, rate in found.items() if "classifier" not in name} == {0.125, 0.25, 0.5}
    assert found[next(name for name in found if ".2." in name)] == 0.5


def test_between_stages_the_rate_is_that_of_the_block_before():
    found = rates(swin())
    assert found["swin.encoder.layers.0.downsample.reduction.weight"] == 0.5**3
    assert found["swin.encoder.layers.1.blocks.1.layernorm_after.weight"] == 0.5
    assert found["swin.layernorm.weight"] == 1.0
    found = rates(ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2)))
    assert found["convnext.encoder.stages.1.downsampling_layer.1.weight"] == 0.5**3
    assert found["convnext.embeddings.layernorm.weight"] == 0.5**4


def test_a_run_takes_the_rates(run):
    slow = run(*CHEAP, "--layer_lr_decay", 0.1, "--select", "last", method="bitfit", output="slow")
    plain = run(*CHEAP, "--select", "last", method="bitfit", output="plain")
    assert slow.results["train_loss"] != plain.results["train_loss"]


def test_a_head_for_other_classes_is_named_with_the_way_out(run, tmp_path):
    model = ViTForImageClassification(ViTConfig(**SIZE, intermediate_size=64, num_labels=10))
    checkpoint = save(model, tmp_path / "ten")
    flags = ["--model_name_or_path", checkpoint, *CHEAP]
    with pytest.raises(
        ValueError, match="has a different number of classes from the 3 of the data: give --ignore_mis"
    ):
        run(*flags, method="linear")
    run(*flags, "--ignore_mismatched_sizes", method="linear", output="new")
