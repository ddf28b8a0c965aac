"""BitFit, DiffFit, GPS and SPT against what their papers train and choose, in plain torch."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from equations import LINEARS, assert_equal, both, weights_by_path
from families import DEPTH, FAMILIES, PATCH, WIDTH, images, output_of
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from plain import plain_parts
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from hf_visual_peft import (
    BitFitConfig,
    DiffFitConfig,
    GPSConfig,
    NotCalibratedError,
    SPTConfig,
    calibrate,
    parameter_groups,
)
from hf_visual_peft.methods.specification.deltas import Addend, Chosen, Deltas, SparseAddend
from hf_visual_peft.methods.specification.gps import supervised_contrastive_loss
from hf_visual_peft.methods.specification.spt_parts import SPTLoRA, largest


def labelled(batch, labels):
    return images(batch) | {"labels": torch.tensor(labels)}


BATCHES = (labelled(4, [0, 2, 0, 1]), labelled(6, [2, 2, 0, 1, 0, 1]))


def weights_with(base, *kinds):
    """Modules of a classifier's backbone of these classes, by name."""
    found = {name: module for name, module in base.named_modules() if isinstance(module, kinds)}
    return {name: module for name, module in found.items() if name != "classifier"}


EVERYTHING = (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Conv2d)


def with_head_of(base, model):
    base.classifier.load_state_dict(model.get_base_model().classifier.modules_to_save["default"].state_dict())
    return base


def states_equal(merged, base):
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, base.state_dict()[name], rtol=0, atol=1e-6)


# ------------------------------------------------------------ BitFit and DiffFit


@both
def test_bitfit_is_training_the_biases(name):
    """Same output, same gradients and same merged weights as a model whose own biases are trained."""
    family = FAMILIES[name]
    torch.manual_seed(3)
    model = get_peft_model(family.model(), BitFitConfig(init_weights=False)).eval()
    base = with_head_of(family.model(), model)
    shifts = {key: w["shift"] for key, w in weights_by_path(model, "bitfit_bias").items()}
    assert shifts.keys() == weights_with(base, *EVERYTHING).keys()
    with torch.no_grad():
        for key, shift in shifts.items():
            assert shift.any()
            base.get_submodule(key).bias += shift
    expected, actual = output_of(base, family.inputs(2)), output_of(model, family.inputs(2))
    assert_equal(actual, expected)
    expected.square().sum().backward()
    actual.square().sum().backward()
    for key, shift in shifts.items():
        if not key.endswith("k_proj"):  # moves all logits of a query alike: the gradient is rounding
            torch.testing.assert_close(shift.grad, base.get_submodule(key).bias.grad, rtol=1e-3, atol=1e-5)
    states_equal(model.merge_and_unload(safe_merge=True), base)


def test_bitfit_leaves_modules_without_bias_alone():
    model = get_peft_model(FAMILIES["beit"].model(), BitFitConfig())
    shifted = set(weights_by_path(model, "bitfit_bias"))
    base = FAMILIES["beit"].model()
    modules = {key: m for key, m in weights_with(base, *EVERYTHING).items() if "bias" not in key}
    without = {key for key, module in modules.items() if module.bias is None}
    assert without
    assert shifted == modules.keys() - without
    merged = model.merge_and_unload()
    assert all(merged.get_submodule(key).bias is None for key in without)


def test_start_at_the_pretrained_weights():
    for config, ones in ((BitFitConfig(), 0), (DiffFitConfig(), 2 * DEPTH)):
        model = get_peft_model(FAMILIES["vit"].model(), config)
        values = [p for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n]
        assert all(not p.any() or bool((p == 1).all()) for p in values)
        assert sum(bool(p.any()) for p in values) == ones
        (group,) = (g for g in parameter_groups(model, 0.1) if g["weight_decay"] == 0.0)
        assert {id(p) for p in values} <= {id(p) for p in group["params"]}


