"""Equations at single modules of convolutional and hierarchical backbones, and what stages share."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from safetensors.torch import load_file
from test_hierarchical import assert_close, weights_of
from torch import Tensor, nn

from hf_visual_peft import (
    ARCConfig,
    EFFTConfig,
    FacTConfig,
    HydraConfig,
    KAdaptationConfig,
    RepAdapterConfig,
    RLRRConfig,
    SCTConfig,
    SharedLoRAConfig,
    SSFConfig,
    calibrate,
    get_method,
)
from hf_visual_peft.coverage.cell import tensors_of
from hf_visual_peft.coverage.models import MODELS


pytestmark = pytest.mark.filterwarnings("ignore:.*gets a bias by merging")


def base_of(name: str) -> nn.Module:
    """In double precision: some convolutional networks amplify the error of rounding beyond 1e-5."""
    return MODELS[name].model().double()


def outputs(name: str, model: nn.Module) -> list[Tensor]:
    arguments = MODELS[name].arguments(2)
    return tensors_of(MODELS[name].call(model, arguments | {"pixel_values": arguments["pixel_values"].double()}))


def adapted(name: str, config) -> tuple[nn.Module, list[Tensor]]:
    """A model with a random adapter, and what it makes of two images."""
    model = get_peft_model(base_of(name), config).double().eval()
    found = outputs(name, model)
    before = outputs(name, base_of(name))
    assert all((a - b).abs().max() > 1e-3 * b.abs().max() for a, b in zip(found, before, strict=True))
    return model, found


def after(base: nn.Module, path: str, function: Callable[[Tensor], Tensor]) -> None:
    base.get_submodule(path).register_forward_hook(lambda module, args, output: function(output))


def pair(w: dict[str, Tensor], maps: bool) -> Callable[[Tensor], Tensor]:
    """A scale and a shift of channels, which come second in maps."""
    shape = (-1, 1, 1) if maps else (-1,)
    return lambda y: y * w["scale"].view(shape) + w["shift"].view(shape)


def operations(base: nn.Module, kinds: type | tuple[type, ...], head: str = "classifier") -> list[str]:
    return [path for path, m in base.named_modules() if isinstance(m, kinds) and not path.startswith(head)]


CONVOLUTIONS_AND_NORMS = (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.Linear)


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v1", "mobilenet_v2", "regnet", "poolformer", "convnext", "bit"])
@torch.no_grad()
def test_ssf(name):
    """After every convolution (depthwise and grouped ones, too), linear and norm of a backbone without tokens."""
    model, actual = adapted(name, SSFConfig(init_weights=False))
    weights = weights_of(model, "ssf_output")
    base = base_of(name)
    # BiT's norms have their activation inside: what leaves them is not an affine map any more
    paths = operations(base, nn.Conv2d if name == "bit" else CONVOLUTIONS_AND_NORMS)
    assert sorted(weights) == sorted(paths)
    for path in paths:
        module = base.get_submodule(path)
        # of ConvNeXt's norms those outside the blocks are of maps
        norm_of_maps = re.search(r"embeddings\.layernorm$|downsampling_layer\.0$", path)
        after(base, path, pair(weights[path], not isinstance(module, nn.LayerNorm | nn.Linear) or bool(norm_of_maps)))
    assert_close(actual, outputs(name, base))
    if name == "bit":
        with pytest.raises(ValueError, match=r"into WeightStandardizedConv2d\(.*: it standardises its weight"):
            model.merge_and_unload()
        assert_close(outputs(name, model), actual)
    else:
        merged = model.merge_and_unload()
        assert not any(path.endswith("base_layer") for path, _ in merged.named_modules())
        assert_close(outputs(name, merged), actual)


@torch.no_grad()
def test_hydra_at_pointwise_convolutions():
    """PoolFormer's attention has no projection: at the last convolution of each MLP alone."""
    model, actual = adapted("poolformer", HydraConfig(r=2, scale=0.5, init_weights=False))
    weights = weights_of(model, "hydra_branches")
    base = base_of("poolformer")
    paths = [path for path, _ in base.named_modules() if path.endswith(".output.conv2")]
    assert len(paths) == 5
    assert sorted(weights) == sorted(paths)

    def linear(maps, w, name):
        return torch.einsum("oi,bihw->bohw", w[f"{name}.weight"], maps) + w[f"{name}.bias"][:, None, None]

    def branch(maps, w, which):
        return linear(linear(maps, w, f"{which}.down"), w, f"{which}.up")

    for path in paths:
        base.get_submodule(path).register_forward_hook(
            lambda module, args, y, w=weights[path]: (
                y + 0.5 * (branch(args[0], w, "parallel") + branch(y, w, "sequential"))
            )
        )
    assert_close(actual, outputs("poolformer", base))
    assert_close(outputs("poolformer", model.merge_and_unload()), actual)


