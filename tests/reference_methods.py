"""Every method's arithmetic in plain torch, after the papers and what their authors released.

Each function takes the plain transformer and the adapter's weights, by names in which modules of the backbone are
called by their roles; it returns logits, or what `beside_linears` and `blockwise` make a function of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from reference_backbone import (
    DEPTH,
    GRID,
    HEADS,
    PATCH,
    ROLES,
    TOKENS,
    WIDTH,
    Vit,
    Weights,
    attend,
    to_maps,
    to_tokens,
)
from torch import Tensor


Logits = Callable[[Vit, Weights], Tensor]


def bottleneck(v: Vit, w: Weights, x: Tensor, p: float = 0.0, act: Callable[[Tensor], Tensor] = F.gelu) -> Tensor:
    return w.linear("up", v.drop(act(w.linear("down", x)), p))


def beside_linears(roles: tuple[str, ...], change: Callable[[Vit, Weights, str, Tensor, Tensor], Tensor]) -> Logits:
    """`change(v, weights, name, input, output)` gives the new output of the linears in some roles."""

    def logits(v: Vit, w: Weights) -> Tensor:
        v.at_linear = lambda n, x, y: change(v, w, n, x, y) if n.rpartition(".")[2] in roles else y
        return v.logits()

    return logits


def blockwise(block: Callable[[Vit, Weights, int, Tensor], Tensor]) -> Logits:
    """`block(v, weights, index, stream)` takes the place of a block."""

    def logits(v: Vit, w: Weights) -> Tensor:
        v.block = lambda index, x: block(v, w, index, x)
        return v.logits()

    return logits


def adapterbias(v: Vit, w: Weights, name: str, x: Tensor, y: Tensor) -> Tensor:
    own = w.of(f"{name}.adapterbias_shift.")
    return y + own.linear("weight", x) * own["shift"]


def adapterplus(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    own, out = w.of(f"{index}.adapterplus_mlp."), v.plain_block(index, x)
    return out + own["scale"] * v.drop_path(bottleneck(v, own.of("bottleneck."), out), 0.1)


def adaptformer(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    z = x + v.attended(index, x)
    return z + v.fed(index, z) + 0.1 * bottleneck(v, w.of(f"{index}.adaptformer_mlp."), z, 0.1, F.relu)


def aim(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    rate, own = 0.2 * index / (DEPTH - 1), w.of(f"{index}.aim_")
    by_place = x.unflatten(0, (-1, v.frames)).transpose(1, 2).flatten(0, 1)  # each token's own frames as a sequence
    place = own["temporal.embedding"].transpose(0, 1)[:, : v.frames] if "temporal.embedding" in own else 0.0
    mixed = bottleneck(v, own.of("temporal.adapter."), v.attended(index, by_place + place))
    mixed = v.drop_path(mixed, rate) + place
    x = x + mixed.unflatten(0, (-1, TOKENS)).transpose(1, 2).flatten(0, 1)
    a = v.attended(index, x)
    z = x + a + bottleneck(v, own.of("spatial."), a)
    n = v.norm(f"{index}.norm2", z)
    return z + v.mlp(index, n) + v.drop_path(0.5 * bottleneck(v, own.of("joint.adapter."), n), rate)


def apla(v: Vit, w: Weights, name: str, x: Tensor, y: Tensor) -> Tensor:
    """With all rows, of which there is one choice."""
    own = w.of(f"{name}.apla_rows.")
    return y + x @ own["rows"].T + own["shift"]


def arc(v: Vit, w: Weights) -> Tensor:
    bases = {"norm1": w["0.norm1.arc_attention.weight"], "norm2": w["0.norm2.arc_mlp.weight"]}

    def at_norm(name: str, x: Tensor) -> Tensor:
        own, basis = w.of(f"{name}.arc_scaling."), bases.get(name.rpartition(".")[2])
        return x if basis is None else x + v.drop(x @ basis * own["scale"], 0.1) @ basis.T + own["shift"]

    v.at_norm = at_norm
    return v.logits()


def attnscale(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    own = w.of(f"{index}.attnscale_")
    z = x + v.attention(index, v.norm(f"{index}.norm1", x), own["logits.factors"]) + own["attention.offset"]
    return z + v.fed(index, z) + own["mlp.offset"]


def quantised(weight: Tensor) -> Tensor:
    """To four levels, those of Bi-AdaptFormer for a normal variable, straight through: `QLinear.forward`."""
    normal, levels = torch.distributions.Normal(0.0, 1.0), torch.linspace(-1, 1, 4, dtype=torch.float64)
    edge = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for _ in range(500):
        bounds = torch.cat([edge[:1], normal.cdf((levels[1:] + levels[:-1]) / 2), edge[1:]])
        levels = normal.icdf((bounds[1:] + bounds[:-1]) / 2)
    mean, std = weight.mean(), weight.std()
    normed = (weight - mean) / (std + 1e-5)
    nearest = levels.float()[(normed.detach().unsqueeze(-1) - levels.float()).abs().argmin(-1)]
    return (nearest + normed - normed.detach()) * std + mean


def biadaptformer(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    own, z = w.of(f"{index}.biadaptformer_mlp."), x + v.attended(index, x)
    hidden = v.drop(F.relu(z @ quantised(own["down.weight"]).T), 0.1)
    return z + v.fed(index, z) + hidden @ quantised(own["up.weight"]).T


def bilora(v: Vit, w: Weights, name: str, x: Tensor, y: Tensor) -> Tensor:
    own = w.of(f"{name}.bilora_update.")
    return y + v.drop(x @ quantised(own["down.weight"]).T, 0.1) @ quantised(own["up.weight"]).T


def bitfit(v: Vit, w: Weights) -> Tensor:
    v.at_linear = lambda name, x, y: y + w[f"{name}.bitfit_bias.shift"]
    v.at_norm = lambda name, y: y + w[f"{name}.bitfit_bias.shift"]
    return v.logits()


def cara(v: Vit, w: Weights, name: str, x: Tensor, y: Tensor) -> Tensor:
    role, shared = name.rpartition(".")[2], w.of("0.query.cara_factors.")
    if role in ("query", "key", "value"):
        own = w[f"{name}.cara_{role}.weights"][0]
        parts = (own * shared["ranks"], shared["read"], shared["heads"], shared["channels"])
        delta = torch.einsum("r,er,hr,ir->ehi", *parts).flatten(1)
        return y + x @ v.drop(delta, 0.1)
    own = w[f"{name}.cara_slices.weights"]
    cube = torch.einsum("kr,or,ir->koi", own * shared["ranks_of_others"], shared["rows"], shared["columns"])
    stacked = cube.flatten(0, 1)
    delta = stacked if role == "fc2" else stacked.T
    return y + x @ v.drop(delta, 0.1) + shared[f"biases.{role}"]


def colin(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    def adapter(sublayer: str, x: Tensor) -> Tensor:
        own = w.of(f"{index}.colin_{sublayer}.")

        def project(name: str, x: Tensor) -> Tensor:
            return x @ (own[f"{name}.down"] @ own["diagonal"].diag() @ own[f"{name}.up"]) + own[f"{name}.bias"]

        def convolve(maps: Tensor) -> Tensor:
            share = torch.sigmoid(own["mix"])[:, None, None]
            new = F.conv2d(maps, own["conv.weight"], own["conv.bias"], padding=1, groups=maps.shape[1])
            return to_tokens(share * new + (1 - share) * maps)

        t = project("down", x)
        t = torch.cat([convolve(to_maps(t[:, :1], (1, 1))), convolve(to_maps(t[:, 1:]))], dim=1)
        return x + project("up", F.gelu(t))

    z = adapter("attention", x + v.attended(index, x))
    return adapter("mlp", z + v.fed(index, z))


def compacter(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    def phm(own: Weights, which: str, x: Tensor) -> Tensor:
        rules, left, right = w["0.compacter_rule.matrices"], own[f"{which}.left"], own[f"{which}.right"]
        terms = [torch.kron(r, s @ t) for r, s, t in zip(rules, left, right, strict=True)]
        return x @ sum(terms) + own[f"{which}.bias"]

    def adapter(sublayer: str, y: Tensor) -> Tensor:
        own = w.of(f"{index}.compacter_{sublayer}.")
        return y + phm(own, "up", F.gelu(phm(own, "down", y), approximate="tanh"))

    z = x + adapter("attention", v.attended(index, x))
    return z + adapter("mlp", v.fed(index, z))


def consolidator(v: Vit, w: Weights, name: str, x: Tensor, y: Tensor) -> Tensor:
    """Their `ChannelShuffle1d` of as many groups, and a grouped convolution of kernel 1."""
    own = w.of(f"{name}.consolidator_groups.")
    batch, tokens, channels = x.shape
    x = x.transpose(1, 2).view(batch, 8, channels // 8, tokens).transpose(1, 2).reshape(batch, channels, tokens)
    branch = F.conv1d(x, own["weight"].flatten(0, 1).unsqueeze(-1), own["bias"], groups=8)
    return y + v.drop_path(branch.transpose(1, 2), 0.1)


def convlora(v: Vit, w: Weights, name: str, x: Tensor, y: Tensor) -> Tensor:
    """Each image by its own expert; in training the draws are 0, 1, 2, ..."""
    own = w.of(f"{name}.convlora_{name.rpartition('.')[2]}.")
    h = v.drop(x, 0.1) @ own["down"].T
    maps = to_maps(h[:, 1:])
    means = maps.mean(dim=(2, 3))
    scores = means @ own["router.choice"]
    if v.training:
        scores = scores + torch.arange(scores.numel()).view_as(scores) * (
            F.softplus(means @ own["router.noise"]) + 0.01
        )
    mixed = []
    for image, expert in zip(maps, scores.argmax(1), strict=True):
        factor = int(expert) + 1
        enlarged = F.interpolate(image[None], scale_factor=factor, mode="bicubic") if factor > 1 else image[None]
        out = F.gelu(F.conv2d(enlarged, own["kernels"][expert], own["biases"][expert], padding=1))
        mixed.append(image + (F.interpolate(out, GRID, mode="bicubic") if factor > 1 else out)[0])
    g = torch.cat([h[:, :1], to_tokens(torch.stack(mixed))], dim=1)
    return y + 2.0 * g @ own["up"].T


def convpass(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    def quick_gelu(x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)

    def branch(sublayer: str, n: Tensor) -> Tensor:
        own = w.of(f"{index}.convpass_{sublayer}.")
        t = quick_gelu(own.linear("down", n))
        cls, patches = to_maps(t[:, :1], (1, 1)), to_maps(t[:, 1:])
        parts = [to_tokens(F.conv2d(m, own["conv.weight"], own["conv.bias"], padding=1)) for m in (cls, patches)]
        return own.linear("up", v.drop(quick_gelu(torch.cat(parts, dim=1)), 0.1))

    n = v.norm(f"{index}.norm1", x)
    z = x + v.attention(index, n) + branch("attention", n)
    n = v.norm(f"{index}.norm2", z)
    return z + v.mlp(index, n) + branch("mlp", n)


def changed_norms(v: Vit, w: Weights, form: str) -> None:
    """Norms whose weight and bias have addends, under names of that form."""
    for name in [name for name in v.w if "norm" in name]:
        module, _, kind = name.rpartition(".")
        addend = w.get(form.format(module, module[:-1], module[-1], kind))
        if addend is not None:
            v.w[name] = v.w[name] + addend


def difffit(v: Vit, w: Weights) -> Tensor:
    def at_linear(name: str, x: Tensor, y: Tensor) -> Tensor:
        if name.endswith(("output", "fc2")):
            own = w.of(f"{name}.difffit_scale.")
            return own["gamma"] * (y + own["bias.shift"])
        return y + w[f"{name}.difffit_bias.shift"]

    v.at_linear = at_linear
    changed_norms(v, w, "{0}.difffit_norm.{3}.values")
    return v.logits()


def efft(v: Vit, w: Weights, name: str, x: Tensor, y: Tensor) -> Tensor:
    role = name.rpartition(".")[2]
    shared = w.of("0.fc1.efft_mlp." if role in ("fc1", "fc2") else "0.query.efft_attention.")
    k = ("fc1", "fc2").index(role) if role in ("fc1", "fc2") else ROLES.index(role)
    u, core, last = (v.drop(factor, 0.1) for factor in (shared["u"], shared["core"][:, :, k], shared["v"]))
    update = u @ core @ last
    return y + x @ (update.T if role == "fc2" else update)


def high_pass(x: Tensor, rate: float = 0.25) -> Tensor:
    """Their `fft`."""
    height, width = x.shape[-2:]
    line = int((height * width * rate) ** 0.5 // 2)
    mask = torch.zeros_like(x)
    mask[..., height // 2 - line : height // 2 + line, width // 2 - line : width // 2 + line] = 1
    spectrum = torch.fft.fftshift(torch.fft.fft2(x, norm="forward")) * (1 - mask)
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum), norm="forward").real.abs()


def evp(v: Vit, w: Weights) -> Tensor:
    own = w.of("0.evp_prompts.features.")
    maps = F.conv2d(v.pixels, v.w["patch.weight"], v.w["patch.bias"], stride=PATCH)
    e = own.linear("embedding", to_tokens(maps))
    f = to_tokens(F.conv2d(high_pass(v.pixels), own["frequencies.weight"], own["frequencies.bias"], stride=PATCH))

    def block(index: int, x: Tensor) -> Tensor:
        prompt = w.of("0.evp_").linear("up", F.gelu(w.of(f"{index}.evp_prompts.").linear("mix", e + f)))
        return v.plain_block(index, torch.cat([x[:, :1], x[:, 1:] + prompt], dim=1))

    v.block = block
    return v.logits()


def fact(v: Vit, w: Weights, name: str, x: Tensor, y: Tensor) -> Tensor:
    """Tucker, each slice of a weight V C_k U."""
    shared, p = w.of("0.query.fact_factors."), w[f"{name}.fact_slices.p"]
    cores = [sum(shared["core"][:, :, t] * p[t, k] for t in range(len(p))) for k in range(p.shape[1])]
    u, last = shared["u.weight"], shared["v.weight"]
    if name.endswith("fc2"):
        read = sum(part @ u.T @ core.T for part, core in zip(x.split(WIDTH, dim=-1), cores, strict=True))
        return y + v.drop(read, 0.1) @ last.T
    return y + torch.cat([v.drop(x @ u.T @ core, 0.1) @ last.T for core in cores], dim=-1)


def fact_tt(v: Vit, w: Weights, name: str, x: Tensor, y: Tensor) -> Tensor:
    """Tensor train, each slice of a weight V S_k U."""
    shared, s = w.of("0.query.fact_factors."), w[f"{name}.fact_slices.s.weight"]
    u, last = shared["u.weight"], shared["v.weight"]
    if name.endswith("fc2"):
        parts = zip(x.split(WIDTH, dim=-1), s.chunk(2, dim=1), strict=True)
        return y + v.drop(sum(part @ u.T @ core.T for part, core in parts), 0.1) @ last.T
    return y + torch.cat([v.drop(x @ u.T @ core.T, 0.1) @ last.T for core in s.split(len(u))], dim=-1)


def houlsby(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    a = v.attended(index, x)
    z = x + a + bottleneck(v, w.of(f"{index}.houlsby_attention."), a, 0.1)
    m = v.fed(index, z)
    return z + m + bottleneck(v, w.of(f"{index}.houlsby_mlp."), m, 0.1)


def hydra(v: Vit, w: Weights, name: str, x: Tensor, y: Tensor) -> Tensor:
    own = w.of(f"{name}.hydra_branches.")
    for branch, read in (("parallel", x), ("sequential", y)):
        y = y + own.linear(f"{branch}.up", v.drop(own.linear(f"{branch}.down", read), 0.1))
    return y


def gist(v: Vit, w: Weights) -> Tensor:
    """The token stands after CLS in all blocks; dropout on it."""
    tokens = v.drop(w["0.gist_token.token"].expand(len(v.pixels), -1, -1), 0.1)
    x = v.embed()
    x = torch.cat([x[:, :1], tokens, x[:, 1:]], dim=1)
    for index in range(DEPTH):
        own = w.of(f"{index}.gist_bottleneck{index}.")

        def branch(x: Tensor, own: Weights = own) -> Tensor:
            return 0.1 * own.linear("2", F.gelu(own.linear("0", x)))

        x = x + v.attended(index, x) + branch(x)
        x = x + v.fed(index, x) + branch(x)
    return v.w.linear("head", v.norm("norm", x)[:, 0])


def kradapter(v: Vit, w: Weights, name: str, x: Tensor, y: Tensor) -> Tensor:
    own = w.of(f"{name}.kradapter_product.")
    rows = [torch.kron(b, a) for a, b in zip(own["inner"], own["outer"], strict=True)]
    product = torch.stack(rows)[:, : max(x.shape[-1], y.shape[-1])]
    return y + 2.0 * x @ (product.T if y.shape[-1] <= x.shape[-1] else product)


def kadaptation(v: Vit, w: Weights, name: str, x: Tensor, y: Tensor) -> Tensor:
    index, _, role = name.rpartition(".")
    rules, own = w.of("0.query.kadaptation_rules."), w.of(f"{name}.kadaptation_{role}.")
    update = sum(
        torch.kron(torch.outer(a, b), torch.outer(left, right))
        for a, b, left, right in zip(
            rules[f"{role}_left"], rules[f"{role}_right"], own["left"], own["right"], strict=True
        )
    )
    return y + 10.0 * x @ v.drop(update, 0.5) + rules[f"bias.{index}"]


def linearprobe(v: Vit, w: Weights) -> Tensor:
    return w.of("head.").linear("linearprobe_copy", v.features())


def lorand(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    def adapter(sublayer: str, x: Tensor) -> Tensor:
        own = w.of(f"{index}.lorand_{sublayer}.")
        down, up = (
            sum(p @ k @ q for p, k, q in zip(own[f"{n}.left"], own["kernel"], own[f"{n}.right"], strict=True))
            for n in ("down", "up")
        )
        return x + F.gelu(x @ down + own["down.bias"]) @ up + own["up.bias"]

    z = x + adapter("attention", v.attended(index, x))
    return z + adapter("mlp", v.fed(index, z))


def mlae(v: Vit, w: Weights, name: str, x: Tensor, y: Tensor) -> Tensor:
    own = w.of(f"{name}.mlae_experts.")
    masked = v.drop(own["weights"], 0.5)
    experts = zip(masked, own["down"], own["up"], strict=True)
    return y + sum(weight * (v.drop(x, 0.1) @ a)[..., None] * b for weight, a, b in experts)


def mona(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    def adapter(sublayer: str, x: Tensor) -> Tensor:
        own = w.of(f"{index}.mona_{sublayer}.")
        t = own.linear("down", own.norm("norm", x) * own["gamma"] + x * own["gamma_x"])

        def convolve(maps: Tensor) -> Tensor:
            three = [
                F.conv2d(maps, own[f"convs.{i}.weight"], own[f"convs.{i}.bias"], padding=k // 2, groups=maps.shape[1])
                for i, k in enumerate((3, 5, 7))
            ]
            maps = maps + sum(three) / 3
            return to_tokens(maps + F.conv2d(maps, own["mix.weight"], own["mix.bias"]))

        t = torch.cat([convolve(to_maps(t[:, :1], (1, 1))), convolve(to_maps(t[:, 1:]))], dim=1)
        return x + own.linear("up", v.drop(F.gelu(t), 0.1))

    z = adapter("attention", x + v.attended(index, x))
    return adapter("mlp", z + v.fed(index, z))


def mosa(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    """Number i of W_up belongs to module i mod 4; in training the second is drawn."""
    own, z = w.of(f"{index}.mosa_mlp."), x + v.attended(index, x)
    hidden = v.drop(F.gelu(own.linear("down", own.norm("norm", z))), 0.1)
    up = own["up.weight"]
    up = up * (torch.arange(up.numel()) % 4 == 1).view(up.shape) if v.training else up / 4
    return z + v.fed(index, z) + 0.1 * F.linear(hidden, up, own["up.bias"])


def partial(v: Vit, w: Weights) -> Tensor:
    own = Weights({f"2.{name}": value for name, value in w.of("2.partial_copy.").items()})
    v.w |= own | {f"norm.{name}": value for name, value in w.of("norm.partial_copy.").items()}
    return v.logits()


def pfeiffer(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    z = x + v.attended(index, x)
    m = v.fed(index, z)
    return z + m + bottleneck(v, w.of(f"{index}.pfeiffer_mlp."), m, 0.1)


def repadapter(v: Vit, w: Weights) -> Tensor:
    def at_norm(name: str, x: Tensor) -> Tensor:
        own = w.of(f"{name}.repadapter_{'attention' if name.endswith('1') else 'mlp'}.")
        if not own:
            return x
        hidden = v.drop(own.linear("down", x), 0.1).transpose(1, 2)
        return x + F.conv1d(hidden, own["up"].flatten(0, 1).unsqueeze(-1), own["bias"], groups=2).transpose(1, 2)

    v.at_norm = at_norm
    return v.logits()


def rlrr(v: Vit, w: Weights) -> Tensor:
    for name in [name for name in v.w if name.endswith(tuple(f"{role}.weight" for role in ROLES))]:
        own = w.of(f"{name.removesuffix('.weight')}.rlrr_weight.")
        v.w[name] = v.w[name] + (own["scale_out"] @ own["scale_in"]) * v.w[name]
        bias = name.replace("weight", "bias")
        v.w[bias] = v.w[bias] + own["shift"]

    def scaled(name: str, y: Tensor) -> Tensor:
        return y * w[f"{name}.rlrr_output.scale"] + w[f"{name}.rlrr_output.shift"]

    v.at_norm = scaled
    v.at_linear = lambda name, x, y: scaled(name, y) if name == "patch" else y
    return v.logits()


def samparser(v: Vit, w: Weights, name: str, x: Tensor, y: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(v.w[f"{name}.weight"], full_matrices=False)
    return y + x @ (left @ w[f"{name}.samparser_values.delta"].diag() @ right).T


def sharedlora(v: Vit, w: Weights, name: str, x: Tensor, y: Tensor) -> Tensor:
    index = name.partition(".")[0]
    down = w[f"{index}.query.sharedlora_down{index}.weight"]
    return y + v.drop(x, 0.1) @ down.T @ w[f"{name}.sharedlora_up.up.weight"].T


def snell(v: Vit, w: Weights, name: str, x: Tensor, y: Tensor) -> Tensor:
    rows, columns = w[f"{name}.snell_delta.rows"], w[f"{name}.snell_delta.columns"]
    distances = [(r[:, None] - c[None]).square().sum(-1).sqrt() for r, c in zip(rows, columns, strict=True)]
    dense = 0.1 * distances[0] - 0.1 * distances[1]
    size = dense.detach().abs()
    kept = size > size.flatten().quantile(0.5, interpolation="lower")
    update = dense * size * kept
    return y + v.drop_path(v.drop(x, 0.0 if name.endswith("output") else 0.1) @ update.T, 0.1)


def snf(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    def flow(sublayer: str, x: Tensor) -> Tensor:
        own = w.of(f"{index}.snf_{sublayer}.")
        z = own["mu"] + own["log_sigma"].exp() * x
        for step in range(2):
            z = z + own["u"][step] * torch.tanh((own["w"][step] * z).sum(-1, keepdim=True) + own["b"][step])
        return z

    z = flow("attention", x) + v.attended(index, x)
    return flow("mlp", z) + v.fed(index, z)


def ssf(v: Vit, w: Weights) -> Tensor:
    def scaled(name: str, y: Tensor) -> Tensor:
        return y * w[f"{name}.ssf_output.scale"] + w[f"{name}.ssf_output.shift"]

    v.at_linear = lambda name, x, y: scaled(name, y)
    v.at_norm = scaled
    return v.logits()


def stadapter(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    def adapter(sublayer: str, x: Tensor) -> Tensor:
        own = w.of(f"{index}.stadapter_{sublayer}.")
        t = own.linear("down", x[:, 1:]).unflatten(0, (-1, v.frames)).permute(0, 3, 1, 2)
        t = t.unflatten(3, GRID)
        t = F.conv3d(t, own["conv.weight"], own["conv.bias"], padding=(1, 0, 0), groups=t.shape[1])
        patches = own.linear("up", t.flatten(3).permute(0, 2, 3, 1).flatten(0, 1))
        return torch.cat([x[:, :1], x[:, 1:] + patches], dim=1)

    x = adapter("attention", x)
    z = adapter("mlp", x + v.attended(index, x))
    return z + v.fed(index, z)


def vpt(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    prompts = v.drop(w[f"{index}.vpt_tokens.prompts"].expand(len(x), -1, -1), 0.1)
    x = v.plain_block(index, torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1))
    return torch.cat([x[:, :1], x[:, 1 + prompts.shape[1] :]], dim=1)


def davpt(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    """Prompts of length one."""
    prompts = w[f"{index}.davpt_tokens.prompts"]
    prompts = v.drop((prompts / prompts.norm(dim=-1, keepdim=True)).expand(len(x), -1, -1), 0.1)
    x = v.plain_block(index, torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1))
    return torch.cat([x[:, :1], x[:, 1 + prompts.shape[1] :]], dim=1)


def vfpt(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    """Two of three prompts by the real part of the two-dimensional transform, written as sums of cosines."""
    prompts = v.drop(w[f"{index}.vfpt_tokens.prompts"].expand(len(x), -1, -1), 0.1)
    turns = [torch.outer(torch.arange(n), torch.arange(n)) / n for n in (2, WIDTH)]
    angles = 2 * torch.pi * (turns[0][:, None, :, None] + turns[1][None, :, None, :])
    first = torch.einsum("btc,uvtc->buv", prompts[:, :2], torch.cos(angles))
    x = v.plain_block(index, torch.cat([x[:, :1], first, prompts[:, 2:], x[:, 1:]], dim=1))
    return torch.cat([x[:, :1], x[:, 1 + prompts.shape[1] :]], dim=1)


def vpt_shallow(v: Vit, w: Weights) -> Tensor:
    """Prompts, from a narrower space, that travel through all blocks."""
    prompts = w.linear("0.vpt_shared", w["0.vpt_tokens.prompts"])
    x, count = v.embed(), len(prompts)
    x = torch.cat([x[:, :1], v.drop(prompts.expand(len(x), -1, -1), 0.1), x[:, 1:]], dim=1)
    for index in range(DEPTH):
        x = v.plain_block(index, x)
    return v.w.linear("head", v.norm("norm", torch.cat([x[:, :1], x[:, 1 + count :]], dim=1))[:, 0])


def provp(v: Vit, w: Weights) -> Tensor:
    """Prompts of a block, and a quarter of what those of the block before became."""
    x, out = v.embed(), None
    for index in range(DEPTH):
        prompts = v.drop(w[f"{index}.provp_tokens.prompts"].expand(len(x), -1, -1), 0.1)
        prompts = prompts if out is None else 0.25 * out + 0.75 * prompts
        end = 1 + prompts.shape[1]
        y = v.plain_block(index, torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1))
        x, out = torch.cat([y[:, :1], y[:, end:]], dim=1), y[:, 1:end]
    return v.w.linear("head", v.norm("norm", x)[:, 0])


def gatedprompt(v: Vit, w: Weights) -> Tensor:
    """One set of prompts, of which a gate lets a part change in each block, and softer or harder attention."""
    x = v.embed()
    prompts = v.drop(w["0.gatedprompt_tokens.prompts"].expand(len(x), -1, -1), 0.1)
    end = 1 + prompts.shape[1]
    for index in range(DEPTH):
        tau = w[f"{index}.gatedprompt_logits.temperature"]
        tau = tau + (tau.clamp(0.01, 10.0) - tau).detach()  # cut off between steps, not in the gradient
        if index > 0:
            gate = torch.sigmoid(w[f"{index}.gatedprompt_tokens.logit"])
            prompts = gate * x[:, 1:end] + (1 - gate) * prompts
            x = torch.cat([x[:, :1], prompts, x[:, end:]], dim=1)
        else:
            x = torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1)
        z = x + v.attention(index, v.norm(f"{index}.norm1", x), 1 / tau)
        x = z + v.fed(index, z)
    return v.w.linear("head", v.norm("norm", x)[:, 0])


def cvpt(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    """Between attention and MLP, the stream attends to prompts by the block's own weights."""
    prompts = v.drop(w[f"{index}.cvpt_cross.prompts"].expand(len(x), -1, -1), 0.1)
    z = x + v.attended(index, x)
    query, key, value = (
        v.w.linear(f"{index}.{role}", each)
        for role, each in zip(("query", "key", "value"), (z, prompts, prompts), strict=True)
    )
    z = z + v.w.linear(f"{index}.output", attend(query, key, value, HEADS))
    return z + v.fed(index, z)


