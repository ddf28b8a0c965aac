"""Each method against its equation, evaluated in plain torch from the paper, on ViT and on DINOv2 (layer scale)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from families import DEPTH, FAMILIES, PATCH, WIDTH, images, output_of
from peft import get_peft_model
from plain import plain_parts

from hf_visual_peft import (
    AdapterBiasConfig,
    AdapterPlusConfig,
    AdaptFormerConfig,
    ConsolidatorConfig,
    ConvpassConfig,
    HoulsbyConfig,
    HydraConfig,
    PfeifferConfig,
    SSFConfig,
    VPTConfig,
)
from hf_visual_peft.sites import Grid


both = pytest.mark.parametrize("name", ["vit", "dinov2_registers"])


def weights_of(model, slot):
    """{block index: {name: weight}} of one slot of the adapter."""
    found = {}
    for name, parameter in model.named_parameters():
        head, _, tail = name.partition(f".{slot}.default.")
        if tail:
            found.setdefault(int(head.rsplit(".", 1)[1]) if head[-1].isdigit() else head, {})[tail] = parameter
    return found


def adapted(name, config):
    """Plain parts of the base model with one batch, and the adapted model with that batch's last hidden state."""
    family = FAMILIES[name]
    inputs = family.inputs(2)
    parts = plain_parts(name, family.model(), inputs["pixel_values"])
    torch.manual_seed(3)
    model = get_peft_model(family.model(), config).eval()
    backbone = getattr(model.get_base_model(), model.get_base_model().base_model_prefix)
    with torch.no_grad():
        return parts, model, backbone(**inputs).last_hidden_state, family


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@both
@torch.no_grad()
def test_plain_transformer_is_the_backbone(name):
    family = FAMILIES[name]
    blocks, x, norm = plain_parts(name, family.model(), family.inputs(2)["pixel_values"])
    for block in blocks:
        x = x + block.attention(block.norm(1, x))
        x = x + block.mlp(block.norm(2, x))
    model = family.model()
    assert_equal(norm(x), getattr(model, model.base_model_prefix)(**family.inputs(2)).last_hidden_state)


@both
@pytest.mark.parametrize("projection_dim", [None, 5])
@torch.no_grad()
def test_vpt_deep(name, projection_dim):
    config = VPTConfig(num_virtual_tokens=3, init_weights=False, projection_dim=projection_dim)
    (blocks, x, norm), model, actual, family = adapted(name, config)
    prompts = weights_of(model, "vpt_tokens")
    assert len(prompts) == DEPTH
    shared = weights_of(model, "vpt_shared")
    assert len(shared) == (projection_dim is not None)  # one projection for all blocks
    for index, block in enumerate(blocks):
        p = prompts[index]["prompts"]
        if projection_dim:
            assert p.shape == (3, projection_dim)
            p = p @ shared[0]["weight"].T + shared[0]["bias"]
        p = p.expand(2, -1, -1)
        x = torch.cat([x[:, : family.prefix], p, x[:, family.prefix :]], dim=1)
        x = x + block.attention(block.norm(1, x))
        x = x + block.mlp(block.norm(2, x))
        x = torch.cat([x[:, : family.prefix], x[:, family.prefix + 3 :]], dim=1)
    assert_equal(actual, norm(x))


@both
@pytest.mark.parametrize("layers", [None, [1, 2], [0, 1]])
@torch.no_grad()
def test_vpt_shallow(name, layers):
    config = VPTConfig(num_virtual_tokens=3, deep=False, init_weights=False, layers_to_transform=layers)
    (blocks, x, norm), model, actual, family = adapted(name, config)
    layers = layers or list(range(DEPTH))
    ((first, weights),) = weights_of(model, "vpt_tokens").items()
    assert first == layers[0]
    for index, block in enumerate(blocks):
        if index == layers[0]:
            x = torch.cat([x[:, : family.prefix], weights["prompts"].expand(2, -1, -1), x[:, family.prefix :]], dim=1)
        x = x + block.attention(block.norm(1, x))
        x = x + block.mlp(block.norm(2, x))
        if index == layers[-1]:
            x = torch.cat([x[:, : family.prefix], x[:, family.prefix + 3 :]], dim=1)
    assert_equal(actual, norm(x))