@torch.no_grad()
def test_rlrr_at_pointwise_convolutions():
    model, actual = adapted("poolformer", RLRRConfig(init_weights=False))
    weights, pairs = weights_of(model, "rlrr_weight"), weights_of(model, "rlrr_output")
    base = base_of("poolformer")
    mlps = [path for path, _ in base.named_modules() if re.search(r"output\.conv[12]$", path)]
    others = [path for path in operations(base, CONVOLUTIONS_AND_NORMS) if path not in mlps]
    assert (sorted(weights), sorted(pairs)) == (sorted(mlps), sorted(others))
    for path, w in weights.items():
        conv = base.get_submodule(path)
        for out in range(conv.out_channels):
            conv.weight[out, :, 0, 0] *= 1 + w["scale_out"][out] * w["scale_in"][0]
        conv.bias += w["shift"]
    for path, w in pairs.items():
        after(base, path, pair(w, type(base.get_submodule(path)) is not nn.LayerNorm))
    assert_close(actual, outputs("poolformer", base))
    assert_close(outputs("poolformer", model.merge_and_unload()), actual)


def rep_adapter(w, x):
    hidden = (x @ w["down.weight"].T + w["down.bias"]).chunk(2, dim=-1)
    return x + torch.cat([h @ up.T for h, up in zip(hidden, w["up"], strict=True)], dim=-1) + w["bias"]


def between(method, model):
    """What an adapter of a method does between norm and sub-layer, {norm: function}."""
    if method == "repadapter":
        slots = weights_of(model, "repadapter_attention") | weights_of(model, "repadapter_mlp")
        return {path: lambda x, w=w: rep_adapter(w, x) for path, w in slots.items()}
    found = {}
    for path, w in weights_of(model, "arc_scaling").items():
        sublayer = "attention" if path.endswith("_1") else "mlp"
        # one matrix for all blocks of as many channels and heads: 8 and 1, 8 and 2, then 16 and 2 in two lists
        stage = (0, 1, 2, 2)[int(path.split(".")[3])]
        ((_, basis),) = weights_of(model, f"arc_{sublayer}_stage{stage}").items()
        p = basis["weight"]
        found[path] = lambda x, w=w, p=p: x + (x @ p * w["scale"]) @ p.T + w["shift"]
    return found


REP = RepAdapterConfig(r=4, groups=2, init_weights=False)
ARC = ARCConfig(r=3, init_weights=False)


@pytest.mark.parametrize(("method", "config"), [("repadapter", REP), ("arc", ARC)])
@torch.no_grad()
def test_before_a_spatial_reduction(method, config):
    """PVT's queries read the norm, keys and values a convolution of it: the adapter folds into both."""
    model, actual = adapted("pvt", config)
    functions = between(method, model)
    base = base_of("pvt")
    norms = [path for path, _ in base.named_modules() if re.search(r"layer_norm_[12]$", path)]
    assert len(norms) == 10
    assert sorted(functions) == sorted(norms)
    for path in norms:
        after(base, path, functions[path])
    assert_close(actual, outputs("pvt", base))
    old = {path: module.weight.clone() for path, module in base.named_modules() if isinstance(module, nn.Conv2d)}
    merged = model.merge_and_unload()
    assert_close(outputs("pvt", merged), actual)
    changed = {path for path, weight in old.items() if not torch.equal(weight, merged.get_submodule(path).weight)}
    assert changed == {path for path in old if path.endswith("sequence_reduction")}