def dyt(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    own, z = w.of(f"{index}.dyt_"), x + v.attended(index, x)
    logits = own.linear("dispatcher.linear", z[:, 1:])
    if v.training:
        logits = (logits + math.log(0.75 / 0.25)) / 5.0  # a draw of 0.75, as the difference of two Gumbel variables
    soft = torch.sigmoid(logits)
    m = (soft > 0.5).float() + soft - soft.detach()
    m = torch.cat([torch.ones_like(m[:, :1]), m], dim=1)
    return z + m * v.fed(index, z) + bottleneck(v, own.of("mlp."), z, 0.1, F.relu)


def sparsetuning(v: Vit, w: Weights) -> Tensor:
    """Groups of blocks 0 and 1, 2; between them the patches to which CLS attends least become one token."""
    starts, total = (0, 1), torch.zeros(())

    def block(index: int, x: Tensor) -> Tensor:
        nonlocal total
        own, z = w.of(f"{index}.sparsetuning_dense."), x + v.attended(index, x)
        if index in starts[1:]:
            n = v.norm(f"{index}.norm1", x)
            query, key = (
                v.linear(f"{index}.{role}", n).unflatten(-1, (HEADS, -1)).transpose(1, 2) for role in ("query", "key")
            )
            a = (query[:, :, :1] @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 0, 1:]
            patches, kept = z[:, 1:], a.topk(math.ceil(0.7 * a.shape[1]), dim=1).indices
            left = torch.ones_like(a).scatter(1, kept, 0.0)
            merged = (left * a).unsqueeze(1) @ patches
            z = torch.cat([z[:, :1], patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, WIDTH)), merged], dim=1)
        h = F.relu(own.linear("down", z))
        t = own.linear("inner_down", h)
        change = own.linear("up", own.linear("join", torch.cat([t, own.linear("inner_up", t)], -1)) + h)
        total = change if index in starts else total + change
        out = z + v.fed(index, z) + change
        return out + total if index + 1 in (*starts, DEPTH) else out

    v.block = block
    return v.logits()


