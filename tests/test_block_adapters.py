"""SNF, Compacter, Mona, LoRand and MoSA against their equations in plain torch, on ViT and on DINOv2 (layer scale)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from equations import adapted, assert_equal, both, weights_of
from families import DEPTH, FAMILIES, WIDTH, output_of
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_visual_peft import CompacterConfig, LoRandConfig, MonaConfig, MoSAConfig, SNFConfig
from hf_visual_peft.methods.adapter.mona import Mona
from hf_visual_peft.methods.adapter.mosa import MoSA
from hf_visual_peft.sites import Grid, TokenLayout


def parts_of(config, slots, name="vit"):
    """The weights of a fresh adapter, of every block and slot."""
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES[name].model(), config)
    found = [w for slot in slots for w in weights_of(model, slot).values()]
    assert len(found) == DEPTH * len(slots)
    return found


def flow(x, w):
    z = w["mu"] + torch.exp(w["log_sigma"]) * x
    for step in range(len(w["b"])):
        z = z + w["u"][step] * torch.tanh((w["w"][step] * z).sum(-1, keepdim=True) + w["b"][step])
    return z


@both
@pytest.mark.parametrize("num_flows", [1, 3])
@torch.no_grad()
def test_snf(name, num_flows):
    (blocks, x, norm), model, actual, _ = adapted(name, SNFConfig(num_flows=num_flows, init_weights=False))
    shortcuts = {sublayer: weights_of(model, f"snf_{sublayer}") for sublayer in ("attention", "mlp")}
    for index, block in enumerate(blocks):
        assert len(shortcuts["mlp"][index]["b"]) == num_flows
        x = flow(x, shortcuts["attention"][index]) + block.attention(block.norm(1, x))
        x = flow(x, shortcuts["mlp"][index]) + block.mlp(block.norm(2, x))
    assert_equal(actual, norm(x))


def test_snf_initialisation():
    assert SNFConfig().num_flows == 16
    for w in parts_of(SNFConfig(), ("snf_attention", "snf_mlp")):
        assert w["w"].shape == w["u"].shape == (16, WIDTH)
        assert not w["mu"].any()
        assert not w["log_sigma"].any()
        for key in ("w", "u", "b"):
            assert 0.007 < w[key].abs().max() <= 0.01
            assert w[key].min() < 0


def phm(x, w, which, rules):
    """As the paper writes it: sums of Kronecker products of R_i with matrices of rank one, on row vectors."""
    left, right = w[f"{which}.left"], w[f"{which}.right"]
    return x @ sum(torch.kron(r, s @ t) for r, s, t in zip(rules, left, right, strict=True)) + w[f"{which}.bias"]


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@both
@pytest.mark.parametrize(("r", "n", "sublayers"), [(8, 4, ("attention", "mlp")), (6, 2, ("mlp",))], ids=str)
@torch.no_grad()
def test_compacter(name, r, n, sublayers):
    config = CompacterConfig(r=r, n=n, sublayers=sublayers, init_weights=False)
    (blocks, x, norm), model, actual, _ = adapted(name, config)
    ((_, shared),) = weights_of(model, "compacter_rule").items()  # one for all
    rules = shared["matrices"]
    assert rules.shape == (n, n, n)
    after = {s: weights_of(model, f"compacter_{s}") for s in ("attention", "mlp")}
    assert {s for s, found in after.items() if found} == set(sublayers)

    def f(y, sublayer, index):
        if sublayer not in sublayers:
            return 0
        w = after[sublayer][index]
        return phm(gelu_tanh(phm(y, w, "down", rules)), w, "up", rules)

    for index, block in enumerate(blocks):
        a = block.attention(block.norm(1, x))
        x = x + a + f(a, "attention", index)
        m = block.mlp(block.norm(2, x))
        x = x + m + f(m, "mlp", index)
    assert_equal(actual, norm(x))


def test_compacter_count_by_hand():
    """ViT-B: width 768, bottleneck 24, n = 4, two adapters in each of 12 blocks.

    A PHM layer of a to b has n (a/n) + n (b/n) = a + b factors and b biases. Down 768 + 24 + 24 and up 24 + 768 + 768
    make 2,376 an adapter, 57,024 for 24; and there are 4^3 = 64 numbers of the rule, once: 57,088. Compacter++ has
    half as many adapters and the rule: 28,512 + 64 = 28,576.
    """

    def adapter(d, r):
        return (d + r + r) + (r + d + d)

    assert 24 * adapter(768, 24) + 4**3 == 57_088
    assert 12 * adapter(768, 24) + 4**3 == 28_576
    model = get_peft_model(FAMILIES["vit"].model(), CompacterConfig(r=8))
    numbers = sum(p.numel() for name, p in model.named_parameters() if "compacter_" in name)
    assert numbers == 2 * DEPTH * adapter(WIDTH, 8) + 4**3


def test_compacter_initialisation():
    torch.manual_seed(0)
    config = CompacterConfig(r=8, n=4)
    assert config.rule_std == 1e-4
    for w in parts_of(config, ("compacter_attention", "compacter_mlp")):
        assert not w["down.bias"].any()
        assert not w["up.bias"].any()
        for which, (rows, columns) in (("down", (WIDTH, 8)), ("up", (8, WIDTH))):
            for key, size in ((f"{which}.left", rows // 4), (f"{which}.right", columns // 4)):
                bound = math.sqrt(2) * math.sqrt(6 / (size + 1))  # Xavier with gain sqrt 2, of one vector
                assert 0.5 * bound < w[key].abs().max() <= bound
    big = get_peft_model(FAMILIES["vit"].model(), CompacterConfig(r=16, n=16))
    assert weights_of(big, "compacter_rule")[0]["matrices"].std().item() == pytest.approx(1e-4, rel=0.1)


def test_compacter_saves_the_rule_once(tmp_path):
    config = CompacterConfig(r=8, init_weights=False, layers_to_transform=[1, 2])
    model = get_peft_model(FAMILIES["vit"].model(), config)
    model.save_pretrained(tmp_path)
    rules = [name for name in load_file(tmp_path / "adapter_model.safetensors") if "rule" in name]
    assert rules == ["base_model.model.vit.layers.1.adapters.compacter_rule.matrices"]


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (SNFConfig, {"num_flows": 0}, r"SNFConfig.num_flows is 0: must be an integer from 1 to 1000"),
        (CompacterConfig, {"r": 6}, r"CompacterConfig.n is 4: must be a divisor of r, which is 6"),
        (CompacterConfig, {"n": 0}, r"n is 0: must be an integer of at least 1"),
        (CompacterConfig, {"rule_std": -1.0}, r"rule_std is -1.0: must be a finite number of at least 0"),
        (CompacterConfig, {"sublayers": "fc1"}, r"sublayers is .*'fc1'.*'attention', 'mlp'"),
        (MonaConfig, {"r": 0}, r"MonaConfig.r is 0: must be an integer from 1 to 10000"),
        (MonaConfig, {"dropout": 1}, r"dropout is 1: must be a finite number of at least 0 and less than 1"),
        (LoRandConfig, {"r": 0}, r"LoRandConfig.r is 0"),
        (LoRandConfig, {"branches": 2.0}, r"branches is 2.0: must be an integer from 1"),
        (LoRandConfig, {"share_kernel": "yes"}, r"share_kernel is 'yes': must be one of True, False"),
        (MoSAConfig, {"num_modules": 0}, r"MoSAConfig.num_modules is 0: must be an integer from 1 to 1000"),
        (MoSAConfig, {"mask_seed": -1}, r"mask_seed is -1: must be an integer from 0"),
        (MoSAConfig, {"scale": "learnable"}, r"scale is 'learnable': must be a finite number"),
    ],
)
def test_fields_out_of_range(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CompacterConfig(r=9, n=3), rf"CompacterConfig.n is 3: must be a divisor of the backbone's width {WIDTH}"),
        (CompacterConfig(r=24), rf"r is 24: must be an integer from 1 to {WIDTH} \(the backbone's width\)"),
        (LoRandConfig(r=17), rf"r is 17: must be an integer from 1 to {WIDTH}"),
        (LoRandConfig(rank=17), rf"rank is 17: must be an integer from 1 to {WIDTH}"),
        (MoSAConfig(r=17), rf"r is 17: must be an integer from 1 to {WIDTH}"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_fields_that_do_not_fit_the_model(config, message):
    model = FAMILIES["vit"].model()
    modules = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert modules == {name: id(module) for name, module in model.named_modules()}


def mona(x, w, prefix, height, width):
    """With every prefix token as an image of 1x1, by the same padded convolutions as the patches."""
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    normed = (x - mean) / torch.sqrt(var + 1e-5) * w["norm.weight"] + w["norm.bias"]
    t = (normed * w["gamma"] + x * w["gamma_x"]) @ w["down.weight"].T + w["down.bias"]

    def convolve(image):
        three = (
            F.conv2d(image, w[f"convs.{i}.weight"], w[f"convs.{i}.bias"], padding=k // 2, groups=image.shape[1])
            for i, k in enumerate((3, 5, 7))
        )
        image = image + sum(three) / 3
        return image + F.conv2d(image, w["mix.weight"], w["mix.bias"])

    singles = [convolve(t[:, i, :, None, None]).flatten(1)[:, None] for i in range(prefix)]
    patches = convolve(t[:, prefix:].transpose(1, 2).reshape(len(x), -1, height, width)).flatten(2).transpose(1, 2)
    return F.gelu(torch.cat([*singles, patches], dim=1)) @ w["up.weight"].T + w["up.bias"]


@both
@torch.no_grad()
def test_mona(name):
    (blocks, x, norm), model, actual, family = adapted(name, MonaConfig(r=5, init_weights=False))
    after = {sublayer: weights_of(model, f"mona_{sublayer}") for sublayer in ("attention", "mlp")}
    for index, block in enumerate(blocks):
        x = x + block.attention(block.norm(1, x))
        x = x + mona(x, after["attention"][index], family.prefix, 4, 4)
        x = x + block.mlp(block.norm(2, x))
        x = x + mona(x, after["mlp"][index], family.prefix, 4, 4)
    assert_equal(actual, norm(x))


@torch.no_grad()
def test_mona_on_grids_that_are_not_square():
    equation = Mona(WIDTH, 6, dropout=0.1).eval()
    x = torch.randn(2, 2 + 3 * 5, WIDTH)
    expected = mona(x, dict(equation.named_parameters()), 2, 3, 5)
    assert_equal(equation(x, TokenLayout(2, Grid(3, 5))), expected)


def test_mona_count_by_hand():
    """ViT-B, r = 64: norm 2 x 768, g and g_x 2 x 768, W_1 768 x 64 + 64, convolutions 64 (9 + 25 + 49) + 3 x 64,
    1x1 64 x 64 + 64, W_2 64 x 768 + 768: 111,872 an adapter, and there are 24."""
    d, r = 768, 64
    adapter = 4 * d + (d * r + r) + (r * 83 + 3 * r) + (r * r + r) + (r * d + d)
    assert adapter == 111_872
    assert 24 * adapter == 2_684_928
    d, r = WIDTH, 5
    (w, *_) = parts_of(MonaConfig(r=5), ("mona_mlp",))
    adapter = 4 * d + (d * r + r) + (r * 83 + 3 * r) + (r * r + r) + (r * d + d)
    assert sum(p.numel() for p in w.values()) == adapter


def test_mona_initialisation():
    """PyTorch's own, but for g; the bottleneck may be wider than the backbone."""
    assert MonaConfig().r == 64 > WIDTH
    for w in parts_of(MonaConfig(), ("mona_attention", "mona_mlp")):
        assert torch.equal(w["gamma"], torch.full((WIDTH,), 1e-6))
        assert torch.equal(w["gamma_x"], torch.ones(WIDTH))
        fan_in = {"down": WIDTH, "up": 64, "convs.0": 9, "convs.1": 25, "convs.2": 49, "mix": 64}
        for key, count in fan_in.items():
            assert 0.8 * count**-0.5 < w[f"{key}.weight"].abs().max() <= count**-0.5
            assert w[f"{key}.bias"].any()


