"""What a cache of features is known by: no change that makes other features goes unnoticed."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from PIL import Image
from test_feature_cache import COUNT, Pictures, adapted, batch_of, build, cache_of
from torch import nn
from transformers import ViTConfig, ViTModel

from hf_visual_peft import LSTConfig
from hf_visual_peft.features.fingerprint import digest


def assert_apart(make, *changes, folder):
    """Models of equal weights that differ in something else have features of their own, and the right ones."""
    data = Pictures()
    for number, change in enumerate(({}, *changes), 1):
        model = make(**change).eval()
        features = batch_of(cache_of(model, folder).cached(data, key="a"), 4, 0)["cached_features"]
        found, expected = model(cached_features=features), model(data.pixels)
        found, expected = getattr(found, "logits", found), getattr(expected, "logits", expected)
        assert torch.allclose(found, expected[[4, 0]], atol=1e-5)
        assert len(list(folder.iterdir())) == number


def test_state_of_timm_models(tmp_path):
    timm = pytest.importorskip("timm")

    def make(**kwargs):
        torch.manual_seed(0)
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 3, "num_heads": 2}
        model = timm.create_model("vit_tiny_patch16_224", **{**sizes, "fc_norm": False, **kwargs})
        model.requires_grad_(False).head.requires_grad_(True)
        return model

    assert_apart(make, {"num_heads": 4}, {"act_layer": "quick_gelu"}, {"global_pool": "avg"}, folder=tmp_path)


class Wrapper(nn.Module):
    """A backbone of transformers in a module without a config."""

    def __init__(self, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        self.backbone = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8, **kwargs)).requires_grad_(False)
        self.head = nn.Linear(16, 3)

    def forward(self, pixel_values):
        return self.head(self.backbone(pixel_values).last_hidden_state[:, 0])


def test_config_of_a_module_inside(tmp_path):
    assert_apart(Wrapper, {"layer_norm_eps": 0.1}, {"hidden_act": "relu"}, folder=tmp_path)


class Parts(nn.Module):
    """Frozen parts beside each other, of which one is used without its forward."""

    def __init__(self, scale=1.0, factor=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.middle = nn.Linear(48, 8), nn.Linear(8, 8, bias=False)
        self.end = nn.Linear(8, 8)
        self.requires_grad_(False).head = nn.Linear(8, 3)
        self.scale = scale
        self.middle.weight.mul_(factor)

    def forward(self, pixel_values):
        middle = F.linear(self.scale * self.body(pixel_values[:, :, :4, :4].flatten(1)), self.middle.weight)
        return self.head(self.end(middle))


def test_an_attribute_between_frozen_parts(tmp_path):
    assert_apart(Parts, {"scale": 5.0}, folder=tmp_path)


def test_weights_used_without_their_module(tmp_path):
    assert_apart(Parts, {"factor": 5.0}, folder=tmp_path)


def test_frozen_adapters_of_peft(tmp_path):
    def make(alpha=8, active="default", disabled=False):
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(FAMILIES["dinov2"].model(), config)
        model.add_adapter("other", config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
        model.set_adapter(active)
        model.requires_grad_(False).get_base_model().classifier.requires_grad_(True)
        if disabled:
            model.base_model.disable_adapter_layers()
        return model

    assert_apart(make, {"alpha": 64}, {"active": "other"}, {"disabled": True}, folder=tmp_path)


def test_what_changes_no_features_shares_them(tmp_path):
    def with_checkpointing(model):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def with_two_classes(model):
        model.classifier = nn.Linear(model.classifier.in_features, 2)
        model.num_labels = model.config.num_labels = 2

    for change in (lambda model: None, with_checkpointing, with_two_classes, lambda model: model.train()):
        model = FAMILIES["dinov2"].model()
        change(model)
        cache_of(adapted(model, "linear"), tmp_path).cached(Pictures(), key="a")
    assert len(list(tmp_path.iterdir())) == 1


def test_adapters_outside_share_features(tmp_path):
    model = build("lst")
    cache_of(model, tmp_path).cached(Pictures(), key="a")
    model.add_adapter("other", LSTConfig(r=4))
    model.set_adapter("other")
    cache_of(model, tmp_path).cached(Pictures(), key="a")
    assert len(list(tmp_path.iterdir())) == 1


def test_configs_of_any_kind(tmp_path):
    for config in (SimpleNamespace(layers=2), {"layers": 2}, {"layers": 3}, object(), "a name"):
        model = Parts()
        model.config = config
        assert len(cache_of(model, tmp_path).cached(Pictures(), key="a")) == COUNT
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("frames", [False, True])
def test_files_that_rows_only_name(frames, tmp_path):
    datasets = pytest.importorskip("datasets")
    paths = [str(tmp_path / f"{index}.png") for index in range(4)]

    def rows():
        images = datasets.List(datasets.Image()) if frames else datasets.Image()
        table = datasets.Dataset.from_dict({"image": [[path] for path in paths] if frames else paths})
        return table.cast_column("image", images).with_transform(as_pixels)

    def as_pixels(rows):
        images = [row[0] if frames else row for row in rows["image"]]
        return {"pixel_values": [torch.tensor(np.array(image)).permute(2, 0, 1) / 255 for image in images]}

    folders = tmp_path / "features"
    for color, count in (("red", 1), ("red", 1), ("blue", 2)):
        for path in paths:
            if count > 1 or not Path(path).exists():
                Image.new("RGB", (32, 32), color).save(path)
        cache_of(build(), folders).cached(rows())
        assert len(list(folders.iterdir())) == count


def test_data_that_look_like_others_need_a_key(tmp_path):
    class Folder(Pictures):  # as torchvision's
        samples = [("a.png", 0)]

    class Wrapped(Pictures):  # around a `datasets.Dataset`
        _fingerprint = "abc"

    for data in (Folder(), Wrapped()):
        with pytest.raises(ValueError, match="Give key="):
            cache_of(build(), tmp_path).cached(data)


def test_other_targets_under_the_same_key_are_an_error(tmp_path):
    class Others(Pictures):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"labels": index % 2}

    cache_of(build(), tmp_path).cached(Pictures(), key="a")
    with pytest.raises(ValueError, match=r"labels of the first samples are .* in .*The key must identify .* targets"):
        cache_of(build(), tmp_path).cached(Others(), key="a")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_other_images_under_the_same_key_are_an_error(dtype, tmp_path):
    cache_of(build("lst"), tmp_path, dtype=dtype).cached([Pictures(), Pictures(seed=1)], key="a")
    cache_of(build("lst"), tmp_path, dtype=dtype, batch_size=3).cached([Pictures(), Pictures(seed=1)], key="a")
    for views, place in (([Pictures(seed=2), Pictures(seed=1)], "view 0"), ([Pictures(), Pictures(seed=2)], "view 1")):
        with pytest.raises(ValueError, match=rf"on disk are not those of this model and these data.*\({place}\)"):
            cache_of(build("lst"), tmp_path, dtype=dtype).cached(views, key="a")


def test_state_that_no_key_tells_is_an_error(tmp_path):
    class Hidden(Parts):
        def __init__(self, scale):
            super().__init__()
            self.scale = SimpleNamespace(value=scale)

        def forward(self, pixel_values):
            middle = F.linear(self.scale.value * self.body(pixel_values[:, :, :4, :4].flatten(1)), self.middle.weight)
            return self.head(self.end(middle))

    cache_of(Hidden(1.0), tmp_path).cached(Pictures(), key="a")
    with pytest.raises(ValueError, match="on disk are not those of this model"):
        cache_of(Hidden(2.0), tmp_path).cached(Pictures(), key="a")


def test_arrays_of_objects():
    digests = [digest(np.array([f"{first}.png", "b.png"], dtype=object)) for first in "aacd"]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert digest(np.array(["a", "b"], dtype=object)) != digest(np.array([["a", "b"]], dtype=object))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_backbones(kind, tmp_path):
    quantised = pytest.importorskip("test_quantised")
    data = Pictures()
    for seed, count in ((0, 1), (0, 1), (1, 2)):
        model = quantised.vit(kind, seed)
        model.classifier.requires_grad_(True)
        cached = cache_of(model.eval(), tmp_path).cached(data, key="a")
        found = model(cached_features=batch_of(cached, 4, 0)["cached_features"]).logits
        assert torch.allclose(found, model(data.pixels[[4, 0]]).logits, atol=1e-5)
        assert len(list(tmp_path.iterdir())) == count
