"""Small configs of models: parts left out, lists by layer, what a config sets in its parts, and missing values."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedConfig, ViTConfig, ViTForImageClassification

from hf_visual_peft.coverage.shrinking import LAYERS, shrunken


class _Stages(PreTrainedConfig):
    model_type = "stages_of_nobody"

    def __init__(
        self,
        num_hidden_layers: int = 4,
        hidden_sizes: tuple[int, ...] = (64, 128, 256, 512),
        kernel_sizes: tuple[int, int] = (3, 5),
        feature_layers: tuple[int, ...] = (-2, 3, 1),
        kinds: list[str] | None = None,
        num_experts: int | None = None,
        head_dim: int | None = None,
        hidden_size: int = 64,
        num_attention_heads: int = 4,
        words: dict[str, int] | None = None,
        pad_token_id: int | None = None,
        rope_parameters: dict[str, Any] | None = None,
        layer_types: list[str] | None = None,
        told: int = 1,
        **kwargs: Any,
    ):
        self.num_hidden_layers, self.hidden_sizes, self.kernel_sizes = num_hidden_layers, hidden_sizes, kernel_sizes
        self.feature_layers, self.kinds = feature_layers, kinds or ["a"] * num_hidden_layers
        self.num_experts, self.head_dim, self.hidden_size = num_experts, head_dim, hidden_size
        self.num_attention_heads, self.words, self.told = num_attention_heads, words, told
        self.rope_parameters = rope_parameters
        self.layer_types = layer_types or ["full_attention"] * num_hidden_layers
        super().__init__(pad_token_id=pad_token_id, **kwargs)


class _Around(PreTrainedConfig):
    model_type = "around_of_nobody"

    def __init__(self, inner: Any = None, **kwargs: Any):
        self.inner = _Stages(told=7) if inner is None else _Stages(**{k: v for k, v in inner.items() if k[0] != "m"})
        super().__init__(**kwargs)


def test_lists_by_layer_and_numbers_of_layers_follow_the_number_of_layers():
    small = shrunken(_Stages)
    assert small.num_hidden_layers == LAYERS
    assert small.hidden_sizes == (64, 128)
    assert small.kernel_sizes == (3, 5)  # as long as there are layers in the small one, which is chance
    assert small.feature_layers == (0, 1, 1)
    assert small.kinds == ["a"] * LAYERS  # made by the config itself
    assert shrunken(_Stages, layers=None).hidden_sizes == (64, 128, 256, 512)


def test_what_the_config_around_sets_in_a_part_stays():
    assert shrunken(_Around).inner.told == 7
    assert shrunken(_Around).inner.num_hidden_layers == LAYERS


def test_missing_values_are_given_only_where_asked_for():
    plain, full = shrunken(_Stages), shrunken(_Stages, complete=True)
    assert (plain.words, plain.num_experts, plain.head_dim) == (None, None, None)
    assert (full.words, full.num_experts, full.head_dim) == ({}, LAYERS, 16)
    assert full.hidden_sizes == [64, 128]  # as in a file
    assert full.pad_token_id is None  # not a size of anything
    assert set(full.rope_parameters) == {"full_attention"}
    assert full.num_hidden_layers == LAYERS


def test_a_complete_config_of_a_usual_model_still_builds_it():
    model = ViTForImageClassification(shrunken(ViTConfig, 32, 4, complete=True))
    assert len(model.vit.encoder.layer if hasattr(model.vit, "encoder") else model.vit.layers) == LAYERS


def test_a_part_that_reads_pictures_is_filled_in_and_no_other():
    gemma = pytest.importorskip("transformers.models.gemma4.configuration_gemma4")
    small = shrunken(gemma.Gemma4Config)
    assert small.vision_config is not None
    assert small.vision_config.num_hidden_layers == LAYERS
    assert small.audio_config is None