@torch.no_grad()
def test_dropout_acts_inside_the_bottleneck():
    x = torch.randn(2, 5, 6)
    for equation, args in ((Mona(6, 64, 0.5), (TokenLayout(1, Grid(2, 2)),)), (MoSA(6, 64, 1, 1.0, 0.5, 0), ())):
        seen = []
        equation.dropout.register_forward_hook(lambda module, a, out, seen=seen: seen.append((a[0], out)))
        equation.train()(x, *args)
        ((before, after),) = seen
        assert before.shape == (2, 5, 64)
        assert ((after == 0) | torch.isclose(after, 2 * before)).all()
        assert 0.4 < (after[before != 0] == 0).float().mean() < 0.6


def lorand(x, w, share):
    def weight(which, kernel):
        return sum(w[f"{which}.left"][i] @ w[kernel][i] @ w[f"{which}.right"][i] for i in range(len(w[kernel])))

    hidden = F.gelu(x @ weight("down", "kernel") + w["down.bias"])
    return hidden @ weight("up", "kernel" if share else "up_kernel") + w["up.bias"]


@both
@pytest.mark.parametrize("share", [True, False])
@torch.no_grad()
def test_lorand(name, share):
    config = LoRandConfig(branches=3, rank=4, share_kernel=share, init_weights=False)
    (blocks, x, norm), model, actual, _ = adapted(name, config)
    after = {sublayer: weights_of(model, f"lorand_{sublayer}") for sublayer in ("attention", "mlp")}
    assert ("up_kernel" in after["mlp"][0]) != share
    assert after["mlp"][0]["down.right"].shape == (3, 4, WIDTH // 2)
    for index, block in enumerate(blocks):
        a = block.attention(block.norm(1, x))
        x = x + a + lorand(a, after["attention"][index], share)
        m = block.mlp(block.norm(2, x))
        x = x + m + lorand(m, after["mlp"][index], share)
    assert_equal(actual, norm(x))


def test_lorand_count_by_hand():
    """An adapter has 2 alpha beta (d + m) numbers in P and Q, alpha beta^2 or twice that in K, d + m biases.

    ViT-B, m = 384, alpha = 2, beta = 8: 36,864 + 128 + 1,152 = 38,144, or 38,272 with two kernels. Swin-B with two
    adapters a block (depths 2, 2, 18, 2; widths 128 to 1,024) comes to the 1.20 M that papers report.
    """

    def adapter(d, kernels, m=None):
        m = m or d // 2
        return 2 * 2 * 8 * (d + m) + kernels * 2 * 64 + d + m

    assert 24 * adapter(768, 1) == 915_456
    assert 24 * adapter(768, 2) == 918_528
    swin = zip((2, 2, 18, 2), (128, 256, 512, 1024), strict=True)
    assert sum(2 * depth * adapter(width, 1) for depth, width in swin) == 1_197_312
    for kernels in (1, 2):
        (w, *_) = parts_of(LoRandConfig(share_kernel=kernels == 1), ("lorand_mlp",))
        assert sum(p.numel() for p in w.values()) == adapter(WIDTH, kernels)


def test_lorand_initialisation():
    for w in parts_of(LoRandConfig(branches=8, share_kernel=False), ("lorand_attention", "lorand_mlp")):
        bounds = {"down.left": 8, "up.left": 8, "kernel": 8, "up_kernel": 8, "down.right": WIDTH // 2}
        bounds |= {"up.right": WIDTH, "down.bias": WIDTH, "up.bias": WIDTH // 2}
        assert set(bounds) == set(w)
        for key, size in bounds.items():
            assert 0.6 * size**-0.5 < w[key].abs().max() <= size**-0.5


@both
@torch.no_grad()
def test_mosa(name):
    config = MoSAConfig(r=8, num_modules=4, scale=0.5, init_weights=False)
    (blocks, x, norm), model, actual, _ = adapted(name, config)
    owners = {i: m.owner for i, m in enumerate(m for m in model.modules() if isinstance(m, MoSA))}
    for index, block in enumerate(blocks):
        w = weights_of(model, "mosa_mlp")[index]
        x = x + block.attention(block.norm(1, x))
        hidden = F.layer_norm(x, (WIDTH,), w["norm.weight"], w["norm.bias"])
        hidden = F.gelu(hidden @ w["down.weight"].T + w["down.bias"])
        # the mean of what the modules would give, one after the other
        modules = [w["up.weight"] * (owners[index] == k) for k in range(4)]
        mean = sum(hidden @ up.T + w["up.bias"] for up in modules) / 4
        x = x + block.mlp(block.norm(2, x)) + 0.5 * mean
    assert_equal(actual, norm(x))


def test_mosa_trains_one_module_at_a_time():
    equation = MoSA(WIDTH, 6, 4, scale=1.0, dropout=0.0, seed=3)
    torch.nn.init.normal_(equation.up.weight)
    assert (
        equation.owner.unique(return_counts=True)[1].tolist() == [WIDTH * 6 // 4] * 4
    )  # no overlap, nothing left out
    x = torch.randn(2, 5, WIDTH)
    hidden = F.gelu(equation.down(equation.norm(x)))
    alone = [F.linear(hidden, equation.up.weight * (equation.owner == k), equation.up.bias) for k in range(4)]
    drawn = []
    torch.manual_seed(0)
    for _ in range(200):
        equation.zero_grad()
        out = equation.train()(x)
        ((index),) = [k for k in range(4) if torch.allclose(out, alone[k], atol=1e-6)]
        drawn.append(index)
        out.sum().backward()
        assert equation.up.weight.grad[equation.owner != index].eq(0).all()
        assert equation.up.weight.grad[equation.owner == index].ne(0).all()
        assert equation.down.weight.grad.any()
    assert all(30 < drawn.count(k) < 70 for k in range(4))
    assert_equal(equation.eval()(x), sum(alone) / 4)


def test_mosa_masks_come_from_the_seed_alone(tmp_path):
    """Loading, and whatever was drawn before, leaves the masks as they were; blocks and seeds have their own."""

    def owners(model):
        return [m.owner for m in model.modules() if isinstance(m, MoSA)]

    model = get_peft_model(FAMILIES["vit"].model(), MoSAConfig(r=8, mask_seed=5))
    torch.rand(7)
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(FAMILIES["vit"].model(), tmp_path, low_cpu_mem_usage=low_memory)
        assert all(torch.equal(a, b) for a, b in zip(owners(model), owners(again), strict=True))
        assert again.train()(**FAMILIES["vit"].inputs(2)).logits.isfinite().all()
    first, second, _ = owners(model)
    assert not torch.equal(first, second)
    other = get_peft_model(FAMILIES["vit"].model(), MoSAConfig(r=8, mask_seed=6))
    assert not torch.equal(first, owners(other)[0])
    only = get_peft_model(FAMILIES["vit"].model(), MoSAConfig(r=8, mask_seed=5, layers_to_transform=[1]))
    assert torch.equal(owners(only)[0], second)


def test_mosa_draws_for_the_whole_batch_and_each_block():
    torch.manual_seed(0)
    config = MoSAConfig(r=8, dropout=0.0, init_weights=False)
    model = get_peft_model(FAMILIES["vit"].model(), config).train()
    pixels = FAMILIES["vit"].inputs(1)["pixel_values"].expand(3, -1, -1, -1)
    outs = [output_of(model, {"pixel_values": pixels}) for _ in range(12)]
    assert all(torch.allclose(out[0], out[2], atol=1e-5) for out in outs)
    assert len({f"{out[0, 0].item():.4f}" for out in outs}) > 4  # more than one draw for all blocks would give


def test_mosa_count_and_initialisation():
    """ViT-B, 12 blocks: norm 2d, down dh + h, up hd + d. 100,672 at h = 64 and 26,896 at h = 16."""
    assert 12 * (2 * 768 + 2 * 768 * 64 + 64 + 768) == 1_208_064
    assert 12 * (2 * 768 + 2 * 768 * 16 + 16 + 768) == 322_752
    assert MoSAConfig().r == 64
    for w in parts_of(MoSAConfig(r=8), ("mosa_mlp",)):
        assert sum(p.numel() for p in w.values()) == 2 * WIDTH + 2 * WIDTH * 8 + 8 + WIDTH
        assert not any(w[zero].any() for zero in ("down.bias", "up.weight", "up.bias"))
        assert 0.9 * WIDTH**-0.5 < w["down.weight"].abs().max() <= WIDTH**-0.5  # Kaiming-uniform, a = sqrt 5
        assert torch.equal(w["norm.weight"], torch.ones(WIDTH))
