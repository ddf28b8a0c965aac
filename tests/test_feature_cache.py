"""Features of frozen backbones read from disk: the same answers, the same training."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from families import FAMILIES, images
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainingArguments,
)

import hf_visual_peft
from hf_visual_peft import FeatureCache, LinearProbeConfig, LSTConfig
from hf_visual_peft.features import storage


COUNT = 11
METHODS = {"linear": None, "linearprobe": LinearProbeConfig(), "lst": LSTConfig(r=2)}


class Pictures(Dataset):
    """Random images with labels; `fixed=False` draws anew each time."""

    def __init__(self, count=COUNT, size=32, seed=0, fixed=True):
        pixels = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
        self.pixels, self.fixed, self.read = pixels, fixed, 0

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        self.read += 1
        noise = 0 if self.fixed else torch.randn(self.pixels[index].shape)
        return {"pixel_values": self.pixels[index] + noise, "labels": index % 3}


def adapted(model, method):
    config = METHODS[method] if isinstance(method, str) else method
    if config is not None:
        return get_peft_model(model, config).eval()
    model.requires_grad_(False)
    for head in hf_visual_peft.find_backbone(model).heads:
        model.get_submodule(head).requires_grad_(True)
    return model


def build(method="linear", family="vit"):
    torch.manual_seed(0)
    return adapted(FAMILIES[family].model(), method)


def cache_of(model, folder, **kwargs):
    return FeatureCache(model, folder, **{"batch_size": 4, "progress": False, **kwargs})


def batch_of(cached, *indices):
    return cached.collate(cached.__getitems__(list(indices)))


def spoil_backbone(model):
    """Make everything up to the last block useless. (The norm behind it is at work on what side networks return.)"""
    backbone = hf_visual_peft.find_backbone(model)
    with torch.no_grad():
        for path in (*backbone.embeddings, *(block.path for block in backbone.blocks)):
            for parameter in model.get_submodule(path).parameters():
                if not parameter.requires_grad:
                    parameter.fill_(float("nan"))


def swin():
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=3
    )
    return SwinForImageClassification(config)


def convnext():
    return ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, num_labels=3))


MODELS = {
    **{name: FAMILIES[name].model for name in ("vit", "deit_teacher", "beit_shared_bias", "dinov2", "clip")},
    "swin": swin,
    "convnext": convnext,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_features_give_the_answers_of_the_images(name, method, tmp_path):
    if (name, method) == ("convnext", "lst"):
        pytest.skip("no stream of tokens")
    torch.manual_seed(0)
    model, data = adapted(MODELS[name](), method), Pictures()
    model.eval()
    with torch.no_grad():
        expected = model(pixel_values=data.pixels).logits
        cached = cache_of(model, tmp_path).cached(data, key="a")
        assert torch.equal(model(pixel_values=data.pixels).logits, expected)
        spoil_backbone(model)
        assert torch.isnan(model(pixel_values=data.pixels).logits).all()
        batch = batch_of(cached, 7, 0, 10, 3)
        found = model(cached_features=batch["cached_features"]).logits
    assert torch.allclose(found, expected[[7, 0, 10, 3]], atol=1e-6)
    assert batch["labels"].tolist() == [1, 0, 1, 0]
    assert len(cached) == COUNT


@pytest.mark.parametrize("method", METHODS)
def test_training_on_features_is_training_on_images(method, tmp_path):
    def train(cached):
        model, data = build(method), Pictures()
        if cached:
            data = cache_of(model, tmp_path).cached(data, key="a")
        loader = DataLoader(
            data,
            batch_size=4,
            shuffle=True,
            generator=torch.Generator().manual_seed(0),
            collate_fn=getattr(data, "collate", None),
        )
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            for batch in loader:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    plain, from_features = train(False), train(True)
    start = {name: p for name, p in build(method).named_parameters() if p.requires_grad}
    assert any(not torch.equal(start[name], value) for name, value in plain.items())
    for name, value in plain.items():
        assert torch.allclose(value, from_features[name], atol=1e-6), name


FROZEN = [name for name, method in hf_visual_peft.list_methods().items() if method.gradients == "none"]


@pytest.mark.parametrize("name", FROZEN)
def test_every_method_without_gradients_in_the_backbone_has_features(name, tmp_path):
    config_cls = hf_visual_peft.get_method(name).config_cls
    fields = {"r": 2} if "r" in {field.name for field in dataclasses.fields(config_cls)} else {}
    torch.manual_seed(0)
    model, data = adapted(FAMILIES["dinov2"].model(), config_cls(**fields, init_weights=False)), Pictures()
    expected = model(pixel_values=data.pixels).logits.detach()
    cached = cache_of(model, tmp_path).cached(data, key="a")
    spoil_backbone(model)
    batch = batch_of(cached, 6, 1)
    output = model.train()(**batch)
    output.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and bool(torch.isfinite(grad).all()) for grad in gradients)
    with torch.no_grad():
        assert torch.allclose(model.eval()(**batch).logits, expected[[6, 1]], atol=1e-5)


def test_the_linear_probe_stores_the_input_of_the_head(tmp_path):
    cached = cache_of(build(), tmp_path).cached(Pictures(), key="a")
    assert cached.bytes_per_image == 16 * 4
    assert list(batch_of(cached, 0)["cached_features"]) == ["classifier (input)"]


def test_side_networks_store_the_streams_they_read(tmp_path):
    cached = cache_of(build("lst"), tmp_path).cached(Pictures(), key="a")
    features = batch_of(cached, 0, 1)["cached_features"]
    assert {name: tuple(value.shape) for name, value in features.items()} == dict.fromkeys(
        ("vit.embeddings", "vit.layers.0", "vit.layers.1", "vit.layers.2"), (2, 17, 16)
    )


@pytest.mark.parametrize(
    "config", [hf_visual_peft.AdaptFormerConfig(r=4), hf_visual_peft.VPTConfig(num_virtual_tokens=2)]
)
def test_methods_on_the_last_blocks_store_what_comes_to_these(config, tmp_path):
    config.layers_to_transform = [2]
    model, data = adapted(FAMILIES["dinov2"].model(), config), Pictures()
    expected = model(pixel_values=data.pixels).logits
    cached = cache_of(model, tmp_path).cached(data, key="a")
    batch = batch_of(cached, 4, 2)
    assert list(batch["cached_features"]) == ["dinov2.encoder.layer.1"]
    assert torch.allclose(model(cached_features=batch["cached_features"]).logits, expected[[4, 2]], atol=1e-6)


@pytest.mark.parametrize("config", [hf_visual_peft.VPTConfig(), hf_visual_peft.BitFitConfig(), "full"])
def test_methods_that_change_every_block_are_refused(config, tmp_path):
    model = FAMILIES["vit"].model() if config == "full" else adapted(FAMILIES["vit"].model(), config)
    with pytest.raises(ValueError, match="No block of the backbone is frozen"):
        cache_of(model, tmp_path).cached(Pictures(), key="a")
    assert not list(tmp_path.iterdir())
    model(pixel_values=images(2)["pixel_values"])


def test_a_model_that_reads_more_than_the_features_is_refused(tmp_path):
    class Restless(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.seen = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2), 0.0

        def forward(self, pixel_values):
            self.seen += 1.0  # another answer each time
            return self.head(self.body(pixel_values.mean((2, 3)).repeat(1, 2)[:, :4]) * self.seen) * self.seen

    with pytest.raises(ValueError, match="does not give the same output"):
        cache_of(Restless(), tmp_path).cached(Pictures(), key="a")


def test_a_dropout_before_the_head_goes_on_dropping(tmp_path):
    model = build("linear", "vit")
    model.classifier = nn.Sequential(nn.Dropout(0.5), model.classifier)
    cached = cache_of(model, tmp_path).cached(Pictures(), key="a")
    batch = batch_of(cached, 0, 1)
    one, other = (model.train()(cached_features=batch["cached_features"]).logits for _ in range(2))
    assert not torch.equal(one, other)
    first, second = (model.eval()(cached_features=batch["cached_features"]).logits for _ in range(2))
    assert torch.equal(first, second)


def test_a_second_run_reads_no_images(tmp_path):
    first = Pictures()
    cache_of(build("lst"), tmp_path).cached(first, key="a")
    assert first.read > COUNT
    second = Pictures()
    torch.manual_seed(5)
    model = adapted(FAMILIES["vit"].model(), LSTConfig(r=4))  # of another width and seed
    cache_of(model, tmp_path).cached(second, key="a")
    assert second.read < first.read
    assert len(list(tmp_path.iterdir())) == 1


def changed_weights(model, _):
    with torch.no_grad():
        model.vit.layers[1].mlp.fc1.weight[0, 0] += 1e-3


def changed_config(model, _):
    model.config.layer_norm_eps = 1e-3


@pytest.mark.parametrize(
    "change",
    [
        changed_weights,
        changed_config,
        lambda model, given: given.update(key="b"),
        lambda model, given: given.update(dtype="float16"),
        lambda model, given: given.update(data=[Pictures(), Pictures(seed=1)]),
    ],
)
def test_anything_else_has_a_folder_of_its_own(change, tmp_path):
    def fill(change=None):
        model, given = build(), {"key": "a", "dtype": "float32", "data": Pictures()}
        if change:
            change(model, given)
        cache_of(model, tmp_path, dtype=given["dtype"]).cached(given["data"], key=given["key"])
        return len(list(tmp_path.iterdir()))

    assert (fill(), fill(), fill(change)) == (1, 1, 2)


def test_the_head_changes_no_fingerprint(tmp_path):
    for seed in (0, 1):
        model = build("linearprobe")
        torch.manual_seed(seed)
        for parameter in model.get_base_model().classifier.parameters():
            nn.init.normal_(parameter)
        cache_of(model, tmp_path).cached(Pictures(), key="a")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_precision(dtype, error, tmp_path):
    model, data = build("lst"), Pictures()
    cached = cache_of(model, tmp_path, dtype=dtype).cached(data, key="a")
    batch = batch_of(cached, *range(COUNT))
    assert cached.bytes_per_image == 4 * 17 * 16 * 2
    assert all(value.dtype == getattr(torch, dtype) for value in batch["cached_features"].values())
    found, expected = model(**batch).logits, model(pixel_values=data.pixels).logits
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < error * expected.abs().max() * 5


def test_features_too_large_for_the_dtype_are_an_error(tmp_path):
    model = build()
    with torch.no_grad():
        model.vit.layernorm.weight.fill_(1e6)
    with pytest.raises(ValueError, match=r"not finite in float16. Choose bfloat16"):
        cache_of(model, tmp_path, dtype="float16").cached(Pictures(), key="a")


def test_views_take_turns(tmp_path):
    model, views = build(), [Pictures(seed=seed) for seed in range(3)]
    cached = cache_of(model, tmp_path).cached(views, key="a")
    assert len(cached) == COUNT
    for epoch in (0, 1, 2, 3):
        cached.epoch = epoch
        expected = model(pixel_values=views[epoch % 3].pixels[[2, 9]]).logits
        assert torch.allclose(model(**batch_of(cached, 2, 9)).logits, expected, atol=1e-6)


def test_random_augmentation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is another each time it is read"):
        cache_of(build(), tmp_path).cached(Pictures(fixed=False), key="a")


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_that_stay_see_other_views(start, tmp_path):
    views = [Pictures(seed=seed) for seed in range(2)]
    cached = cache_of(build(), tmp_path).cached(views, key="a")
    loader = DataLoader(
        cached,
        batch_size=COUNT,
        collate_fn=cached.collate,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context=start,
    )
    for epoch in range(3):
        cached.set_epoch(epoch)
        (batch,) = loader
        expected = cached.of_view(epoch % 2, range(COUNT)).features
        assert all(torch.equal(batch["cached_features"][name], value) for name, value in expected.items())


def test_trainer_turns_views(tmp_path, monkeypatch):
    model = build("linearprobe")
    cached = cache_of(model, tmp_path / "features").cached([Pictures(seed=seed) for seed in range(3)], key="a")
    of_view, seen = cached.of_view, []
    monkeypatch.setattr(cached, "of_view", lambda view, indices: seen.append(view) or of_view(view, indices))
    arguments = TrainingArguments(
        str(tmp_path / "out"), num_train_epochs=3, per_device_train_batch_size=COUNT, remove_unused_columns=False,
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=cached, data_collator=cached.collate).train()
    assert seen == [0, 1, 2]


class Flipped(Pictures):
    """Images that are flipped at random, but so rarely that reading some twice does not show it."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        pixels = sample["pixel_values"]
        return sample | {"pixel_values": pixels.flip(-1) if self.draw(index) < 1e-9 else pixels}