def e2vpt(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    """Prompts that are whole, and keys of each head that are values, too."""
    prompts = v.drop(w[f"{index}.e2vpt_tokens.prompts"].expand(len(x), -1, -1), 0.1)
    tied = v.drop(w[f"{index}.e2vpt_heads.prompts"].expand(len(x), -1, -1, -1), 0.1).transpose(1, 2).flatten(2)
    y = torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1)
    n = v.norm(f"{index}.norm1", y)
    key, value = (torch.cat([v.linear(f"{index}.{role}", n), tied], dim=1) for role in ("key", "value"))
    z = y + v.linear(f"{index}.output", attend(v.linear(f"{index}.query", n), key, value, HEADS))
    z = z + v.fed(index, z)
    return torch.cat([z[:, :1], z[:, 1 + prompts.shape[1] :]], dim=1)


def vapt(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    """Prompts of the first block are learned, those of others come from patches: each channel convolved and mixed."""
    own = w.of(f"{index}.vapt_tokens.")
    if index == 0:
        prompts = own["prompts"].expand(len(x), -1, -1)
    else:
        maps = to_maps(own.norm("norm", x)[:, 1:])
        maps = F.conv2d(maps.flatten(0, 1)[:, None], own["kernel"]).view(len(x), WIDTH, -1)
        prompts = own.linear("mix", maps).transpose(1, 2)
        shared = w.of("1.vapt_projector.")
        prompts = prompts + shared.linear("up", F.relu(shared.linear("down", prompts)))
    x = v.plain_block(index, torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1))
    return torch.cat([x[:, :1], x[:, 1 + prompts.shape[1] :]], dim=1)