@both
@torch.no_grad()
def test_difffit(name):
    family = FAMILIES[name]
    inputs = family.inputs(2)
    base = family.model()
    torch.manual_seed(3)
    model = get_peft_model(family.model(), DiffFitConfig(init_weights=False)).eval()
    norms = weights_by_path(model, "difffit_norm")
    assert norms.keys() == weights_with(base, torch.nn.LayerNorm).keys()
    for key, w in norms.items():
        base.get_submodule(key).weight += w["weight.values"]
        base.get_submodule(key).bias += w["bias.values"]
    biases, last = weights_by_path(model, "difffit_bias"), weights_by_path(model, "difffit_scale")
    assert biases.keys() | last.keys() == weights_with(base, torch.nn.Linear, torch.nn.Conv2d).keys()
    for key, w in biases.items():
        base.get_submodule(key).bias += w["shift"]
    for key, w in last.items():
        base.get_submodule(key).bias += w["bias.shift"]
    gammas = [(key, w["gamma"]) for key, w in last.items()]
    blocks, x, norm = plain_parts(name, base, inputs["pixel_values"])
    for index, block in enumerate(blocks):
        gamma1, gamma2 = (g for key, g in gammas if f".{index}." in key)
        x = x + gamma1 * block.attention(block.norm(1, x))
        x = x + gamma2 * block.mlp(block.norm(2, x))
    expected = norm(x)
    for adapted in (model.get_base_model(), model.merge_and_unload(safe_merge=True)):
        backbone = getattr(adapted, adapted.base_model_prefix)
        assert_equal(backbone(**inputs).last_hidden_state, expected)


# ------------------------------------------------------------ indices


def test_choice_that_does_not_fit_is_refused():
    part = Chosen(3, 10, "GPS")
    with pytest.raises(NotCalibratedError, match="GPS has not yet chosen"):
        part()
    for indices, message in (
        ([0, 10, 1], "1 indices outside 0 to 9, the first is 10"),
        ([-1, 0, 1], "1 indices outside 0 to 9, the first is -1"),
        ([4, 1, 4], "the same index twice"),
    ):
        state = {"indices": torch.tensor(indices, dtype=torch.int32)}
        with pytest.raises(ValueError, match=rf"GPS: indices has {message}"):
            part.load_state_dict(state)
        with pytest.raises(ValueError, match=message):
            part.choose(state["indices"])
        assert (part.indices == -1).all()
        part.indices.copy_(state["indices"])  # as where a file is read past the module
        with pytest.raises(ValueError, match=message):
            part()
        part.indices.fill_(-1)
    part.choose(torch.tensor([9, 0, 4]))
    assert part().tolist() == [9, 0, 4]
    part.load_state_dict({"indices": torch.full((3,), -1, dtype=torch.int32)})
    with pytest.raises(NotCalibratedError):
        part()
    part.randomise()
    assert len(set(part().tolist())) == 3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (48,)])
@pytest.mark.parametrize("half", [False, True])
def test_few_entries_have_the_gradients_of_the_whole_weight(bias, shape, half):
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 32, bias=bias).requires_grad_(False)
    deltas = Deltas(SparseAddend(linear.weight.numel(), 20, "SPT"), Addend(32) if bias else None)
    deltas.weight.entries.randomise()
    for parameter in deltas.parameters():
        torch.nn.init.normal_(parameter)
    weights = torch.randn(*shape[:-1], 32)
    found = []
    for few in (True, False):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            if few:
                y = deltas.linear_output(x, linear.weight, linear.bias)
                assert "SparseLinear" in type(y.grad_fn).__name__
            else:
                y = F.linear(x, *deltas(linear.weight, linear.bias))
        assert y.dtype == (torch.bfloat16 if half else torch.float32)
        found.append((y, *torch.autograd.grad((y * weights).sum(), [x, *deltas.parameters()])))
    for few, whole in zip(*found, strict=True):
        assert few.dtype == whole.dtype
        torch.testing.assert_close(few, whole, atol=0.1 if half else 1e-5, rtol=0.02 if half else 1e-5)


def test_many_entries_take_the_product():
    linear = torch.nn.Linear(48, 32).requires_grad_(False)
    deltas = Deltas(SparseAddend(linear.weight.numel(), 97, "SPT"), None)  # 96 are a sixteenth
    deltas.weight.entries.randomise()
    y = deltas.linear_output(torch.randn(5, 48), linear.weight, linear.bias)
    assert "SparseLinear" not in type(y.grad_fn).__name__
    assert y.shape == (5, 32)


