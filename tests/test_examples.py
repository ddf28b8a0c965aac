"""Inputs for towers that take packed patches or tiles, the tower of a multimodal model, and what cannot be run."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hf_visual_peft import AdaptFormerConfig, find_backbone
from hf_visual_peft.backbones.backbone import BackboneError, NotRunError
from hf_visual_peft.backbones.examples import image_of, named_for, of_samples
from hf_visual_peft.backbones.probing import probe


_WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWERS = {
    "Mllama": (
        {
            **_WIDTHS,
            "attention_heads": 2,
            "num_global_layers": 1,
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
            "image_size": 28,
            "patch_size": 14,
        },
        {"pixel_values": (1, 1, 2, 3, 28, 28), "aspect_ratio_ids": (1, 1), "aspect_ratio_mask": (1, 1, 2)},
    ),
    "Gemma4": (
        {**_WIDTHS, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2},
        {"pixel_values": (1, 64, 48), "pixel_position_ids": (1, 64, 2)},
    ),
    "Cosmos3Edge": ({**_WIDTHS, "patch_size": 4, "num_patches": 64}, {"pixel_values": None, "grid_thw": (1, 3)}),
}


def tower(name: str) -> nn.Module:
    module = pytest.importorskip(f"transformers.models.{_folder(name)}.modeling_{_folder(name)}")
    cls = getattr(module, f"{name}VisionModel")
    torch.manual_seed(0)
    return cls(cls.config_class(**TOWERS[name][0])).eval()


def _folder(name: str) -> str:
    return {"Cosmos3Edge": "cosmos3_edge"}.get(name, name.lower())


@pytest.mark.parametrize("name", TOWERS)
def test_towers_of_packed_patches_and_tiles_run(name):
    model = tower(name)
    made = image_of(model)
    shapes = TOWERS[name][1]
    assert set(made) == set(shapes)
    for key, shape in shapes.items():
        assert shape is None or tuple(made[key].shape) == shape
    model(**made)
    found = find_backbone(model)
    assert found.path == ""
    assert len(found.blocks) >= 2


def test_inputs_get_the_names_of_the_model_around():
    def qwen(pixel_values, image_grid_thw=None): ...

    def gemma(pixel_values, image_position_ids=None): ...

    grid, places, pixels = torch.ones(1, 3), torch.ones(1, 4, 2), torch.ones(4, 5)
    assert set(named_for(qwen, {"hidden_states": pixels, "grid_thw": grid})) == {"pixel_values", "image_grid_thw"}
    named = named_for(gemma, {"pixel_values": pixels, "pixel_position_ids": places})
    assert named["image_position_ids"] is places
    assert named["pixel_values"] is pixels


def test_the_vision_part_is_taken_and_not_the_language_model():
    """Even where nothing in the tower shows that it takes images: its patches come as vectors, under another name."""
    exaone = pytest.importorskip("transformers.models.exaone4_5.modeling_exaone4_5")
    config = exaone.Exaone4_5_Config(
        text_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": 99, "head_dim": 16, "model_type": "exaone4",
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "num_key_value_heads": 1,
            "out_hidden_size": 32, "patch_size": 4,
        },
        image_token_id=5, video_token_id=6,
    )  # fmt: skip
    model = exaone.Exaone4_5_ForConditionalGeneration(config).eval()
    assert find_backbone(model).path == "model.visual"


@pytest.mark.parametrize("side", [None, 64])
def test_a_model_without_a_vision_part_says_so(side):
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    if side is None:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=9))
    else:
        model = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=2, num_heads=2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BackboneError, match="none of its parts takes images alone"):
        get_peft_model(model, AdaptFormerConfig())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class _NeedsMore(nn.Module):
    """Needs a second argument that cannot be made."""

    def __init__(self, keyword_only: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList(_Residual(8, 8) for _ in range(2))
        if keyword_only:
            self.forward = self.named  # type: ignore[method-assign]

    def forward(self, images: torch.Tensor, calibration: torch.Tensor) -> torch.Tensor:
        x = self.stem(images).flatten(2).mT + calibration[:, None]
        for block in self.blocks:
            x = block(x)
        return x

    def named(self, images: torch.Tensor, *, calibration: torch.Tensor) -> torch.Tensor:
        return _NeedsMore.forward(self, images, calibration)


class _Residual(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(self.fc1(self.norm(x)).relu())


@pytest.mark.parametrize("keyword_only", [False, True])
def test_a_forward_that_cannot_be_run_says_what_it_wants(keyword_only):
    model = _NeedsMore(keyword_only)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(NotRunError, match=r"Its forward takes images, calibration.*example_inputs="):
        find_backbone(model)
    assert [name for name, _ in model.named_modules()] == names
    given = {"images": torch.randn(1, 3, 16, 16), "calibration": torch.ones(1, 8)}
    found = find_backbone(model, example_inputs=given)
    assert [block.sublayers for block in found.blocks] == [("mlp",)] * 2


class _TwoWidths(nn.Module):
    """Adds to a narrow stream, puts other channels beside it, and adds to the wide one."""

    def __init__(self, convolutions: bool) -> None:
        super().__init__()
        kind = _Convolutions if convolutions else _Residual
        self.dim = 1 if convolutions else -1
        self.narrow, self.wide = kind(8, 8), kind(12, 12)
        self.beside = nn.Conv2d(8, 4, 1) if convolutions else nn.Linear(8, 4)
        self.back = nn.Conv2d(12, 8, 1) if convolutions else nn.Linear(12, 8)
        self.first = kind(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, narrow, wide = self.first, self.narrow, self.wide
        x = x + (first(x) - x)
        x = torch.cat([x + narrow.fc2(narrow.fc1(narrow.norm(x)).relu()), self.beside(x)], dim=self.dim)
        return x + wide.fc2(wide.fc1(wide.norm(x)).relu())


class _Convolutions(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.BatchNorm2d(width), nn.Conv2d(width, 16, 1), nn.Conv2d(16, out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(self.fc1(self.norm(x)).relu())


class _Net(nn.Module):
    def __init__(self, convolutions: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList(_TwoWidths(convolutions) for _ in range(2))
        self.turns = nn.ModuleList(nn.Conv2d(12, 8, 1) if convolutions else nn.Linear(12, 8) for _ in range(2))
        self.convolutions = convolutions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x if self.convolutions else x.flatten(2).mT
        for block, turn in zip(self.blocks, self.turns, strict=True):
            x = turn(block(x))
        return x


@pytest.mark.parametrize("convolutions", [True, False])
def test_an_adapter_has_the_width_of_the_stream_that_it_adds_to(convolutions):
    torch.manual_seed(0)
    model = _Net(convolutions).eval()
    found = find_backbone(model)
    assert {block.width for block in found.blocks} == {12}
    assert all(block.sublayers == ("mlp",) for block in found.blocks)
    images = torch.randn(2, 3, 16, 16)
    before = model(images)
    adapted = get_peft_model(model, AdaptFormerConfig(r=2, modules_to_save=[], init_weights=False))
    assert not torch.equal(adapted(images), before)


def test_several_images_a_sample_are_probed():
    """A model that takes (samples, images, channels, height, width) shows which of its blocks it reads."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    text = {"model_type": "llama", "vocab_size": 99, "hidden_size": 16, "intermediate_size": 16}
    config = Idefics3Config(
        text_config={**text, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
        vision_config={**_WIDTHS, "image_size": 16, "patch_size": 4},
        scale_factor=2,
        image_token_id=5,
        pad_token_id=0,
    )
    model = Idefics3ForConditionalGeneration(config).eval()
    seen = probe(model, ["model.vision_model.encoder.layers.1", "lm_head"], "model.vision_model")
    assert seen is not None
    assert "model.vision_model.encoder.layers.1" in seen.read
    assert "lm_head" not in seen.read


@pytest.mark.parametrize(("images", "shape"), [((2, 3, 8, 8), (2, 1, 3, 8, 8)), ((4, 5), None)])
def test_only_images_become_those_of_samples(images, shape):
    made = of_samples({"pixel_values": torch.ones(images), "grid": torch.ones(1, 3)})
    assert (None if made is None else tuple(made["pixel_values"].shape)) == shape
