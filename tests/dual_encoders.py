"""Tiny dual encoders with random weights, and tokenizers for them."""

from __future__ import annotations

import functools
import gzip
from importlib.resources import files

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.utils.data import default_collate
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from hf_visual_peft import FeatureCache, ZeroShotClassifier


NAMES = ["cat", "big_dog", "apple pie", "sea"]
SIZE = 16
_LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {**_LAYERS, "image_size": SIZE, "patch_size": 8}
_LETTERS = "abcdefghijklmnopqrstuvwxyz."
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3 + len(_LETTERS)}


@functools.cache
def clip_tokenizer() -> CLIPTokenizer:
    """The tokenizer of CLIP, from the merges in open_clip."""
    packed = files("open_clip").joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = [tuple(line.split()) for line in gzip.decompress(packed).decode().split("\n")[1 : 49152 - 256 - 2 + 1]]
    from open_clip.tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    vocabulary = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, merges=merges)


def letters(start: str | None, end: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single letters, with a token at the start (or none) and one at the end."""
    # the end has the largest id, as in CLIP
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "<unk>", *_LETTERS, "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    single = f"{start} $A {end}" if start else f"$A {end}"
    tokens = [(token, vocabulary[token]) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _clip():
    text = {**_LAYERS, "vocab_size": 40, "max_position_embeddings": 40, **_IDS}
    config = transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=12)
    return transformers.CLIPModel(config), letters("<s>", "</s>")


def _clip_of_2021():
    """CLIP as in the first checkpoints, with the real tokenizer and an end token that is not the tokenizer's."""
    text = {**_LAYERS, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=12)
    return transformers.CLIPModel(config), clip_tokenizer()


def _metaclip_2():
    text = {**_LAYERS, "vocab_size": 40, "max_position_embeddings": 40, **_IDS}
    config = transformers.MetaClip2Config(text_config=text, vision_config=_VISION, projection_dim=12)
    return transformers.MetaClip2Model(config), letters("<s>", "</s>")


def _siglip():
    text = {**_LAYERS, "vocab_size": 40, "max_position_embeddings": 40, **_IDS}
    config = transformers.SiglipConfig(text_config=text, vision_config=_VISION)
    model = transformers.SiglipModel(config)
    torch.nn.init.constant_(model.logit_scale, 2.0)
    torch.nn.init.constant_(model.logit_bias, -3.0)
    return model, letters(None, "</s>")


def _siglip2():
    text = {**_LAYERS, "vocab_size": 40, "max_position_embeddings": 40, **_IDS}
    vision = {**_LAYERS, "num_patches": 4, "patch_size": 8}
    model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))
    torch.nn.init.constant_(model.logit_scale, 2.0)
    return model, letters(None, "</s>")


def _bert(**others):
    return {**_LAYERS, "vocab_size": 40, "max_position_embeddings": 44, "pad_token_id": 0, **others}


def _chinese_clip():
    config = transformers.ChineseCLIPConfig(text_config=_bert(), vision_config=_VISION, projection_dim=12)
    return transformers.ChineseCLIPModel(config), letters("<s>", "</s>")


def _altclip():
    text = _bert(project_dim=16)
    config = transformers.AltCLIPConfig(text_config=text, vision_config=_VISION, projection_dim=12)
    return transformers.AltCLIPModel(config), letters("<s>", "</s>")


def _align():
    vision = {"image_size": SIZE, "hidden_dim": 16, "width_coefficient": 1.0, "depth_coefficient": 0.1}
    vision |= {"in_channels": [32, 16], "out_channels": [16, 16], "kernel_sizes": [3, 3], "strides": [1, 2]}
    vision |= {"num_block_repeats": [1, 1], "expand_ratios": [1, 2], "depthwise_padding": []}
    config = transformers.AlignConfig(text_config=_bert(), vision_config=vision, projection_dim=16)
    return transformers.AlignModel(config), letters("<s>", "</s>")


def _dual():
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**_VISION), transformers.BertConfig(**_bert()), projection_dim=12
    )
    return transformers.VisionTextDualEncoderModel(config), letters("<s>", "</s>")


FAMILIES = {
    "clip": _clip,
    "clip_of_2021": _clip_of_2021,
    "metaclip_2": _metaclip_2,
    "siglip": _siglip,
    "siglip2": _siglip2,
    "chinese_clip": _chinese_clip,
    "altclip": _altclip,
    "align": _align,
    "dual": _dual,
}


def saved(family: str, folder) -> str:
    """A folder with a model of a family, its tokenizer beside it, as on the Hub."""
    torch.manual_seed(0)
    model, tokenizer = FAMILIES[family]()
    for parameter in model.parameters():  # else features of all texts are nearly equal
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def classifier(folder, names=NAMES, **others) -> ZeroShotClassifier:
    """A classifier from a folder."""
    return ZeroShotClassifier.from_pretrained(folder, class_names=names, **others)


def images(family: str, count: int = 3) -> dict[str, torch.Tensor]:
    """A batch for a model of a family."""
    generator = torch.Generator().manual_seed(1)
    if family == "siglip2":  # images of any shape, as patches
        shapes = torch.tensor([[2, 2], [1, 3], [1, 2]])[:count]
        mask = (torch.arange(4) < shapes.prod(1)[:, None]).int()
        pixels = torch.randn(count, 4, 3 * 8 * 8, generator=generator)
        return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return {"pixel_values": torch.randn(count, 3, SIZE, SIZE, generator=generator)}


def assert_learns_from_cache(model, family: str, folder) -> list[torch.Tensor]:
    """Logits and gradients from cached features are those from images, and the image tower does not run for them.

    Returns those from images.
    """
    rows = [{"pixel_values": pixels, "labels": index} for index, pixels in enumerate(images(family)["pixel_values"])]
    cached = FeatureCache(model, folder).cached([rows], key=["images"])
    calls: list[int] = []
    embeddings = model.get_base_model().encoder.vision_model.embeddings
    handle = embeddings.register_forward_hook(lambda *_: calls.append(1))
    found = []
    for samples, collate in ((rows, default_collate), (cached, cached.collate)):
        model.zero_grad()
        calls.clear()
        output = model(**collate([samples[index] for index in range(3)]))
        output.loss.backward()
        found.append([output.logits, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert not calls
    handle.remove()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)
    return found[0]
