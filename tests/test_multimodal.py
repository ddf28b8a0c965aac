"""The vision towers of multimodal models: they are adapted, and the language model never by accident."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model

import hf_visual_peft as hvp


VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
VIT |= {"image_size": 32, "patch_size": 8}
WORDS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
WORDS |= {"vocab_size": 64, "pad_token_id": 0}
TEXT = WORDS | {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
QUERIES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
QUERIES |= {"encoder_hidden_size": 16, "vocab_size": 64}


def _of(name, generation="ForConditionalGeneration", **fields):
    def make():
        return getattr(tf, f"{name}{generation}")(getattr(tf, f"{name}Config")(**fields))

    return make


def _image():
    return {"pixel_values": torch.randn(1, 3, 32, 32)}


def _with_words():
    return _image() | {"input_ids": torch.tensor([[1, 3, 2]])}


def _among_words():
    """Four of six words stand for the image."""
    mask = torch.tensor([[0, 1, 1, 1, 1, 0]], dtype=torch.bool)
    return _image() | {"input_ids": torch.tensor([[1, 3, 4, 5, 6, 2]]), "image_embeds_position_mask": mask}


def _tiles():
    return {"pixel_values": torch.randn(1, 2, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]])}


def _patches():
    mask = torch.ones(1, 16, dtype=torch.long)
    return {
        "pixel_values": torch.randn(1, 16, 192),
        "spatial_shapes": torch.tensor([[4, 4]]),
        "pixel_attention_mask": mask,
    }


def _frames():
    return {"pixel_values": torch.randn(1, 1, 3, 32, 32)}


def _sized():
    return _image() | {"image_sizes": torch.tensor([[32, 32]])}


def _packed():
    """Patches of 8 x 8 pixels and two frames, of one image."""
    return {"pixel_values": torch.randn(16, 3 * 2 * 8 * 8), "image_grid_thw": torch.tensor([[1, 4, 4]])}


CLIP, SIGLIP = tf.CLIPVisionConfig(**VIT), tf.SiglipVisionConfig(**VIT, projection_dim=16)
NAFLEX = tf.Siglip2VisionConfig(**{k: v for k, v in VIT.items() if k != "image_size"}, num_patches=16)
LLAMA, QWEN, COHERE = tf.LlamaConfig(**TEXT), tf.Qwen2Config(**TEXT), tf.Cohere2Config(**TEXT)
OPT = tf.OPTConfig(**{k: v for k, v in WORDS.items() if k != "intermediate_size"}, ffn_dim=16, word_embed_proj_dim=16)
BERT = WORDS | {"encoder_hidden_size": 16, "bos_token_id": 1, "sep_token_id": 2}
RESAMPLER = {"hidden_size": 16, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2}
RESAMPLER |= {"resampler_head_dim": 8, "num_key_value_heads": 1}
PAINTER = {"embed_dim": 8, "num_embeddings": 16, "base_channels": 32, "channel_multiplier": [1, 1], "num_patches": 4}
PAINTER |= {"num_res_blocks": 1, "latent_channels": 32, "projection_dim": 16, "image_token_embed_dim": 16}
PACKED = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 16, "num_heads": 2}
PACKED |= {"patch_size": 8}
ROTARY = TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
TILED = {"image_grid_pinpoints": [[32, 32]]}
LAST = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}

# model, its inputs, and the path of its tower
MODELS = {
    "llava": (_of("Llava", vision_config=CLIP, text_config=LLAMA), _image, "model.vision_tower"),
    "llava_siglip": (_of("Llava", vision_config=SIGLIP, text_config=LLAMA, **LAST), _image, "model.vision_tower"),
    "vipllava": (_of("VipLlava", vision_config=CLIP, text_config=LLAMA, vision_feature_layers=[-2, -1]), _image,
                 "model.vision_tower"),
    "llava_next": (_of("LlavaNext", vision_config=CLIP, text_config=LLAMA, **TILED), _tiles, "model.vision_tower"),
    "llava_onevision": (_of("LlavaOnevision", vision_config=SIGLIP, text_config=QWEN, **TILED), _tiles,
                        "model.vision_tower"),
    "paligemma": (_of("PaliGemma", vision_config=SIGLIP, text_config=tf.GemmaConfig(**TEXT)), _image,
                  "model.vision_tower"),
    "gemma3": (_of("Gemma3", vision_config=VIT, text_config=TEXT, mm_tokens_per_image=4), _image,
               "model.vision_tower"),
    "blip": (_of("Blip", vision_config=VIT, text_config=BERT, projection_dim=16), _with_words, "vision_model"),
    "blip2": (_of("Blip2", vision_config=VIT, qformer_config=QUERIES, text_config=OPT, num_query_tokens=4), _image,
              "vision_model"),
    "instructblip": (_of("InstructBlip", vision_config=VIT, qformer_config=QUERIES, text_config=OPT,
                         num_query_tokens=4),
                     lambda: _image() | {"qformer_input_ids": torch.tensor([[1, 2]])}, "vision_model"),
    "aya_vision": (_of("AyaVision", vision_config=SIGLIP, text_config=COHERE, vision_feature_layer=-1,
                       downsample_factor=2, adapter_layer_norm_eps=1e-6), _image, "model.vision_tower"),
    "cohere2_vision": (_of("Cohere2Vision", vision_config=SIGLIP, text_config=COHERE, downsample_factor=2,
                           alignment_intermediate_size=32), _image, "model.vision_tower"),
    "deepseek_vl": (_of("DeepseekVL", vision_config=SIGLIP, text_config=LLAMA), _image, "model.vision_model"),
    "lfm2_vl": (_of("Lfm2Vl", vision_config=NAFLEX, text_config=tf.Lfm2Config(**TEXT, layer_types=["full_attention"]),
                    downsample_factor=2, projector_hidden_size=16), _patches, "model.vision_tower"),
    "idefics2": (_of("Idefics2", vision_config=VIT, text_config=tf.MistralConfig(**TEXT), perceiver_config=RESAMPLER),
                 _frames, "model.vision_model"),
    "idefics3": (_of("Idefics3", vision_config=VIT, text_config=LLAMA, scale_factor=2), _frames, "model.vision_model"),
    "smolvlm": (_of("SmolVLM", vision_config=VIT, text_config=LLAMA, scale_factor=2), _frames, "model.vision_model"),
    "internvl": (_of("InternVL", vision_config=VIT | {"image_size": [32, 32], "patch_size": [8, 8]}, text_config=QWEN),
                 _image, "model.vision_tower"),
    "mistral3": (_of("Mistral3", vision_config=tf.PixtralVisionConfig(**VIT), text_config=tf.MistralConfig(**TEXT),
                     spatial_merge_size=2), _sized, "model.vision_tower"),
    "janus": (_of("Janus", vision_config=VIT | {"projection_dim": 16, "mlp_ratio": 2, "depth": 2}, text_config=LLAMA,
                  vq_config=PAINTER), _image, "model.vision_model"),
    "git": (_of("Git", "ForCausalLM", vision_config=VIT, **WORDS), _with_words, "git.image_encoder"),
    "ovis2": (_of("Ovis2", text_config=QWEN, visual_indicator_token_ids=[5, 6], vocab_size=64, hidden_size=16,
                  vision_config=VIT | {"vocab_size": 32, "hidden_stride": 1, "num_visual_indicator_tokens": 2}),
              _image, "model.vision_tower"),
    "chinese_clip": (_of("ChineseCLIP", "Model", vision_config=VIT, text_config=WORDS, projection_dim=8), _image,
                     "vision_model"),
    "qwen2_vl": (_of("Qwen2VL", text_config=ROTARY, vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16,
                     "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}), _packed, "model.visual"),
    "qwen2_5_vl": (_of("Qwen2_5_VL", text_config=ROTARY, vision_config=PACKED | {"window_size": 32,
                       "fullatt_block_indexes": [1]}), _packed, "model.visual"),
    "qwen3_vl": (_of("Qwen3VL", text_config=TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                     "mrope_section": [2, 1, 1]}}, vision_config=PACKED | {"num_position_embeddings": 16,
                     "deepstack_visual_indexes": [0]}), _packed, "model.visual"),
    "glm4v": (_of("Glm4v", text_config=TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                  "mrope_section": [1, 1, 2]}}, vision_config=PACKED | {"out_hidden_size": 16, "image_size": 32}),
              _packed, "model.visual"),
    "kosmos2": (_of("Kosmos2", text_config={"vocab_size": 64, "embed_dim": 16, "layers": 1, "ffn_dim": 16,
                    "attention_heads": 2, "max_position_embeddings": 64}, vision_config=VIT, latent_query_num=4),
                _among_words, "vision_model"),
    "florence2": (_of("Florence2", text_config={"d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
                      "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "vocab_size": 64,
                      "decoder_attention_heads": 2}, vision_config={"embed_dim": [8, 16], "num_heads": [1, 2],
                      "num_groups": [1, 2], "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2],
                      "patch_padding": [3, 1], "patch_prenorm": [False, True], "window_size": 4,
                      "projection_dim": 16}), _image, "model.vision_tower"),
}  # fmt: skip


def numbers(value):
    """All floating tensors in an output, flat."""
    if isinstance(value, torch.Tensor):
        return [value.flatten().float()] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in numbers(part)]


def features(model, inputs):
    """What the language model gets to see of an image; its answer, where it takes words, too."""
    for module in (model, getattr(model, "model", None)):
        if hasattr(module, "get_image_features") and "input_ids" not in inputs:
            output = module.get_image_features(**inputs)
            pooled = getattr(output, "pooler_output", None)
            return torch.cat(numbers(output if pooled is None else pooled))
    return model(**inputs).logits.flatten()


CONFIGS = {
    "adaptformer": hvp.AdaptFormerConfig(r=4, modules_to_save=[]),
    "ssf": hvp.SSFConfig(modules_to_save=[]),
    "lora": LoraConfig(r=2),
}


@pytest.mark.filterwarnings("ignore:No task head")
@pytest.mark.parametrize("name", MODELS)
def test_the_tower_is_adapted_and_the_language_model_is_not(name, tmp_path):
    make, make_inputs, path = MODELS[name]
    torch.manual_seed(0)
    base = make().eval()
    with torch.no_grad():
        for parameter in base.parameters():  # some projectors begin with zeros
            parameter.copy_(torch.randn_like(parameter) / 10 if parameter.ndim > 1 else parameter)
    inputs = make_inputs()
    before = features(base, inputs).detach()
    assert hvp.find_backbone(base).path == path
    for method, config in CONFIGS.items():
        model = copy.deepcopy(base)
        adapted = get_peft_model(model, hvp.with_visual_targets(copy.deepcopy(config), model)).eval()
        trained = {n.removeprefix("base_model.model."): p for n, p in adapted.named_parameters() if p.requires_grad}
        assert trained
        assert all(each.startswith(f"{path}.") for each in trained)
        if method != "ssf":  # its scales and shifts start close to 1 and 0
            torch.testing.assert_close(features(adapted.get_base_model(), inputs), before)
        with torch.no_grad():
            for parameter in trained.values():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        after = features(adapted.get_base_model(), inputs)
        assert not torch.allclose(after, before, atol=1e-5)
        after.square().sum().backward()
        assert [each for each, parameter in trained.items() if parameter.grad is None] == []
        adapted.save_pretrained(tmp_path / method)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / method).eval()
        torch.testing.assert_close(features(loaded.get_base_model(), inputs), after.detach())
        norms = {type(module).__name__ for module in model.get_submodule(path).modules()}
        if method == "ssf" and any("RMSNorm" in name for name in norms):
            with pytest.raises(ValueError, match="shift into .*RMSNorm.*have no bias"):
                loaded.merge_and_unload()
        elif method != "adaptformer":
            merged = features(loaded.merge_and_unload(), inputs)
            torch.testing.assert_close(merged, after.detach(), rtol=1e-3, atol=1e-4)
