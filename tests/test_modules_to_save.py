"""`modules_to_save`: what it names, what methods do about it, and what is refused before a model is touched."""

from __future__ import annotations

import warnings

import pytest
import torch
from families import FAMILIES, liven
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTForMaskedImageModeling, ViTModel

import hf_visual_peft
from hf_visual_peft import (
    AdaptFormerConfig,
    ARCConfig,
    AttnScaleConfig,
    ConvpassConfig,
    DiffFitConfig,
    HoulsbyConfig,
    LinearProbeConfig,
    LSTConfig,
    PartialConfig,
    RepAdapterConfig,
    RLRRConfig,
    SideTuningConfig,
    SSFConfig,
    ViTAdapterConfig,
    VPTConfig,
)
from hf_visual_peft.coverage.sizes import small_fields
from hf_visual_peft.sites import VisualTunerLayer


SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"image_size": 32, "patch_size": 8}
SMALL = {"r": 4, "n": 4, "channels": 6, "rank": 2}
METHODS = hf_visual_peft.list_methods()
IMAGE_METHODS = [name for name, m in METHODS.items() if not m.config_cls.video and not m.calibrated]
# these read every block
OUTSIDE = {
    "dtl",
    "e3va",
    "evp",
    "hst",
    "last",
    "lst",
    "restuning",
    "sherl",
    "sidetuning",
    "sparsetuning",
    "unipt",
    "vitadapter",
    "vqt",
}
TO_THE_HEAD = {"gist"}  # act on all blocks up to the last
AT_PATCHES = {"bitfit", "difffit", "rlrr", "ssf"}


def vit(cls=ViTForImageClassification, **fields):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return liven(cls(ViTConfig(**{**SIZES, "num_labels": 3} | fields)))


def config_of(name, **fields):
    cls = METHODS[name].config_cls
    return cls(**small_fields(cls, {}) | fields)


def images(channels=3):
    return torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(1))


def state_of(model):
    """All by which a model could be seen to have been touched."""
    weights = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    modules = {
        name: (id(m), m.training, [*m._forward_hooks], [*m._forward_pre_hooks], set(vars(m)), vars(m).get("config"))
        for name, m in model.named_modules()
    }
    return weights, modules


def train(model, x):
    """One step by which everything that trains moves; what got no gradient."""
    model.train()
    model(x).logits.square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None]
    with torch.no_grad():
        for p in trained.values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)), alpha=0.05)
    model.eval()
    return without


def round_trip(model, base, folder, x, **kwargs):
    """What the adapter answers, and what it answers once it was saved and put into another model."""
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(base, folder, **kwargs).eval()
    with torch.no_grad():
        return model(x).logits, again(x).logits


