"""Videos in models for images: the way frames take, and ST-Adapter and AIM against their equations in plain torch."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from equations import assert_equal, both, weights_of
from families import DEPTH, FAMILIES, PATCH, SIZE, WIDTH
from peft import PeftModel, get_peft_model
from plain import plain_parts
from transformers import ViTConfig, ViTForImageClassification

from hf_visual_peft import AIMConfig, STAdapterConfig, find_backbone
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.methods.adapter import aim
from hf_visual_peft.methods.adapter.aim import Temporal
from hf_visual_peft.methods.adapter.st_adapter import STAdapter
from hf_visual_peft.sites import TokenLayout


CONFIGS = (STAdapterConfig(channels=6), AIMConfig())
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
PATCHES = (SIZE // PATCH) ** 2


def videos(batch, frames):
    generator = torch.Generator().manual_seed(batch * 100 + frames)
    return torch.randn(batch, frames, 3, SIZE, SIZE, generator=generator)


def adapted(name, config, frames=3):
    """Plain parts of the base model with the frames of two videos, the adapted model, and the family."""
    family = FAMILIES[name]
    pixels = videos(2, frames)
    parts = plain_parts(name, family.model(), pixels.flatten(0, 1))
    torch.manual_seed(3)
    model = get_peft_model(family.model(), dataclasses.replace(config, init_weights=False)).eval()
    return parts, model, model(pixels).logits, family


def logits_of(name, model, tokens, frames=3, norm=None):
    """What the task head makes of the tokens of all frames, averaged over each video's, or those of means."""
    head = model.get_base_model().classifier.modules_to_save.default
    if norm is not None:
        tokens, frames = norm(tokens.unflatten(0, (2, frames)).mean(1)), 1
    cls = tokens[:, 0]
    if name != "vit":  # DINOv2 classifies by CLS and the mean of the patches
        cls = torch.cat([cls, tokens[:, FAMILIES[name].prefix :].mean(1)], dim=-1)
    return cls.view(2, frames, -1).mean(1) @ head.weight.T + head.bias


@both
@pytest.mark.parametrize("frames", [1, 3])
@torch.no_grad()
def test_frames_go_through_the_model_as_images(name, frames):
    """Adapters that add nothing: the head sees the mean over frames, of what the final norm reads or returns."""
    family = FAMILIES[name]
    pixels = videos(2, frames)
    blocks, x, norm = plain_parts(name, family.model(), pixels.flatten(0, 1))
    for block in blocks:
        x = x + block.attention(block.norm(1, x))
        x = x + block.mlp(block.norm(2, x))
    model = get_peft_model(family.model(), AIMConfig()).eval()
    assert_equal(model(pixels).logits, logits_of(name, model, norm(x), frames))
    earlier = get_peft_model(family.model(), STAdapterConfig(channels=6)).eval()
    assert_equal(earlier(pixels).logits, logits_of(name, earlier, x, frames, norm))
    same = torch.allclose(logits_of(name, earlier, x, frames, norm), logits_of(name, earlier, norm(x), frames))
    assert same == (frames == 1)


def st_adapter(x, w, frames, prefix):
    """Patch by patch: what an image has at a place, joined with what the frames before and after it have there."""
    t = (x[:, prefix:] @ w["down.weight"].T + w["down.bias"]).view(-1, frames, PATCHES, w["down.bias"].numel())
    kernel = w["conv.weight"].view(-1, 3)
    out = torch.zeros_like(t) + w["conv.bias"]
    for now in range(frames):
        for tap, other in enumerate((now - 1, now, now + 1)):
            if 0 <= other < frames:
                out[:, now] += kernel[:, tap] * t[:, other]
    delta = out.flatten(0, 1) @ w["up.weight"].T + w["up.bias"]
    return torch.cat([x[:, :prefix], x[:, prefix:] + delta], dim=1)


@both
@pytest.mark.parametrize("sublayers", [("attention",), ("mlp",), ("attention", "mlp")], ids=str)
@torch.no_grad()
def test_st_adapter(name, sublayers):
    (blocks, x, norm), model, actual, family = adapted(name, STAdapterConfig(channels=6, sublayers=sublayers))
    before = {sublayer: weights_of(model, f"stadapter_{sublayer}") for sublayer in ("attention", "mlp")}
    assert {sublayer for sublayer, found in before.items() if found} == set(sublayers)
    for index, block in enumerate(blocks):
        if "attention" in sublayers:
            x = st_adapter(x, before["attention"][index], 3, family.prefix)
        x = x + block.attention(block.norm(1, x))
        if "mlp" in sublayers:
            x = st_adapter(x, before["mlp"][index], 3, family.prefix)
        x = x + block.mlp(block.norm(2, x))
    assert_equal(actual, logits_of(name, model, x, norm=norm))


