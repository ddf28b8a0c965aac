"""Merged models on their way through a file: what keeps its shifts, and what says that it would not."""

import copy
import pickle
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._pytree import tree_leaves

from hf_visual_peft import (
    AdapterBiasConfig,
    ConsolidatorConfig,
    HydraConfig,
    RepAdapterConfig,
    RLRRConfig,
    SSFConfig,
)
from hf_visual_peft.coverage.models import MODELS


CONVOLUTIONAL = ["resnet", "regnet", "efficientnet", "mobilenet_v1", "mobilenet_v2", "hgnet_v2", "textnet"]
ON_TOP = ["mask2former_swin", "detr_resnet", "rt_detr_resnet"]
WHOLE = ["clip", "metaclip_2", "swin", "donut-swin", "cvt", "levit", *CONVOLUTIONAL, *ON_TOP]
IN_PART = ["swinv2", "focalnet", "mobilevit", "pp_lcnet"]  # some shifts have no other place


def double(inputs):
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def outputs(model, tiny):
    inputs = double(tiny.inputs(2, tiny.size))
    torch.manual_seed(3)
    with torch.no_grad():
        result = model(*inputs.values()) if tiny.positional else model(**inputs)
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def assert_same(found, expected, tolerance=1e-10):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max().clamp(min=1)


def adapted(name, config):
    torch.manual_seed(1)
    return get_peft_model(MODELS[name].model(), config).double().eval()


def random(config_cls, **fields):
    return config_cls(init_weights=False, modules_to_save=[], **fields)