def produced(own: Weights) -> tuple[Tensor, ...]:
    """What an MLP makes for the attention of all blocks: keys and values of the first, then of the second, ..."""
    return own.linear("up", torch.tanh(own.linear("down", own["embedding"]))).chunk(2 * DEPTH, dim=-1)


def prefixed(v: Vit, index: int, x: Tensor, pair: tuple[Tensor, ...]) -> Tensor:
    """What attention with more keys and values adds, which are the same for every image, (tokens, width)."""
    n = v.norm(f"{index}.norm1", x)
    key, value = (
        torch.cat([v.linear(f"{index}.{role}", n), v.drop(p.expand(len(x), -1, -1), 0.1)], dim=1)
        for role, p in zip(("key", "value"), pair, strict=True)
    )
    return v.linear(f"{index}.output", attend(v.linear(f"{index}.query", n), key, value, HEADS))


def prefix(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    """Keys and values of all heads; where an MLP makes them, those of block 0 come first: its keys, its values."""
    if "0.prefix_network.embedding" in w:
        pair = produced(w.of("0.prefix_network."))[2 * index : 2 * index + 2]
    else:
        pair = tuple(w[f"{index}.prefix_heads.{name}"] for name in ("keys", "values"))
    z = x + prefixed(v, index, x, pair)
    return z + v.fed(index, z)


def ett(v: Vit, w: Weights) -> Tensor:
    """Keys and values that an MLP makes, those of block 0 first; an offset after each sub-layer; a map at the end."""
    made = produced(w.of("0.ett_network."))

    def block(index: int, x: Tensor) -> Tensor:
        z = x + prefixed(v, index, x, made[2 * index : 2 * index + 2]) + w[f"{index}.ett_attention.offset"]
        return z + v.fed(index, z) + w[f"{index}.ett_mlp.offset"]

    v.block = block
    v.at_norm = lambda name, y: y @ w["norm.ett_map.weight"].T if name == "norm" else y
    return v.logits()


def apt(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    """Keys and values of one head, for every head."""
    own, n = w.of(f"{index}.apt_prompts."), v.norm(f"{index}.norm1", x)
    pairs = []
    for role, name in (("key", "keys"), ("value", "values")):
        scaled = own[name] * own[f"{role}_scale"].clamp(min=1).unsqueeze(-1)
        prompts = v.drop(scaled.expand(len(x), -1, -1), 0.1).repeat(1, 1, HEADS)
        pairs.append(torch.cat([v.linear(f"{index}.{role}", n), prompts], dim=1))
    z = x + v.linear(f"{index}.output", attend(v.linear(f"{index}.query", n), *pairs, HEADS))
    return z + v.fed(index, z)


def laeprefix(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    """The weights of prefixes are divided by their own sum."""
    if index > 1:
        return v.plain_block(index, x)
    own, n = w.of(f"{index}.laeprefix_heads."), v.norm(f"{index}.norm1", x)
    keys, values = (own[f"{role}_scale"] * own[f"{role}s"].expand(len(x), -1, -1) for role in ("key", "value"))
    given = [v.linear(f"{index}.{role}", n) for role in ("query", "key", "value")]
    q, k, value, keys, values = (p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (*given, keys, values))
    weights = (q @ torch.cat([k, keys], dim=2).mT / q.shape[-1] ** 0.5).softmax(-1)
    own_part, new = weights.split([k.shape[2], keys.shape[2]], dim=-1)
    mixed = own_part @ value + new / new.sum(-1, keepdim=True) @ values
    z = x + v.linear(f"{index}.output", mixed.transpose(1, 2).flatten(2))
    return z + v.fed(index, z)


def laeadapter(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    own, n = w.of(f"{index}.laeadapter_attention."), v.norm(f"{index}.norm1", x)
    z = x + v.attention(index, n)
    z = z + own["scale"] * bottleneck(v, own, n) if own else z
    return z + v.fed(index, z)


def laelora(v: Vit, w: Weights, name: str, x: Tensor, y: Tensor) -> Tensor:
    own = w.of(f"{name}.laelora_{name.partition('.')[2]}.")
    return y + own["scale"] * x @ own["down.weight"].T @ own["up.weight"].T if own else y


def offsets(own: Weights, x: Tensor) -> dict[str, Tensor]:
    return dict(
        zip(("key", "value"), own.linear("up", torch.tanh(own.linear("down", x))).chunk(2, dim=-1), strict=True)
    )


def patt(v: Vit, w: Weights, name: str, x: Tensor, y: Tensor) -> Tensor:
    index, _, role = name.partition(".")
    return y + 0.8 * offsets(w.of(f"{index}.key.patt_network{index}."), x)[role]


def bapat(v: Vit, w: Weights) -> Tensor:
    def change(n: str, x: Tensor, y: Tensor) -> Tensor:
        index, _, role = n.partition(".")
        if role not in ("key", "value"):
            return y
        return y + 0.8 * offsets(w.of(f"{index}.key.bapat_patt_network{index}."), x)[role]

    def block(index: int, x: Tensor) -> Tensor:
        z = x + v.attended(index, x)
        read = v.norm(f"{index}.norm2", z)
        return z + v.mlp(index, read) + 0.1 * bottleneck(v, w.of(f"{index}.bapat_mlp_mlp."), read, 0.1, F.relu)

    v.at_linear, v.block = change, block
    return v.logits()


def composite(v: Vit, w: Weights) -> Tensor:
    """Prompts, low-rank updates of queries, keys and values, and a bottleneck after the MLP."""
    own = Weights({name.replace(".composite_", "."): value for name, value in w.items()})

    def block(index: int, x: Tensor) -> Tensor:
        prompts = v.drop(own[f"{index}.vpt_tokens.prompts"].expand(len(x), -1, -1), 0.1)
        x = pfeiffer(v, own, index, torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1))
        return torch.cat([x[:, :1], x[:, 1 + prompts.shape[1] :]], dim=1)

    v.at_linear = lambda n, x, y: sharedlora(v, own, n, x, y) if n.endswith(("query", "key", "value")) else y
    v.block = block
    return v.logits()


def mam(v: Vit, w: Weights, index: int, x: Tensor) -> Tensor:
    n, own = v.norm(f"{index}.norm1", x), w.of(f"{index}.mam_")
    key, value = (
        torch.cat(
            [v.linear(f"{index}.{role}", n), v.drop(own[f"prefix_heads.{p}"].expand(len(x), -1, -1), 0.1)], dim=1
        )
        for role, p in (("key", "keys"), ("value", "values"))
    )
    z = x + v.linear(f"{index}.output", attend(v.linear(f"{index}.query", n), key, value, HEADS))
    read = v.norm(f"{index}.norm2", z)
    return z + v.mlp(index, read) + 1.5 * bottleneck(v, own.of("mlp_mlp."), read, 0.1, F.relu)


def vqt(v: Vit, w: Weights) -> Tensor:
    """Queries see keys and values of the tokens, which do not see them; one linear reads everything at unit length."""
    x, found = v.embed(), []
    for index in range(DEPTH):
        own = w.of(f"{index}.vqt_queries.")
        queries = v.drop(own["queries"].expand(len(x), -1, -1), 0.1)
        query, n = v.norm(f"{index}.norm1", queries), v.norm(f"{index}.norm1", x)
        q, k, value = v.linear(f"{index}.query", query), v.linear(f"{index}.key", n), v.linear(f"{index}.value", n)
        z = queries + v.linear(f"{index}.output", attend(q, k, value, HEADS))
        out = (z + v.fed(index, z)).flatten(1)
        found.append(out / out.norm(dim=1, keepdim=True) @ own["head_columns.0.weight"].T)
        x = v.plain_block(index, x)
    features = v.norm("norm", x)[:, 0]
    return v.w.linear("head", features / features.norm(dim=1, keepdim=True)) + sum(found)


def at_pixels(change: Callable[[Tensor, Weights], Tensor]) -> Callable[[Vit, Weights], Tensor]:
    """A method at the images; those of methods that see images from 0 to 1 have mean and deviation 0.5."""

    def logits(v: Vit, w: Weights) -> Tensor:
        v.pixels = change(v.pixels, Weights({name.partition("_pixels.")[2]: value for name, value in w.items()}))
        return v.logits()

    return logits


def framed(x: Tensor, w: Weights) -> Tensor:
    border = w["frame.top"].shape[1]
    inside = x.shape[-1] - 2 * border
    middle = [w["frame.left"], x.new_zeros(x.shape[1], x.shape[2] - 2 * border, inside), w["frame.right"]]
    return x + torch.cat([w["frame.top"], torch.cat(middle, dim=2), w["frame.bottom"]], dim=1)


def shrunk(x: Tensor, inner: int) -> Tensor:
    """Images from 0 to 1 in the middle of a black canvas of the old size."""
    rest = (x.shape[-1] - inner) // 2
    small = F.interpolate((x + 1) / 2, size=(inner, inner), mode="bilinear", antialias=True)
    return F.pad(small, (rest, x.shape[-1] - inner - rest) * 2)


def evp_pixel(x: Tensor, w: Weights) -> Tensor:
    return 2 * framed(shrunk(x, x.shape[-1] - 2 * w["frame.top"].shape[1]), w) - 1


def canvas(inner: int) -> Callable[[Tensor, Weights], Tensor]:
    def change(x: Tensor, w: Weights) -> Tensor:
        place, size = torch.arange(x.shape[-1]) - (x.shape[-1] - 1) / 2, w.get("scale", torch.ones(1))
        outside = place.abs() > size * inner / 2
        # each pixel of the scaled image from the two of the old one that are next to it, along each axis
        mix = (1 - ((place / size)[:, None] - place).abs()).clamp(min=0)
        pixels = mix @ shrunk(x, inner) @ mix.T
        return 2 * (pixels + w["program"].sigmoid() * (outside[:, None] | outside)) - 1

    return change


def low_rank(x: Tensor, w: Weights) -> Tensor:
    return x + 2 * w["left"] @ w["right"]