def test_vpt_initialisation_and_dropout():
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), VPTConfig(num_virtual_tokens=100, dropout=0.5))
    prompts = weights_of(model, "vpt_tokens")[0]["prompts"]
    bound = math.sqrt(6 / (3 * PATCH * PATCH + WIDTH))
    assert prompts.abs().max() <= bound
    assert prompts.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    equation = model.get_base_model().vit.layers[0].vpt_tokens["default"]
    tokens = equation.train()(2)
    kept = tokens != 0
    assert 0.4 < kept.float().mean() < 0.6
    assert not torch.equal(kept[0], kept[1])  # every image has its own mask
    assert torch.allclose(tokens[kept], (2 * prompts.expand(2, -1, -1))[kept])
    projected = get_peft_model(FAMILIES["vit"].model(), VPTConfig(projection_dim=8))
    weight = weights_of(projected, "vpt_shared")[0]["weight"]
    assert weight.shape == (WIDTH, 8)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / WIDTH), rel=0.3)


@both
@pytest.mark.parametrize(
    "fields", [{}, {"scale": "learnable"}, {"layer_norm": "in"}, {"layer_norm": "out", "scale": 0.7}], ids=str
)
@torch.no_grad()
def test_adaptformer(name, fields):
    config = AdaptFormerConfig(r=4, init_weights=False, **fields)
    (blocks, x, norm), model, actual, _ = adapted(name, config)
    for block, w in zip(blocks, weights_of(model, "adaptformer_mlp").values(), strict=True):
        z = x + block.attention(block.norm(1, x))
        y = F.layer_norm(z, (WIDTH,), w["norm_in.weight"], w["norm_in.bias"]) if config.layer_norm == "in" else z
        y = F.relu(y @ w["down.weight"].T + w["down.bias"]) @ w["up.weight"].T + w["up.bias"]
        y = y * (w["scale"] if config.scale == "learnable" else config.scale)
        if config.layer_norm == "out":
            y = F.layer_norm(y, (WIDTH,), w["norm_out.weight"], w["norm_out.bias"])
        x = z + block.mlp(block.norm(2, z)) + y
    assert_equal(actual, norm(x))


def test_adaptformer_initialisation():
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), AdaptFormerConfig(r=8, scale="learnable"))
    for w in weights_of(model, "adaptformer_mlp").values():
        assert not any(w[zero].any() for zero in ("down.bias", "up.weight", "up.bias"))
        assert w["scale"].item() == 1.0
        bound = math.sqrt(6 / ((1 + 5) * WIDTH))  # Kaiming-uniform, a = sqrt 5
        assert 0.9 * bound < w["down.weight"].abs().max() <= bound


def quick_gelu(x):
    return x / (1 + torch.exp(-1.702 * x))


def convpass(x, w, prefix, height, width, scale):
    t = quick_gelu(x @ w["down.weight"].T + w["down.bias"])
    images_of_one = [
        F.conv2d(t[:, i, :, None, None], w["conv.weight"], w["conv.bias"], padding=1) for i in range(prefix)
    ]
    patches = t[:, prefix:].transpose(1, 2).reshape(len(x), -1, height, width)
    patches = F.conv2d(patches, w["conv.weight"], w["conv.bias"], padding=1).flatten(2).transpose(1, 2)
    t = torch.cat([*(image.flatten(1)[:, None] for image in images_of_one), patches], dim=1)
    return scale * (quick_gelu(t) @ w["up.weight"].T + w["up.bias"])


@both
@pytest.mark.parametrize("sublayers", [("attention", "mlp"), ("attention",), ("mlp",)], ids=str)
@torch.no_grad()
def test_convpass(name, sublayers):
    config = ConvpassConfig(r=4, scale=0.5, sublayers=sublayers, conv_init="xavier", init_weights=False)
    (blocks, x, norm), model, actual, family = adapted(name, config)
    beside = {s: weights_of(model, f"convpass_{s}") for s in ("attention", "mlp")}
    assert {s for s, w in beside.items() if w} == set(sublayers)
    for index, block in enumerate(blocks):
        n = block.norm(1, x)
        x = x + block.attention(n)
        if "attention" in sublayers:
            x = x + convpass(n, beside["attention"][index], family.prefix, 4, 4, 0.5)
        n = block.norm(2, x)
        x = x + block.mlp(n)
        if "mlp" in sublayers:
            x = x + convpass(n, beside["mlp"][index], family.prefix, 4, 4, 0.5)
    assert_equal(actual, norm(x))