# ------------------------------------------------------------ GPS


def contrastive(features, labels):
    """Anchor by anchor."""
    z = features / features.norm(dim=1, keepdim=True)
    losses = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        denominator = sum(torch.exp(z[i] @ z[j] / 0.07) for j in others)
        if positives:
            losses.append(
                sum(-torch.log(torch.exp(z[i] @ z[j] / 0.07) / denominator) for j in positives) / len(positives)
            )
    return sum(losses) / len(losses)


def test_supervised_contrastive_loss():
    torch.manual_seed(0)
    features = torch.randn(7, 5, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3])
    actual = supervised_contrastive_loss(features, labels)
    expected = contrastive(features, labels)
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(loss, features)[0] for loss in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert supervised_contrastive_loss(features, torch.arange(7)) is None


def head_inputs(name, base, pixels):
    """CLS after the norm; DINOv2's head reads the mean over the patches, too."""
    backbone = getattr(base, base.base_model_prefix)
    tokens = backbone(pixels).last_hidden_state
    return tokens[:, 0] if name == "vit" else torch.cat([tokens[:, 0], tokens[:, 5:].mean(dim=1)], dim=1)


@both
@pytest.mark.parametrize("views", [1, 2])
def test_gps_chooses_the_largest_gradients_of_each_row(name, views):
    family = FAMILIES[name]
    base = family.model()
    model = get_peft_model(family.model(), GPSConfig(k=2))
    batches = [dict(batch) for batch in BATCHES]
    if views == 2:
        for batch in batches:
            batch["pixel_values"] = torch.stack([batch["pixel_values"], batch["pixel_values"].flip(-1)], dim=1)
    state = {key: value.clone() for key, value in model.state_dict().items() if "indices" not in key}
    calibrate(model, batches, progress=False)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert not any(p.grad is not None for p in model.parameters())
    assert all(p.requires_grad == ("gps_" in n or "modules_to_save.default" in n) for n, p in model.named_parameters())

    modules = weights_with(base, torch.nn.Linear, torch.nn.Conv2d)
    total = {key: torch.zeros_like(module.weight) for key, module in modules.items()}
    for batch in batches:
        pixels = batch["pixel_values"].reshape(-1, 3, 32, 32)
        labels = [label for label in batch["labels"].tolist() for _ in range(views)]
        loss = contrastive(head_inputs(name, base, pixels), labels)
        for key, gradient in zip(total, torch.autograd.grad(loss, [m.weight for m in modules.values()]), strict=True):
            total[key] += gradient
    chosen = {
        key.partition(".gps_")[0].removeprefix("base_model.model."): buffer
        for key, buffer in model.named_buffers()
        if key.endswith("indices")
    }
    assert chosen.keys() == modules.keys()
    for key, indices in chosen.items():
        magnitude = total[key].flatten(1).abs()
        rows, columns = indices.view(-1, 2) // magnitude.shape[1], indices.view(-1, 2) % magnitude.shape[1]
        assert torch.equal(rows, torch.arange(len(magnitude))[:, None].expand(-1, 2).int())
        second = magnitude.topk(2, dim=1).values[:, 1:]
        # equal up to rounding: two entries may be as good
        assert (magnitude.gather(1, columns.long()) >= second * (1 - 1e-3) - 1e-8).all()