@pytest.mark.parametrize("path", [name for name, family in FAMILIES.items() if family.classifier])
@torch.no_grad()
def test_frames_meet_once_before_norms_or_heads(path):
    """Whichever order a model has of pooling, norm and head, and however many of these there are."""
    family = FAMILIES[path]
    if family.name == "siglip2":
        pytest.skip("has no grid of its own: refused")
    base = family.model()
    backbone = find_backbone(base)
    seen = {}
    model = get_peft_model(base, STAdapterConfig(channels=4)).eval()

    def watch(name, module):
        def note(module, args):
            seen[name] = len(args[0])

        module.register_forward_pre_hook(note)

    for name in (*backbone.final_norms, *backbone.heads):
        module = model.get_base_model().get_submodule(name)
        for each in module.modules_to_save.values() if hasattr(module, "modules_to_save") else (module,):
            watch(name, each)
    assert model(videos(2, 3)).logits.shape[0] == 2
    assert set(seen.values()) == {2}
    assert set(backbone.heads) & set(seen)


@pytest.mark.parametrize(
    ("sublayers", "count"), [(("attention",), 7_110_144), (("mlp",), 7_110_144), (("attention", "mlp"), 14_220_288)]
)
def test_st_adapter_count(sublayers, count):
    """ViT-B: 768 x 384 + 384, 384 x 3 + 384, 384 x 768 + 768: 592,512 an adapter."""
    with torch.device("meta"):
        vit = ViTForImageClassification(ViTConfig())
    model = get_peft_model(vit, STAdapterConfig(sublayers=sublayers))
    assert sum(p.numel() for name, p in model.named_parameters() if "stadapter_" in name) == count


def test_st_adapter_initialisation():
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), STAdapterConfig())
    blocks = weights_of(model, "stadapter_attention")
    assert len(blocks) == DEPTH
    for w in blocks.values():
        assert w["down.weight"].shape == (384, WIDTH)  # wider than the backbone, as the paper's number is
        assert w["conv.weight"].shape == (384, 1, 3, 1, 1)
        assert not any(w[zero].any() for zero in ("down.bias", "conv.weight", "conv.bias", "up.bias"))
        assert 0.9 * WIDTH**-0.5 < w["down.weight"].abs().max() <= WIDTH**-0.5
        assert 0.9 * 384**-0.5 < w["up.weight"].abs().max() <= 384**-0.5


def bottleneck(x, w, name=""):
    name = f"{name}." if name else ""
    hidden = F.gelu(x @ w[f"{name}down.weight"].T + w[f"{name}down.bias"])
    return hidden @ w[f"{name}up.weight"].T + w[f"{name}up.bias"]


@both
@pytest.mark.parametrize("num_frames", [None, 5])
@torch.no_grad()
def test_aim(name, num_frames):
    (blocks, x, norm), model, actual, family = adapted(name, AIMConfig(num_frames=num_frames, scale=0.7))
    found = {slot: weights_of(model, f"aim_{slot}") for slot in ("temporal", "spatial", "joint")}
    tokens = family.prefix + PATCHES
    for index, block in enumerate(blocks):
        temporal = found["temporal"][index]
        assert ("embedding" in temporal) == (num_frames is not None and index == 0)
        if "embedding" in temporal:
            assert temporal["embedding"].shape == (5, 1, WIDTH)
            x = (x.view(2, 3, tokens, WIDTH) + temporal["embedding"][:3]).view(-1, tokens, WIDTH)
        scale, block.scale1 = block.scale1, 1.0  # attention over frames is without layer scale
        by_place = x.view(2, 3, tokens, WIDTH)
        mixed = torch.zeros_like(by_place)
        for video in range(2):
            for place in range(tokens):
                sequence = by_place[video, :, place][None]
                mixed[video, :, place] = block.attention(block.norm(1, sequence))[0]
        block.scale1 = scale
        x = x + bottleneck(mixed.flatten(0, 1), temporal, "adapter")
        a = block.attention(block.norm(1, x))
        x = x + a + bottleneck(a, found["spatial"][index])
        n = block.norm(2, x)
        x = x + block.mlp(n) + 0.7 * bottleneck(n, found["joint"][index], "adapter")
    assert_equal(actual, logits_of(name, model, norm(x)))


