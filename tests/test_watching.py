"""Models without a role table: what is found by watching them run, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import hf_visual_peft as hvp
from hf_visual_peft.cli.main import main
from hf_visual_peft.cli.roles import as_code, describe_roles, explain


WIDTH, HEADS = 16, 2


class Mixing(nn.Module):
    """Softmax attention whose fused projection holds the parts head by head."""

    def __init__(self, by_head: bool = False) -> None:
        super().__init__()
        self.everything, self.back, self.by_head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), by_head
        self.num_heads = HEADS

    def forward(self, x: Tensor) -> Tensor:
        shape = (HEADS, 3, -1) if self.by_head else (3, HEADS, -1)
        parts = self.everything(x).unflatten(-1, shape).transpose(-3, -2 if self.by_head else -3)
        q, k, v = (part.transpose(1, 2) for part in parts.unbind(2))
        weights = (q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5).softmax(-1)
        return self.back((weights @ v).transpose(1, 2).flatten(2))


class Unit(nn.Module):
    """A block whose names say nothing."""

    def __init__(self, order: str = "before", **kwargs: Any) -> None:
        super().__init__()
        self.a, self.b = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c, self.d, self.e = Mixing(**kwargs), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.order = order

    def widen(self, x: Tensor) -> Tensor:
        return self.e(nn.functional.gelu(self.d(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "after":
            x = x + self.a(self.c(x))
            return x + self.b(self.widen(x))
        if self.order == "beside":
            return x + self.c(self.a(x)) + self.widen(self.b(x))
        if self.order == "around":
            return self.b(self.a(x + self.c(x)) + self.widen(x))
        if self.order == "rough":
            x = x.bfloat16().float() + self.c(self.a(x))
            return x + self.widen(self.b(x))
        if self.order == "rough at the end":
            x = x + self.c(self.a(x))
            x = x + self.widen(self.b(x))
            return x.bfloat16().float() + x.tanh()
        x = x + self.c(self.a(x))
        return x + self.widen(self.b(x))


class Net(nn.Module):
    """A small transformer of the user's own."""

    def __init__(self, *units: nn.Module) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, WIDTH, 8, 8)
        self.extra = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.units = nn.ModuleList(units)
        self.end, self.answer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.image_size = 32

    def forward(self, x: Tensor) -> Tensor:
        x = self.cut(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.extra.expand(len(x), -1, -1), x], dim=1)
        for unit in self.units:
            x = unit(x)
        return self.answer(self.end(x)[:, 0])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()],
        "training": [m.training for m in model.modules()],
        "grads": [p.requires_grad for p in model.parameters()],
        "random": torch.get_rng_state(),
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    for name, value in before.pop("values").items():
        assert torch.equal(value, after["values"][name])
    assert torch.equal(before.pop("random"), after["random"])
    assert before == {key: after[key] for key in before}


def test_roles_of_names_that_say_nothing():
    model = Net(Unit(), Unit(), Unit())
    before = state(model)
    backbone = hvp.find_backbone(model)
    assert_untouched(model, before)
    block = backbone.blocks[1]
    names = {"norm1": "a", "query": "c.everything", "output": "c.back", "norm2": "b", "fc1": "d", "fc2": "e"}
    assert {role: block.roles[role] for role in names} == {role: (f"units.1.{name}",) for role, name in names.items()}
    assert (block.prefix_tokens, block.width, block.sublayers) == (2, WIDTH, ("attention", "mlp"))
    assert (backbone.patch_embedding, backbone.final_norms) == (("cut",), ("end",))
    assert (backbone.architecture.grid, backbone.architecture.prompts) == ("full", "sequence")
    assert backbone.architecture.equal_parts
    assert not hvp.find_backbone(Net(Unit(by_head=True))).architecture.equal_parts