@both
@torch.no_grad()
def test_gps(name):
    family = FAMILIES[name]
    torch.manual_seed(3)
    model = get_peft_model(family.model(), GPSConfig(k=2))
    calibrate(model, BATCHES, progress=False)
    base = with_head_of(family.model(), model)
    before = output_of(base, family.inputs(2))
    assert torch.equal(output_of(model.eval(), family.inputs(2)), before), "nothing is added at the start"
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.3)
    with_head_of(base, model)
    parts = weights_by_path(model, "gps_entries")
    assert parts.keys() == weights_with(base, torch.nn.Linear, torch.nn.Conv2d).keys()
    buffers = dict(model.named_buffers())
    for key, w in parts.items():
        module = base.get_submodule(key)
        indices = buffers[f"base_model.model.{key}.gps_entries.default.weight.entries.indices"]
        rows = module.weight.flatten(1)
        assert w["weight.values"].shape == (2 * len(rows),)
        for index, value in zip(indices.tolist(), w["weight.values"], strict=True):
            rows[index // rows.shape[1], index % rows.shape[1]] += value
        module.bias += w["bias.values"]
    expected = output_of(base, family.inputs(2))
    assert_equal(output_of(model, family.inputs(2)), expected)
    states_equal(model.merge_and_unload(safe_merge=True), base)


def test_gps_saves_its_choice(tmp_path):
    family = FAMILIES["vit"]
    model = get_peft_model(family.model(), GPSConfig(k=3)).eval()
    with pytest.raises(NotCalibratedError, match="GPS has not yet chosen"):
        output_of(model, family.inputs(2))
    calibrate(model, BATCHES, progress=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    expected = output_of(model, family.inputs(2))
    model.save_pretrained(tmp_path)
    assert torch.equal(
        output_of(PeftModel.from_pretrained(family.model(), tmp_path).eval(), family.inputs(2)), expected
    )
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    name = "base_model.model.vit.layers.1.mlp.fc1.gps_entries.weight.entries.indices"
    assert weights[name].dtype == torch.int32
    weights[name][5] = 32 * WIDTH
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"GPS: .*fc1.*indices has 1 indices outside 0 to 511, the first is 512"):
        PeftModel.from_pretrained(family.model(), tmp_path)
    native = family.model()
    native.load_adapter(str(tmp_path))  # past the modules
    with pytest.raises(ValueError, match="outside 0 to 511"):
        output_of(native, family.inputs(2))


def test_gps_adapter_of_vit_b16_is_small():
    with torch.device("meta"):
        vit = ViTForImageClassification(ViTConfig(num_labels=2))
    state = get_peft_model_state_dict(get_peft_model(vit, GPSConfig(modules_to_save=[])))
    # 83,712 rows (12 * (4 * 768 + 3072 + 768) + 768), each with an index, a value and a bias, of four bytes
    assert sum(tensor.numel() * tensor.element_size() for tensor in state.values()) == 3 * 4 * 83_712 < 1.5e6


def test_gps_errors():
    model = get_peft_model(FAMILIES["vit"].model(), GPSConfig())
    with pytest.raises(ValueError, match="no batch has two images of the same class"):
        calibrate(model, [labelled(2, [0, 1]), labelled(1, [0])], progress=False)
    with pytest.raises(NotCalibratedError):
        output_of(model, images(2))
    calibrate(model, [labelled(1, [0]), *BATCHES], progress=False)
    with pytest.raises(ValueError, match="k is 0: must be an integer of at least 1"):
        GPSConfig(k=0)
    with pytest.raises(ValueError, match=r"k is 17: must be at most the 16 inputs of Linear"):
        get_peft_model(FAMILIES["vit"].model(), GPSConfig(k=17))


def test_gps_values_do_not_decay():
    model = get_peft_model(FAMILIES["vit"].model(), GPSConfig(modules_to_save=[]))
    (group,) = parameter_groups(model, 0.1)
    assert group["weight_decay"] == 0.0
    assert len(group["params"]) == 2 * (6 * DEPTH + 1)


# ------------------------------------------------------------ SPT


def test_largest_of_all():
    torch.manual_seed(0)
    scores = [torch.rand(3, 4), torch.rand(7), torch.rand(2, 2) / 100, torch.rand(5, 5)]
    for count in (1, 9, 40, 48):
        best, where = largest(scores, count)
        everything = torch.cat([score.flatten() for score in scores])
        assert torch.equal(best.sort().values, everything.topk(count).values.flip(0))
        threshold = everything.topk(count).values[-1]
        for score, indices in zip(scores, where, strict=True):
            assert indices.tolist() == (score.flatten() >= threshold).nonzero().flatten().tolist()


def spt_names(base):
    """{name in `chosen`: tensor}, by the names in the tiny ViT."""
    roles = ("layernorm_before", *LINEARS[:4], "layernorm_after", *LINEARS[4:])
    names = ("norm1", "query", "key", "value", "output", "norm2", "fc1", "fc2")
    modules = {"norms.0": base.vit.layernorm}
    for index in range(DEPTH):
        for name, role in zip(names, roles, strict=True):
            modules[f"{index}.{name}"] = base.get_submodule(f"vit.layers.{index}.{role}")
    return {f"{name}.{kind}": getattr(m, kind) for name, m in modules.items() for kind in ("weight", "bias")}


@pytest.mark.parametrize(("budget", "alpha", "beta"), [(150, 10.0, 5.0), (600, 3.0, 2.0), (None, 10.0, 5.0)])
def test_spt_chooses_by_squared_gradients(budget, alpha, beta):
    family = FAMILIES["vit"]
    base = family.model()
    tensors = spt_names(base)
    sensitivity = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    for batch in BATCHES:
        loss = F.cross_entropy(base(batch["pixel_values"]).logits, batch["labels"])
        for key, gradient in zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True):
            sensitivity[key] += gradient**2
    everything = torch.cat([value.flatten() for value in sensitivity.values()])
    count = budget or round(0.005 * len(everything))
    threshold = everything.topk(count).values[-1]
    expected = {}
    for key, value in sensitivity.items():
        selected = int((value >= threshold).sum())
        if value.ndim == 1:
            choice = "whole" if selected >= len(value) / beta else selected
        else:
            choice = "lora" if selected >= 4 * sum(value.shape) / alpha else selected
        if selected:
            expected[key] = choice

    model = get_peft_model(family.model(), SPTConfig(budget=budget, r=4, alpha=alpha, beta=beta))
    assert sum(p.numel() for n, p in model.named_parameters() if "spt_" in n) == 0
    calibrate(model, BATCHES, progress=False)
    config = model.peft_config["default"]
    assert config.chosen == expected
    if budget is not None:
        assert {"lora", "whole"} <= set(map(str, expected.values()))
        assert any(isinstance(choice, int) for choice in expected.values())
    sizes = [sum(tensors[key].shape) * 4 if c == "lora" else len(tensors[key]) if c == "whole" else c
             for key, c in expected.items()]  # fmt: skip
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n}
    assert sum(p.numel() for p in trained.values()) == sum(sizes)
    assert all(".spt_" in name for name in trained)
    assert not any(p.grad is not None for p in model.parameters())
    by_name = {key: (sensitivity[key] >= threshold).flatten().nonzero().flatten().tolist() for key in expected}
    for path, part in model.named_modules():
        if type(part).__name__ == "SPTEntries":
            for kind, (_, key) in part.sizes.items():
                if isinstance(expected.get(key), int):
                    assert getattr(part, kind).entries().tolist() == by_name[key], path


