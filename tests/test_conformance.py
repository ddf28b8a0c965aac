"""What every registered method must do, on several families. A new method file enters by being registered."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import DEPTH, FAMILIES, WIDTH, call, output_of, video
from packaging.version import Version
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

import hf_visual_peft
from hf_visual_peft.coverage.cell import first_sentence
from hf_visual_peft.coverage.plain import PATCHED
from hf_visual_peft.coverage.report import read_json
from hf_visual_peft.coverage.sizes import small_fields
from hf_visual_peft.sites import (
    BlockAdapters,
    BranchSite,
    KeyValueSite,
    LinearSite,
    LogitSite,
    OutputSite,
    VisualTunerLayer,
    WeightSite,
)


CORE = ("vit", "beit", "dinov2_registers")
OF_TORCH_2_12 = ("colin", "convlora", "davpt", "dyt", "gist")  # the first that compiles them
# one method for each way of acting: tokens, branches, branches on the grid, outputs, weights and shared parts, copies
OF_EACH_KIND = ("vpt", "adaptformer", "convpass", "ssf", "fact", "partial")
# a block has all of them; others, such as tokens, go from one block to the next
WITHIN_A_BLOCK = (BranchSite, KeyValueSite, LinearSite, LogitSite, OutputSite, WeightSite)
NO_GRADIENT = (
    "unipt_piece.default.gate.bias",  # a softmax does not see what all its arguments have in common
    *("router.choice", "router.noise"),  # which the auxiliary loss alone moves
    *(f"layers.2.attention.q_proj.convlora_query.default.{kind}" for kind in ("kernels", "biases")),  # not of CLS
    *(f"layers.2.adapters.dyt_dispatcher.default.linear.{kind}" for kind in ("weight", "bias")),  # not of CLS
)
TWICE = ("dyt",)  # for their losses, all blocks run a second time
LOSS_IN_MODULES = ("convlora",)  # of which checkpointing that re-enters autograd loses the gradient
TOLERANCE = 1e-5  # of the output's scale, in float32
REFUSED = (("sparsetuning", "beit"),)  # on core families: tests/test_sparse_tuning.py has the reason
TAKES_TOKENS_OUT = ("sparsetuning",)  # of the stream, which one adapter can do; tests/test_sparse_tuning.py
REFUSALS = {}  # by parameters: asked once for all tests
MATRIX = read_json(Path(__file__).parents[1] / "docs" / "coverage.json")


def _variants():
    """Each method as its declared counts name it, shrunk to the tiny models, where some are then the same."""
    for method in hf_visual_peft.list_methods().values():
        seen = []
        for fields, _ in method.counts:
            small = small_fields(method.config_cls, fields, WIDTH)
            if small not in seen:
                seen.append(small)
                # with a colon, as `-k` takes no sign of equality
                yield (
                    method,
                    small,
                    "-".join([method.name, *(f"{k}:{v}" for k, v in small.items() if not isinstance(v, list))]),
                )


VARIANTS = list(_variants())


def _pairs(others, one_in=0, turn=0, kinds_on=(), adds_layers=False, once=False):
    """Every variant of every method on ViT, and its first variant on some of the other families.

    Args:
        others: families that methods take turns on: each method on one in so many, each family with as many methods.
        one_in: how many; 0: none of them.
        turn: who begins. With as many tests as turns, every method meets every family.
        kinds_on: families on which one method of each kind runs.
        adds_layers: without methods that choose no blocks.
        once: whether to take the first variant only on ViT, too.
    """
    first = {method.name: fields for method, fields, _ in reversed(VARIANTS)}
    numbers = {name: number for number, name in enumerate(first)}
    vit = FAMILIES["vit"]

    def chosen(method):
        number = numbers[method.name] + turn
        kinds = [family for family in kinds_on if method.name in OF_EACH_KIND]
        turns = [family for place, family in enumerate(others) if one_in and (number + place) % one_in == 0]
        return {family.name: family for family in (*turns, *kinds)}.values()

    return [
        pytest.param(method, fields, video(family, method) if method.video else family, id=f"{name}-{family.name}")
        for method, fields, name in VARIANTS
        if not (adds_layers and not method.chooses_blocks) and not (once and fields != first[method.name])
        for family in (vit, *(chosen(method) if fields == first[method.name] else ()))
    ]


def on(others, **turns):
    return pytest.mark.parametrize(("method", "fields", "family"), _pairs(others, **turns))


every_method = pytest.mark.parametrize(
    ("method", "fields"), [pytest.param(method, fields, id=name) for method, fields, name in VARIANTS]
)
core = [FAMILIES[name] for name in CORE[1:]]
beside = [family for name, family in FAMILIES.items() if name != "vit"]
on_core_families = on(core, one_in=2)
with_layers_on_core_families = on(core, one_in=2, adds_layers=True)
each_method_and_each_kind_on_core_families = on(core, kinds_on=core, once=True)
each_kind_on_all_families = on(core, one_in=2, kinds_on=beside)


def random_config(method, fields):
    """A config whose adapter starts with random weights."""
    return method.config_cls(**fields, init_weights=False)


@pytest.fixture(autouse=True)
def _refused(request):
    """Skip what the library refuses, but on the core families and where the coverage matrix says that it works.

    Backbones without a head are not those of the matrix, where they have one.
    """
    chosen = getattr(request.node, "callspec", None) and request.node.callspec.params
    family, method = (chosen or {}).get("family"), (chosen or {}).get("method")
    if family is None or (family.name in CORE and (method.name, family.name) not in REFUSED):
        return
    cell = MATRIX.get(family.row, {}).get(method.name)
    if family.classifier is None or cell is None or cell.status != "works":
        name = request.node.callspec.id
        if name not in REFUSALS:
            REFUSALS[name] = refusal_of(method, chosen["fields"], family)
        if REFUSALS[name]:
            pytest.skip(REFUSALS[name])


def refusal_of(method, fields, family):
    """Why a method is refused on a family; empty if it is not."""
    try:
        fresh(method, fields, family)
    except ValueError as refusal:
        return first_sentence(str(refusal))
    return ""


def adapted(method, fields, family, base=None, **kwargs):
    """A model with random weights everywhere, also in the adapter."""
    torch.manual_seed(2)
    model = get_peft_model(base or family.model(), random_config(method, fields), **kwargs)
    return model.eval()


def fresh(method, fields, family, base=None, **kwargs):
    """A model with an adapter as the method starts it, which has chosen what it trains."""
    model = get_peft_model(base or family.model(), method.config_cls(**fields), **kwargs)
    if method.calibrated:
        dtype = next(model.parameters()).dtype
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in family.inputs(4).items()}
        hf_visual_peft.calibrate(model, [inputs | {"labels": torch.tensor([0, 1, 0, 1])}], progress=False)
    return model


def sites_of(model):
    layers = (module for module in model.modules() if isinstance(module, VisualTunerLayer))
    return [site for layer in layers for plan in layer.plans.values() for _, site, *_ in plan]


@torch.no_grad()
def run(model, family, batch=2):
    return output_of(model, family.inputs(batch), family.before_norms)


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE * b.abs().max().item())


@pytest.mark.parametrize(
    ("method", "fields", "count"),
    [(m, f, c) for m in hf_visual_peft.list_methods().values() for f, c in m.counts],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_count_on_vit_b16(method, fields, count):
    with torch.device("meta"):
        vit = ViTForImageClassification(ViTConfig(num_labels=7))
    model = get_peft_model(vit, method.config_cls(**fields))
    names = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(n for name, n in names.items() if "classifier" not in name) == count + 7 * method.head_inputs
    assert sum(n for name, n in names.items() if "classifier" in name) == 7 * 769


@on(beside, one_in=3, turn=0)
def test_changes_output_disables_and_unloads(method, fields, family):
    base = family.model()
    before = run(base, family)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    modules = dict(base.named_modules())
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()}
    model = adapted(method, fields, family, base)
    after = run(model, family)
    assert after.isfinite().all()
    assert not torch.allclose(before, after)
    with model.disable_adapter():
        assert torch.equal(run(model, family), before)
    assert torch.equal(run(model, family), after)

    unloaded = model.unload()
    assert unloaded is base
    assert {name: id(m) for name, m in unloaded.named_modules()} == {name: id(m) for name, m in modules.items()}
    assert hooks == {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in unloaded.named_modules()}
    assert not any("forward" in vars(m) for m in unloaded.modules())
    assert weights.keys() == unloaded.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in unloaded.state_dict().items())
    assert torch.equal(run(unloaded, family), before)


@each_kind_on_all_families
def test_identity_at_start(method, fields, family):
    base = family.model()
    before = run(base, family)
    model = fresh(method, fields, family, base).eval()
    after = run(model, family)
    rounds = any(isinstance(site, LogitSite) for site in sites_of(model))  # attention in the plain way
    if rounds and method.identity_at_start:
        assert_close(after, before)
    else:
        assert torch.equal(after, before) == method.identity_at_start


@on(beside, one_in=3, turn=1)
def test_gradients(method, fields, family):
    model = adapted(method, fields, family).train()
    output_of(model, family.inputs(2)).square().sum().backward()
    heads = model.peft_config["default"].modules_to_save or []
    assert bool(heads) == (family.classifier is not None and not method.config_cls.copied_head)
    for name, parameter in model.named_parameters():
        belongs = f".{method.name}_" in name or ".modules_to_save.default." in name
        assert parameter.requires_grad == belongs, name
        if not name.endswith(NO_GRADIENT):
            assert (parameter.grad is not None and parameter.grad.any().item()) == belongs, name


@on(beside, one_in=3, turn=2)
def test_hidden_states_have_the_backbones_tokens(method, fields, family):
    if method.name in TAKES_TOKENS_OUT:
        pytest.skip("it takes tokens out of the stream")
    base = family.model()
    inputs = family.inputs(2)
    with torch.no_grad():
        expected = [h.shape for h in call(base, inputs, output_hidden_states=True).hidden_states]
        model = adapted(method, fields, family, base)
        out = model(**inputs, output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == expected
    assert len(expected) == DEPTH + 1
    assert expected[0][1] == family.prefix + family.patches
    assert_close(output_of(model, inputs), run(model, family))  # with gradients other kernels may run


@pytest.fixture(scope="module")
def loaded_bases(tmp_path_factory):
    """By name of a family: copies of its model as it comes from a folder, which is written and read once."""

    @functools.cache
    def loaded(name):
        folder = tmp_path_factory.mktemp("bases") / name
        FAMILIES[name].model().save_pretrained(folder)
        return AutoModelForImageClassification.from_pretrained(folder)

    return lambda family: copy.deepcopy(loaded(family.name))


@on_core_families
def test_save_and_load(method, fields, family, tmp_path, loaded_bases):
    model = adapted(method, fields, family, loaded_bases(family))
    expected = run(model, family)
    model.save_pretrained(tmp_path / "adapter")
    written = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert written == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert "import hf_visual_peft" in (tmp_path / "adapter" / "README.md").read_text()

    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    state = model.state_dict()
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name in state}
    chosen = {name for name, _ in model.named_buffers() if f".{method.name}_" in name and name in state}
    assert len(weights) == len(trained | chosen)
    assert sum(value.numel() for value in weights.values()) == sum(state[name].numel() for name in trained | chosen)
    assert not any("default" in name or "base_layer" in name for name in weights)
    assert weights.keys() == get_peft_model_state_dict(model).keys()

    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert type(config) is method.config_cls
    assert config.peft_type == method.name.upper()

    for kwargs in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}, {"adapter_name": "other"}):
        loaded = PeftModel.from_pretrained(loaded_bases(family), tmp_path / "adapter", **kwargs).eval()
        assert torch.equal(run(loaded, family), expected), kwargs
        assert not any(p.is_meta for p in loaded.parameters())
    # weights read from files are the same to the bit; see test_transformers_own_adapter_methods on their outputs
    automatic = AutoPeftModel.from_pretrained(str(tmp_path / "adapter")).eval()
    assert automatic.state_dict().keys() == state.keys()
    assert all(torch.equal(state[name], value) for name, value in automatic.state_dict().items())
    assert_close(run(automatic, family), expected)
    whole = AutoModelForImageClassification.from_pretrained(str(tmp_path / "adapter")).eval()
    assert_close(run(whole, family), expected)


@each_kind_on_all_families
def test_transformers_own_adapter_methods(method, fields, family, tmp_path):
    if method.whole_modules and family.name.startswith("dinov3"):
        pytest.skip("transformers 5.23 renames `layer_scale1` of DINOv3's blocks while it loads an adapter")
    model = adapted(method, fields, family)
    expected = run(model, family)
    model.save_pretrained(tmp_path)

    native = family.model()
    before = run(native, family)
    native.load_adapter(str(tmp_path), adapter_name="loaded")
    # weights are the same to the bit; outputs need not be, as matrix products depend on how memory is aligned
    saved = {name.removeprefix("base_model.model."): value for name, value in get_peft_model_state_dict(model).items()}
    loaded = native.get_adapter_state_dict("loaded")
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], value) for name, value in loaded.items())
    assert_close(run(native, family), expected)
    native.disable_adapters()
    assert torch.equal(run(native, family), before)
    native.enable_adapters()
    assert_close(run(native, family), expected)

    native = family.model()
    native.add_adapter(random_config(method, fields), adapter_name="first")
    native.eval()
    first = run(native, family)
    assert not torch.equal(first, before)
    native.add_adapter(random_config(method, fields), adapter_name="second")
    native.eval()
    assert not torch.equal(run(native, family), first)
    native.set_adapter("first")
    assert torch.equal(run(native, family), first)
    native.delete_adapter("second")
    assert torch.equal(run(native, family), first)
    state = native.get_adapter_state_dict("first")
    assert state
    assert not any("first" in name for name in state)


@on_core_families
def test_several_adapters(method, fields, family, tmp_path):
    model = adapted(method, fields, family)
    first = run(model, family)
    model.add_adapter("second", random_config(method, fields))
    assert torch.equal(run(model, family), first)
    model.set_adapter("second")
    second = run(model.eval(), family)
    assert not torch.allclose(first, second)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert not (tmp_path / "adapter_config.json").exists()
    assert "import hf_visual_peft" in (tmp_path / "second" / "README.md").read_text()
    model.load_adapter(tmp_path / "second", adapter_name="third")
    model.set_adapter("third")
    assert torch.equal(run(model.eval(), family), second)
    model.set_adapter("default")
    assert torch.equal(run(model, family), first)
    model.delete_adapter("second")
    assert set(model.peft_config) == {"default", "third"}
    assert torch.equal(run(model, family), first)


@with_layers_on_core_families
def test_two_adapters_at_once(method, fields, family):
    if method.name in TAKES_TOKENS_OUT:
        pytest.skip("one adapter at a time takes tokens out of the stream")
    model = adapted(method, {**fields, "modules_to_save": []}, family)
    first = run(model, family)
    model.add_adapter("second", random_config(method, {**fields, "modules_to_save": []}))
    model.set_adapter("second")
    second = run(model.eval(), family)
    model.base_model.set_adapter(["default", "second"])
    both = run(model.eval(), family)
    assert not torch.allclose(both, first)
    assert not torch.allclose(both, second)
    model.train()
    output_of(model, family.inputs(2)).square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if f".{method.name}_" in name)


@on_core_families
@pytest.mark.filterwarnings("ignore:.*gets a bias by merging")
def test_merging(method, fields, family):
    model = adapted(method, fields, family)
    expected = run(model, family)
    if not method.mergeable:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="cannot be merged"):
                merge()
        assert torch.equal(run(model, family), expected)
        return
    if method.category == "pixel" and family.name == "beit":  # whose tokens get no position embeddings
        with pytest.raises(ValueError, match="adds no position embeddings"):
            model.merge_adapter(safe_merge=True)
        assert torch.equal(run(model, family), expected)
        return
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter(safe_merge=True)
    assert_close(run(model, family), expected)
    model.unmerge_adapter()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert torch.equal(run(model, family), expected)

    model = adapted(method, {**fields, "modules_to_save": []}, family)
    if method.whole_modules:
        both = run(model, family)
    else:
        model.add_adapter("second", random_config(method, {**fields, "modules_to_save": []}))
        model.base_model.set_adapter(["default", "second"])
        both = run(model.eval(), family)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert_close(run(merged, family), both)
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert not any(type(module).__module__.startswith("hf_visual_peft") for module in merged.modules())

    broken = copy.deepcopy(model)
    state = ((name, value) for name, value in broken.state_dict().items() if f".{method.name}_" in name)
    next(value for name, value in state if value.is_floating_point()).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        broken.merge_adapter(safe_merge=True)


@each_kind_on_all_families
def test_gradient_checkpointing_gives_the_same_gradients(method, fields, family):
    model = adapted(method, fields, family).train()
    inputs, others = family.inputs(2), family.inputs(3)

    def gradients():
        model.zero_grad()
        torch.manual_seed(5)
        loss = output_of(model, inputs).square().sum()
        loss = loss + output_of(model, others).square().sum()  # both passes wait for their backward
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    base = model.get_base_model()
    bypassed = sum(isinstance(module, BlockAdapters) and module.bypassed for module in model.modules())
    for reentrant in (False, True):
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:  # checkpoints then pass gradients on only if their input has some
            patches = base.get_submodule(hf_visual_peft.find_backbone(base).patch_embedding[0])
            patches.register_forward_hook(lambda module, args, output: output.requires_grad_())
        calls = []
        for block in base.modules():
            function = vars(block).get("_gradient_checkpointing_func")
            if function is not None and not isinstance(block, BaseTunerLayer):
                block._gradient_checkpointing_func = lambda *a, f=function, calls=calls: calls.append(1) or f(*a)
        if reentrant and method.name in LOSS_IN_MODULES:
            with pytest.raises(ValueError, match="re-enters autograd"):
                gradients()
            break
        again = gradients()
        passes = 2 * (2 if method.name in TWICE else 1)
        assert len(calls) == passes * (DEPTH - bypassed)  # what a bypassed block computes is not kept anyway
        assert plain.keys() <= again.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


@on(core, kinds_on=core, once=True)
@pytest.mark.slow
def test_compile_fullgraph(method, fields, family, monkeypatch):
    """No method breaks the graph; those of each kind go through autograd's tracing too, as they train and answer."""
    if Version(torch.__version__) < Version("2.12") and method.name in OF_TORCH_2_12:
        pytest.skip(
            f"torch.compile of torch {torch.__version__} fails where a block leaves a loss or takes a function"
        )
    monkeypatch.setitem(PATCHED, "num_hidden_layers", 2)  # compilers are slow, and look at every block anew
    model = adapted(method, fields, family)
    whole = method.name in OF_EACH_KIND and family.name == "vit"
    if method.name not in OF_EACH_KIND and all(isinstance(site, WITHIN_A_BLOCK) for site in sites_of(model)):
        monkeypatch.setitem(PATCHED, "num_hidden_layers", 1)
        model = adapted(method, fields, family)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if whole else "eager")
    if whole:
        assert_close(run(compiled, family), run(model, family))
    model.train()
    outputs = []
    for each in (model, compiled):
        torch.manual_seed(0)
        outputs.append(output_of(each, family.inputs(2)))
    assert_close(*outputs)
    outputs[1].sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@on_core_families
