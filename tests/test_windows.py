"""Prompts in windowed and hierarchical attention: as if they were tokens of every window.

The library appends keys and values. Here prompts are put before the tokens of each window, biases and masks get zeros
for them, and what comes of them is dropped.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, SamVisionConfig, SamVisionModel

from hf_visual_peft import VPTConfig, find_backbone
from hf_visual_peft.coverage.cell import tensors_of
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.sites.attention import Acts, attention_of, has_interface
from hf_visual_peft.sites.interception import intercepted


COUNT = 3
OWN_FORWARD = ["swinv2", "donut-swin", "maskformer_swin", "hiera", "sam", "vitdet", "timesformer"]
OWN_FORWARD += ["timm_swin", "timm_maxvit", "timm_dinov3"]
ALL = [*OWN_FORWARD, "swin", "segformer", "pvt", "pvt_v2", "cvt", "sam2"]


def tiny(name: str) -> Any:
    entry = MODELS[name]
    if entry.missing_package:
        pytest.skip(f"needs {entry.missing_package}")
    return entry


def outputs(name: str, model: nn.Module, batch: int = 2, size: tuple[int, int] | None = None) -> list[Tensor]:
    return tensors_of(tiny(name).call(model, tiny(name).arguments(batch, size)))


def adapted(base: nn.Module, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    config = VPTConfig(num_virtual_tokens=COUNT, init_weights=False, **fields)
    return get_peft_model(copy.deepcopy(base), config).eval()


def prompts_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Of every block that has some, by its name in the base model."""
    found = model.get_base_model().named_modules()
    adapters = {path: module for path, module in found if "vpt_tokens" in module._modules}
    return {path.removesuffix(".adapters"): m.vpt_tokens["default"].prompts for path, m in adapters.items()}


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()


# ---- attention with tokens inserted, module by module ------------------------------------------------------------


def heads(x: Tensor, number: int) -> Tensor:
    return x.reshape(*x.shape[:2], number, -1).transpose(1, 2)