@torch.no_grad()
def test_convpass_finds_the_grid_of_each_image():
    """24x40 pixels are 3x5 patches for a model made for 4x4."""
    base = FAMILIES["dinov2_registers"].model()
    pixels = images(2, height=24, width=40)["pixel_values"]
    blocks, x, norm = plain_parts("dinov2_registers", base, pixels)
    model = get_peft_model(base, ConvpassConfig(r=4, conv_init="xavier", init_weights=False)).eval()
    beside = {s: weights_of(model, f"convpass_{s}") for s in ("attention", "mlp")}
    for index, block in enumerate(blocks):
        n = block.norm(1, x)
        x = x + block.attention(n) + convpass(n, beside["attention"][index], 5, 3, 5, 1.0)
        n = block.norm(2, x)
        x = x + block.mlp(n) + convpass(n, beside["mlp"][index], 5, 3, 5, 1.0)
    actual = model.get_base_model().dinov2_with_registers(pixels).last_hidden_state
    assert_equal(actual, norm(x))
    square = model(**images(2))
    assert torch.equal(model(**images(2)).logits, square.logits)
    for name in ("vit", "clip"):
        family = FAMILIES[name]
        other = get_peft_model(family.model(), ConvpassConfig(r=4, init_weights=False)).eval()
        assert other(pixels, interpolate_pos_encoding=True).logits.isfinite().all()


def test_convpass_initialisation():
    torch.manual_seed(0)
    for conv_init in ("identity", "xavier"):
        model = get_peft_model(FAMILIES["vit"].model(), ConvpassConfig(r=6, conv_init=conv_init))
        for w in weights_of(model, "convpass_mlp").values():
            assert not any(w[zero].any() for zero in ("down.bias", "conv.bias", "up.weight", "up.bias"))
            bound = math.sqrt(6 / (WIDTH + 6))
            assert 0.8 * bound < w["down.weight"].abs().max() <= bound
            tap = torch.zeros(6, 6, 3, 3)
            tap[range(6), range(6), 1, 1] = 1.0
            assert torch.equal(w["conv.weight"], tap) == (conv_init == "identity")
    assert w["conv.weight"].abs().max() <= math.sqrt(6 / (6 * 9 * 2))


@torch.no_grad()
def test_convpass_drop_path_is_its_own():
    """The branch is dropped for whole images, at the block's rate, whether or not the sub-layer is."""
    family = FAMILIES["beit"]
    config = family.model().config
    config.drop_path_rate = 0.5
    torch.manual_seed(0)
    from transformers import BeitForImageClassification

    base = BeitForImageClassification(config)
    for name, parameter in base.named_parameters():
        if "lambda" in name:
            parameter.zero_()  # the blocks' own branches are silent
    settings = ConvpassConfig(r=4, sublayers="attention", dropout=0.0, init_weights=False, layers_to_transform=2)
    model = get_peft_model(base, settings).eval()
    layer = model.get_base_model().beit.layers[2]
    assert layer.drop_path_rate == pytest.approx(0.5)
    kept = []
    pixels = images(1)["pixel_values"].expand(400, -1, -1, -1)
    plain = model.get_base_model().beit.embeddings(pixels[:1])
    model.get_base_model().beit(pixels[:1])  # sets the grid
    delta = layer(plain, resolution=(32, 32)) - plain
    layer.train()
    out = layer(plain.expand(400, -1, -1), resolution=(32, 32)) - plain
    for sample in out:
        zero, doubled = torch.allclose(sample, torch.zeros(())), torch.allclose(sample, 2 * delta[0], atol=1e-5)
        assert zero != doubled
        kept.append(doubled)
    assert 0.4 < sum(kept) / 400 < 0.6


