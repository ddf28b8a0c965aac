"""Every method with equations at modules or branches, on a windowed, a rotary and a reduced-key backbone.

What the coverage matrix calls *works* is compared with a second copy of the backbone without the library: its blocks
run as `written_blocks` has them, each equation stands where the method's placement says in words, and nothing else is
changed. That an equation is the paper's is tested beside each method; that it acts where it should, and nowhere else,
is tested here, for methods to come, too. Tokens and networks beside the blocks have tests of their own
(test_windows.py, test_side_site.py).
"""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from functools import partial

import pytest
import torch
from peft import get_peft_model
from test_cross_and_adaptive_prompts import plain_cross
from torch import nn
from written_blocks import BACKBONES, MODELS_OF, Layout, run_written

import hf_visual_peft
from hf_visual_peft.core.placing import placements_of
from hf_visual_peft.coverage.cell import tensors_of
from hf_visual_peft.coverage.sizes import small_config
from hf_visual_peft.sites import BranchSite, Grid, LinearSite, OutputSite, TokenLayout, WeightSite, WithLoss
from hf_visual_peft.sites.input import InputSite


MODELS = ("swin", "dinov3_vit", "pvt")
METHODS = {name: m for name, m in hf_visual_peft.list_methods().items() if not m.video and not m.whole_modules}
FEWER_KEYS = ("pvt",)  # than tokens: the projections alone are another attention
AT_MODULES = (LinearSite, OutputSite, WeightSite)


def equations_of(model, method, backbone):
    """(placement, equation, shared modules) of everything that the adapter does, found by the names of its parts."""
    base = model.get_base_model()
    named = dict(base.named_modules())
    config = model.peft_config["default"]

    def part(slot, path=""):
        name = f"{method.name}_{slot}"
        owners = [n for n in named if (n == path or n.startswith(f"{path}.") or not path) and n.endswith(f".{name}")]
        return named[f"{min(owners, key=len)}.default"]

    for placement in placements_of(config, backbone, backbone):
        shared = () if placement.shared is None else (part(placement.shared.name),)
        yield placement, None if placement.build is None else part(placement.slot, placement.path), shared


def acting_on_module(module, acting):
    """A forward of a module with equations on its weights, its input and its output, in this order."""
    plain = type(module).forward

    def forward(x):
        weights = {"weight": module.weight, "bias": module.bias}
        read = x
        for site, equation, shared in acting:
            if isinstance(site, InputSite):
                read = equation.equation(read, *shared)
            elif isinstance(site, WeightSite):
                weights["weight"], weights["bias"] = equation(weights["weight"], weights["bias"], *shared)
        if any(isinstance(site, WeightSite) for site, *_ in acting):
            changed = copy.copy(module)
            changed._parameters = {}
            vars(changed).update(weights)
            y = plain(changed, read)
        else:
            y = plain(module, read)
        channels_first = isinstance(module, nn.Conv2d | nn.modules.batchnorm._BatchNorm) and y.ndim == 4
        for site, equation, shared in acting:
            if isinstance(site, OutputSite | LinearSite):
                if channels_first:
                    y = y.movedim(1, -1)
                y = equation(y, *((x,) if isinstance(site, LinearSite) else ()), *shared)
                if channels_first:
                    y = y.movedim(-1, 1)
        return y

    return forward


def told(layout: Layout) -> TokenLayout:
    return TokenLayout(layout.prefix, Grid(layout.height, layout.width))


def crossing(model, roles):
    """Attention of a block from tokens to others, (1, other tokens, width)."""
    attention = model.get_submodule(roles["query"][0].rpartition(".")[0])
    output = model.get_submodule(roles["output"][0])
    return lambda x, others: plain_cross(attention, output, x, others[0])


class Branches:
    """What stands at the sub-layers of blocks, and the stream as it came to the block at work."""

    def __init__(self):
        self.placed = defaultdict(list)
        self.crossings = {}
        self.entered = {}

    def added(self, path, sublayer, reads, x, layout):
        total = 0
        for site, equation, shared in self.placed[path, sublayer]:
            if site.reads == reads:
                more = [told(layout)] if site.needs_layout else []
                more += [self.crossings[path]] if site.crosses else []
                out = equation(x, *more, *shared)
                total = total + (out.output if isinstance(out, WithLoss) else out)
        return total

    def step(self, path, sublayer, x, norm, run, layout):
        """x + run(norm(x)), with the branches at this sub-layer, each as `BranchSite.reads` has it."""
        add = partial(self.added, path, sublayer, layout=layout)
        if sublayer == "attention":
            x = x + add("input", x)
            self.entered[path] = x
        normed = norm(x)
        update = run(normed)
        beside = add("normed", normed) + add("stream", x)
        after = beside + add("output", update) + add("block", self.entered[path])
        return x + update + after + add("sum", x + update + after)


@pytest.fixture(scope="module")
def bases():
    return {name: MODELS_OF[name].model() for name in MODELS}


def outputs(name, model):
    tiny = MODELS_OF[name]
    return tensors_of(tiny.call(model, tiny.arguments(2, BACKBONES[name][2])))


def both(method, base, model_name, changed=lambda site: site):
    """What the adapted model answers, and what the written one does."""
    backbone, config = hf_visual_peft.find_backbone(base), small_config(method)
    try:
        sites = [placement.site for placement in placements_of(config, backbone, backbone)]
    except ValueError as refusal:
        pytest.skip(str(refusal))
    if not all(isinstance(site, (BranchSite, *AT_MODULES)) for site in sites):
        pytest.skip("it has tokens, logits, or a network beside the blocks")
    if any(isinstance(site, BranchSite) and site.attends for site in sites):
        pytest.skip("a branch of it goes through the block's attention")
    reference = copy.deepcopy(base)
    crosses = any(isinstance(site, BranchSite) and site.crosses for site in sites)
    if crosses and model_name in FEWER_KEYS:
        with pytest.raises(ValueError, match="cannot be that of tokens to others, by its projections alone"):
            get_peft_model(reference, config)
        pytest.skip("it is refused where attention has fewer keys than tokens")
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    branches, at_modules = Branches(), defaultdict(list)
    if crosses:
        branches.crossings = {block.path: crossing(reference, block.roles) for block in backbone.blocks}
    for placement, equation, shared in equations_of(model, method, backbone):
        acting, path = (changed(placement.site), equation, shared), placement.path
        if isinstance(placement.site, BranchSite):
            branches.placed[path, acting[0].sublayer].append(acting)
        else:
            at_modules[path].append(acting)
    for path, acting in at_modules.items():
        module = reference.get_submodule(path)
        module.forward = acting_on_module(module, acting)
    run_written(reference, model_name, branches.step)
    return outputs(model_name, model), outputs(model_name, reference)


def same(actual, expected):
    return all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_equations_act_where_their_sites_say(name, model_name, bases):
    actual, expected = both(METHODS[name], bases[model_name], model_name)
    assert not same(actual, outputs(model_name, bases[model_name]))
    assert same(actual, expected)


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize(
    "changes", [{"reads": "normed"}, {"reads": "sum"}, {"sublayer": "attention", "reads": "stream"}]
)
@torch.no_grad()
def test_a_branch_at_another_place_is_seen(changes, model_name, bases):
    """AdaptFormer's place is that beside the MLP, on the stream before its norm, and no other."""
    method, base = METHODS["adaptformer"], bases[model_name]
    assert not same(*both(method, base, model_name, lambda site: dataclasses.replace(site, **changes)))