def said(model, config, **kwargs):
    """The adapter in the model, and what was said about it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = get_peft_model(model, config, **kwargs)
    return adapted, [str(w.message) for w in caught if "Config" in str(w.message)]


# ------------------------------------------------------------------ whole blocks


@pytest.mark.parametrize("name", IMAGE_METHODS)
def test_every_method_beside_a_whole_block(name, tmp_path):
    names = [*([] if name == "linearprobe" else ["classifier"]), "layers.2"]
    base = vit()
    config = config_of(name, modules_to_save=names, init_weights=False)
    before = state_of(base)
    if name in OUTSIDE or name == "partial":
        with pytest.raises(ValueError, match=r"modules_to_save is .*vit\.layers\.2"):
            get_peft_model(base, config)
        assert state_of(base) == before
        return
    if name in TO_THE_HEAD:
        with pytest.raises(ValueError, match=r"consecutive up to 2, but they are \[0, 1\]\. .*modules_to_save"):
            get_peft_model(base, config)
        assert state_of(base) == before
        return
    model, messages = said(base, config)
    assert messages == ([] if not METHODS[name].chooses_blocks else [
        f"{type(config).__name__} leaves out vit.layers.2: modules_to_save trains it as a whole."
    ])  # fmt: skip
    x = images()
    assert train(model, x) == []
    ids = {id(p) for p in model.parameters()}
    layers = [m for m in model.modules() if isinstance(m, VisualTunerLayer)]
    assert all(id(p) in ids for layer in layers for part in layer.exchange.shared.values() for p in part.parameters())
    copied = {n for n, p in model.named_parameters() if p.requires_grad and ".layers.2." in n}
    block = vit().vit.layers[2]
    prefix = "base_model.model.vit.layers.2.modules_to_save.default"
    assert copied == {f"{prefix}.{n}" for n, _ in block.named_parameters()}
    before, after = round_trip(model, vit(), tmp_path, x)
    assert torch.equal(before, after)
    if METHODS[name].mergeable:
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x).logits, before, rtol=0, atol=1e-5)
        assert type(merged.vit.layers[2]) is type(block)


def test_prompts_and_the_last_block_compute_what_both_say():
    """Prompts join the blocks before; the last block is the copy, without prompts."""
    model, _ = said(vit(), VPTConfig(num_virtual_tokens=2, modules_to_save=["classifier", "layers.2"]))
    train(model, images())
    base = model.get_base_model()
    prompts = [base.vit.layers[i].adapters.vpt_tokens["default"] for i in range(2)]
    plain = vit()
    plain.classifier.load_state_dict(base.classifier.modules_to_save["default"].state_dict())
    plain.vit.layers[2].load_state_dict(base.vit.layers[2].modules_to_save["default"].state_dict())
    with torch.no_grad():
        x = plain.vit.embeddings(images())
        for block, prompt in zip(plain.vit.layers[:2], prompts, strict=True):
            tokens = prompt(x.shape[0])
            x = torch.cat([x[:, :1], tokens, x[:, 1:]], dim=1)
            x = block(x)
            x = torch.cat([x[:, :1], x[:, 3:]], dim=1)
        x = plain.vit.layernorm(plain.vit.layers[2](x))
        expected = plain.classifier(x[:, 0])
        torch.testing.assert_close(model(images()).logits, expected, rtol=0, atol=1e-5)


def test_nothing_is_left_to_adapt():
    base = vit()
    before = state_of(base)
    with pytest.raises(ValueError, match=r"modules_to_save \['layers\.0', .*'\]: no block is left"):
        get_peft_model(base, AdaptFormerConfig(r=4, modules_to_save=["layers.0", "layers.1", "layers.2"]))
    assert state_of(base) == before


def test_layers_to_transform_and_a_whole_block():
    model, messages = said(vit(), SSFConfig(layers_to_transform=[0], modules_to_save=["layers.2"]))
    assert messages == [], "the method would not have acted there"
    trained = {n.split("vit.layers.")[1][0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"0", "2"}


# ------------------------------------------------------------------ parts of blocks, and merging


PARTS = [
    ["layers.2.mlp"],
    ["layers.2.attention"],
    ["layers.2.mlp.fc1"],
    ["mlp"],
    ["layernorm_after"],
    ["vit.layernorm"],
]


@pytest.mark.parametrize("names", PARTS, ids=str)
@pytest.mark.parametrize("config_cls", [RepAdapterConfig, ARCConfig, SSFConfig])
def test_what_folds_into_copies_merges_right(config_cls, names, tmp_path):
    small = {key: value for key, value in SMALL.items() if key in config_cls.__dataclass_fields__}
    model, _ = said(vit(), config_cls(**small, modules_to_save=["classifier", *names], init_weights=False))
    x = images()
    assert train(model, x) == []
    before, after = round_trip(model, vit(), tmp_path, x)
    assert torch.equal(before, after)
    model.merge_adapter()
    torch.testing.assert_close(model(x).logits, before, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(x).logits, before)
    with model.disable_adapter():
        assert torch.equal(model(x).logits, vit()(x).logits), "nothing was folded into the backbone's own module"
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x).logits, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config_cls", [HoulsbyConfig, AdaptFormerConfig, ConvpassConfig, VPTConfig, LSTConfig])
@pytest.mark.parametrize("names", [["layernorm_before", "layernorm_after"], ["vit.layers.1.mlp"], ["fc2"]], ids=str)
def test_parts_of_blocks_beside_adapters_around_them(config_cls, names, tmp_path):
    small = {"r": 4} if "r" in config_cls.__dataclass_fields__ else {}
    model, _ = said(vit(), config_cls(**small, modules_to_save=["classifier", *names], init_weights=False))
    x = images()
    assert train(model, x) == []
    assert any(f".{names[0].rpartition('.')[2]}.modules_to_save." in n for n, _ in model.named_parameters())
    before, after = round_trip(model, vit(), tmp_path, x)
    assert torch.equal(before, after)
    # the copies put into the backbone itself, and the adapter's own weights beside them, compute the same
    base, own = vit(), model.get_base_model()
    for path, _ in vit().named_modules():
        wrapper = own.get_submodule(path) if path else None
        if hasattr(wrapper, "modules_to_save") and "default" in wrapper.modules_to_save:
            base.get_submodule(path).load_state_dict(wrapper.modules_to_save["default"].state_dict())
    plain = get_peft_model(base, config_cls(**small, modules_to_save=[])).eval()
    weights = {n: p for n, p in model.named_parameters() if f".{plain.base_model.prefix}" in n}
    plain.load_state_dict(weights, strict=False)
    torch.testing.assert_close(plain(x).logits, before, rtol=0, atol=1e-5)


def test_a_copy_of_a_part_that_the_adapter_changes_is_refused():
    for cls, fields in ((AttnScaleConfig, {}), (ViTAdapterConfig, {"channels": 6, "train_backbone": True})):
        base = vit()
        before = state_of(base)
        with pytest.raises(ValueError, match=r"copy of 'vit\.layers\.0\.attention'.*=\['vit\.layers\.0'\]"):
            get_peft_model(base, cls(**fields, modules_to_save=["layers.0.attention"]))
        assert state_of(base) == before


def test_full_names_and_ends_of_names_mean_the_same():
    def copied(names):
        model, _ = said(vit(), AdaptFormerConfig(r=4, modules_to_save=names))
        return {n.replace(".base_layer", "") for n, p in model.named_parameters() if ".modules_to_save." in n}

    assert copied(["vit.layers.1.mlp.fc2"]) == copied(["layers.1.mlp.fc2"]) != set()
    assert copied(["layers.1", "vit.layers.1.mlp", "classifier"]) == copied(["classifier", "layers.1"])


# ------------------------------------------------------------------ patch embeddings


@pytest.mark.parametrize(
    ("name", "channels"), [*((name, 4) for name in IMAGE_METHODS), ("convpass", 13), ("sidetuning", 13), ("ssf", 13)]
)
def test_a_new_patch_embedding_beside_every_method(name, channels, tmp_path):
    names = [] if name == "linearprobe" else ["classifier"]
    names += ["patch_embeddings.projection"] if channels == 4 else ["vit.embeddings"]
    config = config_of(name, modules_to_save=names, init_weights=False)
    model, messages = said(vit(num_channels=channels), config)
    assert (len(messages) == 1) == (
        name in AT_PATCHES or name in OUTSIDE - {"evp", "hst", "sparsetuning", "vitadapter"}
    )
    x = images(channels)
    assert train(model, x) == []
    before, after = round_trip(model, vit(num_channels=channels), tmp_path, x, is_trainable=name == "vpt")
    assert torch.equal(before, after)


@pytest.mark.parametrize("config_cls", [LSTConfig, SideTuningConfig])
def test_gradients_of_a_patch_embedding_under_a_side_network_are_right(config_cls):
    """They are those of the whole function, as finite differences find them."""
    model, messages = said(vit(num_channels=4), config_cls(modules_to_save=["projection"], init_weights=False))
    assert "gradients cross the backbone" in messages[0]
    model.double().eval()
    bias = model.get_base_model().vit.embeddings.patch_embeddings.projection.modules_to_save["default"].bias
    x = images(4).double()
    model(x).logits.square().sum().backward()
    step = 1e-6
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            bias[3] += sign * step
            values.append(model(x).logits.square().sum())
            bias[3] -= sign * step
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), bias.grad[3], rtol=1e-4, atol=1e-7)


def test_a_later_adapter_copies_the_patch_embedding():
    x = images()
    model, _ = said(vit(), ConvpassConfig(modules_to_save=["classifier"], init_weights=False))
    first = model.eval()(x).logits
    model.add_adapter("second", ConvpassConfig(modules_to_save=["classifier", "projection", "layernorm_after"]))
    assert torch.equal(model.eval()(x).logits, first)
    model.set_adapter("second")
    alone, _ = said(vit(), ConvpassConfig(modules_to_save=["classifier", "projection", "layernorm_after"]))
    weights = {n.replace(".second.", ".default."): p for n, p in model.named_parameters() if ".second." in n}
    alone.load_state_dict(weights, strict=False)
    assert train(model, x) == []
    weights = {n.replace(".second.", ".default."): p for n, p in model.named_parameters() if ".second." in n}
    alone.load_state_dict(weights, strict=False)
    torch.testing.assert_close(model(x).logits, alone.eval()(x).logits, rtol=0, atol=1e-6)
    model.set_adapter("default")
    assert torch.equal(model(x).logits, first)
    model.delete_adapter("second")
    assert torch.equal(model(x).logits, first)


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["clasifier"], r"VPTConfig\.modules_to_save has 'clasifier': ViTForImage\w* has no module .*'classifier'"),
        (["classifier", "layers.7"], r"has 'layers\.7'"),
        (["classifier", "cls_token"], r"'cls_token', which is a parameter, not a module.*'vit\.embeddings'"),
        (["fc1.weight"], r"'fc1\.weight', which is a parameter, not a module.*'vit\.layers\.0\.mlp\.fc1'"),
        (["xyzzy"], r"has 'xyzzy': .* See model\.named_modules"),
        (["layers"], r"'vit\.layers' is a ModuleList.*'vit\.layers\.0'"),
    ],
)
@pytest.mark.parametrize("config_cls", [VPTConfig, SSFConfig, LSTConfig])
def test_names_that_mean_no_module(config_cls, names, message):
    base = vit()
    before = state_of(base)
    config = config_cls(modules_to_save=names)
    with pytest.raises(ValueError, match=message.replace("VPTConfig", config_cls.__name__)):
        get_peft_model(base, config)
    assert state_of(base) == before
    assert config.modules_to_save == names
    get_peft_model(base, config_cls())  # which it still can


def test_names_with_target_modules():
    base = vit()
    with pytest.raises(ValueError, match=r"SSFConfig\.modules_to_save has 'clasifier'"):
        get_peft_model(base, SSFConfig(target_modules=["fc1"], modules_to_save=["clasifier"]))
    model = get_peft_model(base, SSFConfig(target_modules=["fc1"], modules_to_save=["layers.2"]))
    assert sorted(model.targeted_module_names) == ["vit.layers.0.mlp.fc1", "vit.layers.1.mlp.fc1"]


@pytest.mark.parametrize("names", ["classifier", [""], [1], ["classifier", None], 3])
def test_values_that_are_no_names(names):
    with pytest.raises(ValueError, match=r"modules_to_save is .*: must be None or a list of names"):
        SSFConfig(modules_to_save=names)


MLPS = [f"layers.{i}.mlp" for i in range(3)]


def test_names_of_the_layers_own_parts_are_not_meant():
    model, _ = said(vit(), RepAdapterConfig(modules_to_save=["classifier", "mlp"]))
    copied = {n.split(".modules_to_save.")[0] for n, _ in model.named_parameters() if ".modules_to_save." in n}
    assert {n.rpartition("vit.")[2] for n in copied} == {"base_model.model.classifier", *MLPS}


def test_methods_that_train_it_anyway():
    for config in (PartialConfig(modules_to_save=["vit.layernorm"]), PartialConfig(modules_to_save=["layers.2.mlp"])):
        base = vit()
        before = state_of(base)
        with pytest.raises(ValueError, match=r"PartialConfig\.modules_to_save .* as a whole anyway"):
            get_peft_model(base, config)
        assert state_of(base) == before
    model = get_peft_model(vit(), LinearProbeConfig(modules_to_save=["layers.2"]))
    assert train(model, images()) == []


def test_one_config_serves_models_with_other_heads():
    config = SSFConfig()
    models = [said(vit(cls), config)[0] for cls in (ViTForImageClassification, ViTModel, ViTForMaskedImageModeling)]
    named = [model.peft_config["default"].modules_to_save for model in models]
    assert named == [["classifier"], None, ["decoder"]]


# ------------------------------------------------------------------ several adapters


def test_a_second_adapter_with_other_modules():
    x = images()
    model, _ = said(vit(), SSFConfig(modules_to_save=["classifier"], init_weights=False, exclude_modules=["layers.2"]))
    first = model.eval()(x).logits
    second = SSFConfig(modules_to_save=["classifier", "layers.2"], init_weights=False)
    with pytest.warns(UserWarning, match=r"leaves out vit\.layers\.2"):
        model.add_adapter("second", second)
    assert torch.equal(model.eval()(x).logits, first)
    model.set_adapter("second")
    assert train(model, x) == []
    ours = model(x).logits
    model.merge_adapter()
    torch.testing.assert_close(model(x).logits, ours, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    model.set_adapter("default")
    assert torch.equal(model(x).logits, first)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (SSFConfig(), SSFConfig(modules_to_save=["layers.2"]), r"changed 'vit\.layers\.2\..*' already"),
        (HoulsbyConfig(r=4), HoulsbyConfig(r=4, modules_to_save=["layers.2"]), r"changed 'vit\.layers\.2' already"),
        (SSFConfig(modules_to_save=["layers.2"]), SSFConfig(), r"copy of 'vit\.layers\.2'.*=\['vit\.layers\.2'\]"),
        (
            VPTConfig(modules_to_save=["fc1"]),
            VPTConfig(modules_to_save=["layers.1.mlp"]),
            r"changed '.*\.fc1' already",
        ),
    ],
)
def test_adapters_that_are_in_each_others_way(first, second, message):
    model, _ = said(vit(), first)
    before, x = state_of(model), images()
    expected = model.eval()(x).logits
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", second)
    assert state_of(model) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(x).logits, expected)


def test_adapters_put_in_by_peft_itself():
    """As `model.add_adapter` of transformers does."""
    x = images()
    base = vit()
    with pytest.warns(UserWarning, match=r"leaves out vit\.layers\.2"):
        inject_adapter_in_model(SSFConfig(modules_to_save=["classifier", "layers.2"], init_weights=False), base)
    assert base.vit.layers[2].active_adapters == ["default"]
    assert train(base, x) == []
    keys = get_peft_model_state_dict(base)
    assert "vit.layers.2.mlp.fc1.weight" in keys
    with pytest.raises(ValueError, match="changed 'classifier' already|copy of 'classifier'"):
        inject_adapter_in_model(LinearProbeConfig(), base, "probe")
    assert set(base.peft_config) == {"default"}


# ------------------------------------------------------------------ failures half-way


@pytest.mark.parametrize("config_cls", [VPTConfig, SSFConfig, LSTConfig, ConvpassConfig, PartialConfig])
@pytest.mark.parametrize("where", ["_create_and_replace", "_hook_heads", "_mark_only_adapters_as_trainable"])
def test_what_fails_half_way_leaves_the_model_as_it_was(config_cls, where, monkeypatch):
    config, base, x = config_cls(), vit(), images()
    before, expected = state_of(base), base(x).logits
    tuner = METHODS[config.peft_type.value.lower()].tuner_cls
    real, calls = getattr(tuner, where), []

    def fails(self, *args, **kwargs):
        calls.append(where)
        real(self, *args, **kwargs)
        if len(calls) == (2 if where == "_create_and_replace" else 1):
            raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(tuner, where, fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            get_peft_model(base, config)
    assert state_of(base) == before
    assert config.modules_to_save is None
    assert torch.equal(base(x).logits, expected)
    model = get_peft_model(base, config).eval()
    expected = model(x).logits
    seen = state_of(model)
    with monkeypatch.context() as patch:
        calls.clear()
        patch.setattr(tuner, where, fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            model.add_adapter("second", config_cls())
    assert state_of(model) == seen
    assert torch.equal(model(x).logits, expected)
    model.add_adapter("second", config_cls())
    assert torch.equal(model(x).logits, expected)


# ------------------------------------------------------------------ loading


@pytest.mark.parametrize("name", ["vpt", "ssf", "lst", "fact", "convpass", "repadapter"])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_an_adapter_trained_without_a_head_goes_under_one(name, is_trainable, tmp_path):
    cls = ViTForMaskedImageModeling if name != "ssf" else ViTModel
    model, _ = said(vit(cls), config_of(name, init_weights=False))
    model.save_pretrained(tmp_path)
    base = vit()
    head = base.classifier.weight.clone()
    with pytest.warns(UserWarning, match="trained without this task head. 'classifier' keeps the weights"):
        loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=is_trainable)
    copied = loaded.get_base_model().classifier.modules_to_save["default"]
    assert torch.equal(copied.weight, head)
    assert copied.weight.requires_grad == is_trainable
    weights = load_file(tmp_path / "adapter_model.safetensors")
    own = get_peft_model_state_dict(loaded)
    own = {key.replace("model.vit.", "model.") if cls is ViTModel else key: value for key, value in own.items()}
    kept = {key: value for key, value in weights.items() if ".decoder." not in key}
    assert len(kept) > 0
    assert all(torch.equal(own[key], value) for key, value in kept.items())
    assert own.keys() - kept.keys() == {f"base_model.model.classifier.{n}" for n in ("weight", "bias")}
    if is_trainable:
        assert train(loaded, images()) == []
        loaded.save_pretrained(tmp_path / "next")
        again = PeftModel.from_pretrained(vit(), tmp_path / "next")
        assert torch.equal(again(images()).logits, loaded(images()).logits)


@pytest.mark.parametrize("name", ["vpt", "ssf", "adaptformer", "fact"])
def test_bare_backbones_and_classifiers_exchange_adapters(name, tmp_path):
    config = config_of(name, init_weights=False)
    bare = get_peft_model(vit(ViTModel), config).eval()
    bare.save_pretrained(tmp_path / "bare")
    with pytest.warns(UserWarning, match="trained without this task head"):
        under_head = PeftModel.from_pretrained(vit(), tmp_path / "bare").eval()
    with_head = get_peft_model(vit(), config_of(name, init_weights=False)).eval()
    with_head.save_pretrained(tmp_path / "head")
    with pytest.warns(UserWarning, match="copy of 'classifier', and ViTModel has no module of that name"):
        headless = PeftModel.from_pretrained(vit(ViTModel), tmp_path / "head").eval()
    x = images()
    for one, other in ((bare, under_head), (headless, with_head)):
        ours, theirs = (get_peft_model_state_dict(m) for m in (one, other))
        mine = {k.replace("model.vit.", "model."): v for k, v in theirs.items() if "classifier" not in k}
        assert ours.keys() == mine.keys()
        assert all(torch.equal(ours[k], v) for k, v in mine.items())
        weights = {n: p for n, p in one.get_base_model().named_parameters() if ".default." not in n}
        other.get_base_model().vit.load_state_dict(weights, strict=False)
        with torch.no_grad():
            expected, found = (m(x).last_hidden_state for m in (one, other.get_base_model().vit))
        assert torch.equal(found, expected)


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    get_peft_model(vit(num_hidden_layers=4), SSFConfig(init_weights=False)).save_pretrained(tmp_path)
    base = vit()
    before = state_of(base)
    with pytest.raises(ValueError, match=r"does not fit this ViTForImage.*: .*layers\.3.* is not expected"):
        PeftModel.from_pretrained(base, tmp_path)
    assert state_of(base) == before
    model = get_peft_model(base, SSFConfig(init_weights=False)).eval()
    before, expected = state_of(model), model(images()).logits
    with pytest.raises(ValueError, match="does not fit"):
        model.load_adapter(tmp_path, "second")
    assert state_of(model) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(images()).logits, expected)


def test_a_file_without_the_weights_of_a_copy(tmp_path):
    model, _ = said(vit(), SSFConfig(modules_to_save=["classifier", "layers.2"]))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "fc1.weight" not in k}, tmp_path / "adapter_model.safetensors")
    base = vit()
    before = state_of(base)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.fc1\.weight is missing"):
        PeftModel.from_pretrained(base, tmp_path)
    assert state_of(base) == before


@pytest.mark.parametrize("kwargs", [{}, {"is_trainable": True}, {"low_cpu_mem_usage": True}], ids=str)
def test_ways_to_load(kwargs, tmp_path):
    model, _ = said(vit(), SSFConfig(modules_to_save=["classifier", "layers.2", "projection"], init_weights=False))
    train(model, images())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before, after = round_trip(model, vit(), tmp_path, images(), **kwargs)
    assert torch.equal(before, after)
    told = [w for w in caught if "leaves out" in str(w.message)]
    assert len(told) == bool(kwargs.get("is_trainable"))


def test_modules_to_save_of_peft_are_its_own():
    model = get_peft_model(vit(), LoraConfig(target_modules=["fc1"], modules_to_save=["clasifier"]))
    assert not any("modules_to_save" in n for n, _ in model.named_parameters())


def test_a_module_of_ones_own():
    """Around a backbone, with a head that is found by its name alone."""

    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = FAMILIES["vit"].backbone()
            self.decode = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 3))

        def forward(self, pixel_values):
            return self.decode(self.backbone(pixel_values).last_hidden_state[:, 0])

    torch.manual_seed(0)
    model = get_peft_model(Segmenter(), ViTAdapterConfig(channels=6, modules_to_save=["decode"]))
    model(images()).square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "decode.modules_to_save" in n)


@pytest.mark.parametrize("config_cls", [DiffFitConfig, RLRRConfig])
def test_final_norm_and_patches_are_left_out(config_cls):
    names = ["classifier", "vit.layernorm", "patch_embeddings"]
    model, messages = said(vit(), config_cls(modules_to_save=names))
    left_out = "vit.embeddings.patch_embeddings, vit.layernorm"
    assert messages == [f"{config_cls.__name__} leaves out {left_out}: modules_to_save trains them as a whole."]
    assert train(model, images()) == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["clasifier"],
            r"LoraConfig.modules_to_save has 'clasifier': .* no module of that name. Did you mean 'classif",
        ),
        (["classifier", "cls_token"], "modules_to_save has 'cls_token', which is a parameter, not a module"),
        ("classifier", r"modules_to_save is 'classifier': must be None or a list of names, as \['classifier'\]"),
    ],
)
def test_methods_of_peft_refuse_names_that_fit_no_module(names, message):
    model = FAMILIES["vit"].model()
    with pytest.raises(ValueError, match=message):
        hf_visual_peft.with_visual_targets(LoraConfig(modules_to_save=names), model)
    kept = hf_visual_peft.with_visual_targets(LoraConfig(modules_to_save=["classifier", "layers.2.mlp"]), model)
    assert kept.modules_to_save == ["classifier", "layers.2.mlp"]