EXAMPLE = {
    "0.value.weight": "lora",
    "0.value.bias": 3,
    "0.fc1.weight": 7,
    "1.output.weight": "lora",
    "1.norm2.weight": "whole",
    "1.norm2.bias": 2,
    "2.fc2.weight": 1,
    "norms.0.bias": "whole",
}


@torch.no_grad()
def test_spt(tmp_path):
    family = FAMILIES["vit"]
    torch.manual_seed(3)
    model = get_peft_model(family.model(), SPTConfig(r=4, chosen=dict(EXAMPLE), init_weights=False)).eval()
    base = with_head_of(family.model(), model)
    tensors = spt_names(base)
    loras, entries = weights_by_path(model, "spt_lora"), weights_by_path(model, "spt_entries")
    assert len(loras) == 2
    paths = {id(parameter): name for name, parameter in base.named_parameters()}
    for key, choice in EXAMPLE.items():
        path, _, kind = paths[id(tensors[key])].rpartition(".")
        if choice == "lora":
            tensors[key] += loras[path]["up.weight"] @ loras[path]["down.weight"]
        elif choice == "whole":
            tensors[key] += entries[path][f"{kind}.values"]
        else:
            part = model.get_submodule(f"base_model.model.{path}.spt_entries.default.{kind}")
            assert len(part.values) == choice
            for index, value in zip(part.entries.indices.tolist(), part.values, strict=True):
                tensors[key].view(-1)[index] += value
    expected = output_of(base, family.inputs(2))
    assert not torch.allclose(expected, output_of(family.model(), family.inputs(2)), atol=1e-2)
    assert_equal(output_of(model, family.inputs(2)), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family.model(), tmp_path).eval()
    assert_equal(output_of(loaded, family.inputs(2)), expected)
    states_equal(model.merge_and_unload(safe_merge=True), base)