def seeded(index):
    torch.manual_seed(index)
    return torch.rand(()).item()


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(())])
def test_rare_random_augmentation_is_refused(draw, tmp_path):
    with pytest.raises(ValueError, match="sample 0 draws random numbers each time it is read"):
        cache_of(build(), tmp_path).cached(Flipped(lambda index: draw()), key="a")


def test_augmentation_that_sets_its_seed_is_fixed(tmp_path):
    assert len(cache_of(build(), tmp_path).cached(Flipped(seeded), key="a")) == COUNT


def test_data_that_are_no_data_set(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    cache, samples = cache_of(build(), tmp_path), [Pictures()[index] for index in range(4)]
    with pytest.raises(ValueError, match="a streaming data set cannot be cached: it has no length"):
        cache.cached(Stream(), key="a")
    with pytest.raises(ValueError, match=r"data is a list of samples, .*: pass \[data\]"):
        cache.cached(samples, key="a")
    assert len(cache.cached([samples], key="a")) == 4


def test_data_need_a_key_unless_they_have_a_fingerprint(tmp_path):
    datasets = pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="Give key="):
        cache_of(build(), tmp_path).cached(Pictures())
    with pytest.raises(TypeError, match="is not a number"):
        cache_of(build(), tmp_path).cached(Pictures(), key=object())

    def rows(factor):
        table = datasets.Dataset.from_dict({"value": [0.1, 0.2, 0.3, 0.4]})
        return table.with_transform(
            lambda rows: {"pixel_values": [torch.full((3, 32, 32), factor * value) for value in rows["value"]]}
        )

    for factor in (1.0, 1.0, 2.0):
        cache_of(build(), tmp_path).cached(rows(factor))
    assert len(list(tmp_path.iterdir())) == 2