def test_half_precision(method, fields, family):
    def own_dtypes(model):
        return {p.dtype for name, p in model.named_parameters() if f".{method.name}_" in name}

    model = adapted(method, fields, family)
    expected = run(model, family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(run(model, family).float(), expected, rtol=0.1, atol=0.1 * expected.abs().max())
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output_of(model, family.inputs(2)).float().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    torch.manual_seed(2)
    half = family.model().to(torch.bfloat16)
    half = adapted(method, fields, family, half)
    assert own_dtypes(half) == {torch.float32}
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in family.inputs(2).items()}
    assert output_of(half, inputs).isfinite().all()
    base = family.model().to(torch.bfloat16)
    half = fresh(method, fields, family, base, autocast_adapter_dtype=False)
    assert own_dtypes(half) == {torch.bfloat16}
    assert output_of(half, inputs).dtype == torch.bfloat16


@on_core_families
def test_copies(method, fields, family):
    model = adapted(method, fields, family)
    expected = run(model, family)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(duplicate, family), expected)
        assert not {p.data_ptr() for p in duplicate.parameters()} & {p.data_ptr() for p in model.parameters()}
        with torch.no_grad():
            for parameter in duplicate.parameters():
                parameter.zero_()
        assert torch.equal(run(model, family), expected)