def test_aim_initialisation():
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["vit"].model(), AIMConfig(ratio=1.0, num_frames=4))
    for slot, prefix in (("temporal", "adapter."), ("spatial", ""), ("joint", "adapter.")):
        blocks = weights_of(model, f"aim_{slot}")
        assert len(blocks) == DEPTH
        for w in blocks.values():
            assert not any(w[f"{prefix}{zero}"].any() for zero in ("down.bias", "up.weight", "up.bias"))
            assert w[f"{prefix}down.weight"].std().item() == pytest.approx(0.02, rel=0.2)
    assert not weights_of(model, "aim_temporal")[0]["embedding"].any()
    small = weights_of(get_peft_model(FAMILIES["vit"].model(), AIMConfig()), "aim_joint")
    assert small[0]["adapter.down.weight"].shape == (WIDTH // 4, WIDTH)


@torch.no_grad()
def test_order_of_frames_matters_where_the_paper_has_it_matter():
    pixels = videos(2, 3)
    for config, matters in (
        (STAdapterConfig(channels=6, init_weights=False), True),
        (AIMConfig(init_weights=False), False),
        (AIMConfig(num_frames=3, init_weights=False), True),
    ):
        torch.manual_seed(0)
        model = get_peft_model(FAMILIES["vit"].model(), config).eval()
        same = torch.allclose(model(pixels).logits, model(pixels.flip(1)).logits, atol=1e-4)
        assert same != matters


@every_config
@torch.no_grad()
def test_videos_of_a_batch_do_not_mix(config):
    model = get_peft_model(FAMILIES["vit"].model(), dataclasses.replace(config, init_weights=False)).eval()
    pixels = videos(2, 3)
    together = model(pixels).logits
    for index in range(2):
        assert_equal(model(pixels[index : index + 1]).logits, together[index : index + 1])


@every_config
@torch.no_grad()
def test_calls_with_other_numbers_of_frames(config):
    """What a model is fed with in between leaves no trace."""
    model = get_peft_model(FAMILIES["vit"].model(), dataclasses.replace(config, init_weights=False)).eval()
    four, one = videos(3, 4), videos(2, 1)
    first = model(four).logits
    assert first.shape == (3, 3)
    assert model(pixel_values=one).logits.shape == (2, 3)
    assert torch.equal(model(pixel_values=four).logits, first)


@every_config
@pytest.mark.parametrize("name", ["vit", "deit", "beit", "clip", "siglip", "dinov2_registers"])
def test_labels_of_videos_give_a_loss(config, name):
    model = get_peft_model(FAMILIES[name].model(), dataclasses.replace(config, init_weights=False)).train()
    labels = torch.tensor([2, 0])
    out = model(pixel_values=videos(2, 3), labels=labels)
    assert out.logits.shape == (2, 3)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))
    out.loss.backward()
    head = [p for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n]
    assert head
    assert all(p.grad.any() for p in head)


@every_config
def test_images_are_refused(config):
    model = get_peft_model(FAMILIES["vit"].model(), copy.copy(config))
    for pixels in (torch.zeros(2, 3, SIZE, SIZE), torch.zeros(1, 2, 3, 3, SIZE, SIZE)):
        message = rf"pixel_values has shape \({', '.join(map(str, pixels.shape))}\).*\(batch, frames, channels, height"
        for call in (lambda p=pixels: model(p), lambda p=pixels: model(pixel_values=p)):
            with pytest.raises(ValueError, match=message):
                call()


@every_config
@torch.no_grad()
def test_unloading_gives_a_model_for_images_back(config):
    family = FAMILIES["vit"]
    base = family.model()
    before = base(**family.inputs(2)).logits
    model = get_peft_model(base, dataclasses.replace(config, init_weights=False))
    model(videos(2, 3))
    unloaded = model.unload()
    assert torch.equal(unloaded.eval()(**family.inputs(2)).logits, before)
    again = get_peft_model(unloaded, dataclasses.replace(config, init_weights=False))
    assert again(videos(2, 3)).logits.shape == (2, 3)


@every_config
@torch.no_grad()
def test_copies_have_frames_of_their_own(config, tmp_path):
    """Also of the head, which is copied to be trained."""
    model = get_peft_model(FAMILIES["vit"].model(), dataclasses.replace(config, init_weights=False)).eval()
    pixels = videos(2, 3)
    expected = model(pixels).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(FAMILIES["vit"].model(), tmp_path).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(other(pixels).logits, expected)
        other(videos(4, 5))
        assert torch.equal(model(pixels).logits, expected)


@every_config
def test_bare_backbones_give_every_frame(config):
    model = get_peft_model(FAMILIES["vit"].backbone(), copy.copy(config)).eval()
    assert model(videos(2, 3)).last_hidden_state.shape == (6, 1 + PATCHES, WIDTH)


@every_config
@pytest.mark.parametrize(
    ("name", "why"), [("siglip2", "each have their own grid"), ("vit_mae", "are masked at random")]
)
def test_backbones_without_one_grid_are_refused(config, name, why):
    model = FAMILIES[name].model()
    modules = {key: id(module) for key, module in model.named_modules()}
    with pytest.raises(ValueError, match=rf"{type(config).__name__} does not fit .*{why}: videos need images of one"):
        get_peft_model(model, copy.copy(config))
    assert modules == {key: id(module) for key, module in model.named_modules()}