@pytest.mark.parametrize("name", ["cvt", "poolformer"])
@pytest.mark.parametrize("config", [REP, ARC], ids=["repadapter", "arc"])
@torch.no_grad()
def test_no_linear_reads_the_norm(name, config):
    """CvT pads what its convolutions read, PoolFormer pools it: nothing to merge into before attention."""
    model, actual = adapted(name, config)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"Cannot merge an adapter on the output of .*Norm\(.*: not only linears read"
    ):
        model.merge_and_unload()
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters())
    assert_close(outputs(name, model), actual)
    before_mlp = replace(config, sublayers=("mlp",))
    model, actual = adapted(name, before_mlp)
    assert_close(outputs(name, model.merge_and_unload()), actual)


# stages: Swin of 2 + 2 blocks and widths 8 and 16


def saved_shapes(config, folder, name="swin"):
    """{key: shape} of an adapter file, without the head and without what precedes the slot."""
    get_peft_model(MODELS[name].model(), config).save_pretrained(folder)
    return {
        key.removeprefix("base_model.model."): tuple(tensor.shape)
        for key, tensor in load_file(folder / "adapter_model.safetensors").items()
        if "classifier" not in key
    }


SHARING = {
    "fact": FacTConfig(r=4),
    "efft": EFFTConfig(r=3),
    "sharedlora": SharedLoRAConfig(r=4),
    "kadaptation": KAdaptationConfig(n=4),
}
IN_STAGE = {  # of width d, whose blocks are the numbers given
    "fact": lambda d, blocks: {"factors.u.weight": (4, d), "factors.v.weight": (d, 4)},
    "efft": lambda d, blocks: {
        "attention.u": (d, 3),
        "attention.core": (3, 3, 4),
        "attention.v": (3, d),
        "mlp.u": (d, 3),
        "mlp.core": (3, 3, 2),
        "mlp.v": (3, 4 * d),
    },
    "sharedlora": lambda d, blocks: {f"down{i}.weight": (4, d) for i in blocks},
    "kadaptation": lambda d, blocks: (
        {f"rules.{role}_{side}": (4, 4) for role in ("query", "value") for side in ("left", "right")}
        | {f"rules.bias.{i}": (d,) for i in blocks}
    ),
}