@with_layers_on_core_families
def test_layers_to_transform_and_exclude_modules(method, fields, family):
    if method.name == "gist":
        pytest.skip("its token passes through all blocks up to the head: tests/test_gist.py has what it takes")

    def touched(**selection):
        model = adapted(method, {**fields, **selection}, family)
        assert run(model, family).isfinite().all()
        return {name for name, p in model.named_parameters() if f".{method.name}_" in name}

    def outside(names, *blocks):
        return all(not name.startswith(f"base_model.model.{block.path}.") for name in names for block in blocks)

    first, second, third = hf_visual_peft.find_backbone(family.model()).blocks
    everything = touched()
    assert not outside(everything, first) or not outside(everything, third)  # some methods stand at the end only
    only = touched(layers_to_transform=1)
    assert only
    assert all(name.startswith(f"base_model.model.{second.path}.") for name in only)
    assert touched(layers_to_transform=[1]) == only
    excluded = touched(exclude_modules=[first.path, third.path])
    assert only <= excluded
    assert outside(excluded, first, third)
    assert touched(exclude_modules=rf"{first.path}|{third.path}") == excluded


@with_layers_on_core_families
def test_modules_to_save(method, fields, family):
    def trained(value):
        model = adapted(method, {**fields, "modules_to_save": value}, family)
        return {n for n, p in model.named_parameters() if p.requires_grad and f".{method.name}_" not in n}

    assert len(trained(None)) == 2
    assert trained([]) == set()
    if method.head_inputs:  # it has nothing to do without a head
        return
    bare = get_peft_model(family.backbone(), method.config_cls(**fields))
    assert not bare.peft_config["default"].modules_to_save