@pytest.fixture
def nothing_lost():
    """Merging and saving say nothing of biases."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(gets a bias by merging|biases that its class)")
        yield


# ------------------------------------------------------------------ through a file


@pytest.mark.usefixtures("nothing_lost")
@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, random(SSFConfig)) for name in WHOLE),
        *((name, random(RLRRConfig)) for name in ("clip", "swin", "levit", "resnet")),
        *(("levit", random(cls, **f)) for cls, f in ((AdapterBiasConfig, {}), (HydraConfig, {"r": 4}))),
        ("levit", random(ConsolidatorConfig, groups=4)),
        ("mobilenet_v2", random(SSFConfig, layers_to_transform=[0, 2])),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_merged_model_comes_back_from_a_file(name, config, tmp_path):
    model = adapted(name, config)
    expected = outputs(model, MODELS[name])
    merged = model.merge_and_unload()
    assert_same(outputs(merged, MODELS[name]), expected)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path, dtype=torch.float64).eval()
    state = again.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in merged.state_dict().items())
    assert_same(outputs(again, MODELS[name]), expected)  # sums round by how memory is aligned


@pytest.mark.usefixtures("nothing_lost")
@pytest.mark.parametrize("name", ["timm_resnet", "open_clip", "timm_maxvit", "clipseg", "owlvit"])
def test_a_merged_model_has_the_state_of_its_base(name):
    if MODELS[name].missing_package:
        pytest.skip(f"needs {MODELS[name].missing_package}")
    model = adapted(name, random(SSFConfig))
    expected = outputs(model, MODELS[name])
    merged = model.merge_and_unload()
    base = MODELS[name].model().double()
    base.load_state_dict(merged.state_dict())
    assert_same(outputs(base.eval(), MODELS[name]), expected)


@pytest.mark.usefixtures("nothing_lost")
def test_a_merged_model_still_takes_other_sizes():
    """A shift of all positions stays one when they are interpolated."""
    tiny = MODELS["clip"]
    model = adapted("clip", random(SSFConfig))
    pixels = torch.randn(1, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        expected = model(pixel_values=pixels, interpolate_pos_encoding=True).logits
        merged = model.merge_and_unload()
        assert_same([merged(pixel_values=pixels, interpolate_pos_encoding=True).logits], [expected], 1e-9)
    assert tiny.interpolates


@pytest.mark.usefixtures("nothing_lost")
def test_training_goes_on_as_it_would_have():
    """Statistics of batches subtract a shift before a batch norm; the running means differ by it."""
    model = adapted("resnet", random(SSFConfig))
    merged = copy.deepcopy(model).merge_and_unload()
    for each in (model.get_base_model(), merged):
        for module in each.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.training = True
    assert_same(outputs(merged, MODELS["resnet"]), outputs(model, MODELS["resnet"]), 1e-9)
    for module in (*model.modules(), *merged.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.training = False
    assert_same(outputs(merged, MODELS["resnet"]), outputs(model, MODELS["resnet"]), 1e-9)


@pytest.mark.parametrize("name", IN_PART)
def test_what_a_file_would_lose_is_said_at_merging_and_at_saving(name, tmp_path):
    model = adapted(name, random(SSFConfig))
    expected = outputs(model, MODELS[name])
    with pytest.warns(UserWarning, match="gets a bias by merging") as at_merging:
        merged = model.merge_and_unload()
    assert len(at_merging) == 1
    assert_same(outputs(merged, MODELS[name]), expected)
    base = dict(MODELS[name].model().named_parameters())
    given = [path for path, _ in merged.named_parameters() if path not in base]
    assert given
    assert all(path.endswith(".bias") for path in given)
    first = given[0].removesuffix(".bias")
    assert first in str(at_merging[0].message)
    assert "Save the adapter, not the merged model" in str(at_merging[0].message)
    with pytest.warns(UserWarning, match="has biases that its class does not make") as at_saving:
        merged.save_pretrained(tmp_path)
    assert len(at_saving) == 1
    assert first in str(at_saving[0].message)


# ------------------------------------------------------------------ and back


def states(model):
    return {name: tensor.clone() for name, tensor in model.get_base_model().state_dict().items()}


@pytest.mark.parametrize("name", ["clip", "swin", "resnet", "swinv2"])
@pytest.mark.parametrize("way", ["unmerge", "disable"])
@pytest.mark.filterwarnings("ignore:.*gets a bias by merging")
def test_unmerging_restores_every_number(name, way):
    model = adapted(name, random(SSFConfig))
    before, expected = states(model), outputs(model, MODELS[name])
    objects = dict(model.named_parameters())
    with model.disable_adapter():
        base = outputs(model, MODELS[name])
    model.merge_adapter()
    assert_same(outputs(model, MODELS[name]), expected)
    if way == "unmerge":
        model.unmerge_adapter()
    else:
        with model.disable_adapter():
            assert_same(outputs(model, MODELS[name]), base, 0)
    assert_same(outputs(model, MODELS[name]), expected, 0)
    after = states(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(parameter is objects[key] for key, parameter in model.named_parameters())


@pytest.mark.usefixtures("nothing_lost")
@pytest.mark.parametrize("name", ["clip", "swin", "resnet"])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_several_adapters_merge(name, one_by_one):
    model = adapted(name, random(SSFConfig))
    model.add_adapter("second", random(SSFConfig, target_modules="all-linear"))
    model.double()
    before = states(model)
    model.base_model.set_adapter(["default", "second"])
    expected = outputs(model, MODELS[name])
    if one_by_one:
        model.merge_adapter(["default"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already following adapters")
            model.merge_adapter(["second"])
    else:
        model.merge_adapter(safe_merge=True)
    assert_same(outputs(model, MODELS[name]), expected)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[key]) for key, tensor in states(model).items())


def test_a_broken_adapter_is_refused_and_leaves_the_model(tmp_path):
    model = adapted("resnet", random(SSFConfig))
    before = states(model)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "shift" in n and "stages.0" in n)[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    for key, tensor in states(model).items():
        assert torch.equal(tensor, before[key]) or "ssf_" in key


@pytest.mark.usefixtures("nothing_lost")
def test_shifts_go_to_the_statistics_that_the_adapter_moved():
    """The adapter has copies of the batch norms, one of which takes the shift; the base's stay as they are."""
    config = random(SSFConfig, target_modules=["convolution"], train_norm_statistics=True)
    model = adapted("resnet", config)
    model.train()
    outputs(model, MODELS["resnet"])
    model.eval()
    before, expected = states(model), outputs(model, MODELS["resnet"])
    model.merge_adapter()
    assert_same(outputs(model, MODELS["resnet"]), expected)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[key]) for key, tensor in states(model).items())
    merged = model.merge_and_unload()
    base = MODELS["resnet"].model().double()
    base.load_state_dict(merged.state_dict())
    assert_same(outputs(base.eval(), MODELS["resnet"]), expected)


@pytest.mark.usefixtures("nothing_lost")
def test_frozen_batch_norms_hold_shifts():
    """Those of detectors keep weight and statistics as buffers."""
    tiny = MODELS["detr_resnet"]
    model = adapted("detr_resnet", random(SSFConfig))
    frozen = [m for m in model.modules() if hasattr(m, "running_mean") and not isinstance(m, nn.BatchNorm2d)]
    assert frozen
    expected = outputs(model, tiny)
    base = tiny.model().double()
    base.load_state_dict(model.merge_and_unload().state_dict())
    assert_same(outputs(base.eval(), tiny), expected)