@torch.no_grad()
def test_dropout_acts_inside_the_bottleneck():
    from hf_visual_peft.methods.adapter.adaptformer import AdaptFormer
    from hf_visual_peft.methods.adapter.convpass import Convpass
    from hf_visual_peft.sites import TokenLayout

    x = torch.randn(2, 5, 6)
    for equation, args in (
        (AdaptFormer(6, 64, 1.0, 0.5, "none"), ()),
        (Convpass(6, 64, 1.0, 0.5, "xavier"), (TokenLayout(1, Grid(2, 2)),)),
    ):
        for parameter in equation.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        seen = []
        equation.up.register_forward_pre_hook(lambda module, a, seen=seen: seen.append(a[0]))
        equation.eval()(x, *args)
        equation.train()(x, *args)
        before, after = seen
        assert ((after == 0) | torch.isclose(after, 2 * before, atol=1e-6)).all()
        assert 0.4 < (after[before != 0] == 0).float().mean() < 0.6


@both
@torch.no_grad()
def test_ssf(name):
    """A scale and a shift after every operation, by names that stand in the models."""
    family = FAMILIES[name]
    inputs = family.inputs(2)
    base = family.model()
    torch.manual_seed(3)
    model = get_peft_model(family.model(), SSFConfig(init_weights=False)).eval()
    pairs = {}
    for key, parameter in model.named_parameters():
        head, _, tail = key.partition(".ssf_output.default.")
        if tail:
            pairs.setdefault(head.removeprefix("base_model.model."), {})[tail] = parameter

    def after(key, module):
        p = pairs.pop(key)

        def hook(_, args, output):
            if isinstance(module, torch.nn.Conv2d):
                return output * p["scale"][None, :, None, None] + p["shift"][None, :, None, None]
            return output * p["scale"] + p["shift"]

        module.register_forward_hook(hook)

    targets = [
        key
        for key, module in base.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm | torch.nn.Conv2d) and key != "classifier"
    ]
    assert len(targets) == 8 * DEPTH + 2
    for key in targets:
        after(key, base.get_submodule(key))
    assert not pairs
    assert_equal(output_of(model, inputs), output_of(base, inputs))


def test_ssf_initialisation():
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), SSFConfig())
    scale = torch.cat([p for n, p in model.named_parameters() if n.endswith("default.scale")])
    shift = torch.cat([p for n, p in model.named_parameters() if n.endswith("default.shift")])
    for values, mean in ((scale, 1.0), (shift, 0.0)):
        assert values.mean().item() == pytest.approx(mean, abs=0.003)
        assert values.std().item() == pytest.approx(0.02, rel=0.1)
    assert SSFConfig().init_std == 0.02
    assert SSFConfig(target_modules=["fc1"]).init_std == 0.0
    assert SSFConfig(target_modules=["fc1"], init_std=0.1).init_std == 0.1


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (torch.nn.Linear(6, 5), (2, 5, 6)),
        (torch.nn.Linear(6, 5, bias=False), (2, 6)),
        (torch.nn.Conv2d(3, 4, 3, padding=1), (2, 3, 4, 4)),  # channels, height and width alike
        (torch.nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 6, 6)),
        (torch.nn.Conv1d(3, 4, 2), (2, 3, 4)),
        (torch.nn.LayerNorm(6), (2, 6, 6)),
        (torch.nn.BatchNorm2d(5), (2, 5, 5, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.filterwarnings("ignore:.*gets a bias by merging")
@torch.no_grad()
def test_ssf_folds_into_any_module(module, shape):
    x = torch.randn(shape)
    net = torch.nn.Sequential(torch.nn.Identity(), module).eval()
    expected = net(x)
    model = get_peft_model(net, SSFConfig(target_modules=["1"], init_std=0.5)).eval()
    w = {name: p for name, p in model.named_parameters() if "ssf" in name}
    scale, shift = w.values()
    dim = 1 if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.BatchNorm2d) else x.ndim - 1
    aligned = [-1 if i == dim else 1 for i in range(expected.ndim)]
    expected = expected * scale.view(aligned) + shift.view(aligned)
    assert_equal(model(x), expected)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged[1]) is type(module)
    assert_equal(merged(x), expected)


