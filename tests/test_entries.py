"""Ways into a model beside its forward: methods that take images, and parts that are called by themselves."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from peft import get_peft_model
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification

from hf_visual_peft import (
    AdaptFormerConfig,
    ILMVPConfig,
    LSTConfig,
    SideTuningConfig,
    SSFConfig,
    STAdapterConfig,
    UniPTConfig,
    VPConfig,
    VPTConfig,
)


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 12}
SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2)}
CNN = {"num_classes": 12, "pretrained_cfg_overlay": {"input_size": (3, 32, 32)}}
ENTRIES = {
    "vit": ["forward_features", "forward_intermediates", "get_intermediate_layers"],
    "swin": ["forward_features", "forward_intermediates"],
    "resnet": ["forward_features", "forward_intermediates"],
    "convnext": ["forward_features", "forward_intermediates"],
}


def timm_model(kind):
    torch.manual_seed(0)
    if kind == "vit":
        return timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    if kind == "swin":
        return timm.create_model("swin_tiny_patch4_window7_224", num_classes=12, **SWIN).eval()
    if kind == "resnet":
        return timm.create_model("resnet18", **CNN, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8)).eval()
    return timm.create_model("convnext_tiny", **CNN, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)).eval()


def vit(**fields):
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=12, **fields)).eval()


def clip():
    torch.manual_seed(0)
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    text = {**SIZES, "vocab_size": 20, "max_position_embeddings": 8}
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)).eval()


def images(batch=2):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def adapted(base, config):
    torch.manual_seed(3)
    config.init_weights = False
    model = get_peft_model(copy.deepcopy(base), config).eval()
    for name, parameter in model.named_parameters():
        if "_pixels." in name:
            torch.nn.init.normal_(parameter)
    return model


def framed(model, x):
    """The images with the frame of `VPConfig(width=3)`, in plain torch."""
    p = {name.rpartition(".")[2]: p for name, p in model.named_parameters() if "_pixels." in name}
    x = x.clone()
    x[:, :, :3] += p["top"]
    x[:, :, -3:] += p["bottom"]
    x[:, :, 3:-3, :3] += p["left"]
    x[:, :, 3:-3, -3:] += p["right"]
    return x


def assert_same(found, expected):
    found, expected = ([x for x in tree_leaves(each) if isinstance(x, torch.Tensor)] for each in (found, expected))
    assert expected
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("kind", "entry"), [(kind, entry) for kind, names in ENTRIES.items() for entry in names])
@torch.no_grad()
def test_images_are_changed_once_by_every_method_that_takes_them(kind, entry):
    base = timm_model(kind)
    model = adapted(base, VPConfig(width=3))
    x = images()
    expected = getattr(base, entry)(framed(model, x))
    assert_same(getattr(model, entry)(x), expected)
    assert_same(getattr(pickle.loads(pickle.dumps(model)), entry)(x), expected)  # a copy has its own
    with pytest.raises(AssertionError):
        assert_same(getattr(base, entry)(x), expected)
    assert_same(model(x), base(framed(model, x)))
    with model.disable_adapter():
        assert_same(getattr(model, entry)(x), getattr(base, entry)(x))
    assert vars(model.unload()).keys() == vars(base).keys()


@torch.no_grad()
def test_an_error_inside_leaves_no_pass_open():
    base = timm_model("vit")
    model = adapted(base, VPConfig(width=3))
    for call in (model, model.forward_features):
        with pytest.raises((ValueError, AssertionError)):
            call(images()[:, :, :24])
    assert_same(model.forward_features(images()), base.forward_features(framed(model, images())))
    assert_same(model(images()), base(framed(model, images())))


def test_checkpointing_around_a_method():
    base = timm_model("vit")
    model = adapted(base, VPConfig(width=3))
    gradients = []
    for call in (model.forward_features, lambda x: checkpoint(model.forward_features, x, use_reentrant=False)):
        model.zero_grad()
        call(images()).square().sum().backward()
        gradients.append([p.grad.clone() for n, p in model.named_parameters() if "_pixels." in n])
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_parts_of_a_transformers_model_that_take_images():
    base = vit()
    model = adapted(base, VPConfig(width=3))
    assert_same(model.vit(images()).last_hidden_state, base.vit(framed(model, images())).last_hidden_state)
    assert_same(model.vit(pixel_values=images())[0], base.vit(framed(model, images()))[0])
    base = clip()
    model = adapted(base, VPConfig(width=3))
    expected = framed(model, images())
    assert_same(model.get_image_features(images())[0], base.get_image_features(expected)[0])
    assert_same(model.vision_model(pixel_values=images())[0], base.vision_model(pixel_values=expected)[0])


@pytest.mark.parametrize("part", ["embeddings", "embeddings.patch_embeddings"])
def test_images_that_pass_the_adapter_are_refused(part):
    model = adapted(vit(), VPConfig(width=3))
    module = model.get_base_model().vit.get_submodule(part)
    with pytest.raises(ValueError, match="past the adapter.*ViTModel.*disable_adapter"):
        module(images())
    with model.disable_adapter():
        module(images())
    model(images())
    model.merge_adapter()  # then the weights hold the change
    module(images())
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="past the adapter"):
        module(images())


def test_a_trained_copy_of_the_patch_embedding_is_guarded():
    base = vit()
    model = adapted(base, VPConfig(width=3, modules_to_save=["patch_embeddings"]))
    model(images())
    with pytest.raises(ValueError, match="past the adapter"):
        model.get_base_model().vit.embeddings(images())
    kept = model.merge_and_unload()
    assert not any(module._forward_pre_hooks for module in kept.modules())


METHODS = {
    "vpt": VPTConfig(num_virtual_tokens=2, deep=False),
    "deep": VPTConfig(num_virtual_tokens=2),
    "adaptformer": AdaptFormerConfig(r=4),
    "ssf": SSFConfig(),
    "lst": LSTConfig(),
    "side": SideTuningConfig(),
    "unipt": UniPTConfig(),
    "vp": VPConfig(width=3),
    "map": ILMVPConfig(inner_size=16, label_map=[3, 1, 7]),
}


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_features_and_head_give_what_the_model_gives(name):
    model = adapted(timm_model("vit"), copy.deepcopy(METHODS[name]))
    x = images()
    expected = model(x)
    assert_same(model.forward_head(model.forward_features(x)), expected)
    # a pass that ends early leaves nothing for the next
    model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert_same(model(x), expected)
    assert_same(model.forward_head(model.forward_features(x)), expected)
    assert_same(model.forward_intermediates(x)[0], model.forward_features(x))


def test_images_to_a_part_of_a_model_for_videos_are_not_taken_for_frames():
    model = adapted(vit(), STAdapterConfig(channels=4))
    model(torch.stack([images(), images()]))
    with pytest.raises(ValueError, match="number of frames is not known"):
        model.get_base_model().vit(images())
    with pytest.raises(ValueError, match="for videos"):
        model(images())
    with pytest.raises(ValueError, match="number of frames is not known"):  # nor after an error
        model.get_base_model().vit(images())