@pytest.mark.usefixtures("nothing_lost")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_merges(dtype):
    """What is folded is rounded once, to what its place can hold."""
    torch.manual_seed(1)
    model = get_peft_model(MODELS["clip"].model(), random(SSFConfig)).eval()
    pixels = MODELS["clip"].inputs(2, MODELS["clip"].size)["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
        merged = model.to(dtype).merge_and_unload()
        found = merged(pixel_values=pixels.to(dtype)).logits.float()
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert (found - expected).abs().max() < 16 * torch.finfo(dtype).eps * expected.abs().max().clamp(min=1)


@pytest.mark.filterwarnings("ignore:.*gets a bias by merging")
def test_a_merged_model_copies_and_pickles():
    model = adapted("swin", random(SSFConfig))
    model.merge_adapter()
    expected = outputs(model, MODELS["swin"])
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(outputs(again, MODELS["swin"]), expected, 0)
        again.unmerge_adapter()
        assert_same(outputs(again, MODELS["swin"]), expected)
    assert_same(outputs(model, MODELS["swin"]), expected, 0)


def test_saving_the_adapter_of_a_merged_model_says_nothing(tmp_path):
    model = adapted("swinv2", random(SSFConfig))
    with pytest.warns(UserWarning, match="gets a bias by merging"):
        model.merge_adapter()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*biases that its class")
        model.save_pretrained(tmp_path)
        expected = outputs(PeftModel.from_pretrained(MODELS["swinv2"].model(), tmp_path).double(), MODELS["swinv2"])
        model.unmerge_adapter()
        model.get_base_model().state_dict()
    assert_same(outputs(model, MODELS["swinv2"]), expected)


# ------------------------------------------------------------------ a model's own code


class Net(nn.Module):
    """Ways from a convolution without a bias to what follows it."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.list = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))])
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        y = self.conv(x)
        if self.way == "plain":
            y = self.norm(y)
        elif self.way == "read twice":
            y = self.norm(y) + y
        elif self.way == "activation":
            y = self.norm(y.relu())
        elif self.way == "rolled":
            y = self.norm(y.transpose(1, 2).transpose(1, 2))
        elif self.way == "other dimension":
            y = self.norm(y[..., :4, :4].transpose(1, 2))
        elif self.way == "norm twice":
            y = self.norm(self.norm(y))
        elif self.way == "depends":
            y = self.norm(y) if y.sum() > 0 else y
        return self.list[0](y)


@pytest.mark.filterwarnings("ignore:.*gets a bias by merging")
@pytest.mark.parametrize(
    ("way", "kept"),
    [
        ("plain", True),
        ("rolled", True),
        ("read twice", False),
        ("activation", False),
        ("other dimension", False),
        ("norm twice", False),
        ("nothing", False),
    ],
)
@torch.no_grad()
def test_where_a_shift_goes_is_read_off_the_code(way, kept):
    net, x = Net(way).eval(), torch.randn(2, 3, 8, 8)
    model = get_peft_model(net, SSFConfig(target_modules=["conv", "list.0.0"], init_std=0.5)).eval()
    expected = model(x)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)
    assert (merged.conv.bias is None) == kept
    assert merged.list[0][0].bias is None


@torch.no_grad()
def test_a_shift_that_the_norm_before_cannot_make_gets_a_bias():
    """More outputs than inputs, and a weight without full rank."""
    for weight in (torch.randn(8, 4), torch.ones(3, 4)):
        net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, len(weight), bias=False), nn.ReLU())
        net[1].weight.copy_(weight)
        model = get_peft_model(net, SSFConfig(target_modules=["1"], init_std=0.5)).eval()
        x = torch.randn(5, 4)
        expected = model(x)
        with pytest.warns(UserWarning, match="gets a bias by merging"):
            merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), expected)
        assert merged[1].bias is not None


@pytest.mark.usefixtures("nothing_lost")
def test_an_adapter_without_a_shift_gives_no_bias():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
    model = get_peft_model(net, SSFConfig(target_modules=["0"]))
    assert model.merge_and_unload()[0].bias is None


@torch.no_grad()
def test_a_linear_that_others_read_through_gets_the_shift_of_its_input():
    """RepAdapter folds into what follows; the sum goes to the batch norm behind it."""
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)).eval()
    model = get_peft_model(net, RepAdapterConfig(target_modules=["0"], r=2, init_weights=False)).eval()
    x = torch.randn(5, 4)
    expected = model(x)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
    assert merged[0].bias is None