def test_ssf_warns_where_merging_adds_a_bias():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False)), SSFConfig(target_modules=["0"]))
    with pytest.warns(UserWarning, match="gets a bias by merging"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert model.get_base_model()[0].base_layer.bias is None


def test_ssf_target_modules_override_roles():
    def touched(**kwargs):
        model = get_peft_model(FAMILIES["vit"].model(), SSFConfig(**kwargs))
        assert not any("modules_to_save" in name for name, _ in model.named_parameters())
        return {
            n.partition(".ssf_")[0].removeprefix("base_model.model.")
            for n, _ in model.named_parameters()
            if ".ssf_" in n
        }

    assert touched(target_modules=["fc1"]) == {f"vit.layers.{i}.mlp.fc1" for i in range(DEPTH)}
    assert touched(target_modules=["fc1"], layers_to_transform=[1]) == {"vit.layers.1.mlp.fc1"}
    assert touched(target_modules=r".*layers\.0\..*norm.*") == {
        "vit.layers.0.layernorm_before",
        "vit.layers.0.layernorm_after",
    }
    linears = touched(target_modules="all-linear")
    assert len(linears) == 6 * DEPTH + 1  # as with peft's own methods, the head is one of them
    without = touched(target_modules="all-linear", exclude_modules=["fc2"])
    assert linears - without == {f"vit.layers.{i}.mlp.fc2" for i in range(DEPTH)}


@torch.no_grad()
def test_grid_of_images_in_one_batch_differs():
    """Padded (SigLIP 2) and shuffled (ViT-MAE) tokens: a convolution over cells equals one over each image."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(2, 2, 3, padding=1)
    tokens = torch.randn(2, 7, 2)
    cells = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 3, 4, 9, 9, 9]])  # 3x3 without two; 2x2 in 3x3, padded
    grid = Grid(3, 3, cells)
    out = grid.to_tokens(conv(grid.to_map(tokens)))
    canvas = torch.zeros(1, 2, 9)
    canvas[0, :, :7] = tokens[0].T
    assert torch.allclose(out[0], conv(canvas.view(1, 2, 3, 3)).flatten(2)[0, :, :7].T, atol=1e-6)
    small = conv(tokens[1, :4].T.reshape(1, 2, 2, 2)).flatten(2)[0].T
    assert torch.allclose(out[1, :4], small, atol=1e-6)
    assert not out[1, 4:].any()
    with pytest.raises(ValueError, match="7 patch tokens do not fill a grid of 2 x 3"):
        Grid(2, 3).to_map(tokens)


@torch.no_grad()
def test_convpass_sees_only_an_images_own_patches():
    """SigLIP 2: the features of an image do not depend on what it is batched with."""
    family = FAMILIES["siglip2"]
    model = get_peft_model(family.model(), ConvpassConfig(r=4, conv_init="xavier", init_weights=False)).eval()
    inputs = family.inputs(2)
    together = model(**inputs).logits
    for index in range(2):
        alone = model(**{name: value[index : index + 1] for name, value in inputs.items()}).logits
        assert_equal(together[index : index + 1], alone)


@torch.no_grad()
def test_convpass_on_masked_images_follows_the_shuffle():
    """ViT-MAE with nothing masked: the order in which patches were drawn makes no difference to CLS."""
    family = FAMILIES["vit_mae"]
    base = family.model()
    base.config.mask_ratio = 0.0
    model = get_peft_model(base, ConvpassConfig(r=4, conv_init="xavier", init_weights=False)).eval()
    pixels = images(2)["pixel_values"]
    outs = [model(pixels, noise=torch.rand(2, 16)).last_hidden_state[:, 0] for _ in range(2)]
    assert_equal(outs[0], outs[1])


@torch.no_grad()
@pytest.mark.parametrize("name", ["beit", "beit_shared_bias", "data2vec", "data2vec_shared_bias"])
def test_prompts_leave_position_biases_right(name):
    """A bias on attention logits belongs to pairs of the backbone's tokens; prompts have none.

    With zero queries and keys, attention is the softmax of the bias alone: each token's share of a prompt is the same
    as with a bias of zero for it.
    """
    family = FAMILIES[name]
    base = family.model()
    size = 1 + family.patches
    seen = []

    def watch(module, args, kwargs, output):
        seen.append(output)

    for key, module in base.named_modules():
        if key.endswith(("relative_position_bias", "shared_position_bias")):
            module.register_forward_hook(watch, with_kwargs=True)
    output_of(base, family.inputs(1))
    own = [bias.clone() for bias in seen]
    seen.clear()
    model = get_peft_model(base, VPTConfig(num_virtual_tokens=3, init_weights=False)).eval()
    model(**family.inputs(1), interpolate_pos_encoding=False)
    assert len(seen) == len(own)
    for bias, expected in zip(seen, own, strict=True):
        keep = [i for i in range(bias.shape[-1]) if bias.shape[-1] == size or not 1 <= i < 4]
        assert bias.shape[-1] in (size, size + 3)
        assert torch.equal(bias[..., keep, :][..., keep], expected)
        if bias.shape[-1] > size:
            assert not bias[..., 1:4, :].any()
            assert not bias[..., :, 1:4].any()


@torch.no_grad()
def test_prompts_attend_only_to_unmasked_tokens():
    """SigLIP 2 pads: with prompts, too, an image's features do not depend on the padding."""
    family = FAMILIES["siglip2"]
    for deep, attention in ((True, "sdpa"), (False, "sdpa"), (True, "eager")):
        model = get_peft_model(family.model(), VPTConfig(num_virtual_tokens=3, deep=deep, init_weights=False)).eval()
        model.get_base_model().set_attn_implementation(attention)
        inputs = family.inputs(2)
        before = model(**inputs).logits
        padded = inputs | {"pixel_values": inputs["pixel_values"].clone()}
        padded["pixel_values"][inputs["pixel_attention_mask"] == 0] = 100.0
        assert_equal(model(**padded).logits, before)


def bottleneck(x, w):
    return F.gelu(x @ w["down.weight"].T + w["down.bias"]) @ w["up.weight"].T + w["up.bias"]


@both
@torch.no_grad()
def test_houlsby(name):
    (blocks, x, norm), model, actual, _ = adapted(name, HoulsbyConfig(r=4, init_weights=False))
    after = {sublayer: weights_of(model, f"houlsby_{sublayer}") for sublayer in ("attention", "mlp")}
    for index, block in enumerate(blocks):
        a = block.attention(block.norm(1, x))
        x = x + a + bottleneck(a, after["attention"][index])
        m = block.mlp(block.norm(2, x))
        x = x + m + bottleneck(m, after["mlp"][index])
    assert_equal(actual, norm(x))


@both
@torch.no_grad()
def test_pfeiffer(name):
    (blocks, x, norm), model, actual, _ = adapted(name, PfeifferConfig(r=4, init_weights=False))
    for block, w in zip(blocks, weights_of(model, "pfeiffer_mlp").values(), strict=True):
        x = x + block.attention(block.norm(1, x))
        m = block.mlp(block.norm(2, x))
        x = x + m + bottleneck(m, w)
    assert_equal(actual, norm(x))


@both
@pytest.mark.parametrize("position", ["post", "pre", "parallel", "intermediate", "pfeiffer", "houlsby"])
@torch.no_grad()
def test_adapter_plus(name, position):
    config = AdapterPlusConfig(r=4, position=position, init_weights=False)
    (blocks, x, norm), model, actual, _ = adapted(name, config)
    weights = {sublayer: weights_of(model, f"adapterplus_{sublayer}") for sublayer in ("attention", "mlp")}
    sublayers = {"pre": {"attention"}, "houlsby": {"attention", "mlp"}}.get(position, {"mlp"})
    assert {sublayer for sublayer, found in weights.items() if found} == sublayers

    def f(x, w):
        if position == "pfeiffer":
            x = F.layer_norm(x, (WIDTH,), w["norm.weight"], w["norm.bias"])
        inner = {key.removeprefix("bottleneck."): value for key, value in w.items()}
        return w["scale"] * bottleneck(x, inner)

    for index, block in enumerate(blocks):
        at = {sublayer: found.get(index) for sublayer, found in weights.items()}
        a = block.attention(block.norm(1, x))
        x = x + a + (f(a, at["attention"]) if position == "houlsby" else 0)
        x = x + f(x, at["attention"]) if position == "pre" else x
        m = block.mlp(block.norm(2, x))
        beside = f(x, at["mlp"]) if position == "parallel" else 0
        x = x + m + beside + (f(m, at["mlp"]) if position in ("intermediate", "houlsby") else 0)
        x = x + f(x, at["mlp"]) if position in ("post", "pfeiffer") else x
    assert_equal(actual, norm(x))


def test_sequential_adapters_initialisation():
    torch.manual_seed(0)
    for config, slot, inner in (
        (HoulsbyConfig(r=8), "houlsby_attention", ""),
        (AdapterPlusConfig(r=8), "adapterplus_mlp", "bottleneck."),
        (PfeifferConfig(r=8), "pfeiffer_mlp", ""),
    ):
        model = get_peft_model(FAMILIES["vit"].model(), config)
        for w in weights_of(model, slot).values():
            assert not w[f"{inner}down.bias"].any()
            assert not w[f"{inner}up.bias"].any()
            up, down = w[f"{inner}up.weight"], w[f"{inner}down.weight"]
            if slot == "pfeiffer_mlp":
                assert not up.any()
                assert 0.9 * WIDTH**-0.5 < down.abs().max() <= WIDTH**-0.5  # Kaiming-uniform, a = sqrt 5
                continue
            for weight in (up, down):
                assert weight.abs().max() <= 0.02
                assert weight.std().item() == pytest.approx(0.0088, rel=0.2)  # 0.01, cut at two deviations
            if slot == "adapterplus_mlp":
                assert torch.equal(w["scale"], torch.ones(WIDTH))


@torch.no_grad()
def test_adapter_plus_drop_path_comes_before_the_channel_scale():
    from hf_visual_peft.methods.adapter.adapter_plus import AdapterPlus

    equation = AdapterPlus(6, 4, 0.5, layer_norm=False)
    equation.scale.uniform_(1.0, 2.0)
    x = torch.randn(1, 3, 6)
    delta = equation.eval()(x)
    out = equation.train()(x.expand(400, -1, -1))
    doubled = torch.stack([torch.allclose(sample, 2 * delta[0]) * torch.ones(()) for sample in out])
    assert (out[doubled == 0] == 0).all()  # whole samples
    assert 0.4 < doubled.mean() < 0.6


@torch.no_grad()
def test_two_branches_beside_a_sublayer_see_the_same_stream():
    model = get_peft_model(FAMILIES["vit"].model(), AdaptFormerConfig(r=4, init_weights=False, modules_to_save=[]))
    model.add_adapter("second", AdaptFormerConfig(r=4, init_weights=False, modules_to_save=[]))
    model.base_model.set_adapter(["default", "second"])
    layer = model.eval().get_base_model().vit.layers[0]
    x = torch.randn(2, 17, WIDTH)
    base, first, second = layer.base_layer, *layer.adaptformer_mlp.values()
    seen = []
    handle = base.layernorm_after.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    actual = layer(x)
    handle.remove()
    (z,) = seen
    assert_equal(actual, z + base.mlp(base.layernorm_after(z)) + first(z) + second(z))


@torch.no_grad()
def test_attention_maps_show_the_prompts():
    family = FAMILIES["vit"]
    model = get_peft_model(family.model(), VPTConfig(num_virtual_tokens=3)).eval()
    model.get_base_model().set_attn_implementation("eager")
    maps = model(**family.inputs(1), output_attentions=True).attentions
    assert [tuple(a.shape) for a in maps] == [(1, 2, 20, 20)] * DEPTH


def linears_of(model, slot):
    """{full name in the base model: {name: weight}} of one slot of a method at single modules."""
    found = {}
    for name, parameter in model.named_parameters():
        head, _, tail = name.partition(f".{slot}.default.")
        if tail:
            found.setdefault(head.removeprefix("base_model.model."), {})[tail] = parameter
    return found


def hydra(x, y, w):
    def low_rank(v, branch):
        hidden = v @ w[f"{branch}.down.weight"].T + w[f"{branch}.down.bias"]
        return hidden @ w[f"{branch}.up.weight"].T + w[f"{branch}.up.bias"]

    return y + 1.5 * low_rank(x, "parallel") + 1.5 * low_rank(y, "sequential")


def adapter_bias(x, y, w):
    return y + (x @ w["weight.weight"].T + w["weight.bias"]) * w["shift"]


def consolidator(x, y, w):
    groups = w["weight"].shape[0]
    weight = w["weight"].flatten(0, 1).unsqueeze(-1)  # as a 1x1 convolution
    return y + F.conv1d(x.transpose(1, 2), weight, w["bias"], groups=groups).transpose(1, 2)


def consolidator_shuffled(x, y, w):
    batch, tokens, width = x.shape
    groups = w["weight"].shape[0]
    return consolidator(x.reshape(batch, tokens, width // groups, groups).transpose(2, 3).flatten(2), y, w)


OUTPUTS = ("attention.o_proj", "mlp.fc2")
LINEARS = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")


@both
@pytest.mark.parametrize(
    ("config", "slot", "equation", "names"),
    [
        (HydraConfig(r=2, scale=1.5), "hydra_branches", hydra, OUTPUTS),
        (AdapterBiasConfig(), "adapterbias_shift", adapter_bias, ("mlp.fc2",)),
        (ConsolidatorConfig(groups=4), "consolidator_groups", consolidator, LINEARS),
        (ConsolidatorConfig(groups=4, shuffle=True), "consolidator_groups", consolidator_shuffled, LINEARS),
    ],
    ids=["hydra", "adapterbias", "consolidator", "consolidator_shuffled"],
)
@torch.no_grad()
def test_methods_at_linears(name, config, slot, equation, names):
    family = FAMILIES[name]
    inputs = family.inputs(2)
    base = family.model()
    torch.manual_seed(3)
    config = dataclasses.replace(config, init_weights=False)
    model = get_peft_model(family.model(), config).eval()
    weights = linears_of(model, slot)
    assert sorted(weights) == sorted(key for key, _ in base.named_modules() if key.endswith(names))
    for key, w in weights.items():
        base.get_submodule(key).register_forward_hook(lambda module, args, output, w=w: equation(args[0], output, w))
    assert_equal(output_of(model, inputs), output_of(base, inputs))
    merged = model.merge_and_unload(safe_merge=True)
    assert_equal(output_of(merged, inputs), output_of(base, inputs))


def test_methods_at_linears_initialisation():
    torch.manual_seed(0)
    for w in linears_of(get_peft_model(FAMILIES["vit"].model(), HydraConfig(r=8)), "hydra_branches").values():
        for branch in ("parallel", "sequential"):
            zeros = ("down.bias", "up.weight", "up.bias")
            assert not any(w[f"{branch}.{name}"].any() for name in zeros)
            down = w[f"{branch}.down.weight"]
            bound = math.sqrt(6 / sum(down.shape))  # Xavier
            assert 0.8 * bound < down.abs().max() <= bound
    for w in linears_of(get_peft_model(FAMILIES["vit"].model(), AdapterBiasConfig()), "adapterbias_shift").values():
        assert not w["shift"].any()
        assert w["weight.weight"].any()
    config = ConsolidatorConfig(groups=4)
    for w in linears_of(get_peft_model(FAMILIES["vit"].model(), config), "consolidator_groups").values():
        for values in w.values():
            assert 5e-4 < values.abs().max() <= 1e-3


def test_groups_must_divide_every_linear():
    with pytest.raises(ValueError, match="groups is 384: must be a divisor of the backbone's width 16"):
        get_peft_model(FAMILIES["vit"].model(), ConsolidatorConfig(groups=384))
    model = FAMILIES["dinov2_swiglu"].model()
    model.dinov2.encoder.layer[2].mlp.up_proj = torch.nn.Linear(WIDTH, 46)
    modules = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="groups is 4: must divide out_features 46 of Linear"):
        get_peft_model(model, ConsolidatorConfig(groups=4))
    assert modules == {name: id(module) for name, module in model.named_modules()}