@pytest.mark.parametrize("name", ["pvt", "sam2", "vitdet", "hiera"])
def test_attention_that_needs_a_grid_is_refused(name):
    model = MODELS[name].build().train()
    modules = {key: (id(module), module.training) for key, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"cannot serve other tokens than its own: \w+ does not run on three tokens"):
        get_peft_model(model, AIMConfig())
    assert modules == {key: (id(module), module.training) for key, module in model.named_modules()}


def test_aim_needs_the_number_of_heads():
    backbone = find_backbone(FAMILIES["vit"].model())
    blocks = tuple(dataclasses.replace(block, num_heads=None) for block in backbone.blocks)
    backbone = dataclasses.replace(backbone, blocks=blocks)
    with pytest.raises(ValueError, match="AIMConfig does not fit ViTModel: its config has no num_attention_h"):
        list(AIMConfig().placements(backbone))
    with pytest.raises(ValueError, match=r"ratio is 0.01: must be at least 1 / 16"):
        get_peft_model(FAMILIES["vit"].model(), AIMConfig(ratio=0.01))
    model = get_peft_model(FAMILIES["vit"].model(), AIMConfig(num_frames=2))
    with pytest.raises(ValueError, match=r"The videos have 3 frames, but num_frames is 2"):
        model(videos(1, 3))


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (STAdapterConfig, {"channels": 0}, r"STAdapterConfig.channels is 0: must be an integer from 1 to 100000"),
        (STAdapterConfig, {"sublayers": ("mhsa",)}, r"sublayers is .*'mhsa'.*'attention', 'mlp'"),
        (AIMConfig, {"ratio": 0}, r"AIMConfig.ratio is 0: must be a number above 0 and at most 1"),
        (AIMConfig, {"ratio": 1.5}, r"ratio is 1.5: must be a number above 0 and at most 1"),
        (AIMConfig, {"scale": None}, r"scale is None: must be a finite number"),
        (AIMConfig, {"num_frames": 0}, r"num_frames is 0: must be an integer from 1 to 10000"),
    ],
)
def test_fields_out_of_range(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_equations_alone_need_the_number_of_frames():
    x = torch.zeros(6, 5, WIDTH)
    for equation, args in ((STAdapter(WIDTH, 4), ()), (Temporal(WIDTH, 4, None), (lambda t: t,))):
        assert equation(x, TokenLayout(1, None, 3), *args).shape == x.shape
        with pytest.raises(ValueError, match="number of frames is not known: call the whole model"):
            equation(x, TokenLayout(1, None), *args)


@torch.no_grad()
def test_aim_drops_temporal_and_joint_branches_at_a_rate_of_its_own(monkeypatch):
    """It rises from block to block. Spatial branch, embedding of frames and the backbone are not dropped."""
    seen = []

    def watched(x, rate, training):
        seen.append((x.shape[0], rate, training))
        return 0 * x

    monkeypatch.setattr(aim, "drop_path", watched)
    config = AIMConfig(num_frames=3, drop_path=0.4, init_weights=False)
    model = get_peft_model(FAMILIES["vit"].model(), config).train()
    pixels = videos(2, 3)
    dropped = model(pixels).logits
    assert seen == [(6, 0.4 * index / (DEPTH - 1), True) for index in range(DEPTH) for _ in ("temporal", "joint")]
    for name, parameter in model.named_parameters():
        if "aim_" in name and "spatial" not in name and "embedding" not in name:
            parameter.zero_()
    assert_equal(model(pixels).logits, dropped)
    assert AIMConfig().drop_path == 0.2, "as in the authors' configs"
    with pytest.raises(ValueError, match=r"AIMConfig.drop_path is 1: must be a finite number"):
        AIMConfig(drop_path=1)


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("vit_tiny_patch16_224", {"qk_norm": True}),
        ("vit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True}),
        ("eva02_base_patch14_224", {}),  # a norm after attention, and rotation that other tokens do not get
        ("vit_small_patch16_rope_mixed_224", {}),
    ],
)
@torch.no_grad()
def test_aim_has_the_blocks_own_attention(architecture, fields):
    """With the norms of queries, keys and outputs that a module has, and without positions."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    size = 28 if "patch14" in architecture else 32
    model = timm.create_model(architecture, depth=1, embed_dim=16, num_heads=2, img_size=size, num_classes=3, **fields)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    (block,) = model.blocks
    x = torch.randn(4, 5, 16)
    expected = block.attn(block.norm1(x))
    seen = []
    adapted = get_peft_model(model.eval(), AIMConfig()).eval()
    for module in adapted.modules():
        if isinstance(module, Temporal):
            module.forward = lambda tokens, layout, attend: (seen.append(attend(x)), torch.zeros_like(tokens))[1]
    adapted(torch.randn(2, 3, 3, size, size))
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-6)
