"""The plain vision transformers of the catalogue of tiny models, with their bare backbones."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from hf_visual_peft import find_backbone
from hf_visual_peft.coverage import tiny
from hf_visual_peft.coverage.models import MODELS, VARIANTS
from hf_visual_peft.coverage.plain import PATCHED
from hf_visual_peft.coverage.tiny import WithHead, liven
from hf_visual_peft.sites import VisualTunerLayer


SIZE, PATCH = PATCHED["image_size"], PATCHED["patch_size"]
WIDTH, DEPTH = PATCHED["hidden_size"], PATCHED["num_hidden_layers"]


@dataclass(frozen=True)
class Family:
    """One family: its model with the usual head, its bare backbone, and inputs for both."""

    name: str
    row: str  # of the coverage matrix
    classifier: Callable[[], nn.Module] | None
    backbone: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    prefix: int
    patches: int = (SIZE // PATCH) ** 2
    before_norms: bool = False  # where frames of videos meet in models that are not adapted

    def model(self) -> nn.Module:
        """With its head where the family has one; the same weights every time."""
        return copy.deepcopy(_made(self.classifier or self.backbone, tuple(PATCHED.items())))


@functools.cache
def _made(build: Callable[[], nn.Module], sizes: tuple) -> nn.Module:
    """A model with random weights, made once for the sizes of the moment: a copy costs half."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return liven(build())


def images(batch: int, height: int = SIZE, width: int = SIZE) -> dict[str, Tensor]:
    return tiny.images(batch, (height, width))


def _family(
    name: str, row: str, backbone: type[nn.Module], prefix: int = 1, variant: bool = False, **kwargs: Any
) -> Family:
    """A family by its row in the coverage matrix, or the variant of that row with its name."""
    entry = VARIANTS[name] if variant else MODELS[row]

    def bare() -> nn.Module:
        model = entry.build()
        config = (model.backbone if isinstance(model, WithHead) else model).config
        return backbone(getattr(config, "vision_config", config))

    with torch.device("meta"):
        with_head = not isinstance(entry.build(), WithHead)
    inputs = partial(entry.inputs, size=entry.size)
    return Family(name, row, entry.build if with_head else None, bare, inputs, prefix, **kwargs)


FAMILIES = {
    family.name: family
    for family in (
        _family("vit", "vit", tf.ViTModel),
        _family("deit", "deit", tf.DeiTModel, 2),
        _family("deit_teacher", "deit", tf.DeiTModel, 2, variant=True),
        _family("beit", "beit", tf.BeitModel),
        _family("beit_shared_bias", "beit", tf.BeitModel, variant=True),
        _family("data2vec", "data2vec-vision", tf.Data2VecVisionModel),
        _family("data2vec_shared_bias", "data2vec-vision", tf.Data2VecVisionModel, variant=True),
        _family("dinov2", "dinov2", tf.Dinov2Model),
        _family("dinov2_swiglu", "dinov2", tf.Dinov2Model, variant=True),
        _family("dinov2_registers", "dinov2_with_registers", tf.Dinov2WithRegistersModel, 5),
        _family("dinov3", "dinov3_vit", tf.DINOv3ViTModel, 5),
        _family("dinov3_gated", "dinov3_vit", tf.DINOv3ViTModel, 3, variant=True),
        _family("ijepa", "ijepa", tf.IJepaModel, 0),
        _family("vit_msn", "vit_msn", tf.ViTMSNModel),
        _family("vit_mae", "vit_mae", tf.ViTMAEModel, patches=8),
        _family("clip", "clip", tf.CLIPVisionModel),
        _family("siglip", "siglip", tf.SiglipVisionModel, 0),
        _family("siglip2", "siglip2", tf.Siglip2VisionModel, 0),
    )
}


def video(family: Family, method: Any, frames: int = 2) -> Family:
    """The family fed with videos; their frames meet where those of the method do."""

    def clips(batch: int) -> dict[str, Tensor]:
        inputs = family.inputs(batch * frames)
        return inputs | {"pixel_values": inputs["pixel_values"].unflatten(0, (batch, frames))}

    return replace(family, inputs=clips, before_norms=method.config_cls.frames_meet_before_norms)


def takes_videos(model: nn.Module) -> bool:
    return any(isinstance(m, VisualTunerLayer) and m.exchange.frame_handles for m in model.modules())


def call(model: nn.Module, inputs: dict[str, Tensor], before_norms: bool = False, **kwargs) -> Any:
    """The model's output; one for images gets the frames of videos, and its heads, or norms, the mean over them."""
    pixels = inputs["pixel_values"]
    if pixels.ndim < 5 or takes_videos(model):
        return model(**inputs, **kwargs)

    def mean_over_frames(module: nn.Module, args: tuple) -> tuple:
        whole = len(args[0]) == pixels.shape[0] * pixels.shape[1]
        return (args[0].unflatten(0, pixels.shape[:2]).mean(dim=1), *args[1:]) if whole else args

    backbone = find_backbone(model)
    norms = backbone.final_norms if before_norms and backbone.heads else ()
    heads = [model.get_submodule(path) for path in (*norms, *backbone.heads)]
    handles = [head.register_forward_pre_hook(mean_over_frames) for head in heads]
    try:
        return model(**inputs | {"pixel_values": pixels.flatten(0, 1)}, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def output_of(model: nn.Module, inputs: dict[str, Tensor], before_norms: bool = False) -> Tensor:
    """Logits, or the last hidden state where there is no head."""
    out = call(model, inputs, before_norms)
    return out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state