@pytest.mark.parametrize("layers", [None, [1, 2], [3]], ids=str)
@pytest.mark.parametrize("method", SHARING)
def test_what_a_stage_shares(method, layers, tmp_path):
    """Factors of each stage's own width, saved once, under names that do not depend on the blocks that are chosen."""
    shapes = saved_shapes(replace(SHARING[method], layers_to_transform=layers), tmp_path)
    expected = {}
    for stage, (width, blocks) in enumerate(((8, (0, 1)), (16, (2, 3)))):
        chosen = [i for i in blocks if layers is None or i in layers]
        for key, shape in IN_STAGE[method](width, chosen).items() if chosen else ():
            slot, _, tail = key.partition(".")
            expected[f"{method}_{slot}_stage{stage}.{tail}"] = shape
    shared = [(re.sub(rf"^.*\.({method}_)", r"\1", key), shape) for key, shape in shapes.items() if "_stage" in key]
    assert sorted(shared) == sorted(expected.items())  # each once
    assert all(f"layers.{key[-1]}." in whole for whole in shapes for key in re.findall(r"_stage\d", whole))
    if method == "efft":  # which has nothing that is not shared
        return
    places = {re.match(r"swin\.encoder\.layers\.(\d)\.blocks\.(\d)", key).groups() for key in shapes}
    assert places == {(str(i // 2), str(i % 2)) for i in layers or range(4)}


def test_one_stage_has_no_number(tmp_path):
    """So files of plain backbones keep their names."""
    assert not any("_stage" in key for key in saved_shapes(FacTConfig(r=4), tmp_path, "vit"))


@torch.no_grad()
def test_fact_in_stages():
    """W + V S U of every square slice, with the stage's own U and V."""
    model, actual = adapted("swin", FacTConfig(r=4, scale=0.5, init_weights=False))
    own = weights_of(model, "fact_slices")
    base = base_of("swin")
    for stage in (0, 1):
        ((_, shared),) = weights_of(model, f"fact_factors_stage{stage}").items()
        u, v = shared["u.weight"], shared["v.weight"]
        width = 8 * 2**stage
        for block in (0, 1):
            for name in (
                "attention.q_proj",
                "attention.k_proj",
                "attention.v_proj",
                "attention.o_proj",
                "mlp.fc1",
                "mlp.fc2",
            ):
                path = f"swin.encoder.layers.{stage}.blocks.{block}.{name}"
                s, weight = own.pop(path)["s.weight"], base.get_submodule(path).weight
                for row in range(weight.shape[0] // width):
                    for column in range(weight.shape[1] // width):
                        middle = s[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                        slot = weight[row * width : (row + 1) * width, column * width : (column + 1) * width]
                        slot += 0.5 * v @ middle @ u
    assert not own
    assert_close(actual, outputs("swin", base))
    assert_close(outputs("swin", model.merge_and_unload()), actual)


def test_counts_of_swin_tiny():
    """Widths C of 96, 192, 384, 768 and 2, 2, 6, 2 blocks: 1,440 is the sum of widths and 4,416 that of blocks.

    SSF: a pair for each of the 11 C outputs of a block (two norms, q, k, v, o, fc2, and 4 C of fc1), for 6 C of each
    merging (norm 4 C, linear 2 C), for patch embedding, its norm, and the last norm. AdaptFormer: 2 C r + r + C.
    FacT: U and V a stage, 12 blocks of r x r a block. SharedLoRA: A and three B a block.
    """
    depths, widths, r = (2, 2, 6, 2), (96, 192, 384, 768), 8
    blocks = [width for depth, width in zip(depths, widths, strict=True) for _ in range(depth)]
    expected = {
        "ssf": 2 * (11 * sum(blocks) + 6 * sum(widths[:3]) + 96 + 96 + 768),
        "adaptformer": sum(2 * c * r + r + c for c in blocks),
        "fact": sum(2 * c * r for c in widths) + len(blocks) * 12 * r * r,
        "sharedlora": sum(4 * c * r for c in blocks),
    }
    assert expected == {"ssf": 107_136, "adaptformer": 75_168, "fact": 32_256, "sharedlora": 141_312}
    for name, count in expected.items():
        fields = {} if name == "ssf" else {"r": r}
        with torch.device("meta"):
            model = get_peft_model(tf.SwinModel(tf.SwinConfig()), get_method(name).config_cls(**fields))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@torch.no_grad()
def test_sct_where_the_class_token_comes_last():
    """PVT has one in its last stage only: in the others the first token is a patch, and a loud one decides."""
    tiny = MODELS["pvt"]
    base, to_adapt = tiny.model(), tiny.model()
    for model in (base, to_adapt):
        model.pvt.encoder.patch_embeddings[0].position_embeddings[:, 0, [2, 5]] = 50.0
    labels = torch.tensor([0, 1, 1, 0])
    model = get_peft_model(to_adapt, SCTConfig(channels=2))
    calibrate(model, [tiny.arguments(4) | {"labels": labels}], progress=False)
    seen = {}
    norms = [path for path, _ in base.named_modules() if path.endswith("layer_norm_2")]
    for path in norms:
        base.get_submodule(path).register_forward_pre_hook(lambda m, args, path=path: seen.update({path: args[0]}))
    tiny.call(base, tiny.arguments(4))
    for path in norms:
        block = path.removesuffix(".layer_norm_2")
        patches = seen[path][:, 1:] if ".block.3." in path else seen[path]
        norm = torch.stack([patches[labels == k].square().sum((0, 1)).sqrt() for k in (0, 1)]).mean(0)
        chosen = model.get_base_model().get_submodule(block).adapters.sct_attention["default"].salient.indices
        assert chosen.tolist() == norm.topk(2).indices.sort().values.tolist()
        if ".block.0." in path:
            assert chosen.tolist() == [2, 5]
            without = seen[path][:, 1:].square().sum((0, 1)).topk(2).indices.sort().values
            assert without.tolist() != [2, 5], "the test cannot tell"