def thirds(module: nn.Module, number: int, x: Tensor) -> list[Tensor]:
    return [heads(part, number) for part in module.qkv(x).split(module.qkv.out_features // 3, dim=-1)]


def inserted(
    x: Tensor, prompts: Tensor, project: Callable[[Tensor], list[Tensor]], scale: float, bias: Any = None
) -> Tensor:
    """(windows, tokens, channels) through attention in which `prompts` come first; they are dropped behind it."""
    windows, area, _ = x.shape
    query, key, value = project(torch.cat([prompts.expand(windows, -1, -1), x], dim=1))
    logits = query @ key.mT * scale
    if bias is not None:
        logits[:, :, COUNT:, COUNT:] += bias(query[:, :, COUNT:])
    mixed = torch.softmax(logits, dim=-1) @ value
    return mixed.transpose(1, 2).reshape(windows, COUNT + area, -1)[:, COUNT:]


def reduced_keys(module: nn.Module, prompts: Tensor, x: Tensor, reduced: Tensor, names: str, number: int) -> Tensor:
    """Prompts are neither queries nor in the map that is reduced."""
    query, key, value = (getattr(module, name) for name in names.split())
    tokens = torch.cat([prompts.expand(x.shape[0], -1, -1), reduced], dim=1)
    q, k, v = heads(query(x), number), heads(key(tokens), number), heads(value(tokens), number)
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def pvt(module: nn.Module, prompts: Tensor, x: Tensor, height: int, width: int, *rest: Any) -> tuple:
    reduced = x
    if module.sequences_reduction_ratio > 1:
        maps = module.sequence_reduction(x.mT.reshape(x.shape[0], -1, height, width))
        reduced = module.layer_norm(maps.flatten(2).mT)
    return (reduced_keys(module, prompts, x, reduced, "query key value", module.num_attention_heads),)


def pvt_v2(module: nn.Module, prompts: Tensor, x: Tensor, height: int, width: int, *rest: Any) -> tuple:
    reduced = x
    if module.spatial_reduction_ratio > 1:
        maps = module.spatial_reduction(x.mT.reshape(x.shape[0], -1, height, width))
        reduced = module.layer_norm(maps.flatten(2).mT)
    return (module.proj(reduced_keys(module, prompts, x, reduced, "query key value", module.num_attention_heads)),)


def segformer(
    module: nn.Module, prompts: Tensor, x: Tensor, height: int, width: int, *rest: Any, **kwargs: Any
) -> tuple:
    reduced = module.sequence_reduction(x, height, width) if module.sequence_reduction_ratio > 1 else x
    mixed = reduced_keys(module, prompts, x, reduced, "q_proj k_proj v_proj", module.num_attention_heads)
    return module.o_proj(mixed), None


def relative(table: Tensor, size: int) -> Tensor:
    """Entries of (2 size - 1)^2 offsets, (offsets, heads), for pairs of cells: (heads, cells, cells)."""
    cells = [(y, x) for y in range(size) for x in range(size)]
    span = 2 * size - 1
    rows = [[(y - v + size - 1) * span + x - u + size - 1 for v, u in cells] for y, x in cells]
    return table[torch.tensor(rows)].permute(2, 0, 1)


def decomposed(query: Tensor, along: Tensor, across: Tensor, height: int, width: int) -> Tensor:
    """SAM's positions: each query's products with an embedding of the row offset and one of the column offset."""
    cells = [(y, x) for y in range(height) for x in range(width)]
    by_row = torch.stack([torch.stack([along[y - v + height - 1] for v, _ in cells]) for y, _ in cells])
    by_column = torch.stack([torch.stack([across[x - u + width - 1] for _, u in cells]) for _, x in cells])
    return torch.einsum("bhqc,qkc->bhqk", query, by_row + by_column)


def sam(module: nn.Module, prompts: Tensor, hidden_states: Tensor, output_attentions: Any = None) -> tuple:
    height, width = hidden_states.shape[1:3]
    number = getattr(module, "num_heads", None) or module.num_attention_heads
    bias = partial(decomposed, along=module.rel_pos_h, across=module.rel_pos_w, height=height, width=width)
    mixed = inserted(hidden_states.flatten(1, 2), prompts, partial(thirds, module, number), module.scale, bias)
    return module.proj(mixed).reshape(hidden_states.shape), None


def sam2(module: nn.Module, prompts: Tensor, hidden_states: Tensor, *rest: Any) -> Tensor:
    project = partial(thirds, module, module.num_attention_heads)
    return module.proj(inserted(hidden_states.flatten(1, 2), prompts, project, module.scale)).reshape_as(hidden_states)


def hiera(module: nn.Module, prompts: Tensor, x: Tensor, output_attentions: bool = False) -> tuple:
    units = x.shape[1] // module.window_size if module.use_mask_unit_attn else 1
    mixed = torch.empty_like(x)
    for unit in range(units):  # its tokens are each `units` apart
        own = x[:, unit::units]
        mixed[:, unit::units] = inserted(own, prompts, partial(thirds, module, module.num_heads), module.scale)
    return module.proj(mixed), None


def timesformer(module: nn.Module, prompts: Tensor, x: Tensor, output_attentions: bool = False) -> tuple:
    return (inserted(x, prompts, partial(thirds, module, module.num_heads), module.scale),)


def maxvit(module: nn.Module, prompts: Tensor, x: Tensor, shared_rel_pos: None = None) -> Tensor:
    def project(tokens: Tensor) -> list[Tensor]:
        if not module.head_first:
            return thirds(module, module.num_heads, tokens)
        return list(heads(module.qkv(tokens), module.num_heads).split(module.dim_head, dim=-1))

    mixed = inserted(x.flatten(1, 2), prompts, project, module.scale, lambda query: module.rel_pos.get_bias())
    return module.proj(mixed).reshape(x.shape)


def eva(module: nn.Module, prompts: Tensor, x: Tensor, rope: Tensor, attn_mask: None, is_causal: bool) -> Tensor:
    """Rotary positions of patches in pairs of channels; prompts and prefix tokens are not turned."""
    assert attn_mask is None
    assert not is_causal
    sin, cos = rope.chunk(2, dim=-1)
    still = COUNT + module.num_prefix_tokens

    def turned(tokens: Tensor) -> Tensor:
        patches = tokens[:, :, still:]
        if module.rotate_half:
            first, second = patches.chunk(2, dim=-1)
            quarter = torch.cat([-second, first], dim=-1)
        else:
            quarter = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
        return torch.cat([tokens[:, :, :still], patches * cos + quarter * sin], dim=2)

    def project(tokens: Tensor) -> list[Tensor]:
        query, key, value = thirds(module, module.num_heads, tokens)
        return [turned(module.q_norm(query)), turned(module.k_norm(key)), value]

    return module.proj(inserted(x, prompts, project, module.scale))


REFERENCES: dict[str, Callable[..., Any]] = {
    "pvt": pvt,
    "pvt_v2": pvt_v2,
    "segformer": segformer,
    "sam": sam,
    "vitdet": sam,
    "sam2": sam2,
    "hiera": hiera,
    "timesformer": timesformer,
    "timm_maxvit": maxvit,
    "timm_dinov3": eva,
}


@pytest.mark.parametrize("name", REFERENCES)
@torch.no_grad()
def test_prompts_are_tokens_of_every_attention(name):
    base = tiny(name).model()
    model = adapted(base)
    prompts = prompts_of(model)
    backbone = find_backbone(base)
    for block in backbone.blocks:
        if "attention" in block.sublayers:
            norm = base.get_submodule(block.roles["norm1"][0])
            attention = base.get_submodule(block.roles["query"][0].rpartition(".")[0])
            reference = partial(REFERENCES[name], attention, norm(prompts.pop(block.path)))
            attention.forward = lambda *args, call=reference, **kwargs: call(*args, *kwargs.values())
    assert not prompts  # every block's own, and no other block has any
    assert_same(outputs(name, model), outputs(name, base))


# ---- Swin and its relatives, whole blocks ------------------------------------------------------------------------


def windows_of(height: int, width: int, window: int, shift: int) -> list[tuple[Tensor, Tensor]]:
    """For every window the cells in it, row by row, and which of them see each other.

    Windows are laid `shift` cells further down and right, and go on at the other edge of the image, where what has
    come around is hidden from what has not.
    """
    found = []
    for top in range(0, height, window):
        for left in range(0, width, window):
            cells = [(top + y + shift, left + x + shift) for y in range(window) for x in range(window)]
            index = torch.tensor([y % height * width + x % width for y, x in cells])
            side = torch.tensor([[y >= height, x >= width] for y, x in cells])
            found.append((index, (side[:, None] == side[None]).all(-1)))
    return found


def windowed(attend: Callable[[Tensor, Tensor], Tensor], x: Tensor, window: int, shift: int) -> Tensor:
    """(batch, height, width, channels) through attention in windows; cells are added where they do not suffice."""
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    result = torch.zeros_like(padded).flatten(1, 2)
    for index, visible in windows_of(*padded.shape[1:3], window, shift):
        result[:, index] = attend(padded.flatten(1, 2)[:, index], visible)
    return result.reshape(padded.shape)[:, :height, :width]


def hidden(visible: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda query: bias.masked_fill(~visible, -1e9)


def swin_block(block: nn.Module, prompts: Tensor, x: Tensor, window: int, shift: int) -> Tensor:
    own = block.attention
    number = own.num_attention_heads
    bias = relative(own.relative_position_bias.relative_position_bias_table, window)
    normed = block.layernorm_before(prompts)

    def project(tokens: Tensor) -> list[Tensor]:
        return [heads(linear(tokens), number) for linear in (own.q_proj, own.k_proj, own.v_proj)]

    def attend(tokens: Tensor, visible: Tensor) -> Tensor:
        return own.o_proj(inserted(tokens, normed, project, own.head_dim**-0.5, hidden(visible, bias)))

    x = x + windowed(attend, block.layernorm_before(x), window, shift)
    return x + block.mlp(block.layernorm_after(x))


def donut_block(block: nn.Module, prompts: Tensor, x: Tensor, window: int, shift: int) -> Tensor:
    own, number = block.attention.self, block.attention.self.num_attention_heads
    bias = relative(own.relative_position_bias_table, window)
    normed = block.layernorm_before(prompts)

    def project(tokens: Tensor) -> list[Tensor]:
        return [heads(linear(tokens), number) for linear in (own.query, own.key, own.value)]

    def attend(tokens: Tensor, visible: Tensor) -> Tensor:
        scale = own.attention_head_size**-0.5
        return block.attention.output.dense(inserted(tokens, normed, project, scale, hidden(visible, bias)))

    x = x + windowed(attend, block.layernorm_before(x), window, shift)
    return x + block.output.dense(F.gelu(block.intermediate.dense(block.layernorm_after(x))))


def swinv2_block(block: nn.Module, prompts: Tensor, x: Tensor, window: int, shift: int) -> Tensor:
    """Cosines; norms come after attention and MLP, so attention reads the prompts as they are."""
    own, number = block.attention.self, block.attention.self.num_attention_heads
    table = own.continuous_position_bias_mlp(own.relative_coords_table).reshape(-1, number)
    bias = 16 * torch.sigmoid(relative(table, window))

    def project(tokens: Tensor) -> list[Tensor]:
        query, key, value = (heads(linear(tokens), number) for linear in (own.query, own.key, own.value))
        query, key = (part / part.norm(dim=-1, keepdim=True).clamp(min=1e-12) for part in (query, key))
        return [query * own.logit_scale.exp(), key, value]

    def attend(tokens: Tensor, visible: Tensor) -> Tensor:
        return block.attention.output.dense(inserted(tokens, prompts, project, 1.0, hidden(visible, bias)))

    x = x + block.layernorm_before(windowed(attend, x, window, shift))
    return x + block.layernorm_after(block.output.dense(F.gelu(block.intermediate.dense(x))))


def timm_block(block: nn.Module, prompts: Tensor, x: Tensor, window: int, shift: int) -> Tensor:
    own = block.attn
    bias = relative(own.relative_position_bias_table, window)
    normed = block.norm1(prompts)

    def attend(tokens: Tensor, visible: Tensor) -> Tensor:
        project = partial(thirds, own, own.num_heads)
        return own.proj(inserted(tokens, normed, project, own.scale, hidden(visible, bias)))

    x = x + windowed(attend, block.norm1(x), window, shift)
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize("size", [None, (40, 32)])  # of the second the last stage's rows leave a remainder
@pytest.mark.parametrize(
    ("name", "prefix", "reference"),
    [("swin", "swin", swin_block), ("donut-swin", "donut", donut_block), ("swinv2", "swinv2", swinv2_block)],
)
@torch.no_grad()
def test_prompts_are_tokens_of_every_window(name, prefix, reference, size):
    """The whole model in plain torch: windows, shifts, positions and prompts; embedding and merging are its own."""
    base = tiny(name).model()
    model = adapted(base)
    prompts = prompts_of(model)
    backbone = getattr(base, prefix)
    x, (height, width) = backbone.embeddings(tiny(name).arguments(2, size)["pixel_values"])
    for stage_number, stage in enumerate(backbone.encoder.layers):
        x = x.unflatten(1, (height, width))
        for number, block in enumerate(stage.blocks):
            path = f"{prefix}.encoder.layers.{stage_number}.blocks.{number}"
            window, shift = 2, number % 2  # half of the window, in every other block
            assert min(height, width) > window  # else windows are not shifted
            x = reference(block, prompts.pop(path), x, window, shift)
        x = x.flatten(1, 2)
        if stage.downsample is not None:
            x = stage.downsample(x, (height, width))
            height, width = (height + 1) // 2, (width + 1) // 2
    assert not prompts
    norm = getattr(backbone, "layernorm", nn.Identity())  # Donut's has none
    logits = base.classifier(norm(x).mean(dim=1))
    assert_same(outputs(name, model, size=size), [logits])


@torch.no_grad()
def test_prompts_are_tokens_of_every_window_in_timm():
    base = tiny("timm_swin").model()
    model = adapted(base)
    prompts = prompts_of(model)
    x = base.patch_embed(tiny("timm_swin").arguments(2)["pixel_values"])
    for stage_number, stage in enumerate(base.layers):
        x = stage.downsample(x)
        for number, block in enumerate(stage.blocks):
            x = timm_block(block, prompts.pop(f"layers.{stage_number}.blocks.{number}"), x, 2, number % 2)
    assert not prompts
    assert_same(outputs("timm_swin", model), [base.head.fc(base.norm(x).mean(dim=(1, 2)))])


# ---- what holds for all ------------------------------------------------------------------------------------------


def attentions(model: nn.Module) -> list[nn.Module]:
    """Modules with a projection to queries that do not use transformers' interface."""
    found = []
    for module in model.modules():
        query = next((name for name in ("qkv", "query", "q_proj") if getattr(module, name, None) is not None), None)
        if query is not None and not has_interface(module):
            assert attention_of(module, query) is module
            found.append(module)
    return found


def check_unseen_tokens(model: nn.Module, call: Callable[[nn.Module], Any]) -> None:
    """A module that is watched gives its own output: where nothing happens, and where nobody attends to the tokens."""
    seen = []

    def check(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        kept: list[Tensor] = []

        def join(key: Tensor) -> tuple[Tensor, Tensor]:
            depth = kept[1].shape[-1]
            return torch.randn(*key.shape[:-2], COUNT, key.shape[-1]), torch.randn(*key.shape[:-2], COUNT, depth)

        def hide(logits: Tensor) -> Tensor:
            assert logits.shape[-1] == kept[0].shape[-2] + COUNT
            return torch.cat([logits[..., :-COUNT], logits[..., -COUNT:] - 1e4], dim=-1)

        def nothing(*args: Any) -> None:
            return None

        def keep(*pair: Tensor) -> None:
            kept.extend(pair)

        forward = partial(type(module).forward, module)
        for acts in (Acts(nothing, nothing, keep, nothing), Acts(join, lambda: hide, nothing, nothing)):
            found = intercepted(module, acts, forward, args, kwargs)
            assert type(found) is type(output)
            shown = tensors_of(found)
            shown[1:] = [x[..., : y.shape[-1]] for x, y in zip(shown[1:], tensors_of(output)[1:], strict=True)]
            assert_same(shown, tensors_of(output), 1e-6 if acts.join is nothing else 1e-5)
        seen.append(module)

    for module in attentions(model):
        module.register_forward_hook(check, with_kwargs=True)
    call(model)
    assert seen


@pytest.mark.parametrize("name", OWN_FORWARD)
@torch.no_grad()
def test_unseen_tokens_change_nothing(name):
    check_unseen_tokens(tiny(name).model(), partial(outputs, name))


@pytest.mark.parametrize("name", ["swinv2", "donut-swin", "hiera", "vitdet", "timesformer"])
@torch.no_grad()
def test_attention_maps_with_unseen_tokens(name):
    model = next(m for m in tiny(name).model().modules() if isinstance(m, PreTrainedModel))
    arguments = tiny(name).arguments(2) | {"output_attentions": True}
    check_unseen_tokens(model, lambda model: model(**arguments))


@torch.no_grad()
def test_maps_of_eager_sam_with_unseen_tokens():
    config = SamVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        window_size=3,
        global_attn_indexes=[1],
        output_channels=8,
        attn_implementation="eager",
    )
    model = SamVisionModel(config).eval()
    assert "Sdpa" not in "".join(type(module).__name__ for module in model.modules())
    check_unseen_tokens(model, lambda model: model(torch.randn(2, 3, 32, 32)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("swin_tiny_patch4_window7_224", {"window_size": 2, "embed_dim": 8, "depths": (2,), "num_heads": (2,)}),
        ("maxvit_nano_rw_256", {"img_size": 64, "embed_dim": (32,), "depths": (1,), "stem_width": 8}),
        ("eva_giant_patch14_224", {"depth": 1, "embed_dim": 16, "num_heads": 2}),  # biases of queries and values
        ("eva02_tiny_patch14_224", {"depth": 1, "embed_dim": 16, "num_heads": 2}),  # projections not fused
        ("eva02_base_patch14_224", {"depth": 1, "embed_dim": 16, "num_heads": 2}),  # a norm behind attention
        ("vit_small_patch16_rope_mixed_224", {"depth": 1, "embed_dim": 16, "num_heads": 2}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@torch.no_grad()
def test_kinds_of_timm_attention_with_unseen_tokens(architecture, fields, fused):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    if "img_size" not in fields:
        fields = fields | {"img_size": 28 if "patch14" in architecture else 32}
    model = timm.create_model(architecture, num_classes=3, **fields).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    check_unseen_tokens(model, lambda model: model(torch.randn(2, 3, fields["img_size"], fields["img_size"])))


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_images_see_their_own_tokens(name):
    """Prompts may differ from image to image, as dropout makes them: every window gets those of its image."""
    model = adapted(tiny(name).model())
    several = torch.Generator().manual_seed(5)
    for module in model.modules():
        if "vpt_tokens" in module._modules:
            prompts = module.vpt_tokens["default"].prompts
            own = prompts + torch.randn(2, *prompts.shape, generator=several)
            module.vpt_tokens["default"].forward = lambda batch, own=own: own[chosen]
    arguments = tiny(name).arguments(2)
    chosen = slice(None)
    together = tensors_of(tiny(name).call(model, arguments))
    for image in range(2):
        chosen = slice(image, image + 1)
        alone = {key: x[chosen] if isinstance(x, Tensor) else x for key, x in arguments.items()}
        assert_same([x[chosen] for x in together], tensors_of(tiny(name).call(model, alone)))


@pytest.mark.parametrize("name", ALL)
def test_every_prompt_is_trained(name):
    model = adapted(tiny(name).model())
    torch.stack([x.square().mean() for x in outputs(name, model)]).sum().backward()
    prompts = prompts_of(model)
    assert prompts
    for path, prompt in prompts.items():
        assert (prompt.grad.abs().amax(dim=1) > 0).all(), path


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_unload_leaves_nothing(name):
    base = tiny(name).model()
    before = outputs(name, base)
    model = adapted(base)
    with model.disable_adapter():
        assert all(map(torch.equal, outputs(name, model), before))
    unloaded = model.unload()
    assert not any("forward" in vars(module) for module in unloaded.modules())
    assert all(map(torch.equal, outputs(name, unloaded), before))


@pytest.mark.parametrize("name", ["swinv2", "sam", "timm_maxvit"])
@torch.no_grad()
def test_forward_that_was_set_before_is_put_back(name):
    base = tiny(name).model()
    calls = []
    for module in attentions(base):
        own = module.forward
        module.forward = lambda *args, own=own, **kwargs: (calls.append(1), own(*args, **kwargs))[1]
    forwards = {path: vars(module)["forward"] for path, module in base.named_modules() if "forward" in vars(module)}
    torch.manual_seed(0)
    model = get_peft_model(base, VPTConfig(num_virtual_tokens=COUNT))
    calls.clear()  # of the look at what is read
    with model.disable_adapter():
        outputs(name, model.eval())
    assert len(calls) == len(forwards)
    unloaded = model.unload()
    for path, forward in forwards.items():
        assert vars(unloaded.get_submodule(path))["forward"] is forward


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_copies_are_independent(name):
    model = adapted(tiny(name).model())
    before = outputs(name, model)
    other = copy.deepcopy(model)
    for prompt in prompts_of(other).values():
        prompt.add_(1.0)
    assert all(map(torch.equal, outputs(name, model), before))
    assert not all(map(torch.equal, outputs(name, other), before))


@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_half_precision(name, cast):
    """Under autocast, or as bfloat16 altogether, the result is that of float32 to the precision of bfloat16."""
    model = adapted(tiny(name).model())
    exact = outputs(name, model)
    if not cast:
        model.to(torch.bfloat16)
    arguments = tiny(name).arguments(2)
    if not cast:
        arguments["pixel_values"] = arguments["pixel_values"].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
        found = tensors_of(tiny(name).call(model, arguments))
    for a, b in zip(found, exact, strict=True):
        assert cast or a.dtype == torch.bfloat16
        assert (a - b).norm() <= 0.1 * b.norm()


@pytest.mark.parametrize("name", ["swin", "swinv2", "donut-swin", "hiera", "sam", "vitdet", "timesformer"])
def test_gradient_checkpointing(name):
    model = adapted(tiny(name).model())
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            next(m for m in model.modules() if isinstance(m, PreTrainedModel)).gradient_checkpointing_enable()
            model.train()
        model.zero_grad()
        torch.manual_seed(0)
        torch.stack([x.square().mean() for x in outputs(name, model)]).sum().backward()
        gradients.append([prompt.grad.clone() for prompt in prompts_of(model).values()])
    assert_same(*gradients)


@pytest.mark.parametrize("name", ["swin", "swinv2"])
@torch.no_grad()
def test_compiles(name):
    model = adapted(tiny(name).model())
    expected = outputs(name, model)
    assert_same(outputs(name, torch.compile(model, backend="eager")), expected)


@pytest.mark.parametrize("name", ["swin", "swinv2", "timm_swin", "hiera", "timm_dinov3"])
def test_shallow_prompts_are_refused(name):
    with pytest.raises(ValueError, match=r"from block to block.*deep=True"):
        adapted(tiny(name).model(), deep=False)
