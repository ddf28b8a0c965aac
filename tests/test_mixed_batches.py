"""Batches in which each sample goes through an adapter, and a head, of its own."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from families import FAMILIES, video
from peft import get_peft_model
from peft.utils.other import ModulesToSaveWrapper

import hf_visual_peft
from hf_visual_peft import NotCalibratedError
from hf_visual_peft.coverage.cell import tensors_of
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.coverage.sizes import small_config


BASE = "__base__"
NAMES = ["dogs", BASE, "cats", "dogs", "cats"]
TOLERANCE = 1e-5  # of the output's scale: the size of a batch changes how sums round
METHODS = hf_visual_peft.list_methods()
IMAGE_METHODS = [name for name, method in METHODS.items() if not method.video]
# what makes the second adapter another one, beside its weights
OTHER = {"r": 8, "num_virtual_tokens": 5}


def config(name, **fields):
    made = small_config(METHODS[name])
    return dataclasses.replace(made, **fields)


def two_adapters(base, first, second):
    """A model with two adapters, and different heads for them, if they have some."""
    torch.manual_seed(2)
    model = get_peft_model(base, first, adapter_name="cats")
    model.add_adapter("dogs", second)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return model.eval()


def of_method(tiny, name, **fields):
    known = {field.name for field in dataclasses.fields(METHODS[name].config_cls)}
    other = dict([(key, value) for key, value in OTHER.items() if key in known][:1])
    return two_adapters(tiny.model(), config(name, **fields), config(name, **fields | other))


@torch.no_grad()
def outputs(tiny, model, arguments, **kwargs):
    if tiny.positional:
        return tensors_of(model(arguments["pixel_values"], **kwargs))
    return tensors_of(model(**arguments, **kwargs))


def alone(tiny, model, arguments, name):
    if name == BASE:
        with model.disable_adapter():
            return outputs(tiny, model, arguments)
    model.set_adapter(name)
    return outputs(tiny, model, arguments)


def of_sample(tensor, sample):
    """The part of a sample: some models put out several rows for each, as MobileViT does."""
    return tensor.unflatten(0, (len(NAMES), -1))[sample]


def assert_each_as_alone(tiny, model, **kwargs):
    arguments = tiny.arguments(len(NAMES)) | kwargs
    expected = {name: alone(tiny, model, arguments, name) for name in sorted(set(NAMES))}
    mixed = outputs(tiny, model, arguments, adapter_names=NAMES)
    assert len(mixed) == len(expected["cats"])
    for index, tensor in enumerate(mixed):
        scale = max(float(tensors[index].abs().max()) for tensors in expected.values())
        assert tensor.shape == expected["cats"][index].shape
        for sample, name in enumerate(NAMES):
            torch.testing.assert_close(
                of_sample(tensor, sample),
                of_sample(expected[name][index], sample),
                rtol=0,
                atol=TOLERANCE * scale,
            )
    last = {name: tensors[0] for name, tensors in expected.items()}
    for one, other in (("cats", "dogs"), ("cats", BASE), ("dogs", BASE)):
        assert (last[one] - last[other]).abs().max() > 1e-3 * last[one].abs().max()  # else nothing was mixed


# Sparse-Tuning refuses such batches, as its samples would keep tokens of their own
@pytest.mark.parametrize("name", [name for name in IMAGE_METHODS if name != "sparsetuning"])
def test_each_sample_as_alone(name):
    model = of_method(MODELS["vit"], name)
    if name == "linearprobe":
        randomise_copies(model)
    assert_each_as_alone(MODELS["vit"], model)


def randomise_copies(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "linearprobe_copy" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.5)


# masks, position biases, registers, windows and cells that are rows of the batch, lists of features, heads of several
# modules
@pytest.mark.parametrize("name", ["vpt", "adaptformer", "convpass", "ssf", "gps", "fact", "repadapter", "partial"])
@pytest.mark.parametrize("tiny", ["dinov2_with_registers", "beit", "swin", "siglip2", "vit_mae", "mobilevit"])
def test_other_backbones(name, tiny):
    assert_each_as_alone(MODELS[tiny], of_method(MODELS[tiny], name))


@pytest.mark.parametrize(
    ("name", "tiny"),
    [
        ("attnscale", "dinov2_with_registers"),
        ("attnscale", "swin"),
        ("vpt", "segformer_segmentation"),
        ("linearprobe", "segformer_segmentation"),
        ("ssf", "upernet_swin"),
        ("ssf", "resnet"),
        ("partial", "resnet"),
        ("linearprobe", "resnet"),
        ("repadapter", "convnext"),
        ("adaptformer", "levit"),
        ("vpt", "timm_vit"),
        ("ssf", "timm_dinov3"),
        ("vpt", "timm_dinov3"),
        ("ssf", "videomae"),
    ],
)
def test_heads_and_other_models(name, tiny):
    if MODELS[tiny].missing_package:
        pytest.skip(f"{MODELS[tiny].missing_package} is not installed")
    model = of_method(MODELS[tiny], name)
    if name == "linearprobe":
        randomise_copies(model)
    assert_each_as_alone(MODELS[tiny], model)


@pytest.mark.parametrize("tiny", ["vit", "beit"])
def test_prompts_that_go_from_block_to_block(tiny):
    first, second = config("vpt", deep=False), config("vpt", deep=False, num_virtual_tokens=5)
    assert_each_as_alone(MODELS[tiny], two_adapters(MODELS[tiny].model(), first, second))


def test_different_layers():
    first, second = config("vpt", layers_to_transform=[0]), config("vpt", layers_to_transform=[1])
    assert_each_as_alone(MODELS["vit"], two_adapters(MODELS["vit"].model(), first, second))
    first, second = config("ssf", layers_to_transform=[0]), config("ssf", layers_to_transform=[1])
    assert_each_as_alone(MODELS["vit"], two_adapters(MODELS["vit"].model(), first, second))


@pytest.mark.parametrize("last", ["cats", "dogs"])
def test_adapter_without_a_head(last):
    model = two_adapters(MODELS["vit"].model(), config("ssf"), config("ssf", modules_to_save=[]))
    assert_each_as_alone(MODELS["vit"], model)
    model.set_adapter(last)
    arguments = MODELS["vit"].arguments(5)
    mixed = outputs(MODELS["vit"], model, arguments, adapter_names=NAMES)[0]
    model.set_adapter("dogs")
    torch.testing.assert_close(mixed[0], outputs(MODELS["vit"], model, arguments)[0][0], rtol=0, atol=1e-5)


def test_adapters_with_statistics_of_their_own():
    tiny = MODELS["resnet"]
    model = two_adapters(
        tiny.model(),
        config("partial", train_norm_statistics=True),
        config("partial", train_norm_statistics=True),
    )
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "modules_to_save.dogs." in name and name.endswith("running_mean"):
                buffer.add_(1.0)
    assert_each_as_alone(tiny, model)


@pytest.mark.parametrize("name", ["vpt", "adaptformer", "ssf", "partial"])
def test_hidden_states(name):
    tiny = MODELS["vit"]
    model = of_method(tiny, name)
    assert len(outputs(tiny, model, tiny.arguments(5), output_hidden_states=True)) == 5
    assert_each_as_alone(tiny, model, output_hidden_states=True)


def test_attentions():
    tiny = MODELS["vit"]
    model = of_method(tiny, "ssf")
    model.set_attn_implementation("eager")
    assert_each_as_alone(tiny, model, output_attentions=True)
    for name in ("vpt", "partial"):
        with pytest.raises(ValueError, match="output_attentions"):
            outputs(tiny, of_method(tiny, name), tiny.arguments(5), output_attentions=True, adapter_names=NAMES)


@pytest.mark.parametrize("name", ["vpt", "ssf", "partial"])
def test_one_name_for_all(name):
    tiny = MODELS["vit"]
    model = of_method(tiny, name)
    arguments = tiny.arguments(5)
    for only in ("cats", "dogs", BASE):
        expected = alone(tiny, model, arguments, only)[0]
        mixed = outputs(tiny, model, arguments, adapter_names=[only] * 5)[0]
        torch.testing.assert_close(mixed, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))
    with model.disable_adapter():
        assert torch.equal(outputs(tiny, model, arguments, adapter_names=NAMES)[0], expected)


def test_copied_model_mixes_for_itself():
    tiny = MODELS["vit"]
    model = of_method(tiny, "vpt")
    assert_each_as_alone(tiny, copy.deepcopy(model))
    assert_each_as_alone(tiny, model)


def test_backbone_in_half_precision():
    tiny = MODELS["vit"]
    model = two_adapters(tiny.model().bfloat16(), config("partial"), config("partial"))
    arguments = {"pixel_values": tiny.arguments(5)["pixel_values"].bfloat16()}
    mixed = outputs(tiny, model, arguments, adapter_names=NAMES)[0]
    for sample, name in enumerate(NAMES):
        expected = alone(tiny, model, arguments, name)[0][sample]
        torch.testing.assert_close(mixed[sample], expected, rtol=0, atol=0.05 * float(expected.abs().max()))


@pytest.fixture
def vit():
    return of_method(MODELS["vit"], "vpt")


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["cats"] * 4, ValueError, "Length of `adapter_names` should be the same .* got 4 and 5"),
        (["cats"], ValueError, "got 1 and 5"),
        (["cats", "birds", BASE, "ants", "cats"], ValueError, r"non-existing adapter\(s\): ants, birds$"),
        ("catss", TypeError, "expected a list of str"),
        ([0, 1, 0, 1, 0], TypeError, "expected a list of str"),
    ],
)
def test_wrong_names(vit, names, error, message):
    with pytest.raises(error, match=message):
        outputs(MODELS["vit"], vit, MODELS["vit"].arguments(5), adapter_names=names)


def test_only_in_eval_mode(vit):
    with pytest.raises(ValueError, match="training mode"):
        outputs(MODELS["vit"], vit.train(), MODELS["vit"].arguments(5), adapter_names=NAMES)


@pytest.mark.parametrize("name", ["ssf", "partial"])
def test_not_with_merged_adapters(name):
    tiny = MODELS["vit"]
    model = of_method(tiny, name)
    model.set_adapter("cats")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        outputs(tiny, model, tiny.arguments(5), adapter_names=NAMES)
    model.unmerge_adapter()
    assert_each_as_alone(tiny, model)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.video])
def test_not_for_videos(name):
    family = video(FAMILIES["vit"], METHODS[name])
    model = two_adapters(family.model(), config(name), config(name))
    with pytest.raises(ValueError, match="adapter_names: methods for videos"):
        model(**family.inputs(2), adapter_names=["cats", BASE])


def test_adapter_that_has_not_chosen():
    tiny = MODELS["vit"]
    model = get_peft_model(tiny.model(), METHODS["gps"].config_cls(), adapter_name="cats").eval()
    with pytest.raises(NotCalibratedError):
        outputs(tiny, model, tiny.arguments(2), adapter_names=["cats", BASE])


def test_arguments_that_cannot_be_split(vit):
    """An error on the way leaves the model as it was."""
    tiny = MODELS["vit"]
    arguments = tiny.arguments(5)
    expected = alone(tiny, vit, arguments, "cats")[0]
    layer = vit.base_model.model.vit.layers[0]

    def hand_over(module, args, kwargs):
        return args, {**kwargs, "scales": torch.ones(5)}

    handle = layer.register_forward_pre_hook(hand_over, with_kwargs=True)
    with pytest.raises(ValueError, match="the argument 'scales' of ViTLayer is not known"):
        outputs(tiny, vit, arguments, adapter_names=NAMES)
    handle.remove()
    with vit.disable_adapter():
        base = outputs(tiny, vit, arguments)[0]
    assert torch.equal(base, outputs(tiny, tiny.model(), arguments)[0])
    assert torch.equal(outputs(tiny, vit, arguments)[0], expected)
    assert not any("forward" in vars(module) for module in vit.modules() if isinstance(module, ModulesToSaveWrapper))


@pytest.mark.parametrize("name", ["ssf", "linearprobe"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda x: x.expand(5, 2, *x.shape), "an input of 4 dimensions of Linear"),
        (lambda x: x[:3], "gets 3 rows|got 5 and 3"),
    ],
)
def test_heads_that_do_not_read_samples_first(name, given, message):
    tiny = MODELS["vit"]
    model = of_method(tiny, name)
    head = model.base_model.model.classifier
    head.register_forward_pre_hook(lambda module, args: (given(args[0]),))
    with pytest.raises(ValueError, match=message):
        outputs(tiny, model, tiny.arguments(5), adapter_names=NAMES)


def test_trained_module_with_several_rows_a_sample():
    tiny = MODELS["vit"]
    model = of_method(tiny, "ssf")
    model.base_model.model.classifier.register_forward_pre_hook(lambda module, args: (args[0].repeat(2, 1),))
    with pytest.raises(ValueError, match="got 5 and 10 respectively"):
        outputs(tiny, model, tiny.arguments(5), adapter_names=NAMES)