@torch.no_grad()
def test_spt_on_dinov2():
    """Layer scale stands behind what is trained."""
    family = FAMILIES["dinov2_registers"]
    torch.manual_seed(3)
    model = get_peft_model(family.model(), SPTConfig(r=4, chosen={"1.fc2.weight": "lora"}, init_weights=False)).eval()
    base = with_head_of(family.model(), model)
    ((path, w),) = weights_by_path(model, "spt_lora").items()
    base.get_submodule(path).weight += w["up.weight"] @ w["down.weight"]
    assert_equal(output_of(model, family.inputs(2)), output_of(base, family.inputs(2)))


def test_spt_keeps_its_choice(tmp_path):
    family = FAMILIES["vit"]
    model = get_peft_model(family.model(), SPTConfig(budget=300)).eval()
    with pytest.raises(NotCalibratedError, match="SPT has not yet chosen"):
        output_of(model, family.inputs(2))
    with pytest.raises(NotCalibratedError):
        model.merge_adapter()
    assert model.base_model.model.vit.layers[0].mlp.fc1.merged is False
    calibrate(model, BATCHES, progress=False)
    before = output_of(family.model(), family.inputs(2))
    assert torch.equal(output_of(model, family.inputs(2)), before), "nothing is added at the start"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "spt_" in name:
                parameter.add_(torch.randn_like(parameter))
    expected = output_of(model, family.inputs(2))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["chosen"]
    assert saved == model.peft_config["default"].chosen
    assert torch.equal(
        output_of(PeftModel.from_pretrained(family.model(), tmp_path).eval(), family.inputs(2)), expected
    )
    twin = copy.deepcopy(model)
    calibrate(twin, BATCHES[:1], progress=False)  # chooses anew, from other data
    assert twin.peft_config["default"].chosen != saved
    assert torch.equal(output_of(twin, family.inputs(2)), before)
    assert torch.equal(output_of(model, family.inputs(2)), expected)


def test_spt_of_an_adapter_that_is_not_active():
    model = get_peft_model(FAMILIES["vit"].model(), SPTConfig(budget=300)).eval()
    model.add_adapter("second", SPTConfig(budget=100))
    calibrate(model, BATCHES, progress=False)
    calibrate(model, BATCHES, adapter_name="second", progress=False)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".default." in name), name
    assert not any("undecided" in name for name, _ in model.named_parameters())


def test_spt_reads_sixteen_batches():
    given = []

    class Loader:
        def __iter__(self):
            for _ in range(40):
                given.append(1)
                yield BATCHES[0]

    calibrate(get_peft_model(FAMILIES["vit"].model(), SPTConfig()), Loader(), progress=False)
    assert len(given) == 16


def test_spt_initialisation_and_order_of_dropout():
    torch.manual_seed(0)
    equation = SPTLoRA(torch.nn.Linear(64, 6), 8, dropout=0.5, drop_path=0.0, structured=True)
    assert not equation.up.weight.any()
    assert 0.9 / 8 < equation.down.weight.abs().max() <= 1 / 8  # Kaiming-uniform, a = sqrt 5: 1 / sqrt in
    torch.nn.init.normal_(equation.up.weight)
    seen = []
    equation.down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, y = torch.ones(400, 1, 64), torch.zeros(400, 1, 6)
    equation.train()(y, x)
    assert set(seen[0].unique().tolist()) == {0.0, 2.0}, "dropout acts on the input"
    equation.dropout.p, equation.drop_path = 0.0, 0.5
    plain = equation.eval()(y, x)
    out = equation.train()(y, x)
    dropped = (out == 0).flatten(1).all(dim=1)
    assert_equal(out[~dropped], 2 * plain[~dropped])
    assert 0.4 < dropped.float().mean() < 0.6
    chosen = {f"0.{role}.weight": "lora" for role in ("query", "output")}
    model = get_peft_model(FAMILIES["vit"].model(), SPTConfig(chosen=chosen))
    rates = {name: m.dropout.p for name, m in model.named_modules() if isinstance(m, SPTLoRA) and m.up is not None}
    assert sorted(rates.values()) == [0.0, 0.1]
    assert all(rate == 0.0 for name, rate in rates.items() if "o_proj" in name)