def test_ways_of_collating(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_SHARD_ROWS", 4)
    cached = cache_of(build("lst"), tmp_path).cached(Pictures(), key="a")
    whole = batch_of(cached, *range(COUNT))
    for loader in (
        DataLoader(cached, batch_size=COUNT),
        DataLoader(cached, batch_size=COUNT, collate_fn=cached.collate),
        DataLoader(cached, batch_size=COUNT, collate_fn=cached.collate, num_workers=2),
    ):
        (batch,) = loader
        assert torch.equal(batch["labels"], whole["labels"])
        for name, value in whole["cached_features"].items():
            assert torch.equal(batch["cached_features"][name], value)
    assert cached[-1]["labels"] == whole["labels"][-1]
    with pytest.raises(IndexError):
        cached[COUNT]


def test_workers_fill_as_one_process_does(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_SHARD_ROWS", 4)
    found = []
    for workers in (0, 2):
        cache = cache_of(build(), tmp_path / str(workers), num_workers=workers)
        found.append(batch_of(cache.cached(Pictures(), key="a"), *range(COUNT))["cached_features"])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_an_error_in_the_model_leaves_it_as_it_was(tmp_path):
    model, data = build("lst"), Pictures()
    cache = cache_of(model, tmp_path)
    cached = cache.cached(data, key="a")
    expected = model(pixel_values=data.pixels).logits
    with pytest.raises((ValueError, IndexError)):
        model(**batch_of(cached, 0, 1) | {"labels": torch.tensor([0, 99])})
    assert torch.equal(model(pixel_values=data.pixels).logits, expected)
    with pytest.raises(ValueError, match=r"this model's are vit\.embeddings"):
        model(cached_features={"other": torch.zeros(1)})
    cache.close()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@pytest.mark.parametrize("method", ["linear", "lst"])
def test_an_interrupted_call_leaves_the_model_as_it_was(method, tmp_path):
    def interrupt(*args):
        raise KeyboardInterrupt

    model, data = build(method), Pictures()
    cache = cache_of(model, tmp_path)
    batch = batch_of(cache.cached(data, key="a"), 0, 1)
    expected = model(pixel_values=data.pixels).logits
    base = model if method == "linear" else model.get_base_model()
    for use in (lambda: None, lambda: cache.cached(data, key="b"), cache.close):
        handle = base.classifier.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(cached_features=batch["cached_features"])
        handle.remove()
        use()
        assert torch.equal(model(pixel_values=data.pixels).logits, expected)


def test_several_caches_of_a_model(tmp_path):
    model = build("lst")
    unused, cache = cache_of(model, tmp_path), cache_of(model, tmp_path)
    features = {"cached_features": {"a": torch.zeros(1)}}
    with pytest.raises(ValueError, match=r"none yet: call cached\(\)\. .* close\(\) this one"):
        model(**features)
    cached = cache.cached(Pictures(), key="a")
    batch = batch_of(cached, 0)
    expected = model(**batch).logits
    later = cache_of(model, tmp_path)
    assert torch.equal(model(**batch).logits, expected)
    unused.close()
    model.add_adapter("other", LSTConfig(r=4))
    model.set_adapter("other")
    batch = batch_of(later.cached(Pictures(), key="a"), 0)
    with pytest.raises(ValueError, match=r"for each choice, and close\(\) those of the others"):
        model(**batch)
    cache.close()
    assert model(**batch).logits.isfinite().all()


def test_another_adapter_is_refused(tmp_path):
    model = build("lst")
    cache = cache_of(model, tmp_path)
    cached = cache.cached(Pictures(), key="a")
    model.add_adapter("other", LSTConfig(r=4))
    model.set_adapter("other")
    with pytest.raises(ValueError, match="make a FeatureCache for each choice"):
        model(**batch_of(cached, 0))
    with pytest.raises(ValueError, match="make a FeatureCache for each choice"):
        cache.cached(Pictures(), key="b")


def test_weights_that_train_later_are_an_error(tmp_path):
    model = build("lst")
    cache = cache_of(model, tmp_path)
    cached = cache.cached(Pictures(), key="a")
    model.get_base_model().vit.layers[1].requires_grad_(True)
    with pytest.raises(ValueError, match="A parameter trains now that was frozen"):
        model(**batch_of(cached, 0))
    with pytest.raises(ValueError, match="make a new FeatureCache"):
        cache.cached(Pictures(), key="b")


def test_gradient_checkpointing(tmp_path):
    probe = build("linearprobe")
    probe.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    cached = cache_of(probe, tmp_path).cached(Pictures(), key="a")
    probe.train()(**batch_of(cached, 0, 1)).loss.backward()
    late = adapted(FAMILIES["dinov2"].model(), hf_visual_peft.PartialConfig())
    late.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    cached = cache_of(late, tmp_path).cached(Pictures(), key="a")
    with pytest.raises(ValueError, match="Switch gradient checkpointing off"):
        late.train()(**batch_of(cached, 0, 1))


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="dtype is 'float8': choose one of float32"):
        FeatureCache(build(), tmp_path, dtype="float8")
    with pytest.raises(ValueError, match="batch_size is 0"):
        FeatureCache(build(), tmp_path, batch_size=0)
    with pytest.raises(ValueError, match=r"views of \[11, 3\] samples"):
        cache_of(build(), tmp_path).cached([Pictures(), Pictures(3)], key="a")
    with pytest.raises(ValueError, match=r"views of \[0\] samples"):
        cache_of(build(), tmp_path).cached(Pictures(0), key="a")
    cache = cache_of(FAMILIES["dinov2"].model().requires_grad_(False), tmp_path)
    with pytest.raises(ValueError, match="nothing that trains"):
        cache.cached(Pictures(), key="a")


def test_data_of_another_size_are_refused(tmp_path):
    model = adapted(convnext(), "linear").eval()
    cache = cache_of(model, tmp_path)
    cache.cached(Pictures(), key="a")
    with pytest.raises(ValueError, match="A cache takes one kind"):
        cache.cached(Pictures(size=64), key="b")


def test_one_image(tmp_path):
    model, data = build("lst"), Pictures(1)
    cached = cache_of(model, tmp_path).cached(data, key="a")
    assert torch.allclose(model(**batch_of(cached, 0)).logits, model(pixel_values=data.pixels).logits, atol=1e-6)


def test_trainer(tmp_path):
    def train(cached):
        model, data = build("lst"), Pictures()
        collate = None
        if cached:
            data = cache_of(model, tmp_path / "features").cached(data, key="a")
            collate = data.collate
        arguments = TrainingArguments(
            str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=4, remove_unused_columns=False,
            report_to="none", use_cpu=True, disable_tqdm=True, seed=1, save_strategy="no", learning_rate=1e-2,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, data_collator=collate)
        trainer.train()
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    plain, from_features = train(False), train(True)
    for name, value in plain.items():
        assert torch.allclose(value, from_features[name], atol=1e-5), name


def test_distributed_data_parallel(tmp_path):
    model, data = build("lst"), Pictures()
    cached = cache_of(model, tmp_path).cached(data, key="a")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        output = wrapped(**batch_of(cached, 3, 5))
        output.loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.allclose(output.logits, model(pixel_values=data.pixels[[3, 5]]).logits, atol=1e-6)


def test_the_manifest_says_what_it_is_of(tmp_path):
    cached = cache_of(build(), tmp_path).cached(Pictures(), name="train", key="a")
    folder = cached.shards.folder
    assert folder.name.startswith("train-")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["fingerprint"].startswith(folder.name.partition("-")[2])
    assert set(manifest["parts"]) == {"weights", "model", "features", "images", "views", "dtype", "versions"}
    assert repr(cached) == f"11 images of 64 bytes (float32), 704 bytes in {folder}"
