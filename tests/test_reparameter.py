"""RepAdapter, ARC, and the methods that update weights, against their equations in plain torch.

Updates of weights are written here as matrices, and so evaluated otherwise than in the library, which adds branches.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from equations import adapted, assert_equal, both, weights_by_path
from families import DEPTH, FAMILIES, WIDTH
from peft import get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import hf_visual_peft
from hf_visual_peft import ARCConfig, EFFTConfig, FacTConfig, KAdaptationConfig, RepAdapterConfig, SharedLoRAConfig
from hf_visual_peft.methods.adapter.arc import ARC, Basis
from hf_visual_peft.methods.reparameter.efft import EFFT
from hf_visual_peft.methods.reparameter.efft import Factors as EFFTFactors
from hf_visual_peft.methods.reparameter.fact import FacT
from hf_visual_peft.methods.reparameter.fact import Factors as FacTFactors
from hf_visual_peft.methods.reparameter.kadaptation import KAdaptation, Rules
from hf_visual_peft.methods.reparameter.rep_adapter import RepAdapter
from hf_visual_peft.methods.reparameter.rows import Rows
from hf_visual_peft.methods.reparameter.shared_lora import SharedLoRA


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")


def at(found, index, name):
    """Weights of one linear of one block."""
    (weights,) = (w for key, w in found.items() if f".{index}." in key and key.endswith(name))
    return weights


def only(found):
    (weights,) = found.values()
    return weights


def forward(blocks, x, norm, before=None):
    """The plain transformer, with a map on the output of each norm."""
    for index, block in enumerate(blocks):
        for which, sublayer in ((1, block.attention), (2, block.mlp)):
            n = block.norm(which, x)
            x = x + sublayer(before(n, index, which) if before else n)
    return norm(x)


def with_updates(blocks, update):
    """The blocks with `update(index, name)`, a matrix and a shift, added to each linear."""
    new = []
    for index, block in enumerate(blocks):
        pairs = [*block.qkv, block.out, block.fc1, block.fc2]
        changed = []
        for name, (weight, bias) in zip(LINEARS, pairs, strict=True):
            matrix, shift = update(index, name)
            changed.append((weight + matrix, bias + shift))
        q, k, v, out, fc1, fc2 = changed
        new.append(dataclasses.replace(block, qkv=[q, k, v], out=out, fc1=fc1, fc2=fc2))
    return new


def assert_adapted_and_merged(model, family, actual, expected):
    assert_equal(actual, expected)
    merged = model.train().merge_and_unload(safe_merge=True).eval()  # no dropout in what is merged
    backbone = getattr(merged, merged.base_model_prefix)
    assert_equal(backbone(**family.inputs(2)).last_hidden_state, expected)


@both
@pytest.mark.parametrize("sublayers", [("attention", "mlp"), ("attention",), ("mlp",)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
@torch.no_grad()
def test_rep_adapter(name, sublayers, groups):
    config = RepAdapterConfig(r=8, groups=groups, scale=0.7, sublayers=sublayers, init_weights=False)
    (blocks, x, norm), model, actual, family = adapted(name, config)
    found = {which: weights_by_path(model, f"repadapter_{s}") for which, s in ((1, "attention"), (2, "mlp"))}
    assert [len(found[1]), len(found[2])] == [DEPTH * (s in sublayers) for s in ("attention", "mlp")]

    def before(n, index, which):
        if not found[which]:
            return n
        (w,) = (w for key, w in found[which].items() if f".{index}." in key)
        hidden = n @ w["down.weight"].T + w["down.bias"]
        kernel = w["up"].reshape(WIDTH, 8 // groups, 1)  # a grouped convolution of kernel 1
        return n + 0.7 * F.conv1d(hidden.transpose(1, 2), kernel, w["bias"], groups=groups).transpose(1, 2)

    assert_adapted_and_merged(model, family, actual, forward(blocks, x, norm, before))


@both
@pytest.mark.parametrize("sublayers", [("attention", "mlp"), ("attention",), ("mlp",)], ids=str)
@torch.no_grad()
def test_arc(name, sublayers):
    (blocks, x, norm), model, actual, family = adapted(name, ARCConfig(r=6, sublayers=sublayers, init_weights=False))
    bases = {s: weights_by_path(model, f"arc_{s}") for s in ("attention", "mlp")}
    assert [len(bases[s]) for s in bases] == [int(s in sublayers) for s in bases]
    scalings = weights_by_path(model, "arc_scaling")
    assert len(scalings) == DEPTH * len(sublayers)

    def before(n, index, which):
        sublayer = ("attention", "mlp")[which - 1]
        if sublayer not in sublayers:
            return n
        norms = ("norm1", "layernorm_before") if which == 1 else ("norm2", "layernorm_after")
        w, p = at(scalings, index, norms), only(bases[sublayer])["weight"]
        return n + n @ (p @ torch.diag(w["scale"]) @ p.T) + w["shift"]

    assert_adapted_and_merged(model, family, actual, forward(blocks, x, norm, before))


@both
@pytest.mark.parametrize("variant", ["tt", "tk"])
@torch.no_grad()
def test_fact(name, variant):
    config = FacTConfig(variant=variant, r=4, scale=0.6, init_weights=False)
    (blocks, x, norm), model, actual, family = adapted(name, config)
    shared, own = only(weights_by_path(model, "fact_factors")), weights_by_path(model, "fact_slices")
    u, v = shared["u.weight"], shared["v.weight"]
    assert len(own) == 6 * DEPTH

    def update(index, linear):
        w = at(own, index, linear)
        if variant == "tt":
            s = w["s.weight"]
            inner = list(s.split(4, dim=1 if linear == "fc2" else 0))
        else:
            inner = []
            for k in range(w["p"].shape[1]):
                mixed = sum(shared["core"][:, :, t] * w["p"][t, k] for t in range(4))
                inner.append(mixed if linear == "fc2" else mixed.T)
        ratio = len(blocks[0].fc1[0]) // WIDTH
        assert ratio > 1
        assert len(inner) == (ratio if linear in ("fc1", "fc2") else 1)
        return 0.6 * torch.cat([v @ s @ u for s in inner], dim=1 if linear == "fc2" else 0), 0.0

    assert_adapted_and_merged(model, family, actual, forward(with_updates(blocks, update), x, norm))


@both
@torch.no_grad()
def test_shared_lora(name):
    (blocks, x, norm), model, actual, family = adapted(name, SharedLoRAConfig(r=4, scale=0.6, init_weights=False))
    ups = weights_by_path(model, "sharedlora_up")
    downs = [only(weights_by_path(model, f"sharedlora_down{index}")) for index in range(DEPTH)]
    assert len(ups) == 3 * DEPTH

    def update(index, linear):
        if linear not in ("q_proj", "k_proj", "v_proj"):
            return 0.0, 0.0
        return 0.6 * at(ups, index, linear)["up.weight"] @ downs[index]["weight"], 0.0

    assert_adapted_and_merged(model, family, actual, forward(with_updates(blocks, update), x, norm))


@both
@torch.no_grad()
def test_efft(name):
    (blocks, x, norm), model, actual, family = adapted(name, EFFTConfig(r=4, scale=0.6, init_weights=False))
    attention, mlp = (only(weights_by_path(model, f"efft_{s}")) for s in ("attention", "mlp"))

    def update(_, linear):  # the same in every block
        factors, k = (attention, LINEARS.index(linear)) if linear.endswith("proj") else (mlp, int(linear == "fc2"))
        into_out = factors["u"] @ factors["core"][:, :, k] @ factors["v"]
        return 0.6 * (into_out if linear == "fc2" else into_out.T), 0.0

    assert_adapted_and_merged(model, family, actual, forward(with_updates(blocks, update), x, norm))


def kronecker(rules, role, w):
    """The sum of Kronecker products, (in, out)."""
    terms = []
    for i in range(len(w["left"])):
        rule = torch.outer(rules[f"{role}_left"][i], rules[f"{role}_right"][i])
        terms.append(torch.kron(rule, torch.outer(w["left"][i], w["right"][i])))
    return sum(terms)


@both
@torch.no_grad()
def test_kadaptation(name):
    (blocks, x, norm), model, actual, family = adapted(name, KAdaptationConfig(n=4, scale=30.0, init_weights=False))
    rules = only(weights_by_path(model, "kadaptation_rules"))
    own = {role: weights_by_path(model, f"kadaptation_{role}") for role in ("query", "value")}

    def update(index, linear):
        role = {"q_proj": "query", "v_proj": "value"}.get(linear)
        if role is None:
            return 0.0, 0.0
        return 30.0 * kronecker(rules, role, at(own[role], index, linear)).T, rules[f"bias.{index}"]

    plain = forward(blocks, x, norm)
    expected = forward(with_updates(blocks, update), x, norm)
    without_biases = forward(with_updates(blocks, lambda *at: (update(*at)[0], 0.0)), x, norm)
    assert (without_biases - plain).abs().max() > 1e-3 * plain.abs().max()  # the products are not rounding error
    assert_adapted_and_merged(model, family, actual, expected)


@pytest.mark.parametrize("columns", [None, 11])
@torch.no_grad()
def test_fact_cuts_the_last_slice(columns):
    """A linear of 3 to 5 slices' size acts as a wider one does whose last inputs are zero and last outputs unread."""
    factors = FacTFactors(4, 3, core=columns is not None)
    for parameter in factors.parameters():
        nn.init.normal_(parameter)
    for into, out in ((10, 4), (4, 10), (10, 18)):
        wide = (-(-into // 4) * 4, -(-out // 4) * 4)
        cut = FacT(nn.Linear(into, out), 4, 3, 0.5, 0.0, columns)
        whole = FacT(nn.Linear(*wide), 4, 3, 0.5, 0.0, columns)
        whole.load_state_dict(cut.state_dict())
        x = torch.randn(2, 5, into)
        expected = whole(torch.zeros(2, 5, wide[1]), F.pad(x, (0, wide[0] - into)), factors)[..., :out]
        assert expected[..., -1].any()
        assert_equal(cut(torch.zeros(2, 5, out), x, factors), expected)
        weight, bias = cut.fold(torch.zeros(out, into), None, factors)
        assert bias is None
        assert_equal(x @ weight.T, expected)


@torch.no_grad()
def test_efft_in_a_gated_mlp():
    """Each of the matrices that lead into the MLP has its own core, also where they are one linear."""
    family = FAMILIES["dinov2_swiglu"]
    model = get_peft_model(family.model(), EFFTConfig(r=4, init_weights=False))
    factors = only(weights_by_path(model, "efft_mlp"))
    base = family.model().dinov2.encoder.layer[2].mlp
    (hidden,) = {m.in_features for m in base.modules() if isinstance(m, nn.Linear) and m.out_features == WIDTH}
    assert factors["core"].shape == (4, 4, 3)
    assert factors["v"].shape == (4, hidden)
    merged = model.merge_and_unload().dinov2.encoder.layer[2].mlp
    before, after = (
        {n: m.weight for n, m in mlp.named_modules() if isinstance(m, nn.Linear)} for mlp in (base, merged)
    )
    expected = [(factors["u"] @ factors["core"][..., k] @ factors["v"]) for k in range(3)]
    into = torch.cat([after[n] - w for n, w in before.items() if w.shape[0] != WIDTH])
    torch.testing.assert_close(into, torch.cat(expected[:2], dim=1).T, rtol=0, atol=1e-6)
    (out,) = (after[n] - w for n, w in before.items() if w.shape[0] == WIDTH)
    torch.testing.assert_close(out, expected[2], rtol=0, atol=1e-6)


def assert_uniform(values, bound):
    values = torch.cat([v.flatten() for v in values]) if isinstance(values, list) else values
    assert 0.85 * bound < values.abs().max() <= bound
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)


def fresh(config):
    torch.manual_seed(0)
    return get_peft_model(FAMILIES["vit"].model(), config)


def test_initialisation_before_sublayers():
    for w in weights_by_path(fresh(RepAdapterConfig()), "repadapter_mlp").values():
        assert_uniform(w["down.weight"], math.sqrt(6 / (WIDTH + 8)))
        assert not any(w[zero].any() for zero in ("down.bias", "up", "bias"))
    model = fresh(ARCConfig(r=12))
    for slot in ("arc_attention", "arc_mlp"):
        assert_uniform(only(weights_by_path(model, slot))["weight"], math.sqrt(6 / (WIDTH + 12)))
    scalings = weights_by_path(model, "arc_scaling")
    assert not any(w["shift"].any() for w in scalings.values())
    assert not any(w["scale"].any() for key, w in scalings.items() if "before" in key)
    assert_uniform([w["scale"] for key, w in scalings.items() if "after" in key], math.sqrt(6 / (1 + 12)))


def test_arc_before_attention_alone():
    """P takes 768 x 50; c and b 50 + 768 in each of 12 blocks: 38,400 + 9,816. And nothing moves it off the start."""
    config = ARCConfig(sublayers="attention")
    with torch.device("meta"):
        model = get_peft_model(ViTForImageClassification(ViTConfig()), config)
    assert sum(p.numel() for n, p in model.named_parameters() if ".arc_" in n) == 48_216
    base, inputs = FAMILIES["vit"].model(), FAMILIES["vit"].inputs(2)
    model = fresh(ARCConfig(r=8, sublayers="attention")).eval()
    assert torch.equal(model(**inputs).logits, base(**inputs).logits)


def test_initialisation_of_fact():
    model = fresh(FacTConfig(r=8))
    shared, own = only(weights_by_path(model, "fact_factors")), weights_by_path(model, "fact_slices")
    assert set(shared) == {"u.weight", "v.weight"}
    assert_uniform(shared["u.weight"], WIDTH**-0.5)
    assert not shared["v.weight"].any()
    assert_uniform([w["s.weight"] for key, w in own.items() if not key.endswith("fc2")], 8**-0.5)
    assert_uniform([w["s.weight"] for key, w in own.items() if key.endswith("fc2")], 16**-0.5)
    for layers, columns in ((None, 8 * DEPTH), ([1], 8)):
        model = fresh(FacTConfig(variant="tk", r=8, layers_to_transform=layers))
        shared, own = only(weights_by_path(model, "fact_factors")), weights_by_path(model, "fact_slices")
        assert_uniform(shared["core"], math.sqrt(6 / (8 * 8 + 8 * 8)))
        assert not shared["v.weight"].any()
        p = [w["p"] for w in own.values()]
        assert sum(w.shape[1] for w in p) == columns
        assert_uniform(p, math.sqrt(6 / (8 + columns)))


def test_initialisation_of_shared_lora():
    model = fresh(SharedLoRAConfig())
    for index in range(DEPTH):
        assert_uniform(only(weights_by_path(model, f"sharedlora_down{index}"))["weight"], WIDTH**-0.5)
    assert not any(w["up.weight"].any() for w in weights_by_path(model, "sharedlora_up").values())


@pytest.mark.parametrize("zero", ["vv", "vu", "uv", "uu"])
def test_initialisation_of_efft(zero):
    model = fresh(EFFTConfig(r=8, zero_factors=zero))
    for slot, none, hidden, matrices in (("attention", zero[0], WIDTH, 4), ("mlp", zero[1], 2 * WIDTH, 2)):
        w = only(weights_by_path(model, f"efft_{slot}"))
        assert w["u"].shape == (WIDTH, 8)
        assert w["v"].shape == (8, hidden)
        assert not w[none].any()
        random = {"u": "v", "v": "u"}[none]
        assert_uniform(w[random], math.sqrt(6 / (8 + (WIDTH if random == "u" else hidden))))
        assert_uniform(w["core"], math.sqrt(6 / (8 * matrices + 8 * matrices)))
    assert EFFTConfig().zero_factors == "vv"
    inputs = FAMILIES["vit"].inputs(2)
    assert torch.equal(model.eval()(**inputs).logits, FAMILIES["vit"].model()(**inputs).logits)


def test_initialisation_of_kadaptation():
    """On ViT-B 12 x 2 x 32 x (24 + 24) local factors, 2 x 2 x 32 x 32 of rules and 12 x 768 biases: 50,176."""
    assert 12 * 2 * 32 * (24 + 24) + 2 * 2 * 32 * 32 + 12 * 768 == 50_176
    assert dict(hf_visual_peft.get_method("kadaptation").counts[0][0]) == {"n": 32}
    model = fresh(KAdaptationConfig(n=4))
    rules = only(weights_by_path(model, "kadaptation_rules"))
    assert_uniform([w for key, w in rules.items() if not key.startswith("bias")], 0.01)
    assert not any(rules[f"bias.{index}"].any() for index in range(DEPTH))
    for role in ("query", "value"):
        own = weights_by_path(model, f"kadaptation_{role}").values()
        assert not any(w["right"].any() for w in own)
        assert_uniform([w["left"] for w in own], math.sqrt(2) * math.sqrt(6 / (WIDTH // 4 + 1)))


@torch.no_grad()
def test_where_dropout_acts():
    """The same random numbers, drawn at the place that the paper or the authors' code has."""
    x, y, p = torch.randn(2, 5, 8), torch.randn(2, 5, 8), 0.5

    def drop(t):
        return F.dropout(t, p)

    def assert_drops(equation, args, expected):
        for module in (equation, *(a for a in args if isinstance(a, nn.Module))):
            for parameter in module.parameters():
                nn.init.normal_(parameter)
        torch.manual_seed(7)
        actual = equation.train()(*args)
        torch.manual_seed(7)
        assert_equal(actual, expected())
        assert not torch.allclose(actual, equation.eval()(*args))

    e = RepAdapter(8, 4, 1, 0.5, p)
    assert_drops(e, (x,), lambda: x + 0.5 * (drop(e.down(x)) @ e.up[0].T + e.bias))

    arc, basis = ARC(8, 4, p, zero=False), Basis(8, 4)
    assert_drops(arc, (x, basis), lambda: x + drop(x @ (basis.weight * arc.scale)) @ basis.weight.T + arc.shift)

    fact, factors = FacT(nn.Linear(8, 8), 8, 4, 0.5, p, None), FacTFactors(8, 4, core=False)
    assert_drops(fact, (y, x, factors), lambda: y + 0.5 * factors.v(drop(fact.s(factors.u(x)))))

    lora, down = SharedLoRA(nn.Linear(8, 8), 4, 0.5, p), nn.Linear(8, 4, bias=False)
    assert_drops(lora, (y, x, down), lambda: y + 0.5 * drop(x) @ down.weight.T @ lora.up.weight.T)

    f = EFFTFactors((8, 8), 4, 2, "v")
    rows = Rows("", 0, 8)
    assert_drops(
        EFFT(rows, 1, False, 0.5, p), (y, x, f), lambda: y + 0.5 * x @ drop(f.u) @ drop(f.core[..., 1]) @ drop(f.v)
    )

    k, rules = KAdaptation(rows, 8, 2, "value", 3, 0.5, p), Rules(2, [3], 8)

    def kadaptation():
        w = {"left": k.left, "right": k.right}
        return y + 0.5 * x @ drop(kronecker(dict(rules.named_parameters()), "value", w)) + rules.bias["3"]

    assert_drops(k, (y, x, rules), kadaptation)


@pytest.mark.filterwarnings("ignore:.*gets a bias by merging")
@pytest.mark.parametrize(
    "config",
    [
        RepAdapterConfig(r=8, groups=4, scale=2.0),
        ARCConfig(r=8),
        KAdaptationConfig(n=4),
        FacTConfig(variant="tk", r=8),
    ],
    ids=lambda config: type(config).__name__,
)
@torch.no_grad()
def test_merging_where_keys_have_no_bias(config):
    """Maps before the projections give BEiT's keys a bias, updates of weights none."""
    family = FAMILIES["beit"]
    config = dataclasses.replace(config, init_weights=False)
    model = get_peft_model(family.model(), config).eval()
    expected = model(**family.inputs(2)).logits
    merged = model.merge_and_unload(safe_merge=True)
    assert_equal(merged(**family.inputs(2)).logits, expected)
    has_bias = merged.beit.layers[0].attention.k_proj.bias is not None
    assert has_bias == isinstance(config, RepAdapterConfig | ARCConfig)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (RepAdapterConfig, {"r": 6, "groups": 4}, r"RepAdapterConfig.groups is 4: must be a divisor of r, which is 6"),
        (RepAdapterConfig, {"groups": 0}, r"groups is 0: must be an integer of at least 1"),
        (
            RepAdapterConfig,
            {"sublayers": ("fc1",)},
            r"sublayers is \('fc1',\): must be one or more of 'attention', 'm",
        ),
        (RepAdapterConfig, {"dropout": 1.0}, r"dropout is 1.0: must be a finite number of at least 0 and less than 1"),
        (ARCConfig, {"sublayers": ()}, r"ARCConfig.sublayers is \(\): must be one or more of 'attention', 'mlp'"),
        (ARCConfig, {"r": 0}, r"ARCConfig.r is 0: must be an integer of at least 1"),
        (FacTConfig, {"variant": "cp"}, r"FacTConfig.variant is 'cp': must be one of 'tt', 'tk'"),
        (FacTConfig, {"scale": math.inf}, r"scale is inf: must be a finite number"),
        (SharedLoRAConfig, {"r": 2.0}, r"SharedLoRAConfig.r is 2.0: must be an integer of at least 1"),
        (EFFTConfig, {"zero_factors": "v"}, r"zero_factors is 'v': must be one of 'vv', 'vu', 'uv', 'uu'"),
        (KAdaptationConfig, {"n": 0}, r"KAdaptationConfig.n is 0: must be an integer of at least 1"),
        (KAdaptationConfig, {"dropout": -0.1}, r"dropout is -0.1: must be a finite number of at least 0"),
    ],
)
def test_fields_out_of_range(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RepAdapterConfig(r=6, groups=3), rf"groups is 3: must be a divisor of the backbone's width {WIDTH}"),
        (RepAdapterConfig(r=10**9), rf"r is 1000000000: must be an integer from 1 to {WIDTH} \(the backbone's width"),
        (ARCConfig(), rf"ARCConfig.r is 50: must be an integer from 1 to {WIDTH}"),
        (FacTConfig(r=17), rf"FacTConfig.r is 17: must be an integer from 1 to {WIDTH}"),
        (SharedLoRAConfig(r=17), rf"SharedLoRAConfig.r is 17: must be an integer from 1 to {WIDTH}"),
        (EFFTConfig(r=17), rf"EFFTConfig.r is 17: must be an integer from 1 to {WIDTH}"),
        (KAdaptationConfig(), r"KAdaptationConfig.n is 32: must be a divisor of the sizes of vit.layers.0.*q_proj"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_fields_that_do_not_fit_the_model(config, message):
    model = FAMILIES["vit"].model()
    modules = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert modules == {name: id(module) for name, module in model.named_modules()}