def test_spt_count_on_vit_b16():
    chosen = {"0.query.weight": "lora", "3.fc1.weight": "lora", "3.fc1.bias": 100, "11.fc2.weight": 1000}
    with torch.device("meta"):
        vit = ViTForImageClassification(ViTConfig(num_labels=2))
    model = get_peft_model(vit, SPTConfig(chosen=chosen | {"norms.0.weight": "whole"}, modules_to_save=[]))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == 8 * (768 + 768) + 8 * (768 + 3072) + 100 + 1000 + 768


def test_spt_errors():
    with pytest.raises(ValueError, match="measures sensitivity by a classifier's loss: ViTModel has no head"):
        calibrate(get_peft_model(FAMILIES["vit"].backbone(), SPTConfig()), BATCHES, progress=False)
    total = sum(tensor.numel() for tensor in spt_names(FAMILIES["vit"].model()).values())
    model = get_peft_model(FAMILIES["vit"].model(), SPTConfig(budget=total + 1))
    with pytest.raises(ValueError, match=f"budget is {total + 1}: must be at most the {total} entries"):
        calibrate(model, BATCHES, progress=False)
    model = get_peft_model(FAMILIES["vit"].model(), SPTConfig())
    with pytest.raises(ValueError, match="labels must be from 0 to 2"):
        calibrate(model, [labelled(2, [0, 3])], progress=False)
    silent = FAMILIES["vit"].model()
    torch.nn.init.zeros_(silent.classifier.weight)
    with pytest.raises(ValueError, match="Is the head's weight zero"):
        calibrate(get_peft_model(silent, SPTConfig()), BATCHES, progress=False)
    for fields, message in (
        ({"budget": 0}, "budget is 0: must be an integer of at least 1"),
        ({"alpha": 0.0}, "alpha is 0.0: must be a finite number above 0"),
        ({"beta": math.inf}, "beta is inf"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"chosen": {}}, "chosen is {}: must be None or a dictionary"),
        ({"chosen": [1]}, r"chosen is \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            SPTConfig(**fields)
    for chosen, message in (
        (
            {"3.query.weight": 1},
            "'3.query.weight': must be weights or biases of norms.0, 0.norm1, 0.query, 0.key",
        ),
        ({"0.query.gamma": 1}, "chosen has '0.query.gamma'"),
        ({"0.query.weight": 257}, "chosen has 257 for 0.query.weight: must be 'lora' or an integer from 1 to 256"),
        ({"0.query.weight": 0}, "chosen has 0 for 0.query.weight"),
        ({"0.query.weight": True}, "chosen has True for 0.query.weight"),
        ({"0.query.weight": "whole"}, "chosen has 'whole' for 0.query.weight"),
        ({"0.query.bias": "lora"}, "chosen has 'lora' for 0.query.bias: must be 'whole' or an integer from 1 to 16"),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(FAMILIES["vit"].model(), SPTConfig(r=4, chosen=chosen))
    with pytest.raises(ValueError, match="r is 17: must be an integer from 1 to 16"):
        get_peft_model(FAMILIES["vit"].model(), SPTConfig(r=17))


def test_patches_count_as_one_row_for_each_channel():
    model = get_peft_model(FAMILIES["vit"].model(), GPSConfig(k=1))
    part = model.get_submodule("base_model.model.vit.embeddings.patch_embeddings.projection.gps_entries.default")
    assert part.row_size == 3 * PATCH * PATCH
    assert part.weight.values.shape == (WIDTH,)
    assert dataclasses.asdict(GPSConfig(k=2))["k"] == 2