@pytest.mark.parametrize("order", ["before", "after"])
def test_adapters_stand_where_the_equation_has_them(order: str):
    model = Net(Unit(order), Unit(order)).eval()
    plain = copy.deepcopy(model)
    adapted = get_peft_model(model, hvp.AdaptFormerConfig(r=4, modules_to_save=[])).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    branches = [m for m in adapted.modules() if type(m).__name__ == "AdaptFormer"]
    assert len(branches) == 2
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        x = plain.cut(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([plain.extra.expand(2, -1, -1), x], dim=1)
        for unit, branch in zip(plain.units, branches, strict=True):
            if order == "before":
                z = x + unit.c(unit.a(x))
                x = z + unit.widen(unit.b(z)) + branch(z)
            else:
                z = x + unit.a(unit.c(x))
                x = z + unit.b(unit.widen(z)) + branch(z)
        expected = plain.answer(plain.end(x)[:, 0])
        torch.testing.assert_close(adapted(pixels), expected, rtol=1e-4, atol=1e-5)
        with adapted.disable_adapter():
            assert torch.equal(adapted(pixels), plain(pixels))


def test_norms_after_sub_layers_are_recognised():
    assert all(block.post_norm for block in hvp.find_backbone(Net(Unit("after"), Unit("after"))).blocks)


def test_blocks_of_two_kinds_in_one_list():
    backbone = hvp.find_backbone(Net(Unit("before"), Unit("after")))
    assert [block.post_norm for block in backbone.blocks] == [False, True]


@pytest.mark.parametrize("order", ["beside", "around"])
def test_other_sums_take_no_branches_but_have_roles(order: str):
    model = Net(Unit(order), Unit(order))
    before = state(model)
    with pytest.raises(ValueError, match="AdaptFormer"):
        get_peft_model(model, hvp.AdaptFormerConfig(r=4, modules_to_save=[]))
    assert_untouched(model, before)
    assert get_peft_model(model, hvp.SSFConfig(modules_to_save=[]))(torch.randn(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize("order", ["rough", "rough at the end"])
@pytest.mark.parametrize("config", [hvp.SSFConfig(), hvp.AdaptFormerConfig(r=4)], ids=["ssf", "adaptformer"])
def test_a_block_that_is_only_nearly_the_sum(order: str, config: Any):
    model = Net(Unit("before"), Unit(order))
    before = state(model)
    with pytest.raises(hvp.BackboneError, match=r"Unit \('units.1'\).*differ from its output by"):
        get_peft_model(model, config)
    assert_untouched(model, before)


def test_an_adapter_on_blocks_of_two_kinds():
    """It stands in each block where the norms of this block have it."""
    model = Net(Unit("before"), Unit("after")).eval()
    plain = copy.deepcopy(model)
    config = hvp.AdaptFormerConfig(r=4, modules_to_save=[])
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        one, other = (m for m in adapted.modules() if type(m).__name__ == "AdaptFormer")
        x = plain.cut(pixels := torch.randn(2, 3, 32, 32)).flatten(2).transpose(1, 2)
        x = torch.cat([plain.extra.expand(2, -1, -1), x], dim=1)
        first, last = plain.units
        z = x + first.c(first.a(x))
        x = z + first.widen(first.b(z)) + one(z)
        z = x + last.a(last.c(x))
        x = z + last.b(last.widen(z)) + other(z)
        torch.testing.assert_close(adapted(pixels), plain.answer(plain.end(x)[:, 0]), rtol=1e-4, atol=1e-5)


class Named(Unit):
    """A block whose stream comes as a keyword, which need not be the first one in the call."""

    def forward(self, state: Tensor, factor: float = 1.0) -> Tensor:  # type: ignore[override]
        return super().forward(state if factor == 1.0 else state * factor)


class ByKeyword(Net):
    """Calls its blocks by keywords only."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.cut(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.extra.expand(len(x), -1, -1), x], dim=1)
        for unit in self.units:
            x = unit(factor=1.0, state=x)
        return self.answer(self.end(x)[:, 0])


@pytest.mark.parametrize(
    "config", [hvp.VPTConfig(), hvp.AdaptFormerConfig(r=4), hvp.LSTConfig()], ids=lambda c: c.peft_type
)
def test_a_stream_that_comes_as_a_keyword(config: Any):
    torch.manual_seed(0)
    positional = Net(Unit(), Unit()).eval()
    model = ByKeyword(Named(), Named()).eval()
    model.load_state_dict(positional.state_dict())
    plain = copy.deepcopy(positional)
    one, other = (get_peft_model(each, copy.deepcopy(config)).eval() for each in (positional, model))
    with torch.no_grad():
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            b.copy_(a.add_(torch.randn_like(a), alpha=0.1) if a.requires_grad else a)
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(other(pixels), one(pixels))
    with other.disable_adapter(), torch.no_grad():
        assert torch.equal(other(pixels), plain(pixels))


class Forked(Net):
    """Has two outputs, each of a linear of its own."""

    def __init__(self, *units: nn.Module) -> None:
        super().__init__(*units)
        self.depth = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = self.cut(x).flatten(2).transpose(1, 2)
        for unit in self.units:
            x = unit(x)
        x = self.end(x)[:, 0]
        return self.answer(x), self.depth(x)


def test_two_heads_are_told():
    model = Forked(Unit(), Unit())
    with pytest.warns(UserWarning, match=r"'answer', 'depth' of Forked.*name modules in modules_to_save"):
        adapted = get_peft_model(model, hvp.AdaptFormerConfig(r=4))
    assert {n.split(".")[2] for n, p in adapted.named_parameters() if p.requires_grad} == {"answer", "depth", "units"}
    chosen = get_peft_model(Forked(Unit(), Unit()), hvp.AdaptFormerConfig(r=4, modules_to_save=["depth"]))
    assert {n.split(".")[2] for n, p in chosen.named_parameters() if p.requires_grad} == {"depth", "units"}


class Asking(Net):
    """Takes what nobody can guess."""

    def forward(self, x: Tensor, weather: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * weather


def test_a_model_that_cannot_be_run():
    model = Asking(Unit(), Unit())
    before = state(model)
    with pytest.raises(hvp.BackboneError, match=r"Asking could not be run.*takes x, weather.*example_inputs="):
        hvp.find_backbone(model)
    assert_untouched(model, before)
    given = hvp.find_backbone(model, example_inputs=(torch.randn(1, 3, 32, 32), torch.ones(1)))
    assert hvp.find_backbone(model) == given
    get_peft_model(model, hvp.SSFConfig(modules_to_save=[]))


def test_compiled_and_wrapped_models_are_refused():
    for model, said in ((Net(Unit(), Unit()), "compiled"), (Net(Unit(), Unit()), "DataParallel")):
        wrapped = torch.compile(model) if said == "compiled" else nn.DataParallel(model)
        with pytest.raises(hvp.BackboneError, match=f"{said}.*get_peft_model on the plain model"):
            hvp.find_backbone(wrapped)


def test_found_again_in_an_adapted_model():
    model = Net(Unit(), Unit())
    before = hvp.find_backbone(model)
    adapted = get_peft_model(model, hvp.AdaptFormerConfig(r=4, modules_to_save=[]))
    assert hvp.find_backbone(adapted.get_base_model()) == before
    assert hvp.find_backbone(copy.deepcopy(adapted).get_base_model()) == before


def test_the_code_that_registers_what_was_found():
    model = Net(Unit("before"), Unit("after"))
    backbone = hvp.find_backbone(model)
    made: list[hvp.Architecture] = []
    code = as_code(backbone.architecture).replace("hf_visual_peft.register_architecture(", "made.append(")
    exec(code, {"made": made})
    assert made == [backbone.architecture]
    text = describe_roles(model)
    assert "found by watching it run" in text
    assert "c.everything" in text
    assert "adaptformer" in explain(model)


def test_the_commands(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("timm", minversion="1.0.31")  # the first with this model
    assert main(["roles", "test_vit_relpos"]) == 0
    shown = capsys.readouterr().out
    assert "found by watching it run" in shown
    assert "query='attn.qkv'" in shown or "query=('attn.qkv',)" in shown
    assert main(["explain", "test_vit_relpos"]) == 0
    assert "mlp" in capsys.readouterr().out
    assert main(["roles", "no_such_model"]) == 1
    assert "no_such_model" in capsys.readouterr().err


class Even(nn.Module):
    """A norm whose class has another name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.weight


class Steep(nn.Module):
    """Has a weight for each channel and is not a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * self.weight)


def test_a_norm_is_found_by_what_it_does():
    units = [Unit(), Unit()]
    for unit in units:
        unit.a, unit.extra = Even(), Steep()
    model = Net(*units)
    assert [block.roles["norm1"] for block in hvp.find_backbone(model).blocks] == [("units.0.a",), ("units.1.a",)]
    adapted = get_peft_model(model, hvp.SSFConfig(modules_to_save=[])).eval()
    scaled = {name.rpartition(".base_layer")[0] for name, _ in adapted.named_modules() if name.endswith("base_layer")}
    assert {name.rpartition("units.0.")[2] for name in scaled if "units.0." in name} >= {"a", "b", "d", "e"}
    assert not any(name.endswith("extra") for name in scaled)


class Channels(Mixing):
    """Attention over channels; with as many channels of a head as tokens, shapes do not tell."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.movedim(1, -1) for part in self.everything(x).unflatten(-1, (3, HEADS, -1)).unbind(2))
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return self.back((weights @ v).movedim(-1, 1).flatten(2))


class Gated(Mixing):
    """Attention whose weights are mixed with those of fixed positions."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed = nn.Parameter(torch.rand(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.everything(x).unflatten(-1, (3, HEADS, -1)).unbind(2))
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return self.back(((0.5 * weights + self.fixed) @ v).transpose(1, 2).flatten(2))


class Plain(Net):
    """Without tokens of its own: as many tokens as channels."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.cut(x).flatten(2).transpose(1, 2)
        for unit in self.units:
            x = unit(x)
        return self.answer(self.end(x).mean(1))


def _with(mixer: nn.Module, **kwargs: Any) -> Unit:
    unit = Unit(**kwargs)
    unit.c = mixer
    return unit


@pytest.mark.parametrize("mixer", [Channels, Gated])
def test_tokens_join_attention_where_it_is_one_of_tokens(mixer: type[Mixing]):
    model = Plain(_with(mixer()), _with(mixer()))
    with pytest.raises(ValueError, match="no tokens can join"):
        get_peft_model(model, hvp.VPTConfig(num_virtual_tokens=2, modules_to_save=[]))
    adapted = get_peft_model(Plain(Unit(), _with(mixer())), hvp.VPTConfig(num_virtual_tokens=2, modules_to_save=[]))
    with_prompts = [name for name, _ in adapted.named_modules() if name.endswith("vpt_prompts")]
    assert all("units.0" in name for name in with_prompts)
    assert adapted(torch.randn(1, 3, 32, 32)).shape == (1, 3)


class Between(Unit):
    """Something else adds to the stream between attention and MLP, so that only keys can join."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.c(self.a(x))
        x = x + self.more(x)
        return x + self.widen(self.b(x))


def test_keys_join_attention_between_other_sums():
    model = Plain(Between(), Between()).eval()
    plain = copy.deepcopy(model)
    adapted = get_peft_model(model, hvp.VPTConfig(num_virtual_tokens=2, modules_to_save=[])).eval()
    prompts = [p.detach() for name, p in adapted.named_parameters() if "prompts" in name and p.requires_grad]
    assert len(prompts) == 2
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        x = plain.cut(pixels).flatten(2).transpose(1, 2)
        for unit, extra in zip(plain.units, prompts, strict=True):
            longer = unit.c(unit.a(torch.cat([x, extra.expand(2, -1, -1)], dim=1)))[:, : x.shape[1]]
            x = x + longer
            x = x + unit.more(x)
            x = x + unit.widen(unit.b(x))
        torch.testing.assert_close(adapted(pixels), plain.answer(plain.end(x).mean(1)), rtol=1e-4, atol=1e-5)


def test_blocks_without_a_stream_beside_blocks_with_one():
    model = Plain(Unit(), Unit("around"), Unit())
    assert [block.sublayers for block in hvp.find_backbone(model).blocks] == [
        ("attention", "mlp"),
        (),
        ("attention", "mlp"),
    ]
    adapted = get_peft_model(model, hvp.AdaptFormerConfig(r=4, modules_to_save=[]))
    assert len([m for m in adapted.modules() if type(m).__name__ == "AdaptFormer"]) == 2
    assert get_peft_model(Plain(Unit(), Unit("around")), hvp.LSTConfig(r=2, modules_to_save=[]))(
        torch.randn(1, 3, 32, 32)
    ).shape == (1, 3)


class OfClass(Unit):
    """A block that reads patches and changes the class token alone."""

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:  # type: ignore[override]
        extra = extra + self.c(self.a(torch.cat([extra, x], dim=1)))[:, :1]
        return extra + self.widen(self.b(extra))


class Late(Plain):
    """The class token joins only at the end."""

    def forward(self, x: Tensor) -> Tensor:
        x, token = self.cut(x).flatten(2).transpose(1, 2), self.extra[:, :1].expand(len(x), -1, -1)
        for unit in self.units:
            if isinstance(unit, OfClass):
                token = unit(x, token)
            else:
                x = unit(x)
        return self.answer(self.end(token)[:, 0])


def test_blocks_of_the_class_token_have_no_place_in_the_image():
    model = Late(Unit(), Unit(), OfClass(), OfClass())
    with pytest.raises(ValueError, match="the layout of its tokens in the image is not known"):
        get_peft_model(model, hvp.LSTConfig(r=2, modules_to_save=[]))
    adapted = get_peft_model(model, hvp.ConvpassConfig(modules_to_save=[]))
    convolved = {name.partition("units.")[2][0] for name, _ in adapted.named_modules() if "convpass" in name}
    assert convolved == {"0", "1"}
    assert adapted(torch.randn(1, 3, 32, 32)).shape == (1, 3)


class Growing(Plain):
    """The class token joins the others half way."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.units[0](self.cut(x).flatten(2).transpose(1, 2))
        return self.answer(
            self.end(self.units[1](torch.cat([self.extra[:, :1].expand(len(x), -1, -1), x], dim=1)))[:, 0]
        )


def test_tokens_that_join_half_way():
    model = Growing(Unit(), Unit())
    backbone = hvp.find_backbone(model)
    assert [block.prefix_tokens for block in backbone.blocks] == [0, 1]
    assert backbone.architecture.grid == "full"
    for config in (hvp.LSTConfig(r=2, modules_to_save=[]), hvp.ConvpassConfig(modules_to_save=[])):
        adapted = get_peft_model(copy.deepcopy(model), config)
        adapted(torch.randn(2, 3, 32, 32)).sum().backward()


def test_tokens_after_maps_have_no_place_in_the_image():
    """VOLO ends with blocks of a class token and the flattened map, whose rows nothing tells."""
    volo = pytest.importorskip("timm.models.volo")
    sizes = {"embed_dims": (16,) * 4, "num_heads": (2,) * 4, "mlp_ratio": 2.0, "stem_hidden_dim": 8}
    model = volo.VOLO(layers=(1, 1, 1, 1), img_size=64, num_classes=3, **sizes).eval()
    found = hvp.find_backbone(model)
    grids = {(b.path.partition(".")[0], (b.table or found.architecture).grid) for b in found.blocks}
    assert grids == {("network", "map"), ("post_network", None)}
    before = state(model)
    with pytest.raises(ValueError, match="LSTConfig.*the layout of its tokens in the image is not known"):
        get_peft_model(model, hvp.LSTConfig())
    assert_untouched(model, before)
    get_peft_model(model, hvp.AdaptFormerConfig(r=4))(torch.randn(2, 3, 64, 64)).sum().backward()