@each_method_and_each_kind_on_core_families
def test_trainer_and_pipeline(method, fields, family, tmp_path):
    torch.manual_seed(2)
    model = fresh(method, fields, family)
    before = get_peft_model_state_dict(model)
    before = {name: value.clone() for name, value in before.items()}
    samples = [{"pixel_values": family.inputs(1)["pixel_values"][0], "labels": i % 3} for i in range(4)]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, learning_rate=0.1, use_cpu=True, disable_tqdm=True,
        save_strategy="steps" if method.name in OF_EACH_KIND else "no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=samples)
    trainer.train()
    trainer.save_model(tmp_path / "trained")
    after = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in after if f".{method.name}_" in name)

    native = family.model()
    native.load_adapter(str(tmp_path / "trained"))
    if method.name not in OF_EACH_KIND:
        return
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    classify = pipeline("image-classification", model=native, image_processor=processor, device="cpu")
    from PIL import Image

    (result,) = classify([Image.new("RGB", (40, 30), (200, 10, 10))])
    assert sum(entry["score"] for entry in result) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.slow
def test_process_without_the_plugin_fails(tmp_path):
    method = hf_visual_peft.get_method("vpt")
    family = FAMILIES["vit"]
    adapted(method, {}, family).save_pretrained(tmp_path)
    code = f"""
from peft import PeftConfig
try:
    PeftConfig.from_pretrained({str(tmp_path)!r})
except KeyError as error:
    assert "VPT" in str(error), error
    import hf_visual_peft
    PeftConfig.from_pretrained({str(tmp_path)!r})
    print("done")
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "done\n"


@every_method
def test_config_survives_json(method, fields, tmp_path):
    layers = {"layers_to_transform": [0, 2]} if method.chooses_blocks else {}
    config = method.config_cls(**fields, **layers, modules_to_save=["classifier"])
    config.save_pretrained(tmp_path)
    assert method.config_cls.from_pretrained(tmp_path) == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == method.name.upper()
